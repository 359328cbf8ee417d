"""Checkpoints: all that the next step depends on, and the model as far as it is; each there whole, or not at all.

RUN/checkpoints/step-N/ holds adapter/ or model/, so that it is a model like the run itself; state.safetensors: the
trained weights in float32, the optimiser's moments, the random generators; state.json: the step, and what the run is.
The schedule and the order of the data follow from the step.
"""

import math
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minichat import device, distributed, files
from minichat.console import show
from minichat.errors import BadInput
from minichat.metrics import Metrics
from minichat.optim import AdamW

FOLDER, STATE, TENSORS = "checkpoints", "state.json", "state.safetensors"


class Stopped(Exception):
    """The run was asked to stop, by signal `number`, and has saved a checkpoint at `step`."""

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.number, self.step = number, step


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    run: what decides the run's numbers, as JSON; a run resumes only with the same. save_model: writes the model into a
    folder. every: steps between two of them, 0 for none but where the run is stopped. keep: how many of the last stay;
    the best one by evaluation stays beside them.
    """

    folder: Path  # of the run
    run: dict[str, Any]
    save_model: Callable[[Path], None]
    every: int = 0
    keep: int = 2
    asked: int | None = None  # the signal that asks the run to stop, as all processes know it
    caught: int = 0  # the signal that this one has got

    def due(self, step: int, record: dict) -> bool:
        """Whether to save now. record: what the step has logged, eval_loss among it where it was evaluated.

        Of several processes the first one decides, and any may have been asked to stop.
        """
        self.asked = distributed.host_max(self.caught) or None
        first = distributed.rank() == 0 and self.every and (step % self.every == 0 or self._is_best(record))
        return bool(distributed.host_max(bool(self.asked or first)))

    def _is_best(self, record: dict) -> bool:
        loss = record.get("eval_loss", math.nan)
        if not math.isfinite(loss):
            return False
        known = [known["eval_loss"] for _, known in read(self.folder, whole=False)]
        return all(loss < other for other in known if other is not None)

    def save(self, step: int, model: nn.Module, optimizer: AdamW, metrics: Metrics, record: dict) -> None:
        """Write step-N and delete what is not kept. Raises BadInput, and leaves all as it was, if it fails.

        Of several processes the first one writes; all have to call it, and it is there when it returns.
        """
        random = distributed.all_gather(device.random_state(model.device))
        target = self.folder / FOLDER / f"step-{step}"
        with distributed.main_process_first():
            if distributed.rank() == 0 and not target.exists():
                random = {f"{_random(rank)}{key}": value for rank, of in enumerate(random) for key, value in of.items()}
                self._write(target, {**optimizer.state(), **random}, step, metrics, record)

    def _write(self, target: Path, tensors: dict[str, Tensor], step: int, metrics: Metrics, record: dict) -> None:
        with files.appearing(target) as new:
            self.save_model(new)  # which looks whether weights are finite: the step's loss is of those before it
            files.write_tensors({key: value.cpu() for key, value in tensors.items()}, new / TENSORS, finite=True)
            score = record.get("eval_loss", math.nan)
            known = {"step": step, "tokens": record["tokens"], "eval_loss": score if math.isfinite(score) else None}
            files.write_json(new / STATE, {**known, "metrics": metrics.position(), "run": self.run})
        for path in self._superseded():
            with suppress(OSError):  # one too many does no harm
                gone = path.rename(path.with_name(f"{files.PART}{path.name}"))  # half of one would be in the way
                shutil.rmtree(gone)

    def resume(self, model: nn.Module, optimizer: AdamW, metrics: Metrics) -> tuple[int, int]:
        """Continue from the last checkpoint: the steps and tokens done, 0 and 0 without one."""
        if not (found := read(self.folder)):
            metrics.rewind({"bytes": 0, "seconds": 0}, 0)
            return 0, 0
        path, known = found[-1]
        try:
            tensors = files.read_tensors(path / TENSORS)
            optimizer.load_state(tensors)
            own = _random(distributed.rank())
            random = {key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)}
            device.set_random_state(model.device, random)
            metrics.rewind(known["metrics"], known["step"])
        except (BadInput, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadInput(
                f"{path} does not fit this run ({error}); delete it, and --resume goes on before it"
            ) from None
        return known["step"], known["tokens"]

    def _superseded(self) -> list[Path]:
        found = read(self.folder, whole=False)
        scored = [each for each in found if each[1]["eval_loss"] is not None]
        best = [min(scored, key=lambda each: each[1]["eval_loss"])] if scored else []  # the first of equals
        kept = [path for path, _ in found[-self.keep :] + best]
        return [path for path, _ in found if path not in kept]

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask the run to save and stop after its step; the second one stops it at once."""
        if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
            yield
            return
        old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, _frame) -> None:
            self.caught = number
            restore()
            show("\nminichat: stopping after this step, and saving; once more stops at once")

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        for number, handler in old.items():
            if handler is not signal.SIG_IGN:  # of a background job: its shell's Ctrl-C is not meant for it
                signal.signal(number, ask)
        try:
            yield
        finally:
            restore()


def _random(rank: int) -> str:
    """How the names of a process's random generators begin."""
    return f"random{rank or ''}."


def read(folder: Path, whole: bool = True) -> list[tuple[Path, dict]]:
    """The checkpoints of a run's folder and what is known of each, in the order of their steps. One that cannot be read
    is BadInput, or without `whole` passed over: somebody may be deleting it while the run goes on."""
    found = []
    for path in (folder / FOLDER).glob("step-*"):
        if re.fullmatch(r"step-[0-9]+", path.name):
            try:
                known = files.read_json(path / STATE)
            except BadInput:
                known = {}
            if _is_state(known):
                found.append((path, known))
            elif whole:
                raise BadInput(f"{path / STATE} is not a checkpoint's; delete {path}, and --resume goes on before it")
    return sorted(found, key=lambda each: each[1]["step"])


def _is_state(known: dict) -> bool:
    count = lambda value: type(value) is int and 0 <= value < 1 << 63  # noqa: E731
    position = known.get("metrics")
    return (
        count(known.get("step"))
        and count(known.get("tokens"))
        and isinstance(position, dict)
        and count(position.get("bytes"))
        and isinstance(position.get("seconds"), int | float)
        and isinstance(known.get("eval_loss"), float | None)
        and isinstance(known.get("run"), dict)
    )


def differences(run: dict, other: dict) -> list[str]:
    """In words, what of `run` is not as in `other`. A flag that is not given (False, None) is one that an older version
    did not have."""
    given = lambda of, name: None if of.get(name) is False else of.get(name)  # noqa: E731
    names = [*run, *(name for name in other if name not in run)]
    return [f"{n} is {run.get(n)}, was {other.get(n)}" for n in names if given(run, n) != given(other, n)]
