"""A run that is killed again and again, and resumed each time, against the same run left alone: the same numbers?

    python bench/kills.py                  # some 60 kills of an SFT run and of a DPO run: about 2 minutes
    python bench/kills.py --kills 5 --steps 12

SIGKILL hits train.py --resume, or dpo.py, at a random moment: while it starts, trains or saves. After each one every
checkpoint that is there must be whole, and the files that the last one left must not stop the next. In the end the
metrics, but for their times, and the adapter must be those of the straight run, bit for bit. Exit code 1 if not.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit, cpu  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import runpy  # noqa: E402

import torch  # noqa: E402

import minichat  # noqa: E402
from minichat import checkpoint, cli, files, runs, training  # noqa: E402, F401  # once, for all that is forked
from minichat.assets import sums  # noqa: E402
from minichat.model import Config, Mistral  # noqa: E402
from minichat.tokenizer import Tokenizer  # noqa: E402

FLAGS = {
    "train.py": "--pack --max-length 192 --batch-size 1",
    "dpo.py": "--max-length 256 --max-prompt-length 128 --batch-size 2",
}
BOTH = "--accumulate 2 --lora-dropout 0.1 --log-every 3 --eval-every 5 --resume"


def prepare(folder: Path) -> None:
    """A small random model and small files of records."""
    tokenizer = Tokenizer(cli.BASE)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    more = dict(num_key_value_heads=1, sliding_window=64, max_position_embeddings=512)
    model = Mistral(Config(vocab_size=tokenizer.vocab_size, **shape, **more))
    model.init_weights(0)
    minichat.save(model, tokenizer, folder / "model")
    for script, kind in (("train.py", "sft"), ("dpo.py", "pairs")):
        sums.write(kind, 60, 0, folder / f"{script}.jsonl")
        sums.write(kind, 6, 1, folder / f"{script}.eval.jsonl")


def start(script: str, folder: Path, out: str, steps: int, save_every: int) -> int:
    """Run a script in a fork of this process, which has imported everything; its process id."""
    if pid := os.fork():
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    log = os.open(folder / f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(null, 1), os.dup2(log, 2)
    os.chdir(folder)
    data = f"--model model --data {script}.jsonl --eval-data {script}.eval.jsonl"
    more = f"--steps {steps} --save-every {save_every} --out {out} {BOTH}"
    sys.argv = [script, *f"{data} {FLAGS[script]} {more}".split()]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)


def finished(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(out: Path) -> tuple[list[dict], bytes]:
    """The metrics without their times, and the adapter's tensors."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]
    tensors = files.read_tensors(out / "adapter" / "adapter_model.safetensors")
    return numbers, {name: tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())}


def check(out: Path) -> None:
    """Read all checkpoints that are there."""
    for path, _ in checkpoint.read(out):
        files.read_tensors(path / checkpoint.TENSORS)
        files.read_tensors(path / "adapter" / "adapter_model.safetensors")


def latest(out: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in (out / checkpoint.FOLDER).glob("step-*")), default=0)


def torture(script: str, folder: Path, kills: int, steps: int, save_every: int, rng: random.Random) -> dict:
    """Kill a run about `kills` times and see it through; a fifth of its lives end while it starts."""
    straight, out = f"{script}-straight", folder / f"{script}-killed"
    began = time.perf_counter()
    if code := finished(start(script, folder, straight, steps, save_every)):
        sys.exit(f"error: {script} failed with exit code {code}: {(folder / f'{straight}.log').read_text()}")
    life = time.perf_counter() - began
    done = {"while it starts": 0, "while it trains or saves": 0}
    while True:
        before, pid = latest(out), start(script, folder, out.name, steps, save_every)
        left = kills - sum(done.values())
        early = rng.random() < 0.2
        if left > 0 and early:
            time.sleep(rng.uniform(0, 0.2))
            os.kill(pid, signal.SIGKILL)
        elif left > 0:
            while latest(out) <= before and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.002)
            # some of the steps that are left for each of the lives that are
            time.sleep(rng.uniform(0, 0.7 * life / steps * max(1, (steps - before) / left)))
            os.kill(pid, signal.SIGKILL)
        code = finished(pid)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            sys.exit(f"error: {script} --resume failed with {code}: {(folder / f'{out.name}.log').read_text()[-2000:]}")
        check(out)
        done["while it starts" if latest(out) == before else "while it trains or saves"] += 1
    same = result(out) == result(folder / straight)
    print(f"{script}: killed {done}, {steps} steps: {'the same' if same else 'NOT the same'}", flush=True)
    return {"kills": done, "steps": steps, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="of each run, about")
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--save-every", type=int, default=1, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", action="store_true", help="write bench/results/kills.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(args.seed)
        prepare(folder)
        found = {s: torture(s, folder, args.kills, args.steps, args.save_every, rng) for s in FLAGS}
    if args.record:
        command = f"python bench/kills.py --kills {args.kills} --steps {args.steps} --record"
        content = {
            "command": command,
            "commit": commit(),
            "machine": f"{cpu()}, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__},
            "runs": found,
        }
        (ROOT / "bench" / "results" / "kills.json").write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(0 if all(each["same"] for each in found.values()) else 1)


if __name__ == "__main__":
    main()
