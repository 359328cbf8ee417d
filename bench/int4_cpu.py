"""A 7B on the CPU: bf16 shards on disk -> INT4 in memory -> prefill and decode; our kernel beside the reference's.

    python bench/int4_cpu.py --record            # about 15 minutes, 20 GB of disk in --scratch

The model has Mistral-7B's shape and random weights. One process quantises it as it reads it and saves it; then
rounds of the two kernels alternate over the saved folder, each in a process of its own, so that peaks are its own.
The reference dequantises every weight for every token, so it decodes few of them.
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


def work(model: Path, save: Path | None, prompt: int, new: int) -> dict:
    """Load, prefill, decode in this process; seconds, tokens/s and the peak of resident memory, GiB."""
    import torch

    import minichat
    from minichat import device
    from minichat.generation import Sampling, decode
    from minichat.tokenizer import Tokenizer

    start = time.perf_counter()
    loaded, _ = minichat.load(model, device="cpu", int4=True)
    found = {"load_seconds": time.perf_counter() - start}
    found["load_peak_gib"] = device.peak_memory_gib(loaded.device)
    ids = torch.randint(3, 32000, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    list(decode(loaded, [ids[:4]], 1, Sampling(), ()))  # warm: threads, pages
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in decode(loaded, [ids], new + 1, Sampling(), ())]
    found["prefill_tokens_per_s"] = prompt / times[0]
    found["decode_tokens_per_s"] = new / (times[-1] - times[0])
    found["peak_gib"] = device.peak_memory_gib(loaded.device)
    if save:
        minichat.save(loaded, Tokenizer(model), save)
    return found


def measure(model: Path, kernel: str, save: Path | None = None) -> dict:
    """work() in a process of its own, with our kernel or the reference's."""
    prompt, new = (128, 16) if kernel == "ours" else (128, 2)
    environment = {**os.environ, "MINICHAT_KERNEL": "" if kernel == "ours" else "reference"}
    command = [sys.executable, __file__, "--work", str(model), "--prompt", str(prompt), "--new", str(new)]
    command += ["--save", str(save)] if save else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="keep the models here, to use them again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write bench/results/int4-cpu.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--new", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is thrown away goes then too
    if args.work:
        print(json.dumps(work(args.work, args.save, args.prompt, args.new)))
        return
    with tempfile.TemporaryDirectory() as thrown_away:
        scratch = args.scratch or Path(thrown_away)
        bf16, int4 = scratch / "bf16", scratch / "int4"
        if not (bf16 / "config.json").exists():
            print(f"writing 14.5 GB of random weights to {scratch}; all of it: 15 minutes, 20 GB", file=sys.stderr)
            make(bf16)
        quantised = measure(bf16, "ours", int4)
        print(f"bf16 -> INT4 while reading: {show(quantised)}")
        rounds = []
        for i in range(args.rounds):
            rounds.append({kernel: measure(int4, kernel) for kernel in ("ours", "reference")})
            for kernel, found in rounds[-1].items():
                print(f"round {i + 1}, {kernel:9}: {show(found)}", flush=True)
    ratios = {}
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        each = [r["ours"][key] / r["reference"][key] for r in rounds]
        ratios[key] = {"median": statistics.median(each), "least": min(each), "most": max(each)}
        print(f"{key}: {ratios[key]['median']:.2f}x the reference's ({min(each):.2f}-{max(each):.2f})")
    if args.record:
        record({"quantised": quantised, "rounds": rounds, "ratios": ratios})


def show(found: dict) -> str:
    return (
        f"load {found['load_seconds']:.1f} s, prefill of 128 {found['prefill_tokens_per_s']:.2f} tok/s, "
        f"decode {found['decode_tokens_per_s']:.2f} tok/s, peak {found['peak_gib']:.2f} GiB"
    )


def record(results: dict) -> None:
    import torch
    from demo import cpu

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    content = {
        "command": "python bench/int4_cpu.py --record",
        "commit": commit.strip(),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": "Mistral-7B's shape, random weights, INT4 group 32 symmetric, head in fp32, activations fp32",
        **results,
    }
    (ROOT / "bench" / "results").mkdir(exist_ok=True)
    (ROOT / "bench" / "results" / "int4-cpu.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
