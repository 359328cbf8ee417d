"""Two processes of gloo on the CPU are one process with twice the micro-batches."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minichat import distributed

ROOT = Path(__file__).parent.parent

# run by one process, and by two of half the micro-batches each
PROGRAM = """
import json, os, signal, sys, torch
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, "tests")
from helpers import make
from minichat import checkpoint, distributed, lora, training
from minichat.examples import Example, Pair
from minichat.metrics import Metrics

distributed.start(torch.device("cpu"))
distributed.PIECE = 100  # less than most gradients have: they are added up in several pieces
folder, rank, world = Path(sys.argv[1]), distributed.rank(), distributed.world()
draw = torch.Generator().manual_seed(0)
ids = lambda n: torch.randint(3, 97, (n,), generator=draw).tolist()
sizes = [5 + 7 * i % 19 for i in range(21)]  # at two in a batch, four batches a step: three steps, the last of three
items = {"sft": [Example(ids(n), [0] * 3 + [1] * (n - 3)) for n in sizes],
         "dpo": [Pair(ids(4), ids(n), ids(n // 2 + 1)) for n in sizes]}

class Stopping(Metrics):
    stop = None
    def write(self, record):
        super().write(record)
        if record["step"] == self.stop and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

def run(kind, name, dropout=0.0, full=False, stop=None, resume=False, steps=None):
    model = make()
    if full: model.requires_grad_(True)
    else: lora.attach(model, 4, 8, dropout)
    method = getattr(training, kind)()
    settings = training.Settings(steps=steps, batch_size=2, accumulate=4 // world, lr=1e-2, log_every=1, warmup=0)
    saved = checkpoint.Checkpoints(folder / name, {}, lambda new: new.joinpath("model").mkdir(), 0)
    (folder / name).mkdir(exist_ok=True)
    log = Stopping(None if rank else folder / name, 3, kind, resume)
    log.stop = stop
    with log, saved.stopping(), suppress(checkpoint.Stopped):
        training.fit(model, method, items[kind], settings, log, items[kind][:5], saved, resume)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

found = {"sft": run("sft", "sft"), "full": run("sft", "full", full=True), "dpo": run("dpo", "dpo")}
logps = training.reference_logps(make(), training.dpo(), items["dpo"], training.Settings(batch_size=2))
found["reference"] = {"logps": logps}
whole = run("sft", "whole", dropout=0.3, steps=5)
seed = torch.initial_seed()
run("sft", "parts", dropout=0.3, stop=2, steps=5)  # one process is asked to stop, and both save
assert (folder / "parts/checkpoints/step-2").exists() or rank
parts = run("sft", "parts", dropout=0.3, resume=True, steps=5)
same = all(torch.equal(whole[name], parts[name]) for name in whole)
alike = [distributed.host_max(int(p.sum() * 1e6)) == int(p.sum() * 1e6) for p in whole.values()]
if rank == 0:
    torch.save(found, folder / "weights.pt")
print(json.dumps({"rank": rank, "same": same, "alike": all(alike), "seed": seed}), flush=True)
distributed.stop()
"""


@pytest.mark.slow
def test_two_processes_are_one_of_the_same_batch(tmp_path):
    """Metrics and weights to fp32's rounding, also where one has no micro-batch in the last step; all agree on when to
    stop; a run that goes on is the run that nothing stopped, with each process's own dropout."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        start = start + [str(processes)] if processes > 1 else [sys.executable]
        command = [*start, str(tmp_path / "program.py"), str(tmp_path / str(processes))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert sorted(each["rank"] for each in told) == list(range(processes))
        assert all(each["same"] and each["alike"] for each in told)
        assert len({each["seed"] for each in told}) == processes  # of dropout
        assert done.stderr.count("dpo 3/3") == 1  # one process tells
    one, two = (torch.load(tmp_path / n / "weights.pt") for n in "12")
    for kind in ("sft", "full", "dpo", "reference"):
        for name, expected in one[kind].items():
            torch.testing.assert_close(two[kind][name], expected, rtol=1e-4, atol=2e-5, msg=f"{kind} {name}")
    for kind in ("sft", "full", "dpo"):
        lines = [(tmp_path / n / kind / "metrics.jsonl").read_text().splitlines() for n in "12"]
        assert len(lines[0]) == len(lines[1]) == 3
        for a, b in zip(*(map(json.loads, each) for each in lines)):
            for key in a.keys() - {"seconds", "tokens_per_s"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (kind, key)


@pytest.mark.slow
def test_the_script_under_torchrun(tmp_path):
    """The first process alone writes and tells; what there is in the folder is a run like any other's."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} and {i}"}) + "\n" for i in range(24)))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["train.py", "--data", data, "--batch-size", "2", "--accumulate", "2", "--log-every", "1"]
    command += ["--lora-r", "2", "--out", tmp_path / "run", "--save-every", "2", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("in 2 processes, 3 steps", "sft 3/3", "minichat: done"):
        assert done.stderr.count(line) == 1, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-2" / "state.json").exists()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


# dpo.py, where each process has a disk of its own
APART = """
import os, runpy, sys
os.environ["MINICHAT_CACHE"] += os.environ["RANK"]
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_a_reference_is_computed_together_and_known_later(tmp_path, base):
    (tmp_path / "program.py").write_text(APART.replace("sys.argv[1]", f"{str(ROOT / 'dpo.py')!r}"))
    rows = [{"prompt": f"{i} + 1?", "chosen": f"It is {i + 1}.", "rejected": str(i)} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "program.py", "--model", base, "--data", tmp_path / "data.jsonl", "--precompute-reference"]
    command += ["--steps", "2", "--batch-size", "2", "--log-every", "1", "--lora-dropout", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINICHAT_CACHE": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": str(ROOT)}
    losses = []
    for said in ("once", "are known"):
        out = tmp_path / said.split()[-1]
        done = subprocess.run([*map(str, command), "--out", out], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and done.stderr.count("the reference's log-probs") == 1, done.stderr[-3000:]
        assert said in done.stderr
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and losses[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_alone_nothing_happens(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start(torch.device("cpu"))
    x = torch.ones(3)
    distributed.all_reduce([x])
    with distributed.main_process_first():
        assert torch.equal(x, torch.ones(3))
    assert (distributed.rank(), distributed.world(), distributed.host_sum(3, 4), distributed.host_max(5)) == (
        0,
        1,
        [3, 4],
        5,
    )
    assert distributed.all_gather({"a": x}) == [{"a": x}]
    distributed.stop()
