"""Items from arrays and from the cache's files: the same as from the records, and made once."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from minichat import chat, data, sources, store
from minichat.assets import sums
from minichat.cli import BASE
from minichat.errors import BadInput
from minichat.examples import Dpo, Example, Report, Sft, encode
from minichat.tokenizer import Tokenizer

TOKENIZER = Tokenizer(BASE)
TEMPLATE = chat.template_text("neuralchat", TOKENIZER)
ENCODERS = {"sft": Sft(TOKENIZER, TEMPLATE, 120), "pairs": Dpo(TOKENIZER, TEMPLATE, 150, 70)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINICHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def large(monkeypatch):
    """Every file is large: processes and the cache, blocks of a few records."""
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(store, "BLOCK", 2000)


def write(folder, kind, count=60):
    """Two files of records, the second one compressed and with a bad record."""
    rows = [json.dumps(record) for record in sums.records(kind, count)]
    (folder / "a.jsonl").write_text("\n".join(rows[: count // 2]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([*rows[count // 2 :], "{'a'"]).encode()))
    files = (folder / "a.jsonl", folder / "b.jsonl.gz")
    return sources.Source("both", files)


def expected(source, encoder):
    return encode(sources.all_records(source), encoder)


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_comes_out_is_what_the_records_say(folder, kind):
    source, encoder = write(folder, kind), ENCODERS[kind]
    items, report = store.load(source, encoder)
    wanted, wanted_report = expected(source, encoder)
    assert list(items) == wanted and len(items) == len(wanted) > 50
    assert items.lengths() == [len(item) for item in wanted] == data.lengths(wanted)
    assert report == wanted_report and report.refused == 1 and report.counts
    assert not (folder / "cache").exists()  # small ones are not kept


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_large_source_is_tokenised_once(folder, large, monkeypatch, capfd, kind):
    source, encoder = write(folder, kind), ENCODERS[kind]
    items, report = store.load(source, encoder)
    wanted, wanted_report = expected(source, encoder)
    assert list(items) == wanted and report == wanted_report
    assert items.lengths() == [len(item) for item in wanted]
    assert "tokenising both" in capfd.readouterr().err

    monkeypatch.setattr(store, "_by_all_cores", None)  # a second time nothing is read but the cache
    monkeypatch.setattr(sources, "raw", None)
    items, report = store.load(source, encoder)
    assert list(items) == wanted and report == wanted_report and not capfd.readouterr().err


def test_what_decides_the_items_decides_what_is_found_again(folder, large, monkeypatch):
    source = write(folder, "sft")
    built = []
    monkeypatch.setattr(store, "_by_all_cores", lambda rows, *options: (store.work(some, *options) for some in rows))
    monkeypatch.setattr(store, "_build", lambda *args, build=store._build: (built.append(1), build(*args)))
    zephyr = chat.template_text("zephyr", TOKENIZER)
    for encoder in (
        ENCODERS["sft"],
        Sft(TOKENIZER, zephyr, 120),
        Sft(TOKENIZER, TEMPLATE, 121),
        Sft(TOKENIZER, TEMPLATE, 120, "chat"),
        Sft(TOKENIZER, TEMPLATE, 120, None, "all"),
    ):
        for _ in range(2):
            assert list(store.load(source, encoder)[0]) == expected(source, encoder)[0]
    assert len(built) == 5
    other = Tokenizer(BASE)
    other.add_bos = not other.add_bos
    assert store._key(source, Sft(other, TEMPLATE, 120)) != store._key(source, ENCODERS["sft"])
    other = Tokenizer(BASE)
    other.special_tokens = {**other.special_tokens, "eos_token": "<pad>"}  # before its fingerprint is known
    known = {store._key(source, Sft(TOKENIZER, TEMPLATE, 120, max_prompt_length=most)) for most in (None, 50, 60)}
    known |= {store._key(source, Dpo(TOKENIZER, TEMPLATE, 120, 50)), store._key(source, Sft(other, TEMPLATE, 120))}
    assert len(known) == 5
    before = store._key(source, ENCODERS["sft"])
    stamp, content = source.files[1].stat().st_mtime_ns, source.files[1].read_bytes()
    source.files[1].write_bytes(content[:-9] + content[-9:].swapcase() + b"\n")
    source.files[1].write_bytes(source.files[1].read_bytes()[: len(content)])
    changed = source.files[1].read_bytes() != content
    os.utime(source.files[1], ns=(stamp, stamp))  # another file of the same name, size and time, as archives make them
    assert changed and store._key(source, ENCODERS["sft"]) != before
    source.files[1].write_bytes(content)
    os.utime(source.files[1], ns=(stamp, stamp))
    assert store._key(source, ENCODERS["sft"]) == before
    os.utime(source.files[1], ns=(1, 1))  # changed since
    assert store._key(source, ENCODERS["sft"]) != before
    source.files[0].rename(folder / "c.jsonl")
    moved = sources.Source("both", (folder / "c.jsonl", source.files[1]))
    assert store.load(moved, ENCODERS["sft"])[0][0].where == f"{folder / 'c.jsonl'}:1"


def test_large_vocabularies_take_wider_numbers(folder, monkeypatch):
    tokenizer = Tokenizer(BASE)
    tokenizer.vocab_size = 1 << 17
    block = store.work((0, "f", [(1, {"text": "1 + 2"})]), Sft(tokenizer, TEMPLATE, 50), True)
    assert block.tokens.dtype == np.uint32
    narrow = store.work((0, "f", [(1, {"text": "1 + 2"})]), Sft(TOKENIZER, TEMPLATE, 50), True)
    assert narrow.tokens.dtype == np.uint16 and narrow.tokens.tolist() == block.tokens.tolist()
    for vocab, kind in ((1 << 15, np.uint16), ((1 << 15) + 1, np.uint32), (50_257, np.uint32)):
        tokenizer.vocab_size = vocab
        last = Example([5, vocab - 1], [0, 1])  # the largest id has to fit beside its mask
        monkeypatch.setattr(Sft, "__call__", lambda self, record, counts, last=last: [last])
        block = store.work((0, "f", [(1, {"text": "1 + 2"})]), Sft(tokenizer, TEMPLATE, 50), True)
        assert block.tokens.dtype == kind and block.tokens.tolist() == [5 << 1, (vocab - 1) << 1 | 1]


# ---- what is wrong ----


def test_bad_records_of_large_sources(folder, large):
    source, encoder = write(folder, "sft"), ENCODERS["sft"]
    bad = f"{folder / 'b.jsonl.gz'}:31: not JSON"
    for _ in range(2):  # also where what is found in the cache was not strict
        with pytest.raises(BadInput, match=f"^{bad}"):
            store.load(source, encoder, strict=True)
        _, report = store.load(source, encoder)
        assert report.bad[0].startswith(bad) and str(report).endswith(", 1 bad")
    assert len(list((folder / "cache" / "data").iterdir())) == 1


@pytest.mark.parametrize("is_large", [False, True])
def test_where_everything_is_bad_the_rest_is_not_tried(folder, monkeypatch, is_large):
    monkeypatch.setattr(store, "LARGE", 0 if is_large else 1 << 30)
    monkeypatch.setattr(store, "BLOCK", 1000)
    (folder / "a.jsonl").write_text('{"what": "ever"}\n' * 5000 + '{"text": "too late"}\n')
    source = sources.Source("a", (folder / "a.jsonl",))
    with pytest.raises(BadInput, match=rf"first \d\d\d records are all bad, {folder}/a.jsonl:1: fields \['what'\]"):
        store.load(source, ENCODERS["sft"])
    (folder / "a.jsonl").write_text('{"what": "ever"}\n' * 50)
    with pytest.raises(BadInput, match=r"no record is left.* 50 bad\); .*a.jsonl:1:"):
        store.load(source, ENCODERS["sft"])
    (folder / "a.jsonl").write_text("")
    with pytest.raises(BadInput, match="no record is left"):
        store.load(source, ENCODERS["sft"])
    assert not list((folder / "cache").rglob("*.safetensors"))


def test_a_corrupt_cache_is_one_line(folder, large):
    source, encoder = write(folder, "sft"), ENCODERS["sft"]
    store.load(source, encoder)
    (kept,) = (folder / "cache" / "data").iterdir()
    whole = {file: file.read_bytes() for file in kept.iterdir()}
    for file, content in whole.items():
        for spoilt in (b"", content[: len(content) // 2], b"\xff" * len(content)):
            file.write_bytes(spoilt)
            with pytest.raises(BadInput, match=str(kept)) as error:
                store.load(source, encoder)[0][0]
            assert "\n" not in str(error.value)
        file.write_bytes(content)
    store.load(source, encoder)


def test_a_cache_that_cannot_be_written_is_one_line(folder, large, monkeypatch):
    source = write(folder, "sft")
    (folder / "file").write_text("")
    monkeypatch.setenv("MINICHAT_CACHE", str(folder / "file"))
    with pytest.raises(BadInput, match=f"{folder / 'file'}/data/.*: cannot be written"):
        store.load(source, ENCODERS["sft"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full is Linux's")
@pytest.mark.parametrize("file", ["TOKENS", "INDEX"])
def test_a_disk_that_fills_is_one_line_and_leaves_nothing(folder, large, monkeypatch, file):
    source = write(folder, "sft")
    monkeypatch.setattr(store, file, "/dev/full")
    with pytest.raises(BadInput, match="No space left"):
        store.load(source, ENCODERS["sft"])
    assert not [*(folder / "cache" / "data").glob("*/*")]


def test_a_killed_process_is_one_line(folder, large, monkeypatch):
    source = write(folder, "sft")

    def rows(*_):
        yield from read(source)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        yield from list(read(source)) * 10

    read = store._read
    monkeypatch.setattr(store, "_read", rows)
    with pytest.raises(BadInput, match="killed"):
        store.load(source, ENCODERS["sft"])
    assert not list((folder / "cache").rglob("*.safetensors"))


def test_tokenising_needs_no_torch():
    code = "import sys, minichat.store; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# ---- what is held out ----


def test_what_is_held_out_depends_on_the_record_alone(folder):
    records = [{"text": f"{i} + {i}", "n": i} for i in range(3000)]
    encoder = Sft(TOKENIZER, TEMPLATE, 6)  # some are cut into pieces, which go together
    items, _ = store.of_records("f", records, encoder)
    kept, held = items.split(0.1)
    number = lambda item: int(item.where.rpartition(":")[2])  # noqa: E731
    held_out = {number(item) for item in held}
    assert len(items) > 3000 and 240 < len(held_out) < 360
    assert not held_out & {number(item) for item in kept} and len(kept) + len(held) == len(items)
    assert held.lengths() == [len(item) for item in held]
    assert held_out < {number(item) for item in items.split(0.2)[1]}  # more holds out what less did
    again = [{"n": record["n"], "text": record["text"]} for record in records]  # in another order, also of fields
    random.Random(0).shuffle(again)
    shuffled, _ = store.of_records("g", again, encoder)
    assert {again[number(item) - 1]["n"] + 1 for item in shuffled.split(0.1)[1]} == held_out


def test_reports_add_up():
    whole, part = Report(), Report(2, 30, bad=["f:1: no"], refused=1)
    part.counts["cut"] = 1
    whole.add(part)
    whole.add(part)
    assert str(whole) == "4 records, 60 tokens, 2 cut, 2 bad" and whole.bad == ["f:1: no"] * 2
    for _ in range(2000):
        whole.add(part)
    assert whole.refused == 2002 and len(whole.bad) == 1000  # named up to a limit, counted beyond it
