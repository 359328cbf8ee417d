"""The emulated HPU: what it sees of a program. Each test is a process of its own: the device stays once it is there."""

import runpy
import subprocess
import sys

import pytest
from emulation import ROOT, emulated


def test_it_computes_what_the_cpu_computes():
    found = emulated(
        """
def go(where):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)).to(where)
    x = net(torch.arange(12).view(2, 6).to(where))
    y = torch.utils.checkpoint.checkpoint(lambda x: F.softmax(x @ x.mT, -1) @ x, x, use_reentrant=False)
    loss = F.cross_entropy(y.flatten(0, 1), torch.arange(12).to(where) % 16)
    loss.backward()
    ring = torch.zeros(4, 16, device=where).index_copy_(0, torch.tensor([2, 0]).to(where), x[0, :2].detach())
    drawn = torch.rand(3, device=where, generator=torch.Generator().manual_seed(5))
    state = {k: v.cpu() for k, v in net.state_dict().items()}
    made = [torch.arange(9, device=where), torch.arange(3, 9, 2, device=where), torch.eye(3, device=where)]
    shapes = [tuple(x.shape) for x in made], [(x * x[:1]).tolist() for x in made]
    return [loss.item(), ring.cpu().tolist(), drawn.tolist(), [p.grad.cpu().tolist() for p in net.parameters()],
            [v.tolist() for v in state.values()], shapes]
import torch.utils.checkpoint
there = go("hpu")
found(same=there == go("cpu"))""",
    )
    assert found["same"]


def test_graphs_are_told_apart_by_shapes_and_numbers_alone():
    found = emulated(
        """
def step(x, n, number):
    y = x[:n] * number
    core.mark_step()
    return y
x, z = torch.randn(8).to(hpu), torch.randn(8).to(hpu)
core.mark_step()
for tensor, n, number in ((x, 6, 2), (z, 6, 2), (x, 7, 2), (x, 6, 3), (z, 6, 3)):
    step(tensor, n, number)
found()""",
    )
    runs = [run for run in found["runs"]][-5:]
    assert runs[0] == runs[1] and runs[3] == runs[4] and len(set(runs)) == 3
    assert "6 -> 7" in found["report"] and "2 -> 3" in found["report"], found["report"]


def test_a_wrapped_module_takes_what_the_bridges_does():
    found = emulated(
        """
import habana_frameworks.torch.hpu as bridge
calls, x = [], torch.ones(2).to(hpu)
class Double(torch.nn.Module):
    def forward(self, x):
        calls.append(1)
        return x * 2
double, counts = bridge.wrap_in_hpu_graph(Double()), []
for more in ({}, {}, {"cache_tensors_list": []}, {"bypass_hpu_graphs": True}):
    double(x, **more)
    counts.append(len(calls))
double.clear_cache()
double(x)
found(counts=[*counts, len(calls)])""",
    )
    assert found["counts"] == [1, 2, 2, 3, 4]  # recorded, rehearsed, replayed, bypassed, recorded again


def test_an_hpu_graphs_outputs_are_overwritten():
    found = emulated(
        """
import habana_frameworks.torch.hpu as bridge
calls, total = [], torch.zeros(2).to(hpu)
class Double(torch.nn.Module):
    def forward(self, x):
        calls.append(1)
        total.add_(x)
        return x.view(1, 2)[0] * 2 + torch.rand(2, device=hpu, generator=generator).clamp(0, 0)
generator = torch.Generator()
double = bridge.wrap_in_hpu_graph(Double())
first = double(torch.ones(2).to(hpu))
kept = first.clone()
drawn = generator.get_state().tolist()
double(torch.zeros(2).to(hpu))
second = double(torch.full((2,), 5.0).to(hpu))
drawn = drawn != generator.get_state().tolist()
found(first=first.tolist(), second=second.tolist(), kept=kept.tolist(), calls=len(calls), total=total.tolist(),
      drawn=drawn)""",
    )
    assert found["first"] == found["second"] == [10, 10] and found["kept"] == [2, 2]
    assert found["calls"] == 2  # recorded, and rehearsed once: replays run no Python
    assert found["total"] == [6, 6] and found["drawn"]


def test_python_that_changes_inside_an_hpu_graph_is_told():
    """A real one would go on with the number of the first time, and say nothing."""
    found = emulated(
        """
import habana_frameworks.torch.hpu as bridge
class Net(torch.nn.Module):
    n = 0
    def forward(self, x):
        self.n += self.moves
        return x[self.n :] * torch.rand(8, device=hpu)[self.n :] + torch.arange(8, device=hpu)[self.n :]
found_ = {}
for moves in (0, 1):
    net = Net()
    net.moves = moves
    torch.manual_seed(0)
    wrapped, x = bridge.wrap_in_hpu_graph(net), torch.ones(8).to(hpu)
    first = [wrapped(x).tolist() for _ in range(4)]
    torch.manual_seed(0)
    found_[moves] = (first == [(torch.rand(8)[moves:] + torch.arange(moves, 8)).tolist() for _ in range(4)], net.n)
found(found=found_)""",
    )
    assert found["found"] == {"0": [True, 0], "1": [True, 2]}
    assert list(found["advice"].values()) == [1]
    assert "<string>:18 forward: replays of an HPU graph keep what was recorded" in found["report"]
    assert "aten.slice.Tensor: 1 -> 2" in found["report"], found["report"]


def test_an_hpu_graph_holds_no_reads_and_no_copies_from_the_host():
    found = emulated(
        """
import habana_frameworks.torch.hpu as bridge
def wrapped(function):
    module = torch.nn.Module()
    module.forward = function
    return bridge.wrap_in_hpu_graph(module)
x, told = torch.ones(2).to(hpu), []
for function in (lambda x: x * x.sum().item(), lambda x: x * torch.rand(2).to(hpu)):
    try: wrapped(function)(x)
    except RuntimeError as error: told.append(str(error))
try: torch.Generator(hpu)
except RuntimeError as error: told.append(str(error))
found(told=told)""",
    )
    assert [words.split(": ")[1] for words in found["told"][:1]] == ["aten._local_scalar_dense"]
    assert "torch.Generator() draws" in found["told"][1]
    assert [line for line in found["advice"] if "replays keep" in line]


def test_peak_memory_and_what_holds_it():
    found = emulated(
        """
a = torch.zeros(1 << 18, device=hpu)
b = a + 1
del a
c = b.view(4, -1) * 2
del b, c
found(left=R.bytes)""",
    )
    assert (found["peak"], found["left"]) == (2 << 20, 0)
    assert found["report"].count("50.0%     0.001 GiB  262144 float32 <string>") == 2  # a and b, by their lines


MISTAKES = {
    "slicing by a Python number": ("y = cache[:, : n + i] * 1", "graphs", "aten.slice"),
    "a value read in the loop": ("y = x.sum().item()", "syncs", "aten._local_scalar_dense"),
    "a boolean mask": ("y = x[x > 0]", "syncs", "boolean mask"),
    "a learning rate as a number": ("x.mul_(1 - 0.1 * i)", "graphs", "aten.mul_"),
    "a last batch that is not padded": ("y = torch.ones(8 if i < 9 else 5).to(hpu) * 2", "graphs", "8 -> 5"),
    "multinomial": ("y = torch.multinomial(x.softmax(-1), 1)", "syncs", "multinomial"),
    "an int32 first token": (
        "y = F.embedding(torch.zeros(2, dtype=torch.int32 if i == 0 else torch.int64).to(hpu), cache)",
        "advice",
        "int32",
    ),
    "rank 6": ("y = x.view(1, 1, 1, 2, 2, -1) * 2", "advice", "rank 6"),
    "a write into a view": ("stacked[0].index_copy_(0, one, x[None, :4])", "advice", "into a view"),
    "a part that is replaced": ("stacked[0, :, :2] = x[:2]", "advice", "into a view"),
    "gather by int64": ("y = x.gather(0, one)", "advice", "int64"),
    "an index twice": (
        "w = x.detach().requires_grad_(); w.index_select(0, twice).sum().backward()",
        "advice",
        "comes twice",
    ),
}


LOOP = """
x, cache, stacked = torch.randn(8).to(hpu), torch.randn(8, 32).to(hpu), torch.zeros(2, 3, 4).to(hpu)
one, twice, n = torch.ones(1, dtype=torch.int64).to(hpu), torch.tensor([3, 3]).to(hpu), 4
core.mark_step()
R.reset()
for i in range(10):
    y = x * 2
    pass
    core.mark_step()
"""


@pytest.fixture(scope="module")
def loops():
    """A loop that is one graph and waits for nothing, and the same with each mistake in it: what the report says."""
    programs = {"none": LOOP} | {name: LOOP.replace("    pass\n", f"    {MISTAKES[name][0]}\n") for name in MISTAKES}
    found = emulated(
        f"""
told = {{}}
for name, text in {programs!r}.items():
    exec(compile(text, name, "exec"))
    told[name] = [len(R.graphs), sum(R.syncs.values()), lazy.report(), lazy.over_budget(1, 0)]
found(told=told)""",
    )
    return found["told"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_is_named_with_its_line(mistake, loops):
    assert loops["none"][:2] == [1, 0] and not loops["none"][3]
    _, kind, words = MISTAKES[mistake]
    graphs, waits, report, passed = loops[mistake]
    assert [line for line in report.splitlines() if f"{mistake}:8" in line and words in line], report
    assert kind == "advice" or passed and f"--max-{kind}" in passed[0 if kind == "graphs" else -1]
    assert kind != "graphs" or graphs > 1
    assert kind != "syncs" or waits == 10


@pytest.mark.slow
def test_any_script_runs_on_it_and_budgets_decide_the_exit_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(torch.ones(3, device='hpu').sum().item(), sys.argv[1:])\n")

    def run(*words):
        command = [sys.executable, "-W", "ignore", "-m", "minichat.lazy", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = run("--max-syncs", "1", str(script), "--flag", "x")
    assert (done.returncode, done.stdout) == (0, "3.0 ['--flag', 'x']\n")
    assert "script.py:2 <module>: aten._local_scalar_dense" in done.stderr
    done = run("--meta", "--max-syncs", "0", str(script))
    assert (done.returncode, done.stdout) == (1, "0.0 []\n")
    assert "error: 1 waits for the device: more than --max-syncs 0" in done.stderr
    done = run("no-such-script.py")
    assert done.returncode == 2 and done.stderr == "error: no-such-script.py: no such file\n"


def test_the_mistakes_of_the_bench_are_of_this_code(monkeypatch):
    """bench/lazy.py puts each in the place of a line, which is there once."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    mutants = runpy.run_path(str(ROOT / "bench" / "lazy.py"))["MUTANTS"]
    for file, was, *_, place in mutants.values():
        text = (ROOT / "minichat" / file).read_text()
        assert text.count(was) == 1, was
        assert place is None or place[1] in (ROOT / "minichat" / place[0]).read_text(), place
