"""INT4 on Gaudi: weights in the layout of the bridge's own operation, which turns them into bf16 as they are used.

    hpu::convert_from_uint4(Tensor input, Tensor scale, Tensor? zero_point, ScalarType out_dtype [, Tensor? g_idx])

input (K, N / 8) int32, column 8 c + j in the j-th nibble of word c; scale (K / G, N); zero_point (K / G, N / 8) int32
packed alike. It computes (q - zero) * scale, (K, N). What it does not take (INT8, an N that is no multiple of 8) is
held and multiplied as the reference does. INT4 saves memory on Gaudi; nothing here says that it saves time.
"""

import torch
from torch import Tensor

from minichat.kernels import int4_reference as reference

Packed = reference.Packed
quantize = reference.quantize
EIGHTS = 0x88888888 - (1 << 32)  # the zero-points of symmetric weights, eight to a word


def pack(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Packed:
    """As the reference's. codes (K, N / 8) int32, scale (K / G, N), zero (K / G, N / 8) int32 or None."""
    plain = reference.pack(q, scale, zero, bits)
    if bits != 4 or q.shape[0] % 8:
        return plain
    zero = None if zero is None else reference.words_from_codes(zero.T.contiguous(), 4)
    return plain._replace(codes=reference.words_from_codes(q.T.contiguous(), 4), scale=scale.T.contiguous(), zero=zero)


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    if not _is_ours(packed):
        return reference.unpack(packed)
    zero = None if packed.zero is None else _codes(packed.zero).T.contiguous().to(torch.uint8)
    return _codes(packed.codes).T.contiguous().to(torch.uint8), packed.scale.T.contiguous(), zero


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    return _columns(packed, dtype).t().contiguous() if _is_ours(packed) else reference.dequantize(packed, dtype)


def matmul(x: Tensor, packed: Packed, exact: bool = True) -> Tensor:
    if not _is_ours(packed):
        return reference.matmul(x, packed, exact)
    reference.check_input(x, packed.in_features, packed)
    return x @ _columns(packed, x.dtype)


def matmul_transposed(grad: Tensor, packed: Packed) -> Tensor:
    if not _is_ours(packed):
        return reference.matmul_transposed(grad, packed)
    reference.check_input(grad, packed.out_features, packed)
    return grad @ _columns(packed, grad.dtype).t()


def _is_ours(packed: Packed) -> bool:
    """Whether pack() used the bridge's layout; no weight has these two shapes in the reference's."""
    N, K, G = packed.out_features, packed.in_features, packed.group_size
    return packed.bits == 4 and packed.codes.shape == (K, N // 8) and packed.scale.shape == (K // G, N)


def _columns(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight as (K, N), rounded once to `dtype`: by the bridge's operation where there is one. That wants the scale
    in `dtype` too, so that one of fp16 or fp32 is rounded before."""
    zero = packed.zero
    operation = getattr(torch.ops.hpu, "convert_from_uint4", None) if packed.codes.device.type == "hpu" else None
    if operation is None:
        zeros = 8 if zero is None else _codes(zero)[:, None]
        q = _codes(packed.codes).view(-1, packed.group_size, packed.out_features)  # (K / G, G, N)
        return ((q - zeros).float() * packed.scale[:, None].float()).to(dtype).flatten(0, 1)
    if zero is None:
        zero = torch.full_like(packed.codes[: packed.scale.shape[0]], EIGHTS)
    newer = len(operation.default._schema.arguments) > 4  # with the order of the groups, which is ours: None
    return operation(packed.codes, packed.scale.to(dtype), zero, dtype, *([None] if newer else []))


def _codes(words: Tensor) -> Tensor:
    """(rows, N / 8) int32 -> (rows, N) int32, by operations that every device has."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)
