"""What a run will need, before there is a device: its largest micro-batch on fake tensors, every byte followed."""

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minichat import data, optim, training, weights
from minichat.device import GIB
from minichat.errors import BadInput
from minichat.int4 import Scheme, count_weights
from minichat.kernels import int4_reference, nf4
from minichat.model import Config, Mistral, without_weights

aten = torch.ops.aten
FLOPS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm]}  # of an operation
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Plan:
    """weights: all, trained: those that learn. flops and tokens: of one micro-batch, forward and backward.

    peak: bytes, at their most; parts: of what. Before the allocator rounds, and without the libraries' own scratch.
    again: what Decoder.set_checkpointing was told. host: bytes of the optimiser's moments that are not on the device.
    """

    weights: int
    trained: int
    flops: int
    tokens: int
    peak: int
    parts: dict[str, int]
    again: Sequence[str]
    host: int = 0

    @property
    def flops_per_token(self) -> float:
        return self.flops / self.tokens

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {sized(size)}" for part, size in self.parts.items() if size >= 1024)
        again = ", ".join(f"{count} x {name}" for name, count in Counter(self.again).items() if name)
        return (
            f"{number(self.weights / 1e6)} M weights, {number(self.trained / 1e6)} M of them train; "
            f"{number(self.flops_per_token / 1e9)} GFLOP per token; a micro-batch of {self.tokens:,} tokens "
            f"holds {sized(self.peak)} ({parts})"
            f"; computed again: {again or 'nothing'}"
            + (f"; moments on the host: {sized(self.host)}" if self.host else "")
        )


def sized(count: int) -> str:
    """Bytes in GiB; below a tenth of one in MiB, and so on to KiB."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1024:.2f} KiB"


def number(x: float) -> str:
    """With two decimals, or three digits where those would say less."""
    return f"{x:,.2f}" if x >= 1 else f"{x:.3g}"


def make(
    config: Config,
    scheme: Scheme | None,
    dtype: torch.dtype,
    prepare: Callable[[Mistral], None],
    method: training.Method,
    batch: data.Batch,
    accumulate: int = 1,
    again: Sequence[str] = ("",),
    eight_bit: bool = False,
    offload: bool = False,
) -> Plan:
    """Run a step of this batch without values. prepare: says what trains. again: as Decoder.set_checkpointing takes it.
    eight_bit, offload: the optimiser's moments.

    The model is on the CPU as far as torch can tell, so that attention keeps no scores; INT4 is the reference kernel's.
    """
    again = [*again] * config.num_hidden_layers if len(again) == 1 else again
    nf4.pairs_of_bytes(torch.device("cpu"))  # kept for good: made under the mode it would be a fake
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, _a_chunk_of_each_weight():
        model = _imagined(config, scheme, dtype)
        live.part = "adapters"
        prepare(model)
        model.model.set_checkpointing(*again)
        trained = [p for p in model.parameters() if p.requires_grad]
        live.part = "optimiser"
        # the device is the CPU here, and what Live does not count is the host
        optimizer = optim.AdamW(model, eight_bit=eight_bit, home=torch.device("meta") if offload else None)
        hooks = [(model.model, "activations"), (model.lm_head, "logits")]
        for module, part in hooks:
            module.register_forward_pre_hook(lambda *_, part=part: setattr(live, "part", part))
        model.train()
        for _ in range(min(accumulate, 2)):  # the second one finds the gradients that the first has left
            live.flops = 0
            loss = method.objective(model, batch.tensors)["loss"]
            live.part = "activations"
            loss.backward()
            optimizer.collect()
            live.gradients = {_key(p.grad) for p in (*trained, *optimizer.masters) if p.grad is not None}
        live.part = "update"
        optimizer.step(1e-4, 1.0)
    tokens = batch.tensors["ids"].numel()
    trains = sum(p.numel() for p in trained)
    host = sum(x.nbytes for moments in optimizer.moments for x in moments) if offload else 0
    return Plan(count_weights(model), trains, live.flops, tokens, live.peak, dict(live.parts), again, host)


def choose(budget_gib: float, layers: int, of: Callable[[Sequence[str]], Plan]) -> Plan:
    """The plan that computes least again of those that fit: nothing, then the attention of more and more blocks, whose
    bytes cost least to compute, then more and more whole blocks. Raises BadInput if none does.
    """
    tried: dict[int, Plan] = {}

    def at(n: int) -> Plan:
        if n not in tried:
            whole = max(0, n - layers)
            some = min(n, layers) - whole
            tried[n] = of(["block"] * whole + ["attention"] * some + [""] * (layers - whole - some))
        return tried[n]

    fits = lambda n: at(n).peak <= budget_gib * GIB  # noqa: E731
    least = bisect_left(range(2 * layers), True, key=fits)
    if not fits(least):
        raise BadInput(
            f"--memory-budget is {budget_gib:g} GiB, and a micro-batch needs {number(at(least).peak / GIB)} with "
            "everything computed again; try a smaller --batch-size or --max-length, and what holds less: --int4, or "
            "with --full --optimizer adamw8bit and --offload-optimizer"
        )
    return at(least)


@contextmanager
def _a_chunk_of_each_weight() -> Iterator[None]:
    """The INT4 reference goes through a weight in chunks that need the same memory: one says as much as all."""
    plain = int4_reference.chunks
    int4_reference.chunks = lambda N, K: itertools.islice(plain(N, K), 1)
    try:
        yield
    finally:
        int4_reference.chunks = plain


@torch.no_grad()
def _imagined(config: Config, scheme: Scheme | None, dtype: torch.dtype) -> Mistral:
    """The model as fake tensors: made on the meta device, where INT4 is laid out for the reference, and moved."""
    model = without_weights(config)
    model.scheme = scheme
    weights.imagine(model, torch.device("meta"), dtype, scheme)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(weight, device="cpu")))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _attention_flops(*args) -> int:
    """Of SDPA's two products over (B, H, T, Hd), or backward's five; half of them where it is causal. torch counts
    none on the CPU."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    backward = len(tensors) > 3
    q, k = tensors[backward : backward + 2]
    causal = args[7 if backward else 4] if len(args) > 4 else False
    return (5 if backward else 2) * 2 * q.numel() * k.shape[2] // (2 if causal else 1)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Live(TorchDispatchMode):
    """Follows the storages that are made while it is on: how many bytes lived at most, and what they were for.

    part: the name of what is made from now on. gradients: storages that count as those, whenever they were made. flops:
    of the matrix products since somebody set it to 0.
    """

    def __init__(self):
        super().__init__()
        self.part, self.gradients = "weights", set()
        self.held: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.bytes, self.peak, self.parts, self.flops = 0, 0, Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        kind = function._overloadpacket
        if kind in ATTENTION:
            self.flops += _attention_flops(*args)
        elif kind in FLOPS:
            self.flops += FLOPS[kind](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        # the reference keeps the address from being used again, so a key is one storage
        key = _key(tensor)
        if key in self.held:
            return
        storage = tensor.untyped_storage()
        self.held[key] = StorageWeakRef(storage), storage.nbytes(), self.part
        self.bytes += storage.nbytes()
        if self.bytes <= self.peak:
            return  # what has gone meanwhile is still in it: there is no need to look
        self.held = {key: known for key, known in self.held.items() if not known[0].expired()}
        self.bytes = sum(size for _, size, _ in self.held.values())
        if self.bytes > self.peak:
            self.peak, self.parts = self.bytes, Counter()
            for key, (_, size, part) in self.held.items():
                self.parts["gradients" if key in self.gradients else part] += size
