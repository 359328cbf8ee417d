"""What a decoded token needs on CUDA beside its matmuls (int4_triton.py): the embedding, and attention over the ring.

With linear_kernel these are five launches a block: norm and q, k, v; attention; o; norm and gate, up; down.
"""

import triton
import triton.language as tl
from minichat.kernels.int4_triton import INTERPRETED
from torch import Tensor

from minichat.kernels import int4_triton

KEYS = 64  # of a tile of the ring
WIDTH = 64  # of a part of the embedding: then its norm has as many parts as those of other tiles of 64 rows


@triton.jit
def embed_kernel(ids, table, norm, x, next_x, squares, M, D, BLOCK: tl.constexpr):
    """x (M, D) = rows of the table; next_x and squares as linear_kernel leaves them. Programs: (D / BLOCK, M)."""
    tile, m = tl.program_id(0), tl.program_id(1)
    d = tile * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    row = tl.load(table + tl.load(ids + m) * D + d, mask=inside, other=0.0)
    numbers = row.to(tl.float32)
    scaled = numbers * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + m * D + d, row, mask=inside)
    tl.store(next_x + m * D + d, scaled.to(x.dtype.element_ty), mask=inside)
    tl.store(squares + tile * M + m, tl.sum(numbers * numbers, axis=0))


@triton.jit
def rotated(x, d, cos, sin, HALF: tl.constexpr):
    """The numbers at x + d, rotated by their position's angles (half rotation), in the type of x."""
    a = tl.load(x + d).to(tl.float32)
    b = tl.load(x + (d + HALF) % (2 * HALF)).to(tl.float32)
    return (a * cos + tl.where(d < HALF, -b, b) * sin).to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["slots"])  # it is another number for every answer
def attention_kernel(
    qkv, cos, sin, keys, values, positions, now, column, out, partial, arrived, slots, window, scale,
    KVH: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, SPLIT: tl.constexpr, BS: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of each of B sequences over its ring, and into it. Programs: (B KvH, SPLIT).

    qkv (B, (H + 2 KvH) HD), not rotated; cos, sin (B, HD); keys, values (B, KvH, slots, HD); positions (B, slots)
    int64, -1 = empty; now (B,) int64: the tokens' own; column: how many columns were written so far; out (B, H HD).
    window 0 is none. The ring's keys are shared out among as many programs as they fill; the last one puts their parts
    together. The new key and value come from qkv, not from the ring, where one program puts them as the others read.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = keys.dtype.element_ty
    kind: tl.constexpr = dtype if ASM else tl.float32  # the interpreter has no arithmetic of bf16
    b, h = head // KVH, head % KVH
    columns = tl.load(column)
    slot = columns % slots
    written = tl.minimum(columns, slots).to(tl.int32)
    share = tl.maximum(tl.cdiv(tl.cdiv(written, SPLIT), BS), 1) * BS
    parts = tl.maximum(tl.cdiv(written, share), 1)
    if part >= parts:
        return
    d, r = tl.arange(0, HD), tl.arange(0, 16)
    c, s = tl.load(cos + b * HD + d).to(tl.float32), tl.load(sin + b * HD + d).to(tl.float32)
    row = qkv + b * ((GROUP + 2) * KVH * HD)
    heads = h * GROUP + tl.minimum(r, GROUP - 1)
    q = rotated(row + heads[:, None] * HD, d[None, :], c[None, :], s[None, :], HD // 2)
    k = rotated(row + (GROUP * KVH + h) * HD, d, c, s, HD // 2)
    v = tl.load(row + ((GROUP + 1) * KVH + h) * HD + d)
    ring = head.to(tl.int64) * slots * HD
    most = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    mixed = tl.zeros((16, HD), tl.float32)
    if part == 0:
        tl.store(keys + ring + slot * HD + d, k)
        tl.store(values + ring + slot * HD + d, v)
        most = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
        total += 1
        mixed += v.to(tl.float32)[None, :]
    at_now = tl.load(now + b)
    for first in range(part * share, tl.minimum((part + 1) * share, written), BS):
        at = first + tl.arange(0, BS)
        inside = at < written
        p = tl.load(positions + b * slots + at, mask=inside, other=-1)
        sees = (p >= 0) & (p <= at_now) & (at != slot)
        if window > 0:
            sees &= p > at_now - window
        where = ring + at[:, None] * HD + d[None, :]
        key = tl.load(keys + where, mask=inside[:, None], other=0.0).to(kind)
        scores = tl.dot(q.to(kind), tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(sees[None, :], scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights, kept = tl.exp(scores - base[:, None]), tl.exp(most - base)
        total = total * kept + tl.sum(weights, axis=1)
        value = tl.load(values + where, mask=inside[:, None], other=0.0).to(kind)
        mixed = tl.dot(weights.to(kind), value, mixed * kept[:, None], input_precision="ieee")
        most = highest
    if parts > 1:
        mine = head * SPLIT * 16
        tl.store(partial + (mine + part * 16 + r)[:, None] * (HD + 2) + d[None, :], mixed)
        tl.store(partial + (mine + part * 16 + r) * (HD + 2) + HD, most)
        tl.store(partial + (mine + part * 16 + r) * (HD + 2) + HD + 1, total)
        tl.debug_barrier()  # all threads have written; the atomic's release is that of one of them
        if tl.atomic_add(arrived + head, 1, sem="acq_rel") != parts - 1:
            return
        most = tl.full((16,), float("-inf"), tl.float32)
        total, mixed = tl.zeros((16,), tl.float32), tl.zeros((16, HD), tl.float32)
        for i in range(parts):
            from_ = partial + (mine + i * 16 + r) * (HD + 2)
            its_most = tl.load(from_ + HD, cache_modifier=".cg")
            highest = tl.maximum(most, its_most)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            kept, weight = tl.exp(most - base), tl.exp(its_most - base)
            total = total * kept + tl.load(from_ + HD + 1, cache_modifier=".cg") * weight
            mixed *= kept[:, None]
            mixed += tl.load(from_[:, None] + d[None, :], cache_modifier=".cg") * weight[:, None]
            most = highest
        tl.store(arrived + head, 0)
    to = out + b * (GROUP * KVH * HD) + heads[:, None] * HD + d[None, :]
    tl.store(to, (mixed / total[:, None]).to(dtype), mask=(r < GROUP)[:, None])


def embed(ids: Tensor, table: Tensor, norm: Tensor, x: Tensor, next_x: Tensor, squares: Tensor) -> int:
    """embed_kernel of ids (M,) int64 into x, next_x (M, D) and squares (D / 16, M): how many of its rows are filled."""
    (M, D), parts = x.shape, triton.cdiv(x.shape[1], WIDTH)
    with int4_triton.on(x):
        embed_kernel[parts, M](ids, table, norm, x, next_x, squares, M, D, WIDTH)
    return parts


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor, now: Tensor, column: Tensor,
    window: int | None, out: Tensor,
) -> None:  # fmt: skip
    """attention_kernel, whose arguments these are; of one stream at a time on each device."""
    B, KvH, slots, Hd = keys.shape
    group = qkv.shape[1] // Hd // KvH - 2
    _, multiprocessors = int4_triton.card(keys.device)
    split = max(1, 2 * multiprocessors // (B * KvH))  # those without keys end at once
    split = 1 << (split.bit_length() - 1)  # few numbers: each is compiled
    partial, arrived = int4_triton.workspace(keys.device)
    pdl = int4_triton.programmatic(keys.device)
    with int4_triton.on(keys):
        attention_kernel[B * KvH, split](
            qkv, cos, sin, keys, values, positions, now, column, out, partial, arrived, slots, window or 0, Hd**-0.5,
            KvH, group, Hd, split, KEYS, not INTERPRETED, pdl, num_warps=4, num_stages=2,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
