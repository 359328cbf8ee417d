"""minichat: SFT, DPO, LoRA, INT4 and chat for Mistral-7B, on CPU, CUDA and Gaudi.

    model, tokenizer = minichat.load("mistralai/Mistral-7B-v0.1", int4=True)
    rows = minichat.generate(model, [tokenizer.encode("Hello")], max_new_tokens=32)

Names are imported when they are first used, so that `--help` need not wait for torch.
"""

import os
import sys
from importlib import import_module

from minichat.version import __version__

if "torch" not in sys.modules:  # with which Gaudi's bridge may have come, that reads these once
    os.environ.setdefault("PT_HPU_LAZY_MODE", "1")  # off by default from release 1.21 on
    os.environ.setdefault("PT_HPU_WEIGHT_SHARING", "0")  # it would keep every weight that was ever used, for ever

_FUNCTIONS = {
    "load": ("minichat.weights", "load_model"),
    "save": ("minichat.weights", "save_model"),
    "generate": ("minichat.generation", "generate"),
}
_MODULES = ("chat", "int4", "lora", "losses")

__all__ = ["__version__", *_MODULES, *_FUNCTIONS]


def __getattr__(name: str):
    if name in _FUNCTIONS:
        module, function = _FUNCTIONS[name]
        return getattr(import_module(module), function)
    if name in _MODULES:
        return import_module(f"minichat.{name}")
    raise AttributeError(f"module 'minichat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
