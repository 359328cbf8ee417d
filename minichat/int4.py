"""INT4 (and INT8) weight-only quantisation: Int4Linear, quantise a model, and the format on disk. NF4 for training.

On disk a weight is in compressed-tensors' `pack-quantized` format, vLLM's too, which transformers opens as it is; in
memory it is in the layout of its device's kernel (kernels/int4_reference.py has the arithmetic and the rounding rule).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minichat import kernels
from minichat.errors import BadInput, within
from minichat.kernels import int4_reference as reference
from minichat.kernels.int4_reference import Packed
from minichat.patterns import compiled

KEYS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")  # of one linear on disk


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised. Raises BadInput for what no kernel has.

    group_size: weights that share a scale. 128 is what most published folders have (4.125 bits a weight); 32 (4.5
    bits) has a quarter less squared error, and divides the widths of small models too, so it is the default.
    skip: the linears left as they are, by full name or as "re:" and a regular expression that matches from the
    start, as in compressed-tensors' `ignore`.
    nf4: QLoRA's 4-bit floats (kernels/nf4.py) instead of integers, a base to train over, which has no files; see NF4.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    nf4: bool = False

    def __post_init__(self):
        if self.nf4 and (self.bits, self.symmetric) != (4, True):
            raise BadInput("NF4 has 4 bits and no zero-points; leave out --bits and --asymmetric")
        if self.bits not in (4, 8):
            raise BadInput(f"bits is {self.bits!r}; choose --bits 4 or 8")
        if not isinstance(self.group_size, int) or self.group_size < 32 or self.group_size % 32:
            raise BadInput(f"group size {self.group_size!r} is no multiple of 32; choose --group-size from 32, 64, 128")
        for pattern in self.skip:
            with within("skip"):
                compiled(pattern.removeprefix("re:"))

    def __str__(self) -> str:
        name = "nf4" if self.nf4 else f"int{self.bits}"
        kind = "" if self.nf4 else ", symmetric" if self.symmetric else ", asymmetric"
        return f"{name} in groups of {self.group_size}{kind}, without {', '.join(self.skip) or 'exception'}"

    def skips(self, name: str) -> bool:
        return any(
            bool(compiled(skip[3:]).match(name)) if skip.startswith("re:") else skip == name for skip in self.skip
        )

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales: QLoRA's are fp32. INT4's codes are chosen for a rounded one, so that a wider gains nothing."""
        return torch.float32 if self.nf4 else torch.bfloat16


NF4 = Scheme(group_size=64, nf4=True)  # as in QLoRA (arXiv 2305.14314), without its double quantisation: 4.5 bits


class _Matmul(torch.autograd.Function):
    """x @ weight^T with a gradient to x alone. Backward reads the codes again: no float weight is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: str, packed: Packed) -> Tensor:
        ctx.kernel, ctx.packed = kernel, packed
        return kernels.named(kernel).matmul(x, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return kernels.named(ctx.kernel).matmul_transposed(grad, ctx.packed), None, None


# What torch.compile sees in _Matmul's place, as one operation: it can look into no kernel.
_OP = "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, int[] shape, str kernel, bool back, bool exact) -> Tensor"


@torch.library.custom_op("minichat::int4_matmul", mutates_args=(), schema=_OP)
def _matmul(x, codes, scale, zero, shape, kernel, back, exact):
    """x @ weight^T, or x @ weight; shape: in, out features, group size and bits of the weight."""
    packed, module = Packed(codes, scale, zero, *shape), kernels.named(kernel)
    return module.matmul_transposed(x, packed) if back else module.matmul(x, packed, exact)


@_matmul.register_fake
def _(x, codes, scale, zero, shape, kernel, back, exact):
    return x.new_empty(*x.shape[:-1], shape[1] if back else shape[0])


def _keep(ctx, inputs, output):
    _, *ctx.weight, ctx.shape, ctx.kernel, _, ctx.exact = inputs


def _gradient(ctx, grad):
    return _matmul(grad.contiguous(), *ctx.weight, ctx.shape, ctx.kernel, True, ctx.exact), *[None] * 7


_matmul.register_autograd(_gradient, setup_context=_keep)


class Int4Linear(nn.Module):
    """A linear whose weight (out_features, in_features) is quantised and frozen: x (..., in) -> (..., out), x's dtype.

    Made by `from_weight` or `from_quantized`. The buffers are in the layout of `kernel` and mean nothing elsewhere,
    so they are in no state_dict: `tensors_of` gives what goes to disk. `.to(device)` repacks for another kind of
    device; a cast to another dtype leaves them alone.

    exact: what it multiplies with is rounded to 15 bits at least; False, set by `set_exact`, lets the kernel take 8.
    """

    exact = True

    def __init__(self, packed: Packed, kernel: str, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.group_size, self.bits, self.symmetric = packed.group_size, packed.bits, packed.zero is None
        self.kernel = kernel  # the module that packed the buffers, and so the only one that reads them
        self.register_buffer("codes", packed.codes, persistent=False)
        self.register_buffer("scale", packed.scale, persistent=False)
        self.register_buffer("zero", packed.zero, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    @torch.no_grad()
    def from_weight(
        cls,
        weight: Tensor,
        scheme: Scheme,
        device: torch.device | None = None,
        bias: Tensor | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> "Int4Linear":
        """Quantise weight (out, in), float, where it is, and place the result on `device` (None: there too).

        scale_dtype: None is the scheme's, but of INT4 fp16 for an fp16 weight. Raises BadInput if the weight is not
        finite or `in` is no multiple of the group size.
        """
        if scale_dtype is None:
            half = weight.dtype == torch.float16 and not scheme.nf4
            scale_dtype = torch.float16 if half else scheme.scale_dtype
        kernel = kernels.for_device(weight.device, scheme.nf4)
        q, scale, zero = kernel.quantize(weight, scheme.group_size, scheme.bits, scheme.symmetric, scale_dtype)
        return cls.from_quantized(q, scale, zero, scheme.bits, device, bias, scheme.nf4)

    @classmethod
    @torch.no_grad()
    def from_quantized(
        cls,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        device: torch.device | None = None,
        bias: Tensor | None = None,
        nf4: bool = False,
    ) -> "Int4Linear":
        """From codes (out, in) uint8, scale (out, in / G) and zero (out, in / G) uint8 or None; packed where they are.

        Raises BadInput if their shapes and types do not fit together.
        """
        device = q.device if device is None else torch.device(device)
        kernel = kernels.for_device(device, nf4)
        packed = _moved(kernel.pack(q, scale, zero, bits), device)
        return cls(packed, _name(kernel), None if bias is None else bias.to(device))

    @property
    def packed(self) -> Packed:
        shape = self.out_features, self.in_features
        return Packed(self.codes, self.scale, self.zero, *shape, self.group_size, self.bits)

    @property
    def nf4(self) -> bool:
        return self.kernel == "nf4"

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def forward(self, x: Tensor) -> Tensor:
        learns = x.requires_grad and torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            shape = [self.out_features, self.in_features, self.group_size, self.bits]
            y = _matmul(x, self.codes, self.scale, self.zero, shape, self.kernel, False, self.exact or learns)
        elif learns:
            y = _Matmul.apply(x, self.kernel, self.packed)
        else:
            y = kernels.named(self.kernel).matmul(x, self.packed, self.exact)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in) that the layer multiplies with, rounded to `dtype`."""
        return kernels.named(self.kernel).dequantize(self.packed, dtype)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes (out, in) uint8, scale and zero, exactly as they were packed."""
        return kernels.named(self.kernel).unpack(self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        # nn.Module moves and casts through here; our buffers move, and are repacked if the kind of device changes
        packed = self.packed
        target = fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device
        kernel = kernels.named(self.kernel)
        if target.type != self.device.type:
            kernel = kernels.for_device(target, self.nf4)
            packed = kernel.pack(*self.unpack(), self.bits)
        scale_bits = torch.int32 if packed.scale.dtype == torch.float32 else torch.int16  # casts leave integers alone
        moved = {
            "codes": fn(packed.codes),
            "scale": fn(packed.scale.view(scale_bits)).view(packed.scale.dtype),
            "zero": None if packed.zero is None else fn(packed.zero),
        }
        kept = {name: self._buffers[name] for name in moved}
        self._buffers.update(dict.fromkeys(moved))  # hidden, or casts would reach them
        try:
            super()._apply(fn, recurse)
            kept, self.kernel = moved, _name(kernel)
        finally:
            self._buffers.update(kept)
        return self

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, {kind}, kernel={self.kernel}"
        )


def _name(kernel) -> str:
    return kernel.__name__.rsplit(".", 1)[-1]


def _moved(packed: Packed, device: torch.device) -> Packed:
    zero = None if packed.zero is None else packed.zero.to(device)
    return packed._replace(codes=packed.codes.to(device), scale=packed.scale.to(device), zero=zero)


# ---- a whole model ----


@torch.no_grad()
def quantize(
    model: nn.Module,
    group_size: int = Scheme.group_size,
    bits: int = Scheme.bits,
    symmetric: bool = Scheme.symmetric,
    skip: Sequence[str] = Scheme.skip,
    nf4: bool = Scheme.nf4,
) -> nn.Module:
    """Replace every nn.Linear of the model that `skip` does not name by an Int4Linear, in place; the model.

    One at a time, so memory peaks at the model plus one weight. Sets `model.scheme`. Raises BadInput, before
    anything is changed, if a linear does not fit the scheme or carries an adapter, or if there is none.
    """
    scheme = Scheme(bits, group_size, symmetric, tuple(skip), nf4)
    if any(isinstance(module, Int4Linear) for module in model.modules()):
        raise BadInput("the model is quantised already, with one scheme for all; quantise the float model")
    linears = {name: module for name, module in model.named_modules() if wanted(name, module, scheme)}
    check_head(scheme, getattr(getattr(model, "config", None), "tie_word_embeddings", False), "the model")
    if not linears:
        raise BadInput(f"the model has no nn.Linear to quantise, apart from {', '.join(scheme.skip) or 'nothing'}")
    for name, module in linears.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if type(module) is not nn.Linear or hasattr(parent, "in_features"):
            raise BadInput(f"{name} carries or is an adapter; merge it before you quantise: minichat.lora.merge(model)")
    check(linears, scheme)
    for name in list(linears):
        linear = linears.pop(name)
        parent, _, leaf = name.rpartition(".")
        new = Int4Linear.from_weight(linear.weight.detach(), scheme, bias=linear.bias)
        setattr(model.get_submodule(parent), leaf, new.train(linear.training))
        del linear  # or its weight would live until the next one is done
    model.scheme = scheme
    return model


def wanted(name: str, module: nn.Module, scheme: Scheme) -> bool:
    """Whether the scheme quantises the module called `name`: an nn.Linear that it does not skip."""
    return isinstance(module, nn.Linear) and not scheme.skips(name)


def check(linears: Mapping[str, nn.Module], scheme: Scheme) -> None:
    """Raise BadInput, naming the module, if one that the scheme quantises has no whole number of groups."""
    for name, module in linears.items():
        if wanted(name, module, scheme) and module.in_features % scheme.group_size:
            raise BadInput(
                f"{name}: in_features {module.in_features} is not a multiple of group size {scheme.group_size}; "
                "choose --group-size from 32, 64, 128"
            )


def check_head(scheme: Scheme, tied: bool, where: object) -> None:
    """Raise BadInput if the scheme quantises a head that is the embedding's table (`tied`)."""
    if tied and not scheme.skips("lm_head"):
        raise BadInput(f"{where}: its head is its embedding, which stays as it is; leave out --lm-head (skip it)")


def count_weights(model: nn.Module) -> int:
    """How many weights a model has, quantised ones too."""
    quantised = (m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear))
    return sum(weight.numel() for weight in model.parameters()) + sum(quantised)


def set_exact(model: nn.Module, exact: bool) -> nn.Module:
    """Say how all quantised linears of the model round their activations (see Int4Linear.exact); the model."""
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.exact = exact
    return model


# ---- on disk: compressed-tensors' pack-quantized ----


def tensors_of(module: Int4Linear) -> dict[str, Tensor]:
    """What one linear is on disk, by the KEYS: N = out_features, K = in_features, P = 32 / bits codes in a word.

    weight_packed (N, K / P) int32, the first code in the lowest bits; weight_scale (N, K / G); weight_shape (2,)
    int64; and if it is asymmetric weight_zero_point (N / P rounded up, K / G) int32, packed along the rows. Codes are
    unsigned: the format's signed value plus 8 (or 128). Raises BadInput for NF4, which the format has not.
    """
    if module.nf4:
        raise BadInput("an NF4 base has no files: save the adapter that was trained over it, minichat.lora.save")
    q, scale, zero = module.unpack()
    tensors = {
        "weight_packed": reference.words_from_codes(q, module.bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if zero is not None:
        columns = nn.functional.pad(zero.T, (0, -zero.shape[0] % (32 // module.bits)))
        tensors["weight_zero_point"] = reference.words_from_codes(columns, module.bits).T.contiguous()
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    scheme: Scheme,
    device: torch.device | None = None,
) -> Int4Linear:
    """The inverse of `tensors_of`, for a weight of `shape` (out, in). Raises BadInput naming what does not fit."""
    N, K = shape
    per_word, groups = 32 // scheme.bits, K // scheme.group_size
    if K % scheme.group_size:
        raise BadInput(f"in_features {K} is not a multiple of group size {scheme.group_size}; see config.json")
    expected = {
        "weight_packed": ((N, K // per_word), (torch.int32,)),
        "weight_scale": ((N, groups), reference.SCALE_DTYPES),
        "weight_shape": ((2,), (torch.int64, torch.int32)),
    }
    if not scheme.symmetric:
        expected["weight_zero_point"] = (-(-N // per_word), groups), (torch.int32,)
    if set(tensors) != set(expected):
        raise BadInput(f"found {', '.join(sorted(tensors))}; a weight of {scheme} is {', '.join(sorted(expected))}")
    for key, (size, dtypes) in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != size or tensor.dtype not in dtypes:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise BadInput(
                f"{key} is {tuple(tensor.shape)} {tensor.dtype}; for a weight {(N, K)} of {scheme} it is {size} {known}"
            )
    if tensors["weight_shape"].tolist() != [N, K]:
        raise BadInput(f"weight_shape says {tensors['weight_shape'].tolist()}; config.json wants {[N, K]}")
    if not tensors["weight_scale"].isfinite().all():
        raise BadInput("weight_scale has NaN or infinity in it; the file is damaged: download it again")
    q = reference.codes_from_words(tensors["weight_packed"], scheme.bits)
    zero = None
    if not scheme.symmetric:
        zero = reference.codes_from_words(tensors["weight_zero_point"].T, scheme.bits).T[:N].contiguous()
    return Int4Linear.from_quantized(q, tensors["weight_scale"], zero, scheme.bits, device)


def quantization_config(scheme: Scheme) -> dict:
    """config.json's `quantization_config` for a model of this scheme."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(scheme.skip),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def parse_quantization_config(config: Mapping | None) -> Scheme | None:
    """The Scheme of config.json's `quantization_config`; None for None, a model that is not quantised.

    Raises BadInput for everything that these kernels would read wrongly, with the entry that says so.
    """
    if config is None:
        return None
    _require(config, "quantization_config", "quant_method", ("compressed-tensors",))
    _require(config, "quantization_config", "format", ("pack-quantized",))
    _require(config, "quantization_config", "quantization_status", ("compressed", None))
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.get(key) and config[key] != {"format": "dense"}:
            raise BadInput(
                f"quantization_config: {key} is {config[key]!r}; only plain weights can be read: leave it out"
            )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise BadInput(f"quantization_config: config_groups is {groups!r}; wanted is exactly one group")
    [(name, group)] = groups.items()
    where = f"quantization_config: {name}"
    _require(group, where, "targets", (["Linear"],))
    _require(group, where, "format", ("pack-quantized", None))
    _require(group, where, "input_activations", (None,))
    _require(group, where, "output_activations", (None,))
    weights = group.get("weights")
    where += ".weights"
    _require(weights, where, "num_bits", (4, 8))
    _require(weights, where, "type", ("int",))
    _require(weights, where, "symmetric", (True, False))
    _require(weights, where, "strategy", ("group",))
    _require(weights, where, "dynamic", (False, None))
    _require(weights, where, "actorder", (None, False, "weight", "static"))  # these two leave the columns in order
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise BadInput(f"quantization_config: ignore is {ignore!r}; wanted is a list of names")
    return Scheme(weights["num_bits"], weights.get("group_size"), weights["symmetric"], tuple(ignore))


def _require(config: object, where: str, key: str, known: tuple) -> None:
    if not isinstance(config, Mapping):
        raise BadInput(f"{where} is {config!r}; wanted is a JSON object")
    value = config.get(key)
    if not any(value == k and type(value) is type(k) for k in known):
        wanted = " or ".join("nothing" if k is None else repr(k) for k in known)
        raise BadInput(
            f"{where}: {key} is {value!r}; wanted is {wanted}: load the float model instead, "
            "or convert it to compressed-tensors' pack-quantized"
        )
