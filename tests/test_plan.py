"""Plans against the same step with values, against formulas, and through the scripts."""

import random

import pytest
import torch
from helpers import make

from minichat import data, lora, plan, training
from minichat.errors import BadInput
from minichat.examples import Example, Pair
from minichat.int4 import Scheme, quantize
from minichat.model import Config

RNG = random.Random(0)
DRAW = lambda n: [RNG.randrange(1, 97) for _ in range(n)]  # noqa: E731
SHAPE = dict(vocab_size=97, hidden_size=64, intermediate_size=96, head_dim=16)


def sft_batch():
    return data.sft_batch([[Example(DRAW(40), [0] * 20 + [1] * 20)], [Example(DRAW(24), [1] * 24)]], None)


def dpo_batch():
    return data.dpo_batch([[Pair(DRAW(20), DRAW(12), DRAW(9))]], None)


def test_peak_of_a_few_tensors():
    with plan.Live() as live:
        live.part = "one"
        a = torch.zeros(1 << 18)
        live.part = "two"
        b = a + 1
        del a
        c = b.view(4, -1) * 2  # a view is no tensor of its own
        del b
        torch.zeros(1 << 10)
    assert live.peak == 2 << 20 and live.parts == {"one": 1 << 20, "two": 1 << 20}
    assert c.numel() == 1 << 18


def test_numbers_are_read_at_a_glance():
    """From a model of a page to a run of a year: no zeros, no powers of ten where there need be none."""
    assert [plan.sized(n) for n in (16 << 30, 1 << 27, 5 << 20, 3000)] == [
        "16.00 GiB",
        "0.12 GiB",
        "5.00 MiB",
        "2.93 KiB",
    ]
    assert [plan.number(x) for x in (12340, 27.3, 0.0185)] == ["12,340.00", "27.30", "0.0185"]


@pytest.mark.parametrize("again", ["", "block"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "full", "int4", "nf4", "bf16"])
def test_a_plan_is_the_step_itself(kind, again, monkeypatch):
    """Fake tensors hold at most what real ones hold, and the FLOP are those of the real step."""
    monkeypatch.setenv("MINICHAT_KERNEL", "reference")
    model = make(**SHAPE)
    method, batch = (training.dpo(), dpo_batch()) if kind == "dpo" else (training.sft(), sft_batch())
    prepare = lambda m: m.requires_grad_(True) if kind == "full" else lora.attach(m, r=4, dropout=0.1)  # noqa: E731
    scheme = {"int4": Scheme(), "nf4": Scheme(nf4=True)}.get(kind)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    found = plan.make(model.config, scheme, dtype, prepare, method, batch, again=[again])

    if scheme:
        quantize(model, nf4=scheme.nf4)
    prepare(model.to(dtype))
    model.model.set_checkpointing(again)
    model.train()
    held = {plan._key(x): x.nbytes for x in (*model.parameters(), *model.buffers())}
    with plan.Live() as live:
        for x in (*model.parameters(), *model.buffers()):
            live._see(x)
        optimizer = training.optim.AdamW(model)
        loss = method.objective(model, batch.tensors)["loss"]
        loss.backward()
        flops = live.flops
        optimizer.collect()
        optimizer.step(1e-4, 1.0)
    assert found.flops == flops
    assert found.peak == pytest.approx(live.peak, abs=2048)  # the batch is on the host in one of them
    assert sum(found.parts.values()) == found.peak
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert found.parts["weights"] + found.parts.get("adapters", 0) == sum(held.values())
    masters = 2 if dtype != torch.float32 and kind == "full" else 0
    assert found.parts["optimiser"] == trained * (2 + masters)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapters_beside_int4_are_counted():
    """Those that training goes over: of each, its own bytes."""
    model = quantize(make(**SHAPE))
    for r in (4, 8):
        lora.freeze(lora.attach(model, r=r))
    held = sum(A.nbytes + B.nbytes for m in model.modules() for A, B, _ in getattr(m, "frozen", ()))

    def prepare(imagined):
        lora.freeze_like(imagined, model)
        lora.attach(imagined, r=4)

    plain = lambda m: lora.attach(m, r=4)  # noqa: E731
    over, alone = (
        plan.make(model.config, Scheme(), torch.float32, p, training.sft(), sft_batch()) for p in (prepare, plain)
    )
    assert over.parts["adapters"] == alone.parts["adapters"] + held > held
    assert over.trained == alone.trained and over.flops > alone.flops


def test_frozen_linears_have_no_weight_gradient():
    """Forward and backward of LoRA, by the formula: 4 per weight and token, not 6; a head, and what follows the last
    block's attention, for targets alone."""
    config = Config(97, 64, 96, 3, 4, 2, 16, None, 4096)
    batch = data.sft_batch([[Example(DRAW(100), [0] * 90 + [1] * 10)]], None)
    r, T, targets = 4, 100, 10
    found = plan.make(config, None, torch.float32, lambda m: lora.attach(m, r=r), training.sft(), batch)
    linears = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 96), "up": (64, 96)}
    linears["down"] = (96, 64)
    base = sum(K * N for K, N in linears.values())
    adapter = sum(r * (K + N) for K, N in linears.values())
    attention = (2 + 5) * 2 * T * T * 64 // 2  # causal
    expected = 3 * (4 * T * base + 6 * T * adapter + attention) + 2 * 2 * targets * 64 * 97
    # the embedding has no gradient: nothing goes below the first block's linears
    first = 2 * T * sum(K * N + K * r for K, N in (linears[n] for n in "qkv"))
    last = sum(
        (T - targets) * (4 * K * N + 6 * r * (K + N)) for K, N in (linears[n] for n in ("o", "gate", "up", "down"))
    )
    assert found.flops == expected - first - last


def test_choose_computes_no_more_again_than_it_has_to():
    tried = []

    def of(again):
        tried.append(list(again))
        size = 100 - 2 * again.count("attention") - 5 * again.count("block")
        return plan.Plan(1, 1, 1, 1, size * plan.GIB, {}, again)

    assert plan.choose(100, 4, of).again == [""] * 4
    assert plan.choose(97, 4, of).again == ["attention"] * 2 + [""] * 2
    assert plan.choose(92, 4, of).again == ["attention"] * 4
    assert plan.choose(84, 4, of).again == ["block"] * 3 + ["attention"]
    assert plan.choose(80, 4, of).again == ["block"] * 4
    assert all(len(again) == 4 for again in tried)
    with pytest.raises(BadInput, match="needs 80.00 with everything computed again"):
        plan.choose(79, 4, of)


def test_a_budget_is_kept_and_changes_no_gradient():
    config = make(**SHAPE, num_hidden_layers=4).config
    batch = sft_batch()
    of = lambda again: plan.make(config, None, torch.float32, attach, training.sft(), batch, again=again)  # noqa: E731
    attach = lambda m: lora.attach(m, r=4)  # noqa: E731
    most, least = of([""]).peak, of(["block"]).peak
    found = plan.choose((most + 2 * least) / 3 / plan.GIB, 4, of)
    assert least < found.peak <= (most + 2 * least) / 3 and any(found.again)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_moments_on_the_host_are_none_of_the_devices(eight_bit):
    """Between steps; a step brings some of them at a time."""
    config = make(**SHAPE, num_hidden_layers=4).config
    of = lambda offload: plan.make(  # noqa: E731
        config, None, torch.float32, lambda m: m.requires_grad_(True), training.sft(), sft_batch(), 1, ["block"],
        eight_bit, offload,
    )  # fmt: skip
    here, there = of(False), of(True)
    optimizer = training.optim.AdamW(make(**SHAPE, num_hidden_layers=4).requires_grad_(True), eight_bit=eight_bit)
    held = sum(x.nbytes for moments in optimizer.moments for x in moments)
    assert there.host == held and here.host == 0
    if not eight_bit:  # else what a step makes of them is the peak of both
        assert here.parts["optimiser"] == held
    assert there.peak < here.peak and there.flops == here.flops
    assert f"moments on the host: {held / 2**20:.2f} MiB" in str(there) and "host" not in str(here)
