"""cpu | cuda | hpu behind a few functions: everything that differs between devices and is not a kernel.

Nothing is probed when this module is imported; Gaudi's bridge is imported only when an HPU is asked for.
"""

import ctypes
import functools
import itertools
import math
import mmap
import os
import re
import resource
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F

from minichat.console import say
from minichat.errors import BadInput, brief

GIB = 1 << 30


def pick(name: str | torch.device | None = None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "hpu"); None or "auto" takes the best one that is there.

    Raises BadInput if the device is unknown or not there.
    """
    name = "auto" if name is None else str(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", _local(torch.cuda.current_device()))
        # a node of the Gaudi driver; asking the bridge itself would import it on every other machine
        if os.path.exists("/dev/accel/accel0") and _bridge(required=False):
            return torch.device("hpu")
        return torch.device("cpu")
    match = re.fullmatch(r"(cpu|cuda|hpu)(?::([0-9]{1,4}))?", name)
    if not match or (match[1] == "cpu" and int(match[2] or 0)):
        raise BadInput(f"device {name!r} is unknown; choose --device from auto, cpu, cuda, cuda:N, hpu")
    kind, index = match.groups()
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise BadInput(f"device {name!r} is not there: torch {torch.__version__} sees no GPU; try --device cpu")
        if int(index or 0) >= torch.cuda.device_count():
            raise BadInput(f"device {name!r} is not there: {torch.cuda.device_count()} GPU(s), numbered from 0")
        if index is not None:
            return torch.device("cuda", int(index))
        mine = _local(torch.cuda.current_device())
        if mine >= torch.cuda.device_count():
            if torch.cuda.device_count() > 1:
                raise BadInput(f"process {mine} of this machine has no GPU of its own: there are "
                               f"{torch.cuda.device_count()}; start no more processes than that")  # fmt: skip
            mine = 0  # a launcher that shows each process its own
        return torch.device("cuda", mine)
    if kind == "hpu":
        if int(index or 0):
            raise BadInput(f"device {name!r}: a process has one HPU, hpu; $HABANA_VISIBLE_MODULES says which")
        _bridge(required=True)
    return torch.device(name)


def _local(alone: int | None) -> int | None:
    """Which of this machine's cards is for this process, of those that torchrun starts; by itself: `alone`."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return int(os.environ.get("LOCAL_RANK") or 0) if several else alone


def distributed_backend(device: torch.device) -> str:
    """The backend of torch.distributed for tensors there."""
    return {"cuda": "nccl", "hpu": "hccl"}.get(device.type, "gloo")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it; float32 on the CPU, where bf16 is slower and less exact."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def quantises(device: torch.device) -> torch.device:
    """Where weights for this device are quantised: there if it is quick at it, else on the host."""
    return device if device.type == "cuda" else torch.device("cpu")


def holds_values(device: torch.device) -> bool:
    """Whether tensors there have values: not on an emulated device of shapes alone (lazy.py)."""
    emulated = sys.modules.get("minichat.lazy")
    return device.type != "meta" and not (device.type == "hpu" and emulated and emulated.shapes_alone())


def mark_step(device: torch.device) -> None:
    """End a lazy graph: after backward, after the optimiser's step, once per decoded token. Nothing elsewhere."""
    if device.type == "hpu":
        sys.modules["habana_frameworks.torch.core"].mark_step()


def graph(function: Callable, device: torch.device, generators: Sequence[torch.Generator] = ()) -> Callable:
    """`function`, recorded once and then replayed as a graph of the device: the host starts it by one call.

    It takes tensors of the device and gives a tensor, several, or None. Where it is to run on every device:

    - Inputs are copied into the graph's own, and their shapes and dtypes say which graph is meant. A new kind of input
      is run as it is the first time, and recorded then or at the second.
    - Whatever else it reads and writes has to stay where it is: what changes from call to call changes in place.
    - Its Python runs while it is recorded and not again: it neither reads values nor keeps count on the host.
    - What it gave may be overwritten by the next call: clone what is to outlive that.

    generators: those that it draws from, which then go on as if it had been run. On the CPU it is the function itself.
    """
    if device.type == "cuda":
        return _CudaGraphs(function, device, generators)
    if device.type == "hpu":
        wrap = getattr(sys.modules["habana_frameworks.torch.hpu"], "wrap_in_hpu_graph", None)
        if wrap is not None:  # in lazy mode alone
            module = torch.nn.Module()
            module.forward = function
            return wrap(module)
    return function


def keeps_graphs(device: torch.device) -> bool:
    """Whether graph() takes long enough there to keep what it has recorded; an HPU's bridge keeps it itself."""
    return device.type == "cuda"


def compiler(device: torch.device, backend: str = "inductor") -> Callable[[Callable], Callable]:
    """What compiles a function of a module and tensors (…, T, D) there: once for every T.

    It is compiled again where tensors come with another dtype, with a gradient or without, or where what it reads of
    the module differs (graphs_compiled counts). Raises BadInput where torch has no compiler that works.
    """
    if device.type == "hpu":
        raise BadInput("--compile is for cpu and cuda: on an HPU the bridge compiles what it collects; leave it out")
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no Python.h, no Triton, …: each is another kind of error
        needs = "triton" if device.type == "cuda" else "a C++ compiler (g++) and Python's headers"
        raise BadInput(
            f"--compile: torch cannot compile for {device} ({brief(error)}); it needs {needs}; or leave it out"
        ) from None

    return functools.partial(compiled_for_lengths, backend=backend)


_copies = itertools.count()


def compiled_for_lengths(function: Callable, backend: str = "inductor") -> Callable:
    """A function, of tensors and maybe a module before them, compiled once for all lengths.

    Those are T of numbers (…, T, D) and all sizes of integers. No other size is free: where all are, a T that happens
    to be D at first is taken for D ever after.

    Each call compiles a copy, of another name. torch counts the graphs of one piece of code, in the whole process, and
    stops at 8; and sizes that it has seen differ in code of one name are free from then on.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    whole = torch.compile(copy, backend=backend, fullgraph=True)  # never a part of it in silence

    def run(*args):
        for x in args:
            if isinstance(x, torch.Tensor):
                for i in (x.dim() - 2,) if x.is_floating_point() else range(x.dim()):
                    torch._dynamo.maybe_mark_dynamic(x, i)
        return whole(*args)

    return run


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


@functools.cache  # libraries keep a workspace for each
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _CudaGraphs:
    """graph() on CUDA: a graph for each kind of inputs."""

    def __init__(self, function: Callable, device: torch.device, generators: Sequence[torch.Generator]):
        self.function, self.device, self.generators = function, device, generators
        self.stream, self.pool = _side_stream(device), None
        self.kinds: dict[tuple, list] = {}  # static inputs, and once it is recorded the graph and its outputs

    def __call__(self, *inputs: torch.Tensor):
        kind = tuple((x.shape, x.dtype) for x in inputs)
        if kind not in self.kinds:
            return self._first(kind, inputs)
        static, *recorded = self.kinds[kind]
        for to, new in zip(static, inputs):
            to.copy_(new)
        graph, outputs = recorded or self._record(kind)
        graph.replay()
        return outputs

    def _first(self, kind: tuple, inputs: Sequence[torch.Tensor]):
        """Run it as it is, on the stream that will record it: libraries set themselves up, kernels are compiled."""
        static = [x.clone() for x in inputs]
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                outputs = self.function(*static)
        finally:  # whoever goes on after Ctrl-C comes after it too
            current.wait_stream(self.stream)
        self.kinds[kind] = [static]
        return outputs

    def _record(self, kind: tuple) -> list:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outputs = self.function(*self.kinds[kind][0])
        self.pool = graph.pool()  # one for all: no two of them run at a time
        self.kinds[kind] += [graph, outputs]
        return [graph, outputs]


# before torch 2.9, attention with fewer heads of keys holds all scores on the CPU
CPU_GROUPS = torch.__version__ >= (2, 9)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax(q k^T / sqrt(Hd)) v of (B, H, T, Hd) queries and (B, KvH, S, Hd) keys and values: (B, H, T, Hd).

    mask (B or 1, 1, T, S): bool, or what is added to the scores; None is causal, T == S, without a window.
    """
    fused = sys.modules.get("habana_frameworks.torch.hpex.kernels") if q.device.type == "hpu" else None
    if fused is None:
        grouped = q.shape[1] != k.shape[1]
        # on CUDA, kernels that take a mask take no groups: together they are computed without one
        apart = {"cpu": not CPU_GROUPS, "cuda": mask is not None}.get(q.device.type, False)
        if grouped and apart:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    # torch's own would hold all scores for backward there; with recompute, as here, nothing of that size is kept
    return fused.FusedSDPA.apply(q, k, v, mask, 0.0, mask is None, None, "None", True)


def one_kernel(function: Callable, device: torch.device, trial: Callable[[Callable], None]) -> Callable | None:
    """`function`, attention by torch's flex_attention, compiled (as compiled_for_lengths takes it).

    None where that is no kernel with a backward pass: off CUDA, on cards before Ampere, and where trial(compiled) fails
    (no Triton, no C compiler, another torch, too little shared memory), which it says on stderr.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    compiled = compiled_for_lengths(function)
    try:
        trial(compiled)
    except Exception as error:  # each is another kind of error
        say(f"warning: packed rows go document by document, which is slower: {brief(error)}")
        return None
    return compiled


def generator(device: torch.device, seed: int | None = None) -> torch.Generator:
    """A source of random numbers for tensors there; without a seed another one every time."""
    # Gaudi's bridge has none of its own: it draws the seeds of its kernels from one of the host's
    made = torch.Generator("cpu" if device.type == "hpu" else device)
    set_seed(made, seed)
    return made


def set_seed(generator: torch.Generator, seed: int | None) -> None:
    """Begin again with a generator: from `seed`, or without one from another number every time."""
    generator.seed() if seed is None else generator.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random generators that training draws from: the host's, and the device's own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(device: torch.device, states: dict[str, torch.Tensor]) -> None:
    """Continue from what random_state() gave."""
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held at any time so far, GiB: the device's allocator, or on the CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if device.type == "hpu":
        return torch.hpu.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # bytes on macOS, KiB on Linux


def release_host_memory() -> None:
    """Give what was freed back to the system, where the C library is glibc.

    It keeps freed pieces under 32 MB for itself, and where they lie between others it never uses them again: a 7B
    quantised as it is read would hold 1.2 GB of them.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_host_memory() -> None:
    """Let glibc keep what training on the CPU frees: the next layer asks for as much again.

    Left alone it returns most of it at once, and the system clears every page before it hands it out anew: about a
    seventh of a small model's step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: bytes kept at the heap's end
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest: more than this is returned when freed


def zeros(count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """`count` tensors of zeros; on the CPU in one piece, of large pages if the system can: reading them takes a third
    less time."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(count)]
    size = count * math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return [*torch.frombuffer(memory, dtype=dtype, count=size).view(count, *shape)]


def padding(device: torch.device) -> Callable[[int], int] | None:
    """How a batch for training is padded: lengths to buckets where shapes have to be few; None: not at all."""
    return (lambda length: bucket(length, device)) if device.type == "hpu" else None


def bucket(length: int, device: torch.device) -> int:
    """The padded length for `length` tokens: on an HPU, where a new shape is a new graph, a power of two."""
    if device.type != "hpu":
        return length
    size = 128
    while size < length:
        size *= 2
    return size


def prompt_chunk(device: torch.device) -> int:
    """Prompt tokens at a time: bounds the memory of a long one. CUDA writes INT4 weights out once for each."""
    return 4096 if device.type == "cuda" else 512


def rows(count: int, device: torch.device) -> int:
    """How many rows a batch of `count` prompts gets: powers of two where a new shape is a new graph to compile."""
    return 1 << (count - 1).bit_length() if device.type == "hpu" else count


def cache_slots(columns: int, rows: int, device: torch.device) -> int:
    """The slots of a cache for so many columns of a batch.

    On an HPU, where each size is compiled anew, 4,096 in all rows together at the least: to read them costs a 7B in
    bf16 four per cent of reading its weights. On CUDA whole pieces of 1,024 in all rows, 64 at the least, which a
    longer answer may fit into, and with it the graph that an earlier one left.
    """
    if device.type == "cuda":
        piece = max(64, 1024 // rows)
        return -(-columns // piece) * piece
    return bucket(max(columns, 4096 // rows), device) if device.type == "hpu" else columns


def reach(filled: int, columns: int, slots: int, device: torch.device) -> int:
    """How many of a cache's slots attention reads for `columns` queries when `filled` are written.

    All where shapes have to stay: on an HPU, and on CUDA for a single column, which a graph is recorded of.
    """
    stays = device.type == "hpu" or (device.type == "cuda" and columns == 1)
    return slots if stays else min(slots, bucket(filled, device))


def tokens_between_syncs(device: torch.device) -> int:
    """How many tokens to decode before the host reads them, and whether all rows are done."""
    return 16 if device.type == "hpu" else 1


def reads_behind(device: torch.device) -> int:
    """How many readings the host is behind: on CUDA it takes one while the device is at the next."""
    return 1 if device.type == "cuda" else 0


def fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Have what `tensor` holds now brought to the host; what it gives waits for that, and for nothing after it."""
    if tensor.device.type != "cuda":
        return tensor.cpu  # it waits for all there is, so not before it is called
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        there.synchronize()
        return host

    return wait


def _bridge(required: bool) -> bool:
    """Import Gaudi's PyTorch bridge; False, or BadInput if required, when no HPU is there."""
    try:
        import habana_frameworks.torch.core
        import habana_frameworks.torch.hpu

        if int(os.environ.get("WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
            # takes mpirun's environment too, and says which card this process has: before that is used
            import habana_frameworks.torch.distributed.hccl
        with suppress(ImportError):  # sdpa() does without
            import habana_frameworks.torch.hpex.kernels  # noqa: F401
        there = torch.hpu.is_available()
        why = "torch.hpu.is_available() is False"
    except ImportError as error:
        there, why = False, f"{error}"
    if required and not there:
        raise BadInput(f"device 'hpu' is not there: {why}; run in Gaudi's own container, or try --device cpu")
    lazy = there and hasattr(sys.modules["habana_frameworks.torch.hpu"], "wrap_in_hpu_graph")
    if there and not lazy and "PT_HPU_LAZY_MODE" not in os.environ:
        _say_eager()
    return there


@functools.cache  # once
def _say_eager() -> None:
    say("the bridge is in eager mode, without HPU graphs: import minichat before torch, or set PT_HPU_LAZY_MODE=1")
