"""An INT4 model from the cache is the one that was put there."""

import itertools

import pytest
import torch
from test_tokenizer import write

from minichat import files, int4, lora, packed, save, weights
from minichat.errors import BadInput
from minichat.generation import generate
from minichat.kernels import cpu
from minichat.model import Config, Mistral
from minichat.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    built = cpu._build()  # before the cache is another one
    monkeypatch.setattr(packed, "LARGE", 0)
    monkeypatch.setenv("MINICHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "_build", lambda: built)
    tokenizer = Tokenizer(write(tmp_path / "tokenizer"))
    model = Mistral(Config(tokenizer.vocab_size, 128, 128, 2, 4, 2, 32, 16, 512, rope_theta=500.0))
    model.init_weights(0)
    save(model.bfloat16(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "packed").glob("*/model.safetensors"))


def load(folder, **options):
    return packed.load_model(str(folder), "cpu", None, options.pop("int4", True), **options)[0]


def same(a, b):
    assert str(a) == str(b)
    for one, other in zip(a.modules(), b.modules()):
        pairs = zip(one.unpack(), other.unpack()) if isinstance(one, int4.Int4Linear) else ()
        if not all(x is y is None or torch.equal(x, y) for x, y in pairs):
            return False
    return generate(a, [[3, 4, 5]], 30, stop_ids=()) == generate(b, [[3, 4, 5]], 30, stop_ids=())


@pytest.mark.parametrize(
    "scheme",
    [
        True,
        int4.Scheme(8, 64),
        int4.Scheme(4, 32, False),
        int4.Scheme(skip=()),
        int4.Scheme(4, 64, True, ("re:.*lm_head",)),
    ],
)
def test_the_second_start_is_the_first(folder, tmp_path, scheme, monkeypatch):
    first = load(folder, int4=scheme)
    assert len(kept(tmp_path)) == 1
    plain = weights.load_model(folder, "cpu", None, scheme)[0]
    for one, other in zip(first.model.modules(), plain.model.modules()):
        if isinstance(one, int4.Int4Linear):
            assert torch.equal(one.unpack()[0], other.unpack()[0]) and torch.equal(one.unpack()[1], other.unpack()[1])
    ids = torch.arange(len(plain.model.embed_tokens.weight)).view(1, -1)
    assert torch.equal(first.model.embed_tokens(ids).float(), plain.model.embed_tokens(ids))
    head = plain.lm_head.dequantize() if isinstance(plain.lm_head, int4.Int4Linear) else plain.lm_head.weight
    assert (first.lm_head.dequantize() - head).norm() / head.norm() < 0.01
    monkeypatch.setattr(weights, "load_model", None)  # nothing is quantised again
    assert same(first, load(folder, int4=scheme))


@pytest.mark.parametrize("width", [128, 192, 96])
def test_a_head_that_is_the_embedding(folder, tmp_path, width, monkeypatch):
    """As of small models, whose width may be no multiple of 128: a model of its own scheme, and the head in 8 bits."""
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    heads = width // 32
    config = Config(tokenizer.vocab_size, width, 128, 2, heads, heads, 32, 16, 512, tie_word_embeddings=True)
    model = Mistral(config)
    model.init_weights(0)
    save(model, tokenizer, tmp_path / "tied")
    first = load(tmp_path / "tied")
    assert len(kept(tmp_path)) == 1 and first.lm_head.bits == 8
    table = model.model.embed_tokens.weight
    assert (first.lm_head.dequantize() - table).norm() / table.norm() < 0.01
    monkeypatch.setattr(weights, "load_model", None)
    assert same(first, load(tmp_path / "tied"))


def test_what_the_first_start_warns_of_the_second_does_too(folder, tmp_path, capsys):
    base = weights.load_model(folder, "cpu")[0]
    lora.attach(base, 4, 8)
    lora.save(base, tmp_path / "adapter", base=str(folder), metadata={"base_fingerprint": base.identity})
    file = folder / "model.safetensors"
    changed = {name: tensor * 1.01 for name, tensor in files.read_tensors(file).items()}
    files.write_tensors(changed, file)
    for _ in range(2):
        capsys.readouterr()
        load(folder, adapter=str(tmp_path / "adapter"))
        assert "was trained over other weights than" in capsys.readouterr().err
    assert len(kept(tmp_path)) == 1


def test_other_weights_adapters_and_schemes_are_other_files(folder, tmp_path):
    load(folder)
    load(folder, int4=int4.Scheme(8))
    assert len(kept(tmp_path)) == 2
    base = weights.load_model(folder, "cpu")[0]
    lora.attach(base, 4, 8)
    for name, parameter in base.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    lora.save(base, tmp_path / "adapter", base=str(folder))
    adapted = load(folder, adapter=str(tmp_path / "adapter"))
    assert len(kept(tmp_path)) == 3
    assert not same(adapted, load(folder))
    assert same(adapted, load(folder, adapter=str(tmp_path / "adapter")))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    assert not same(adapted, load(folder, adapter=str(tmp_path / "adapter")))


def test_a_quantised_folder_keeps_its_scheme(folder, tmp_path):
    model, tokenizer = weights.load_model(folder, "cpu", None, True)
    save(model, tokenizer, tmp_path / "quantised")
    load(tmp_path / "quantised")
    with pytest.raises(BadInput, match="quantised already"):
        load(tmp_path / "quantised", int4=int4.Scheme(8))


def test_only_int4_on_the_cpu_is_kept(folder, tmp_path, monkeypatch):
    assert isinstance(load(folder, int4=False).lm_head, torch.nn.Linear)
    packed.load_model(str(folder), "cpu", torch.bfloat16, True)
    monkeypatch.setattr(packed, "LARGE", 1 << 30)
    assert isinstance(load(folder).lm_head, int4.Int4Linear)  # small ones are not, but are what they would be
    monkeypatch.setenv("MINICHAT_KERNEL", "reference")
    load(folder)
    assert not kept(tmp_path)


@pytest.mark.parametrize(
    "damage", [b"", b"\x08", b"\xff" * 100, None, "header"], ids=("empty", "short", "noise", "cut", "header")
)
def test_a_damaged_file_is_named(folder, tmp_path, damage):
    load(folder)
    [file] = kept(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(
        whole[:-5000] if damage is None else whole.replace(b"I32", b"I99") if damage == "header" else damage
    )
    with pytest.raises(BadInput, match="delete it") as error:
        load(folder)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, how",
    [
        *itertools.product(("model.norm.weight", "zero", "scale", "codes"), ("shape", "dtype", "dimension")),
        *(
            ("model.embed_tokens.weight", how) for how in ("shape", "dimension")
        ),  # its rows are cast to what asks for them
        ("zero", "none"),
    ],
)
def test_a_tensor_that_does_not_fit_is_told(folder, tmp_path, name, how):
    """Or the kernel would read beyond it."""
    scheme = int4.Scheme(4, 32, False)
    load(folder, int4=scheme)
    [file] = kept(tmp_path)
    tensors = {key: tensor.clone() for key, tensor in files.read_mapped(file).items()}
    key = next(key for key in tensors if key.endswith(name))
    whole = tensors.pop(key)
    changed = {"shape": whole[:-1], "dtype": whole.to(torch.float64), "dimension": whole[0], "none": None}[how]
    files.write_mapped(tensors if changed is None else {**tensors, key: changed}, file)
    with pytest.raises(BadInput, match="delete it"):
        load(folder, int4=scheme)


def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINICHAT_CACHE", str(tmp_path / "file"))
    assert same(load(folder), load(folder))
    assert "not kept" in capfd.readouterr().err


def test_data_begins_at_a_cache_line(tmp_path):
    tensors = {"a": torch.arange(64, dtype=torch.int32), "b": torch.randn(3, 5), "c": torch.ones(7).bfloat16()}
    files.write_mapped(tensors, tmp_path / "x.safetensors")
    found = files.read_mapped(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert found["a"].data_ptr() % 64 == 0
    from safetensors.torch import load_file

    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "x.safetensors").items())
