"""Low-rank adapters (LoRA, arXiv 2106.09685), hand-written, and PEFT's files for them."""

import copy
import functools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minichat import files
from minichat.console import say
from minichat.errors import BadInput, within
from minichat.patterns import compiled

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's key is this and ours
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# entries of PEFT's config under which these tensors would mean something else
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication",
               "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config")  # fmt: skip


class Lora:
    """What attach() mixes into a linear's class: y = base(x) + scale * B A dropout(x).

    The linear stays itself, whatever it is, so its own parameters keep their names and the adapter's are PEFT's:
    `q_proj.weight`, `q_proj.lora_A.weight` (r, in), `q_proj.lora_B.weight` (out, r). Adapters are float32 and
    multiply in x's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.lora_on:
            return super().forward(x)
        dropout = self.lora_dropout if self.training else 0.0
        plain = _base(self) is nn.Linear and self.bias is None and not self.weight.requires_grad
        y, W = (None, self.weight) if plain else (super().forward(x), None)
        return _Adapted.apply(y, W, x, self.lora_A.weight, self.lora_B.weight, self.lora_scale, dropout)


class _Adapted(torch.autograd.Function):
    """base(x) + scale * B A dropout(x). It keeps x, which adapters of the same input share, and which of it was
    dropped, but not what was left.

    base(x) is y, or x W^T of a frozen W: that product is made here, and its gradient, so that base's and the adapter's
    are added in place. Beside products so thin, another tensor written and read costs as much as they do.
    """

    @staticmethod
    def forward(
        ctx, y: Tensor | None, W: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        kept, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        low = F.linear(kept, A.to(x.dtype)).flatten(0, -2) * scale
        ctx.save_for_backward(W, x, mask, low, A, B)
        ctx.scale = scale / (1 - dropout)
        up = B.to(low.dtype).t()
        if W is None:
            return torch.addmm(y.flatten(0, -2), low, up).view_as(y)
        return F.linear(x.flatten(0, -2), W).addmm_(low, up).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        W, x, mask, low, A, B = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        dlow = rows @ B.to(x.dtype) * ctx.scale
        dA = (dlow.t() @ (x if mask is None else x * mask).flatten(0, -2)).to(A.dtype)
        dB = (low.t() @ rows).t().contiguous().to(B.dtype)  # the CPU takes 0.6 of the time of rows.t() @ low
        dx = None
        if ctx.needs_input_grad[2]:
            down = A.to(x.dtype)
            if mask is None:
                dx = dlow @ down if W is None else (rows @ W).addmm_(dlow, down)
            else:
                dx = (dlow @ down).mul_(mask.flatten(0, -2))
                dx = dx if W is None else dx.addmm_(rows, W)
            dx = dx.view_as(x)
        return grad if W is None else None, None, dx, dA, dB, None, None


class Frozen:
    """What freeze() makes of an adapter: y = base(x) + scale * B A x, a part of the model that others go over."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for A, B, s in self.frozen:
            # one product, as in _Adapted: compiled, a sum of two would be rounded where it is read, not the same twice
            low = F.linear(x, A.to(x.dtype)).flatten(0, -2) * s
            y = torch.addmm(y.flatten(0, -2), low, B.to(x.dtype).t()).view_as(y)
        return y

    def _apply(self, function, recurse=True):
        self.frozen = [(function(A), function(B), s) for A, B, s in self.frozen]
        return super()._apply(function, recurse)


def scale(r: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Lora)}


def attach(
    model: nn.Module,
    r: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = LINEARS,
    rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give every linear whose name ends in one of `targets` an adapter, and freeze everything else; the model.

    A starts Kaiming-uniform (a = sqrt 5), B at zero: the model's outputs do not change. rank_pattern and
    alpha_pattern override r and alpha for the modules whose name ends in a key, or matches it as a regular
    expression, as in PEFT. Works over any linear: float, or Int4Linear.
    Raises BadInput if a target matches nothing, an adapter is there already, or a number is out of range.
    """
    if adapted(model):
        raise BadInput("the model has an adapter already; merge it before you attach another: lora.merge(model)")
    if not 0 <= dropout < 1:
        raise BadInput(f"--lora-dropout is {dropout}; it is a share, 0 or more and below 1")
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "in_features")}
    for target in targets or [""]:
        if not any(_names(target, name) for name in linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise BadInput(f"LoRA target {target!r} names no linear; choose --lora-targets from {', '.join(known)}")
    ranks = {n: int(_overridden(rank_pattern, n, r)) for n in linears if any(_names(target, n) for target in targets)}
    for name, rank in ranks.items():
        if rank < 1:
            raise BadInput(f"LoRA rank is {rank} for {name}; it must be 1 or more")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, rank in ranks.items():
        module = linears[name]
        bound = 1 / math.sqrt(module.in_features)  # Kaiming-uniform with a = sqrt 5
        A = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(module.out_features, rank)
        _mix_in(module, A, B, rank, float(_overridden(alpha_pattern, name, alpha)), dropout, rslora)
    model.lora = {"r": r, "alpha": alpha, "dropout": dropout, "targets": list(targets), "rslora": rslora}
    model.lora |= {"rank_pattern": rank_pattern or {}, "alpha_pattern": alpha_pattern or {}}
    return model


def _mix_in(module: nn.Module, A: Tensor, B: Tensor, r: int, alpha: float, dropout: float, rslora: bool) -> None:
    where = next(iter([*module.parameters(), *module.buffers()])).device
    module.__class__ = _mixed(Lora, type(module))
    module.lora_A, module.lora_B = (nn.Linear(m.shape[1], m.shape[0], bias=False, device="meta") for m in (A, B))
    module.lora_A.weight = nn.Parameter(A.to(where, torch.float32))
    module.lora_B.weight = nn.Parameter(B.to(where, torch.float32))
    module.lora_scale, module.lora_dropout, module.lora_on = scale(r, alpha, rslora), dropout, True


@functools.cache  # one class for all layers: what is compiled for one module is for that of its class
def _mixed(what: type, kind: type) -> type:
    return type(f"{what.__name__}{kind.__name__}", (what, kind), {})


def _base(module: nn.Module) -> type:
    """The class that _mixed made the module's of."""
    return type(module).__mro__[2]


def _names(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith("." + pattern)


def _overridden(patterns: dict | None, name: str, default):
    for pattern, value in (patterns or {}).items():
        if _names(pattern, name) or compiled(pattern) and re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as if it had no adapter, until the block ends."""
    modules = adapted(model).values()
    if not modules:
        raise ValueError("the model has no adapter to disable")
    was = [module.lora_on for module in modules]
    try:
        for module in modules:
            module.lora_on = False
        yield model
    finally:
        for module, on in zip(modules, was):
            module.lora_on = on


# ---- PEFT's files ----


class Adapter:
    """An adapter read from a PEFT folder: per module name (A, B, scale), and what its config says.

    Raises BadInput for a folder that holds no adapter, another kind than LoRA, or tensors that are off.
    """

    def __init__(self, folder: str | Path):
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        file = self.folder / WEIGHTS
        self.config = files.read_json(self.folder / CONFIG)
        if self.config.get("peft_type") != "LORA":
            raise BadInput(f"{self.folder / CONFIG}: not a LoRA adapter; minichat reads peft_type LORA")
        for key in UNSUPPORTED:
            if self.config.get(key):
                raise BadInput(f"{self.folder / CONFIG}: {key} is not supported")
        start = str(self.config.get("init_lora_weights"))
        if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise BadInput(
                f"{self.folder / CONFIG}: init_lora_weights {start!r} is not supported: it changed the base too"
            )
        if not file.exists():
            rest = "; adapter_model.bin holds pickle: save it again with safe_serialization=True"
            bin = (self.folder / "adapter_model.bin").exists()
            raise BadInput(f"{file}: not there{rest if bin else ''}")
        try:
            with safe_open(file, framework="pt") as tensors:
                self.metadata = tensors.metadata() or {}
                found = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: not a whole safetensors file: {error}") from None
        self.pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
        # PEFT puts the weight of an adapted head beside its adapter
        bases = [key for key in found if re.fullmatch(re.escape(PREFIX) + r".+\.base_layer\.weight", key)]
        self.bases = {key.removeprefix(PREFIX).removesuffix(".base_layer.weight"): found.pop(key) for key in bases}
        for key in found:
            match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
            if not match:
                raise BadInput(f"{file}: key {key} is not of a LoRA adapter on linears")
            name = match[1]
            A, B = (found.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
            if A is None or B is None or A.dim() != 2 or B.dim() != 2 or not 0 < len(A) == B.shape[1]:
                raise BadInput(f"{file}: {name} needs lora_A (r, in) and lora_B (out, r)")
            self.pairs[name] = (A, B, self._scale(name, A.shape[0]))
        if not self.pairs:
            raise BadInput(f"{file}: holds no adapter weights")

    def _scale(self, name: str, rank: int) -> float:
        config = self.config
        for key in ("rank_pattern", "alpha_pattern"):
            with within(f"{self.folder / CONFIG}: {key}"):
                if not isinstance(config.get(key) or {}, dict):
                    raise BadInput("maps no names or expressions to numbers")
                _overridden(config.get(key), name, None)
        r = _overridden(config.get("rank_pattern"), name, config.get("r"))
        if r != rank:
            raise BadInput(f"{self.folder / WEIGHTS}: {name} has rank {rank}, but {CONFIG} says {r}")
        alpha = _overridden(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or not abs(alpha) < 1e38:
            raise BadInput(f"{self.folder / CONFIG}: lora_alpha is {alpha!r} for {name}; it must be a number")
        return scale(rank, alpha, bool(config.get("use_rslora")))

    def only(self, targets: Sequence[str] | None) -> "Adapter":
        """This adapter restricted to the modules whose name ends in one of `targets` (None: all of them)."""
        if targets is not None:
            if not any(targets):
                raise BadInput(f"{self.folder}: no module is named of which the adapter's part is to be taken")
            for target in targets:
                if not any(_names(target, name) for name in self.pairs):
                    raise BadInput(f"{self.folder}: the adapter has nothing for {target!r}")
            chosen = copy.copy(self)
            chosen.pairs = {n: pair for n, pair in self.pairs.items() if any(_names(t, n) for t in targets)}
            return chosen
        return self

    def check_fits(self, name: str, shape: tuple[int, int], weight: Tensor | None) -> None:
        """Raise BadInput if module `name` has another shape than it was made for, or another weight than it brings."""
        A, B, _ = self.pairs[name]
        made = (B.shape[0], A.shape[1])
        if made != tuple(shape):
            raise BadInput(f"{self.folder}: made for {name} of shape {made}, not {tuple(shape)}")
        if weight is not None and name in self.bases and not weight.is_meta:
            theirs = self.bases[name].to(weight.device)
            # of two types, what either has rounded is no difference
            apart = 0 if theirs.dtype == weight.dtype else 2**-8
            near = theirs.shape == weight.shape and torch.allclose(
                theirs.float(), weight.float(), apart, apart and 2**-24
            )
            if not near:
                raise BadInput(
                    f"{self.folder}: has a weight for {name} that is not this model's: it was trained as well"
                )

    def delta(self, name: str, weight: Tensor) -> Tensor | None:
        """What merging adds to the weight (out, in) of module `name`, float32; None if the adapter leaves it alone."""
        if name not in self.pairs:
            return None
        self.check_fits(name, weight.shape, weight)
        A, B, s = self.pairs[name]
        return (B.float() @ A.float()) * s


def load(
    model: nn.Module, folder: "str | Path | Adapter", only: Sequence[str] | None = None, dropout: float = 0.0
) -> nn.Module:
    """Attach the adapter in `folder` (PEFT's format) to the model, unmerged; the model.

    only: restrict it to these modules, as neural-chat-7b-v3-2 does with q_proj, k_proj and v_proj. The base may be
    another than the adapter's own, if every module fits: a line on standard error says so where both are known.
    Raises BadInput if it does not fit.
    """
    if adapted(model):
        raise BadInput("the model has an adapter already; merge it before loading another")
    adapter = folder if isinstance(folder, Adapter) else Adapter(folder)
    adapter = adapter.only(only)
    modules = dict(model.named_modules())
    for name in adapter.pairs:
        module = modules.get(name)
        if module is None or not hasattr(module, "in_features"):
            raise BadInput(f"{adapter.folder}: the adapter has weights for {name}, which this model does not have")
        adapter.check_fits(name, (module.out_features, module.in_features), getattr(module, "weight", None))
    own, here = adapter.metadata.get("base_fingerprint"), getattr(model, "identity", None)
    if own and here and own != here:
        say(f"warning: {adapter.folder} was trained over other weights than these")
    model.requires_grad_(False)
    config = adapter.config
    rslora = bool(config.get("use_rslora"))
    # PEFT gives every module that a target names an adapter: short names only where none would be new
    short = {name.rsplit(".", 1)[-1] for name in adapter.pairs}
    named = {n for n, m in modules.items() if hasattr(m, "in_features") and n.rsplit(".", 1)[-1] in short}
    for name, (A, B, s) in adapter.pairs.items():
        r = A.shape[0]
        _mix_in(modules[name], A, B, r, s * (math.sqrt(r) if rslora else r), dropout, rslora)
    model.lora = {
        "r": config.get("r") or max(A.shape[0] for A, _, _ in adapter.pairs.values()),  # or patterns give every one
        "alpha": config.get("lora_alpha") or 1,
        "dropout": dropout,
        "targets": sorted(short if named == adapter.pairs.keys() else adapter.pairs),
        "rslora": rslora,
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "int4": adapter.metadata.get("int4"),
    }
    return model


def save(model: nn.Module, folder: str | Path, base: str | None = None, metadata: dict[str, str] | None = None) -> None:
    """Write the adapter as PEFT's adapter_model.safetensors and adapter_config.json.

    base: what it was trained over (base_model_name_or_path). metadata: strings for the safetensors header. Raises
    BadInput if there is none, if a weight is not finite, or if a file cannot be written.
    """
    modules = adapted(model)
    if not modules:
        raise BadInput("the model has no adapter to save")
    tensors = {}
    for name, module in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.weight.detach().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.weight.detach().cpu()
    lora = model.lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora["r"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": lora["targets"],
        "use_rslora": lora["rslora"],
        "rank_pattern": lora["rank_pattern"],
        "alpha_pattern": lora["alpha_pattern"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    with files.staged(folder, last=CONFIG) as new:
        files.write_tensors(tensors, new / WEIGHTS, metadata, finite=True)
        files.write_json(new / CONFIG, config)


@torch.no_grad()
def merge(model: nn.Module) -> float:
    """Fold the adapters into the weights, in float32 and rounded once, and remove them.

    Returns the largest change that the rounding makes to any module's output, relative to its norm, on a random
    input of unit variance. Raises BadInput over an INT4 base, whose weights cannot take a delta, and for a head that is
    the embedding too, which would take one that is not its own.
    """
    modules = adapted(model)
    if not modules:
        raise BadInput("the model has no adapter to merge")
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            raise BadInput(f"{name} is quantised; merge the adapter into the float weights and quantise again")
        if sum(weight is module.weight for _, weight in model.named_parameters(remove_duplicate=False)) > 1:
            raise BadInput(
                f"{name} shares its weight with another module, which merging would change; leave it unmerged"
            )
    if over := model.lora.get("int4"):
        say_merged_over("the adapter", over, "float weights")
    worst = 0.0
    for module in modules.values():
        delta = (module.lora_B.weight @ module.lora_A.weight) * module.lora_scale
        exact = module.weight.float() + delta
        module.weight.copy_(exact)
        worst = max(worst, rounding(exact, module.weight))
    remove(model)
    return worst


def say_merged_over(adapter: str | Path, over: str, now: str) -> None:
    """Tell that an adapter is merged into other weights than it has learnt to correct."""
    told = f"{adapter} was trained over quantised weights ({over}) and is merged into {now}: expect a small loss"
    trained = "" if over.startswith("nf4") else "; --int4 with the same options uses it as trained"
    say(f"{told}{trained}")


def rounding(exact: Tensor, rounded: Tensor) -> float:
    """How far rounding a weight (out, in) moves its output on a random probe, relative to the output."""
    probe = torch.randn(exact.shape[1], generator=torch.Generator().manual_seed(0)).to(exact.device)
    before = exact @ probe
    return float((rounded.float() @ probe - before).norm() / before.norm().clamp_min(1e-30))


@torch.no_grad()
def freeze(model: nn.Module) -> None:
    """Make adapters that cannot be merged a part of the model, which another may be attached to or loaded over."""
    for module in adapted(model).values():
        pair = module.lora_A.weight.data, module.lora_B.weight.data, module.lora_scale
        _take_off(module)
        _put_beside(module, pair)
    model.lora = None


def freeze_like(model: nn.Module, other: nn.Module) -> None:
    """Give the model what freeze() has made a part of the other one: the shapes, without values."""
    for name, module in other.named_modules():
        for A, B, s in module.frozen if isinstance(module, Frozen) else ():
            empty = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (A, B))
            _put_beside(model.get_submodule(name), (*empty, s))


def _put_beside(module: nn.Module, pair: tuple[Tensor, Tensor, float]) -> None:
    if not isinstance(module, Frozen):
        module.__class__ = _mixed(Frozen, type(module))
        module.frozen = []
    module.frozen.append(pair)


def remove(model: nn.Module) -> None:
    """Take the adapters off; the base is as it was before attach(), and still frozen."""
    for module in adapted(model).values():
        _take_off(module)
    model.lora = None


def _take_off(module: nn.Module) -> None:
    del module.lora_A, module.lora_B, module.lora_scale, module.lora_dropout, module.lora_on
    module.__class__ = _base(module)


# ---- the command ----

MERGE = """Merge an adapter into its base, or into another one: a folder that transformers opens.

    python -m minichat.lora merge --adapter runs/dpo --out merged             # and every adapter below it
    python -m minichat.lora merge --adapter runs/dpo --out merged-int4 --int4
    python -m minichat.lora merge --adapter A --base B --only k_proj,v_proj --force --out merged
"""


def main() -> None:
    from minichat import cli, weights

    parser = cli.Parser(MERGE, prog="python -m minichat.lora merge")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("--adapter", required=True, type=cli.source, metavar="FOLDER", help="a run or an adapter")
    parser.add_argument(
        "--base",
        type=cli.source,
        metavar="SOURCE",
        help="merge into this model (without it: into what it was trained over)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the new model's folder")
    parser.add_argument(
        "--only", metavar="NAMES", help="--base: the adapter's part for these modules, as q_proj,v_proj"
    )
    parser.add_argument("--force", action="store_true", help="--base: also if it was trained over another one")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of the weights"
    )
    cli.quantise_flags(parser)
    args = parser.parse_args()
    scheme = cli.scheme(args)
    folder = weights.resolve(args.adapter)
    if not (folder / CONFIG).exists():
        raise BadInput(f"{args.adapter} holds all weights and no adapter: it is a model already")
    adapter = Adapter(folder)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise BadInput(f"--out {args.out} is there already, and not empty; choose another folder, or delete it")
    if scheme and adapter.metadata.get("int4", "").startswith("int"):
        raise BadInput(
            f"{args.adapter} was trained over INT4 weights, which cannot take it: merge it into the float ones, and "
            "infer.py --int4 quantises the result; or use it beside them: infer.py --int4 --model RUN"
        )
    if args.base is None and (args.only is not None or args.force):
        raise BadInput("--only and --force say how to merge into another base; add --base")
    source, more = args.adapter, {}
    if args.base is not None:
        if not args.force and not weights.is_base(adapter, args.base):
            raise BadInput(f"{args.adapter} was trained over another base than {args.base}; --force merges it into it")
        only = None if args.only is None else [name.strip() for name in args.only.split(",")]
        source, more = args.base, {"adapter": args.adapter, "only": only}
    model, tokenizer = weights.load_model(source, "cpu", cli.torch_dtype(args.dtype), scheme, **more)
    if adapted(model):
        raise BadInput(f"{args.adapter} lies over INT4 weights, which cannot take it; infer.py uses it beside them")
    weights.save_model(model, tokenizer, args.out)
    say(f"done: {args.out}; talk to it: python infer.py --model {args.out}")


if __name__ == "__main__":
    from minichat import cli, lora

    cli.run(lora.main)  # of the module as others import it: one class Adapter, not two
