"""LoRA against peft, and the invariants that need no package."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import make, theirs
from safetensors.torch import load_file, save_file
from torch import nn

from minichat import files, lora
from minichat.errors import BadInput

CASES = {
    "attention": dict(r=4, alpha=8, targets=lora.ATTENTION),
    "all linears": dict(r=3, alpha=16, targets=lora.LINEARS),
    "rslora": dict(r=4, alpha=8, targets=lora.ATTENTION, rslora=True),
    "patterns": dict(
        r=4,
        alpha=8,
        targets=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"k_proj": 2, "layers.1.mlp.down_proj": 6},
        alpha_pattern={r"model\.layers\.0\..*": 32, "q_proj": 1},
    ),
    "one module": dict(r=4, alpha=8, targets=["layers.1.self_attn.q_proj"]),
    "head": dict(r=4, alpha=8, targets=["v_proj", "lm_head"]),
}
cases = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
# peft 0.21 reads an attribute that transformers 5.23 has renamed
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(1))


def randomise(model, seed=5):
    """Move B away from zero, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for module in lora.adapted(model).values():
        module.lora_B.weight.data.normal_(0, 0.3, generator=generator)
    return model


def adapted(seed=5, **settings):
    return randomise(lora.attach(make(), **{"r": 4, "alpha": 8, **settings}), seed)


def peft_of(settings, dropout=0.0):
    """peft's model over the same base, with its own settings; its B is not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=dropout,
        target_modules=list(settings["targets"]),
        use_rslora=settings.get("rslora", False),
        rank_pattern=settings.get("rank_pattern", {}),
        alpha_pattern=settings.get("alpha_pattern", {}),
        task_type="CAUSAL_LM",
    )
    other = peft.get_peft_model(theirs(make()), config).eval()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    return other


def twins(settings, dropout=0.0):
    """Our model and peft's, with the same weights; ours never went through a file."""
    other = peft_of(settings, dropout)
    model = lora.attach(make(), dropout=dropout, **settings)
    pairs = {}
    for name, weight in other.named_parameters():
        if "lora_" in name:
            ours = name.removeprefix(lora.PREFIX).replace(".default", "")
            pairs[ours] = model.get_parameter(ours), weight
            model.get_parameter(ours).data.copy_(weight.detach())
    assert pairs.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    return model, other, pairs


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- against peft ----


@peft_warns
@cases
def test_outputs_and_gradients_are_pefts(settings):
    model, other, pairs = twins(settings)
    ours, expected = model(IDS), other(IDS).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    for weight, theirs_ in pairs.values():
        assert weight.grad.abs().max() > 0
        torch.testing.assert_close(weight.grad, theirs_.grad, rtol=1e-3, atol=1e-3 * float(theirs_.grad.abs().max()))


@peft_warns
def test_dropout_is_pefts():
    """The same seed drops the same inputs, scaled alike."""
    model, other, _ = twins(CASES["attention"], dropout=0.3)
    model.train(), other.train()
    torch.manual_seed(3)
    ours = model(IDS)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, other(IDS).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, model.eval()(IDS), atol=0.1)


@peft_warns
@cases
@torch.no_grad()
def test_peft_opens_and_merges_our_file(settings, tmp_path):
    peft = pytest.importorskip("peft")
    model = randomise(lora.attach(make(), **settings))
    lora.save(model, tmp_path)
    # a warning about a missing or an unexpected key would be an error here
    other = peft.PeftModel.from_pretrained(theirs(make()), tmp_path).eval()
    torch.testing.assert_close(other(IDS).logits, model(IDS), rtol=0, atol=1e-4)
    merged = other.merge_and_unload(safe_merge=True)
    lora.merge(model)
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-6)


@peft_warns
@cases
@torch.no_grad()
def test_we_open_pefts_file_key_for_key(settings, tmp_path):
    other = peft_of(settings)
    # with lm_head among the targets, peft would copy the base's head and embedding into the file
    other.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    model = lora.load(make(), tmp_path / "peft")
    torch.testing.assert_close(model(IDS), other(IDS).logits, rtol=0, atol=1e-4)
    lora.save(model, tmp_path / "ours")
    expected, found = (load_file(tmp_path / who / lora.WEIGHTS) for who in ("peft", "ours"))
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key])


@peft_warns
@torch.no_grad()
def test_we_open_pefts_file_of_an_adapted_head_with_its_copy_of_the_base(tmp_path):
    other = peft_of(CASES["head"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        other.save_pretrained(tmp_path)
    assert [key for key in load_file(tmp_path / lora.WEIGHTS) if "lora" not in key] == [
        "base_model.model.lm_head.base_layer.weight"
    ]
    model = lora.load(make(), tmp_path)
    torch.testing.assert_close(model(IDS), other(IDS).logits, rtol=0, atol=1e-4)
    adapter, head = lora.Adapter(tmp_path), make().lm_head.weight
    torch.testing.assert_close(adapter.delta("lm_head", head), lora.Adapter(tmp_path).delta("lm_head", head.bfloat16()))
    for dtypes in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)):
        adapter.bases["lm_head"] = head.to(dtypes[0])
        lora.load(make().to(dtypes[1]), adapter)
    changed = make()
    changed.lm_head.weight[3, 4] += 1
    with pytest.raises(BadInput, match="a weight for lm_head that is not this model's"):
        lora.load(changed, tmp_path)


@peft_warns
@torch.no_grad()
def test_patterns_can_give_every_module_its_alpha(tmp_path):
    """Then the config needs none for all, and what is saved again means the same."""
    peft = pytest.importorskip("peft")
    targets, alphas = ["q_proj", "down_proj"], {"q_proj": 3, r".*\.down_proj": 20}
    lora.save(adapted(targets=targets, alpha_pattern=alphas), tmp_path)
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    del config["lora_alpha"]
    (tmp_path / lora.CONFIG).write_text(json.dumps(config))
    model = lora.load(make(), tmp_path)
    scales = {name.rsplit(".", 1)[1]: module.lora_scale for name, module in lora.adapted(model).items()}
    assert scales == {"q_proj": 3 / 4, "down_proj": 20 / 4}
    lora.save(model, tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        other = peft.PeftModel.from_pretrained(theirs(make()), folder).eval()
        torch.testing.assert_close(other(IDS).logits, model(IDS), rtol=0, atol=1e-4)


# ---- invariants ----


@torch.no_grad()
def test_a_new_adapter_changes_no_bit():
    model = make()
    base = model(IDS)
    lora.attach(model, targets=[*lora.LINEARS, "lm_head"])
    assert torch.equal(model(IDS), base)


@torch.no_grad()
def test_a_disabled_adapter_is_the_base_bit_for_bit():
    base = make()(IDS)
    model = adapted(dropout=0.5).train()
    torch.manual_seed(0)
    before = model(IDS)
    with lora.disabled(model) as same:
        assert same is model
        assert torch.equal(model(IDS), base)
        with lora.disabled(model):
            pass
        assert torch.equal(model(IDS), base)  # an inner block does not switch it on
    torch.manual_seed(0)
    assert torch.equal(model(IDS), before)
    assert not torch.equal(before, base)
    with pytest.raises(ZeroDivisionError), lora.disabled(model):
        1 / 0  # noqa: B018
    torch.manual_seed(0)
    assert torch.equal(model(IDS), before)
    with pytest.raises(ValueError, match="no adapter"), lora.disabled(make()):
        pass


@torch.no_grad()
def test_dropout_is_for_training_only():
    model = adapted(dropout=0.5)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


class Doubled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["frozen", "bias", "trains", "quantised", "doubled", "over another"])
def test_gradients_are_those_of_the_formula_over_any_linear(kind, dropout):
    """In float64, by what autograd makes of the formula; of a base that somebody lets train, too."""
    torch.manual_seed(0)
    linear = (Doubled if kind == "doubled" else nn.Linear)(24, 10, bias=kind == "bias").double()
    model = nn.Sequential(Quantised(linear) if kind == "quantised" else linear)

    def attach():
        lora.attach(model, r=3, alpha=6, dropout=dropout, targets=["0"])
        pair = model[0].lora_A, model[0].lora_B
        for side in pair:
            side.weight = nn.Parameter(torch.randn(side.weight.shape, dtype=torch.float64))
        return [side.weight for side in pair]

    under = attach() if kind == "over another" else None
    if under:
        lora.freeze(model)
    A, B = attach()
    linear.weight.requires_grad_(kind == "trains")
    x = torch.randn(5, 2, 24, dtype=torch.float64, requires_grad=True)
    learning = [x, *(w for w in model.parameters() if w.requires_grad)]

    def formula(x):
        y = F.linear(x, linear.weight, linear.bias) * (2 if kind == "doubled" else 1)
        y = y + 2 * F.dropout(x, dropout) @ A.T @ B.T
        return y + 2 * x @ under[0].detach().T @ under[1].detach().T if under else y

    model.train()
    for shape in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, 0]):
        torch.manual_seed(1)
        y = model(shape(x))
        assert (y.grad_fn.next_functions[0][0] is None) == (kind == "frozen")  # no node of the linear's own
        torch.manual_seed(1)
        expected = formula(shape(x))
        torch.testing.assert_close(y, expected)
        strided = torch.randn(y.shape[::-1], dtype=torch.float64).permute(*reversed(range(y.dim())))
        for direction in (torch.randn(y.shape, dtype=torch.float64), strided):
            both = [torch.autograd.grad(z, learning, direction, retain_graph=True) for z in (y, expected)]
            for found, right in zip(*both, strict=True):
                torch.testing.assert_close(found, right)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_over_a_bf16_linear_gradients_are_float32s_to_its_rounding(dropout):
    torch.manual_seed(0)
    exact, rounded = nn.Sequential(nn.Linear(64, 48, bias=False)), nn.Sequential(nn.Linear(64, 48, bias=False))
    rounded[0].weight.data = exact[0].weight.data.bfloat16()
    exact[0].weight.data = rounded[0].weight.data.float()
    x, direction = torch.randn(40, 64).bfloat16(), torch.randn(40, 48).bfloat16()
    grads = []
    for model in (exact, rounded):
        lora.attach(model, r=4, alpha=8, dropout=dropout, targets=["0"])[0].lora_B.weight.data.fill_(0.1)
        inputs = x.to(model[0].weight.dtype, copy=True).requires_grad_()
        torch.manual_seed(1)
        model.train()(inputs).backward(direction.to(inputs.dtype))
        grads.append([inputs.grad, model[0].lora_A.weight.grad, model[0].lora_B.weight.grad])
    assert [g.dtype for g in grads[1]] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(g.is_contiguous() for g in grads[1])
    for found, expected in zip(*grads[::-1]):
        assert (found.float() - expected).norm() < 0.01 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_and_subtracted_is_the_base(rslora):
    base = weights(make())
    model = adapted(r=4, alpha=8, rslora=rslora)
    s = 8 / math.sqrt(4) if rslora else 8 / 4
    deltas = {f"{name}.weight": s * m.lora_B.weight @ m.lora_A.weight for name, m in lora.adapted(model).items()}
    output = model(IDS)
    assert lora.merge(model) == 0  # float32 weights: nothing is rounded away
    torch.testing.assert_close(model(IDS), output, rtol=0, atol=1e-4)
    assert weights(model).keys() == base.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight - deltas.get(name, 0), base[name], rtol=0, atol=1e-6)


@torch.no_grad()
def test_merge_into_bf16_rounds_once():
    """The sum is made in float32; and what is returned is the largest change that this rounding makes."""
    model = randomise(lora.attach(make().to(torch.bfloat16), r=4, alpha=8))
    exact = {}
    for name, m in lora.adapted(model).items():
        exact[name] = m.weight.float() + 2 * (m.lora_B.weight @ m.lora_A.weight)
    worst = lora.merge(model)
    for name, weight in exact.items():
        assert torch.equal(model.get_submodule(name).weight, weight.bfloat16())
    assert 2**-12 < worst < 2**-7  # bf16 keeps 8 bits


def test_names_are_the_bases_and_pefts():
    base = set(make().state_dict())
    model = adapted(targets=["q_proj", "down_proj"])
    added = set(model.state_dict()) - base
    assert base <= set(model.state_dict())
    modules = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]
    assert added == {f"{m}.lora_{side}.weight" for m in modules for side in "AB"}


def test_only_the_adapter_trains_in_float32_over_a_bf16_base():
    model = randomise(lora.attach(make().to(torch.bfloat16), r=4, alpha=8))
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    logits = model(IDS)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == ("lora_" in name)


@torch.no_grad()
def test_remove_gives_back_the_base():
    base = make()
    model = adapted()
    lora.remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(model(IDS), base(IDS))
    assert vars(model.model.layers[0].mlp.up_proj).keys() == vars(base.model.layers[0].mlp.up_proj).keys()
    lora.attach(model)  # and it takes another


def test_attach_follows_the_seed_and_starts_as_the_paper_does():
    one, same, other = (lora.attach(make(), r=8, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(*(lora.adapted(model).values() for model in (one, same, other))):
        assert torch.equal(a.lora_A.weight, b.lora_A.weight)
        assert not torch.equal(a.lora_A.weight, c.lora_A.weight)
        assert not a.lora_B.weight.any()
        bound = a.in_features**-0.5  # kaiming-uniform with a = sqrt 5
        assert 0.9 * bound < a.lora_A.weight.abs().max() <= bound
        assert abs(a.lora_A.weight.std() / (bound / math.sqrt(3)) - 1) < 0.15


class Quantised(nn.Module):
    """Stands for Int4Linear: a linear without a float weight."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("packed", linear.weight.data.clone())

    def forward(self, x):
        return x @ self.packed.T


@torch.no_grad()
def test_any_linear_takes_an_adapter_but_only_a_float_one_is_merged(tmp_path):
    model = make()
    for block in model.model.layers:
        block.mlp.up_proj = Quantised(block.mlp.up_proj)
    expected = adapted()(IDS)
    randomise(lora.attach(model, r=4, alpha=8))
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    before = weights(model)
    with pytest.raises(BadInput, match="up_proj is quantised"):
        lora.merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    lora.remove(model)
    assert type(model.model.layers[0].mlp.up_proj) is Quantised


def test_a_head_that_is_the_embedding_too_is_not_merged():
    """The delta would reach the embeddings, which the adapter left alone."""
    model = randomise(lora.attach(make(tie_word_embeddings=True), r=4, targets=["lm_head", "q_proj"]))
    before = weights(model)
    with pytest.raises(BadInput, match="lm_head"):
        lora.merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- files ----


@torch.no_grad()
def test_only_restricts_an_adapter_to_some_modules(tmp_path):
    """As neural-chat-7b-v3-2 takes q, k and v, and v3-3 k and v, of one adapter."""
    lora.save(adapted(targets=lora.ATTENTION), tmp_path)
    full = adapted(targets=lora.ATTENTION)
    for name, module in lora.adapted(full).items():
        if not name.endswith(("k_proj", "v_proj")):
            module.lora_B.weight.zero_()
    model = lora.load(make(), tmp_path, only=["k_proj", "v_proj"])
    assert {name.rsplit(".", 1)[1] for name in lora.adapted(model)} == {"k_proj", "v_proj"}
    torch.testing.assert_close(model(IDS), full(IDS))
    one = lora.load(make(), tmp_path, only=["layers.1.self_attn.k_proj"])
    assert list(lora.adapted(one)) == ["model.layers.1.self_attn.k_proj"]
    adapter = lora.Adapter(tmp_path)
    for take in (adapter.only, lambda only: lora.load(make(), adapter, only)):
        take(["k_proj"])
        assert {name.rsplit(".", 1)[1] for name in adapter.pairs} == set(lora.ATTENTION)  # it stays whole
    lora.save(one, tmp_path / "one")
    assert json.loads((tmp_path / "one" / lora.CONFIG).read_text())["target_modules"] == list(lora.adapted(one))
    with pytest.raises(BadInput, match="nothing for 'up_proj'"):
        lora.load(make(), tmp_path, only=["k_proj", "up_proj"])
    for nothing in ([], [""]):  # of a shell variable that is not set
        with pytest.raises(BadInput, match="no module is named"):
            lora.load(make(), tmp_path, only=nothing)


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = adapted(**CASES["patterns"])
    lora.save(model, tmp_path, base="someone/base", metadata={"base_fingerprint": "abc"})
    again = lora.load(make(), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    adapter = lora.Adapter(tmp_path)
    assert adapter.metadata["base_fingerprint"] == "abc"
    assert adapter.config["base_model_name_or_path"] == "someone/base"
    # what merging adds is what the module adds
    for name, module in lora.adapted(model).items():
        x = torch.randn(3, module.in_features)
        added = module(x) - x @ module.weight.T
        torch.testing.assert_close(x @ adapter.delta(name, module.weight).T, added, rtol=0, atol=1e-4)
    assert adapter.delta("lm_head", torch.zeros(97, 48)) is None


@pytest.mark.parametrize("over, here, lines", [("a", "b", 1), ("a", "a", 0), (None, "b", 0), ("a", None, 0)])
def test_an_adapter_over_other_weights_than_its_own_is_told(over, here, lines, tmp_path, capsys):
    lora.save(adapted(), tmp_path, metadata={"base_fingerprint": over} if over else None)
    model = make()
    model.identity = here
    lora.load(model, tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines and all(f"{tmp_path} was trained over other weights" in line for line in said)


@pytest.mark.parametrize("scheme", [None, "int4 in groups of 32, symmetric"])
def test_merging_what_was_trained_over_int4_is_told(scheme, tmp_path, capsys):
    lora.save(adapted(), tmp_path, metadata={"int4": scheme} if scheme else None)
    lora.merge(lora.load(make(), tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(scheme) and all(
        "trained over quantised weights" in line and scheme in line for line in said
    )


def test_an_adapter_of_another_file_has_another_fingerprint(tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        lora.save(adapted(seed), tmp_path / name)
    one, same, other = (files.fingerprint(tmp_path / name / lora.WEIGHTS) for name in ("one", "same", "other"))
    assert one == same != other


def test_a_fingerprint_is_of_all_parts_of_a_file(tmp_path):
    """A merge changes linears: perhaps not the beginning of a shard, where header and embedding are, nor its end."""
    content = bytearray(8 << 20)
    (tmp_path / "a").write_bytes(content)
    content[3 << 20 : 5 << 20] = b"\1" * (2 << 20)
    (tmp_path / "b").write_bytes(content)
    assert files.fingerprint(tmp_path / "a") != files.fingerprint(tmp_path / "b")


def edit_config(**changes):
    def edit(folder):
        file = folder / lora.CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_tensors(change):
    def edit(folder):
        save_file(change(load_file(folder / lora.WEIGHTS)), folder / lora.WEIGHTS)

    return edit


def renamed(old, new):
    return edit_tensors(lambda tensors: {key.replace(old, new): value for key, value in tensors.items()})


def without(side):
    return edit_tensors(lambda tensors: {key: value for key, value in tensors.items() if f"lora_{side}" not in key})


def truncate(folder):
    file = folder / lora.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def only_pickle(folder):
    (folder / lora.WEIGHTS).rename(folder / "adapter_model.bin")


BROKEN = {
    "another kind": (edit_config(peft_type="IA3"), "LORA"),
    "dora": (edit_config(use_dora=True), "use_dora"),
    "alora": (edit_config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "modules to save": (edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "changes the base": (edit_config(init_lora_weights="pissa"), "pissa"),
    "another rank": (edit_config(r=8), "rank 4"),
    "rank in words": (edit_config(r="four"), "four"),
    "no alpha": (edit_config(lora_alpha=None), "lora_alpha"),
    "alpha in words": (edit_config(lora_alpha="8"), "lora_alpha"),
    "alpha without end": (edit_config(lora_alpha=10**400), "lora_alpha"),
    "patterns no object": (edit_config(rank_pattern=[1]), "rank_pattern"),
    "pattern no expression": (edit_config(alpha_pattern={"(": 1}), "alpha_pattern"),
    "pattern without end": (edit_config(rank_pattern={r"(\w+\.?)+!": 1}), "rank_pattern.*too many ways"),
    "pattern of many": (edit_config(rank_pattern={"a{99999999999}": 1}), "rank_pattern.*too large"),
    "config not JSON": (lambda folder: (folder / lora.CONFIG).write_text("{"), "not JSON"),
    "config a list": (lambda folder: (folder / lora.CONFIG).write_text("[]"), "not an object"),
    "no config": (lambda folder: (folder / lora.CONFIG).unlink(), lora.CONFIG),
    "no folder": (shutil.rmtree, lora.CONFIG),
    "no weights": (lambda folder: (folder / lora.WEIGHTS).unlink(), "not there"),
    "pickle only": (only_pickle, "safe_serialization"),
    "truncated": (truncate, "whole safetensors"),
    "no tensors": (edit_tensors(lambda tensors: {}), "no adapter weights"),
    "half a pair": (without("A"), "lora_A"),
    "foreign keys": (renamed("base_model.model.", ""), "key"),
    "another model's modules": (renamed("q_proj", "query"), "query"),
    "more layers": (renamed("layers.1.", "layers.7."), "layers.7"),
    "not a linear": (renamed("self_attn.q_proj", "input_layernorm"), "input_layernorm"),
    "another shape": (
        edit_tensors(lambda tensors: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()}),
        r"\(48, 47\)",
    ),
}


@pytest.mark.parametrize("breaking, message", BROKEN.values(), ids=BROKEN)
def test_an_adapter_that_does_not_fit_is_one_line_and_changes_nothing(breaking, message, tmp_path):
    folder = tmp_path / "adapter"
    lora.save(adapted(targets=["q_proj"]), folder)
    breaking(folder)
    model = make()
    with pytest.raises(BadInput, match=message) as error:
        lora.load(model, folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not lora.adapted(model) and all(p.requires_grad for p in model.parameters())


BAD = {
    "no such target": (dict(targets=["q_proj", "query"]), "'query'"),
    "no targets": (dict(targets=[]), "targets"),
    "half a name": (dict(targets=["proj"]), "'proj'"),
    "not a linear": (dict(targets=["embed_tokens"]), "embed_tokens"),
    "rank 0": (dict(r=0), "rank"),
    "rank 0 in the pattern": (dict(rank_pattern={"down_proj": 0}), "rank"),
    "dropout 1": (dict(dropout=1.0), "dropout"),
    "dropout below 0": (dict(dropout=-0.1), "dropout"),
}


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD)
def test_attach_refuses_and_changes_nothing(settings, message):
    model = make()
    with pytest.raises(BadInput, match=message):
        lora.attach(model, **settings)
    assert not lora.adapted(model) and all(p.requires_grad for p in model.parameters())


def test_one_adapter_at_a_time(tmp_path):
    model = adapted()
    lora.save(model, tmp_path)
    for act in (lambda: lora.attach(model), lambda: lora.load(model, tmp_path)):
        with pytest.raises(BadInput, match="already"):
            act()
    for act in (lambda: lora.merge(make()), lambda: lora.save(make(), tmp_path / "none")):
        with pytest.raises(BadInput, match="no adapter"):
            act()
    assert not (tmp_path / "none").exists()
