"""Lines on standard error, which tell how it goes."""

import os
import sys


def speaks() -> bool:
    """Whether this process tells how it goes: of several that torchrun or the like has started, the first."""
    return int(os.environ.get("RANK") or 0) == 0


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def say(text: str) -> None:
    show(f"minichat: {text}")


def show(line: str) -> None:
    """Print to stderr; where nobody reads it any more (`2>&1 | head`), nothing stops."""
    if not speaks():
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # nor where the terminal is gone, or a disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
