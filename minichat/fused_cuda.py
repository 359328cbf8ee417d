"""A token of each row through all blocks on CUDA in five kernels a block, over the model's own weights and cache.

A reader may skip this: `model.Decoder` computes the same but for bf16's rounding. What a norm divides by is one number
a token: it is left to the kernel after the norm, and the kernel before leaves the sums of squares that it follows from.
"""

import torch
from torch import Tensor, nn

from minichat.attention import rotary
from minichat.cache import KVCache
from minichat.int4 import Int4Linear
from minichat.kernels import int4_triton, step_triton
from minichat.kernels.int4_triton import Packed

MOST_ROWS = 32  # of a batch: beyond, the sums of gate and up are more than a thread's registers
BUFFERS = ("codes", "scale", "zero")


def misfit(model: nn.Module, cache: KVCache) -> str | None:
    """Why this step does not compute the model, as it does bf16 with blocks of plain or INT4 linears, to which nothing
    is attached; else None."""
    config = model.config
    if model.dtype != torch.bfloat16:
        return f"the model is {str(model.dtype)[6:]}, not bfloat16"
    if not joinable(model):
        return "an adapter, a bias, or weights that the CUDA kernel does not take"
    if cache.k[0].dtype != model.dtype:
        return f"the KV cache is {str(cache.k[0].dtype)[6:]}, not bfloat16"
    if len(cache.positions) > MOST_ROWS:
        return f"{len(cache.positions)} rows at once, more than {MOST_ROWS}"
    if config.head_dim not in (32, 64, 128, 256) or config.hidden_size % int4_triton.COLUMNS:
        return f"heads of {config.head_dim} numbers, a hidden size of {config.hidden_size}"
    if config.num_attention_heads > 16 * config.num_key_value_heads:
        return f"{config.num_attention_heads} heads over {config.num_key_value_heads} of keys, more than 16 each"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules()):
        return "a module has a hook"
    return None


def _groups(block: nn.Module) -> list[list[nn.Module]]:
    """The linears of a block, those together that are multiplied in one kernel."""
    attention, mlp = block.self_attn, block.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _joinable(linears: list[nn.Module]) -> bool:
    if all(type(x) is nn.Linear and x.weight.dtype == torch.bfloat16 for x in linears):
        return all(x.bias is None and x.in_features % int4_triton.COLUMNS == 0 for x in linears)
    if not all(type(x) is Int4Linear and x.bias is None and int4_triton.is_ours(x.packed) for x in linears):
        return False
    same = len({(x.group_size, x.symmetric, x.scale.dtype) for x in linears}) == 1
    return same and all(x.out_features % int4_triton.ROWS == 0 for x in linears)


def joinable(model: nn.Module) -> bool:
    """Whether join() takes the model: bf16 or INT4 throughout."""
    return all(_joinable(group) for block in model.model.layers for group in _groups(block))


def join(model: nn.Module) -> list[list[Packed | Tensor]]:
    """The weights that the step reads, of each block, where they are to stay. To be called before a graph is recorded,
    of the modules too: it would go on with weights that have moved."""
    return [[_joined(linears) for linears in _groups(block)] for block in model.model.layers]


@torch.inference_mode(False)  # or training could not go on from them
@torch.no_grad()
def _joined(linears: list[nn.Module]) -> Packed | Tensor:
    """The weights of linears with one input, one above the other; they keep theirs as parts of it, without a copy."""
    if type(linears[0]) is nn.Linear:
        whole = _beside([x.weight.data for x in linears])
        for linear, part in zip(linears, whole.split([x.out_features for x in linears])):
            linear.weight.data = part
        return whole
    first, whole = linears[0].packed, {}
    for name in BUFFERS:
        parts = [getattr(x, name) for x in linears]
        whole[name] = None if parts[0] is None else _beside(parts)
        if parts[0] is not None:
            for linear, part in zip(linears, whole[name].split([len(part) for part in parts])):
                linear._buffers[name] = part
    return first._replace(**whole, out_features=sum(x.out_features for x in linears))


def _beside(parts: list[Tensor]) -> Tensor:
    """Tensors one above the other; without a copy if that is how they lie already."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != end:
            return torch.cat(parts)
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())


class CudaStep:
    """The kernels over a model and its cache; several tokens of a row go through the model's own blocks."""

    def __init__(self, model: nn.Module, cache: KVCache):
        config, self.model, self.cache = model.config, model, cache
        rows, D = len(cache.positions), config.hidden_size
        self.blocks = join(model)

        def buffer(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=model.device)

        self.x, self.next_x = buffer(rows, D), buffer(rows, D)
        self.squares = buffer(D // 16, rows, dtype=torch.float32)  # of x, in parts
        heads = config.num_attention_heads
        self.qkv = buffer(rows, (heads + 2 * config.num_key_value_heads) * config.head_dim)
        self.attended, self.inner = buffer(rows, heads * config.head_dim), buffer(rows, config.intermediate_size)

    def __call__(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """(B, T) ids and positions -> (B, T, D), after the last norm; the cache holds them then."""
        decoder, cache = self.model.model, self.cache
        if ids.shape[1] > 1 or positions is None:
            return decoder(ids, positions, cache)
        config, linear, x, next_x = decoder.config, int4_triton.linear, self.x, self.next_x
        now = positions[:, 0]
        cos, sin = (a[:, 0, 0] for a in rotary(positions, config.head_dim, config.rope_theta, x.dtype))
        squares, eps = self.squares, config.rms_norm_eps
        after = [block.input_layernorm.weight for block in decoder.layers[1:]] + [decoder.norm.weight]
        first = decoder.layers[0].input_layernorm.weight
        parts = step_triton.embed(ids[:, 0], decoder.embed_tokens.weight, first, x, next_x, squares)
        for i, (block, (qkv, o, gate_up, down)) in enumerate(zip(decoder.layers, self.blocks)):
            linear(next_x, qkv, self.qkv, norm=(squares, parts, eps))
            step_triton.attend(
                self.qkv, cos, sin, cache.k[i], cache.v[i], cache.positions, now, cache.columns, config.sliding_window,
                self.attended,
            )  # fmt: skip
            to_mlp = block.post_attention_layernorm.weight, next_x, squares
            parts = linear(self.attended, o, x, then="add", next_norm=to_mlp)
            linear(next_x, gate_up, self.inner, norm=(squares, parts, eps), then="silu")
            parts = linear(self.inner, down, x, then="add", next_norm=(after[i], next_x, squares))
        cache.advance(positions)
        root = torch.rsqrt(squares[:parts].sum(dim=0) / config.hidden_size + eps)
        return (next_x.float() * root[:, None]).to(x.dtype)[:, None]
