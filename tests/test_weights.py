"""Folders both ways against transformers, adapters over them, memory, and one line for what is wrong with a file."""

import errno
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import make
from safetensors.torch import load_file, save_file

import minichat
from minichat import int4, lora, weights
from minichat.cli import BASE
from minichat.errors import BadInput
from minichat.int4 import Scheme
from minichat.tokenizer import Tokenizer

SHARDED = dict(shard_bytes=100_000)
VOCAB = Tokenizer(BASE).vocab_size
IDS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))  # past the window of 16


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model(IDS)
    return (found if torch.is_tensor(found) else found.logits).float()


def small(**changes):
    """A random model of the shipped tokenizer's vocabulary, whose widths groups of 32 divide."""
    shape = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, head_dim=16, sliding_window=16)
    return make(**{**shape, "max_position_embeddings": 512, **changes})


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


def opened(folder, **kwargs):
    """transformers' model of a folder, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kwargs)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def edit(folder, change, name="model.safetensors"):
    """Rewrite the tensors of a file by change(tensors)."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_json(file, change):
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


@pytest.fixture(scope="session")
def packed(base, tmp_path_factory):
    """An INT4 folder that minichat wrote."""
    folder = tmp_path_factory.mktemp("packed")
    minichat.save(*minichat.load(base, int4=True), folder)
    return folder


def one_line(call, *parts):
    with pytest.raises(BadInput) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    for part in parts:
        assert str(part) in message, message


# ---- what transformers wrote ----


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize(
    "kind, changes",
    [
        ("Mistral", {"sliding_window": 16}),
        ("Mistral", {"sliding_window": None, "rope_theta": 1e6}),
        ("Mistral", {"tie_word_embeddings": True}),
        ("Llama", {}),
    ],
    ids=["window", "no window", "tied", "llama"],
)
def test_transformers_folder_loads_with_equal_logits(tmp_path, shard, kind, changes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        initializer_range=0.3,
        **changes,
    )
    config._attn_implementation = "eager"
    other = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    other.save_pretrained(tmp_path, max_shard_size=shard)
    transformers.AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    assert (tmp_path / weights.INDEX).exists() == (shard == "60KB")
    model, tokenizer = minichat.load(tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-4)
    assert tokenizer.encode("calculate 1 + 23") == Tokenizer(BASE).encode("calculate 1 + 23")


# ---- what minichat writes ----


@pytest.mark.parametrize(
    "changes, flags",
    [
        ({}, {}),
        ({}, SHARDED),
        ({"tie_word_embeddings": True}, SHARDED),
        ({"architecture": "LlamaForCausalLM", "sliding_window": None}, {}),
        ({"sliding_window": None, "head_dim": 32, "rope_theta": 5e5}, SHARDED),
    ],
    ids=["single", "sharded", "tied", "llama", "head_dim"],
)
def test_transformers_opens_what_minichat_saves(tmp_path, changes, flags):
    model, tokenizer = small(**changes), Tokenizer(BASE)
    minichat.save(model, tokenizer, tmp_path, **flags)
    assert (tmp_path / weights.INDEX).exists() == bool(flags)
    other, theirs = opened(tmp_path)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-4)
    text = "### User:\ncalculate 100 + 520 + 60</s>\né"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert [theirs.bos_token_id, theirs.eos_token_id] == [tokenizer.bos_id, tokenizer.eos_id]
    generation = pytest.importorskip("transformers").GenerationConfig.from_pretrained(tmp_path)
    assert [generation.bos_token_id, generation.eos_token_id] == [1, 2]
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("flags", [{}, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bitwise(tmp_path, dtype, flags):
    model, tokenizer = small().to(dtype), Tokenizer(BASE)
    minichat.save(model, tokenizer, tmp_path / "a", **flags)
    again, _ = minichat.load(tmp_path / "a", dtype=dtype)
    assert again.config == model.config and again.dtype == dtype
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    minichat.save(again, tokenizer, tmp_path / "b", **flags)
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert files == {file.name for file in (tmp_path / "b").iterdir()}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_files_have_the_permissions_of_any_new_file(base, tmp_path):
    """Not only their owner's: a model is installed by one user and read by others."""
    adapt(base, tmp_path / "adapter", 1)
    (tmp_path / "any").touch()
    for file in (base / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"):
        assert file.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_bf16_file_is_fp32_on_the_cpu(tmp_path):
    """Widening is exact; the dtype of a save is what was asked for, whatever the model has."""
    minichat.save(small(), Tokenizer(BASE), tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    model, _ = minichat.load(tmp_path, device="cpu")
    assert model.dtype == torch.float32
    for name, weight in small().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float())
    other, _ = opened(tmp_path)
    assert other.dtype == torch.bfloat16


def test_tied_model_ignores_a_head_in_the_file(tmp_path):
    minichat.save(small(tie_word_embeddings=True), Tokenizer(BASE), tmp_path)
    expected = logits(minichat.load(tmp_path)[0])
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = minichat.load(tmp_path)
    assert torch.equal(logits(model), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_is_not_quantised_and_that_is_told(tmp_path):
    minichat.save(small(tie_word_embeddings=True), Tokenizer(BASE), tmp_path)
    with pytest.raises(BadInput, match="its head is its embedding.* leave out --lm-head"):
        minichat.load(tmp_path, int4=Scheme(skip=()))
    assert isinstance(minichat.load(tmp_path, int4=True)[0].lm_head, torch.nn.Linear)
    with pytest.raises(BadInput, match="its head is its embedding"):
        int4.quantize(small(tie_word_embeddings=True), skip=())


def test_rotary_buffers_of_old_llama_files_are_ignored(base, tmp_path):
    folder = copied(base, tmp_path / "old")
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(minichat.load(folder)[0]), logits(minichat.load(base)[0]))


def test_saving_over_a_folder_leaves_nothing_of_the_old_one(tmp_path):
    tokenizer = Tokenizer(BASE)
    for model, flags in ((small(num_hidden_layers=3), SHARDED), (small(seed=1), SHARDED), (small(seed=2), {})):
        minichat.save(model, tokenizer, tmp_path, **flags)
        found, again = minichat.load(tmp_path)
        assert torch.equal(logits(found), logits(model)) and again.chat_template == tokenizer.chat_template
        (tmp_path / "chat_template.jinja").write_text("of a tokenizer that had one")
        index = tmp_path / weights.INDEX
        listed = set(json.loads(index.read_text())["weight_map"].values()) if flags else {"model.safetensors"}
        assert {file.name for file in tmp_path.glob("*.safetensors")} == listed
        assert index.exists() == bool(flags)


def full_disk(monkeypatch, failing):
    """From now on the disk is full where a file called `failing` is opened."""

    def patch(owner, name, at, error):
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            if Path(args[at]).name == failing:
                raise error
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    full = OSError(errno.ENOSPC, "No space left on device")
    patch(shutil, "copyfile", 1, full)
    patch(Path, "open", 0, full)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    """At whichever file: shards have the same names, so that a half of the new ones would go unnoticed."""
    model, tokenizer = small(seed=0), Tokenizer(BASE)
    minichat.save(model, tokenizer, tmp_path, **SHARDED)
    before = contents(tmp_path)
    assert {weights.INDEX, "config.json", "generation_config.json", "tokenizer.json"} < before.keys()
    new = small(seed=1, rope_theta=5e5)
    for name in before:
        with monkeypatch.context() as patch:
            full_disk(patch, name)
            save = partial(minichat.save, new, tokenizer, tmp_path, template="{{ 1 }}", stop_ids=(2, 300), **SHARDED)
            one_line(save, tmp_path, "cannot be written", "No space left")
        assert contents(tmp_path) == before, name
    assert torch.equal(logits(minichat.load(tmp_path)[0]), logits(model))


def test_an_adapters_save_that_fails_leaves_the_old_one(base, tmp_path, monkeypatch):
    adapt(base, tmp_path, 1)
    before = contents(tmp_path)
    for name in (lora.WEIGHTS, lora.CONFIG):
        with monkeypatch.context() as patch:
            full_disk(patch, name)
            one_line(lambda: adapt(base, tmp_path, 2), tmp_path, "cannot be written", "No space left")
        assert contents(tmp_path) == before, name
    adapt(base, tmp_path, 2)
    assert {*contents(tmp_path)} == {*before} and contents(tmp_path) != before


def test_saving_over_the_folder_that_the_model_was_read_from(base, tmp_path):
    """Its tensors may be mapped from the very files that are replaced."""
    folder = copied(base, tmp_path / "model")
    model, tokenizer = minichat.load(folder)
    expected = logits(model)
    minichat.save(model, tokenizer, folder, **SHARDED)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(minichat.load(folder)[0]), expected)


def test_an_unmerged_adapter_is_not_dropped_by_a_save(base, tmp_path):
    model, tokenizer = minichat.load(base)
    lora.attach(model, r=2)
    one_line(lambda: minichat.save(model, tokenizer, tmp_path / "new"), "unmerged adapter")
    assert not (tmp_path / "new").exists()


# ---- INT4 ----

SCHEMES = {
    "int4": Scheme(4, 32),
    "int8": Scheme(8, 32),
    "group 64": Scheme(4, 64, skip=("lm_head", "re:.*down_proj")),  # 96 is no multiple of 64
    "int4 asymmetric": Scheme(4, 32, symmetric=False),
    "int8 asymmetric": Scheme(8, 32, symmetric=False),
    "with the head": Scheme(4, 32, skip=()),
}


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.symmetric], ids=str)
def test_transformers_opens_our_int4_folder(base, tmp_path, scheme, monkeypatch):
    pytest.importorskip("compressed_tensors")
    monkeypatch.setenv("MINICHAT_KERNEL", "reference")  # which rounds no activations
    model, tokenizer = minichat.load(base, int4=scheme)
    minichat.save(model, tokenizer, tmp_path)
    other, _ = opened(tmp_path, dtype=torch.float32)
    assert logits(model).std() > 1  # of a size that the tolerance says something about
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_reads_our_asymmetric_linears(base, tmp_path, bits):
    """Linear by linear: of the releases up to 0.20, none lets transformers open an asymmetric folder, its own neither
    (it makes room for zero-points as if they were not packed)."""
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    model, tokenizer = minichat.load(base, int4=Scheme(bits, 32, symmetric=False))
    minichat.save(model, tokenizer, tmp_path)
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    tensors = load_file(tmp_path / "model.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, int4.Int4Linear)}
    assert len(layers) == 14
    for name, module in layers.items():
        state = {key: tensors[f"{name}.{key}"] for key in int4.KEYS}
        state["weight_scale"] = state["weight_scale"].float()
        weight = theirs.decompress(state, QuantizationScheme(**group))["weight"]
        torch.testing.assert_close(weight, module.dequantize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_int4_folder_loads_as_it_is(base, tmp_path, scheme):
    """With no flag, with --int4, and bit for bit; quantising while reading is quantising afterwards."""
    model, tokenizer = minichat.load(base, int4=scheme)
    minichat.save(model, tokenizer, tmp_path / "a", shard_bytes=40_000)
    again, _ = minichat.load(tmp_path / "a")
    assert again.scheme == model.scheme == scheme
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(minichat.load(tmp_path / "a", int4=True)[0]), logits(model))
    minichat.save(again, tokenizer, tmp_path / "b", shard_bytes=40_000)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name

    after, _ = minichat.load(base)
    int4.quantize(after, scheme.group_size, scheme.bits, scheme.symmetric, scheme.skip)
    assert torch.equal(logits(after), logits(model))
    assert not torch.equal(logits(after), logits(minichat.load(base)[0]))


def test_int4_of_a_bf16_file_is_that_of_its_values(tmp_path):
    """Quantised from what the file holds, not from what the device's dtype makes of it."""
    minichat.save(small(), Tokenizer(BASE), tmp_path, dtype=torch.bfloat16)
    found = minichat.load(tmp_path, dtype=torch.bfloat16, int4=True)[0]
    expected = int4.quantize(minichat.load(tmp_path, dtype=torch.bfloat16)[0])
    name = "model.layers.1.mlp.down_proj"
    for a, b in zip(found.get_submodule(name).unpack(), expected.get_submodule(name).unpack()):
        assert a is b is None or torch.equal(a, b)


# ---- adapters ----


def adapt(source, folder, seed, **flags):
    """Train nothing: a random adapter over `source`, written as a run writes it; the adapted model."""
    model, _ = minichat.load(source, **flags)
    lora.attach(model, r=4, alpha=8, seed=seed)
    for i, module in enumerate(lora.adapted(model).values()):
        module.lora_B.weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(100 * seed + i))
    metadata = {"base_fingerprint": model.identity}
    if model.scheme:
        metadata["int4"] = str(model.scheme)
    lora.save(model, folder, base=model.source, metadata=metadata)
    return model


def test_an_adapter_folder_is_a_model(base, tmp_path, capsys):
    first = adapt(base, tmp_path / "first", 1)
    assert not torch.allclose(logits(first), logits(minichat.load(base)[0]), atol=0.1)
    loaded, _ = minichat.load(tmp_path / "first")
    assert capsys.readouterr().err.count("merged") == 1
    torch.testing.assert_close(logits(loaded), logits(first), rtol=0, atol=1e-4)
    beside, _ = minichat.load(base, adapter=tmp_path / "first")
    assert torch.equal(logits(beside), logits(loaded))
    lora.merge(first)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=1e-6)

    second = adapt(tmp_path / "first", tmp_path / "second", 2)
    both, _ = minichat.load(tmp_path / "second")
    torch.testing.assert_close(logits(both), logits(second), rtol=0, atol=1e-4)
    assert not torch.allclose(logits(both), logits(first), atol=0.1)
    assert [a.folder.name for a in weights.chain(tmp_path / "second")[1]] == ["first", "second"]
    # quantised while it is read: the merged weight, not the base's
    quantised, _ = minichat.load(tmp_path / "second", int4=True)
    assert torch.equal(logits(quantised), logits(int4.quantize(both)))


def test_merging_rounds_once(base, tmp_path):
    """bf16: two adapters are added in float32 and rounded at the end."""
    adapt(base, tmp_path / "first", 1)
    adapt(tmp_path / "first", tmp_path / "second", 2)
    found, _ = minichat.load(tmp_path / "second", dtype=torch.bfloat16)
    exact, _ = minichat.load(tmp_path / "second", dtype=torch.float32)
    for name, weight in exact.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.bfloat16()), name


def test_a_run_folder_is_a_model(base, tmp_path):
    run = tmp_path / "run"
    expected = adapt(base, run / "adapter", 1)
    (run / "config.json").write_text('{"minichat": "0.1.0"}')  # of the run's flags
    torch.testing.assert_close(logits(minichat.load(run)[0]), logits(expected), rtol=0, atol=1e-4)


def test_another_base_is_refused_unless_it_is_named(base, tmp_path, capsys):
    folder = copied(base, tmp_path / "base")
    adapt(folder, tmp_path / "adapter", 1)
    minichat.load(tmp_path / "adapter")
    minichat.load(folder, adapter=tmp_path / "adapter")
    assert "other weights" not in capsys.readouterr().err
    edit(folder, lambda t: t["lm_head.weight"].add_(1))
    one_line(lambda: minichat.load(tmp_path / "adapter"), tmp_path / "adapter", "other weights", "--adapter")
    minichat.load(folder, adapter=tmp_path / "adapter")
    said = [line for line in capsys.readouterr().err.splitlines() if "other weights" in line]
    assert len(said) == 1 and str(folder) in said[0] and str(tmp_path / "adapter") in said[0]
    shutil.rmtree(folder)
    one_line(lambda: minichat.load(tmp_path / "adapter"), tmp_path / "adapter", folder, "--adapter")


def test_another_shard_is_another_base(tmp_path):
    """Whichever of them it is."""
    minichat.save(small(), Tokenizer(BASE), tmp_path, **SHARDED)
    found = [weights.identity(tmp_path)]
    for shard in sorted(tmp_path.glob("*.safetensors")):
        edit(tmp_path, lambda t: [tensor.mul_(2) for tensor in t.values()], shard.name)
        found.append(weights.identity(tmp_path))
    assert len(found) > 3 and len(set(found)) == len(found)


def test_an_adapter_over_itself_ends(base, tmp_path):
    adapt(base, tmp_path / "a", 1)
    edit_json(tmp_path / "a" / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(tmp_path / "a")))
    edit(tmp_path / "a", lambda t: None, "adapter_model.safetensors")  # and no fingerprint
    one_line(lambda: minichat.load(tmp_path / "a"), tmp_path / "a")


def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path):
    adapt(base, tmp_path / "a", 1)
    deeper = tmp_path / "other"
    minichat.save(small(num_hidden_layers=1), Tokenizer(BASE), deeper)
    one_line(lambda: minichat.load(deeper, adapter=tmp_path / "a"), tmp_path / "a", "layers.1", deeper)
    minichat.save(small(intermediate_size=128), Tokenizer(BASE), deeper)
    one_line(lambda: minichat.load(deeper, adapter=tmp_path / "a"), tmp_path / "a", "mlp", "128", "96")


def test_adapter_over_int4_stays_beside_it(base, packed, tmp_path, capsys):
    trained = adapt(base, tmp_path / "q", 1, int4=True)
    capsys.readouterr()
    loaded, _ = minichat.load(tmp_path / "q", int4=True)
    assert capsys.readouterr().err == ""
    assert len(lora.adapted(loaded)) == 14 and loaded.scheme == Scheme()
    assert torch.equal(logits(loaded), logits(trained))

    merged, _ = minichat.load(tmp_path / "q")  # into the float weights: says so
    assert capsys.readouterr().err.count("was trained over quantised weights") == 1
    assert not lora.adapted(merged) and merged.scheme is None
    edited = copied(base, tmp_path / "edited")
    edit(edited, lambda t: t["lm_head.weight"].add_(1))
    minichat.load(edited, adapter=tmp_path / "q", int4=True)
    assert capsys.readouterr().err.count("trained over other weights") == 1
    other, _ = minichat.load(tmp_path / "q", int4=Scheme(8))
    assert capsys.readouterr().err.count("was trained over quantised weights") == 1
    assert not lora.adapted(other)

    # over a folder that is INT4 on disk there is but one way
    trained = adapt(packed, tmp_path / "p", 2)
    assert torch.equal(logits(minichat.load(tmp_path / "p")[0]), logits(trained))
    adapt(base, tmp_path / "f", 3)
    told = packed, tmp_path / "f", "cannot be merged", "minichat.lora merge"
    one_line(lambda: minichat.load(packed, adapter=tmp_path / "f"), *told)
    one_line(lambda: weights.load_model(packed, "cpu", None, False, tmp_path / "f", shapes_alone=True), *told)


# ---- memory ----

PEAK = """
import ctypes, gc, sys, torch
from pathlib import Path
from minichat import weights
torch.set_num_threads(1)

def mib(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) / 1024

weights.load_model(sys.argv[2], int4=True)  # imports, kernels
for int4 in (True, False):
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)  # give back what the last one freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = mib("VmRSS")
    model, _ = weights.load_model(sys.argv[1], dtype=torch.float32, int4=int4)
    print(mib("VmHWM") - before)
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_loading_takes_the_model_and_one_tensor(base, tmp_path):
    """80 MiB of bf16 as fp32, and as INT4: never the file and the model at a time."""
    shape = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, head_dim=64)
    model = small(**shape).to(torch.bfloat16)
    minichat.save(model, Tokenizer(BASE), tmp_path, shard_bytes=50_000_000)
    mib = sum(p.numel() for p in model.parameters()) / 2**20
    head = 2 * VOCAB * 1024 / 2**20  # the embedding and the head stay float
    largest = 2048 * 1024 / 2**20
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, base], capture_output=True, text=True, check=True, timeout=300
    )
    quantised, full = map(float, done.stdout.split())
    assert mib * 4 * 0.8 < full < mib * 4 + largest * (2 + 4) + 16
    # one tensor's temporaries: as read, as float32, codes, and the errors of the scales that are tried
    assert quantised < (mib - head) * (4 + 16 / 32) / 8 + head * 4 + largest * 20
    assert quantised < mib * 2  # below the file, far below the model


# ---- what can be wrong ----


def drop(name):
    return lambda f: edit(f, lambda t: t.pop(name))


def put(name, tensor):
    return lambda f: edit(f, lambda t: t.update({name: tensor}))


def config(**changes):
    return lambda f: edit_json(f / "config.json", lambda c: c.update(changes))


def sharded(change):
    def make_index(folder):
        minichat.save(small(), Tokenizer(BASE), folder, **SHARDED)
        edit_json(folder / weights.INDEX, change)

    return make_index


def test_one_file_goes_before_an_index_of_shards(tmp_path):
    """transformers saves so over a folder of shards: it deletes them and leaves their index."""
    tokenizer = Tokenizer(BASE)
    old, new = (make(seed=seed, vocab_size=tokenizer.vocab_size) for seed in (0, 1))
    minichat.save(old, tokenizer, tmp_path, shard_bytes=50_000)
    for gone in (False, True):
        minichat.save(new, tokenizer, tmp_path / "new")
        shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
        for shard in tmp_path.glob("model-*") if gone else ():
            shard.unlink()
        assert torch.equal(weights.load_model(tmp_path, "cpu")[0].lm_head.weight, new.lm_head.weight)


def test_a_model_that_is_saved_over_an_adapter_is_what_is_there(tmp_path):
    tokenizer = Tokenizer(BASE)
    model = make(vocab_size=tokenizer.vocab_size)
    minichat.save(model, tokenizer, tmp_path / "base")
    lora.attach(model, 4, 8)
    lora.save(model, tmp_path / "run", base=str(tmp_path / "base"))
    whole, _ = weights.load_model(tmp_path / "run", "cpu")
    with torch.no_grad():
        whole.lm_head.weight.mul_(2)
    minichat.save(whole, tokenizer, tmp_path / "run")
    assert torch.equal(weights.load_model(tmp_path / "run", "cpu")[0].lm_head.weight, whole.lm_head.weight)


def rename(index):
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "model-00009-of-00002.safetensors"


def climb(index):
    index["weight_map"]["lm_head.weight"] = "../model.safetensors"


def misplaced(index):
    index["weight_map"]["lm_head.weight"] = min(index["weight_map"].values())  # it is in the last one


def truncate(share):
    def cut(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(len(content) * share)])

    return cut


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write(name, content):
    return lambda f: (f / name).write_bytes(content)


Q = "model.layers.1.self_attn.q_proj"
BAD = {
    "missing": (drop(f"{Q}.weight"), ["{folder}", f"{Q}.weight", "missing"]),
    "no layer": (config(num_hidden_layers=3), ["{folder}", "model.layers.2", "missing"]),
    "unexpected": (put("model.layers.1.self_attn.q_proj.bias", torch.ones(4)), ["model.safetensors", "q_proj.bias"]),
    "too many layers": (config(num_hidden_layers=1), ["model.safetensors", "model.layers.1"]),
    "shape": (put(f"{Q}.weight", torch.ones(64, 65)), ["model.safetensors", f"{Q}.weight", "(64, 65)", "(64, 64)"]),
    "transposed": (config(intermediate_size=64), ["model.safetensors", "mlp", "(96, 64)"]),
    "integers": (put(f"{Q}.weight", torch.ones(64, 64, dtype=torch.int8)), ["model.safetensors", f"{Q}.weight"]),
    "truncated": (truncate(0.6), ["model.safetensors", "download"]),
    "truncated header": (truncate(0.001), ["model.safetensors", "download"]),
    "empty file": (truncate(0), ["model.safetensors", "download"]),
    "git-lfs pointer": (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), ["download"]),
    "long header": (write("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}" * 90), ["model.safetensors"]),
    "broken header": (write("model.safetensors", (90).to_bytes(8, "little") + b"{]" * 60), ["model.safetensors"]),
    "missing shard": (sharded(rename), ["model-00009-of-00002.safetensors", "download"]),
    "path traversal": (sharded(climb), [weights.INDEX, "'../model.safetensors'"]),
    "wrong shard": (sharded(misplaced), ["model-00001-of-", "lm_head.weight"]),
    "empty index": (sharded(lambda i: i.update(weight_map={})), [weights.INDEX, "weight_map"]),
    "no weight_map": (sharded(lambda i: i.pop("weight_map")), [weights.INDEX, "weight_map"]),
    "index of lists": (sharded(lambda i: i.update(weight_map={"a": [1]})), [weights.INDEX, "weight_map"]),
    "pickle only": (pickled, ["pytorch_model.bin", "pickle", "safetensors"]),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), ["{folder}", "model.safetensors"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["{folder}", "config.json"]),
    "config is no JSON": (write("config.json", b"{not json"), ["config.json", "not JSON"]),
    "config is bytes": (write("config.json", b"\xff\xfe\x00"), ["config.json", "not JSON"]),
    "config is a list": (write("config.json", b"[1]"), ["{folder}", "list"]),
    "another architecture": (config(architectures=["GPT2LMHeadModel"]), ["{folder}", "GPT2LMHeadModel"]),
    "scaled rope": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ["{folder}", "yarn"]),
    "awq": (config(quantization_config={"quant_method": "awq"}), ["{folder}", "awq"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["{folder}", "tokenizer.json"]),
    "no end token": (write("tokenizer_config.json", b'{"eos_token": null}'), ["{folder}", "eos_token"]),
    "broken tokenizer": (write("tokenizer.json", b'{"model": 3}'), ["tokenizer.json", "download"]),
}


@pytest.mark.parametrize("break_it, parts", BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_folder_is_one_line(base, tmp_path, break_it, parts):
    folder = copied(base, tmp_path / "model")
    break_it(folder)
    one_line(lambda: minichat.load(folder), *[part.format(folder=folder) for part in parts])


P = "model.layers.0.mlp.down_proj"
BAD_PACKED = {
    "no scale": (drop(f"{P}.weight_scale"), ["model.safetensors", P, "weight_scale"]),
    "no codes": (drop(f"{P}.weight_packed"), [P, "missing"]),
    "scale shape": (put(f"{P}.weight_scale", torch.ones(64, 4)), ["model.safetensors", P, "weight_scale", "(64, 3)"]),
    "scale nan": (put(f"{P}.weight_scale", torch.full((64, 3), torch.nan)), ["model.safetensors", P, "NaN"]),
    "codes dtype": (put(f"{P}.weight_packed", torch.ones(64, 12)), ["model.safetensors", P, "weight_packed"]),
    "codes shape": (put(f"{P}.weight_packed", torch.ones(64, 24, dtype=torch.int32)), ["model.safetensors", P]),
    "shape": (put(f"{P}.weight_shape", torch.tensor([96, 64])), ["model.safetensors", P, "[96, 64]"]),
    "zero points": (put(f"{P}.weight_zero_point", torch.ones(8, 3, dtype=torch.int32)), ["model.safetensors", P]),
    "stray": (put("lm_head.weight_scale", torch.ones(2)), ["model.safetensors", "lm_head.weight_scale"]),
    "not said": (lambda f: edit_json(f / "config.json", lambda c: c.pop("quantization_config")), ["missing"]),
}


@pytest.mark.parametrize("break_it, parts", BAD_PACKED.values(), ids=BAD_PACKED)
def test_what_is_wrong_with_an_int4_folder_is_one_line(packed, tmp_path, break_it, parts):
    folder = copied(packed, tmp_path / "model")
    break_it(folder)
    one_line(lambda: minichat.load(folder), *parts)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "objects"])
def test_a_config_that_is_nested_without_end_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    one_line(lambda: minichat.load(tmp_path), tmp_path / "config.json", "not JSON")


@pytest.mark.parametrize("named", [None, "", 1, True, ["a"], {"a": 1}, "a" * 300, "~nobody-of-this-name", "a\0"])
def test_an_adapter_that_names_no_base_is_one_line(base, tmp_path, named):
    model, _ = minichat.load(base)
    lora.save(lora.attach(model, r=2), tmp_path, "x")
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(base_model_name_or_path=named))
    one_line(lambda: minichat.load(tmp_path), tmp_path, "base", "give it: --model BASE --adapter")


def test_a_folder_that_may_not_be_searched_is_one_line(base, tmp_path, monkeypatch):
    def denied(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)
    one_line(lambda: minichat.load(base), base, "Permission denied")
    one_line(lambda: Tokenizer(base), base / "tokenizer.json", "Permission denied")


def test_what_is_wrong_with_a_request_is_one_line(base, packed, tmp_path):
    one_line(lambda: minichat.load(base, int4=Scheme(4, 64)), base, "down_proj", "96", "64")
    one_line(lambda: minichat.load(packed, int4=Scheme(8, 32)), packed, "int4 in groups of 32", "int8")
    one_line(lambda: minichat.load(tmp_path / "none"), tmp_path / "none", "no such folder")
    one_line(lambda: minichat.load("a" * 300), "aaa", "File name too long")
    one_line(lambda: minichat.load("~nobody-of-this-name/model"), "~nobody-of-this-name/model", "home")
    one_line(lambda: minichat.load(base / "config.json"), base / "config.json", "a file")
    one_line(lambda: minichat.load("no/such/model"), "no/such/model")
    one_line(lambda: minichat.load(tmp_path), tmp_path, "config.json")
    one_line(lambda: minichat.load(base, adapter=base), base, "adapter_config.json")
    one_line(lambda: minichat.load(base, device="tpu"), "tpu", "cpu")
