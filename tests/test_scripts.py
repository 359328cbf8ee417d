"""train.py, dpo.py, infer.py and minichat.evaluate as their users run them."""

import dataclasses
import errno
import gzip
import inspect
import io
import json
import math
import os
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import make
from safetensors.torch import load_file, save_file

import minichat
from minichat import (
    chat,
    cli,
    device,
    evaluate,
    examples,
    fused,
    generation,
    lora,
    metrics,
    packed,
    runs,
    sources,
    store,
    training,
    weights,
)
from minichat import files as locks
from minichat.assets import sums
from minichat.errors import BadInput
from minichat.int4 import Scheme
from minichat.kernels import cpu
from minichat.model import Decoder, Mistral
from minichat.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
LN2 = math.log(2)


@pytest.fixture
def run(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """run(script, *flags, stdin="") -> (exit code, stdout, stderr), in this process and in tmp_path."""
    monkeypatch.chdir(tmp_path)
    cpu.available()  # compiles into the user's cache; what else is kept, of whatever code, is not for this one
    monkeypatch.setenv("MINICHAT_CACHE", str(tmp_path_factory.mktemp("cache")))

    def call(script, *flags, stdin=""):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin, newline=None))
        pipe = signal.getsignal(signal.SIGPIPE)
        capsys.readouterr()
        code = 0
        try:
            if script in ("evaluate", "lora"):
                cli.run({"evaluate": evaluate, "lora": lora}[script].main)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        finally:
            signal.signal(signal.SIGPIPE, pipe)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def done(run):
    """run(), for what must succeed: its standard output."""

    def call(*args, **kwargs):
        code, out, err = run(*args, **kwargs)
        assert code == 0, err
        return out

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    kinds = {"sft": "sft", "pairs": "pairs", "test": "test", "text": "base"}
    return {name: sums.write(kind, 24, 0, folder / f"{name}.jsonl") for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def endless(base, tmp_path_factory):
    """A model that never says </s>: its logit is 0, and some other of 700 is above that."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][2] = 0
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 1 << 20}))
    return folder


def raiser(error):
    """A function that raises it, whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def tree(folder) -> dict:
    return {str(file): file.stat().st_size for file in Path(folder).rglob("*")}


def records(run_folder) -> list[dict]:
    return [json.loads(line) for line in (Path(run_folder) / "metrics.jsonl").read_text().splitlines()]


SHORT = ("--steps", 3, "--log-every", 1, "--batch-size", 4, "--max-length", 256, "--lora-dropout", 0)
PAIRS = ("--max-prompt-length", 100)


# ---- runs ----


def test_a_plan_says_what_a_run_needs_and_writes_nothing(run, base, files, tmp_path, monkeypatch):
    """Also what a budget leaves to compute again; a run with --tflops says what it was beside the plan."""
    flags = ("--model", base, "--data", files["sft"], "--out", "a", *SHORT)
    code, _, err = run("train.py", *flags, "--plan", "--tflops", 2)
    assert code == 0, err
    plan, time = (line for line in err.splitlines() if "plan:" in line)
    flop, hours = (float(re.search(rf"([\d.e-]+) {unit}", time)[1].replace(",", "")) for unit in ("PFLOP", "h at 2"))
    assert hours * 3600 * 2e12 == pytest.approx(flop * 1e15, rel=0.1)
    assert re.search(r"GFLOP per token; a micro-batch of [\d,]+ tokens holds [\d.]+ MiB \(weights", plan)
    assert re.search(r"3 steps, [\d,]+ tokens, [\d.,e-]+ PFLOP, [\d.,e-]+ h at 2 TFLOP/s", time)
    assert not Path("a").exists()
    with monkeypatch.context() as nothing_drawn:
        nothing_drawn.setattr(Mistral, "init_weights", raiser(AssertionError))
        fresh = ("--full", "--from-config", base, "--data", files["text"], "--out", "a", *SHORT)
        code, _, err = run("train.py", *fresh, "--plan")
    assert code == 0 and "GFLOP per token" in err, err
    code, _, err = run("train.py", *flags, "--plan", "--memory-budget", 0.0001)
    assert code == 2 and "everything computed again" in err.splitlines()[-1]
    code, _, err = run("train.py", *flags, "--memory-budget", 1, "--tflops", 2)
    measured = r"measured: [\d,]+ tokens/s, [\d.]+% of 2 TFLOP/s; peak .* GiB of the process, planned .* GiB of tensors"
    assert code == 0 and re.search(measured, err), err


def test_a_reference_computed_once_is_the_reference(run, base, files):
    """The same losses as beside it, from the cache in the second run; another model is another reference."""
    flags = ("--model", base, "--data", files["pairs"], "--eval-data", files["pairs"], "--lr", 0.01, *SHORT, *PAIRS)
    losses, said = {}, {}
    for name, more in {"a": (), "b": ("--precompute-reference",), "c": ("--precompute-reference",)}.items():
        code, _, said[name] = run("dpo.py", *flags, *more, "--out", name)
        assert code == 0, said[name]
        losses[name] = [record[key] for record in records(name) for key in ("loss", "eval_loss") if key in record]
    assert losses["b"] == pytest.approx(losses["a"], abs=1e-5) and losses["c"] == losses["b"]
    assert "of 12 of 24 pairs, once" in said["b"] and "log-probs of 24 pairs, once" in said["b"]
    assert "are known" in said["c"] and "pairs, once" not in said["c"]
    for name, more in {"ipo": (), "ipo-known": ("--precompute-reference",)}.items():  # of means, not of sums
        code, _, err = run("dpo.py", *flags, "--loss", "ipo", *more, "--out", name)
        assert code == 0, err
    assert [r["loss"] for r in records("ipo-known")] == pytest.approx([r["loss"] for r in records("ipo")], abs=1e-4)
    code, _, err = run("dpo.py", *flags, "--reference", "a", "--out", "d")
    assert code == 0, err
    first = records("d")[0]
    assert abs(first["loss"] - LN2) > 1e-4 and first["chosen_reward"] != 0
    code, _, err = run("dpo.py", *flags, "--reference", "a", "--reference-free", "--out", "e")
    assert code == 2 and "--reference-free" in err
    flags = ("--model", base, "--data", files["pairs"], "--eval-split", 0.3, "--precompute-reference", *SHORT, *PAIRS)
    code, _, err = run("dpo.py", *flags, "--out", "f")
    assert code == 0 and math.isfinite(records("f")[-1]["eval_loss"]), err


def test_a_reference_over_int4_has_its_own_adapter(done, base, files):
    """It stays beside the quantised weights, but is a part of the reference: only what trains is off there."""
    done("train.py", "--int4", "--model", base, "--data", files["sft"], "--lr", 0.05, "--out", "s", *SHORT)
    flags = ("--int4", "--model", "s", "--data", files["pairs"], *SHORT, *PAIRS)
    done("dpo.py", *flags, "--reference", "s", "--out", "same")
    assert records("same")[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    done("dpo.py", *flags, "--reference", base, "--out", "other")
    assert abs(records("other")[0]["loss"] - LN2) > 1e-3


def test_a_run_resumes_with_the_reference_that_it_had(done, run, stopped, base, files):
    done("train.py", "--model", base, "--data", files["sft"], "--out", "r", *SHORT)
    flags = ("dpo.py", "--model", base, "--reference", "r", "--data", files["pairs"], "--out", "a", *SHORT, *PAIRS)
    stopped(1, *flags)
    shutil.move("r", "kept")
    done("train.py", "--model", base, "--data", files["sft"], "--out", "r", "--lr", 0.01, *SHORT)
    code, _, err = run(*flags, "--resume")
    assert code == 2 and re.search(r"--reference is r \(\w+\), was r \(\w+\)", err), err
    shutil.rmtree("r")
    shutil.move("kept", "r")
    done(*flags, "--resume")


def test_train_then_dpo_then_infer(done, base, files):
    """Three runs, each over the one before; every run folder is a model."""
    done("train.py", "--model", base, "--data", files["sft"], "--eval-data", files["sft"], "--out", "a", *SHORT)
    done("dpo.py", "--model", "a", "--data", files["pairs"], "--out", "b", *SHORT, *PAIRS)
    for folder in map(Path, "ab"):
        names = {"config.json", "metrics.jsonl", "loss.png", "adapter"}
        assert {file.name for file in folder.iterdir()} == names
        assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        content = json.loads((folder / "config.json").read_text())
        assert content["minichat"] == minichat.__version__ and content["flags"]["steps"] == 3
        assert {"commit", "torch", "command"} <= content.keys()
        logged = records(folder)
        assert [r["step"] for r in logged] == [1, 2, 3]
        assert all({"loss", "lr", "tokens", "tokens_per_s"} <= r.keys() for r in logged)
        assert logged[0]["tokens"] < logged[1]["tokens"] < logged[2]["tokens"]
    assert {"eval_loss", "eval_perplexity"} <= records("a")[-1].keys()
    first = records("b")[0]  # the reference is what train.py made: at step 0 the policy is no other
    assert first["loss"] == pytest.approx(LN2, abs=1e-6) and first["margin"] == 0

    texts = [
        done("infer.py", "--model", model, *flags, "--prompt", "calculate 1 + 2", "--max-new-tokens", 12)
        for model, flags in ((base, ()), ("a", ()), ("b", ()), ("b", ("--int4",)), ("b/adapter", ("--int4",)))
    ]
    assert texts[3] == texts[4] and all(text.endswith("\n") for text in texts)
    models = [minichat.load(model)[0] for model in (base, "a", "b")]
    ids = torch.arange(3, 30)[None]
    assert not torch.equal(models[0](ids), models[1](ids)) and not torch.equal(models[1](ids), models[2](ids))


def test_the_same_seed_gives_the_same_run(done, base, files):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--data", files["sft"], "--seed", seed, "--lora-dropout", 0.1)
        done("train.py", "--model", base, "--out", out, *SHORT, *flags)
    a, b, c = (load_file(f"{out}/adapter/adapter_model.safetensors") for out in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a) and not any(torch.equal(a[key], c[key]) for key in a)
    assert [r["loss"] for r in records("a")] == [r["loss"] for r in records("b")]


def test_flags_from_a_file(done, base, files):
    Path("my.args").write_text(
        f"# a recipe\n--model '{base}' --data {files['sft']}\n\n--lr 3e-3   # peak\n--template 'neuralchat'\n"
    )
    done("train.py", "@my.args", *SHORT, "--lr", "2e-3", "--out", "out")
    flags = json.loads(Path("out/config.json").read_text())["flags"]
    assert flags["model"] == str(base) and flags["lr"] == 2e-3 and flags["template"] == "neuralchat"


def test_words_that_begin_with_at(tmp_path, monkeypatch, capsys):
    """A file of flags where a flag may be, files and comments in it; a value where a flag takes one."""
    monkeypatch.chdir(tmp_path)
    Path("outer.args").write_text("# all\n--lr 1 @inner.args # and the rest\n--text '@home @work'\n")
    Path("inner.args").write_text("--on\n--text @x --lr 2 # not 3\n# --lr 4\n")
    Path("alice").write_text("--lr 5")
    parser = cli.Parser("")
    parser.add_argument("--text", action="append")
    parser.add_argument("--lr", type=int)
    parser.add_argument("--on", action="store_true")
    args = parser.parse_args(["--text", "@alice", "@outer.args", "--text=@alice", "--text", "@alice says hi"])
    assert args.text == ["@alice", "@x", "@home @work", "@alice", "@alice says hi"] and args.lr == 2 and args.on
    assert parser.parse_args(["--on", "@alice"]).lr == 5  # --on takes nothing
    parser.add_argument("--data", nargs="+")
    assert parser.parse_args(["--data", "@alice", "b"]).data == ["@alice", "b"]
    Path("signs.args").write_text(
        "\ufeff--text runs/a#1 --text 'a # b' # c\n--text=\"# d\" #--lr 3\n", encoding="utf-8"
    )
    args = parser.parse_args(["@signs.args"])
    assert args.text == ["runs/a#1", "a # b", "# d"] and args.lr is None
    Path("quotes.args").write_text("--text \"a \\\" # b\" # don't\n--text it\\'s # what it's\n--lr 7 # don't\n")
    args = parser.parse_args(["@quotes.args"])
    assert args.text == ['a " # b', "it's"] and args.lr == 7
    Path("binary").write_bytes(b"--lr \xff\x00")
    for name in ("missing", "binary", "."):
        with pytest.raises(SystemExit) as error:
            parser.parse_args(["--on", f"@{name}"])
        err = capsys.readouterr().err
        assert error.value.code == 2 and err.startswith(f"error: file of flags {name}: ") and err.count("\n") == 1
    Path("odd").write_text("'a\nb\u2028c' " + "d" * 10_000)
    with pytest.raises(SystemExit):
        parser.parse_args(["@odd"])
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and len(err) < 1500 and "--help lists the flags" in err
    for typed, meant in (("--dat", "(did you mean --data?)"), ("--quite-another", "--quite-another;")):
        with pytest.raises(SystemExit):
            parser.parse_args([typed, "x"])
        assert meant in capsys.readouterr().err.replace(" x;", ";")


def test_a_prompt_and_a_stop_that_begin_with_at(done, endless):
    common = ("infer.py", "--model", endless, "--max-new-tokens", 3, "--json")
    found = json.loads(done(*common, "--prompt", "@alice says hi", "--stop", "@x"))
    assert found["prompt"] == "@alice says hi" and found["finish"] == "length"


SETTINGS = dict(
    steps=7, epochs=2.5, batch_size=3, accumulate=2, lr=3e-4, schedule="linear", warmup=5.0, clip=0.5,
    betas=(0.8, 0.95), eps=1e-7, weight_decay=0.01, optimizer="adamw8bit", seed=7, log_every=4, eval_every=2,
)  # fmt: skip
ADAPTER = ("--lora-r", 4, "--lora-alpha", 9, "--lora-dropout", 0.25, "--lora-targets", "q_proj, v_proj", "--rslora")
QUANTISED = ("--int4", "--bits", 8, "--group-size", 64, "--asymmetric", "--lm-head", "--dtype", "bfloat16",
             "--device", "cpu")  # fmt: skip
METHODS = {
    "train.py": (
        ("--learn", "all", "--format", "chat", "--pack"),
        {"Sft": {"max_length": 200, "format": "chat", "learn": "all"}, "sft": {}},
    ),
    "dpo.py": (
        (
            "--beta",
            0.3,
            "--loss",
            "robust",
            "--label-smoothing",
            0.2,
            "--reference-free",
            "--max-prompt-length",
            90,
            "--format",
            "preference",
        ),
        {
            "Dpo": {"max_length": 200, "max_prompt_length": 90, "format": "preference"},
            "dpo": {"beta": 0.3, "kind": "robust", "label_smoothing": 0.2, "reference_free": True},
        },
    ),
}


@pytest.mark.parametrize("script", METHODS)
def test_flags_reach_the_loop(run, files, tmp_path, monkeypatch, script):
    """None of them is at its default, and all are in config.json."""
    seen = {}

    def spy(module, name, instead=None):
        plain = getattr(module, name)

        def call(*args, **kwargs):
            bound = inspect.signature(plain).bind(*args, **kwargs)
            bound.apply_defaults()
            seen[name] = bound.arguments
            return (instead or plain)(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    def stop(*_):
        raise BadInput("that is enough")

    method, expected = METHODS[script]
    spy(weights, "load_model"), spy(lora, "attach"), spy(training, "fit", stop)
    spy(store, "load"), spy(training, [*expected][1])
    tokenizer = Tokenizer(cli.BASE)
    shape = dict(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, max_position_embeddings=512)
    minichat.save(make(**shape, head_dim=16), tokenizer, tmp_path / "model")
    source = files["sft" if script == "train.py" else "pairs"]
    given = [part for key, value in SETTINGS.items() for part in (f"--{key.replace('_', '-')}", value)]
    given = [part for value in given for part in (value if isinstance(value, tuple) else (value,))]
    flags = ("--model", "model", "--data", source, "--eval-data", source, "--max-length", 200, "--template", "zephyr")
    flags = (*flags, *given, *ADAPTER, *QUANTISED, *method, "--gradient-checkpointing", "--offload-optimizer")
    code, _, err = run(script, *flags, "--out", "out")
    assert code == 2 and err.splitlines()[-1] == "error: that is enough"

    pack = 200 if script == "train.py" else None
    assert dataclasses.asdict(seen["fit"]["settings"]) == {**SETTINGS, "pack": pack, "offload": True}
    assert not SETTINGS.items() & dataclasses.asdict(training.Settings()).items()
    model, attached = seen["fit"]["model"], seen["attach"]
    assert {block.checkpointed for block in model.model.layers} == {"block"}
    assert len(seen["fit"]["eval_items"]) == len(seen["fit"]["items"]) == 24
    wanted = dict(r=4, alpha=9, dropout=0.25, targets=["q_proj", "v_proj"], rslora=True, seed=7)
    assert attached["model"] is model and {key: attached[key] for key in wanted} == wanted
    loaded = dict(source="model", device="cpu", dtype=torch.bfloat16, int4=Scheme(8, 64, False, ()), adapter=None,
                  only=None, shapes_alone=False)  # fmt: skip
    assert seen["load_model"] == loaded and model.scheme == loaded["int4"] and model.dtype == torch.bfloat16
    (kind, encoded), (name, arguments) = expected.items()
    encoder = seen["load"]["encoder"]
    assert type(encoder).__name__ == kind and {key: getattr(encoder, key) for key in encoded} == encoded
    assert encoder.template == chat.template_text("zephyr", tokenizer)
    assert {key: seen[name][key] for key in arguments} == arguments
    kept = json.loads(Path("out/config.json").read_text())["flags"]
    assert {key: kept[key] for key in SETTINGS} == {**SETTINGS, "betas": [*SETTINGS["betas"]]}


@pytest.mark.slow
def test_full_training_from_a_config_then_full_dpo(done, base, files):
    Path("shape").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, "shape")
    flags = ("--full", "--lr", 1e-3, *SHORT)
    done(
        "train.py", "--from-config", "shape", "--data", files["text"], "--out", "a", *flags, "--lr", 1e-2, "--steps", 20
    )
    assert records("a")[-1]["loss"] < records("a")[0]["loss"] - 0.5
    done("dpo.py", "--model", "a", "--data", files["pairs"], "--out", "b", "--save-dtype", "bfloat16", *flags, *PAIRS)
    first = records("b")[0]
    assert first["loss"] == pytest.approx(LN2, abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)
    assert {t.dtype for t in load_file("b/model/model.safetensors").values()} == {torch.bfloat16}
    a, b = (minichat.load(folder)[0].state_dict() for folder in "ab")
    assert not any(torch.equal(a[key], b[key]) for key in a)
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        "b/model", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(other(ids).logits, minichat.load("b")[0](ids), rtol=0, atol=1e-4)
    assert "### Assistant:" in transformers.AutoTokenizer.from_pretrained("b/model").chat_template


def test_training_over_int4(done, run, base, files):
    """Loaded with the same flag it is what was trained, also with another adapter over it; without, it is merged."""
    done("train.py", "--model", base, "--int4", "--data", files["sft"], "--out", "q", *SHORT)
    code, _, err = run("infer.py", "--model", "q", "--int4", "--prompt", "add 2", "--max-new-tokens", 4)
    assert code == 0 and "was trained over quantised" not in err
    again = ("--data", files["pairs"], *SHORT, *PAIRS)
    code, _, err = run("dpo.py", "--model", "q", "--int4", "--out", "r", "--lr", 0.01, *again)
    assert code == 0 and "was trained over quantised" not in err
    assert records("r")[0]["loss"] == pytest.approx(LN2, abs=1e-5)  # the reference is the first adapter's model
    plain, (both, _) = minichat.load(base, int4=True)[0], minichat.load("r", int4=True)
    for name, module in both.named_modules():  # base and both adapters, each by its file
        if hasattr(module, "in_features") and "lora_" not in name and name != "lm_head":
            x = torch.randn(3, module.in_features)
            expected = plain.get_submodule(name)(x)
            for folder in ("q", "r"):
                A, B, scale = lora.Adapter(weights.resolve(folder)).pairs[name]
                expected = expected + scale * x @ A.T @ B.T
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="unmerged adapter"):
        minichat.save(both, Tokenizer(base), "no")
    lora.freeze(both)
    with pytest.raises(BadInput, match="unmerged adapter"):
        minichat.save(both, Tokenizer(base), "no")
    held = []  # by the plan: of adapters, over the base, over the first, over both
    for first in (base, "q", "r"):
        code, _, err = run("dpo.py", "--model", first, "--int4", "--out", "s", "--plan", *again)
        assert code == 0, err
        size, unit = re.search(r"adapters ([\d.]+) (KiB|MiB)", err).groups()
        held.append(float(size) * (1 if unit == "KiB" else 1024))
    assert held[0] < held[1] < held[2]
    code, _, err = run("dpo.py", "--model", "q", "--out", "s", *again)
    assert code == 0 and err.count("was trained over quantised") == 1
    minichat.save(*minichat.load(base, int4=True), "packed")
    code, _, err = run("train.py", "--model", "packed", "--full", "--data", files["sft"], "--out", "t", *SHORT)
    assert code == 2 and "quantised" in err and not Path("t").exists()


def test_training_over_nf4(done, run, base, files):
    """Its adapter names the float base: dpo.py goes on over both, and anything else merges it into float weights."""
    how = ("--int4", "nf4", "--group-size", 32)  # widths of 96
    done("train.py", "--model", base, *how, "--data", files["sft"], "--out", "q", "--lr", 0.01, *SHORT)
    adapter = lora.Adapter(weights.resolve("q"))
    assert adapter.config["base_model_name_or_path"] == str(base)
    assert adapter.metadata["int4"] == "nf4 in groups of 32, without lm_head"
    again = ("--data", files["pairs"], *SHORT, *PAIRS)
    code, _, err = run("dpo.py", "--model", "q", *how, "--out", "r", *again)
    assert code == 0 and "was trained over" not in err
    assert records("r")[0]["loss"] == pytest.approx(LN2, abs=1e-5)  # the reference is the first adapter's model
    beside, _ = minichat.load("r", int4=Scheme(nf4=True))
    assert [len(m.frozen) for m in lora.adapted(beside).values()] == [1] * 14
    with pytest.raises(BadInput, match="unmerged adapter"):
        minichat.save(beside, Tokenizer(base), "no")
    with pytest.raises(BadInput, match="NF4 base has no files"):
        minichat.save(*minichat.load(base, int4=Scheme(nf4=True)), "no")

    code, _, err = run("lora", "merge", "--adapter", "q", "--out", "whole", "--dtype", "float32")
    assert code == 0 and err.count("(nf4 in groups of 32, without lm_head) and is merged into float weights") == 1
    whole, plain = minichat.load("whole")[0].state_dict(), minichat.load(base)[0].state_dict()
    for name, weight in plain.items():
        delta = adapter.delta(name.removesuffix(".weight"), weight)
        assert torch.equal(whole[name], weight if delta is None else weight + delta)
    done("lora", "merge", "--adapter", "q", "--out", "packed", "--int4")
    code, _, err = run("infer.py", "--model", "r", "--int4", "--prompt", "add 2", "--max-new-tokens", 4)
    assert code == 0 and err.count("is merged into weights of int4") == 2

    for script, flags in {
        "infer.py": ["--prompt", "x"],
        "evaluate": ["--data", files["test"]],
        "lora": ["merge", "--adapter", "q", "--out", "n"],
    }.items():
        model = () if script == "lora" else ("--model", base)
        assert "leave nf4 out" in error_of(run(script, *flags, *model, "--int4", "nf4"))
    more = ("--model", base, "--data", files["sft"], "--out", "n", *SHORT)
    assert "96 is not a multiple of group size 64" in error_of(run("train.py", *more, "--int4", "nf4"))
    assert "NF4 has 4 bits" in error_of(run("train.py", *more, *how, "--asymmetric"))
    minichat.save(*minichat.load(base, int4=True), "int4")
    assert "quantised already, as int4" in error_of(run("train.py", *more, "--model", "int4", *how))


def test_merging_on_the_command_line(done, run, base, files):
    """A chain of adapters becomes a folder that transformers opens; another base wants --force; parts of an adapter."""
    transformers = pytest.importorskip("transformers")
    done("train.py", "--model", base, "--data", files["sft"], "--out", "q", "--lr", 0.01, *SHORT)
    done("dpo.py", "--model", "q", "--data", files["pairs"], "--out", "r", "--lr", 0.01, *SHORT, *PAIRS)
    done("lora", "merge", "--adapter", "r", "--out", "whole", "--dtype", "float32")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = minichat.load("r")[0](ids)
    assert (expected - minichat.load(base)[0](ids)).abs().max() > 1e-2
    theirs = transformers.AutoModelForCausalLM.from_pretrained("whole", dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
    done("lora", "merge", "--adapter", "r", "--out", "packed", "--int4", "--dtype", "float32")
    torch.testing.assert_close(minichat.load("packed")[0](ids), minichat.load("r", int4=True)[0](ids))
    done("lora", "merge", "--adapter", "r", "--out", "half")
    assert minichat.load("half")[0].state_dict().keys() == theirs.state_dict().keys()
    assert load_file("half/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16

    other = ("lora", "merge", "--adapter", "r", "--base", base, "--out", "other", "--dtype", "float32")
    assert "another base" in error_of(run(*other)) and not Path("other").exists()
    done(*other, "--force", "--only", "k_proj,v_proj")
    model, _ = minichat.load(base)
    lora.merge(lora.load(model, "r/adapter", only=["k_proj", "v_proj"]))
    torch.testing.assert_close(minichat.load("other")[0](ids), model(ids))
    done("lora", "merge", "--adapter", "r", "--base", "q", "--out", "again", "--dtype", "float32")  # its own
    torch.testing.assert_close(minichat.load("again")[0](ids), expected)
    for flags, part in (
        (("--adapter", "r", "--out", base), "not empty"),
        (("--adapter", base, "--out", "n"), "a model already"),
        (("--adapter", "none", "--out", "n"), "none"),
        (("--adapter", "r", "--out", "n", "--only", "k_proj"), "--base"),
        (("--adapter", "r", "--out", "n", "--base", "q", "--only", "key"), "'key'"),
        (("--adapter", "r", "--out", "n", "--group-size", 64), "--int4"),
    ):
        assert part in error_of(run("lora", "merge", *flags)) and not Path("n").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about its own names
def test_peft_does_not_take_the_second_adapter_for_one_over_the_base(done, base, files):
    """It would open the first one as if it were the model and leave it out: it must say no, or be right."""
    peft = pytest.importorskip("peft")
    done("train.py", "--model", base, "--data", files["sft"], "--out", "q", "--lr", 0.01, *SHORT)
    done("dpo.py", "--model", "q", "--data", files["pairs"], "--out", "r", "--lr", 0.01, *SHORT, *PAIRS)
    with pytest.raises((ValueError, OSError)):
        peft.AutoPeftModelForCausalLM.from_pretrained("r/adapter")
    first = peft.AutoPeftModelForCausalLM.from_pretrained("q/adapter", dtype=torch.float32)
    second = peft.PeftModel.from_pretrained(first.merge_and_unload(), "r/adapter")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(second(ids).logits, minichat.load("r")[0](ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's tracer
def test_compiled_blocks_from_the_command_line(run, base, files, monkeypatch):
    plain = device.compiler
    monkeypatch.setattr(device, "compiler", lambda where: plain(where, "eager"))
    code, _, err = run("train.py", "--model", base, "--data", files["sft"], "--compile", "--out", "a", *SHORT)
    assert code == 0 and re.search(r"compiled: [1-9]\d* graphs, 0 of them after the first step", err), err


def test_a_budget_is_kept_by_the_run(run, base, files):
    """What the plan says is to be computed again is."""
    flags = ("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT, "--memory-budget")
    sizes = {}
    for again in ((), ("--gradient-checkpointing",)):
        _, _, err = run(*flags[:-1], *again, "--plan")
        sizes[bool(again)] = float(re.search(r"holds ([\d.]+) MiB", err)[1])
    assert sizes[True] < 0.9 * sizes[False]
    seen, plain = [], Decoder.set_checkpointing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "set_checkpointing", lambda self, *what: (seen.append(what), plain(self, *what))[1])
        code, _, err = run(*flags, (sizes[True] + sizes[False]) / 2 / 1024)
    assert code == 0 and seen[-1] != ("",) and any(seen[-1]), (seen, err)


def test_a_run_of_one_step_learns(done, base, files):
    """A warm-up that is a share of less than a step would be that step, at rate 0."""
    done("train.py", "--model", base, "--data", files["sft"], "--out", "q", "--steps", 1, "--max-length", 256)
    assert records("q")[0]["lr"] == 1e-4
    assert all(B.abs().max() > 0 for _, B, _ in lora.Adapter(Path("q/adapter")).pairs.values())


def test_without_torch_one_line_says_what_to_do(run, base, monkeypatch):
    monkeypatch.setattr(weights, "load_model", raiser(ModuleNotFoundError("No module named 'torch'", name="torch")))
    error = error_of(run("infer.py", "--model", base, "--prompt", "x"))
    assert "no module 'torch'" in error and ".venv/bin/activate" in error
    monkeypatch.setattr(weights, "load_model", raiser(ModuleNotFoundError("No module named 'mine'", name="mine")))
    with pytest.raises(ModuleNotFoundError):
        run("infer.py", "--model", base, "--prompt", "x")


def test_overwrite_leaves_nothing_of_the_old_run(done, run, base, files):
    flags = ("--model", base, "--data", files["sft"], "--out", "a", *SHORT)
    done("train.py", *flags, "--full")
    done("train.py", *flags, "--overwrite")
    assert not Path("a/model").exists() and lora.adapted(lora.load(minichat.load(base)[0], "a/adapter"))
    before = tree("a")  # but a run never replaces what it starts from
    for source in (("--model", "a"), ("--model", base, "--adapter", "a/adapter", "--full")):
        code, _, err = run("train.py", *source, "--data", files["sft"], "--out", "a", "--overwrite", *SHORT)
        assert code == 2 and "--out a" in err and tree("a") == before


def test_a_run_that_fails_keeps_the_one_that_it_was_to_replace(done, run, base, files, monkeypatch):
    """However often, until one has its result."""
    flags = ("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT)
    done(*flags)
    Path("a/data.jsonl").write_text("the embedded default writes one")
    old = contents("a")
    assert {"loss.png", "data.jsonl", "adapter/adapter_model.safetensors"} < old.keys()
    flags = (*flags, "--overwrite", "--seed", 1)

    def left_behind() -> set[str]:
        found = contents("a")
        assert {name: text for name, text in found.items() if name.startswith("replaced-run/")} == {
            f"replaced-run/{name}": text for name, text in old.items()
        }
        return {name for name in found if not name.startswith("replaced-run/")}

    code, _, err = run(*flags, "--lr", 1e30, "--clip", 0, "--warmup", 0)
    assert code == 2 and "not finite" in err
    assert left_behind() == {"config.json", "metrics.jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", raiser(KeyboardInterrupt))
        assert run(*flags)[0] == 130
        assert left_behind() == {"config.json", "metrics.jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr(lora.files, "write_json", raiser(OSError(errno.ENOSPC, "No space left on device")))
        code, _, err = run(*flags)
        assert code == 2 and "error: a/adapter: cannot be written: No space left on device" in err
        assert left_behind() == {"config.json", "metrics.jsonl"}  # and nothing of an adapter
    restored, _ = minichat.load("a/replaced-run")
    assert contents("a/replaced-run") == old and restored.source.endswith("replaced-run/adapter")

    done(*flags)
    new = contents("a")
    assert new.keys() == old.keys() - {"data.jsonl"}
    for name in ("config.json", "adapter/adapter_model.safetensors"):
        assert new[name] != old[name]


# ---- checkpoints ----


@pytest.fixture
def stopped(run, monkeypatch):
    """stopped(step, script, *flags): the run is asked to stop after this step, as Ctrl-C does, or another signal."""

    def call(step, *flags, by=signal.SIGINT):
        real = training.optim.AdamW.step
        count = 0

        def counting(*args):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), by)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(training.optim.AdamW, "step", counting)
            code, _, err = run(*flags)
        assert code == 128 + by and f"stopped at step {step} of" in err and "--resume" in err
        return err

    return call


def numbers(run_folder):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in records(run_folder)]


@pytest.mark.parametrize("script, more", [("train.py", ("--pack",)), ("train.py", ("--full",)), ("dpo.py", PAIRS)])
def test_a_stopped_run_resumes_to_the_same_result(done, run, stopped, base, files, script, more):
    flags = ("--model", base, "--data", files["sft" if script == "train.py" else "pairs"], "--eval-split", 0.2)
    flags = (script, *flags, *SHORT[2:-1], 0.2, "--accumulate", 2, "--epochs", 2, *more)
    done(*flags, "--out", "a")
    stopped(2, *flags, "--out", "b", "--save-every", 1, "--keep", 1)
    assert [f.name for f in Path("b/checkpoints").iterdir()] == ["step-2"] and not Path("b/adapter").exists()
    kind = "model" if "--full" in more else "adapter"
    done("infer.py", "--model", "b/checkpoints/step-2", "--prompt", "x", "--max-new-tokens", 2)  # is a model
    code, _, err = run(*flags, "--out", "b", "--resume")
    assert code == 0 and "resumed after step 2" in err
    assert numbers("a") == numbers("b")
    one, other = (next(Path(folder, kind).glob("*.safetensors")) for folder in "ab")
    assert one.name == other.name and one.read_bytes() == other.read_bytes()
    before = contents("b")
    code, _, err = run(*flags, "--out", "b", "--resume")
    assert code == 0 and "nothing to resume" in err and contents("b") == before


def test_a_signal_while_the_result_is_saved_waits_for_it(done, base, files, monkeypatch):
    real = lora.save

    def save(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(lora, "save", save)
    done("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT)
    assert Path("a/adapter/adapter_model.safetensors").exists()


def test_two_runs_do_not_share_a_folder(done, run, base, files):
    flags = ("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT)
    with locks.alone(Path("a")):
        code, _, err = run(*flags)
        assert code == 2 and "another process is at work there" in err and not list(Path("a").iterdir())
    done(*flags)
    before = contents("a")
    with locks.alone(Path("a")):
        code, _, err = run(*flags, "--overwrite")
        assert code == 2 and "another process" in err and contents("a") == before


def test_a_log_that_is_not_installed_is_told_before_anything_is_written(done, run, base, files, monkeypatch):
    flags = ("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT)
    done(*flags)
    before = contents("a")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(*flags, "--overwrite", "--log", "wandb")
    assert code == 2 and "pip install 'minichat[wandb]'" in err and contents("a") == before
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name)
    told = []
    monkeypatch.setattr(metrics, "follower", lambda log, *_: lambda record: told.append((log, record["step"])))
    done(*flags, "--overwrite", "--log", "wandb", "tensorboard")
    assert told == [(log, step) for step in (1, 2, 3) for log in ("wandb", "tensorboard")]


def test_the_share_of_packed_rows_counts_what_is_taken(done, run, base, files):
    one, other = f"{files['sft']}:0.9", f"{files['text']}:0.1"
    code, _, err = run("train.py", "--model", base, "--data", one, other, "--out", "a", "--pack", *SHORT)
    assert code == 0 and 0.3 < float(re.search(r"([0-9.]+)% of them used", err)[1]) / 100 <= 1


def test_resuming_says_what_is_not_as_it_was(done, run, stopped, base, files):
    data = Path("d.jsonl")
    shutil.copy(files["sft"], data)
    flags = ("train.py", "--model", base, "--data", data, "--out", "a", *SHORT)
    stopped(1, *flags)
    before = contents("a")
    with data.open("a") as more:
        more.write(json.dumps({"prompt": "2 + 2", "completion": "4"}) + "\n")
    shutil.copytree(base, "other")
    changed = load_file("other/model.safetensors")
    changed["lm_head.weight"] += 1
    save_file(changed, "other/model.safetensors", metadata={"format": "pt"})
    code, _, err = run(*flags, "--resume", "--lr", 0.5, "--model", "other", "--template", "zephyr")
    assert code == 2 and contents("a") == before and err.count("error:") == 1
    for what in ("--lr is 0.5, was 0.0001", "the base is", "data is 25 records", ", was 24 records", "template is"):
        assert what in err
    assert "--seed" not in err and "--steps" not in err
    code, _, err = run("train.py", "--model", base, "--data", f"{data}:0.5", "--out", "a", *SHORT, "--resume")
    assert code == 2 and "the shares of the data is [0.5], was [None]" in err
    code, _, err = run(*flags, "--resume", "--overwrite")
    assert code == 2 and "one of them" in err
    code, _, err = run(*flags)
    assert code == 2 and "--resume if it was stopped" in err
    shutil.copy(files["sft"], data)
    shutil.move("a", "moved")  # what does not decide the numbers may differ
    more = ("--out", "moved", "--log-every", 2, "--save-every", 1, "--gradient-checkpointing", "--resume")
    assert run(*flags, *more)[0] == 0


def test_resume_begins_where_there_is_no_checkpoint(done, run, base, files, monkeypatch):
    """So that one command serves a machine that is taken away at any time."""
    flags = ("train.py", "--model", base, "--data", files["sft"], "--out", "a", "--resume", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", raiser(MemoryError()))
        assert run(*flags)[0] == 2
    code, _, err = run(*flags)
    assert code == 0 and "no checkpoint in a: from step 1" in err
    assert [line["step"] for line in records("a")] == [1, 2, 3] and not Path("a/replaced-run").exists()


def test_resume_after_the_last_step_saves_the_result(done, run, base, files):
    """Of a run that was killed between its last checkpoint and its result: there are no numbers of it to tell."""
    flags = ("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT, "--save-every", 3)
    done(*flags)
    result = load_file("a/adapter/adapter_model.safetensors")
    shutil.rmtree("a/adapter")
    code, _, err = run(*flags, "--resume", "--tflops", 1)
    assert code == 0 and "resumed after step 3" in err
    again = load_file("a/adapter/adapter_model.safetensors")
    assert all(torch.equal(result[name], again[name]) for name in result)


def test_dpo_goes_over_a_checkpoint(done, stopped, base, files):
    stopped(2, "train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT, by=signal.SIGTERM)
    done("dpo.py", "--model", "a/checkpoints/step-2", "--data", files["pairs"], "--out", "b", *SHORT, *PAIRS)
    named = json.loads(Path("b/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == Path("a/checkpoints/step-2").resolve() or Path(named) == Path("a/checkpoints/step-2")
    done("infer.py", "--model", "b", "--prompt", "x", "--max-new-tokens", 2)


def test_a_picture_that_cannot_be_drawn_is_a_note(done, run, base, files, monkeypatch):
    pytest.importorskip("matplotlib")
    from minichat import plots

    flags = ("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT, "--overwrite")
    done(*flags)
    for error in (OSError(errno.ENOSPC, "No space left on device"), ImportError("no matplotlib")):
        monkeypatch.setattr(plots, "draw_run", raiser(error))
        code, _, err = run(*flags)
        assert code == 0 and err.count("no loss.png: ") == 1 and "done: a;" in err.splitlines()[-1]
        assert {file.name for file in Path("a").iterdir()} == {"config.json", "metrics.jsonl", "adapter"}


def test_a_project_that_is_renamed(done, base, files):
    """Its runs lie where they lay to one another: an adapter over an adapter over a base."""
    shutil.copytree(base, "project/base")
    for source, out in (("project/base", "project/a"), ("project/a", "project/runs/b")):
        done("train.py", "--model", source, "--data", files["sft"], "--out", out, *SHORT, "--lr", 1e-2)
    ids = torch.arange(3, 30)[None]
    expected = [minichat.load(folder)[0](ids) for folder in ("project/base", "project/a", "project/runs/b")]
    assert not any(torch.equal(a, b) for a, b in zip(expected, expected[1:]))
    Path("project").rename("moved")
    for folder, logits in zip(("moved/base", "moved/a", "moved/runs/b"), expected):
        assert torch.equal(minichat.load(folder)[0](ids), logits)
    os.chdir("moved/runs")  # wherever one is
    assert torch.equal(minichat.load("b")[0](ids), expected[2])


@pytest.mark.parametrize("flags", [(), ("--full",)], ids=["adapter", "full"])
def test_a_run_keeps_its_template_and_its_base(done, base, files, flags):
    done("train.py", "--model", base, "--data", files["sft"], "--out", "a", "--template", "zephyr", *SHORT, *flags)
    _, tokenizer = minichat.load("a")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "add 1 and 2"}]
    expected = chat.prompt_ids(messages, "zephyr", Tokenizer(base))
    assert chat.prompt_ids(messages, "auto", tokenizer) == expected
    assert chat.prompt_ids(messages, "auto", Tokenizer(base)) != expected
    if not flags:
        assert lora.Adapter("a/adapter").metadata["base_fingerprint"] == weights.identity(base)


@pytest.mark.parametrize("flags", [(), ("--full",)], ids=["adapter", "full"])
@pytest.mark.parametrize("kind", ["several", "by its id"])
def test_a_run_keeps_what_ends_an_answer(done, base, files, kind, flags):
    shutil.copytree(base, "base")
    config = json.loads(Path("base/tokenizer_config.json").read_text())
    if kind == "several":
        Path("base/generation_config.json").write_text('{"eos_token_id": [2, 300]}')
    else:  # in config.json alone
        del config["eos_token"]
        Path("base/tokenizer_config.json").write_text(json.dumps(config))
        Path("base/generation_config.json").unlink()
    done("train.py", "--model", "base", "--data", files["sft"], "--out", "a", *SHORT, *flags)
    (_, before), (_, after) = minichat.load("base"), minichat.load("a")
    assert after.stop_ids == before.stop_ids == ((2, 300) if kind == "several" else (2,))
    assert after.eos_id == 2


@pytest.mark.parametrize("special", [False, True], ids=["text", "special token"])
def test_an_answer_ends_where_it_was_taught_to(done, tmp_path, special):
    """ChatML's <|im_end|>: whether the tokenizer knows it as a token or not, and without --template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copy(cli.BASE / name, tmp_path / "base")
    size = Tokenizer(cli.BASE).vocab_size
    if special:
        config = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {str(size): {"content": "<|im_end|>", "special": True}}
        (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    model = make(vocab_size=size + special, hidden_size=64, max_position_embeddings=512, initializer_range=0.02)
    minichat.save(model, Tokenizer(tmp_path / "base"), tmp_path / "base")
    text = "It is 42, I think."
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Six sevens?", "completion": text}) + "\n")
    flags = ("--full", "--template", "chatml", "--steps", 40, "--batch-size", 1, "--lr", 5e-3, "--schedule", "constant")
    done("train.py", "--model", "base", "--data", "data.jsonl", "--out", "a", *flags)

    model, tokenizer = minichat.load("a")
    stop_ids, stop = chat.stops("auto", tokenizer)
    assert (stop_ids, stop) == (((2, size), ()) if special else ((2,), ("<|im_end|>",)))
    if special:
        assert tokenizer.stop_ids == stop_ids
    prompt = chat.prompt_ids([{"role": "user", "content": "Six sevens?"}], "auto", tokenizer)
    sampling = generation.Sampling()
    found = generation.answer(model, tokenizer, [prompt], 60, sampling, stop, stop_ids)[0]
    assert (found.text, found.finish) == (text, "stop")
    records = [{"question": "Six sevens?", "answer": 42}] * 3
    scores = evaluate.exact_match(model, tokenizer, records, "auto", batch_size=2, max_new_tokens=60)
    assert scores == {"exact_match": 1.0, "answers": [text] * 3}


def test_a_run_deletes_nothing_of_the_users(done, run, base, files):
    """Its data beside it, a folder or a picture of a name that a run uses, data in the place of an old run's."""
    records = Path(files["sft"]).read_text()
    flags = ("train.py", "--model", base, *SHORT, "--out", "a")
    for name, records_file in (("data.jsonl", "a/data.jsonl"), ("loss.png", files["sft"])):
        shutil.rmtree("a", ignore_errors=True)
        Path("a").mkdir()
        Path("a", name).write_text(records)
        before = contents("a")
        code, _, err = run(*flags, "--data", records_file)
        assert code == 2 and name in err and contents("a") == before
    shutil.rmtree("a")
    Path("a/replaced-run").mkdir(parents=True)
    Path("a/replaced-run/thesis").write_text("mine")
    done(*flags, "--data", files["sft"])
    assert Path("a/replaced-run/thesis").exists()
    Path("a/data.jsonl").write_text(records)
    before = contents("a")
    code, _, err = run(*flags, "--data", "a/data.jsonl", "--overwrite")
    assert code == 2 and "data.jsonl" in err and contents("a") == before


def test_a_template_that_wants_a_system_message(done, base):
    """It has no plain conversation to find its end of answers in; that must not cost a finished run."""
    template = (
        '{% if messages[0]["role"] != "system" %}{{ raise_exception("a system message comes first") }}{% endif %}'
        '{% for m in messages %}<{{ m["role"] }}>{{ m["content"] }}<bot_end>{% endfor %}'
        '{{ "<assistant>" if add_generation_prompt }}'
    )
    Path("t.jinja").write_text(template)
    record = {"messages": [{"role": role, "content": "b"} for role in ("system", "user", "assistant")]}
    Path("d.jsonl").write_text(f"{json.dumps(record)}\n" * 8)
    done("train.py", "--model", base, "--data", "d.jsonl", "--template", "t.jinja", "--out", "a", *SHORT)
    done("infer.py", "--model", "a", "--system", "s", "--prompt", "x", "--max-new-tokens", 3)
    assert chat.stops("t.jinja", Tokenizer(base)) == ((2,), ("<bot_end>",))


@pytest.mark.slow
def test_a_reader_that_has_gone_does_not_stop_a_run(base, files, tmp_path):
    """`2>&1 | head -0`."""
    read, write = os.pipe()
    os.close(read)
    command = [ROOT / "train.py", "--model", base, "--data", Path(files["sft"]).resolve(), "--out", "a", *SHORT]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, stdout=write, stderr=write)
    os.close(write)
    assert done.returncode == 0 and (tmp_path / "a/adapter").exists()


@pytest.mark.slow
def test_closed_standard_error(base, files, tmp_path):
    """What would be told goes nowhere: not among the answers."""
    data = Path(files["sft"]).resolve()
    for command in (
        ("infer.py", "--model", base, "--prompt", "1 + 2", "--max-new-tokens", 3, "--json"),
        ("train.py", "--model", base, "--data", data, "--out", "a", *SHORT),
        ("infer.py", "--model", "nowhere", "--prompt", "x"),
    ):
        words = shlex.join(map(str, (sys.executable, ROOT / command[0], *command[1:])))
        done = subprocess.run(f"exec {words} 2>&-", shell=True, cwd=tmp_path, stdout=subprocess.PIPE)
        assert done.returncode == (2 if "nowhere" in command else 0)
        lines = done.stdout.decode().splitlines()
        assert len(lines) == ("--json" in command) and all(json.loads(line)["prompt"] for line in lines)
    assert len(records(tmp_path / "a")) == 3


def test_the_rate_that_is_told_is_of_training_alone():
    lines = [
        {"step": 1, "tokens": 100, "tokens_per_s": 1.0, "seconds": 100.0},  # warms up
        {"step": 2, "tokens": 300, "tokens_per_s": 50.0, "seconds": 104.0},
        {"step": 3, "tokens": 400, "tokens_per_s": 100.0, "seconds": 999.0},  # evaluates for a quarter of an hour
    ]
    assert runs.tokens_per_s(lines) == pytest.approx(300 / 5) and runs.tokens_per_s(lines[:1]) == 1.0


def test_an_unfinished_run_is_not_the_default(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("sft/adapter", "dpo"):
        (Path("runs") / folder).mkdir(parents=True)
    Path("runs/dpo/config.json").write_text('{"minichat": "0"}')
    Path("runs/sft/adapter/adapter_config.json").write_text("{}")
    assert cli.default_model("dpo", "sft") == Path("runs/sft") and not capsys.readouterr().err
    Path("runs/dpo/metrics.jsonl").touch()
    assert cli.default_model("dpo", "sft") == Path("runs/sft")
    assert "runs/dpo did not finish" in capsys.readouterr().err
    with pytest.raises(BadInput, match="runs/dpo is a run that did not finish"):
        minichat.load("runs/dpo")
    for outer in (".", "runs"):
        with pytest.raises(BadInput, match="; runs in it: .*runs/dpo$"):
            minichat.load(str(Path(outer).resolve()))
    shutil.rmtree("runs")
    assert cli.default_model("dpo", "sft") == cli.BASE
    assert "no finished runs/dpo or runs/sft here: the embedded base" in capsys.readouterr().err


# ---- answers ----


def test_answers_from_flags_a_file_and_a_pipe(done, base):
    """However a prompt comes in, its answer is the same; several come in order."""
    prompts = ["calculate 1 + 2", "What is 3 + 4?", "é, 你好 🙂"]
    common = ("infer.py", "--model", base, "--max-new-tokens", 9)
    lone = [done(*common, "--prompt", prompt) for prompt in prompts]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    several = "".join(f"> {prompt}\n{text[:-1]}\n\n" for prompt, text in zip(prompts, lone))
    assert done(*common, *flags) == done(*common, *flags, "--batch-size", 2) == several
    Path("prompts.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    assert done(*common, "--file", "prompts.txt") == several
    Path("bom.txt").write_text("\n".join(prompts), encoding="utf-8-sig")
    assert done(*common, "--file", "bom.txt") == several
    assert done(*common, stdin="\n".join(prompts)) == several
    assert done(*common, "--file", "-", stdin="\r\n".join(prompts)) == several
    joined = "a\u2028b\x0cc\x85d"  # one line, whatever str.splitlines() thinks
    assert done(*common, stdin=joined + "\n") == done(*common, "--prompt", joined)

    lines = done(*common, *flags, "--json").splitlines()
    for line, prompt, text in zip(map(json.loads, lines), prompts, lone):
        assert line["prompt"] == prompt and line["answer"] == text[:-1]
        assert line["finish"] in ("stop", "length") and 0 < line["new_tokens"] <= 9
        assert {"prompt_tokens", "first_token_seconds", "tokens_per_s"} <= line.keys()
    assert len(lines) == 3


def test_stop_and_system_and_sampling(done, run, endless):
    common = ("infer.py", "--model", endless, "--max-new-tokens", 40, "--prompt", "add 1 and 2", "--json")
    free = json.loads(done(*common))
    assert free["finish"] == "length" and free["new_tokens"] == 40
    text = free["answer"]
    stop = next(text[i : i + 4] for i in range(8, len(text) - 4) if "\ufffd" not in text[i : i + 4])
    stopped = json.loads(done(*common, "--stop", "never said", "--stop", stop))
    assert stopped["finish"] == "stop" and stopped["answer"] == free["answer"].split(stop)[0]
    assert json.loads(done(*common, "--system", "Be brief."))["prompt_tokens"] != free["prompt_tokens"]
    drawn = [json.loads(done(*common, "--temperature", 1, "--seed", seed))["answer"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    code, out, err = run(*common, "--temperature", 1)  # another seed every time, and told
    seed = int(re.search(r"--seed (\d+)", err)[1])
    answer = json.loads(out)["answer"]
    assert answer not in drawn and json.loads(done(*common, "--temperature", 1, "--seed", seed))["answer"] == answer


def test_sampling_and_cache_are_the_flags(done, run, base, monkeypatch):
    seen, plain = [], generation.decode
    monkeypatch.setattr(generation, "decode", lambda *args: (seen.append(args), plain(*args))[1])
    common = ("infer.py", "--model", base, "--max-new-tokens", 2, "--prompt", "1 + 2")
    drawn = ("--temperature", 0.7, "--top-k", 5, "--top-p", 0.9, "--min-p", 0.1, "--repetition-penalty", 1.2)
    done(*common, *drawn, "--seed", 3, "--kv-cache", "int8")
    done(*common, "--speculate")
    assert seen[0][3] == generation.Sampling(0.7, 5, 0.9, 0.1, 1.2, 3)
    assert [given[5:7] for given in seen] == [(False, torch.int8), (True, None)]
    for flags in (("--temperature", 1), ("--repetition-penalty", 1.1), ("--batch-size", 2)):
        code, _, err = run(*common, "--speculate", *flags)
        assert code == 2 and "--speculate" in err


def test_int4_is_kept_for_the_next_start(run, monkeypatch):
    if not cpu.available():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(packed, "LARGE", 0)
    said = [
        run("infer.py", "--model", cli.BASE, "--int4", "--max-new-tokens", 4, "--prompt", "1 + 2") for _ in range(2)
    ]
    assert [("kept for the next start" in err, out) for _, out, err in said] == [
        (True, said[0][1]),
        (False, said[0][1]),
    ]


@pytest.mark.parametrize("script", ["infer.py", "evaluate"])
def test_activations_of_8_bits_are_what_the_linears_take(done, base, files, script, monkeypatch):
    if not cpu.available():
        pytest.skip("no C++ compiler")
    taken, matmul, given = set(), cpu.matmul, {"infer.py": ["--prompt", "1 + 2"], "evaluate": ["--data", files["test"]]}
    monkeypatch.setattr(fused, "fits", lambda model: False)  # or no linear is called on its own
    monkeypatch.setattr(cpu, "matmul", lambda x, w, exact=True: taken.add(exact) or matmul(x, w, exact))
    for flags, exact in ((), True), (("--activations", "int8"), False):
        taken.clear()
        done(script, "--model", base, "--int4", "--max-new-tokens", 2, *given[script], *flags)
        assert taken == {exact}


def test_evaluate_is_the_answers_score(done, base, files):
    wanted = [json.loads(line) for line in files["test"].read_text().splitlines()]
    common = ("--model", base, "--max-new-tokens", 8)
    found = json.loads(done("evaluate", "--data", files["test"], "--json", "--batch-size", 5, *common))
    Path("questions").write_text("".join(record["question"] + "\n" for record in wanted))
    lines = done("infer.py", "--file", "questions", "--json", *common).splitlines()
    assert found["answers"] == [json.loads(line)["answer"] for line in lines]
    shown = done("evaluate", "--data", files["test"], *common)
    assert shown.splitlines()[-2:] == [f"| exact_match | {found['exact_match']:.4f} |", "| questions | 24 |"]


# ---- data ----


def test_several_sources_bad_records_and_a_split(run, base, tmp_path):
    """Bad records are counted, named and listed in the run folder; what is held out is not learnt from."""
    rows = [json.dumps({"text": f"{i} + 1 = {i + 1}"}) for i in range(200)]
    with gzip.open("a.jsonl.gz", "wt") as file:
        file.write("\n".join([*rows[:100], "{'a'", '{"b": 1}']))
    Path("b").mkdir()
    Path("b/train.json").write_text("[" + ", ".join([*rows[100:], "7"]) + "]")
    flags = ("--model", base, "--data", "a.jsonl.gz:1", "b:3", "--eval-split", 0.2, *SHORT[2:])
    code, out, err = run("train.py", *flags, "--out", "r")
    assert code == 0, err
    bad = Path("r/bad-records.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in bad] == ["a.jsonl.gz:101", "a.jsonl.gz:102", "b/train.json:101"]
    assert all(f"minichat: bad: {line}" in err for line in bad)
    assert "minichat: a.jsonl.gz: 100 records, " in err and ", 2 bad" in err and "minichat: b: 100 records, " in err
    assert "eval_loss" in json.loads(Path("r/metrics.jsonl").read_text().splitlines()[-1])
    tokenizer = Tokenizer(base)
    encoder = examples.Sft(tokenizer, chat.template_text("auto", tokenizer), 256)
    (_, held_a), (b, held_b) = (store.load(sources.find(spec), encoder)[0].split(0.2) for spec in ("a.jsonl.gz", "b"))
    assert f"{len(held_a) + len(held_b)} records to evaluate on" in err and 20 < len(held_a) + len(held_b) < 60
    steps = math.ceil((len(b) + round(len(b) / 3)) / 4)  # all of b, a third as many of a
    assert f"{steps} steps" in err


@pytest.mark.slow
def test_a_file_whose_name_is_no_unicode(base, tmp_path):
    name = os.fsdecode(b"\xe9.jsonl")
    try:
        (tmp_path / name).write_text('{"text": "1 + 1 = 2"}\n[1]\n')
    except OSError:
        pytest.skip("the file system takes no such name")
    with start(ROOT / "train.py", "--model", base, "--data", name, "--out", "a", *SHORT, cwd=tmp_path) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert (tmp_path / "a/bad-records.txt").read_bytes().startswith(rb"\udce9.jsonl:2: ")


def test_what_the_output_cannot_encode_is_not_lost(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli.run(lambda: print("| – |"))
    assert written.getvalue() == rb"| \u2013 |" + b"\n"


# ---- bad input: one line, exit code 2, nothing written ----


def error_of(result) -> str:
    """The one line that a failed run says, beside what it did before."""
    code, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("minichat: ")]
    assert code == 2 and not out and len(lines) == 1 and lines[0].startswith("error: "), (code, out, err)
    return lines[0]


@pytest.mark.parametrize(
    "script, flags, parts",
    [
        ("infer.py", ["--model", "none/at/all"], ["none/at/all"]),
        ("infer.py", ["--model", "{base}/config.json"], ["config.json", "file"]),
        ("infer.py", ["--model", "."], ["config.json"]),
        ("infer.py", ["--model", "cut"], ["cut/model.safetensors"]),
        ("infer.py", ["--model", "gpt2"], ["gpt2", "GPT2LMHeadModel"]),
        ("infer.py", ["--adapter", "{base}"], ["adapter_config.json"]),
        ("infer.py", ["--model", ""], ["--model"]),
        ("infer.py", ["--adapter", " "], ["--adapter"]),
        ("infer.py", ["--prompt", ""], ["empty"]),
        ("infer.py", ["--prompt", "x", "--prompt", " \n"], ["empty"]),
        ("infer.py", ["--prompt", "9 " * 600], ["1", "512", "--max-new-tokens"]),
        ("infer.py", ["--max-new-tokens", "600"], ["600", "512"]),
        ("infer.py", ["--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
        ("infer.py", ["--int4", "--group-size", "64"], ["down_proj", "96", "--group-size"]),
        ("infer.py", ["--int4", "--group-size", "48"], ["48", "--group-size"]),
        ("infer.py", ["--nonsense"], ["--nonsense", "--help"]),
        ("infer.py", ["--temp", "1"], ["--temp"]),
        ("infer.py", ["--bits", "3"], ["--bits", "3"]),
        ("infer.py", ["--temperature", "-1"], ["temperature", "-1"]),
        ("infer.py", ["--temperature", "nan"], ["temperature", "nan"]),
        ("infer.py", ["--top-p", "0"], ["top_p", "0"]),
        ("infer.py", ["--top-k", "many"], ["--top-k", "many"]),
        ("infer.py", ["--seed", "-1"], ["--seed", "-1"]),
        ("infer.py", ["--stop", ""], ["stop", "empty"]),
        ("infer.py", ["--batch-size", "0"], ["--batch-size", "0"]),
        ("infer.py", ["--device", "tpu"], ["tpu"]),
        ("infer.py", ["--template", "nonsense"], ["nonsense", "neuralchat"]),
        ("infer.py", ["--file", "missing.txt"], ["missing.txt"]),
        ("infer.py", ["--file", "latin1.txt"], ["latin1.txt", "UTF-8"]),
        ("infer.py", ["@missing.args"], ["missing.args"]),
        ("infer.py", ["@open.args"], ["open.args", "quot"]),
        ("infer.py", ["@latin1.txt"], ["latin1.txt", "utf-8"]),
        ("train.py", ["--model", ""], ["--model"]),
        ("train.py", ["--data", "missing.jsonl"], ["missing.jsonl"]),
        ("train.py", ["--data", "bad.jsonl", "--strict"], ["bad.jsonl:3"]),
        ("train.py", ["--data", "list.jsonl", "--strict"], ["list.jsonl:2", "list"]),
        ("train.py", ["--data", "bad.jsonl:0.5", "list.jsonl"], ["some have none"]),
        ("train.py", ["--data", "bad.jsonl:none"], ["'none'", "positive"]),
        ("train.py", ["--eval-split", "1"], ["--eval-split", "1.0"]),
        ("train.py", ["--eval-split", "-0.1"], ["--eval-split is -0.1; it must be a share"]),
        ("train.py", ["--eval-split", "1e-9"], ["no record on one side"]),
        ("train.py", ["--eval-split", "0.1", "--eval-data", "bad.jsonl"], ["--eval-split", "--eval-data"]),
        ("train.py", ["--eval-data", "bad.jsonl:2"], ["bad.jsonl:2", "--data alone"]),
        ("train.py", ["--data", "fields.jsonl"], ["fields.jsonl:1", "question"]),
        ("train.py", ["--data", "roles.jsonl"], ["roles.jsonl:1", "robot"]),
        ("train.py", ["--data", "content.jsonl"], ["content.jsonl:1", "content"]),
        ("train.py", ["--data", "empty.jsonl"], ["no record"]),
        ("train.py", ["--data", "{pairs}"], ["pairs.jsonl:1", "dpo.py"]),
        ("train.py", ["--eval-data", "bad.jsonl", "--strict"], ["bad.jsonl:3"]),
        ("train.py", ["--max-length", "1"], ["--max-length"]),
        ("train.py", ["--lr", "-1"], ["--lr", "-1"]),
        ("train.py", ["--lr", "nan"], ["--lr", "nan"]),
        ("train.py", ["--eps", "0"], ["--eps", "0"]),
        ("train.py", ["--lora-alpha", "0"], ["--lora-alpha", "0"]),
        ("train.py", ["--save-dtype", "bfloat16"], ["--save-dtype", "--full"]),
        ("train.py", ["--learn", "all", "--max-prompt-length", "9"], ["--max-prompt-length", "--learn all"]),
        ("train.py", ["--data", "bad.jsonl:1e-320"], ["bad.jsonl:1e-320", "1e-9"]),
        ("train.py", ["--model", "tied", "--lora-targets", "q_proj,lm_head"], ["lm_head", "embedding"]),
        ("train.py", ["--steps", "0"], ["--steps", "0"]),
        ("train.py", ["--epochs", "inf"], ["--epochs", "inf"]),
        ("train.py", ["--warmup", "-0.1"], ["--warmup"]),
        ("train.py", ["--betas", "0.9", "1"], ["--betas", "1.0"]),
        ("train.py", ["--clip", "-1"], ["--clip", "-1"]),
        ("train.py", ["--weight-decay", "-1"], ["--weight-decay"]),
        ("train.py", ["--eval-every", "-1"], ["--eval-every", "negative"]),
        ("train.py", ["--save-every", "-1"], ["--save-every", "negative"]),
        ("train.py", ["--keep", "0"], ["--keep", "0"]),
        ("train.py", ["--log-every", "0"], ["--log-every", "0"]),
        ("train.py", ["--batch-size", "0"], ["--batch-size", "0"]),
        ("train.py", ["--epochs", "0"], ["--epochs", "0"]),
        ("train.py", ["--betas", "-0.1", "0.9"], ["--betas", "-0.1"]),
        ("train.py", ["--full", "--rslora"], ["--full", "--rslora"]),
        ("train.py", ["--pack", "--epochs", "1001"], ["--epochs", "1001", "--steps"]),
        ("train.py", ["--tflops", "0"], ["--tflops", "0"]),
        ("train.py", ["--memory-budget", "0"], ["--memory-budget", "0"]),
        (
            "train.py",
            ["--memory-budget", "1", "--gradient-checkpointing"],
            ["--memory-budget", "--gradient-checkpointing"],
        ),
        ("train.py", ["--max-prompt-length", "0"], ["--max-prompt-length 0"]),
        ("train.py", ["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        ("train.py", ["--seed", str(1 << 63)], ["--seed", "9223372036854775808"]),
        ("train.py", ["--max-graphs", "9"], ["--max-graphs", "--emulate"]),
        ("train.py", ["--accumulate", "0"], ["--accumulate"]),
        ("train.py", ["--lora-r", "0"], ["rank", "0"]),
        ("train.py", ["--lora-dropout", "1"], ["--lora-dropout"]),
        ("train.py", ["--lora-targets", "q_proj,query"], ["query", "q_proj"]),
        ("train.py", ["--template", "nonsense"], ["nonsense"]),
        ("train.py", ["--eval-every", "2"], ["--eval-every", "2", "--eval-data"]),
        ("train.py", ["--dtype", "float16"], ["--dtype", "float16", "bfloat16"]),
        ("train.py", ["--full", "--int4"], ["--full", "--int4"]),
        ("train.py", ["--adapter", "somewhere"], ["--model somewhere"]),
        ("train.py", ["--from-config", "{base}"], ["--from-config"]),
        ("train.py", ["--out", "old"], ["--out old", "--overwrite"]),
        ("train.py", ["--out", "old/metrics.jsonl"], ["old/metrics.jsonl", "file"]),
        ("train.py", ["--out", "old/metrics.jsonl/below"], ["old/metrics.jsonl/below"]),
        ("train.py", ["--out", "{base}"], ["--out", "config.json"]),
        ("train.py", ["--out", "{base}", "--overwrite"], ["--out", "config.json"]),
        ("dpo.py", ["--dtype", "float16"], ["--dtype", "float16"]),
        ("dpo.py", ["--beta", "0"], ["--beta", "0"]),
        ("dpo.py", ["--label-smoothing", "0.5"], ["label_smoothing", "0.5"]),
        ("dpo.py", ["--loss", "ipo", "--label-smoothing", "0.1"], ["ipo"]),
        ("dpo.py", ["--max-prompt-length", "256"], ["--max-prompt-length"]),
        ("dpo.py", ["--data", "{sft}"], ["sft.jsonl:1", "chosen"]),
        ("evaluate", ["--model", ""], ["--model"]),
        ("evaluate", ["--batch-size", "0"], ["--batch-size", "0"]),
        ("evaluate", ["--activations", "int8"], ["--activations int8", "--int4"]),
        ("infer.py", ["--activations", "int8"], ["--activations int8", "--int4"]),
        ("evaluate", ["--data", "{sft}"], ["sft.jsonl:1", "question"]),
        ("evaluate", ["--data", "empty.jsonl"], ["empty.jsonl"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_nothing_is_written(run, base, files, tmp_path, script, flags, parts):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    for name, text in {
        "bad.jsonl": good + "\n" + "{'a': 1}\n",
        "list.jsonl": good + "[1]\n",
        "fields.jsonl": '{"question": "x"}\n',
        "roles.jsonl": good.replace("user", "robot"),
        "content.jsonl": good.replace('"a"', "7"),
        "empty.jsonl": "\n",
        "open.args": "--prompt 'open\n",
        "old/metrics.jsonl": "",
        "cut/model.safetensors": "",
        "gpt2/config.json": '{"architectures": ["GPT2LMHeadModel"]}',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(base, tmp_path / "cut", dirs_exist_ok=True)
    os.truncate(tmp_path / "cut" / "model.safetensors", 30_000)
    (tmp_path / "latin1.txt").write_bytes("é\n".encode("latin1"))
    if "tied" in flags:
        shutil.copytree(base, tmp_path / "tied")
        raw = json.loads((base / "config.json").read_text())
        (tmp_path / "tied" / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    data = {"train.py": files["sft"], "dpo.py": files["pairs"], "evaluate": files["test"]}
    flags = [flag.format(base=base, **files) for flag in flags]
    given = ["--model", base] if not {"--from-config"} & set(flags) else ["--full", "--model", base]
    given += ["--data", data[script]] if script in data else []
    given += ["--max-length", 256, "--max-prompt-length", 99][: {"train.py": 2, "dpo.py": 4}.get(script, 0)]
    if script in ("train.py", "dpo.py"):
        given += ["--out", "out", "--steps", 2]
    elif not {"--prompt", "--file"} & set(flags) and script == "infer.py":
        given += ["--prompt", "x", "--max-new-tokens", 4]
    before = tree(tmp_path), tree(base)
    error = error_of(run(script, *given, *flags))
    for part in parts:
        assert part in error
    assert (tree(tmp_path), tree(base)) == before


def test_more_tokens_than_the_model_has(run, base, files, tmp_path):
    shutil.copytree(base, "larger")
    config, size = json.loads(Path("larger/tokenizer_config.json").read_text()), Tokenizer(base).vocab_size
    config["added_tokens_decoder"] = {str(size): {"content": "<|im_end|>", "special": True}}
    Path("larger/tokenizer_config.json").write_text(json.dumps(config))
    before = tree(tmp_path)
    error = error_of(run("train.py", "--model", "larger", "--data", files["sft"], "--out", "out", *SHORT))
    assert "larger" in error and f"{size + 1} tokens" in error and f"the model {size}:" in error
    assert tree(tmp_path) == before


def too_large():
    torch.empty(1 << 52)


@pytest.mark.parametrize("fail", [too_large, "CUDA out of memory. Tried to allocate 2.00 GiB.", MemoryError()])
def test_out_of_memory_is_one_line(run, base, monkeypatch, fail):
    fail = fail if callable(fail) else raiser(RuntimeError(fail) if isinstance(fail, str) else fail)
    monkeypatch.setattr(weights, "load_model", lambda *_: fail())
    error = error_of(run("infer.py", "--model", base, "--prompt", "x"))
    assert "out of memory" in error and "--batch-size" in error and len(error) < 400


def test_a_mistake_is_no_bad_input(run, base, monkeypatch):
    """It has its traceback."""
    monkeypatch.setattr(weights, "load_model", raiser(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1"):
        run("infer.py", "--model", base, "--prompt", "x")


@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_a_last_step_that_diverges_is_not_saved(run, base, files, flags):
    """Its loss was finite: that of the weights before it."""
    flags = ("--model", base, "--data", files["sft"], "--lr", 1e39, "--warmup", 0, "--steps", 1, "--out", "a", *flags)
    code, _, err = run("train.py", *flags)
    assert code == 2 and "is not finite in torch.float32: not saved" in err.splitlines()[-1] and len(records("a")) == 1
    assert not list(Path("a").rglob("*.safetensors"))


def test_a_run_that_diverges_has_its_log_and_nothing_to_load(run, base, files):
    flags = ("--lr", 1e30, "--clip", 0, "--warmup", 0)
    code, _, err = run("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT, *flags, "--steps", 9)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "not finite" in last and f"{files['sft']}:" in last
    assert {file.name for file in Path("a").iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_pipe_without_a_prompt_is_bad_input(run, base):
    assert "empty" in error_of(run("infer.py", "--model", base, stdin="\n \n"))


@pytest.mark.parametrize("flags", [(), ("--full",)], ids=["adapter", "full"])
def test_a_full_disk_is_one_line(run, base, files, flags):
    """A limit on the size of a file fails a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        result = run("train.py", "--model", base, "--data", files["sft"], "--out", "a", *SHORT, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    code, _, err = result
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "a/" in errors[0] and "cannot be written" in errors[0]
    assert "Traceback" not in err
    assert not [file for file in Path("a").rglob("*") if "safetensors" in file.name]


# ---- processes ----


def start(*command, **kwargs) -> subprocess.Popen:
    kinds = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *map(str, command)], **{**kinds, **kwargs})


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_with_130(endless):
    with start(ROOT / "infer.py", "--model", endless, "--prompt", "go", "--max-new-tokens", 500_000) as process:
        assert process.stdout.read(20)  # it streams
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "stopped" and b"Traceback" not in err
    out.decode("utf-8", "strict")  # cut between characters


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_standard_output_that_is_full_or_closed(base):
    common = (ROOT / "infer.py", "--model", base, "--prompt", "go", "--max-new-tokens", 4)
    for command in (common, (ROOT / "infer.py", "--help")):
        with open("/dev/full", "w") as full, start(*command, stdout=full) as process:
            _, err = process.communicate(timeout=60)
        errors = [line for line in err.decode().splitlines() if not line.startswith("minichat: ")]
        assert process.returncode == 2 and len(errors) == 1 and "No space left" in errors[0]
    with start(*common) as process:
        process.stdout.close()  # `infer.py … | head -0`
        err = process.stderr.read()
    assert process.returncode == 1 and b"Traceback" not in err


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command):
        spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        self.process = start("-c", spawn, sys.executable, *command, stdin=subprocess.PIPE, stderr=None)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.__exit__(None, None, None)

    def type(self, text) -> None:
        self.process.stdin.write(text if isinstance(text, bytes) else text.encode())
        self.process.stdin.flush()

    def wait(self) -> None:
        """For anything more that it shows."""
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        new = os.read(self.process.stdout.fileno(), 4096) if ready else b""
        assert new, f"nothing after {self.seen!r}"
        self.seen += new.decode("utf-8", "replace")

    def until(self, wanted: str) -> str:
        """What it shows from here on, up to and with `wanted`."""
        deadline = time.monotonic() + 120
        while wanted not in self.seen:
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.seen[-500:]!r}"
            self.wait()
        shown, self.seen = self.seen.split(wanted, 1)
        return shown + wanted


@pytest.mark.slow
def test_conversation_in_a_terminal(base, endless, tmp_path):
    seeing = tmp_path / "model"  # all of a conversation: a window of 16 would forget the history by itself
    shutil.copytree(base, seeing)
    raw = json.loads((seeing / "config.json").read_text())
    (seeing / "config.json").write_text(json.dumps({**raw, "sliding_window": None}))
    with Terminal(ROOT / "infer.py", "--model", seeing, "--max-new-tokens", "12") as talk:

        def asked(text) -> str:
            """What comes before the next time that it asks, without the line of numbers."""
            talk.until("you> ")
            talk.type(text)
            talk.until("\n")  # the echo
            return talk.until("\n")

        first, again = asked("add 1 and 2\n"), asked("add 1 and 2\n")
        assert first != again  # the same words, but after a history
        assert "UTF-8" in asked(b"\xff\xfe\n")
        assert "forgotten" in asked("/new\n") and "/exit" in asked("/help\n")
        assert asked("add 1 and 2\n") == first
        asked("9 " * 600 + "\n")  # forgets the history, and does not fit even so
        talk.until("error: the prompt has")
        talk.until("you> ")
        talk.type("\x04")
        assert talk.process.wait(30) == 0

    with Terminal(ROOT / "infer.py", "--model", endless, "--max-new-tokens", "500000") as talk:
        talk.until("you> ")
        talk.type("go on\n")
        talk.until("\n")
        talk.wait()  # it streams
        talk.type("\x03")
        talk.until("(stopped)")
        talk.until("you> ")
        time.sleep(1)  # Python misses a signal between its prompt and its read; nobody types that fast
        talk.type("half a line\x03")
        talk.until("Ctrl-D the conversation")
        talk.until("you> ")
        talk.type("/exit\n")
        assert talk.process.wait(30) == 0


@pytest.mark.slow
def test_the_embedded_default(tmp_path):
    """The three commands with no other flag than a few steps, one after the other."""

    def command(script, *flags):
        with start(ROOT / script, *flags, cwd=tmp_path) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        return out.decode(), err.decode()

    command("train.py", "--steps", 2)
    flags = json.loads((tmp_path / "runs/sft/config.json").read_text())["flags"]
    words = shlex.split((cli.BASE.parent / "sft.args").read_text(), comments=True)
    assert {"--lr", "--lora-r"} <= set(words)
    for name, value in zip(words[::2], words[1::2]):
        assert flags[name.removeprefix("--").replace("-", "_")] == float(value), name
    _, err = command("dpo.py", "--steps", 2)
    assert f"merged {tmp_path / 'runs/sft/adapter'}" in err or "merged runs/sft/adapter" in err
    assert records(tmp_path / "runs/dpo")[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert {"sft", "dpo"} == {file.name for file in (tmp_path / "runs").iterdir()}
    for run_folder, count in (("sft", 5000), ("dpo", 1000)):
        names = {file.name for file in (tmp_path / "runs" / run_folder).iterdir()}
        assert names == {"config.json", "metrics.jsonl", "loss.png", "adapter", "data.jsonl"}
        assert len((tmp_path / "runs" / run_folder / "data.jsonl").read_text().splitlines()) == count
    out, err = command("infer.py", "--int4", "--prompt", "calculate 100 + 520 + 60", "--max-new-tokens", 16)
    assert out.strip() and "loading runs/dpo" in err and "int4" in err and "tokens/s" in err and "GiB" in err
