"""Mistral, from its config.json: module names are Hugging Face's, so weights need no key map."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from minichat.attention import Documents, View, attention, rotary, rotate
from minichat.errors import BadInput

CHECKPOINTS = ("attention", "mlp", "block")  # of a block: what gradient checkpointing can compute again
COMPILED = ("_before", "_after", "_mlp")  # of a block: all but attention itself
ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")  # the same block where neither biases nor RoPE scaling are


@dataclass
class Config:
    """A model's shape and constants, in the words of config.json. sliding_window None is full attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    architecture: str = "MistralForCausalLM"
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read config.json as transformers 4 or 5 writes it.

        Raises BadInput for another architecture, a RoPE scaling, biases, another activation or a shape that is off.
        """
        if not isinstance(raw, dict):
            raise BadInput(f"config.json holds a {type(raw).__name__}, not an object")
        architectures = raw.get("architectures") or ["none"]
        architecture = architectures[0] if isinstance(architectures, list) else architectures
        if architecture not in ARCHITECTURES:
            raise BadInput(f"architecture {architecture} is not supported; minichat runs {', '.join(ARCHITECTURES)}")
        mistral = architecture == "MistralForCausalLM"
        wanted = "mistral" if mistral else "llama"
        if raw.get("model_type", wanted) != wanted:
            raise BadInput(f"model_type {raw['model_type']!r} is not that of {architecture}, {wanted!r}")
        # transformers 4, or 5, which takes the older one where both are there
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise BadInput(
                f"rope_scaling or rope_parameters is {rope!r} in config.json; it must be one object, or null"
            )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise BadInput(f"RoPE scaling {kind!r} is not supported; minichat runs checkpoints without one")
        for field in ("attention_bias", "mlp_bias"):
            if raw.get(field):
                raise BadInput(f"{field} is true in config.json; minichat's linears have no bias")
        if raw.get("hidden_act", "silu") != "silu":
            raise BadInput(f"hidden_act {raw['hidden_act']!r} is not supported; Mistral's is silu")

        def size(field: str, default: int | None = None) -> int:
            value = raw.get(field)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
                raise BadInput(f"{field} is {value!r} in config.json; it must be a positive integer")
            return value

        def number(field: str, value) -> float:
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e38:
                raise BadInput(f"{field} is {value!r} in config.json; it must be a positive number")
            return float(value)

        def token(field: str, default: int | None) -> int | list[int] | None:
            value = raw.get(field, default)
            several = isinstance(value, list) and field == "eos_token_id"
            for one in value if several else [] if value is None else [value]:
                if not isinstance(one, int) or isinstance(one, bool):
                    raise BadInput(f"{field} is {value!r} in config.json; it must be a token's id, or null")
            return value

        heads = size("num_attention_heads")
        hidden = size("hidden_size")
        if raw.get("head_dim") is None and hidden % heads:
            raise BadInput(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim")
        # where a field is missing, the default is that of transformers' class for this architecture
        window = raw.get("sliding_window", 4096) if mistral else None
        config = cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", 8 if mistral else heads),
            head_dim=size("head_dim", hidden // heads),
            sliding_window=None if window is None else size("sliding_window", window),
            max_position_embeddings=size("max_position_embeddings", 131072 if mistral else 2048),
            rope_theta=number("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rms_norm_eps=number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=number("initializer_range", raw.get("initializer_range", 0.02)),
            architecture=architecture,
            bos_token_id=token("bos_token_id", 1),
            eos_token_id=token("eos_token_id", 2),
            pad_token_id=token("pad_token_id", None),
        )
        # all of it is built, without memory, before the first weight is looked at
        widest = max(config.vocab_size, hidden, config.intermediate_size, heads * config.head_dim)
        if config.num_hidden_layers > 1024 or widest > 1 << 28:
            raise BadInput(
                f"config.json wants {config.num_hidden_layers} layers, of width up to {widest}; no model is so large"
            )
        if heads % config.num_key_value_heads:
            raise BadInput(f"{heads} attention heads do not share {config.num_key_value_heads} key heads evenly")
        if config.head_dim % 2:
            raise BadInput(f"head_dim {config.head_dim} is odd; RoPE rotates pairs")
        return config

    def to_dict(self, dtype: torch.dtype) -> dict:
        """config.json's content, in the words of transformers 4 and 5 both; dtype is that of the saved weights."""
        raw = asdict(self)
        architecture = raw.pop("architecture")
        mistral = architecture == "MistralForCausalLM"
        if not mistral:
            raw.pop("sliding_window")
        name = str(dtype).removeprefix("torch.")
        return {
            "architectures": [architecture],
            "model_type": "mistral" if mistral else "llama",
            **raw,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": name,
            "torch_dtype": name,
        }


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467): normalised in float32, cast to x's dtype, then multiplied."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """RMSNorm that keeps x as it came and a number per row: autograd would keep float32 copies of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return weight * (x32 * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        x32 = x.float()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dn = (grad * weight).float()
            slope = scale.square() * (dn * x32).mean(-1, keepdim=True)
            dx = torch.addcmul(dn, x32, slope, value=-1).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (grad * (x32 * scale).to(x.dtype)).flatten(0, -2).sum(0)
        return dx, dw, None


class Attention(nn.Module):
    """Grouped-query attention with RoPE: (B, T, D) normed hidden states -> (B, T, D) to add to the residual stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, Hd = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, Hd
        self.q_proj = nn.Linear(D, config.num_attention_heads * Hd, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * Hd, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * Hd, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * Hd, D, bias=False)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries (B, H, T, Hd), keys and values (B, KvH, T, Hd), the first two rotated."""
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, view: View | None, cache) -> Tensor:
        """What the queries take of the values, those in the cache too: (B, T, H, Hd)."""
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, KvH, S, Hd)
        return attention(q, k, v, view).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: View | None, cache, wanted: Tensor | None) -> Tensor:
        return self.o_proj(_only(wanted, self.mix(*self.heads(x, cos, sin), view, cache).flatten(2)))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: Config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))


class _Gated(torch.autograd.Function):
    """silu(gate) * up that keeps the two and not silu(gate): a sixth of what a block keeps, for one more product."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        # torch 2.11 compiles a wrong gradient where forward ends with an operation in place
        return F.silu(gate) * up if torch.compiler.is_compiling() else F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Block(nn.Module):
    """(B, T, D) hidden states -> the same with attention's and the MLP's outputs added, each behind its norm."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.checkpointed = ""  # what backward computes again, so that forward need not keep it: a name of CHECKPOINTS

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: View | None, cache, wanted: Tensor | None) -> Tensor:
        """wanted: as Decoder.forward's, if this is the last block."""
        x = _checkpointed(self._attention, x, cos, sin, view, cache, wanted, again=self.checkpointed == "attention")
        return _checkpointed(self._mlp, x, again=self.checkpointed == "mlp")

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, view: View | None, cache, wanted) -> Tensor:
        return _only(wanted, x) + self.self_attn(self.input_layernorm(x), cos, sin, view, cache, wanted)

    def _in_parts(self, x: Tensor, cos: Tensor, sin: Tensor, view: View | None, cache, wanted) -> Tensor:
        """_attention, in parts that can be compiled and one that cannot."""
        y = self.self_attn.mix(*self._before(x, cos, sin), view, cache).contiguous()
        # what is compiled asks of a view what it is a view of, which differs from row to row: this is none
        y = torch.ops.aten._unsafe_view(y, (*y.shape[:2], -1))
        return self._after(_only(wanted, x), _only(wanted, y))

    def _before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.heads(self.input_layernorm(x), cos, sin)

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.self_attn.o_proj(y)

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


def _only(wanted: Tensor | None, x: Tensor) -> Tensor:
    """(B, T, D) -> (1, N, D), the rows at the flat positions `wanted`, (N,); None is all of x."""
    return x if wanted is None else x.flatten(0, 1)[None].index_select(1, wanted)


def _checkpointed(function, *args, again: bool) -> Tensor:
    """function(*args), keeping what its backward needs, or only args to compute it again."""
    again = again and torch.is_grad_enabled()
    return checkpoint(function, *args, use_reentrant=False) if again else function(*args)


class Decoder(nn.Module):
    """Everything below the head: ids -> hidden states."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiled = False

    def set_checkpointing(self, *names: str) -> None:
        """Gradient checkpointing: what backward computes again, a name of CHECKPOINTS for each of the first blocks, or
        one for all of them; "" for the others. Raises ValueError for another name."""
        if unknown := {*names} - {"", *CHECKPOINTS}:
            raise ValueError(f"checkpointing of {', '.join(unknown)}; choose from {', '.join(CHECKPOINTS)}, or ''")
        names = names * len(self.layers) if len(names) == 1 else names
        for block, name in itertools.zip_longest(self.layers, names, fillvalue=""):
            block.checkpointed = name

    def compile_blocks(self, compiled: Callable[[Callable], Callable]) -> None:
        """Run the blocks' parts as compiled(part), each one function for all blocks (device.compiler has such).

        Attention itself stays as it is: it goes document by document, and another list of lengths is not to be another
        program. So does what gradient checkpointing computes again: it calls what is compiled. Nothing calls
        `self_attn` as a whole then: hooks on it do not fire.
        """
        parts = {name: compiled(getattr(Block, name)) for name in COMPILED}
        self.compiled = True
        for block in self.layers:
            block._attention = block._in_parts
            for name, part in parts.items():
                setattr(block, name, MethodType(part, block))

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache=None,
        documents: list[tuple[int, ...]] | Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, D), after the last norm.

        positions: (B, T) int64, -1 for padding; None is 0, 1, 2, … in every row, or what follows those in the cache
        (padding on the right does no harm: no token sees what follows it). cache: a KVCache that these tokens continue.
        documents: of packed rows, whose documents do not see each other: the lengths of those in the only row, whose
        positions follow (attention.Documents); or, where shapes have to be static, (B, T) the number of each token's
        (attention.FORKS), with positions. wanted: (N,) int64, flat positions b * T + t: the result is (N, D), theirs.
        Where they are fewer than all, the last block's o_proj and MLP compute no others: hooks there see (1, N, D).
        """
        config, window = self.config, self.config.sliding_window
        implicit = positions is None
        begun = 0 if cache is None else cache.filled
        if implicit:
            positions = torch.arange(begun, begun + ids.shape[1], device=ids.device)[None]
        if cache is not None:
            seen = cache.advance(positions.expand(len(ids), -1))
        if isinstance(documents, list):
            view = Documents(documents, window, ids.device)
            positions = view.positions
        elif cache is not None and (begun or not implicit or seen.shape != ids.shape):
            view = View(positions, seen, window, ordered=False)
        elif implicit and (window is None or ids.shape[1] <= window):
            view = None
        else:
            # in a packed row, what continues a trunk is further from it by columns than by positions
            ordered = documents is None
            view = View(positions, positions, window, ordered, consecutive=implicit, doc=documents)
        x = self.embed_tokens(ids).to(self.norm.weight.dtype)  # the table may be held in half of it
        cos, sin = rotary(positions, config.head_dim, config.rope_theta, x.dtype)
        # a size of 1 torch compiles as a constant
        fewer = wanted is not None and 1 < len(wanted) < ids.numel()
        for i, block in enumerate(self.layers):
            only = wanted if fewer and i == len(self.layers) - 1 else None
            x = _checkpointed(block, x, cos, sin, view, cache, only, again=block.checkpointed == "block")
        x = self.norm(x)
        return x if wanted is None else x[0] if fewer else x.flatten(0, 1).index_select(0, wanted)


class _NothingDrawn(TorchFunctionMode):
    """torch.nn.init does nothing: on the meta device its random numbers take a second of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = getattr(func, "__module__", None) == "torch.nn.init"
        return None if drawn else func(*args, **(kwargs or {}))


def without_weights(config: Config) -> "Mistral":
    """The model on the meta device: shapes, no memory."""
    with torch.device("meta"), _NothingDrawn():
        return Mistral(config)


class Mistral(nn.Module):
    """The language model; `model` and `lm_head` as in Hugging Face's files."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of all weights that are not quantised."""
        return self.model.norm.weight.dtype

    def _apply(self, function, recurse=True):
        # on some devices (Gaudi) a move makes another weight of each module's: the two that are one have to stay so
        tied = getattr(self.lm_head, "weight", None) is self.model.embed_tokens.weight
        super()._apply(function, recurse)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache=None) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; the arguments are Decoder.forward's."""
        return self.lm_head(self.model(ids, positions, cache))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Start from scratch: normal with config.initializer_range, the norms' weights at one."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                drawn = torch.empty(module.weight.shape).normal_(0, self.config.initializer_range, generator=generator)
                module.weight.copy_(drawn)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)
