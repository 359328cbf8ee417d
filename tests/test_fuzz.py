"""A few hundred cases of bench/fuzz.py: what is broken is refused in one line, whatever is broken about it."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "bench" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_what_cannot_be_read_is_refused_in_one_line(seed):
    pytest.importorskip("pyarrow")
    command = [sys.executable, FUZZ, "--cases", "240", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 14 and "FAILED" not in done.stdout
