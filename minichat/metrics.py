"""What a run reports: metrics.jsonl, and a progress bar or, where there is no terminal, plain lines."""

import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm


def show(line: str) -> None:
    """Print to stderr; where nobody reads it any more (`2>&1 | head`), nothing stops."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


# what a progress bar shows, and as what; metrics.jsonl has everything
WATCHED = {
    "loss": "loss",
    "accuracy": "acc",
    "margin": "margin",
    "eval_loss": "eval",
    "tokens_per_s": "tok/s",
}


class Metrics:
    """Writes one object per logged step to folder/metrics.jsonl and shows it on stderr. A context manager.

    folder None keeps no file. Every object has at least what it is given and `seconds` since the start.
    """

    def __init__(self, folder: Path | None, steps: int, what: str):
        self.file = (folder / "metrics.jsonl").open("w") if folder else None
        self.start = time.perf_counter()
        self.steps = steps
        self.what = what
        # the numbers are what one watches: a short bar, so that they fit on 80 columns
        form = "{desc} {n_fmt}/{total_fmt} |{bar:8}| {remaining} left{postfix}"
        self.bar = tqdm(total=steps, desc=what, bar_format=form, dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file:
            self.file.close()

    def write(self, record: dict) -> None:
        """Log one step: `record` holds "step" and plain numbers."""
        seconds = time.perf_counter() - self.start
        record = {**record, "seconds": round(seconds, 3)}
        if self.file:
            # JSON has no infinity (a perplexity) and no NaN
            finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        shown = {key: _short(value) for key, value in record.items() if key not in ("step", "tokens", "seconds")}
        if self.bar is not None:
            watched = {name: shown[key] for key, name in WATCHED.items() if key in shown}
            self.bar.set_postfix(watched, refresh=False)
            self.bar.update(record["step"] - self.bar.n)
        else:
            left = seconds / max(1, record["step"]) * (self.steps - record["step"])
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            line = f"{self.what} {record['step']}/{self.steps}  {text}  {left:.0f} s left"
            show(line)


def _short(value: float) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def read(folder: Path) -> list[dict]:
    """The objects of folder/metrics.jsonl, in order."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
