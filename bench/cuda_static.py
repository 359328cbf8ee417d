"""The CUDA kernels as their compiler leaves them, without a GPU: registers, spills, instructions for each weight.

    python bench/cuda_static.py --record      # a minute; needs triton

Each kernel is compiled for sm_80, sm_90 and sm_100 with the tiles that it would have there, and its machine code is
read: how many instructions the innermost loop of a matmul takes for each weight that it reads, all threads together.
A multiprocessor issues four for 32 threads in a cycle, which of an H200 is about 3.5 for each INT4 weight that its
memory delivers.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit  # noqa: E402

from minichat import kernels  # noqa: E402

TARGETS = (80, 89, 90, 100, 120)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a block may have
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
int4, step = kernels.named("int4_triton"), kernels.named("step_triton")
POINTERS = {
    "x": "bf16", "codes": "i16", "scale": "bf16", "zero": "u8", "out": "bf16", "partial": "fp32", "arrived": "i32",
    "squares": "fp32", "next_norm": "bf16", "next_x": "bf16", "next_squares": "fp32", "qkv": "bf16", "cos": "bf16",
    "sin": "bf16", "keys": "bf16", "values": "bf16", "positions": "i64", "now": "i64", "column": "i64", "w": "bf16",
    "q": "u8", "best": "u8", "ids": "i64", "table": "bf16", "norm": "bf16",
}  # fmt: skip
NUMBERS = {"M": "i32", "N": "i32", "K": "i32", "parts": "i32", "eps": "fp32", "slots": "i32", "window": "i32"}
NUMBERS |= {"count": "i32", "candidates": "i32", "top": "i32", "D": "i32"}


def compiled(kernel, target: int, warps: int = 4, stages: int = 3, other: dict | None = None, **constants):
    """The kernel for a target; pointers and sizes are multiples of 16, but for M and slots."""
    types = {name: f"*{kind}" for name, kind in POINTERS.items()} | NUMBERS | (other or {})
    types = {name: types[name] for name in kernel.arg_names if name in types and name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "fp32") not in ("fp32", "i64")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if kernel.arg_names[i] not in ("M", "slots")}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if constants.get("PDL"):
        options["launch_pdl"] = True
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def examine(binary: bytes) -> dict:
    """Registers of a thread, bytes spilled, and the instructions of its longest loop by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        say = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], **say)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], **say).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    return {
        "registers": int(usage["REG"]),
        "spills": int(usage["STACK"]) + int(usage["LOCAL"]),
        "loop": longest_loop(code),
    }


def longest_loop(code: str) -> list[str]:
    """The instructions between a label and the last branch back to it."""
    labels, instructions, longest = {}, [], []
    for line in map(str.strip, code.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            text = instruction[1]
            instructions.append(re.sub(r"^@!?U?P\w+ ", "", text).split()[0])
            target = re.search(r"BRA.*?(\.L_x_\d+)", text)
            if target and target[1] in labels:
                loop = instructions[labels[target[1]] :]
                longest = max(longest, loop, key=len)
    return longest


def matmul(
    target: int, tokens: int, then: str, bits: int = 4, group: int = 128, symmetric: bool = True, kind: str = "bf16"
) -> dict:
    """What linear_kernel is for so many tokens; instructions are those of all threads, for each weight of a tile."""
    BM = max(8, triton.next_power_of_2(tokens))
    BN, warps, stages, _ = int4.TABLES[target][BM]
    of_kind = {name: f"*{kind}" for name in ("x", "out", "next_x", "next_norm", *(["codes"] if bits == 16 else []))}
    found = compiled(
        int4.linear_kernel, target, warps, stages, of_kind, BITS=bits, G=group, SYMMETRIC=symmetric, BN=BN, BM=BM,
        SPLIT=4, NORM=then != "add", THEN=then, PARTS=64, ASM=True, PDL=target >= 90,
    )  # fmt: skip
    figures = examine(found.asm["cubin"])
    loop, weights = figures.pop("loop"), BN * int4.COLUMNS * (2 if then == "silu" else 1)
    figures["shared_bytes"] = found.metadata.shared
    figures["instructions_per_weight"] = round(len(loop) * 32 * warps / weights, 2)
    figures["most_frequent"] = dict(Counter(name.split(".")[0] for name in loop).most_common(6))
    return figures


def others(target: int) -> dict[str, Callable]:
    """What compiles the kernels beside the matmuls, by name."""
    pdl = target >= 90

    def attention(HD: int):
        return compiled(
            step.attention_kernel, target, 4, 2, {"scale": "fp32"}, KVH=8, GROUP=4, HD=HD, SPLIT=32, BS=step.KEYS,
            ASM=True, PDL=pdl,
        )  # fmt: skip

    quantise = {"other": {"scale": "*fp32", "zero": "*fp32"}, "G": 128, "BLOCK": 2048 // 128}
    return {
        **{f"attention, heads of {HD}": partial(attention, HD) for HD in (32, 64, 128, 256)},
        "embed": partial(compiled, step.embed_kernel, target, BLOCK=step.WIDTH),
        "dequantize": partial(compiled, int4.dequantize_kernel, target, G=128, SYMMETRIC=True),
        "quantize": partial(compiled, int4.quantize_kernel, target, **quantise),
    }


def figures_of(compiles: Callable) -> dict:
    kernel = compiles()
    figures = examine(kernel.asm["cubin"])
    del figures["loop"]
    return {**figures, "shared_bytes": kernel.metadata.shared}


def all_of(target: int, token_counts: list[int]) -> dict[str, Callable]:
    """What compiles and examines each kernel, by name."""
    found = {}
    for tokens in token_counts:
        for then in ("", "silu", "add") if tokens <= 32 else ("",):
            name = f"linear{then and '+' + then}, {tokens} token{'s' * (tokens > 1)}"
            found[name] = partial(matmul, target, tokens, then)
    found["linear, 1 token, groups of 32 with zero-points"] = partial(matmul, target, 1, "", group=32, symmetric=False)
    found["linear, 1 token, groups of 64"] = partial(matmul, target, 1, "", group=64)
    found["linear, 1 token, fp16"] = partial(matmul, target, 1, "", kind="fp16")
    for then in ("", "silu", "add"):
        found[f"linear{then and '+' + then}, 1 token, bf16 weights"] = partial(matmul, target, 1, then, bits=16)
        if len(token_counts) > 1:
            found[f"linear{then and '+' + then}, 32 tokens, bf16 weights"] = partial(matmul, target, 32, then, bits=16)
    return found | {name: partial(figures_of, compiles) for name, compiles in others(target).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 32, 64, 128], help="of a matmul")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="sm_80 is 80")
    parser.add_argument("--kernels", default="", metavar="REGEX", help="only those whose name matches")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--record", action="store_true", help="write bench/results/cuda-static.json")
    args = parser.parse_args()
    if args.record and (args.json or args.kernels or list(args.targets) != list(TARGETS)):
        parser.error("--record is of all kernels and targets: leave --json, --kernels and --targets out")
    found: dict[str, dict] = {}
    for target in args.targets:
        of = found[f"sm_{target}"] = {}
        for name, examined in all_of(target, args.tokens).items():
            if not re.search(args.kernels, name):
                continue
            of[name] = figures = examined()
            figures["fits"] = figures["shared_bytes"] <= SHARED[target] * 1024
            share = figures.get("instructions_per_weight", "")
            if not args.json:
                over = "" if figures["fits"] else f" {figures['shared_bytes']} bytes of shared memory are too many"
                line = f"{figures['registers']:4} registers {figures['spills']:4} spilled {share}{over}"
                print(f"sm_{target:<4} {name:50} {line}")
    if not all(found.values()):
        parser.error(f"--kernels {args.kernels}: no kernel has such a name")
    if args.json:
        print(json.dumps(found))
    if args.record:
        content = {
            "command": "python bench/cuda_static.py --record",
            "commit": commit(),
            "versions": {"triton": triton.__version__, "torch": torch.__version__},
            **found,
        }
        (ROOT / "bench" / "results" / "cuda-static.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
