"""The losses against their papers' formulas in float64, against trl, and against the full log-softmax."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import make
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from minichat import data, lora, losses, training
from minichat.examples import Example, Pair
from minichat.losses import dpo_loss, target_logps

# ---- log-probabilities ----


def batch(N=11, B=3, T=7, D=5, V=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, requires_grad=True)
    head = torch.randn(V, D, generator=generator, requires_grad=True)
    index = torch.randint(0, B * T, (N,), generator=generator)  # some positions twice, most never
    labels = torch.randint(0, V, (N,), generator=generator)
    return hidden, head, index, labels


def rows_at(hidden, index):
    return hidden.flatten(0, 1).index_select(0, index)


@pytest.mark.parametrize("rows", [1, 2, 10, 11, 12, 1024])
def test_target_logps_are_the_full_log_softmax_and_so_are_their_gradients(monkeypatch, rows):
    monkeypatch.setattr(losses, "ROWS", rows)
    hidden, head, index, labels = batch()
    weights = torch.randn(len(index))
    found = target_logps(rows_at(hidden, index), lambda x: x @ head.T, labels)
    grads = torch.autograd.grad((found * weights).sum(), (hidden, head))
    full = torch.log_softmax((hidden @ head.T).flatten(0, 1).double(), dim=-1)[index, labels]
    expected = torch.autograd.grad((full * weights).sum(), (hidden, head))
    assert found.shape == (11,) and found.dtype == torch.float32
    torch.testing.assert_close(found, full.float())
    torch.testing.assert_close(grads, expected)
    with torch.no_grad():
        assert torch.equal(target_logps(rows_at(hidden, index), lambda x: x @ head.T, labels), found)


@pytest.mark.parametrize("rows", [1, 2, 10, 11, 12, 1024])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_frozen_heads_gradient_is_that_of_the_full_log_softmax(monkeypatch, rows, dtype, tolerance):
    """Formed in the forward pass; the logits are computed once, and no gradient to the head is."""
    monkeypatch.setattr(losses, "ROWS", rows)
    hidden, weight, index, labels = batch()
    hidden = hidden.detach().to(dtype).requires_grad_()
    head = torch.nn.Linear(5, 13, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(weight.detach())
    weights, seen = torch.randn(len(index)), []
    head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    found = target_logps(rows_at(hidden, index), head, labels)
    (grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert sum(seen) == len(index)
    exact = hidden.detach().double().requires_grad_()
    full = torch.log_softmax((exact @ head.weight.double().T).flatten(0, 1), dim=-1)[index, labels]
    (expected,) = torch.autograd.grad((full * weights).sum(), exact)
    torch.testing.assert_close(found.double(), full, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(target_logps(rows_at(hidden, index), head, labels), found)  # DPO's reference


def test_target_logps_of_no_target():
    hidden, head, _, _ = batch()
    none = torch.empty(0, dtype=torch.int64)
    found = target_logps(rows_at(hidden, none), lambda x: x @ head.T, none)
    assert found.shape == (0,)
    found.sum().backward()
    assert not hidden.grad.any()


def test_target_logps_are_float32_from_a_bf16_model():
    hidden, head, index, labels = batch()
    found = target_logps(rows_at(hidden.bfloat16(), index), lambda x: x @ head.bfloat16().T, labels)
    logits = (hidden.bfloat16() @ head.bfloat16().T).float().flatten(0, 1)
    torch.testing.assert_close(found, torch.log_softmax(logits, dim=-1)[index, labels], rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and len(found.unique()) == len(found)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in this block held at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self.alive[ref.cdata] = ref, tensor.untyped_storage().nbytes()
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def test_no_logits_of_all_targets_live(monkeypatch):
    """16 chunks of 8 targets: forward and backward hold a few chunks' logits, never all."""
    monkeypatch.setattr(losses, "ROWS", 8)
    N, V = 128, 4096
    hidden, head, index, labels = batch(N=N, B=2, T=64, D=4, V=V)
    head.requires_grad_(False)

    def peak(logps):
        with Peak() as seen:
            logps().sum().backward()
        return seen.bytes

    def naive():
        return torch.log_softmax((hidden @ head.T).flatten(0, 1)[index], dim=-1)[torch.arange(N), labels]

    frozen = torch.nn.Linear(4, V, bias=False).requires_grad_(False)
    assert peak(naive) >= N * V * 4
    assert peak(lambda: target_logps(rows_at(hidden, index), lambda x: x @ head.T, labels)) <= 6 * 8 * V * 4
    assert peak(lambda: target_logps(rows_at(hidden, index), frozen, labels)) <= 2.1 * 8 * V * 4


@pytest.mark.parametrize("pad_to", [None, lambda n: 64])
def test_positions_without_loss_have_no_logits(pad_to):
    """Without padding; with it, as many as there are tokens, whatever the targets."""
    model, seen = make(), []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(len(logits)))
    examples = [Example([*range(40)], [0] * 36 + [1] * 4), Example([*range(30)], [0] * 20 + [1] * 10)]
    tensors = data.sft_batch([[e] for e in examples], pad_to).tensors
    training.sft().objective(model, tensors)
    assert sum(seen) == (14 if pad_to is None else 2 * 64)


def test_a_head_with_dropout_is_computed_again_with_the_same_dropout(monkeypatch):
    """Gradients of an adapter on lm_head are those of the forward that gave the loss."""
    monkeypatch.setattr(losses, "ROWS", 4)
    model = lora.attach(make(), r=2, alpha=40, dropout=0.5, targets=["lm_head"]).train()
    model.lm_head.lora_B.weight.data.normal_()
    hidden = torch.randn(2, 6, 48)
    index, labels = torch.arange(10), torch.arange(10, 20)

    def grads(logps):
        torch.manual_seed(0)
        return torch.autograd.grad(logps().sum(), (model.lm_head.lora_A.weight, model.lm_head.lora_B.weight))

    def plain():  # in the same pieces, so that dropout draws the same
        parts = [model.lm_head(rows) for rows in hidden.flatten(0, 1)[index].split(4)]
        return torch.log_softmax(torch.cat(parts), dim=-1)[torch.arange(10), labels]

    torch.testing.assert_close(grads(lambda: target_logps(rows_at(hidden, index), model.lm_head, labels)), grads(plain))


def test_row_sums():
    found = losses.row_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0]), 4)
    assert found.tolist() == [10, 0, 5, 0]


# ---- preferences ----


def formula(kind, beta, smoothing, policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    """Per-pair loss, float64, from the papers; h is log of the odds of preference under the implicit reward."""
    h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    chosen_wins = 1 / (1 + torch.exp(-beta * h))  # Bradley-Terry
    if kind == "sigmoid":  # DPO eq. 7; cDPO eq. 3
        return -(1 - smoothing) * torch.log(chosen_wins) - smoothing * torch.log(1 - chosen_wins)
    if kind == "robust":  # rDPO eq. 7
        right, flipped = -torch.log(chosen_wins), -torch.log(1 - chosen_wins)
        return ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)
    if kind == "hinge":  # SLiC, with DPO's margin
        return (1 - beta * h).clamp_min(0)
    return (h - 1 / (2 * beta)) ** 2  # IPO eq. 17, tau = beta


KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.0), ("robust", 0.3), ("hinge", 0.0), ("ipo", 0.0)]
kinds = pytest.mark.parametrize("kind, smoothing", KINDS)


def logps(n=64, seed=0):
    """Four log-probs of n answers each: policy's chosen and rejected, reference's chosen and rejected."""
    return list(-20 - 8 * torch.randn(4, n, generator=torch.Generator().manual_seed(seed)).double())


@kinds
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_loss_is_the_papers_formula_and_so_is_its_gradient(kind, smoothing, beta):
    exact = logps()
    expected = formula(kind, beta, smoothing, *exact)
    ours = [x.float().requires_grad_(i < 2) for i, x in enumerate(exact)]
    found, good, bad = dpo_loss(*ours, beta=beta, kind=kind, label_smoothing=smoothing)
    assert found.shape == (64,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(good.double(), beta * (exact[0] - exact[2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bad.double(), beta * (exact[1] - exact[3]), rtol=1e-4, atol=1e-5)
    assert not good.requires_grad and not bad.requires_grad
    exact = [x.requires_grad_(i < 2) for i, x in enumerate(exact)]
    grads = torch.autograd.grad(formula(kind, beta, smoothing, *exact).sum(), exact[:2])
    for one, other in zip(torch.autograd.grad(found.sum(), ours[:2]), grads):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.parametrize("kind, smoothing", [pair for pair in KINDS if pair != ("sigmoid", 0.2)])  # trl 1 has no cDPO
def test_dpo_loss_is_trls(kind, smoothing):
    """trl 1 keeps the maths inside the trainer: its method runs here on log-probs that we choose."""
    trl = pytest.importorskip("trl")
    if not hasattr(trl.DPOTrainer, "_compute_loss"):
        pytest.skip("another generation of trl")
    generator = torch.Generator().manual_seed(0)
    B, T, beta = 6, 9, 0.1
    mask = torch.zeros(2 * B, T, dtype=torch.int64)
    for row in range(2 * B):
        mask[row, 3 : 5 + row % 5] = 1  # answers of different lengths
    tokens = -3 * torch.rand(2 * B, T - 1, generator=generator) * mask[:, 1:]  # trl's head gives 0 elsewhere
    reference = tokens.sum(1) + torch.randn(2 * B, generator=generator)
    shape = torch.zeros(2 * B, T - 1)
    outputs = SimpleNamespace(log_probs=tokens, entropy=shape, mean_logits=shape, is_top1=shape.bool())
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    logged = {key: [] for key in ("entropy", "mean_token_accuracy", "num_tokens")}
    for group in ("rewards", "logps", "logits"):
        logged |= {f"{group}/{name}": [] for name in ("chosen", "rejected", "accuracies", "margins")}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=same,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": logged},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2 * B, T, dtype=torch.int64),
        "attention_mask": torch.ones(2 * B, T, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:B],
        "ref_rejected_logps": reference[B:],
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    lengths = mask.sum(1) if kind == "ipo" else 1  # what our function takes is a mean already
    parts = [x for whole in (tokens.sum(1) / lengths, reference / lengths) for x in whole.chunk(2)]
    ours, good, bad = dpo_loss(*parts, beta=beta, kind=kind, label_smoothing=smoothing)
    torch.testing.assert_close(ours.mean(), loss)
    if kind != "ipo":  # trl logs sums as rewards there
        assert logged["rewards/chosen"][0] == pytest.approx(float(good.mean()), abs=1e-5)
        assert logged["rewards/rejected"][0] == pytest.approx(float(bad.mean()), abs=1e-5)


@kinds
def test_far_apart_answers_do_not_overflow(kind, smoothing):
    far = torch.tensor([0.0, -5000.0], requires_grad=True)
    found, _, _ = dpo_loss(far, far.flip(0), torch.zeros(2), torch.zeros(2), 0.5, kind, smoothing)
    assert found.isfinite().all()
    found.sum().backward()
    assert far.grad.isfinite().all()


def test_rewards_and_losses_at_the_reference():
    x, y = torch.tensor([-3.0]), torch.tensor([-7.0])
    start = {kind: dpo_loss(x, y, x, y, 0.25, kind) for kind in losses.KINDS}
    assert {kind: float(loss) for kind, (loss, _, _) in start.items()} == pytest.approx(
        {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 4.0}
    )
    for _, good, bad in start.values():
        assert good == 0 and bad == 0


BAD = {
    "beta 0": dict(beta=0.0),
    "beta negative": dict(beta=-0.1),
    "beta NaN": dict(beta=math.nan),
    "beta inf": dict(beta=math.inf),
    "kind": dict(kind="kto"),
    "smoothing half": dict(label_smoothing=0.5),
    "smoothing negative": dict(label_smoothing=-0.1),
    "smoothing NaN": dict(label_smoothing=math.nan),
    "ipo smoothed": dict(kind="ipo", label_smoothing=0.1),
    "hinge smoothed": dict(kind="hinge", label_smoothing=0.1),
}


@pytest.mark.parametrize("settings", BAD.values(), ids=BAD)
def test_numbers_out_of_range_are_refused(settings):
    x = torch.zeros(1)
    with pytest.raises(ValueError):
        dpo_loss(x, x, x, x, **settings)
    with pytest.raises(ValueError):
        training.dpo(**settings)


# ---- preferences over a model ----

PAIRS = [
    Pair([1, 5, 6], [7, 8, 9, 10, 2], [11, 2], "a"),
    Pair([1, 12], [13, 2], [14, 15, 16, 2], "b"),
    Pair([1, 17, 18, 19, 20], [21, 22, 2], [21, 23, 24, 25, 26, 2], "c"),
]


def by_hand(model, mean=False):
    """(chosen, rejected) answers' log-probs, one sequence at a time from the full softmax."""
    found = []
    for answers in ([(p.prompt, p.chosen) for p in PAIRS], [(p.prompt, p.rejected) for p in PAIRS]):
        for prompt, answer in answers:
            ids = torch.tensor([prompt + answer])
            full = torch.log_softmax(model(ids)[0].double(), dim=-1)
            each = full[torch.arange(len(prompt) - 1, ids.shape[1] - 1), torch.tensor(answer)]
            found.append(each.mean() if mean else each.sum())
    return torch.stack(found).chunk(2)


def tensors():
    return data.dpo_batch([PAIRS], None).tensors


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_steps_rewards_are_exactly_zero(kind, smoothing, dtype):
    """Also with dropout, in training mode, over bf16 weights: policy and reference are the same computation."""
    model = lora.attach(make().to(dtype), dropout=0.3, r=4).train()
    found = training.dpo(0.1, kind, smoothing).objective(model, tensors())
    assert found["chosen_reward"] == 0 and found["rejected_reward"] == 0 and found["margin"] == 0
    start = {"hinge": 1.0, "ipo": 25.0}.get(kind, math.log(2))
    assert found["loss"].item() / 3 == pytest.approx(start, abs=1e-6)
    assert found["loss"].requires_grad


@kinds
@torch.no_grad()
def test_the_objective_is_the_formula_over_answers_one_by_one(kind, smoothing):
    """ipo takes an answer's mean per token; the others its sum. Reference: the model with its adapter off."""
    model = lora.attach(make(), r=4, alpha=8, dropout=0.5)
    reference = by_hand(model, mean=kind == "ipo")
    for module in lora.adapted(model).values():
        module.lora_B.weight.normal_(0, 0.02)
    policy = by_hand(model, mean=kind == "ipo")
    expected = formula(kind, 0.1, smoothing, *policy, *reference)
    found = training.dpo(0.1, kind, smoothing).objective(model, tensors())
    assert float(found["loss"]) == pytest.approx(float(expected.sum()), rel=1e-4)
    rewards = [0.1 * (mine - base) for mine, base in zip(policy, reference)]
    assert float(found["chosen_reward"]) == pytest.approx(float(rewards[0].sum()), abs=1e-4)
    assert float(found["rejected_reward"]) == pytest.approx(float(rewards[1].sum()), abs=1e-4)
    assert float(found["margin"]) == pytest.approx(float((rewards[0] - rewards[1]).sum()), abs=1e-4)
    assert int(found["accuracy"]) == int((rewards[0] > rewards[1]).sum())


@torch.no_grad()
def test_reference_free_takes_the_reference_as_equal():
    model = make()  # and needs no adapter
    policy = by_hand(model)
    expected = formula("sigmoid", 0.1, 0.0, *policy, *torch.zeros(2, 3))
    found = training.dpo(0.1, reference_free=True).objective(model, tensors())
    assert float(found["loss"]) == pytest.approx(float(expected.sum()), rel=1e-4)


def test_perplexity():
    assert losses.perplexity(math.log(7)) == pytest.approx(7)
    assert losses.perplexity(1e6) == math.inf
    assert math.isnan(losses.perplexity(math.nan))
