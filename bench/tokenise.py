"""Tokenising a large data set: ours, with templates, masks and the cache, beside `tokenizers.encode_batch` alone.

    python bench/tokenise.py --record            # a generated file of 1 GB, 456,000 chats; about 15 minutes on 2 cores

Rounds alternate between the two, each in a process of its own. encode_batch is given the rendered texts, some
thousand at a time, and only it is timed; ours is everything from the file to the first item.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit, cpu  # noqa: E402

VOCABULARY = 32_000  # Mistral's


def words(rng: random.Random) -> list[str]:
    """Words of a language that nobody speaks, the frequent ones short."""
    syllables = [c + v + e for c in "bdfghklmnprstvw" for v in "aeiou" for e in ("", "n", "r", "s", "st", "th")]
    found = {"".join(rng.choices(syllables, k=1 + i // 6000)): None for i in range(30_000)}
    return list(found)


def write(path: Path, megabytes: int) -> None:
    """A file of chats like SlimOrca's: a system message, a question, an answer; lengths log-normal, 2 kB on average."""
    rng = random.Random(0)
    known = words(rng)
    frequency = [1 / (i + 10) for i in range(len(known))]
    pool = rng.choices(known, frequency, k=1_000_000)  # drawn once: choices() for every word would take an hour

    def text(size: float) -> str:
        at = rng.randrange(len(pool) - 2000)
        return " ".join(pool[at : at + max(3, min(2000, round(rng.lognormvariate(0, 0.8) * size)))]).capitalize() + "."

    with path.open("w") as file:
        while file.tell() < megabytes * 1e6:
            for _ in range(1000):
                says = (("system", text(20)), ("human", text(70)), ("gpt", text(130)))
                turns = [{"from": who, "value": what, "weight": None} for who, what in says]
                file.write(json.dumps({"conversations": turns}) + "\n")


def train_tokenizer(folder: Path, sample: Path) -> None:
    """A BPE of Mistral's size and kind, from the beginning of the file."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False)
    with sample.open() as lines:
        tokenizer.train_from_iterator(islice(lines, 20_000), trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "add_bos_token": True}))


def work(what: str, data: Path, folder: Path) -> dict:
    """One measurement in this process."""
    from minichat import chat, sources, store
    from minichat.examples import Sft
    from minichat.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    template = chat.template_text("neuralchat", tokenizer)
    if what == "encode_batch":
        seconds, tokens, texts = 0.0, 0, []

        def encode() -> None:
            nonlocal seconds, tokens
            start = time.perf_counter()
            found = tokenizer._tokenizer.encode_batch(texts, add_special_tokens=False)
            seconds += time.perf_counter() - start
            tokens += sum(map(len, found))
            texts.clear()

        from minichat import formats

        for _, record in sources.records(data):
            texts.append(chat.text(formats.read(record, formats.CHATS), template, tokenizer, False))
            if len(texts) == 4000:
                encode()
        encode()
        return {"seconds": seconds, "tokens": tokens}
    start = time.perf_counter()
    items, report = store.load(sources.find(str(data)), Sft(tokenizer, template, 2048))
    items[len(items) // 2]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "tokens": report.tokens, "records": report.kept, "peak_gib": peak,
            "peak_of_a_child_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20}  # fmt: skip


def measure(what: str, data: Path, folder: Path, cache: Path) -> dict:
    command = [sys.executable, __file__, "--work", what, "--scratch", str(data.parent), "--tokenizer", str(folder)]
    environment = {**os.environ, "MINICHAT_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="keep the file here, to use it again")
    parser.add_argument("--record", action="store_true", help="write bench/results/tokenise.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.scratch / "chats.jsonl", args.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as thrown_away:
        scratch = args.scratch or Path(thrown_away)
        scratch.mkdir(exist_ok=True)
        data, folder = scratch / "chats.jsonl", scratch / "tokenizer"
        if not data.exists():
            write(data, args.megabytes)
            train_tokenizer(folder, data)
        rounds = []
        for i in range(args.rounds):
            cache = Path(thrown_away) / f"cache-{i}"
            found = {"encode_batch": measure("encode_batch", data, folder, cache)}
            found["ours"] = measure("ours", data, folder, cache)
            found["again"] = measure("again", data, folder, cache)
            rounds.append(found)
        size = data.stat().st_size
    ratios = [found["ours"]["seconds"] / found["encode_batch"]["seconds"] for found in rounds]
    print(f"{statistics.median(ratios):.2f}x the time of encode_batch ({min(ratios):.2f}-{max(ratios):.2f})")
    if args.record:
        import tokenizers

        content = {
            "command": "python bench/tokenise.py --record",
            "commit": commit(),
            "machine": f"{cpu()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
            "file": f"{size / 1e6:.0f} MB of generated chats, BPE of {VOCABULARY} tokens",
            "rounds": rounds,
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        }
        (ROOT / "bench" / "results" / "tokenise.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
