"""minichat's own loops on the emulated HPU: they make few graphs, wait seldom, and compute what the CPU computes."""

import json

import pytest
from emulation import emulated, script

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


def looped(code: str, payload: str = "cpu") -> dict:
    return emulated(MODEL + code, payload)


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
    """160 tokens, many turns of the window: set-up, prefill, the first token, decoding; a wait for 16 tokens."""
    found = looped(f"""
def go(where, n):
    model = make(where, layers=1, quantise={quantise})
    R.reset()
    return list(generation.decode(model, [[3, 4, 5], [7] * 20], n, {sampling}, ()))
there, graphs = {{}}, {{}}
for n in (20, 160):
    there[n] = go(hpu, n)
    graphs[n] = [len(R.graphs), sum(R.syncs.values())]
found(counts=graphs, same=all(there[n] == go("cpu", n) for n in there))""")
    assert found["same"]
    assert found["counts"] == {"20": [4, 2], "160": [4, 10]}


def test_attention_is_the_bridges_with_the_window_as_a_mask():
    """Causal without one only where nothing is out of the window: that kernel has none."""
    found = looped("""
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
    found = looped(
        """
model = make(hpu, window=None, layers=1)
R.reset()
for n in range(1, 4001, 333):
    list(generation.decode(model, [[5] * n], 2, generation.Sampling(), ()))
found()""",
        "meta",
    )
    assert len(found["runs"]) > 12 * 4 and found["graphs"] == 6, found["report"]


@pytest.mark.slow
def test_after_warm_up_nothing_is_compiled():
    """Of a window of 600: caches of 512 and 600 slots; 7 rows are filled up to 8."""
    found = looped(
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
def train(where, kind, steps=6, quantise=False, dtype=torch.bfloat16, log_every=2, **more):
    model = make(where, dtype, layers=1, quantise=quantise, adapt=True)
    method = training.sft() if kind == "sft" else training.dpo()
    settings = training.Settings(steps=steps, batch_size=2, accumulate=2, lr=1e-3, warmup=0.34, log_every=log_every)
    R.reset()
    with tempfile.TemporaryDirectory() as folder, Metrics(pathlib.Path(folder), steps, "test") as metrics:
        training.fit(model, method, items(kind, 11), settings, metrics, **more)
        lines = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "per_s" not in k and k != "seconds"} for x in lines]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, quantise", [("sft", False), ("dpo", True)])
def test_training_makes_two_graphs_a_bucket(kind, quantise):
    """Accumulation, warm-up and cosine, clipping: the shapes make the graphs, and a logged step is the only wait; one
    of them over float weights, the other over INT4."""
    found = looped(
        TRAIN
        + f"""
there = train(hpu, {kind!r}, quantise={quantise})
shapes = {{node for graph in R.graphs.values() for node in graph.nodes if node[0] == "aten.embedding"}}
counts, report = [len(R.graphs), sum(R.syncs.values()), len(shapes)], lazy.report()
here = train("cpu", {kind!r}, quantise={quantise})
found(counts=counts, both=[there, here], told=report)"""
    )
    (graphs, waits, shapes), (there, here) = found["counts"], found["both"]
    assert waits == len(there) == 4
    assert graphs <= 2 * shapes + 2, found["told"]
    assert there == here and "comes twice" not in found["told"]


@pytest.mark.slow
def test_nf4_copies_its_table_once():
    """Else it copies to the device what INT4 does: no linear has a constant of its own."""
    found = looped(
        TRAIN
        + """
plain, told = int4.quantize, []
for nf4 in (False, True):
    int4.quantize = lambda model: plain(model, nf4=nf4)
    train(hpu, "sft", quantise=True)
    told.append(sum(R.uploads.values()))
found(told=told)"""
    )
    of_int4, of_nf4 = found["told"]
    assert of_nf4 == of_int4 + 1, found["report"]


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
        newer=newer,
    )
    assert found["same"] and found["used"] == 2


@pytest.mark.slow
def test_the_selfcheck_passes_on_it(base):
    done = script("-m", "minichat.hpu_selfcheck", "--emulate", "--model", base, "--new-tokens", 17)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert not found["wrong"] and found["operations"]["int4_kernel"] == "int4_hpu"


@pytest.mark.slow
def test_the_scripts_report_and_keep_budgets(base, tmp_path):
    """Real weights through train.py; shapes alone, of a folder without weights, through train.py and infer.py."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} and {i}"}) + "\n" for i in range(16)))
    flags = ["--data", data, "--steps", 4, "--batch-size", 2, "--accumulate", 2, "--log-every", 2, "--lora-r", 2]
    budgets = ["--max-graphs", 4, "--max-syncs", 30]
    done = script("train.py", "--emulate", "--model", base, *flags, *budgets, "--out", tmp_path / "run")
    assert done.returncode == 1 and "error: 31 waits for the device: more than --max-syncs 30" in done.stderr, (
        done.stderr
    )
    assert "4 graphs, run 13 times in 13 steps" in done.stderr, done.stderr
    assert (tmp_path / "run" / "adapter").exists()
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
