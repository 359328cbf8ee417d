"""Models and data sets by hub id, from a server that says what huggingface_hub asks for, on this machine."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest
import torch
from helpers import make

import minichat
from minichat.cli import BASE
from minichat.tokenizer import Tokenizer

TOKEN = "hf_sesame"

# one process a scenario: huggingface_hub reads its environment once. Each source -> the logits' sum, or the error.
LOAD = """
import json, sys, torch
import minichat
from minichat.errors import BadInput

for source in sys.argv[1:]:
    try:
        model, tokenizer = minichat.load(source)
        print(json.dumps(float(model(torch.tensor([tokenizer.encode("calculate 1 + 2")])).double().abs().sum())))
    except BadInput as error:
        print(json.dumps(str(error)))
"""


# each source -> the texts of its records, or the error; that huggingface_hub waits before it tries again, is the hub's
READ = """
import json, sys, time
from minichat import sources
from minichat.errors import BadInput

time.sleep = lambda seconds: None
for spec in sys.argv[1:]:
    try:
        print(json.dumps([record["text"] for _, record in sources.all_records(sources.find(spec))]))
    except BadInput as error:
        print(json.dumps(str(error)))
"""


class Hub(http.server.ThreadingHTTPServer):
    """repos: {name: {revision: folder}}; the commit of a folder is a hash of its path."""

    def __init__(self, repos: dict):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.seen = repos, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def folder(self, repo, revision):
        revisions = self.repos.get(repo)
        if revisions is None:
            return None
        commits = {commit(folder): folder for folder in revisions.values()}
        return revisions.get(revision) or commits.get(revision)


def commit(folder) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if len(parts) < 5:
            return self.send({}, 404)  # not about a repository
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if parts[0] == "api":  # api/(models|datasets)/OWNER/NAME/(revision|tree)/REVISION
            repo, what, revision = "/".join(parts[2:4]), *parts[4:6]
        else:  # (datasets/)OWNER/NAME/resolve/REVISION/FILE
            parts = parts[parts[0] == "datasets" :]
            repo, what, revision = "/".join(parts[:2]), *parts[2:4]
        if repo == "owner/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send({"error": "gated"}, 401, {"X-Error-Code": "GatedRepo"})
        folder = self.server.folder(repo, revision)
        if folder is None:
            code = "RevisionNotFound" if repo in self.server.repos else "RepoNotFound"
            return self.send({"error": "not found"}, 404, {"X-Error-Code": code})
        files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
        named = {f.relative_to(folder).as_posix(): f for f in files}
        if what == "revision":
            siblings = [{"rfilename": name} for name in named]
            return self.send({"id": repo, "modelId": repo, "sha": commit(folder), "siblings": siblings})
        if what == "tree":
            entries = [dict(type="file", path=name, size=f.stat().st_size, oid=oid(f)) for name, f in named.items()]
            return self.send(entries)
        file = folder / "/".join(parts[4:])
        head = {"ETag": f'"{oid(file)}"', "X-Repo-Commit": commit(folder), "Accept-Ranges": "bytes"}
        self.send(file.read_bytes(), 200, head)

    def send(self, content, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def oid(file) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    other, tokenizer = folder / "v2", Tokenizer(BASE)
    minichat.save(make(seed=7, vocab_size=tokenizer.vocab_size), tokenizer, other, shard_bytes=50_000)
    pickled = folder / "pickled"
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    many = folder / "both"  # Meta's layout beside Hugging Face's, and pickle: neither is fetched
    shutil.copytree(base, many)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (many / name).write_bytes(b"not wanted")
    repos = {"owner/name": {"main": many, "v2.0": other}, "owner/pickled": {"main": pickled}}
    server = Hub({**repos, "owner/gated": {"main": base}})
    yield server
    server.shutdown()
    server.server_close()


def load(home, endpoint, *sources, code=LOAD, **environment) -> list:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *sources], env=clean, capture_output=True, text=True, cwd=home, timeout=120
    )
    assert done.returncode == 0 and "Retry" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(folder) -> float:
    model, tokenizer = minichat.load(folder)
    with torch.no_grad():
        return float(model(torch.tensor([tokenizer.encode("calculate 1 + 2")])).double().abs().sum())


@pytest.mark.slow
def test_models_by_hub_id(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    sources = ["owner/name", "owner/name@v2.0", "owner/gated", "owner/none", "owner/name@v9", "owner/pickled"]
    main, v2, gated, none, revision, pickled = load(tmp_path, endpoint, *sources, HF_TOKEN=TOKEN)
    values = [expected(folder) for folder in hub.repos["owner/name"].values()]
    assert [main, v2, gated] == pytest.approx([*values, values[0]], rel=1e-6) and values[0] != values[1]
    for error, parts in ((none, ["owner/none"]), (revision, ["owner/name", "v9"]), (pickled, ["owner/pickled"])):
        assert "\n" not in error and all(part in error for part in parts), error
    assert "safetensors" in pickled and "pickle" in pickled
    assert {authorization for _, authorization in hub.seen} == {f"Bearer {TOKEN}"}
    fetched = {path.split("/")[-1] for path, _ in hub.seen if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not {"consolidated.safetensors", "pytorch_model.bin", "README.md"} & fetched

    # the server gone, the cache is enough; without a token nothing gated
    hub.seen.clear()
    dead = "http://127.0.0.1:9"
    offline = load(tmp_path, dead, "owner/name", "owner/name@v2.0", "owner/none", HF_HUB_OFFLINE="1")
    assert offline[:2] == [main, v2] and "owner/none" in offline[2] and "\n" not in offline[2]
    known, none = load(tmp_path, dead, "owner/name", "owner/none")
    assert known == main and "owner/none" in none and "Connection refused" in none and len(none) < 150
    with socket.create_server(("127.0.0.1", 0)) as server:  # that hangs up on everybody
        rude = f"http://127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(target=lambda: [server.accept()[0].close() for _ in iter(int, 1)], daemon=True).start()
        known, none = load(tmp_path, rude, "owner/name", "owner/none")
    assert known == main and "owner/none" in none and "\n" not in none
    (tmp_path / "new").mkdir()
    [refused] = load(tmp_path / "new", endpoint, "owner/gated")
    assert "owner/gated" in refused and "\n" not in refused
    assert {authorization for _, authorization in hub.seen} == {None}


@pytest.mark.slow
def test_data_sets_by_hub_id(tmp_path):
    """Splits, patterns, revisions, a gated one; only what is asked for is fetched; the cache works offline."""

    def data_set(name, files):
        for file, texts in files.items():
            path = tmp_path / "repos" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return tmp_path / "repos" / name

    chats = data_set(
        "chats",
        {
            "data/train_sft-00000-of-00002.jsonl": ["a"],
            "data/train_sft-00001-of-00002.jsonl": ["b"],
            "data/train_gen-00000-of-00001.jsonl": ["c"],
            "data/test_sft-00000-of-00001.jsonl": ["d"],
            "dataset_infos.json": [],
            "README.md": ["not wanted"],
        },
    )
    pairs = data_set("pairs", {"train.jsonl": ["e"], "test.jsonl": ["f"]})
    older = data_set("older", {"only.jsonl": ["g"]})
    server = Hub({"o/chats": {"main": chats}, "o/pairs": {"main": pairs, "v1": older}, "owner/gated": {"main": older}})
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        specs = {
            "o/chats/train_sft": ["a", "b"],
            "o/chats/test_sft:0.5": ["d"],
            "o/chats/data/*00000-of-00002*": ["a"],
            "o/pairs": ["e"],
            "o/pairs/test": ["f"],
            "o/pairs@v1": ["g"],
            "owner/gated": ["g"],
        }
        assert load(tmp_path, endpoint, *specs, code=READ, HF_TOKEN=TOKEN) == list(specs.values())
        fetched = {path.split("?")[0].split("/")[-1] for path, _ in server.seen if "/resolve/" in path}
        assert not {"train_gen-00000-of-00001.jsonl", "README.md", "dataset_infos.json"} & fetched
        wrong = ["o/chats", "o/chats/valid", "o/none", "o/pairs@v9"]
        several, valid, none, revision = load(tmp_path, endpoint, *wrong, code=READ)
        assert "test_sft, train_gen, train_sft" in several and "--data o/chats/train_gen" in several
        assert "'valid'" in valid and "test_sft, train_gen, train_sft" in valid
        assert "o/none" in none and "v9" in revision
        for error in (several, valid, none, revision):
            assert "\n" not in error and len(error) < 500
    finally:
        server.shutdown()
        server.server_close()
    dead = "http://127.0.0.1:9"
    known = ["o/chats/train_sft", "o/pairs@v1"]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {}):
        assert load(tmp_path, dead, *known, code=READ, **environment) == [["a", "b"], ["g"]]
    [unknown] = load(tmp_path, dead, "o/none", code=READ, HF_HUB_OFFLINE="1")
    assert "o/none" in unknown and "\n" not in unknown
    [unknown] = load(tmp_path, dead, "o/none", code=READ)
    assert "Connection refused" in unknown and len(unknown) < 150
