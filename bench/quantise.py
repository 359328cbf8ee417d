"""A 7B of bf16 shards on disk to its first token in INT4 on the CPU: the first start, which quantises, and the next.

    python bench/quantise.py --record            # about 8 minutes, 20 GB of disk in --scratch

The model has Mistral-7B's shape and random weights. Each start is a process of its own, so that its peak is its own.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit, cpu  # noqa: E402

LAYERS = 32


def make(folder: Path) -> None:
    """Write Mistral-7B-v0.1's shape in bf16 with random weights: a shard a layer, in Hugging Face format."""
    import torch
    from safetensors.torch import save_file

    from minichat.assets import sums
    from minichat.files import write_json
    from minichat.model import Config, Mistral
    from minichat.weights import INDEX

    config = Config(32000, 4096, 14336, LAYERS, 32, 8, 128, 4096, 32768, rms_norm_eps=1e-5)
    sums.train_tokenizer(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Mistral(config).named_parameters()}
    files = {}
    generator = torch.Generator().manual_seed(0)
    groups = [[n for n in shapes if f"layers.{i}." in n] for i in range(LAYERS)]
    groups.append([n for n in shapes if ".layers." not in n])
    for i, names in enumerate(groups):
        tensors = {}
        for name in names:
            drawn = torch.empty(shapes[name], dtype=torch.bfloat16)
            tensors[name] = drawn.fill_(1) if "norm" in name else drawn.normal_(0, 0.02, generator=generator)
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", config.to_dict(torch.bfloat16))  # last: by it the folder is known to be whole


def work(model: Path) -> dict:
    """One start, as infer.py's: seconds from the process's beginning, and the peak of resident memory, GiB."""
    begun = time.clock_gettime(time.CLOCK_BOOTTIME) - float(Path("/proc/self/stat").read_text().split()[21]) / 100
    start = time.perf_counter() - begun
    from minichat import device, packed
    from minichat.generation import Sampling, decode

    found = {"imports_seconds": time.perf_counter() - start}
    loaded, _ = packed.load_model(str(model), device="cpu", int4=True)
    found["loaded_seconds"] = time.perf_counter() - start
    next(iter(decode(loaded, [[3, 4, 5, 6]], 1, Sampling(), ())))
    found["first_token_seconds"] = time.perf_counter() - start
    found["peak_gib"] = device.peak_memory_gib(loaded.device)
    return found


def measure(model: Path, cache: Path) -> dict:
    """work() in a process of its own."""
    environment = {**os.environ, "MINICHAT_CACHE": str(cache)}
    command = [sys.executable, __file__, "--work", str(model)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="keep the shards here, to use them again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write bench/results/quantise.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is thrown away goes then too
    if args.work:
        print(json.dumps(work(args.work)))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as thrown_away:
        shards = (args.scratch or Path(thrown_away)) / "bf16"
        if not (shards / "config.json").exists():
            print(f"writing 14.5 GB of random weights to {shards}", file=sys.stderr)
            shards.mkdir(parents=True, exist_ok=True)
            make(shards)
        first = measure(shards, Path(thrown_away))
        print(f"first start: {show(first)}")
        rounds = []
        for _ in range(args.rounds):
            rounds.append(measure(shards, Path(thrown_away)))
            print(f"next start:  {show(rounds[-1])}", flush=True)
    if args.record:
        again = {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
        record({"first_start": first, "next_start": again, "rounds": rounds})


def show(found: dict) -> str:
    return (
        f"imports {found['imports_seconds']:.1f} s, model there at {found['loaded_seconds']:.1f} s, "
        f"first token at {found['first_token_seconds']:.1f} s, peak {found['peak_gib']:.2f} GiB"
    )


def record(results: dict) -> None:
    import torch

    content = {
        "command": "python bench/quantise.py --record",
        "commit": commit(),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": "Mistral-7B's shape, random weights, INT4 group 32 symmetric, head INT8",
        **results,
    }
    (ROOT / "bench" / "results").mkdir(exist_ok=True)
    (ROOT / "bench" / "results" / "quantise.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
