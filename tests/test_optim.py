"""Schedules against transformers', AdamW against torch's, and what bf16 weights need."""

import math

import pytest
import torch
from torch import nn

from minichat import optim
from minichat.optim import SCHEDULES, AdamW, lr_at

# ---- schedules ----


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lr_is_transformers_step_for_step(schedule):
    transformers = pytest.importorskip("transformers")
    for total in (1, 2, 7, 100, 272):
        for warmup in (0, 1, 3, 10, 0.03, 0.1, 0.5, 0.999):
            arguments = transformers.TrainingArguments(warmup_steps=warmup, report_to=[])
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
            name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
            scheduler = transformers.get_scheduler(name, optimizer, arguments.get_warmup_steps(total), total)
            for step in range(total):
                expected = scheduler.get_last_lr()[0]
                assert lr_at(step, total, 3e-4, schedule, warmup) == pytest.approx(expected, rel=1e-9, abs=1e-15)
                optimizer.step()
                scheduler.step()


def test_lr_by_its_definition():
    """5 steps of warm-up from 0, a peak, half a cosine or a line to 0 at the end."""
    assert [lr_at(i, 25, 1.0, "linear", 0.2) for i in (0, 1, 4, 5, 15, 25)] == [0, 0.2, 0.8, 1, 0.5, 0]
    assert [round(lr_at(i, 25, 1.0, "cosine", 5), 9) for i in (0, 5, 15, 25)] == [0, 1, 0.5, 0]
    assert [lr_at(i, 25, 1.0, "constant", 5) for i in (0, 1, 5, 24)] == [0, 0.2, 1, 1]
    assert lr_at(30, 25, 1.0, "cosine") == lr_at(30, 25, 1.0, "linear") == 0  # never up again
    with pytest.raises(ValueError, match="cosine, linear, constant"):
        lr_at(0, 10, 1.0, "polynomial")


# ---- AdamW ----


class Tiny(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 4, generator=generator).to(dtype))
        self.vector = nn.Parameter(torch.randn(4, generator=generator).to(dtype))
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def loss(self, step):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(step)).to(self.matrix.dtype)
        return ((x @ self.matrix * self.vector).tanh() - 0.5).square().sum() * 10


def test_adamw_is_torchs_step_for_step():
    """With clipping, decay of the matrix alone, and a learning rate that changes."""
    ours, theirs = Tiny(), Tiny()
    settings = dict(betas=(0.8, 0.95), eps=1e-6)
    optimizer = AdamW(ours, **settings, weight_decay=0.1)
    expected = torch.optim.AdamW(
        [{"params": [theirs.matrix], "weight_decay": 0.1}, {"params": [theirs.vector], "weight_decay": 0.0}], **settings
    )
    for step in range(20):
        lr = 0.01 * (step + 1) / 20
        ours.loss(step).backward()
        norm = optimizer.step(lr, max_norm=1.0)
        theirs.loss(step).backward()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_([theirs.matrix, theirs.vector], 1.0))
        for group in expected.param_groups:
            group["lr"] = lr
        expected.step()
        expected.zero_grad()
        # not bit for bit: where FMA is used depends on the machine, and on how many tensors there are
        torch.testing.assert_close([ours.matrix, ours.vector], [theirs.matrix, theirs.vector], rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.frozen, torch.ones(3))
    assert all(p.grad is None for p in ours.parameters())


def test_clipping_is_torchs_and_zero_is_none():
    for max_norm in (1e-3, 1e3, 0):
        model = Tiny()
        model.loss(0).backward()
        grads = [model.matrix.grad.clone(), model.vector.grad.clone()]
        exact = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        # with SGD-like settings Adam would hide the scale: look at its first moment, (1 - beta1) times the gradient
        optimizer = AdamW(model, betas=(0.5, 0.999))
        assert float(optimizer.step(0.1, max_norm)) == pytest.approx(exact, rel=1e-5)
        factor = min(1.0, max_norm / exact) if max_norm else 1.0
        for (first, _), grad in zip(optimizer.moments, grads):
            torch.testing.assert_close(first, 0.5 * factor * grad)


def test_weight_decay_spares_vectors():
    model = Tiny()
    before = [p.detach().clone() for p in (model.matrix, model.vector)]
    optimizer = AdamW(model, weight_decay=0.5)
    for p in (model.matrix, model.vector):
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1, 0)
    torch.testing.assert_close(model.matrix.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.vector, before[1])


def test_bf16_weights_keep_many_small_updates():
    """1,000 updates of 1e-4 to a weight of 1.0, whose neighbours in bf16 are 0.996 and 1.008: each alone is lost."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    pure = torch.ones((), dtype=torch.bfloat16)
    optimizer = AdamW(model)
    for _ in range(1000):
        model.weight.grad = torch.full_like(model.weight, -3.0)
        optimizer.step(1e-4, 0)
        pure += 1e-4
    assert pure == 1.0
    assert model.weight.item() == pytest.approx(1.1, abs=0.004)
    assert model.weight.dtype == torch.bfloat16 and model.weight.grad is None


def test_bf16_follows_float32_and_rounds_what_the_master_holds():
    exact, low = Tiny(), Tiny(torch.bfloat16)
    for one, other in zip(exact.parameters(), low.parameters()):
        one.data.copy_(other)
    optimizers = AdamW(exact), AdamW(low)
    for step in range(30):
        exact.loss(step).backward()
        for one, other in ((exact.matrix, low.matrix), (exact.vector, low.vector)):
            other.grad = one.grad.bfloat16()
        for optimizer in optimizers:
            optimizer.step(0.01, 0)
    for master, weight in zip(optimizers[1].masters, optimizers[1].weights):
        assert master.dtype == torch.float32 and torch.equal(weight, master.bfloat16())
    # 0.3 of movement, gradients rounded to 8 bits
    torch.testing.assert_close(low.matrix.float(), exact.matrix, rtol=0, atol=0.02)


def test_a_weight_without_gradient_stays():
    model = Tiny()
    optimizer = AdamW(model, weight_decay=0.5)
    vector = model.vector.detach().clone()
    model.matrix.grad = torch.ones_like(model.matrix)
    optimizer.step(0.1, 1.0)
    assert torch.equal(model.vector, vector)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        AdamW(nn.Linear(2, 2).requires_grad_(False))


# ---- 8-bit moments, and moments elsewhere ----


def test_squeezed_moments_are_near_and_never_vanish():
    """Over six orders of magnitude in a block: near what they were, signs kept, the second never 0."""
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    x *= 10 ** torch.empty_like(x).uniform_(-6, 0, generator=torch.Generator().manual_seed(1))
    first = optim.dequantize_moment(*optim.quantize_moment(x, signed=True), x.shape)
    peak = float(x.abs().max())
    assert (first - x).abs().max() < 0.02 * peak
    large = x.abs() > 1e-3 * peak
    torch.testing.assert_close(first[large], x[large], rtol=0.2, atol=0)
    square = x.square()
    second = optim.dequantize_moment(*optim.quantize_moment(square, signed=False), x.shape)
    assert (second > 0).all()
    large = square > 1e-6 * peak**2
    torch.testing.assert_close(second[large], square[large], rtol=0.3, atol=0)
    zero = torch.zeros(5)
    for signed in (True, False):
        codes, peaks = optim.quantize_moment(zero, signed)
        assert codes.shape == (1, 256) and torch.equal(optim.dequantize_moment(codes, peaks, zero.shape), zero)


def test_eight_bits_follow_thirty_two():
    """A loss that AdamW lowers, adamw8bit lowers as far, within a tenth; its moments take a quarter."""
    runs = {}
    for eight_bit in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
        optimizer = AdamW(model, eight_bit=eight_bit)
        x = torch.randn(256, 32)
        y = (x @ torch.randn(32, 8)).tanh()
        for _ in range(150):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step(3e-3, 1.0)
        runs[eight_bit] = loss.item(), sum(x.nbytes for moments in optimizer.moments for x in moments)
    assert runs[True][0] == pytest.approx(runs[False][0], rel=0.1) and runs[False][0] < 0.1
    assert runs[True][1] < 0.35 * runs[False][1]


@pytest.mark.parametrize("eight_bit", [False, True])
def test_moments_on_the_host_change_nothing_and_are_resumed(eight_bit):
    models = [Tiny() for _ in range(3)]
    host = torch.device("cpu")
    optimizers = [AdamW(m, eight_bit=eight_bit, home=home) for m, home in zip(models, (None, host, host))]
    for step in range(8):
        for model, optimizer in zip(models[:2], optimizers):
            model.loss(step).backward()
            optimizer.step(0.01, 1.0)
        if step == 3:
            optimizers[2].load_state({k: v.clone() for k, v in optimizers[1].state().items()})
        if step > 3:
            models[2].loss(step).backward()
            optimizers[2].step(0.01, 1.0)
    for other in models[1:]:
        assert torch.equal(models[0].matrix, other.matrix) and torch.equal(models[0].vector, other.vector)
