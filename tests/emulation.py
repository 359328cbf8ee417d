"""Programs on the emulated HPU, each in a process of its own: the device cannot be taken away again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
except ImportError:
    pytest.skip(f"torch {torch.__version__} takes no devices written in Python", allow_module_level=True)

START = """
import json, sys, torch, torch.nn.functional as F
from minichat import lazy
R = lazy.install({payload!r}, {newer})
import habana_frameworks.torch.core as core
hpu = torch.device("hpu")
def found(**more):
    syncs = {{f"{{line}}: {{what}}": count for (what, line), count in R.syncs.items()}}
    advice = {{f"{{line}}: {{what}}": count for (what, line), count in R.advice.items()}}
    print(json.dumps(dict(graphs=len(R.graphs), runs=R.runs, syncs=syncs, waits=sum(R.syncs.values()),
                          steps=R.steps, advice=advice, report=lazy.report(), peak=R.peak, **more)))
"""


def emulated(code: str, payload: str = "cpu", newer: bool = True) -> dict:
    """What `found()` printed at the end of a program on the emulated device."""
    program = START.format(payload=payload, newer=newer) + code
    environment = {**os.environ, "MINICHAT_KERNEL": "reference", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def script(*words):
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
