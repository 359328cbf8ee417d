"""Picking a device; Gaudi's calls against stubs with the bridge's names."""

import sys
import types

import pytest
import torch

from minichat import device
from minichat.errors import BadInput


@pytest.fixture
def bridge(monkeypatch):
    """Stub habana_frameworks modules and torch.hpu; the list of calls that reach them."""
    calls = []
    hpu = types.SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: calls.append("synchronize"),
        max_memory_allocated=lambda: 3 * device.GIB,
    )
    monkeypatch.setattr(torch, "hpu", hpu, raising=False)
    for name in ("", ".torch", ".torch.core", ".torch.distributed", ".torch.distributed.hccl"):
        module = types.ModuleType("habana_frameworks" + name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, "habana_frameworks" + name, module)
    sys.modules["habana_frameworks.torch.core"].mark_step = lambda: calls.append("mark_step")
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    return calls


def test_auto_is_the_cpu_where_nothing_else_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    for name in (None, "auto", "cpu"):
        assert device.pick(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu:0", ""])
def test_an_unknown_device_is_bad_input(name):
    with pytest.raises(BadInput, match="device"):
        device.pick(name)


def test_missing_devices_say_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "habana_frameworks", None)
    for name in ("cuda", "cuda:1", "hpu"):
        with pytest.raises(BadInput, match="--device cpu"):
            device.pick(name)


def test_hpu_calls_are_the_bridges(bridge, monkeypatch):
    assert device._bridge(required=True)
    import os

    assert os.environ["PT_HPU_LAZY_MODE"] == "1"
    hpu = types.SimpleNamespace(type="hpu")  # torch on the CPU knows no such device
    device.mark_step(hpu)
    device.synchronize(hpu)
    assert bridge == ["mark_step", "synchronize"]
    assert device.peak_memory_gib(hpu) == 3
    assert device.collective_backend(hpu) == "hccl"
    assert device.default_dtype(hpu) == torch.bfloat16


def test_buckets_bound_the_number_of_shapes():
    hpu, cpu = types.SimpleNamespace(type="hpu"), torch.device("cpu")
    sizes = {device.bucket(n, hpu) for n in range(1, 4097)}
    assert sizes == {128, 256, 512, 1024, 2048, 4096}
    assert all(device.bucket(n, hpu) >= n for n in range(1, 5000))
    assert device.bucket(77, cpu) == 77


def test_peak_memory_sees_what_was_held():
    before = device.peak_memory_gib(torch.device("cpu"))
    held = torch.ones(int((before + 0.2) * device.GIB) // 4)
    assert device.peak_memory_gib(torch.device("cpu")) > before + 0.1
    del held
