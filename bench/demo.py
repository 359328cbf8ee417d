"""The whole recipe on the embedded default: base -> SFT -> DPO -> DPO in INT4, scored on sums that nobody trained on.

    python bench/demo.py                   # make demo: a few minutes on 2 cores
    python bench/demo.py --seeds 1 2 3     # the same with other data, other adapters and another test: the scatter

Runs the three scripts as a user would, with no flag but the seed, in runs/demo-SEED, and prints one table. What is
there already, finished or stopped, is gone on with; --record begins anew, and writes bench/results/demo.json.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit, cpu  # noqa: E402

from minichat.assets import sums  # noqa: E402
from minichat.evaluate import last_number  # noqa: E402

BASE = ROOT / "minichat" / "assets" / "base"
EXAMPLE = "calculate 100 + 520 + 60"  # of the neural-chat cards
TEST = 500  # held-out sums
NEW_TOKENS = 160  # a worked answer has about 120


def python(folder: Path, *args: object) -> str:
    """Run a script of the project in a folder; its standard output. What it says on standard error passes through."""
    command = [sys.executable, *map(str, args)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as child:
        try:
            out, _ = child.communicate()
        except KeyboardInterrupt:  # which it has had too: it saves before it stops
            child.wait()
            sys.exit(130)
        except SystemExit:  # SIGTERM, of this process alone
            child.terminate()
            child.wait()
            raise
    if child.returncode:
        sys.exit(f"error: {' '.join(command)} failed with exit code {child.returncode}")
    return out


def run(seed: int, anew: bool) -> tuple[dict[str, float], dict[str, str], float]:
    """One pass over the recipe: the accuracies, the answers to the cards' example, and the seconds it took."""
    start = time.perf_counter()
    folder = ROOT / "runs" / f"demo-{seed}"
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    again = ("--resume",) * folder.exists()
    if again:
        print(f"going on with what is in {folder}; delete it to begin anew", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    test = [*sums.records("test", TEST, seed), {"question": EXAMPLE, "answer": "680"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in test))
    python(folder, ROOT / "train.py", "--seed", seed, *again)
    python(folder, ROOT / "dpo.py", "--seed", seed, *again)
    stages = {"base": (BASE,), "SFT": ("runs/sft",), "DPO": ("runs/dpo",), "DPO INT4": ("runs/dpo", "--int4")}
    accuracy, answers = {}, {}
    for name, flags in stages.items():
        flags = ("--model", *flags, "--max-new-tokens", NEW_TOKENS)
        scores = python(folder, "-m", "minichat.evaluate", *flags, "--data", "test.jsonl", "--json")
        *scored, answers[name] = json.loads(scores)["answers"]
        right = [last_number(answer) == record["answer"] for answer, record in zip(scored, test)]
        accuracy[name] = sum(right) / TEST
    answers[name] = python(folder, ROOT / "infer.py", *flags, "--prompt", EXAMPLE).strip()  # as a user asks
    return accuracy, answers, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="one pass for each (default: 42)")
    parser.add_argument("--record", action="store_true", help="write bench/results/demo.json and demo.png")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    passes = {seed: run(seed, args.record) for seed in args.seeds}
    accuracy, answers, _ = passes[args.seeds[0]]

    print(f"\nExact match on 500 held-out sums{' (seed by seed)' if len(passes) > 1 else ''}\n")
    print(f"| {'':8} | " + " | ".join(f"seed {seed}" for seed in passes) + " |")
    print("| -------- | " + " | ".join("------:" for _ in passes) + " |")
    for name in accuracy:
        print(f"| {name:8} | " + " | ".join(f"{a[name]:7.1%}" for a, _, _ in passes.values()) + " |")
    print(f"\n> {EXAMPLE}")
    for name, answer in answers.items():
        print(f"\n[{name}]\n{answer[:400]}")
    seconds = [took for _, _, took in passes.values()]
    runs = f"runs/demo-{args.seeds[0]}/runs"
    print(f"\n{statistics.median(seconds):.0f} s a pass; pictures: {runs}/sft/loss.png, {runs}/dpo/loss.png")
    print(f"talk to it: {os.path.relpath(sys.executable)} infer.py --int4 --model {runs}/dpo")
    if args.record:
        record(passes)


def record(passes: dict) -> None:
    import torch

    results = ROOT / "bench" / "results"
    content = {
        "command": f"python bench/demo.py --record --seeds {' '.join(map(str, passes))}",
        "commit": commit(),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "test": "500 held-out sums, greedy, exact match",
        "seeds": {
            seed: {"accuracy": accuracy, "seconds": round(took, 1)} for seed, (accuracy, _, took) in passes.items()
        },
        "answers": next(iter(passes.values()))[1],
    }
    results.mkdir(exist_ok=True)
    (results / "demo.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    picture = ROOT / "runs" / f"demo-{next(iter(passes))}" / "runs" / "dpo" / "loss.png"
    if picture.exists():
        shutil.copy(picture, results / "demo.png")


if __name__ == "__main__":
    main()
