"""INT4 and INT8 weight-only matmul in plain torch, for any device: slow, and the definition of what every kernel does.

A weight (N, K) = (out_features, in_features) is held as unsigned codes q, 0..15 for 4 bits and 0..255 for 8, with one
scale and one zero-point per row and group of G along K:

    w[n, k] = (q[n, k] - zero[n, k // G]) * scale[n, k // G]

Symmetric weights have no zero tensor: zero is the middle, 8 or 128. A kernel is a module with the seven functions
below (`pack` ... `quantize`); each may lay the tensors of `Packed` out as its device likes, and `unpack` is exact.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minichat.errors import BadInput

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Ranges tried by `quantize`, as parts of the plain one; it comes first, so that it wins ties. A little more than 1
# helps too: a symmetric group whose extreme is positive has one code less on that side.
RANGES = (1.0, *(1.07 - 0.05 * i for i in range(10)))

CHUNK = 4 << 20  # weights handled at a time: bounds the temporaries of a pass to tens of MB


class Packed(NamedTuple):
    """A quantised weight as one kernel wants it. Only that kernel can read `codes`, `scale` and `zero`.

    Here: codes (N, K * bits / 32) int32, low bits first; scale (N, K / G); zero (N, K / G) uint8 or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    bits: int


def pack(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Packed:
    """q (N, K) uint8, scale (N, K / G) bf16, fp16 or fp32, zero (N, K / G) uint8 or None -> Packed, on q's device.

    The scale keeps its dtype. Raises BadInput if shapes or dtypes do not fit together.
    """
    group_size = check(q, scale, zero, bits)
    codes = words_from_codes(q, bits)
    return Packed(codes, scale, zero, *q.shape, group_size, bits)


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """The (q, scale, zero) that `pack` was given, exactly."""
    return codes_from_words(packed.codes, packed.bits), packed.scale, packed.zero


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight, (N, K): computed in fp32 and rounded once to `dtype`."""
    shifts = torch.arange(0, 32, packed.bits, dtype=torch.int32, device=packed.codes.device)
    middle = 1 << (packed.bits - 1)

    def some(rows: slice) -> Tensor:
        q = (packed.codes[rows].unsqueeze(-1) >> shifts) & ((1 << packed.bits) - 1)  # (n, words, codes per word)
        q = q.view(q.shape[0], -1, packed.group_size)  # (n, K / G, G)
        zero = middle if packed.zero is None else packed.zero[rows].unsqueeze(-1).to(torch.int32)
        return ((q - zero).float() * packed.scale[rows].unsqueeze(-1).float()).flatten(1)

    return in_chunks(some, packed, dtype)


def in_chunks(some: Callable[[slice], Tensor], packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight of which `some` gives rows: CHUNK weights at a time, or on an HPU all at once. There writing into a
    part of a tensor copies all of it, and is not supported in an HPU graph."""
    where = packed.codes.device
    if where.type == "hpu":
        return some(slice(None)).to(dtype)
    weight = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device=where)
    for rows in chunks(*weight.shape):
        weight[rows] = some(rows)
    return weight


def matmul(x: Tensor, packed: Packed, exact: bool = True) -> Tensor:
    """x (..., K) fp32, bf16 or fp16 -> x @ weight^T (..., N), in x's dtype. Raises BadInput on another K or dtype.

    exact False lets a kernel round x to 8 bits, in blocks with a scale of their own. Here x is taken as it is.
    """
    check_input(x, packed.in_features, packed)
    return F.linear(x, dequantize(packed, x.dtype))


def matmul_transposed(grad: Tensor, packed: Packed) -> Tensor:
    """grad (..., N) -> grad @ weight (..., K), in grad's dtype: the gradient of `matmul` to its input."""
    check_input(grad, packed.out_features, packed)
    return grad @ dequantize(packed, grad.dtype)


def quantize(
    w: Tensor, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """w (N, K) float -> q (N, K) uint8, scale (N, K / G) in `scale_dtype`, zero (N, K / G) uint8 or None.

    Round to nearest, ties to even. Each group tries the RANGES, with the scale rounded to its dtype first, and keeps
    the one with the least squared error. Raises BadInput if w is not finite or a scale overflows `scale_dtype`.
    """
    check_weight(w, group_size, bits, scale_dtype)
    N, K = w.shape
    top = (1 << bits) - 1
    q = torch.empty(N, K, dtype=torch.uint8, device=w.device)
    scale = torch.empty(N, K // group_size, dtype=scale_dtype, device=w.device)
    zero = torch.empty(N, K // group_size, dtype=torch.uint8, device=w.device)
    for rows in chunks(N, K):
        groups = w[rows].reshape(-1, K // group_size, group_size)
        tried_scale, tried_zero = candidates(groups, bits, symmetric, scale_dtype)
        groups = groups.float()
        least = best = best_zero = None
        for s, z in zip(tried_scale.unsqueeze(-1), tried_zero.unsqueeze(-1)):
            error = ((groups / s).clamp_(-z, top - z).round_().mul_(s) - groups).square_().sum(-1, keepdim=True)
            if least is None:
                least, best, best_zero = error, s, z
                continue
            better = error < least
            least = torch.where(better, error, least)
            best, best_zero = torch.where(better, s, best), torch.where(better, z, best_zero)
        q[rows] = (
            (groups / best).clamp_(-best_zero, top - best_zero).round_().add_(best_zero).flatten(1).to(torch.uint8)
        )
        scale[rows], zero[rows] = best.squeeze(-1).to(scale_dtype), best_zero.squeeze(-1).to(torch.uint8)
    return q, scale, None if symmetric else zero


# ---- what other kernels use too ----


def candidates(groups: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales and zero-points to try for groups (n, K / G, G): two fp32 tensors (len(RANGES), n, K / G).

    The scales are already rounded to `scale_dtype`. Raises BadInput on NaN, infinity, and scales past its range.
    """
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    low, high = (end.float() for end in groups.aminmax(dim=-1))  # NaN and infinity show in them
    if not (low.isfinite() & high.isfinite()).all():
        raise BadInput("a weight to quantise is NaN or infinite; weights must be finite: check the checkpoint")
    # both ranges include 0, so that 0 is a code and stays exactly 0
    if symmetric:
        step = torch.maximum(low.abs(), high.abs()) / (top / 2)
    else:
        step = (high.clamp(min=0) - low.clamp(max=0)) / top
    ranges = torch.tensor(RANGES, dtype=torch.float32, device=groups.device).view(-1, 1, 1)
    scale = (step * ranges).to(scale_dtype).float()
    if scale.isinf().any():
        raise BadInput(
            f"weights up to {groups.abs().max().item():.3g} need a scale past the range of {scale_dtype}; "
            "use scale_dtype=torch.bfloat16"
        )
    # an all-zero group, or one so small that its scale rounds to 0: every code is then the zero-point
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if symmetric:
        return scale, torch.full_like(scale, middle)
    return scale, (-low.clamp(max=0) * ranges / scale).clamp_(0, top).round_()


def words_from_codes(q: Tensor, bits: int) -> Tensor:
    """q (N, K) uint8 -> (N, K * bits / 32) int32, the first code in the lowest bits: the disk's words too."""
    if bits == 4:
        q = q[:, 0::2] | (q[:, 1::2] << 4)
    return q.flatten().view(torch.int32).view(q.shape[0], -1)  # every machine that runs torch is little-endian


def codes_from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `words_from_codes`."""
    q = words.flatten().view(torch.uint8).view(words.shape[0], -1)
    return torch.stack([q & 15, q >> 4], dim=-1).flatten(1) if bits == 4 else q


def chunks(N: int, K: int) -> Iterator[slice]:
    """Slices of rows that hold about CHUNK weights each."""
    step = max(1, CHUNK // K)
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def check(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> int:
    """The group size of codes and scales that fit together. Raises BadInput if they do not."""
    if bits not in (4, 8):
        raise BadInput(f"bits is {bits}; choose 4 or 8")
    if q.dtype != torch.uint8 or q.dim() != 2:
        raise BadInput(f"codes are {tuple(q.shape)} {q.dtype}; they must be (N, K) torch.uint8")
    if scale.dtype not in SCALE_DTYPES or scale.dim() != 2:
        raise BadInput(
            f"scale is {tuple(scale.shape)} {scale.dtype}; it must be (N, K / G) bfloat16, float16 or float32"
        )
    (N, K), groups = q.shape, scale.shape[1]
    if scale.shape[0] != N or N < 1 or groups < 1 or K % (32 * groups) != 0:
        raise BadInput(
            f"scale is {tuple(scale.shape)} for codes {tuple(q.shape)}; it must be (N, K / G) with G a multiple of 32"
        )
    if zero is not None and (zero.dtype != torch.uint8 or zero.shape != scale.shape):
        raise BadInput(f"zero is {tuple(zero.shape)} {zero.dtype}; it must be {tuple(scale.shape)} torch.uint8 or None")
    if {scale.device, q.device if zero is None else zero.device} != {q.device}:
        raise BadInput(f"codes are on {q.device} and scale or zero are not; move all to one device")
    return K // groups


def check_input(x: Tensor, features: int, packed: Packed) -> None:
    """Raises BadInput unless x is (..., features) in a dtype that the kernels take."""
    if x.shape[-1:] != (features,) or x.dtype not in SCALE_DTYPES or x.device != packed.codes.device:
        raise BadInput(
            f"input is {tuple(x.shape)} {x.dtype} on {x.device} for a weight ({packed.out_features}, "
            f"{packed.in_features}) on {packed.codes.device}; it must be (..., {features}) in float32, bfloat16 or "
            "float16, on the weight's device"
        )


def check_weight(w: Tensor, group_size: int, bits: int, scale_dtype: torch.dtype) -> None:
    """Raises BadInput unless w can be quantised like this."""
    if bits not in (4, 8):
        raise BadInput(f"bits is {bits}; choose 4 or 8")
    if scale_dtype not in SCALE_DTYPES:
        raise BadInput(f"scale_dtype is {scale_dtype}; choose torch.bfloat16, torch.float16 or torch.float32")
    if w.dim() != 2 or w.dtype not in SCALE_DTYPES or w.shape[0] < 1 or w.shape[1] < 1:
        raise BadInput(f"weight is {tuple(w.shape)} {w.dtype}; it must be (N, K) in bfloat16, float16 or float32")
    if group_size < 32 or group_size % 32 != 0:
        raise BadInput(f"group size {group_size} is not a multiple of 32; choose --group-size from 32, 64, 128")
    if w.shape[1] % group_size != 0:
        raise BadInput(
            f"in_features {w.shape[1]} is not a multiple of group size {group_size}; "
            "choose --group-size from 32, 64, 128"
        )
