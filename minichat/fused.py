"""The blocks of the model for a few tokens in one call, where a device has a kernel for it: what decoding runs on.

A reader may skip this: `model.Decoder` computes the same, and is what runs everywhere else.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minichat import kernels
from minichat.attention import rotary
from minichat.cache import KVCache
from minichat.console import show
from minichat.int4 import Int4Linear
from minichat.kernels import cpu

MOST_TOKENS = 32  # of prompts in one call: bounds its scratch, and 128 are 1 % faster
# weights times tokens of a block that one thread has done before others could help: where cores are busy with something
# else, each of a block's seven meetings may wait for a thread that does not run
FEW = 1 << 22

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# (B, T) ids and positions (None: 0, 1, 2, … or what follows, in every row) -> (B, T, D) hidden states; fills the cache
Forward = Callable[[Tensor, Tensor | None], Tensor]
_say = functools.cache(show)  # once


def decoder(model: nn.Module, cache: KVCache) -> Forward:
    """What continues the tokens in `cache`: the device's own step if it has one that fits, else the model's blocks."""
    if fits(model):
        return CpuStep(model, cache)
    if model.device.type == "cuda" and kernels.for_device(model.device) is not kernels.named("int4_reference"):
        from minichat import fused_cuda  # which needs triton

        if fused_cuda.joinable(model):
            fused_cuda.join(model)
        why = fused_cuda.misfit(model, cache)
        if why is None:
            return fused_cuda.CudaStep(model, cache)
        _say(f"minichat: tokens are decoded module by module, which is slower: {why}")
    return lambda ids, positions: model.model(ids, positions, cache)


def fits(model: nn.Module) -> bool:
    """Whether the CPU's step computes this model: fp32, every linear of its blocks in the C++ kernel's INT4 or INT8,
    all of one scheme, with nothing attached to them."""
    linears = [block.get_submodule(name) for block in model.model.layers for name in LINEARS]
    # with neither a bias, which is a parameter, nor an adapter, which makes it another class
    if not all(type(x) is Int4Linear and x.kernel == "cpu" and not list(x.parameters()) for x in linears):
        return False
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    same = len({(x.bits, x.exact, x.symmetric) for x in linears}) == 1
    Hd = model.config.head_dim
    return same and not hooked and model.dtype == torch.float32 and Hd % 32 == 0 and Hd <= 1024


def _struct(name: str, *fields: tuple[str, object]) -> type[ctypes.Structure]:
    """A C struct: (names, type) of its fields in order."""
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kind) for names, kind in fields for n in names.split()]})


# as they are in kernels/cpu.h and step_cpu.cpp
_pointer, _integer = ctypes.c_void_p, ctypes.c_int64
_Weight = _struct("_Weight", ("words scale zero", _pointer), ("N K G", _integer), ("scale_kind", ctypes.c_int))
_Layer = _struct(
    "_Layer", ("q k v o gate up down", _Weight), ("norm1 norm2 keys values key_scales value_scales", _pointer)
)
_Step = _struct(
    "_Step",
    ("layers", ctypes.POINTER(_Layer)),
    ("count B T D H KvH Hd inner slots seen column window bits planes cache_kind", _integer),
    ("eps", ctypes.c_double),
    ("norm cos sin positions new_positions x scratch", _pointer),
)


class CpuStep:
    """kernels/step_cpu.cpp over a model and its cache; they have to stay where they are as long as it is used."""

    def __init__(self, model: nn.Module, cache: KVCache):
        config, blocks = model.config, model.model
        self.model, self.cache, self.scratch = model, cache, torch.empty(0, dtype=torch.uint8)
        layers = (_Layer * config.num_hidden_layers)()
        for i, (layer, block) in enumerate(zip(layers, blocks.layers)):
            for name in LINEARS:
                setattr(layer, name.split(".")[1].removesuffix("_proj"), _weight(block.get_submodule(name).packed))
            layer.norm1 = block.input_layernorm.weight.data_ptr()
            layer.norm2 = block.post_attention_layernorm.weight.data_ptr()
            layer.keys, layer.values = cache.k[i].data_ptr(), cache.v[i].data_ptr()
            if cache.scales:
                layer.key_scales, layer.value_scales = (scale.data_ptr() for scale in cache.scales[i])
        linears = [blocks.layers[0].get_submodule(name) for name in LINEARS]
        self.weights, linear = sum(x.in_features * x.out_features for x in linears), linears[-1]
        self.step = _Step(
            layers=layers, count=len(layers), D=config.hidden_size, H=config.num_attention_heads,
            KvH=config.num_key_value_heads, Hd=config.head_dim, inner=config.intermediate_size, slots=cache.slots,
            window=config.sliding_window or 0, bits=linear.bits, planes=2 if linear.exact else 1,
            cache_kind={**cpu.KINDS, torch.int8: 3}[cache.k[0].dtype], eps=config.rms_norm_eps,
            norm=blocks.norm.weight.data_ptr(), positions=cache.positions.data_ptr(),
        )  # fmt: skip

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(B, T) ids and positions -> (B, T, D), after the last norm; the cache holds them then."""
        step, cache, library = self.step, self.cache, cpu.library()
        threads = cpu.threads() if self.weights * ids.numel() > FEW else 1
        step.B, step.T = ids.shape
        step.seen, step.column = min(cache.slots, cache.filled + step.T), cache.filled % cache.slots
        x = self.model.model.embed_tokens(ids).float().contiguous()
        cos, sin = rotary(positions, step.Hd, self.model.config.rope_theta, torch.float32)
        positions = positions.contiguous()
        if (needed := library.step_scratch(ctypes.byref(step), threads)) > self.scratch.numel():
            self.scratch = torch.empty(needed, dtype=torch.uint8)
        step.cos, step.sin, step.new_positions = cos.data_ptr(), sin.data_ptr(), positions.data_ptr()
        step.x, step.scratch = x.data_ptr(), self.scratch.data_ptr()
        library.step(ctypes.byref(step), cpu.isa(), threads)
        cache.advance(positions)
        return x


def _weight(packed) -> _Weight:
    codes, scale, kind, zero, N, K, G, _ = cpu._weight(packed)
    return _Weight(codes, scale, zero, N, K, G, kind)
