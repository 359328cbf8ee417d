"""INT4 on CUDA: y = x @ weight^T straight from the codes, in Triton, for up to 128 tokens; above, cuBLAS over scratch.

Rows are kept 16 at a time, each group of 128 columns in one piece of 1 KiB:

    codes  (N / 16, K / 128, 16, 32) int16      N rounded up; word c of a row holds columns c, 32 + c, 64 + c, 96 + c
    scale  (N / 16, K / G, 16)                  as on disk
    zero   (N / 16, K / G, 16) uint8, or None: 8

so that a word's four nibbles belong to four runs of 32 columns, and two neighbouring words in one register become two
neighbouring weights of each run by a shift and one logical operation: `nibble | 0x4300` is the bf16 number 128 + q (of
fp16, `| 0x6400` is 1024 + q), and less 128 + zero it is q - zero, exactly. A tile of weights times a tile of tokens is
then a product of tensor cores with float32 sums, weights on the left because there they stay in registers; a group's
sum is multiplied by its scale in float32.

A weight has too few tiles to fill the card, so that several programs share the columns of one (split-K). The last of
them to arrive adds all their sums in a fixed order: the same bits on every run, and no second kernel.
"""

import functools
import re
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from minichat import files
from minichat.console import say
from minichat.errors import BadInput
from minichat.kernels import int4_reference as reference

if TorchVersion(triton.__version__) < (3, 5):  # whose products take no 8 tokens
    raise ImportError(f"triton {triton.__version__} is installed; the kernel needs 3.5, which comes with torch 2.9")

Packed = reference.Packed
ROWS, COLUMNS = 16, 128  # of a piece of the layout
MOST_TOKENS = 128  # beyond, a weight is read once for so many that to write it out costs little
WORKSPACE = 1 << 22  # floats for the sums of programs that share a tile
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, and without assembly

# Rows of a tile, warps, stages of the pipeline and programs for each multiprocessor, by the tokens of a tile: those
# that spill nothing and take the fewest instructions (bench/cuda_static.py). Four warps over 64 rows would use the
# tensor memory of sm_100, and spend their time getting weights into it.
GENERIC = {8: (64, 2, 4, 6), 16: (64, 2, 3, 6), 32: (64, 4, 3, 4), 64: (128, 8, 3, 2), 128: (32, 4, 3, 2)}
TABLES = {
    80: {**GENERIC, 16: (64, 4, 3, 4)},
    86: {**GENERIC, 8: (64, 2, 3, 4), 16: (64, 4, 3, 3)},  # less shared memory, and less bandwidth to fill
    89: {**GENERIC, 8: (64, 2, 3, 4), 16: (64, 4, 3, 3)},
    90: {**GENERIC, 32: (64, 4, 3, 3), 128: (128, 8, 3, 1)},
    100: {**GENERIC, 32: (32, 2, 3, 8), 64: (32, 4, 3, 4), 128: (16, 4, 3, 4)},
}
TABLES[120] = {**TABLES[100], 8: (64, 2, 3, 4)}  # the shared memory of 89


def _planes(offset: str) -> tl.constexpr:
    """PTX: of two words in $4, the four pairs of nibbles | offset, in $0 .. $3."""
    shifts = "".join(f"shr.u32 {to}, $4, {4 * i};" for i, to in enumerate("stu", 1))
    ors = "".join(f"lop3.b32 ${i}, {of}, 0x000F000F, {offset}, 0xEA;" for i, of in enumerate(("$4", "s", "t", "u")))
    return tl.constexpr(f"{{ .reg .b32 s, t, u; {shifts} {ors} }}")


PLANES_BF16, PLANES_FP16 = _planes("0x43004300"), _planes("0x64006400")


# ---- the kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def planes(w, dtype: tl.constexpr, ASM: tl.constexpr):
    """int16 words -> the four runs of their codes as numbers 128 + q (bf16) or 1024 + q (fp16)."""
    if ASM:
        text: tl.constexpr = PLANES_BF16 if dtype == tl.bfloat16 else PLANES_FP16
        return tl.inline_asm_elementwise(
            text, "=r,=r,=r,=r,r", [w], dtype=(dtype.value, dtype.value, dtype.value, dtype.value), is_pure=True, pack=2
        )
    else:
        word = w.to(tl.int32)
        above: tl.constexpr = 1024 if dtype == tl.float16 else 128
        a, b = (word & 15) + above, (word >> 4 & 15) + above
        c, d = (word >> 8 & 15) + above, (word >> 12 & 15) + above
        return a.to(dtype), b.to(dtype), c.to(dtype), d.to(dtype)


@triton.jit
def with_offset(zero, dtype: tl.constexpr):
    """Zero-points as the numbers that planes() makes of codes."""
    if dtype == tl.bfloat16:
        return (zero.to(tl.int16) | 0x4300).to(dtype, bitcast=True)
    elif dtype == tl.float16:
        return (zero.to(tl.int16) | 0x6400).to(dtype, bitcast=True)
    else:
        return zero.to(dtype) + 128


@triton.jit
def add_int4(sums, x, codes, scale, zero, n, g, K, seen, G: tl.constexpr, SYMMETRIC: tl.constexpr, ASM: tl.constexpr):
    """sums (BN, BM) + rows n of the weight times the tokens at x (32, BM), columns 128 g and the 127 after."""
    # float32 in the interpreter, which has no arithmetic of bf16; products of bf16 are exact there too
    dtype: tl.constexpr = x.dtype.element_ty if ASM else tl.float32
    middle: tl.constexpr = 1024 if dtype == tl.float16 else 128
    block, row = n // 16, n % 16
    words = codes + ((block * (K // 128) + g) * 512 + row * 32)[:, None] + tl.arange(0, 32)[None, :]
    a, b, c, d = planes(tl.load(words, eviction_policy="evict_first"), dtype, ASM)
    at = block * (K // G * 16) + row + (g * (128 // G) if G < 128 else g // (G // 128)) * 16
    dot = tl.zeros(sums.shape, tl.float32)
    for i in tl.static_range(4):
        run = a if i == 0 else b if i == 1 else c if i == 2 else d
        if i > 0 and i * 32 % G == 0:
            at += 16
        if SYMMETRIC:
            run = run - (middle + 8)
        else:
            if i * 32 % G == 0:
                below = with_offset(tl.load(zero + at), dtype)[:, None]
            run = run - below
        dot = tl.dot(run, tl.load(x + i * 32, mask=seen, other=0.0).to(dtype), dot, input_precision="ieee")
        if i == 3 or (i + 1) * 32 % G == 0:
            sums += tl.load(scale + at).to(tl.float32)[:, None] * dot
            dot = tl.zeros(sums.shape, tl.float32)
    return sums


@triton.jit
def add_float(sums, x, weight, n, g, K, seen, ASM: tl.constexpr):
    """The same for a weight (N, K) of x's type."""
    dtype: tl.constexpr = x.dtype.element_ty if ASM else tl.float32
    k = tl.arange(0, 128)
    w = tl.load(weight + n[:, None] * K + g * 128 + k[None, :], eviction_policy="evict_first").to(dtype)
    return tl.dot(w, tl.load(x, mask=seen, other=0.0).to(dtype), sums, input_precision="ieee")


@triton.jit
def prefetch(codes, rows, g, N, K, BN: tl.constexpr, COUNT: tl.constexpr):
    """Ask for the pieces of rows, columns 128 g and on, that the loop reads first: they come while others compute."""
    line = tl.arange(0, BN // 2)  # of 128 bytes
    block = tl.minimum((rows + line // 8 * 16) // 16, (N - 1) // 16)
    at = codes + (block * (K // 128) + g) * 512 + line % 8 * 64
    for i in tl.static_range(COUNT):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(at + tl.minimum(i, K // 128 - 1 - g) * 512).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def linear_kernel(
    x, codes, scale, zero, out, partial, arrived, M, N, K,
    squares, parts, eps, next_norm, next_x, next_squares,
    BITS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLIT: tl.constexpr, NORM: tl.constexpr, THEN: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) @ weight (N, K)^T. Programs: (tiles of N, SPLIT).

    THEN: "" writes that; "silu" takes the weight as two of N rows, one above the other, and writes silu(first) *
    second; "add" adds it to what out holds, and leaves for the next norm next_x = out * next_norm and, for each tile,
    the sum of its squares, next_squares (tiles, M). NORM: x is such a next_x, and 1 / rms follows from its squares
    (parts, M): as it is one number a token, it comes after the sum over columns.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = x.dtype.element_ty
    GATED: tl.constexpr = THEN == "silu"
    rows, m = tile * BN + tl.arange(0, BN), tl.arange(0, BM)
    n = tl.minimum(rows, N - 1)  # those beyond are computed, and not written
    seen = m[None, :] < M
    first, last = K // 128 * part // SPLIT, K // 128 * (part + 1) // SPLIT
    if PDL:
        if BITS == 4:  # the weights are there already; x is not
            prefetch(codes, tile * BN, first, N * (2 if GATED else 1), K, BN, 3)
            if GATED:
                prefetch(codes, tile * BN + N, first, 2 * N, K, BN, 3)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if NORM:
        p = tl.arange(0, PARTS)
        squared = tl.load(squares + p[:, None] * M + m[None, :], mask=(p[:, None] < parts) & seen, other=0.0)
        squared = tl.sum(squared, axis=0)
    sums = tl.zeros((BN, BM), tl.float32)
    gated = tl.zeros((BN, BM), tl.float32)
    tokens = x + m[None, :] * K + tl.arange(0, 32 if BITS == 4 else 128)[:, None]
    for g in range(first, last):
        here = tokens + g * 128
        if BITS == 4:
            sums = add_int4(sums, here, codes, scale, zero, n, g, K, seen, G, SYMMETRIC, ASM)
            if GATED:
                gated = add_int4(gated, here, codes, scale, zero, n + N, g, K, seen, G, SYMMETRIC, ASM)
        else:
            sums = add_float(sums, here, codes, n, g, K, seen, ASM)
            if GATED:
                gated = add_float(gated, here, codes, n + N, g, K, seen, ASM)
    if SPLIT > 1:
        size: tl.constexpr = BN * BM * (2 if GATED else 1)
        at = partial + tile * (SPLIT * size) + tl.arange(0, BN)[:, None] * BM + m[None, :]
        tl.store(at + part * size, sums, mask=seen)
        if GATED:
            tl.store(at + part * size + BN * BM, gated, mask=seen)
        tl.debug_barrier()  # all threads have written; the atomic's release is that of one of them
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") != SPLIT - 1:
            return
        sums, gated = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
        for s in range(SPLIT):
            sums += tl.load(at + s * size, mask=seen, other=0.0, cache_modifier=".cg")
            if GATED:
                gated += tl.load(at + s * size + BN * BM, mask=seen, other=0.0, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    if NORM:
        root = tl.rsqrt(squared / K + eps)
        sums *= root[None, :]
        gated *= root[None, :]
    seen &= (rows < N)[:, None]
    to = out + m[None, :] * N + n[:, None]
    if GATED:
        gate = sums.to(dtype).to(tl.float32)  # rounded where the unfused model rounds
        y = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * gated.to(dtype).to(tl.float32)
    else:
        y = sums
    if THEN == "add":
        y = y.to(dtype).to(tl.float32) + tl.load(to, mask=seen, other=0.0).to(tl.float32)
        y = y.to(dtype).to(tl.float32)
        scaled = y * tl.load(next_norm + n).to(tl.float32)[:, None]
        tl.store(next_x + m[None, :] * N + n[:, None], scaled.to(dtype), mask=seen)
        tl.store(next_squares + tile * M + m, tl.sum(tl.where(seen, y * y, 0.0), axis=0), mask=m < M)
    tl.store(to, y.to(dtype), mask=seen)


@triton.jit
def dequantize_kernel(codes, scale, zero, out, N, K, G: tl.constexpr, SYMMETRIC: tl.constexpr):
    """out (N, K), in its type. Programs: (pieces of 16 rows, K / 128)."""
    block, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, c = tl.arange(0, 16), tl.arange(0, 32)
    word = tl.load(codes + (block * (K // 128) + g) * 512 + row[:, None] * 32 + c[None, :]).to(tl.int32)
    n = block * 16 + row
    for i in tl.static_range(4):
        at = (block * (K // G) + (g * 128 + i * 32) // G) * 16 + row
        q = word >> 4 * i & 15
        q -= 8 if SYMMETRIC else tl.load(zero + at).to(tl.int32)[:, None]
        w = q.to(tl.float32) * tl.load(scale + at).to(tl.float32)[:, None]
        to = out + n[:, None] * K + g * 128 + i * 32 + c[None, :]
        tl.store(to, w.to(out.dtype.element_ty), mask=(n < N)[:, None])


@triton.jit
def quantize_kernel(w, scale, zero, q, best, count, candidates, top, G: tl.constexpr, BLOCK: tl.constexpr):
    """Of each group of w (count, G), which of the candidates (scale and zero-point) errs least, and its codes."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = group < count
    at = group.to(tl.int64)[:, None] * G + tl.arange(0, G)[None, :]
    x = tl.load(w + at, mask=there[:, None], other=0.0).to(tl.float32)
    least, chosen = tl.full((BLOCK,), float("inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    codes = tl.zeros((BLOCK, G), tl.float32)
    for i in range(candidates):
        s = tl.load(scale + i * count + group, mask=there, other=1.0)[:, None]
        z = tl.load(zero + i * count + group, mask=there, other=0.0)[:, None]
        steps = tl.minimum(tl.maximum(tl.div_rn(x, s + tl.zeros_like(x)), -z), top - z)
        steps = (steps + 12582912.0) - 12582912.0  # to the nearest, ties to even: 1.5 * 2^23 leaves no fraction
        error = tl.sum((steps * s - x) * (steps * s - x), axis=1)
        better = (error < least) | (i == 0)  # also where all of them overflow
        least, chosen = tl.where(better, error, least), tl.where(better, i, chosen)
        codes = tl.where(better[:, None], steps + z, codes)
    tl.store(q + at, codes.to(tl.uint8), mask=there[:, None])
    tl.store(best + group, chosen.to(tl.uint8), mask=there)


# ---- the functions of a kernel --------------------------------------------------------------------------------------
def serves(N: int, K: int, group_size: int, bits: int) -> bool:
    """Whether the layout holds such a weight: 4 bits, columns in whole pieces, and groups that fill or divide those."""
    return bits == 4 and K % COLUMNS == 0 and (group_size in (32, 64) or group_size % COLUMNS == 0)


def pack(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Packed:
    """As int4_reference's. What the layout does not hold is packed and multiplied as the reference does."""
    group_size = reference.check(q, scale, zero, bits)
    (N, K) = q.shape
    if not serves(N, K, group_size, bits):
        columns, groups = f"INT4 weights of {K} columns", f"INT4 weights in groups of {group_size}"
        _warn("INT8 weights" if bits == 8 else columns if K % COLUMNS else groups)
        return reference.pack(q, scale, zero, bits)
    runs = _blocks(q).view(-1, ROWS, K // COLUMNS, 4, 32).to(torch.int16)
    words = runs[..., 0, :] | runs[..., 1, :] << 4 | runs[..., 2, :] << 8 | runs[..., 3, :] << 12
    codes = words.transpose(1, 2).contiguous()
    scale, zero = (x if x is None else _blocks(x).transpose(1, 2).contiguous() for x in (scale, zero))
    return Packed(codes, scale, zero, N, K, group_size, bits)


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """The (q, scale, zero) that `pack` was given, exactly."""
    if not is_ours(packed):
        return reference.unpack(packed)
    N, K = packed.out_features, packed.in_features
    words = packed.codes.transpose(1, 2)  # (N / 16, 16, K / 128, 32)
    q = torch.stack([(words >> 4 * i & 15).to(torch.uint8) for i in range(4)], dim=-2).view(-1, K)[:N]
    scale, zero = (
        x if x is None else x.transpose(1, 2).flatten(0, 1)[:N].contiguous() for x in (packed.scale, packed.zero)
    )
    return q.contiguous(), scale, zero


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight, (N, K): computed in fp32 and rounded once to `dtype`."""
    if not is_ours(packed):
        return reference.dequantize(packed, dtype)
    N, K = packed.out_features, packed.in_features
    out = torch.empty(N, K, dtype=dtype, device=packed.codes.device)
    with on(out):
        dequantize_kernel[packed.codes.shape[:2]](
            packed.codes, packed.scale, packed.zero, out, N, K, packed.group_size, packed.zero is None
        )
    return out


def matmul(x: Tensor, packed: Packed, exact: bool = True) -> Tensor:
    """x (..., K) -> x @ weight^T (..., N), in x's dtype, with float32 sums. float32 goes by way of the whole weight."""
    if not is_ours(packed):
        return reference.matmul(x, packed, exact)
    N, K = packed.out_features, packed.in_features
    reference.check_input(x, K, packed)
    rows = x.detach().reshape(-1, K).contiguous()
    if rows.shape[0] > MOST_TOKENS or x.dtype == torch.float32:
        return F.linear(x, dequantize(packed, x.dtype))
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)  # no view, which could not be written over
    if len(rows):
        linear(rows, packed, out.view(-1, N))
    return out


def matmul_transposed(grad: Tensor, packed: Packed) -> Tensor:
    """grad (..., N) -> grad @ weight (..., K), in grad's dtype: the gradient of `matmul` to its input."""
    reference.check_input(grad, packed.out_features, packed)
    return grad @ dequantize(packed, grad.dtype)


def quantize(
    w: Tensor, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As in int4_reference. The scales to try are its own, so only the order of the sums of squares differs."""
    reference.check_weight(w, group_size, bits, scale_dtype)
    if group_size & (group_size - 1):
        return reference.quantize(w, group_size, bits, symmetric, scale_dtype)
    N, K = w.shape
    q = torch.empty(N, K, dtype=torch.uint8, device=w.device)
    scale = torch.empty(N, K // group_size, dtype=scale_dtype, device=w.device)
    zero = torch.empty(N, K // group_size, dtype=torch.uint8, device=w.device)
    for rows in reference.chunks(N, K // 8):  # it has no temporaries but the candidates
        part = w[rows].detach().contiguous()
        scales, zeros = reference.candidates(part.view(len(part), -1, group_size), bits, symmetric, scale_dtype)
        count, block = part.numel() // group_size, max(1, 2048 // group_size)
        best = torch.empty(len(part), K // group_size, dtype=torch.uint8, device=w.device)
        with on(part):
            quantize_kernel[(triton.cdiv(count, block),)](
                part, scales, zeros, q[rows], best, count, len(scales), (1 << bits) - 1, group_size, block
            )
        index = best.to(torch.int64).unsqueeze(0)
        scale[rows] = scales.gather(0, index).squeeze(0).to(scale_dtype)
        zero[rows] = zeros.gather(0, index).squeeze(0).to(torch.uint8)
    return q, scale, None if symmetric else zero


def try_out(device: torch.device) -> None:
    """Raises what goes wrong when a weight is multiplied there: no C compiler, another Triton, an unknown card."""
    q, scale = torch.full((ROWS, COLUMNS), 9, dtype=torch.uint8, device=device), torch.ones(ROWS, 1, device=device)
    x = torch.ones(1, COLUMNS, dtype=torch.bfloat16, device=device)
    found = matmul(x, pack(q, scale.bfloat16(), None, 4)).unique().tolist()
    if found != [COLUMNS]:
        raise ArithmeticError(f"the kernel says {found} where {COLUMNS} is right")


# ---- calling the kernels --------------------------------------------------------------------------------------------
def linear(x: Tensor, weight: Packed | Tensor, out: Tensor, norm=None, then: str = "", next_norm=None) -> int:
    """linear_kernel over x (M, K), M at most 128, into out (M, N); of one stream at a time on each device.

    weight: Packed in this layout, or (N, K) in x's dtype. norm: (squares, parts of it, eps). next_norm: (weight (N,),
    next_x (M, N), next_squares (N / 16, M)): it gives how many rows of that it has filled.
    """
    (M, K), N = x.shape, out.shape[1]
    packed = isinstance(weight, Packed)
    groups = group_name(weight) if packed else None
    BN, warps, stages, SPLIT = tiling(x.device, M, N, K, 2 if then == "silu" else 1, groups)
    BM = max(8, triton.next_power_of_2(M))
    partial, arrived = workspace(x.device)
    squares, parts, eps = norm or (None, 0, 0.0)
    codes, scale, zero = (weight.codes, weight.scale, weight.zero) if packed else (weight, None, None)
    pdl = programmatic(x.device)
    with on(x):
        tiles = triton.cdiv(N, BN)
        linear_kernel[tiles, SPLIT](
            x, codes, scale, zero, out, partial, arrived, M, N, K,
            squares, parts, eps, *(next_norm or (None, None, None)),
            BITS=4 if packed else 16, G=weight.group_size if packed else COLUMNS, SYMMETRIC=zero is None, BN=BN, BM=BM,
            SPLIT=SPLIT, NORM=norm is not None, THEN=then, PARTS=triton.next_power_of_2(max(1, parts)),
            ASM=not INTERPRETED, PDL=pdl, num_warps=warps, num_stages=stages, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return tiles


def group_name(weight: Packed) -> str:
    """What of a weight decides how its tiles compile."""
    return f"{weight.group_size}{' asymmetric' * (weight.zero is not None)}"


def tiling(device: torch.device, M: int, N: int, K: int, weights: int, groups: str | None) -> tuple[int, int, int, int]:
    """Rows of a tile, warps, stages, and how many programs share a tile's columns; of M tokens by weights of N rows.

    groups: group_name of an INT4 weight; None of floats, which take four times the memory of the tiles that were timed.
    """
    kind, multiprocessors = card(device)
    BM = max(8, triton.next_power_of_2(M))
    known = tuned(device) if groups else {}
    BN, warps, stages, each = known.get(f"{BM} {weights * N} {K} {groups}") or TABLES[kind][BM]
    if groups is None:
        each = min(each, 4 // weights)  # as many as the shared memory of an H100 holds
    tiles = triton.cdiv(N, BN)
    split = min(round(each * multiprocessors / tiles), K // COLUMNS, WORKSPACE // (weights * tiles * BN * BM))
    return BN, warps, stages, max(1, split)


@functools.cache
def tuned(device: torch.device) -> dict[str, list[int]]:
    """What minichat/tune.py has found for this kind of card: rows as in TABLES by "tokens N K groups"."""
    file = tuned_file(device)
    try:
        return files.read_json(file, missing={})
    except BadInput as error:  # a cache is no reason to fail
        say(f"tiles that were tuned are left out: {error}")
        return {}


def tuned_file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return files.cache_folder() / f"tiles-{re.sub('[^A-Za-z0-9]+', '-', f'{name} triton {triton.__version__}')}.json"


def programmatic(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends, and wait for its results where it needs them."""
    return device.type == "cuda" and card(device)[0] >= 90 and hasattr(tl.extra.cuda, "gdc_wait")


@functools.cache
def card(device: torch.device) -> tuple[int, int]:
    """Which of the TABLES, and how many multiprocessors; of the interpreter, as many as make programs share tiles."""
    if device.type != "cuda":
        return 80, 1
    here = torch.cuda.get_device_properties(device)
    number = 10 * here.major + here.minor
    return max((kind for kind in TABLES if kind <= number), default=80), here.multi_processor_count


@functools.cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of programs that share a tile, and how many of them have arrived: 0 between two kernels."""
    arrived = torch.zeros(1 << 16, dtype=torch.int32, device=device)
    return torch.empty(WORKSPACE, device=device), arrived


def on(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _blocks(rows: Tensor) -> Tensor:
    """(N, columns) -> (N / 16 rounded up, 16, columns), with zeros in the rows past N."""
    return F.pad(rows, (0, 0, 0, -len(rows) % ROWS)).view(-1, ROWS, rows.shape[1])


def is_ours(packed: Packed) -> bool:
    return packed.codes.dtype == torch.int16


@functools.cache
def _warn(what: str) -> None:
    taken = "4 bits, columns in multiples of 128, and groups of 32, 64 or multiples of 128"
    say(f"{what} run on the slow reference: the CUDA kernel takes {taken}")
