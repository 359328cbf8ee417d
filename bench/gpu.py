"""INT4 and bf16 on a GPU: limits, kernels, the model end to end, and peers on the same card, in one call.

    python bench/gpu.py --record                     # under 10 minutes; torch, triton and transformers; no network
    python bench/gpu.py --gpt-fast FOLDER --seconds 720     # a copy of gpt-fast runs beside it
    python bench/gpu.py --dry                        # whether all but gpt-fast runs: on the CPU, tiny

Weights have Mistral-7B's shape and are random, made on the card. Each part is a process of its own with a time limit;
one that fails says so and leaves the others. Kernels run as graphs over copies that fill the cache twice. Decoding is
by gpt-fast's protocol: 200 new tokens at temperature 0.8 and top-k 200, prefill included; and without it, less a run of
one token. The last line is JSON.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit, end_with_parent, keep, known, run_process  # noqa: E402

BEGUN = time.perf_counter()

DRY = "--dry" in sys.argv
if DRY:
    os.environ.setdefault("TRITON_INTERPRET", "1")
D, INNER, LAYERS, HEADS, KV_HEADS, VOCAB = (256, 384, 2, 4, 2, 512) if DRY else (4096, 14336, 32, 32, 8, 32000)
HD = D // HEADS
NEW, REPEATS = (8, 2) if DRY else (200, 5)
SHAPES = {
    "qkv": (D + 2 * KV_HEADS * HD, D),
    "o": (D, D),
    "gate_up": (2 * INNER, D),
    "down": (D, INNER),
    "head": (VOCAB, D),
}
GROUP = 128
SCRATCH = "minichat-bench"
ROOMS = [Path("/dev/shm"), Path(tempfile.gettempdir())]  # where `load` may keep what it reads, in memory if it fits
PARTS = {  # seconds that each may take
    "limits": 90,
    "kernels": 120,
    "int4": 140,
    "bf16": 70,
    "load": 120,
    "gpt_fast": 150,
    "transformers": 140,
}


def where():
    import torch

    return torch.device("cpu" if DRY else "cuda")


def share(of: float, limit: float | None) -> float | None:
    """`of` the limit that `limits` has found, if it has."""
    return of / limit if limit else None


def wait() -> None:
    import torch

    if not DRY:
        torch.cuda.synchronize()


def seconds_of(run, repeats: int = 7) -> float:
    """The median time of run(), which is many launches: a graph that is replayed, or called where there is none."""
    import torch

    run()
    wait()
    call = run
    if not DRY:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        call = graph.replay
        call()

    def took(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    count = max(1, int(5e-3 / took(1)))  # as many as make what the host adds small
    return statistics.median(took(count) for _ in range(repeats))


# ---- limits ----


def limits() -> dict:
    """What the memory and the tensor cores give, and what lies between two kernels."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def read(x, out, steps, BLOCK: tl.constexpr):
        at, found = tl.program_id(0) * steps * BLOCK + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int32)
        for i in range(steps):
            found ^= tl.load(x + at + i * BLOCK)
        tl.store(out + tl.program_id(0), tl.max(found, axis=0))

    size = 1 << (20 if DRY else 30)
    block, steps = 2048, 16
    x = torch.randint(-(2**31), 2**31 - 1, (size // 4,), device=where(), dtype=torch.int32)
    y, out = torch.empty_like(x), torch.empty(len(x) // block // steps, dtype=torch.int32, device=where())
    reading = seconds_of(lambda: read[(len(out),)](x, out, steps, block, num_warps=8))
    copying = seconds_of(lambda: y.copy_(x))
    n = 256 if DRY else 8192
    a, b = (torch.randn(n, n, device=where(), dtype=torch.bfloat16) for _ in range(2))
    product = seconds_of(lambda: [a @ b for _ in range(4)]) / 4
    one = torch.zeros(1, device=where())
    gap = seconds_of(lambda: [one.add_(1) for _ in range(1000)]) / 1000
    return {
        "read_gb_per_s": size / reading / 1e9,
        "copy_gb_per_s": 2 * size / copying / 1e9,
        "matmul_tflop_per_s": 2 * n**3 / product / 1e12,
        "launch_microseconds": gap * 1e6,
    }


# ---- kernels ----


def packed_weight(N: int, K: int):
    """A random weight in the CUDA kernel's layout."""
    import torch
    from minichat.kernels.int4_reference import Packed

    codes = torch.randint(-(2**15), 2**15, (-(-N // 16), K // 128, 16, 32), device=where(), dtype=torch.int16)
    scale = (torch.rand(-(-N // 16), K // GROUP, 16, device=where()) + 0.5) * 0.004
    return Packed(codes, scale.bfloat16(), None, N, K, GROUP, 4)


def kernels(read_gb_per_s: float | None) -> dict:
    """Microseconds, and the share of what the memory gives, of each weight by so many tokens; torch's beside them."""
    import torch
    import torch.nn.functional as F

    from minichat.kernels import named

    int4, found = named("int4_triton"), {}
    cache = 0 if DRY else torch.cuda.get_device_properties(0).L2_cache_size
    for name, (N, K) in SHAPES.items():
        size = N * K // 2 + 2 * N * K // GROUP
        copies = 2 if DRY else 2 * cache // size + 2
        ours = [packed_weight(N, K) for _ in range(copies)]
        floats = [torch.randn(N, K, device=where(), dtype=torch.bfloat16) for _ in range(max(2, -(-copies // 4)))]
        theirs = tinygemm_weights(N, K, copies)
        print(json.dumps(found), flush=True)  # if what follows takes too long or fails, this stays
        for M in (1, 16) if DRY else (1, 4, 16, 32, 64, 128):
            x = torch.randn(M, K, device=where(), dtype=torch.bfloat16)
            out = torch.empty(M, N, device=where(), dtype=torch.bfloat16)
            row = found[f"{name} {M}"] = {}
            took = seconds_of(lambda: [int4.linear(x, w, out) for w in ours]) / copies  # noqa: B023
            row["int4"] = {"microseconds": took * 1e6, "share": share(size / took / 1e9, read_gb_per_s)}
            took = seconds_of(lambda: [F.linear(x, w) for w in floats]) / len(floats)  # noqa: B023
            row["cublas_bf16"] = {"microseconds": took * 1e6, "share": share(2 * N * K / took / 1e9, read_gb_per_s)}
            if theirs:
                multiply = torch.ops.aten._weight_int4pack_mm
                took = seconds_of(lambda: [multiply(x, w, GROUP, s) for w, s in theirs]) / copies  # noqa: B023
                read = size + 2 * N * K // GROUP  # a zero beside each scale
                row["tinygemm"] = {"microseconds": took * 1e6, "share": share(read / took / 1e9, read_gb_per_s)}
            if M == 1:  # the kernel on float weights, as the fused bf16 step has it
                took = seconds_of(lambda: [int4.linear(x, w, out) for w in floats]) / len(floats)  # noqa: B023
                row["bf16"] = {"microseconds": took * 1e6, "share": share(2 * N * K / took / 1e9, read_gb_per_s)}
    return found


def tinygemm_weights(N: int, K: int, copies: int) -> list:
    import torch

    if DRY:
        return []
    made = []
    try:
        for _ in range(copies):
            pairs = torch.randint(0, 256, (N, K // 2), device=where(), dtype=torch.uint8)
            weight = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
            made.append((weight, torch.rand(K // GROUP, N, 2, device=where(), dtype=torch.bfloat16) / 100))
        x = torch.ones(1, K, device=where(), dtype=torch.bfloat16)
        torch.ops.aten._weight_int4pack_mm(x, made[0][0], GROUP, made[0][1])
    except (RuntimeError, AttributeError) as error:  # a torch or a card without it
        print(f"minichat: no tinygemm: {str(error)[:200]}", file=sys.stderr)
        return []
    return made


# ---- the model ----


def make_model(quantised: bool):
    import torch
    from torch import nn

    from minichat import int4
    from minichat.model import Config, without_weights

    model = without_weights(Config(VOCAB, D, INNER, LAYERS, HEADS, KV_HEADS, HD, 4096, 32768, rms_norm_eps=1e-5))
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if quantised and isinstance(module, nn.Linear) and name != "lm_head":
            linear = int4.Int4Linear(packed_weight(module.out_features, module.in_features), "int4_triton")
            setattr(model.get_submodule(parent), leaf, linear)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            shape = module.weight.shape
            drawn = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=where()) * 0.02
            module.weight = nn.Parameter(drawn.to(where(), torch.bfloat16), requires_grad=False)
    return model.eval()


def weight_bytes(model) -> int:
    """What one token reads of the weights: all but the embedding's other rows."""
    tensors = [*model.model.layers.buffers(), *model.model.layers.parameters(), model.lm_head.weight]
    return sum(tensor.nbytes for tensor in tensors)


def end_to_end(quantised: bool, read_gb_per_s: float | None, matmul_tflop_per_s: float | None) -> dict:
    """Tokens/s with prefill and without, by prompt length and batch; prefill's arithmetic beside the card's."""
    import torch

    from minichat.generation import Kept, Sampling, decode

    model, found = make_model(quantised), {}
    plan = [(1, 32), (1, 128), (1, 2048), (4, 32), (16, 32), (32, 32)] if quantised else [(1, 32), (1, 2048)]
    for rows, length in [(1, 8), (4, 8)] if DRY else plan:
        prompts = torch.randint(3, VOCAB, (rows, length)).tolist()
        kept = Kept()  # as in a conversation: to record the graph is part of the first answer alone

        def run(new: int, prompts=prompts, kept=kept) -> tuple[float, float]:
            """Seconds in all, and to the first token."""
            wait()
            start = time.perf_counter()
            steps = decode(model, prompts, new, Sampling(0.8, top_k=200, seed=1), (), kept=kept)
            next(steps)
            first = time.perf_counter() - start
            for _ in steps:
                pass
            wait()
            return time.perf_counter() - start, first

        run(NEW)
        whole = statistics.mean(run(NEW)[0] for _ in range(REPEATS))
        alone = statistics.median(run(1)[0] for _ in range(REPEATS))
        rate = rows * (NEW - 1) / (whole - alone)
        work = 2 * rows * length * (sum(N * K for N, K in SHAPES.values()) - VOCAB * D) * LAYERS
        found[f"batch {rows}, prompt {length}"] = {
            "tokens_per_s_with_prefill": rows * NEW / whole,
            "tokens_per_s": rate,
            "bandwidth_share": share(rate / rows * weight_bytes(model) / 1e9, read_gb_per_s),
            "first_token_seconds": alone,
            "prefill_share": share(work / alone / 1e12, matmul_tflop_per_s),
        }
        print(json.dumps(found), flush=True)  # if what follows takes too long or fails, this stays
    if not DRY:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def load() -> dict:
    """A bf16 folder, in shared memory where that is large enough: seconds until it is INT4 on the card, and until its
    first token.

    Of the second of two processes: the first compiles the kernels.
    """
    import minichat
    from minichat.cli import BASE
    from minichat.tokenizer import Tokenizer

    room = next((room for room in ROOMS if room.is_dir() and shutil.disk_usage(room).free > 20e9), ROOMS[-1])
    folder = room / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        model, tokenizer = make_model(False), Tokenizer(BASE)
        minichat.save(model, tokenizer, folder)
        del model
        code = f"""
import json, sys, time
start = time.perf_counter()
sys.path.insert(0, {str(ROOT)!r})
import torch, minichat
from minichat import int4, weights
imported = time.perf_counter()
model, _ = weights.load_model({str(folder)!r}, {str(where())!r}, torch.bfloat16, int4.Scheme(group_size={GROUP}))
loaded = time.perf_counter()
minichat.generate(model, [[5] * 32], 1, stop_ids=())
print(json.dumps({{"import_seconds": imported - start, "load_seconds": loaded - imported,
                  "first_token_seconds": time.perf_counter() - imported}}))
"""
        for _ in range(2):
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, preexec_fn=end_with_parent)
            if done.returncode:
                raise RuntimeError(done.stderr[-1000:])
        return {**json.loads(done.stdout.splitlines()[-1]), "from": str(room)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- peers ----


def transformers() -> dict:
    """transformers in bf16 with its static cache, compiled: decoding a batch of one."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=INNER, num_hidden_layers=LAYERS, head_dim=HD,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, sliding_window=None, max_position_embeddings=32768,
    )  # fmt: skip
    with where():
        model = MistralForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, VOCAB, (1, 32), device=where())

    def run(new: int) -> float:
        wait()
        start = time.perf_counter()
        cache = {} if DRY else {"cache_implementation": "static"}
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=0.8, top_k=200,
                       pad_token_id=0, **cache)  # fmt: skip
        wait()
        return time.perf_counter() - start

    for _ in range(2):
        run(NEW)
    # half as many tokens, not one: what each call makes anew, a cache and perhaps graphs, is in both
    whole, half = (statistics.median(run(new) for _ in range(3)) for new in (NEW, NEW // 2))
    return {"batch 1, prompt 32": {"tokens_per_s": (NEW - NEW // 2) / (whole - half)}}


def gpt_fast(folder: Path) -> dict:
    """gpt-fast's own code, INT4 in groups of 128, compiled as its README says."""
    sys.path.insert(0, str(folder))
    sys.argv = sys.argv[:1]
    import generate as theirs
    import torch
    from model import ModelArgs, Transformer
    from quantize import WeightOnlyInt4QuantHandler

    with torch.device("meta"):
        model = Transformer(ModelArgs.from_name("Mistral-7B"))
        model = WeightOnlyInt4QuantHandler(model, GROUP).convert_for_runtime()
    model = model.to_empty(device="cuda")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.int32:
            tensor.random_(-(2**31), 2**31 - 1)
        elif tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, device="cuda").to(torch.bfloat16) / 100
    theirs.decode_one_token = torch.compile(theirs.decode_one_token, mode="reduce-overhead", fullgraph=True)
    prompt = torch.randint(3, VOCAB, (32,), device="cuda", dtype=torch.int32)
    times = []
    for _ in range(6):
        wait()
        start = time.perf_counter()
        theirs.generate(
            model, prompt, NEW, batch_size=1, interactive=False, draft_model=None, temperature=0.8, top_k=200
        )
        wait()
        times.append(time.perf_counter() - start)
    return {"batch 1, prompt 32": {"tokens_per_s_with_prefill": NEW / statistics.mean(times[1:])}}


# ---- the run ----


def measured(name: str, args: argparse.Namespace, limits: dict, seconds: float) -> dict:
    command = [sys.executable, __file__, "--part", name, "--known", json.dumps(limits)]
    command += ["--dry"] * DRY + (["--gpt-fast", str(args.gpt_fast)] if args.gpt_fast else [])
    try:
        return run_process(command, seconds)
    finally:
        for room in ROOMS:  # what one that was killed has left
            shutil.rmtree(room / SCRATCH, ignore_errors=True)


def run_part(name: str, args: argparse.Namespace) -> dict:
    reading, arithmetic = map(json.loads(args.known).get, ("read_gb_per_s", "matmul_tflop_per_s"))
    if name in ("int4", "bf16"):
        return end_to_end(name == "int4", reading, arithmetic)
    if name == "kernels":
        return kernels(reading)
    return gpt_fast(args.gpt_fast) if name == "gpt_fast" else globals()[name]()


def show(found: dict, indent: str = "") -> None:
    for name, value in found.items():
        if isinstance(value, dict) and any(isinstance(inside, dict) for inside in value.values()):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        elif isinstance(value, dict):
            figures = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            print(f"{indent}{name:22} {figures}")
        else:
            print(f"{indent}{name:22} {value:.4g}" if isinstance(value, float) else f"{indent}{name:22} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write bench/results/cuda.json")
    parser.add_argument("--gpt-fast", type=Path, metavar="FOLDER", help="a copy of gpt-fast, to run beside")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], help="these parts; --record keeps what "
                        "there is of others, if they are of this commit and card")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=570, help="of all parts: none begins or goes on after that")
    parser.add_argument("--dry", action="store_true", help="tiny and on the CPU: whether it runs")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--known", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(run_part(args.part, args)))
        return
    if args.gpt_fast and not (args.gpt_fast / "generate.py").is_file():
        parser.error(f"--gpt-fast {args.gpt_fast} has no generate.py; give it a copy of gpt-fast")
    if args.only and "gpt_fast" in args.only and not args.gpt_fast:
        parser.error("--only gpt_fast needs --gpt-fast FOLDER")
    if args.record and DRY:
        parser.error("--record is of a card; leave out --dry")
    import torch

    if not DRY and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; --dry runs all of it, tiny, on the CPU")
    import triton

    content = {
        "command": "python " + shlex.join("DIR" if Path(x).is_absolute() else x for x in sys.argv),
        "commit": commit(),
        "machine": "the CPU" if DRY else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }
    earlier = known("cuda.json", content) if args.record and args.only else {}
    found = {name: figures for name, figures in earlier.items() if name in PARTS and name not in args.only}
    for name in PARTS:
        left = args.seconds - (time.perf_counter() - BEGUN)
        if left < 10 or (name not in args.only if args.only else name == "gpt_fast" and not args.gpt_fast):
            continue
        found[name] = measured(name, args, found.get("limits", {}), min(PARTS[name], left))
        print(name)
        show(found[name], "  ")
        sys.stdout.flush()
        if args.record:  # after each part: who stops it keeps what there is
            keep("cuda.json", {**content, **found})
    print(json.dumps({**content, **found}))
    if any("failed" in figures for figures in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
