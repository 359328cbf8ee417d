"""Checkpoints: what resumes is the straight run, what is saved is whole, and what is asked to stop has saved."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import make

from minichat import checkpoint, data, device, files, lora, training
from minichat.checkpoint import Checkpoints
from minichat.errors import BadInput
from minichat.examples import Example, Pair
from minichat.metrics import Metrics
from minichat.training import Settings

ROOT = Path(__file__).parent.parent


def examples(n=11):
    rng = random.Random(0)
    ids = [[rng.randrange(97) for _ in range(rng.randrange(4, 20))] for _ in range(n)]
    return [Example(row, [0] + [1] * (len(row) - 1), f"f:{i}") for i, row in enumerate(ids)]


def pairs(n=11):
    rng = random.Random(0)
    some = lambda: [rng.randrange(97) for _ in range(rng.randrange(2, 8))]  # noqa: E731
    return [Pair(some(), some(), some(), f"f:{i}") for i in range(n)]


def adapted(dtype=torch.float32):
    return lora.attach(make().to(dtype), r=4, alpha=8, dropout=0.3)


def whole(dtype):
    return make().to(dtype).requires_grad_()


RUNS = {
    "sft": (training.sft, examples, adapted, dict(accumulate=2)),
    "sft packed": (training.sft, examples, adapted, dict(accumulate=2, pack=32, epochs=4)),
    "dpo": (training.dpo, pairs, adapted, dict(accumulate=2)),
    "dpo bf16": (training.dpo, pairs, lambda: adapted(torch.bfloat16), dict()),
    "full bf16": (training.sft, examples, lambda: whole(torch.bfloat16), dict(weight_decay=0.1)),
}


def fit(what, folder, resume=False, every=1, keep=99):
    method, items, model, more = RUNS[what]
    folder.mkdir(exist_ok=True)
    model, items = model(), items()
    settings = Settings(**{"epochs": 2, "batch_size": 2, "lr": 1e-2, "log_every": 3, "eval_every": 4, **more})
    saved = Checkpoints(folder, {"run": what}, lambda new: (new / "model").mkdir(), every, keep)
    with Metrics(folder, training.count_steps(data.Mix([items]), settings), "test", resume) as metrics:
        training.fit(model, method(), items, settings, metrics, items[:3], saved, resume)
    return model.state_dict(), logged(folder)


def logged(folder):
    """The metrics, but for what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


@pytest.mark.parametrize("what", RUNS)
def test_a_run_resumes_from_any_step_as_if_it_had_not_stopped(what, tmp_path):
    """Bit for bit: weights and metrics; with dropout, accumulation, packing, evaluations and an epoch's end between."""
    weights, metrics = fit(what, tmp_path / "straight")
    steps = metrics[-1]["step"]
    assert steps >= 4
    again, _ = fit(what, tmp_path / "again", every=0)  # checkpoints change nothing
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    for last in range(1, steps):
        folder = tmp_path / f"from-{last}"
        shutil.copytree(tmp_path / "straight", folder)  # its metrics hold what was logged after the checkpoint, too
        for step in range(last + 1, steps + 1):
            shutil.rmtree(folder / "checkpoints" / f"step-{step}")
        torch.manual_seed(last)
        found, lines = fit(what, folder, resume=True)
        assert lines == metrics
        for name in weights:
            assert torch.equal(found[name], weights[name]), (last, name)


def test_a_checkpoint_before_the_next_logged_line_knows_where_the_file_ends(tmp_path):
    """Resumed at 2 of a file that went on to 3, and stopped before another line is logged."""
    fit("dpo", tmp_path / "straight", every=0)
    fit("dpo", tmp_path / "run", every=1)
    for step in (3, 4, 5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}", ignore_errors=True)
    method, items, model, more = RUNS["dpo"]
    settings = Settings(epochs=2, batch_size=2, lr=1e-2, log_every=99, **more)
    saved = Checkpoints(tmp_path / "run", {"run": "dpo"}, lambda new: None, 0, 99)
    watched = training.Method(asking(saved, method().objective), data.dpo_batch, method().summary)
    with Metrics(tmp_path / "run", 6, "test", resume=True) as metrics, pytest.raises(checkpoint.Stopped):
        training.fit(model(), watched, items(), settings, metrics, None, saved, True)
    assert [known["step"] for _, known in checkpoint.read(tmp_path / "run")] == [1, 2, 3]
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert checkpoint.read(tmp_path / "run")[-1][1]["metrics"]["bytes"] == size
    fit("dpo", tmp_path / "run", resume=True)


def asking(saved, objective):
    """The objective, in a run that is asked to stop at once."""

    def call(*args):
        saved.caught = int(signal.SIGTERM)
        return objective(*args)

    return call


def test_a_device_of_several_keeps_its_own_generator(monkeypatch):
    """By the calls of torch's device modules: without the device they mean the current one."""
    calls, where = [], torch.device("cuda", 1)
    module = types.SimpleNamespace(
        get_rng_state=lambda device: calls.append(device) or torch.zeros(1, dtype=torch.uint8),
        set_rng_state=lambda state, device: calls.append(device),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    states = device.random_state(where)
    device.set_random_state(where, states)
    assert states.keys() == {"cpu", "cuda"} and calls == [where, where]


def test_a_run_that_resumes_without_a_checkpoint_begins(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    assert fit("sft", tmp_path, resume=True)[1] == fit("sft", tmp_path / "other")[1]


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    """The best by evaluation is saved also between two regular steps, and stays."""
    scores = {2: 0.9, 5: 0.4, 7: 0.5, 12: 0.4}
    model = adapted()
    optimizer = training.optim.AdamW(model)
    saved = Checkpoints(tmp_path, {}, lambda new: None, every=3, keep=2)
    there = {}
    with Metrics(None, 20, "test") as metrics:
        for step in range(1, 14):
            record = {"eval_loss": scores[step]} if step in scores else {}
            if saved.due(step, record):
                saved.save(step, model, optimizer_with_state(optimizer), metrics, {"tokens": step, **record})
            there[step] = [known["step"] for _, known in checkpoint.read(tmp_path)]
    assert there[2] == [2] and there[4] == [2, 3] and there[5] == [3, 5] and there[9] == [5, 6, 9]
    assert there[13] == [5, 9, 12]  # 12 is no better than 5
    assert not Checkpoints(tmp_path / "none", {}, lambda new: None, every=3).due(1, {"eval_loss": math.nan})
    assert not Checkpoints(tmp_path / "none", {}, lambda new: None).due(3, {"eval_loss": 0.1})


def optimizer_with_state(optimizer):
    for master in optimizer.masters:
        master.grad = torch.ones_like(master)
    optimizer.step(1e-3, 1.0)
    return optimizer


def test_one_that_is_half_deleted_is_none(tmp_path, monkeypatch):
    """A process may die while it deletes."""
    fit("sft", tmp_path / "run", every=2)
    half = lambda path, **_: (path / "state.json").unlink(missing_ok=True)  # noqa: E731
    monkeypatch.setattr(checkpoint.shutil, "rmtree", half)
    saved = Checkpoints(tmp_path / "run", {}, lambda new: None, every=1, keep=1)
    with Metrics(None, 99, "test") as metrics:
        saved.save(99, adapted(), optimizer_with_state(training.optim.AdamW(adapted())), metrics, {"tokens": 1})
    monkeypatch.undo()
    assert [known["step"] for _, known in checkpoint.read(tmp_path / "run")][-1] == 99
    saved.save(100, adapted(), optimizer_with_state(training.optim.AdamW(adapted())), metrics, {"tokens": 1})
    assert not list((tmp_path / "run" / "checkpoints").glob(".part-*"))


def test_one_that_somebody_deletes_does_not_stop_the_run(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    saved = Checkpoints(tmp_path / "run", {}, lambda new: None, every=4, keep=1)
    optimizer = optimizer_with_state(training.optim.AdamW(adapted()))
    with Metrics(None, 99, "test") as metrics:
        for step in range(2, 10):
            record = {"eval_loss": 1 / step}
            assert saved.due(step, record)
            saved.save(step, adapted(), optimizer, metrics, {"tokens": 1, **record})
    assert [known["step"] for _, known in checkpoint.read(tmp_path / "run", whole=False)] == [9]
    with pytest.raises(BadInput, match="step-1.*is not a checkpoint's"):
        checkpoint.read(tmp_path / "run")


# ---- what interrupts ----


def broken(monkeypatch, at, error):
    """The at-th operation on files of a save fails."""
    count = 0

    def wrapped(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise error
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", wrapped(os.fsync))
    monkeypatch.setattr(files, "write_tensors", wrapped(files.write_tensors))
    monkeypatch.setattr(files, "write_json", wrapped(files.write_json))
    monkeypatch.setattr(files.Path, "rename", wrapped(Path.rename))
    monkeypatch.setattr(files.tempfile, "mkdtemp", wrapped(files.tempfile.mkdtemp))
    return lambda: count < at


def test_a_save_that_fails_anywhere_loses_nothing_and_says_where(tmp_path):
    fit("sft", tmp_path / "run", every=4)
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    model = adapted()
    optimizer = optimizer_with_state(training.optim.AdamW(model))
    saved = Checkpoints(tmp_path / "run", {}, lambda new: files.write_json(new / "a.json", {}), 1, keep=1)
    for at in range(1, 99):
        with pytest.MonkeyPatch.context() as patch, Metrics(None, 9, "test") as metrics:
            passed = broken(patch, at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            try:
                saved.save(99, model, optimizer, metrics, {"tokens": 1})
            except BadInput as error:
                assert f"{tmp_path}/run/checkpoints/step-99" in str(error) and "No space left" in str(error)
            if passed():
                break
        found = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
        if (tmp_path / "run" / "checkpoints" / "step-99").exists():  # all of it, and only then
            assert files.read_tensors(tmp_path / "run" / "checkpoints" / "step-99" / checkpoint.TENSORS)
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-99")
        else:
            assert found == before
    assert at > 6


def test_kills_at_random_moments():
    """The short version of bench/kills.py."""
    command = [sys.executable, ROOT / "bench" / "kills.py", "--kills", "4", "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"'while it trains or saves': [1-9].*: the same$", done.stdout, re.MULTILINE)) == 2


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root's rights")
    yield folder
    subprocess.run(["umount", str(folder)])


def test_a_full_disk_is_told_and_leaves_what_is_saved(full_disk):
    with pytest.raises(BadInput, match=rf"{full_disk}/run/checkpoints/step-\d+.*No space left"):
        fit("dpo", full_disk / "run", keep=99)
    found = checkpoint.read(full_disk / "run")
    assert found
    for path, _ in found:
        assert files.read_tensors(path / checkpoint.TENSORS)
    assert len(list((full_disk / "run" / "checkpoints").iterdir())) == len(found)  # and nothing half written


def test_a_checkpoint_that_is_corrupt_is_told(tmp_path):
    fit("sft", tmp_path, every=3)
    path, _ = checkpoint.read(tmp_path)[-1]
    tensors = (path / checkpoint.TENSORS).read_bytes()
    (path / checkpoint.TENSORS).write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(BadInput, match=rf"{path}/state.safetensors: cannot be read"):
        fit("sft", tmp_path, resume=True)
    files.write_tensors({"weight.other": torch.zeros(1)}, path / checkpoint.TENSORS)
    with pytest.raises(BadInput, match=f"{path} does not fit this run"):
        fit("sft", tmp_path, resume=True)
    (path / checkpoint.TENSORS).write_bytes(tensors)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="has lost lines"):
        fit("sft", tmp_path, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_a_second_one_at_once(number, tmp_path):
    method, saved = training.sft(), Checkpoints(tmp_path, {}, lambda new: None)
    seen = []

    def objective(model, tensors):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return method.objective(model, tensors)

    before = signal.getsignal(number)
    settings = Settings(steps=9, batch_size=2, accumulate=2)
    with Metrics(tmp_path, 9, "test") as metrics, pytest.raises(checkpoint.Stopped) as stopped, saved.stopping():
        watched = training.Method(objective, method.batch, method.summary)
        training.fit(adapted(), watched, examples(), settings, metrics, checkpoints=saved)
    assert stopped.value.args == (number, 2) and len(seen) == 4  # the whole of the second step
    assert [known["step"] for _, known in checkpoint.read(tmp_path)] == [2]
    assert signal.getsignal(number) == before
    with saved.stopping():
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == before  # the next one is not caught


def test_other_signals_and_ignored_ones_are_left_alone(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Checkpoints(tmp_path, {}, lambda new: None).stopping():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_differs_between_two_runs_is_named():
    was = {"--lr": 1e-4, "--seed": 42, "data": "5 records ab"}
    assert checkpoint.differences(was, dict(was)) == []
    assert checkpoint.differences({**was, "--newer": False}, was) == []
    now = {"--lr": 1e-3, "--seed": 42, "--new": True, "data": "6 records cd"}
    assert checkpoint.differences(now, was) == [
        "--lr is 0.001, was 0.0001",
        "--new is True, was None",
        "data is 6 records cd, was 5 records ab",
    ]


STATE = {"step": 3, "tokens": 9, "eval_loss": 0.5, "metrics": {"bytes": 1, "seconds": 0.5}, "run": {}}
NO_STATE = [
    {"step": -1}, {"step": True}, {"step": 3.0}, {"step": 1 << 63}, {"tokens": None}, {"tokens": -1}, {"run": []},
    {"eval_loss": "low"}, {"metrics": []}, {"metrics": {"bytes": -1, "seconds": 1}},
    {"metrics": {"bytes": 1, "seconds": "1"}},
]  # fmt: skip


@pytest.mark.parametrize("change", NO_STATE, ids=str)
def test_a_state_that_no_run_has_written_is_none(tmp_path, change):
    for step, state in ((3, STATE), (20, {**STATE, "step": 20, "eval_loss": None}), (100, {**STATE, **change})):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step}" / "state.json").write_text(json.dumps(state))
    assert [known["step"] for _, known in checkpoint.read(tmp_path, whole=False)] == [3, 20]  # by number, not by name
    with pytest.raises(BadInput, match="step-100.*is not a checkpoint's"):
        checkpoint.read(tmp_path)
