"""metrics.jsonl, the lines and the bar of a run, and its picture."""

import io
import json
import math
import os
import subprocess
import sys
import types

import pytest

from minichat import metrics
from minichat.errors import BadInput
from minichat.metrics import Metrics

SFT = [
    {"step": i, "loss": 3.0 / i, "perplexity": 20.0, "lr": 1e-4, "tokens": 100 * i, "tokens_per_s": 5e4}
    for i in (1, 2, 4)
]
EVALUATED = [*SFT[:2], {**SFT[2], "eval_loss": 1.5, "eval_perplexity": 4.5}]
REWARDS = {"accuracy": 0.5, "margin": 0.1, "chosen_reward": 0.2, "rejected_reward": 0.1}
DPO = [{**record, **REWARDS} for record in EVALUATED]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write(folder, records, what="sft"):
    with Metrics(folder, 4, what) as out:
        for record in records:
            out.write(record)


def strict(text: str):
    """JSON as others read it: without Python's NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_file_holds_every_record(tmp_path):
    write(tmp_path, DPO)
    found = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in found] == DPO
    assert 0 <= found[0]["seconds"] <= found[-1]["seconds"] < 10
    assert metrics.read(tmp_path) == found


def test_what_is_logged_is_there_if_the_run_dies(tmp_path):
    out = Metrics(tmp_path, 4, "sft")
    out.write(SFT[0])
    assert metrics.read(tmp_path)[0]["loss"] == SFT[0]["loss"]  # not closed yet
    out.__exit__(None, None, None)
    write(tmp_path, SFT[:1])
    assert len(metrics.read(tmp_path)) == 1  # a new run, a new file


def test_infinity_is_null(tmp_path):
    write(tmp_path, [{"step": 1, "loss": 800.0, "perplexity": math.inf, "lr": math.nan}])
    found = strict((tmp_path / "metrics.jsonl").read_text())
    assert found["perplexity"] is None and found["lr"] is None and found["loss"] == 800


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    write(tmp_path, EVALUATED, "sft")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == 3 and "\r" not in err
    assert lines[0].startswith("sft 1/4 ") and "loss 3 " in lines[0] and "lr 0.0001" in lines[0]
    assert "tokens_per_s 50000" in lines[0] and lines[0].endswith(" s left")
    assert "eval_loss 1.5" in lines[2] and lines[2].endswith(" 0 s left")


def test_a_reader_that_has_seen_enough_does_not_stop_a_run(tmp_path):
    """`2>&1 | head`: the pipe is closed while the run goes on."""
    read, write = os.pipe()
    os.close(read)
    code = (
        "import pathlib, sys; from minichat.metrics import Metrics\n"
        "with Metrics(pathlib.Path(sys.argv[1]), 3, 'sft') as out:\n"
        "    for step in (1, 2, 3): out.write({'step': step, 'loss': 1.0})\n"
        "print('saved', file=sys.stderr); print('saved')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "saved\n") and [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path, SFT, "dpo")
    last = terminal.getvalue().split("\r")[-1]
    assert "dpo 4/4" in last and "loss=0.75" in last and "tok/s=50000" in last
    for line in terminal.getvalue().split("\r"):
        assert len(line.rstrip()) <= 80  # what one watches fits a terminal
    assert terminal.getvalue().count("\n") == 1  # one line, rewritten
    assert len(metrics.read(tmp_path)) == 3


def test_no_folder_no_file(capsys):
    write(None, SFT)
    assert len(capsys.readouterr().err.splitlines()) == 3


PANELS = {
    "sft": (SFT, {"loss": {"loss"}}),
    "one step": (SFT[:1], {"loss": {"loss"}}),
    "evaluated": (EVALUATED, {"loss": {"loss", "eval loss"}}),
    "dpo": (
        DPO,
        {
            "loss": {"loss", "eval loss"},
            "rewards": {"margin", "chosen reward", "rejected reward"},
            "accuracy": {"accuracy"},
        },
    ),
}


@pytest.mark.parametrize("records, panels", PANELS.values(), ids=PANELS)
def test_the_picture_shows_what_the_run_has(tmp_path, monkeypatch, records, panels):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    from minichat import plots

    seen = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    write(tmp_path, records)
    assert plots.draw_run(tmp_path) == tmp_path / "loss.png"
    [figure] = seen
    found = {axis.get_title(): {line.get_label() for line in axis.lines} for axis in figure.axes}
    assert found == panels
    for axis in figure.axes:
        assert axis.get_xlabel() == "step" and axis.get_ylabel()
        for line in axis.lines:
            key = line.get_label().replace(" ", "_")
            points = [(r["step"], r[key]) for r in records if key in r]
            assert [tuple(map(float, xy)) for xy in line.get_xydata()] == points
            assert len(points) > 2 or line.get_marker() == "o"  # a line of one point is nothing to see
    assert not plt.get_fignums()  # closed: many runs in one process keep no figure alive
    image = plt.imread(tmp_path / "loss.png")
    assert image.shape[1] > 300 * len(panels) and image.std() > 0


def test_several_runs_are_drawn_over_each_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from minichat import cli, plots

    seen = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    monkeypatch.chdir(tmp_path)
    for name, records in (("a", DPO), ("b", EVALUATED)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, records)
    monkeypatch.setattr(sys, "argv", ["plots", "a", "b", "--out", "both.svg"])
    cli.run(plots.main)
    assert capsys.readouterr().out.strip() == "both.svg" and "<svg" in (tmp_path / "both.svg").read_text()
    found = {axis.get_title(): {line.get_label() for line in axis.lines} for axis in seen[0].axes}
    assert found["loss"] == {"a", "a, eval loss", "b", "b, eval loss"} and found["accuracy"] == {"a"}
    colours = {line.get_label()[0]: line.get_color() for line in seen[0].axes[0].lines}
    assert colours["a"] != colours["b"]
    (tmp_path / "c").mkdir()
    for folder, why in (("c", "no run with metrics"), ("none", "no run with metrics")):
        monkeypatch.setattr(sys, "argv", ["plots", "a", folder])
        with pytest.raises(SystemExit) as stop:
            cli.run(plots.main)
        assert stop.value.code == 2 and why in capsys.readouterr().err
    lines = {"": "logged nothing", '{"a": 1}': "without a step", "[1]": "without a step", "{": "no run"}
    for text, why in {**lines, '{"step": 1, "lr": 1}': "nothing to draw"}.items():
        (tmp_path / "c" / "metrics.jsonl").write_text(text)
        with pytest.raises(BadInput, match=why):
            plots.draw([tmp_path / "c"], tmp_path / "x.png")


def test_a_disk_that_is_full_names_the_file(tmp_path):
    full = Metrics(tmp_path, 4, "sft")
    full.file.close()
    full.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(BadInput, match="/dev/full: cannot be written: No space left on device"), full:
        full.write(SFT[0])


def test_wandb_is_followed_and_goes_on_under_the_same_id(tmp_path, monkeypatch):
    """By its documented calls: init with project, id, resume and config; log with step."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((values, step))

    def init(**given):
        calls.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (tmp_path / "config.json").write_text('{"id": "an id"}')  # as a run writes it, and keeps it when it resumes
    for _ in range(2):
        with Metrics(tmp_path, 4, "sft", followers=[metrics.follower("wandb", tmp_path, {"--lr": 1})]) as out:
            out.write(SFT[1])
    (first, (values, step)), (second, _) = calls[:2], calls[2:]
    assert first == second and first["config"] == {"--lr": 1} and first["resume"] == "allow" and first["id"] == "an id"
    assert step == 2 and values["loss"] == SFT[1]["loss"] and "step" not in values

    def refuse(**_):
        raise RuntimeError("no API key\nlog in")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(BadInput, match="--log wandb: RuntimeError: no API key"):
        metrics.follower("wandb", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match=r"--log wandb needs it .*pip install 'minichat\[wandb\]'"):
        metrics.follower("wandb", tmp_path, {})


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_is_followed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, 4, "sft", followers=[metrics.follower("tensorboard", tmp_path, {})]) as out:
        for record in SFT:
            out.write(record)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(r["step"], pytest.approx(r["loss"])) for r in SFT]
    assert "step" not in events.Tags()["scalars"]
    with Metrics(tmp_path, 4, "sft", True, [metrics.follower("tensorboard", tmp_path, {}, SFT[0]["step"])]) as out:
        for record in SFT[1:]:  # a run that goes on after the first of them
            out.write({**record, "loss": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [record["step"] for record in SFT]
    assert [e.value for e in events.Scalars("loss")][1:] == [7.0] * (len(SFT) - 1)
