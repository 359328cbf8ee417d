"""What the benches share: where their results go, and parts of one that are processes of their own."""

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cpu() -> str:
    """The CPU's own name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """MINICHAT_COMMIT, where a copy without .git runs; else git's, with + where anything but results is changed."""
    if known := os.environ.get("MINICHAT_COMMIT"):
        return known

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(OSError):  # no git there
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed) or None


def keep(name: str, content: dict) -> None:
    """bench/results/NAME; and $OUT/NAME, from where a machine that is lent brings it back."""
    for folder in (ROOT / "bench" / "results", *map(Path, filter(None, [os.environ.get("OUT")]))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def known(name: str, content: dict) -> dict:
    """bench/results/NAME, if the commit, machine and versions of `content` made it too; else nothing."""
    if not content["commit"] or content["commit"].endswith("+"):
        return {}
    try:
        there = json.loads((ROOT / "bench" / "results" / name).read_text())
    except (OSError, ValueError):
        return {}
    return there if all(there.get(key) == content[key] for key in ("commit", "machine", "versions")) else {}


def end_with_parent() -> None:
    """Have this process killed when the one that began it ends, however that ends (on Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run_process(command: Sequence[str], seconds: float) -> dict:
    """What a command has printed last, a JSON object; "failed", why it failed; "said", what minichat told in it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes, preexec_fn=end_with_parent) as child:
        try:
            out, err = child.communicate(timeout=max(0, seconds))
            failed = (err.strip() or f"exit code {child.returncode}")[-1500:] if child.returncode else None
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # what it started holds memory of the card too
            out, err = child.communicate()
            failed = f"took more than {seconds:.0f} s"
        except BaseException:  # Ctrl-C does not reach it
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return last_printed(out) | ({"failed": failed} if failed else {}) | said(err)


def last_printed(out: str) -> dict:
    """The last JSON object that a part has printed: what it had when it ended, or was ended."""
    printed = [line for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return json.loads(printed[-1]) if printed else {}


def said(err: str) -> dict:
    """What minichat has told in a part: that it fell back on something slower, say."""
    lines = [line for line in err.splitlines() if line.startswith("minichat:")]
    return {"said": lines} if lines else {}
