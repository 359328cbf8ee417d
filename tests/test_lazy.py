"""The emulated HPU: what it sees of a program, and that minichat's own loops make few graphs on it.

Each test is a process of its own: the device cannot be taken away again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
except ImportError:
    pytest.skip(f"torch {torch.__version__} takes no devices written in Python", allow_module_level=True)

START = """
import json, sys, torch, torch.nn.functional as F
from minichat import lazy
R = lazy.install({payload!r}, {newer})
import habana_frameworks.torch.core as core
hpu = torch.device("hpu")
def found(**more):
    syncs = {{f"{{line}}: {{what}}": count for (what, line), count in R.syncs.items()}}
    advice = {{f"{{line}}: {{what}}": count for (what, line), count in R.advice.items()}}
    print(json.dumps(dict(graphs=len(R.graphs), runs=R.runs, syncs=syncs, waits=sum(R.syncs.values()),
                          steps=R.steps, advice=advice, report=lazy.report(), peak=R.peak, **more)))
"""

# a tiny model on a device, and the CPU as if it padded like an HPU: then both compute the same
MODEL = """
from minichat import data, device, generation, int4, lora, training
from minichat.metrics import Metrics
from minichat.model import Config, Mistral
torch.backends.cuda.enable_flash_sdp(False)  # of the CPU as well
for name in ("bucket", "reach", "rows", "cache_slots", "padding", "tokens_between_syncs"):
    plain = getattr(device, name)
    setattr(device, name, lambda *a, plain=plain: plain(*a[:-1], hpu))
def make(where, dtype=torch.float32, window=16, layers=2, quantise=False, adapt=False):
    torch.manual_seed(0)
    model = Mistral(Config(97, 32, 64, layers, 4, 2, 8, window, 8192))
    model.init_weights(0)
    if quantise: int4.quantize(model)
    model = model.to(where, dtype)
    if adapt: lora.attach(model, 4, 8)
    return model
"""


def emulated(code: str, payload: str = "cpu", model: bool = True, newer: bool = True) -> dict:
    """What `found()` printed at the end of a program on the emulated device."""
    program = START.format(payload=payload, newer=newer) + (MODEL if model else "") + code
    environment = {**os.environ, "MINICHAT_KERNEL": "reference", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- the device ----


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
        model=False,
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
        model=False,
    )
    runs = [run for run in found["runs"]][-5:]
    assert runs[0] == runs[1] and runs[3] == runs[4] and len(set(runs)) == 3
    assert "6 -> 7" in found["report"] and "2 -> 3" in found["report"], found["report"]


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
        model=False,
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
        model=False,
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
        model=False,
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
        model=False,
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
    "gather by int64": ("y = x.gather(0, one)", "advice", "int64"),
}


LOOP = """
x, cache, stacked = torch.randn(8).to(hpu), torch.randn(8, 32).to(hpu), torch.zeros(2, 3, 4).to(hpu)
one, n = torch.ones(1, dtype=torch.int64).to(hpu), 4
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
        model=False,
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


# ---- minichat on it ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling, quantise",
    [
        ("generation.Sampling()", False),
        ("generation.Sampling(0.8, 20, 0.9, seed=1)", False),
        ("generation.Sampling()", True),
    ],
)
def test_decoding_is_one_graph(sampling, quantise):
    """400 tokens, many turns of the window: set-up, prefill, the first token, decoding; a wait for 16 tokens."""
    found = emulated(f"""
def go(where, n):
    model = make(where, layers=1, quantise={quantise})
    R.reset()
    return list(generation.decode(model, [[3, 4, 5], [7] * 20], n, {sampling}, ()))
there, graphs = {{}}, {{}}
for n in (20, 400):
    there[n] = go(hpu, n)
    graphs[n] = [len(R.graphs), sum(R.syncs.values())]
found(counts=graphs, same=all(there[n] == go("cpu", n) for n in there))""")
    assert found["same"]
    assert found["counts"] == {"20": [4, 2], "400": [4, 25]}


def test_attention_is_the_bridges_with_the_window_as_a_mask():
    """Causal without one only where nothing is out of the window: that kernel has none."""
    found = emulated("""
from habana_frameworks.torch.hpex import kernels
calls, plain = [], kernels.FusedSDPA.apply
kernels.FusedSDPA.apply = staticmethod(lambda *a: calls.append([a[3] is None, a[5]]) or plain(*a))
ids = torch.arange(3, 43)[None]
same = [torch.equal(make(hpu)(ids[:, :n].to(hpu)).cpu(), make("cpu")(ids[:, :n])) for n in (16, 17, 40)]
found(calls=calls, same=same)""")
    assert found["calls"] == [[True, True]] * 2 + [[False, False]] * 4 and all(found["same"])


@pytest.mark.slow
def test_graphs_grow_with_the_buckets_of_prompts_not_with_their_lengths():
    """Set-up, a chunk of 128, of 256 and of 512 tokens, the first token, decoding."""
    found = emulated(
        """
model = make(hpu, window=None, layers=1)
R.reset()
for n in range(1, 4001, 230):
    list(generation.decode(model, [[5] * n], 2, generation.Sampling(), ()))
found()""",
        "meta",
    )
    assert len(found["runs"]) > 16 * 4 and found["graphs"] == 6, found["report"]


@pytest.mark.slow
def test_after_warm_up_nothing_is_compiled():
    """Of a window of 600: caches of 512 and 600 slots; 7 rows are filled up to 8."""
    found = emulated(
        """
model, said = make(hpu, window=600, layers=1), []
settings = dict(max_new_tokens=20, sampling=generation.Sampling(0.7, 5, seed=1), stop_ids=[2, 3])
generation.warm_up(model, 7, 900, **settings, tell=said.append)
known = len(R.graphs)
for lengths in ([3], [100, 8], [200, 1], [400], [500, 20, 3], [513, 4], [700], [900, 900, 899]):
    list(generation.decode(model, [[5] * n for n in lengths] + [[6]] * (7 - len(lengths)), **settings))
found(new=len(R.graphs) - known, said=said)""",
        "meta",
    )
    assert found["new"] == 0, found["report"]
    assert found["said"] == [f"warming up, {i} of 6: prompts of {n} tokens"
                             for i, n in enumerate((128, 256, 384, 512, 640, 768), 1)]  # fmt: skip


TRAIN = """
from minichat.examples import Example, Pair
import pathlib, tempfile
def items(kind, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 97, (n,), generator=g).tolist()
    sizes = [20, 150, 300]
    if kind == "sft":
        return [Example(draw(sizes[i % 3]), [0] * 10 + [1] * (sizes[i % 3] - 10)) for i in range(count)]
    return [Pair(draw(9), draw(sizes[i % 3]), draw(12)) for i in range(count)]
def train(where, kind, steps=12, quantise=False, dtype=torch.bfloat16, log_every=5, **more):
    model = make(where, dtype, layers=1, quantise=quantise, adapt=True)
    method = training.sft() if kind == "sft" else training.dpo()
    settings = training.Settings(steps=steps, batch_size=2, accumulate=4, lr=1e-3, warmup=0.1, log_every=log_every)
    R.reset()
    with tempfile.TemporaryDirectory() as folder, Metrics(pathlib.Path(folder), steps, "test") as metrics:
        training.fit(model, method, items(kind, 47), settings, metrics, **more)
        lines = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "per_s" not in k and k != "seconds"} for x in lines]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, quantise", [("sft", False), ("sft", True), ("dpo", False), ("dpo", True)])
def test_training_makes_two_graphs_a_bucket(kind, quantise):
    """Accumulation, warm-up and cosine, clipping: the shapes make the graphs, and a logged step is the only wait."""
    found = emulated(
        TRAIN
        + f"""
there = train(hpu, {kind!r}, quantise={quantise})
shapes = {{node for graph in R.graphs.values() for node in graph.nodes if node[0] == "aten.embedding"}}
counts, told = [len(R.graphs), sum(R.syncs.values()), len(shapes)], lazy.report()
here = train("cpu", {kind!r}, quantise={quantise})
found(counts=counts, same=there == here, both=[there, here], told=told, logged=len(there))"""
    )
    graphs, waits, shapes = found["counts"]
    assert waits == found["logged"] == 4
    assert graphs <= 2 * shapes + 2, found["told"]
    assert found["same"], found["both"]


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_goes_through_the_bridges_operation(newer, symmetric):
    """Under either schema, bit for bit the reference's weight, with a gradient to the input and none kept for it."""
    found = emulated(
        f"""
import os
os.environ["MINICHAT_KERNEL"] = ""
from minichat import int4
weight = torch.randn(24, 64)
scheme = int4.Scheme(4, 32, {symmetric}, ())
there = int4.Int4Linear.from_weight(weight, scheme, hpu)
odd = int4.Int4Linear.from_weight(weight[:23], scheme, hpu)  # not the bridge's
os.environ["MINICHAT_KERNEL"] = "reference"
here = int4.Int4Linear.from_weight(weight, scheme)
x = torch.randn(3, 64).bfloat16()
R.reset()
y = there(x.to(hpu).requires_grad_())
y.sum().backward()
used = [n[0] for g in R.graphs.values() for n in g.nodes] + [n[0] for n in R._nodes]
same = torch.equal(there.dequantize(torch.bfloat16).cpu(), here.dequantize(torch.bfloat16))
same &= torch.equal(odd.dequantize().cpu(), here.dequantize()[:23])
back = there.to("cpu")
same &= back.kernel == "int4_reference" and torch.equal(back.dequantize(), here.dequantize())
found(same=same, used=used.count("hpu.convert_from_uint4"))""",
        model=False,
        newer=newer,
    )
    assert found["same"] and found["used"] == 2


def script(*words):
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_the_selfcheck_passes_on_it():
    done = script("-m", "minichat.hpu_selfcheck", "--emulate", "--new-tokens", 17)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert not found["wrong"] and found["operations"]["int4_kernel"] == "int4_hpu"


@pytest.mark.slow
def test_the_scripts_report_and_keep_budgets(tmp_path):
    """Real weights through train.py; shapes alone, of a folder without weights, through train.py and infer.py."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} and {i}"}) + "\n" for i in range(16)))
    flags = ["--data", data, "--steps", 4, "--batch-size", 2, "--accumulate", 2, "--log-every", 2, "--lora-r", 2]
    done = script("train.py", "--emulate", *flags, "--max-graphs", 4, "--max-syncs", 58, "--out", tmp_path / "run")
    assert done.returncode == 1 and "error: 59 waits for the device: more than --max-syncs 58" in done.stderr, (
        done.stderr
    )
    assert "4 graphs, run 13 times in 13 steps" in done.stderr, done.stderr
    assert (tmp_path / "run" / "adapter").exists()
    base = ROOT / "minichat" / "assets" / "base"
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((base / name).read_bytes())
    model = ["--model", tmp_path / "model", "--emulate", "meta"]
    done = script("train.py", *model, *flags, "--int4", "--max-graphs", 4)
    assert done.returncode == 0 and "shapes alone" in done.stderr, done.stderr
    done = script("infer.py", *model, "--prompt", "x", "--template", "chatml", "--max-new-tokens", 17, "--max-syncs", 2)
    assert done.returncode == 0 and "4 graphs, run 19 times" in done.stderr, done.stderr
    done = script("infer.py", "--max-syncs", 2, "--prompt", "x")
    assert done.returncode == 2 and "add it" in done.stderr
