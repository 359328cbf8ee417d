"""NF4, QLoRA's 4-bit NormalFloat (arXiv 2305.14314), in plain torch for any device: a base to train adapters over.

A weight (N, K) = (out_features, in_features) is held as codes q of the 16 VALUES, and for each row and group of G along
K, the largest magnitude in it as a scale:

    w[n, k] = VALUES[q[n, k]] * scale[n, k // G]

The functions of a kernel (int4_reference.py says which), without zero-points. For decoding, INT4 is what is fast.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from minichat.errors import BadInput
from minichat.kernels import int4_reference as reference

Packed = reference.Packed

# Quantiles of a normal distribution, 0 among them, over the largest (appendix E); as bitsandbytes rounds them.
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def pack(q: Tensor, scale: Tensor, zero: None, bits: int) -> Packed:
    """As in int4_reference: codes (N, K / 2) uint8, of two columns the first in the low bits; scale (N, K / G)."""
    group_size = reference.check(q, scale, zero, bits)
    return Packed(q[:, 0::2] | (q[:, 1::2] << 4), scale, zero, *q.shape, group_size, bits)


def unpack(packed: Packed) -> tuple[Tensor, Tensor, None]:
    """The (q, scale, zero) that `pack` was given, exactly."""
    return torch.stack([packed.codes & 15, packed.codes >> 4], dim=-1).flatten(1), packed.scale, None


@functools.cache  # a copy from the host at every matmul would cost its time, and could not be part of a CUDA graph
@torch.inference_mode(False)
def pairs_of_bytes(device: torch.device) -> Tensor:
    """(256, 2) float32: the two values that each byte of codes stands for."""
    values = torch.tensor(VALUES)
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1).to(device)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight, (N, K): computed in fp32 and rounded once to `dtype`."""
    pairs = pairs_of_bytes(packed.codes.device)

    def some(rows: slice) -> Tensor:
        found = pairs.index_select(0, packed.codes[rows].flatten().to(torch.int32))  # (n * K / 2, 2)
        groups = found.view(-1, packed.in_features // packed.group_size, packed.group_size)
        return (groups * packed.scale[rows].unsqueeze(-1)).flatten(1)

    return reference.in_chunks(some, packed, dtype)


def matmul(x: Tensor, packed: Packed, exact: bool = True) -> Tensor:
    """x (..., K) fp32, bf16 or fp16 -> x @ weight^T (..., N), in x's dtype; always exact."""
    reference.check_input(x, packed.in_features, packed)
    return F.linear(x, dequantize(packed, x.dtype))


def matmul_transposed(grad: Tensor, packed: Packed) -> Tensor:
    """grad (..., N) -> grad @ weight (..., K), in grad's dtype: the gradient of `matmul` to its input."""
    reference.check_input(grad, packed.out_features, packed)
    return grad @ dequantize(packed, grad.dtype)


def quantize(
    w: Tensor, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, None]:
    """w (N, K) float -> q (N, K) uint8, of the value nearest to w / scale; scale (N, K / G) in `scale_dtype`; None.

    bits and symmetric are 4 and True: a Scheme has no others. Raises BadInput if w is not finite or a scale overflows
    `scale_dtype`.
    """
    reference.check_weight(w, group_size, bits, scale_dtype)
    N, K = w.shape
    q = torch.empty(N, K, dtype=torch.uint8, device=w.device)
    scale = torch.empty(N, K // group_size, dtype=scale_dtype, device=w.device)
    for rows in reference.chunks(N, K):
        groups = w[rows].reshape(-1, K // group_size, group_size).float()
        scale[rows] = groups.abs().amax(-1)  # NaN and infinity show in it
        if not scale[rows].isfinite().all():
            raise BadInput(f"a weight to quantise is NaN, infinite or past the range of {scale_dtype}; weights must be "
                           "finite: check the checkpoint")  # fmt: skip
        most = scale[rows].unsqueeze(-1).float()
        groups = groups / most.where(most > 0, 1)
        codes = torch.zeros_like(groups, dtype=torch.uint8)
        for low, high in zip(VALUES, VALUES[1:]):  # quicker than a binary search
            codes += groups > (low + high) / 2
        q[rows] = codes.flatten(1)
    return q, scale, None
