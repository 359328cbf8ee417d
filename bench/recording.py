"""What the benches share: where their results go, and what a part of one has printed."""

import contextlib
import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cpu() -> str:
    """The CPU's own name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """MINICHAT_COMMIT, where a copy without .git runs; else git's."""
    if known := os.environ.get("MINICHAT_COMMIT"):
        return known
    with contextlib.suppress(OSError):  # no git there
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


def keep(name: str, content: dict) -> None:
    """bench/results/NAME; and $OUT/NAME, from where a machine that is lent brings it back."""
    for folder in (ROOT / "bench" / "results", *map(Path, filter(None, [os.environ.get("OUT")]))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def last_printed(out: str) -> dict:
    """The last JSON object that a part has printed: what it had when it ended, or was ended."""
    printed = [line for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return json.loads(printed[-1]) if printed else {}


def said(err: str) -> dict:
    """What minichat has told in a part: that it fell back on something slower, say."""
    lines = [line for line in err.splitlines() if line.startswith("minichat:")]
    return {"said": lines} if lines else {}
