"""What a run reports: metrics.jsonl, and a progress bar or, where there is no terminal, plain lines."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from minichat.console import show, speaks
from minichat.errors import BadInput

# what a progress bar shows, and as what; metrics.jsonl has everything
WATCHED = {
    "loss": "loss",
    "accuracy": "acc",
    "margin": "margin",
    "eval_loss": "eval",
    "tokens_per_s": "tok/s",
}


def follower(log: str, folder: Path, flags: dict, resumed_at: int | None = None) -> Callable[[dict], None]:
    """What is called with every record that a run logs, to show it elsewhere. Raises BadInput if it cannot begin."""
    try:
        if log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # what was logged after the checkpoint is logged again
            purged = None if resumed_at is None else resumed_at + 1
            writer = SummaryWriter(folder / "tensorboard", purge_step=purged)

            def follow(record: dict) -> None:
                for key, value in record.items():
                    if key != "step":
                        writer.add_scalar(key, value, record["step"])
                writer.flush()

            return follow
        import wandb
    except ImportError as error:
        raise BadInput(f"--log {log} needs it ({error}): pip install 'minichat[{log}]'") from None
    id = json.loads((folder / "config.json").read_text())["id"]  # a run that resumes keeps it
    try:
        run = wandb.init(project="minichat", name=folder.name, id=id, resume="allow", dir=str(folder), config=flags)
    except Exception as error:
        raise BadInput(f"--log wandb: {type(error).__name__}: {error}") from None
    return lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])


class Metrics:
    """Writes one object per logged step to folder/metrics.jsonl and shows it on stderr. A context manager.

    folder None keeps no file. Every object has at least what it is given and `seconds` since the start. resume: keep
    what the file holds, until rewind() says how much of it counts. followers: called with every object as well.
    """

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        what: str,
        resume: bool = False,
        followers: Sequence[Callable[[dict], None]] = (),
    ):
        self.followers = followers
        # unbuffered: a line is in the file, or writing it has failed
        self.file = (folder / "metrics.jsonl").open("ab" if resume else "wb", buffering=0) if folder else None
        self.start = time.perf_counter()
        self.steps = steps
        self.what = what
        # the numbers are what one watches: a short bar, so that they fit on 80 columns
        form = "{desc} {n_fmt}/{total_fmt} |{bar:8}| {remaining} left{postfix}"
        watched = speaks() and sys.stderr.isatty()
        self.bar = tqdm(total=steps, desc=what, bar_format=form, dynamic_ncols=True) if watched else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind, *_) -> None:
        if self.bar is not None:
            self.bar.leave = kind is None  # what has been said of a stop would be followed by the bar before it
            self.bar.close()
        if self.file:
            self.file.close()

    def position(self) -> dict[str, float]:
        """Where the file is now, and the seconds since the start: what rewind() goes back to."""
        if self.file:
            os.fsync(self.file.fileno())
        return {"bytes": self.file.tell() if self.file else 0, "seconds": time.perf_counter() - self.start}

    def rewind(self, position: dict[str, float], step: int) -> None:
        """Go on at `step` from an earlier position(); what came after it is cut off. ValueError if less is there."""
        if self.file:
            if position["bytes"] > self.file.seek(0, os.SEEK_END):
                raise ValueError(f"{self.file.name} has lost lines")
            self.file.truncate(position["bytes"])
            self.file.seek(position["bytes"])  # or position() would tell where the old end was
        self.start = time.perf_counter() - position["seconds"]
        if self.bar is not None:
            self.bar.reset(self.steps)
            self.bar.update(step)

    def write(self, record: dict) -> None:
        """Log one step: `record` holds "step" and plain numbers."""
        seconds = time.perf_counter() - self.start
        record = {**record, "seconds": round(seconds, 3)}
        if self.file:
            # JSON has no infinity (a perplexity) and no NaN
            finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
            line = f"{json.dumps(finite)}\n".encode()
            try:
                if self.file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise BadInput(f"{self.file.name}: cannot be written: {error.strerror}") from None
        for follow in self.followers:
            follow(record)
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
