"""Picking a device; Gaudi's calls against stubs with the bridge's names."""

import contextlib
import os
import subprocess
import sys
import types

import pytest
import torch
from helpers import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minichat import device
from minichat.errors import BadInput
from minichat.generation import generate

CPU, CUDA, HPU = map(torch.device, ("cpu", "cuda", "hpu"))


@pytest.fixture
def bridge(monkeypatch):
    """Stub habana_frameworks modules and torch.hpu; the list of calls that reach them."""
    calls = []
    hpu = types.SimpleNamespace(
        is_available=lambda: True,
        max_memory_allocated=lambda: 3 * device.GIB,
    )
    monkeypatch.setattr(torch, "hpu", hpu, raising=False)
    for name in ("", ".torch", ".torch.core", ".torch.hpu"):
        module = types.ModuleType("habana_frameworks" + name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, "habana_frameworks" + name, module)
    sys.modules["habana_frameworks.torch.core"].mark_step = lambda: calls.append("mark_step")
    return calls


@pytest.mark.parametrize("before, after", [(None, "1"), ("0", "0")])
def test_importing_minichat_asks_for_lazy_mode_before_torch_can_read_it(before, after):
    """Gaudi's bridge comes with torch; what the user has set stays."""
    environment = {name: value for name, value in os.environ.items() if name != "PT_HPU_LAZY_MODE"}
    environment |= {} if before is None else {"PT_HPU_LAZY_MODE": before}
    code = "import os, sys, minichat; print(os.environ['PT_HPU_LAZY_MODE'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == (f"{after} False\n", "")


def test_auto_is_the_cpu_where_nothing_else_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    for name in (None, "auto", "cpu", CPU):
        assert device.pick(name) == CPU


def test_a_named_device_is_that_device(bridge, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("cuda:1", "hpu"):
        assert device.pick(name) == device.pick(torch.device(name)) == torch.device(name)
    assert device.pick("cuda") == torch.device("cuda:0")  # with its number: one card has one name
    with pytest.raises(BadInput, match="2 GPU"):
        device.pick("cuda:2")


UNKNOWN = ["gpu", "cuda:x", "tpu:0", "", "cpu:x", "cpu:", "cpu:0:1", "cuda:", "cuda:0:1", torch.device("meta")]


@pytest.mark.parametrize("name", UNKNOWN, ids=str)
def test_an_unknown_device_is_bad_input(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="device .* is unknown"):
        device.pick(name)


def test_missing_devices_say_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "habana_frameworks", None)
    for name in ("cuda", "cuda:1", "hpu", CUDA, HPU):
        with pytest.raises(BadInput, match="--device cpu"):
            device.pick(name)


def test_each_of_several_processes_has_a_card(bridge, monkeypatch):
    """By torchrun's environment on CUDA; on an HPU the bridge's own module sees to it, and takes mpirun's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (device.pick("cuda"), device.pick("auto")) == (torch.device("cuda:0"), torch.device("cuda:0"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device.pick("cuda") == device.pick("auto") == torch.device("cuda:1")
    assert device.pick("cuda:0") == torch.device("cuda:0")
    with pytest.raises(BadInput, match="habana_frameworks.torch.distributed"):
        device.pick("hpu")
    monkeypatch.delenv("WORLD_SIZE")
    assert device.pick("hpu") == HPU
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    for name in (".torch.distributed", ".torch.distributed.hccl"):
        monkeypatch.setitem(sys.modules, "habana_frameworks" + name, types.ModuleType("stub"))
    assert device.pick("hpu") == HPU
    assert [device.distributed_backend(where) for where in (CPU, CUDA, HPU)] == ["gloo", "nccl", "hccl"]


@pytest.mark.parametrize("mode, graphs, lines", [(None, False, 1), (None, True, 0), ("0", False, 0)])
def test_a_bridge_that_is_eager_unasked_is_told_of_once(mode, graphs, lines, bridge, monkeypatch, capsys):
    device._say_eager.cache_clear()
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("PT_HPU_LAZY_MODE", mode)
    if graphs:
        sys.modules["habana_frameworks.torch.hpu"].wrap_in_hpu_graph = lambda module: module
    assert device.pick("hpu") == HPU and device.pick("hpu:0").type == "hpu"
    assert capsys.readouterr().err.count("eager mode") == lines
    with pytest.raises(BadInput, match="a process has one HPU"):
        device.pick("hpu:1")


def test_hpu_calls_are_the_bridges(bridge, monkeypatch):
    assert device.pick("hpu") == HPU
    for where in (CPU, CUDA, HPU):
        device.mark_step(where)
    assert bridge == ["mark_step"]
    assert device.peak_memory_gib(HPU) == 3
    assert device.default_dtype(HPU) == torch.bfloat16


@pytest.mark.parametrize(
    "where, sizes",
    [(CPU, range(1, 4097)), (CUDA, range(1, 4097)), (HPU, [128, 256, 512, 1024, 2048, 4096])],
    ids=["cpu", "cuda", "hpu"],
)
def test_buckets_bound_the_number_of_shapes(where, sizes):
    """Each length goes to the least size that holds it."""
    for n in range(1, 4097):
        assert device.bucket(n, where) == next(size for size in sizes if size >= n)


def test_peak_memory_sees_what_was_held():
    before = device.peak_memory_gib(CPU)
    held = torch.ones(int((before + 0.2) * device.GIB) // 4)
    assert device.peak_memory_gib(CPU) > before + 0.1
    del held


class Tape(TorchDispatchMode):
    """torch.cuda.CUDAGraph as far as the CPU can be one: while it records, nothing is written and nothing drawn; a
    replay runs the operations, not the Python, over the very same tensors."""

    def __init__(self):
        super().__init__()
        self.generators, self.nodes, self.replays = [], [], 0

    register_generator_state = property(lambda self: self.generators.append)

    def pool(self):
        return "a pool"

    def __enter__(self):
        self.states = [generator.get_state() for generator in self.generators]
        return super().__enter__()

    def __exit__(self, *error):
        for generator, state in zip(self.generators, self.states):
            generator.set_state(state)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            self.nodes.append((function, args, kwargs, []))
            return args[0]
        given = function(*args, **kwargs)
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = tree_leaves(given)
        if not {x.untyped_storage().data_ptr() for x in outputs} & inputs:  # no view
            self.nodes.append((function, args, kwargs, outputs))
        return given

    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.nodes:
            for to, new in zip(outputs, tree_leaves(function(*args, **kwargs))):
                to.copy_(new)


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's calls for graphs, on the CPU; the graphs that are made."""
    made, stream = [], types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: graph)
    return made


def test_a_graph_copies_its_inputs_and_keeps_its_state(cuda):
    """One for each shape; the first call of one is run as it is, and counts; what a call gave is overwritten."""
    total, runs = torch.zeros(()), []

    def add(x, y):
        runs.append(x.shape)
        total.add_(x.sum())
        return x * 2 + y, total * 1

    step = device.graph(add, CUDA)
    x, y = torch.ones(3), torch.zeros(3)
    for n in range(1, 6):
        found, sofar = step(x * n, y)
        assert torch.equal(found, x * 2 * n) and sofar == total == 3 * n * (n + 1) / 2
    kept = found
    step(torch.ones(2), torch.ones(2))
    assert step(x, y + 1)[0] is kept and torch.equal(kept, x * 3)
    assert runs == [(3,), (3,), (2,)] and [graph.replays for graph in cuda] == [5]
    assert device.graph(add, CPU) is add


@pytest.mark.parametrize(
    "flags",
    [dict(), dict(temperature=1.0, top_k=20, top_p=0.9, seed=3), dict(repetition_penalty=1.3, stop_ids=[96, 5, 40])],
)
def test_decoding_replays_one_graph(cuda, flags, monkeypatch):
    """Past turns of the ring, with padding that has no slot: the tokens of the same loop without a graph."""
    model, prompts = make(sliding_window=30), [[1, 2, 3, 4, 5], [6], [7, 8]]
    flags = {"stop_ids": (), **flags}
    monkeypatch.setattr(device, "bucket", lambda n, where: -(-n // 16) * 16)
    monkeypatch.setattr(device, "cache_slots", lambda columns, rows, where: min(columns, 8))
    monkeypatch.setattr("minichat.cache.reach", lambda *a: device.reach(*a[:-1], CUDA))
    monkeypatch.setattr(device, "tokens_between_syncs", lambda where: 16)
    expected = generate(model, prompts, 60, **flags)
    assert not cuda
    monkeypatch.setattr(device, "graph", lambda f, where, generators: device._CudaGraphs(f, where, generators))
    assert generate(model, prompts, 60, **flags) == expected
    assert len(cuda) == 1 and cuda[0].replays <= 58


def test_attention_of_older_torch_sees_the_same(monkeypatch):
    """Which holds all scores on the CPU where heads share keys: they are written out for it."""
    q, k, v = (torch.randn(2, heads, 9, 16, requires_grad=True) for heads in (6, 2, 2))
    mask = torch.rand(2, 1, 9, 9) > 0.3
    mask |= torch.eye(9, dtype=torch.bool)
    for each in (mask, None):
        found = []
        for groups in (True, False):
            monkeypatch.setattr(device, "CPU_GROUPS", groups)
            out = device.sdpa(q, k, v, each)
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        torch.testing.assert_close(*found)


def test_no_compiler_is_one_line():
    def fails(*_):
        raise RuntimeError("g++ is not there\nand more")

    with pytest.raises(
        BadInput, match=r"--compile: torch cannot compile for cpu \(.*g\+\+ is not there.*a C\+\+ compiler"
    ):
        device.compiler(torch.device("cpu"), fails)
    with pytest.raises(BadInput, match="--compile is for cpu and cuda"):
        device.compiler(torch.device("hpu"))


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated", "ignore:The .grad attribute of a Tensor"
)
def test_each_model_of_a_process_is_compiled_for_itself():
    """Of more widths than torch keeps graphs of one function; no width is taken for one that varies."""
    made = device.graphs_compiled()
    for n in range(1, 10):
        D = 16 * n
        model = make(hidden_size=D, num_hidden_layers=1).train()
        ids = torch.randint(0, 97, (1, D), generator=torch.Generator().manual_seed(n))  # as many as it is wide
        expected = model(ids)
        model.model.compile_blocks(device.compiler(CPU, "eager"))
        for T in (D, 5, D + 7):
            found = model(ids[:, :T])
            found.sum().backward()
        torch.testing.assert_close(model(ids), expected)
        assert device.graphs_compiled() - made == 3 * n + 1  # the blocks' parts; the compiler is tried with one
    torch._dynamo.reset()
