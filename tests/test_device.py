"""Picking a device; Gaudi's calls against stubs with the bridge's names."""

import os
import subprocess
import sys
import types

import pytest
import torch

from minichat import device
from minichat.errors import BadInput

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
    for name in ("", ".torch", ".torch.core"):
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
    for name in ("cuda", "cuda:1", "hpu"):
        assert device.pick(name) == device.pick(torch.device(name)) == torch.device(name)
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


def test_hpu_calls_are_the_bridges(bridge, monkeypatch):
    assert device.pick("hpu") == HPU
    for where in (CPU, CUDA, HPU):
        device.mark_step(where)
    assert bridge == ["mark_step"]
    assert device.peak_memory_gib(HPU) == 3
    assert device.default_dtype(HPU) == torch.bfloat16


@pytest.mark.parametrize(
    "where, sizes",
    [(CPU, range(1, 4097)), (CUDA, range(64, 4097, 64)), (HPU, [128, 256, 512, 1024, 2048, 4096])],
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
