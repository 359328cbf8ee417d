"""An HPU in lazy mode, emulated on the CPU: which graphs a program makes, and where it waits for the device.

    python -m minichat.lazy train.py --device hpu ...      # any script that runs on device "hpu"

Gaudi's bridge collects operations until the program says mark_step, and compiles what it collected unless it has
compiled the same before: the same operations on tensors of the same shapes with the same Python numbers. A program
that makes another graph for every token spends its time in the compiler, and nothing says so. Here every operation
runs on a CPU tensor (or, with shapes alone, on none), so that the results are the CPU's, and is written down; the
report says which graphs there were, what differs between those that should have been one, and which lines of the
program read from the device.

It cannot show what the graph compiler makes of a graph, speed, or bf16's rounding on the device. It is global to the
process and cannot be undone.
"""

import argparse
import functools
import hashlib
import inspect
import os
import runpy
import sys
import threading
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from minichat.errors import BadInput

aten = torch.ops.aten
HOST_READS = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero")
READ = "a value goes to the host (item, float, if)"
# their outputs' shapes follow from values, which the host has to wait for
DYNAMIC = ("aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_consecutive", "aten.unique_dim",
           "aten.repeat_interleave.Tensor", "aten.bincount")  # fmt: skip
MULTINOMIAL = "aten.multinomial"  # draws on the host
WRITES_BY_INDEX = ("aten.scatter", "aten.index_put", "aten.index_copy", "aten.index_add", "aten.index_fill")
FREE = ("aten.detach", "aten.alias")  # no operation on the device
MOST_RANK = 5
OPERATIONS = Path(__file__).parent / "assets" / "hpu_ops.txt"
KNOWN: set[str] = set()  # those of the file
FALLBACK = "is not among the operations of Gaudi's bridge 1.19, and would run on the host"
GIB = 1 << 30


# ---- what is written down -------------------------------------------------------------------------------------------
@dataclass
class Graph:
    """One graph, as the bridge would hash it. nodes: (operation, arguments); lines: who asked for each."""

    name: str
    nodes: tuple
    lines: tuple[str, ...]
    first: int  # the step, counted by mark_step, that it appeared in
    ended: str  # the line that ended it
    held: dict[int, tuple] = field(default_factory=dict)  # what was still held at its end: shape, and who made it
    runs: int = 0


@dataclass
class Recorder:
    """Everything a run did. A step is what lies between two mark_step()s."""

    graphs: dict[str, Graph] = field(default_factory=dict)  # by hash, in the order of their first run
    runs: list[str] = field(default_factory=list)  # the graphs' names in the order that they ran
    steps: int = 0
    syncs: Counter = field(default_factory=Counter)  # (what, line)
    uploads: Counter = field(default_factory=Counter)  # host to device, by line
    advice: Counter = field(default_factory=Counter)  # (what, line)
    live: dict[int, tuple[int, str]] = field(default_factory=dict)  # storages: bytes, and what made them
    bytes: int = 0
    peak: int = 0
    holders: Counter = field(default_factory=Counter)  # bytes at the peak, by what made them

    def __post_init__(self):
        self._nodes, self._lines, self._numbers = [], [], {}
        self._outputs: list[tuple[weakref.ref, str]] = []
        self._id_dtype = None
        self.tape: list[tuple] | None = None  # of the HPU graph that is being recorded: what replay() takes
        self.dry = False  # nothing is computed: see rehearse()

    def reset(self) -> None:
        """Forget what was so far, but not what lives on the device."""
        live, count = self.live, self.bytes
        self.__init__()
        self.live, self.bytes, self.peak = live, count, count

    def node(self, name: str, arguments: tuple, line: str) -> None:
        self._nodes.append((name, arguments))
        self._lines.append(line)

    def number(self, tensor: "LazyTensor") -> int:
        """Which of this graph's tensors it is, in the order of their first use: the same program has the same."""
        return self._numbers.setdefault(tensor.number, len(self._numbers))

    def output(self, tensor: "LazyTensor", line: str) -> None:
        self._outputs.append((weakref.ref(tensor), line))

    def end(self, line: str) -> None:
        """The graph so far runs; what nobody holds any more is no output of it."""
        if self._nodes:
            refs = ((i, ref(), made) for i, (ref, made) in enumerate(self._outputs))
            held = {i: (tuple(tensor.shape), made) for i, tensor, made in refs if tensor is not None}
            nodes = (*self._nodes, ("outputs", tuple(held)))
            name = hashlib.sha256(repr(nodes).encode()).hexdigest()[:8]
            if name not in self.graphs:
                self.graphs[name] = Graph(name, nodes, (*self._lines, line), self.steps, line, held)
            self.graphs[name].runs += 1
            self.runs.append(name)
        self._nodes, self._lines, self._numbers, self._outputs = [], [], {}, []

    def again(self, names: Sequence[str]) -> None:
        """Graphs that ran before run once more."""
        for name in names:
            self.graphs[name].runs += 1
            self.runs.append(name)

    def rehearse(self, name: str, function: Callable) -> None:
        """Tell if Python that was recorded as the graph `name` would be another graph by now: replays do not see it."""
        outer = self._nodes, self._lines, self._numbers, self._outputs
        self._nodes, self._lines, self._numbers, self._outputs = [], [], {}, []
        self.tape, self.dry = [], True
        try:
            function()
            old, nodes = self.graphs[name], (*self._nodes, self.graphs[name].nodes[-1])
            if nodes != old.nodes:
                at, words = difference(old, Graph(name, nodes, (*self._lines, old.lines[-1]), self.steps, ""))
                self.advice[
                    f"replays of an HPU graph keep what was recorded, and that was {words}", self._lines[at]
                ] += 1
        finally:
            self.tape, self.dry = None, False
            self._nodes, self._lines, self._numbers, self._outputs = outer

    def mark(self) -> None:
        self.end(caller())
        self.steps += 1

    def sync(self, what: str) -> None:
        line = caller()
        self.syncs[what, line] += 1
        if self.tape is not None:
            raise RuntimeError(f"{line}: {what}: is not supported during HPU Graph capturing")
        self.end(f"{line} (waits)")

    def upload(self) -> str:
        """Values of the host's come to the device, beside the graph; the line that asked for them."""
        line = caller()
        self.uploads[line] += 1
        if self.tape is not None:
            self.advise("a copy from the host in an HPU graph: replays keep the values of this time")
        return line

    def advise(self, what: str) -> None:
        self.advice[what, caller()] += 1

    def allocate(self, key: int, size: int, what: str) -> None:
        self.live[key] = size, what
        self.bytes += size
        if self.bytes > self.peak:
            if self.bytes > 1.01 * self.peak or not self.holders:
                self.holders = Counter()
                for held, by in self.live.values():
                    self.holders[by] += held
            self.peak = self.bytes

    def free(self, key: int) -> None:
        size, _ = self.live.pop(key, (0, ""))
        self.bytes -= size


RECORDER = Recorder()
_PAYLOAD = ["cpu"]  # the device of what the emulated device's tensors hold: "cpu", or "meta" for shapes alone
_HIDDEN = (
    os.path.dirname(torch.__file__) + os.sep,
    __file__,
    *(os.path.join(os.path.dirname(__file__), name) for name in ("device.py", "lazy_bridge.py")),
    "<frozen",
)
_LIBRARY = ("site-packages" + os.sep, "dist-packages" + os.sep)
_known: dict[tuple, tuple[str, bool] | None] = {}


def shapes_alone() -> bool:
    """Whether the emulated device's tensors have no values."""
    return bool(_libraries) and _PAYLOAD[0] == "meta"


def caller() -> str:
    """The innermost line of the program that is running: not torch's, and not what calls the bridge for it. If that is
    a library's, with the line of the program's own that called it."""
    main = threading.main_thread()
    # backward runs in a thread of its own, for the line that called it
    frame = sys._getframe(1) if threading.current_thread() is main else sys._current_frames().get(main.ident)
    inner = None
    while frame is not None:
        key = frame.f_code, frame.f_lineno
        if key not in _known:
            file = frame.f_code.co_filename
            where = f"{_short(file)}:{frame.f_lineno} {frame.f_code.co_name}"
            _known[key] = None if file.startswith(_HIDDEN) else (where, any(part in file for part in _LIBRARY))
        if (found := _known[key]) is not None:
            where, of_a_library = found
            if not of_a_library:
                return where if inner is None else f"{inner} (from {where.split(' ')[0]})"
            inner = inner or where
        frame = frame.f_back
    return inner or "?"


def _short(file: str) -> str:
    here = os.getcwd() + os.sep
    return file.removeprefix(here) if file.startswith(here) else os.sep.join(file.split(os.sep)[-2:])


# ---- the device -----------------------------------------------------------------------------------------------------
class LazyTensor(torch.Tensor):
    """A tensor on the emulated device: shape and type of its own, values in `payload`."""

    _count = 0
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, payload: Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, payload.size(), strides=payload.stride(), storage_offset=payload.storage_offset(),
            dtype=payload.dtype, device=torch.device("hpu", 0), requires_grad=False,
        )  # fmt: skip
        tensor.payload = payload
        cls._count += 1
        tensor.number = cls._count
        if payload.dim() > MOST_RANK:
            RECORDER.advise(f"rank {payload.dim()}: the device has at most {MOST_RANK}")
        return tensor

    def __repr__(self, **_) -> str:
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class _Storage:
    """What tensors of one storage share: while it lives, its bytes count as the device's."""

    def __init__(self, key: int, size: int, what: str):
        self.key = key
        RECORDER.allocate(key, size, what)

    def __del__(self):
        if RECORDER is not None:  # as the interpreter ends
            RECORDER.free(self.key)


_storages: weakref.WeakValueDictionary[int, _Storage] = weakref.WeakValueDictionary()


def _made(payload: Tensor, line: str) -> LazyTensor:
    """A tensor of the device for what an operation gave."""
    # in inference mode a view of a tensor that was made outside of it is none of an inference tensor's
    with torch.inference_mode(torch.is_inference_mode_enabled() and payload.is_inference()):
        tensor = LazyTensor(payload)
    storage = payload.untyped_storage()
    key = storage._cdata
    shared = _storages.get(key)
    if shared is None:
        shape = "x".join(map(str, payload.shape)) or "scalar"
        what = f"{shape} {str(payload.dtype).removeprefix('torch.')} {line}"
        shared = _storages[key] = _Storage(key, storage.nbytes(), what)
    tensor.storage = shared
    RECORDER.output(tensor, line)
    return tensor


def _payload(x):
    return x.payload if isinstance(x, LazyTensor) else x


def _on_hpu(device) -> bool:
    return device is not None and torch.device(device).type == "hpu"


def _described(x):
    """An argument as the graph's hash sees it: tensors by what they are, Python numbers by their value."""
    if isinstance(x, LazyTensor):
        strides = tuple(stride for stride, size in zip(x.stride(), x.shape) if size > 1)  # the others say nothing
        return RECORDER.number(x), tuple(x.shape), strides, x.dtype
    if isinstance(x, Tensor):
        return "host", tuple(x.shape), x.dtype
    if isinstance(x, (list, tuple)):
        return tuple(_described(one) for one in x)
    if isinstance(x, torch.Generator):
        return "generator"
    return x


def _read(tensor: "LazyTensor") -> Tensor:
    """What the host gets of a tensor; zeros where there are shapes alone."""
    value = tensor.payload
    return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value


def _uploaded(tensor: Tensor) -> LazyTensor:
    """A tensor of the host's on the device, in a copy of its own."""
    line = RECORDER.upload()
    if _PAYLOAD[0] == "meta":
        payload = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    else:
        payload = tensor.detach().clone(memory_format=torch.preserve_format)
    return _made(payload, line)


def _has_kernel(function, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key)


@functools.cache
def _is_composite(function) -> bool:
    return _has_kernel(function, "CompositeImplicitAutograd") and not _has_kernel(function, "CPU")


@functools.cache
def _is_known(function) -> bool:
    """Whether the bridge has the operation, or torch makes it of others."""
    namespace, name = function.name().split(".")[0].split("::")
    known = name in KNOWN or name.rstrip("_") in KNOWN
    return namespace != "aten" or known or _has_kernel(function, "CompositeExplicitAutograd")


def run(function, args: tuple, kwargs: dict):
    """One operation: written down, and done on the payloads."""
    if _is_composite(function):  # of tensors made in inference mode those come whole, and else in pieces
        return function.decompose(*args, **kwargs)
    name = str(function).removesuffix(".default")
    flat, spec = tree_flatten((args, kwargs))
    if name.startswith(HOST_READS):
        RECORDER.sync(f"{name}: {READ}")
        return function(*(_read(x) if isinstance(x, LazyTensor) else x for x in args), **kwargs)
    if name == "aten._to_copy":
        source, device = args[0], kwargs.get("device")
        there = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
        if isinstance(source, LazyTensor) and device is not None and not _on_hpu(device):
            RECORDER.sync("a copy to the host")
            return aten._to_copy(_read(source), **there)
        if not isinstance(source, LazyTensor):
            return _uploaded(aten._to_copy(source, **there))
    elif name in ("aten.copy_", "aten._copy_from"):
        to, source = (args[0], args[1]) if name == "aten.copy_" else (args[1], args[0])
        if not isinstance(to, LazyTensor):
            RECORDER.sync("a copy to the host")
            return to.copy_(_read(source))
        if not isinstance(source, LazyTensor):  # goes beside the graph
            RECORDER.upload()
            to.payload.copy_(source if not to.payload.is_meta else source.to("meta"))
            return to
        function, args, kwargs = aten.copy_.default, (to, source), {}
        name, (flat, spec) = "aten.copy_", tree_flatten((args, kwargs))
    elif name == "aten.is_pinned":
        return False
    elif name == "aten.record_stream":
        return None
    stray = next((x for x in flat if isinstance(x, Tensor) and not isinstance(x, LazyTensor) and x.dim()), None)
    if stray is not None:
        raise RuntimeError(f"{name}: all tensors have to be on the device; one of {tuple(stray.shape)} is on the host")
    line = caller()
    _check(name, args)
    if not _is_known(function):
        RECORDER.advise(f"{name} {FALLBACK}")
    kwargs = {key: _PAYLOAD[0] if key == "device" else value for key, value in kwargs.items()}
    if name not in FREE:
        RECORDER.node(name, (_described(args), _described(sorted(kwargs.items(), key=lambda pair: pair[0]))), line)
    flat, spec = tree_flatten((args, kwargs))
    plain = [_payload(x) for x in flat]
    shapes_only = RECORDER.dry or _PAYLOAD[0] == "meta"
    if shapes_only:  # host numbers in tensors' place go along as shapes
        plain = [_shape_of(x) if isinstance(x, Tensor) and not x.is_meta else x for x in plain]
    args_, kwargs_ = tree_unflatten(plain, spec)
    if shapes_only:
        kwargs_.pop("generator", None)
        kwargs_ |= {"device": "meta"} if "device" in kwargs_ else {}
    found = function(*args_, **kwargs_)
    if RECORDER.tape is not None:
        RECORDER.tape.append((function, args_, kwargs_, found))
    same = {id(p): x for p, x in zip(plain, flat) if isinstance(x, LazyTensor)}  # in place, or out=

    def wrapped(x):
        if not isinstance(x, Tensor):
            return x
        return same[id(x)] if id(x) in same else _made(x, line)

    outputs, out_spec = tree_flatten(found)
    return tree_unflatten([wrapped(x) for x in outputs], out_spec)


def _shape_of(tensor: Tensor) -> Tensor:
    with torch.inference_mode(tensor.is_inference()):  # what is made of it has to be of its kind
        return tensor.to("meta")


def _factory(function, *args, **kwargs):
    return run(function, args, kwargs)


def _check(name: str, args: tuple) -> None:
    """Tell what the device does badly, or not at all."""
    if name.startswith(DYNAMIC):
        RECORDER.sync(f"{name}: its shape follows from values")
    elif name.startswith(MULTINOMIAL):
        RECORDER.sync(f"{name}: draws on the host")
    elif name.startswith(("aten.index.", "aten.index_put", "aten._index_put_impl")):
        if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            RECORDER.sync(f"{name}: a boolean mask, whose shape follows from values")
    elif name == "aten.gather" and args[2].dtype == torch.int64:
        RECORDER.advise("gather with an int64 index: on the device it is cast at every use; take index_select")
    elif name == "aten.index_add" and args[2].numel() <= args[0].shape[args[1]]:  # of more, the bridge adds up all
        index = _payload(args[2])  # the gradient of index_select, too
        if not index.is_meta and len(index.unique()) < index.numel():
            RECORDER.advise(
                "an index comes twice in index_add (index_select backward): bridge 1.19 keeps one of the two"
            )
    if name.startswith((*WRITES_BY_INDEX, "aten.copy_")) and "_." in name + "." and isinstance(args[0], LazyTensor):
        target = args[0].payload
        if target.untyped_storage().nbytes() > target.numel() * target.dtype.itemsize:
            RECORDER.advise(f"{name} into a view: the device copies what lies below it, and in an HPU graph it is not "
                            "supported; give it a tensor of its own")  # fmt: skip
    if name == "aten.embedding":
        dtype = args[1].dtype
        if RECORDER._id_dtype not in (None, dtype):
            RECORDER.advise(f"token ids are {dtype} here and {RECORDER._id_dtype} elsewhere: another graph")
        RECORDER._id_dtype = RECORDER._id_dtype or dtype


class _Module(types.ModuleType):
    """torch.hpu, and what the bridge's own module adds to it."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    get_device_name = staticmethod(lambda device=None: "emulated on the CPU")
    _is_in_bad_fork = staticmethod(lambda: False)
    _lazy_init = staticmethod(lambda: None)
    manual_seed_all = manual_seed = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    synchronize = staticmethod(lambda device=None: RECORDER.sync("torch.hpu.synchronize"))
    max_memory_allocated = staticmethod(lambda device=None: RECORDER.peak)
    memory_allocated = staticmethod(lambda device=None: RECORDER.bytes)
    mem_get_info = staticmethod(lambda device=None: (96 * GIB - RECORDER.bytes, 96 * GIB))

    @staticmethod
    def reset_peak_memory_stats(device=None) -> None:
        RECORDER.peak, RECORDER.holders = RECORDER.bytes, Counter()


class _GeneratorType(type):
    """torch.Generator, of which the bridge has none for its device: its kernels' seeds are drawn from the host's."""

    original = torch.Generator

    def __call__(cls, device="cpu"):
        if _on_hpu(device):
            raise RuntimeError("the bridge has no generators on hpu: torch.Generator() draws for its tensors")
        return cls.original(device)

    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, cls.original)


def replay(tape: Sequence[tuple]) -> None:
    """Run recorded operations over the tensors that they ran over before: no Python of the program's, no new tensor."""
    if _PAYLOAD[0] == "meta":
        return
    for function, args, kwargs, outputs in tape:
        inputs = {_storage(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        for old, new in zip(tree_flatten(outputs)[0], tree_flatten(function(*args, **kwargs))[0]):
            if isinstance(old, Tensor) and _storage(old) not in inputs:  # else a view, or written in place: it is there
                old.copy_(new)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


_libraries = []  # registrations that last as long as these


def install(payload: str = "cpu", newer: bool = True) -> Recorder:
    """Make "hpu" a device of this process; what will be known of its use. payload: "cpu", or "meta": shapes alone.

    Before anything else runs backward: autograd counts the devices once. newer: hpu::convert_from_uint4 with the
    argument that later releases gave it. Raises BadInput if there is a real one, or this torch cannot have one in
    Python.
    """
    if payload not in ("cpu", "meta"):
        raise BadInput(f"--emulate is {payload!r}; choose cpu, or meta: shapes alone")
    _PAYLOAD[0] = payload
    if _libraries:
        return RECORDER
    if "habana_frameworks" in sys.modules or hasattr(torch, "hpu"):
        raise BadInput("--emulate: Gaudi's bridge is loaded here; it emulates the device where there is none")
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup
    except ImportError:
        raise BadInput(f"--emulate needs a torch that takes devices written in Python, as 2.13 does; "
                       f"{torch.__version__} does not: pip install 'torch>=2.13'") from None  # fmt: skip
    module = _Module("torch.hpu")
    setup(rename="hpu", backend_module=module)
    sys.modules["torch.hpu"] = module
    everything, ops = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((everything, ops))
    everything.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return _made(torch.empty(size, dtype=dtype, device=_PAYLOAD[0], memory_format=memory_format), caller())

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return _made(torch.empty_strided(size, stride, dtype=dtype, device=_PAYLOAD[0]), caller())

    ops.impl("empty.memory_format", empty, "PrivateUse1")
    ops.impl("empty_strided", empty_strided, "PrivateUse1")
    # torch makes these by resizing an empty tensor, which one that wraps another does not follow
    for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "range", "range.step"):
        overload = getattr(getattr(aten, name.split(".")[0]), name.partition(".")[2] or "default")
        ops.impl(name, functools.partial(_factory, overload), "PrivateUse1")
    # the bridge's own, which torch would make of others: the CPU has its own too
    ops.impl("silu_backward", lambda *args: run(aten.silu_backward.default, args, {}), "PrivateUse1")
    ops.impl("_copy_from", lambda source, to, non_blocking=False: run(aten.copy_.default, (to, source), {}),
             "PrivateUse1")  # fmt: skip
    torch.Generator = _GeneratorType("Generator", (), {})
    from minichat import lazy_bridge

    lazy_bridge.install(module)
    KNOWN.update(word for line in OPERATIONS.read_text().splitlines()[1:] for word in line.split())
    own = torch.library.Library("hpu", "DEF")
    own.define("convert_from_uint4(Tensor input, Tensor scale, Tensor? zero_point, ScalarType out_dtype"
               + (", Tensor? g_idx=None" if newer else "") + ") -> Tensor")  # fmt: skip
    own.impl("convert_from_uint4", _convert_from_uint4, "CompositeExplicitAutograd")
    _libraries.append(own)
    return RECORDER


def _convert_from_uint4(codes: Tensor, scale: Tensor, zero, dtype: torch.dtype, g_idx=None) -> Tensor:
    """(K, N / 8), (K / G, N), (K / G, N / 8) or None -> (K, N), as the bridge documents it."""
    nibbles = lambda words: torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(1)  # noqa: E731
    groups = codes.shape[0] // scale.shape[0]
    zeros = 0 if zero is None else nibbles(zero).repeat_interleave(groups, 0)
    return (nibbles(codes) - zeros).to(dtype) * scale.to(dtype).repeat_interleave(groups, 0)


# ---- the report -----------------------------------------------------------------------------------------------------
def difference(a: Graph, b: Graph) -> tuple[int, str]:
    """Where graph b first differs from a: the node's number, and in words what differs."""
    pairs = list(zip(a.nodes, b.nodes))
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
    if at == len(pairs):
        return at, f"{abs(len(a.nodes) - len(b.nodes))} operations more or fewer at its end"
    (was, was_args), (now, now_args) = pairs[at]
    line = b.lines[at]
    if was != now:
        return at, f"{line}: {now} where it was {was}"
    if now == "outputs":
        more, fewer = ([g.held[i] for i in g.held if i not in other.held] for g, other in ((b, a), (a, b)))
        shape, made = (more or fewer)[0]
        also = f" (and {len(more or fewer) - 1} more)" if len(more or fewer) > 1 else ""
        is_held = "is still held" if more else "is held no longer"
        return at, f"{line}: a tensor of {shape}{also} that {made} made {is_held} at its end: let go of it each time"
    was_flat, now_flat = tree_flatten(was_args)[0], tree_flatten(now_args)[0]
    changed = [f"{x} -> {y}" for x, y in zip(was_flat, now_flat) if x != y] or ["its arguments"]
    return at, f"{line}: {now}: {', '.join(changed[:3])}{_remedy(was_args, now_args)}"


def _remedy(was: tuple, now: tuple) -> str:
    """What makes one graph of two that differ in the arguments of an operation."""
    tensors = [[x for x in tree_flatten(args, is_leaf=_is_tensor)[0] if _is_tensor(x)] for args in (was, now)]
    if [x[1] for x in tensors[0]] != [x[1] for x in tensors[1]]:
        return "; a shape is a part of the graph: pad to a few"
    if [x[2:] for x in tensors[0]] != [x[2:] for x in tensors[1]]:
        return "; a type or a layout is a part of the graph: one throughout"
    if tensors[0] != tensors[1]:
        return "; it takes another tensor than before"
    return "; a number is a part of the graph: give it as a tensor of the device"


def _is_tensor(x) -> bool:
    """Whether it is what _described() makes of a tensor of the device."""
    return isinstance(x, tuple) and len(x) == 4 and isinstance(x[3], torch.dtype) and isinstance(x[1], tuple)


def likeness(a: Graph, b: Graph) -> float:
    """The share of operations that are the same, in any order: one more at the beginning moves all others."""
    names = [Counter(name for name, _ in graph.nodes) for graph in (a, b)]
    return (names[0] & names[1]).total() / max(len(a.nodes), len(b.nodes))


def relatives(graphs: Sequence[Graph]) -> list[tuple[Graph, Graph, str]]:
    """For each graph but the first, the earlier one that it is most like, if half of it is the same; what differs."""
    found = []
    for i, graph in enumerate(graphs[1:], 1):
        ranked = []
        for other in graphs[max(0, i - 32) : i]:
            if (share := likeness(other, graph)) >= 0.5:
                ranked.append((share, *difference(other, graph), other))
        if ranked:
            most = max(share for share, *_ in ranked)
            like = [x for x in ranked if x[0] > most - 0.15]
            _, _, words, nearest = max(like, key=lambda x: x[1])  # of those about as like: the longest beginning
            found.append((nearest, graph, words))
    return found


def report(recorder: Recorder = RECORDER) -> str:
    """What a person can act on, as text."""
    graphs = list(recorder.graphs.values())
    runs = sum(graph.runs for graph in graphs)
    lines = [f"lazy mode: {len(graphs)} graphs, run {runs} times in {recorder.steps} steps; "
             f"{sum(recorder.syncs.values())} waits for the device; "
             f"{sum(recorder.uploads.values())} copies to it; "
             f"at most {recorder.peak / GIB:.2f} GiB on it"]  # fmt: skip
    if graphs and not recorder.steps:
        lines.append("no mark_step: graphs end only where the host waits; call it after backward, after the "
                     "optimiser's step, once per token")  # fmt: skip
    lines += ["", "graph     runs  operations  first step  ended by"]
    shown = graphs if len(graphs) <= 24 else graphs[:20]
    lines += [f"{g.name}  {g.runs:4}  {len(g.nodes) - 1:10,}  {g.first:10,}  {g.ended}" for g in shown]
    if len(shown) < len(graphs):
        lines.append(f"and {len(graphs) - len(shown)} more")
    if alike := relatives(graphs):
        lines += ["", "graphs that are nearly one:"]
        where: dict[str, list] = {}
        for old, new, words in alike:
            where.setdefault(": ".join(words.split(": ")[:2]), []).append((old, new, words))
        for same in where.values():
            old, new, words = same[0]
            more = f" (and {len(same) - 1} more like it)" if len(same) > 1 else ""
            lines.append(f"  {new.name} is {old.name} but for {words}{more}")
    for title, counts in (("waits for the device, by line:", recorder.syncs), ("advice:", recorder.advice)):
        if counts:
            lines += ["", title]
            lines += [f"  {count:5}  {line}: {what}" for (what, line), count in counts.most_common(20)]
    if recorder.uploads:
        lines += ["", "copies to the device, by line:"]
        lines += [f"  {count:5}  {line}" for line, count in recorder.uploads.most_common(8)]
    if recorder.holders:
        lines += ["", "what holds the device's memory at its peak:"]
        total = sum(recorder.holders.values())
        lines += [f"  {size / total:5.1%}  {size / GIB:8.3f} GiB  {what}"
                  for what, size in recorder.holders.most_common(8)]  # fmt: skip
    return "\n".join(lines)


def over_budget(max_graphs: int | None, max_syncs: int | None, recorder: Recorder = RECORDER) -> list[str]:
    """The budgets that the run has passed, a line each."""
    pairs = [(len(recorder.graphs), max_graphs, "graphs", "--max-graphs")]
    pairs += [(sum(recorder.syncs.values()), max_syncs, "waits for the device", "--max-syncs")]
    return [f"{found} {what}: more than {flag} {most}" for found, most, what, flag in pairs
            if most is not None and found > most]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minichat.lazy", description=inspect.cleandoc(__doc__),
                                     usage="%(prog)s [flags] script.py [its arguments]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--meta", action="store_true", help="shapes alone: large models in little memory and time")
    parser.add_argument("--max-graphs", type=int, metavar="N", help="exit code 1 if there are more")
    parser.add_argument("--max-syncs", type=int, metavar="N", help="exit code 1 if the host waits more often")
    parser.add_argument("script", help="a script that uses device hpu; its arguments follow")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not Path(args.script).is_file():
        print(f"error: {args.script}: no such file", file=sys.stderr)
        return 2
    from minichat import lazy  # not __main__: the script imports this one

    try:
        lazy.install("meta" if args.meta else "cpu")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(Path(args.script).parent))
    code = 1
    try:
        runpy.run_path(args.script, run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what is known by then is what one wants to see then
        traceback.print_exc()
    return lazy.finish(args.max_graphs, args.max_syncs) or code


def finish(max_graphs: int | None = None, max_syncs: int | None = None) -> int:
    """Print the report to standard error; 1 if a budget was passed."""
    print(report(), file=sys.stderr)
    passed = over_budget(max_graphs, max_syncs)
    for line in passed:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(passed))


if __name__ == "__main__":
    sys.exit(main())
