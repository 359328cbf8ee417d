"""Finds the INT4 kernels (one file per device in kernels/) and picks one for a device.

The package index has a package named `kernels`, so the folder of that name is no package here: its files become
submodules of this one, from `src` in a wheel and from the checkout's `kernels/` otherwise.
"""

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from minichat.console import say
from minichat.errors import BadInput, brief

_here = Path(__file__).parent
_sources = _here / "src" if (_here / "src").is_dir() else _here.parents[1] / "kernels"
__path__ = [str(_here), str(_sources)]


def for_device(device: torch.device, nf4: bool = False) -> ModuleType:
    """The kernel module for this device (kernels/int4_reference.py says what is in it), compiled if need be; of NF4,
    which has one for all devices.

    MINICHAT_KERNEL=reference in the environment takes the reference on every device. Raises BadInput if it has
    another value.
    """
    if nf4:
        return named("nf4")
    choice = os.environ.get("MINICHAT_KERNEL", "")
    if choice not in ("", "reference"):
        raise BadInput(f"MINICHAT_KERNEL is {choice!r}; set it to reference, or unset it to let the device decide")
    if device.type == "cpu" and choice == "":
        from minichat.kernels import cpu

        if cpu.available():
            return cpu
    if device.type == "cuda" and choice == "" and _has_triton(device):
        return named("int4_triton")
    return named("int4_hpu" if device.type == "hpu" and choice == "" else "int4_reference")


def named(name: str) -> ModuleType:
    """The kernel module called `name` ("int4_reference", "cpu"): the one that packed a weight must also read it."""
    return importlib.import_module(f"minichat.kernels.{name}")


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether the CUDA kernel runs there; says on stderr in one line why not, once."""
    major, minor = torch.cuda.get_device_capability(device)
    why = None
    if importlib.util.find_spec("triton") is None:
        why = "triton is not installed: pip install triton"
    elif major < 8:
        why = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and the kernel needs 8.0"
    else:
        try:
            named("int4_triton").try_out(device)
        except Exception as error:  # each is another kind of error
            why = brief(error)
    if why:
        say(f"no CUDA kernel, so INT4 and decoding run on the slow reference: {why}")
    return why is None
