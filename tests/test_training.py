"""The one loop against a plain one with transformers and torch, against trl, and its invariants."""

import copy
import json
import math
import random
import shutil

import pytest
import torch
from helpers import make, theirs

from minichat import attention, data, device, int4, lora, losses, optim, training
from minichat.checkpoint import Checkpoints
from minichat.errors import BadInput
from minichat.examples import Example, Pair
from minichat.metrics import Metrics
from minichat.training import Settings

EOS = 0  # the id that batches are padded with, too


def examples(n=8, seed=0):
    """Sequences whose numbers of targets differ a lot: from 1 to 30."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        prompt, answer = rng.randrange(1, 6), (1, 30, 2, 3, 12)[i % 5]
        ids = [rng.randrange(1, 97) for _ in range(prompt + answer - 1)] + [EOS]
        found.append(Example(ids, [0] * prompt + [1] * answer, f"f:{i}"))
    return found


def pairs(n=4, seed=0):
    rng = random.Random(seed)

    def some(low, high):
        return [rng.randrange(1, 97) for _ in range(rng.randrange(low, high))]

    return [Pair(some(2, 6), some(1, 9) + [EOS], some(1, 9) + [EOS], f"f:{i}") for i in range(n)]


def fit(model, method, items, eval_items=None, folder=None, checkpoints=None, **changes):
    settings = Settings(**{"steps": 4, "batch_size": 2, "lr": 1e-2, "log_every": 1, **changes})
    with Metrics(folder, training.count_steps(data.Mix([items]), settings), "test") as metrics:
        return training.fit(model, method, items, settings, metrics, eval_items, checkpoints)


def adapted(**settings):
    return lora.attach(make(), **{"r": 4, "alpha": 8, **settings})


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- the step ----


def labels_of(items):
    """transformers' batch: padded ids, and labels with -100 where nothing is learnt."""
    T = max(map(len, items))
    ids = torch.tensor([e.ids + [EOS] * (T - len(e)) for e in items])
    labels = [[t if m else -100 for t, m in zip(e.ids, e.mask)] + [-100] * (T - len(e)) for e in items]
    return ids, torch.tensor(labels)


@torch.no_grad()
def test_sft_loss_is_transformers():
    """Normalised by the targets of the whole step, over micro-batches: 96 here, 4 to 42 each."""
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    model, items = make(), examples()
    parts = [items[:2], items[2:5], items[5:]]
    targets = sum(sum(e.mask) for e in items)
    for part in parts:
        ids, labels = labels_of(part)
        expected = loss_utils.ForCausalLMLoss(theirs(model)(ids).logits, labels, 97, num_items_in_batch=targets)
        batch = data.sft_batch([[e] for e in part], lambda n: n)
        assert batch.weight == int((labels != -100).sum())
        torch.testing.assert_close(training.sft().objective(model, batch.tensors)["loss"] / targets, expected)


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("pad_to", [None, lambda n: n, lambda n: n + 9], ids=["ragged", "rows", "padded"])
@pytest.mark.parametrize("block", [512, 8], ids=["mask", "blocks"])
def test_packed_documents_are_learnt_as_if_each_were_alone(window, pad_to, block, monkeypatch):
    """Loss and gradients of packed rows are the separate sequences', also where the window is shorter than they are."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    model, items, method = make(sliding_window=window), examples(6), training.sft()
    found = []
    for rows in ([items[:1], items[1:4], items[4:]], [items]):
        sums = method.objective(model, data.sft_batch(rows, pad_to).tensors)
        model.zero_grad()
        sums["loss"].backward()
        found.append((sums["loss"].detach(), [p.grad.clone() for p in model.parameters()]))
    loss = 0
    model.zero_grad()
    for e in items:  # by the definition
        logps = torch.log_softmax(model(torch.tensor([e.ids]))[0], dim=-1)
        loss = loss - sum(logps[t - 1, e.ids[t]] for t in range(1, len(e)) if e.mask[t])
    loss.backward()
    model_grads = [p.grad for p in model.parameters()]
    for one, grads in found:
        torch.testing.assert_close(one, loss.detach(), rtol=1e-5, atol=1e-5)
        for a, b in zip(grads, model_grads):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("window", [None, 3, 7, 64])
@pytest.mark.parametrize("pad_to", [None, lambda n: n, lambda n: n + 9], ids=["ragged", "rows", "padded"])
@pytest.mark.parametrize("block", [512, 8], ids=["mask", "blocks"])
def test_a_pair_in_one_row_is_two_sequences(window, pad_to, block, monkeypatch):
    """Answers' log-probs and their gradients, of rows of one and of several pairs, are those of separate sequences."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    torch.manual_seed(0)
    model, method, rng = make(sliding_window=window), training.dpo(), random.Random(0)
    lora.attach(model, r=2)
    for module in lora.adapted(model).values():
        module.lora_B.weight.data.normal_(0, 0.1)
    lengths = [(1, 1, 1), (5, 20, 3), (19, 2, 11), (0, 4, 6), (12, 1, 30)]
    items = [Pair(*([rng.randrange(1, 97) for _ in range(n)] for n in each)) for each in lengths]
    items[2].masks = [0, 1], [1] * 5 + [0, 1] * 3
    weights = torch.randn(2 * len(items))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def alone(pair, answer, mask):  # by the definition
        logps = model(torch.tensor([pair.prompt + answer]))[0].log_softmax(-1)
        P = len(pair.prompt)
        return sum(logps[P + t - 1, token] for t, (token, m) in enumerate(zip(answer, mask)) if m and P + t)

    expected = [alone(p, p.chosen, p.masks[0]) for p in items] + [alone(p, p.rejected, p.masks[1]) for p in items]
    expected = torch.stack(expected)
    grads = torch.autograd.grad((expected * weights).sum(), parameters)
    for rows in ([[pair] for pair in items], [items[:2], items[2:]]):
        found = method.logps(model, method.batch(rows, pad_to).tensors)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(torch.autograd.grad((found * weights).sum(), parameters), grads):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_steps_are_counted_after_packing(tmp_path):
    """6 sequences of about 20 tokens in rows of 64: the schedule ends with the last row."""
    items = examples(12)
    settings = dict(steps=None, batch_size=1, accumulate=1, epochs=2.0)
    packed = training.count_steps(data.Mix([items]), Settings(**settings, pack=64))
    rows = [len(data.order(data.Mix([items]), 1, 1, 42, epoch, 64)) for epoch in (0, 1)]
    assert packed == sum(rows) < training.count_steps(data.Mix([items]), Settings(**settings)) == 24
    assert training.count_steps(data.Mix([items]), Settings(**{**settings, "epochs": 1.5}, pack=64)) == (
        rows[0] + math.ceil(rows[1] / 2)
    )
    fit(adapted(), training.sft(), items, folder=tmp_path, **settings, pack=64, schedule="linear", warmup=0)
    records = logged(tmp_path)
    assert records[-1]["step"] == packed and records[-1]["tokens"] == 2 * sum(map(len, items))
    assert records[-1]["lr"] == optim.lr_at(packed - 1, packed, 1e-2, "linear", 0)


@torch.no_grad()
def test_padding_that_is_eos_is_masked_by_position():
    """A batch's sums are those of its rows alone, with every row's own eos learnt."""
    model, items, method = make(), examples(5), training.sft()
    assert all(e.ids[-1] == EOS and e.mask[-1] for e in items)
    alone = sum(method.objective(model, data.sft_batch([[e]], lambda n: n).tensors)["loss"] for e in items)
    together = data.sft_batch([[e] for e in items], lambda n: n)
    assert together.tensors["ids"][0, -1] == EOS  # padding
    torch.testing.assert_close(method.objective(model, together.tensors)["loss"], alone)
    full = 0
    for e in items:
        logps = torch.log_softmax(model(torch.tensor([e.ids]))[0].double(), dim=-1)
        full -= sum(float(logps[t - 1, e.ids[t]]) for t in range(1, len(e)) if e.mask[t])
    assert float(alone) == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize("what", ["sft", "dpo"])
def test_accumulation_is_the_same_step_however_it_is_split(what):
    method, items = (training.sft(), examples(8)) if what == "sft" else (training.dpo(), pairs(8))
    results = []
    for batch_size, accumulate in ((8, 1), (2, 4), (1, 8), (3, 3)):
        # eps: Adam's first step is lr * sign(gradient), also of a gradient that is rounding noise
        model = adapted()
        last = fit(model, method, items, batch_size=batch_size, accumulate=accumulate, eps=1e-3, warmup=0)
        assert last["step"] == 4
        results.append((last["loss"], model.state_dict()))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][1][name], rtol=0, atol=1e-6)


def test_bf16_gradients_add_up_in_float32(monkeypatch):
    """A full run over bf16 weights: the step's gradient is the exact float32 sum of its micro-batches' bf16 ones."""
    model, items, method = make().to(torch.bfloat16), examples(8), training.sft()
    twin, kept = copy.deepcopy(model).train(), []
    monkeypatch.setattr(optim, "AdamW", lambda *a, kind=optim.AdamW: kept.append(kind(*a)) or kept[0])
    # Adam's first moment is then the gradient itself
    settings = dict(steps=1, batch_size=1, accumulate=8, clip=0, betas=(0.0, 0.999))
    fit(model, method, items, **settings)
    batches = next(training.steps(data.Mix([items]), Settings(**settings), method, model.device))
    weight = sum(batch.weight for batch in batches)
    expected = [torch.zeros(p.shape) for p in twin.parameters()]
    for batch in batches:
        twin.zero_grad()
        (method.objective(twin, batch.tensors)["loss"] / weight).backward()
        for total, p in zip(expected, twin.parameters()):
            total += p.grad.float()
    for (first, _), total in zip(kept[0].moments, expected):
        assert torch.equal(first, total)
    assert any(not torch.equal(total, total.bfloat16().float()) for total in expected)


def test_a_graph_ends_with_each_backward_and_each_update(monkeypatch):
    """On an HPU nothing runs before, and a graph over several would be another one each time."""
    events = []

    def watch(owner, name, event):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (plain(*a, **k), events.append(event))[0])

    watch(torch.Tensor, "backward", "backward")
    watch(optim.AdamW, "step", "update")
    watch(training.device, "mark_step", "mark")
    fit(adapted(), training.sft(), examples(), steps=2, batch_size=2, accumulate=3)
    step = ["backward", "mark"] * 3 + ["update", "mark"]
    assert events == ["mark"] + step + step[:2] + step[-2:]  # 8 records are 4 micro-batches: the second step has one


def test_full_training_is_the_plain_loop_with_transformers(tmp_path):
    """Their model, loss, schedule and clipping, torch's AdamW: the same losses, norms and final weights."""
    transformers = pytest.importorskip("transformers")
    items, steps = examples(6), 6
    other = theirs(make()).train()
    decayed = [p for p in other.parameters() if p.dim() > 1]
    spared = [p for p in other.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-4)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, steps)
    expected = []
    for _ in range(steps):
        ids, labels = labels_of(items)
        loss = other(ids, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        expected.append((loss.item(), norm.item(), scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    model = make()
    settings = dict(lr=3e-3, warmup=2, clip=0.5, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    fit(model, training.sft(), items, folder=tmp_path, steps=steps, batch_size=3, accumulate=2, **settings)
    assert min(norm for _, norm, _ in expected) > 0.5  # it clips
    for record, (loss, norm, lr) in zip(logged(tmp_path), expected):
        assert record["loss"] == pytest.approx(loss, abs=1e-4)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert record["lr"] == pytest.approx(lr)
    final = other.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, final[name], rtol=0, atol=1e-5)


# ---- the loop ----


def test_a_tiny_task_is_learnt_and_the_base_stays(tmp_path):
    model = adapted(dropout=0.05)
    before = copy.deepcopy(model.state_dict())
    last = fit(model, training.sft(), examples(), folder=tmp_path, steps=60)
    losses_ = [record["loss"] for record in logged(tmp_path)]
    assert sum(losses_[-8:]) < sum(losses_[:8]) / 4
    assert last["step"] == 60 and not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) != ("lora_" in name)


def test_preferences_are_learnt(tmp_path):
    """The chosen answers win, by a margin, on every pair."""
    model = adapted(dropout=0.05)
    last = fit(model, training.dpo(), pairs(), pairs(), tmp_path, steps=30, batch_size=4)
    assert last["eval_accuracy"] == 1 and last["eval_margin"] > 1 and last["eval_loss"] < 0.4
    first = logged(tmp_path)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == first["chosen_reward"] == first["rejected_reward"] == 0


def test_float32_adapters_learn_over_a_bf16_base():
    model = lora.attach(make().to(torch.bfloat16), r=4, alpha=8)
    start = fit(model, training.sft(), examples(), steps=1, batch_size=8)["loss"]
    assert fit(model, training.sft(), examples(), steps=60)["loss"] < start / 2
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("what", ["sft", "dpo"])
def test_a_seed_gives_the_same_run_bit_for_bit(what):
    method, items = (training.sft(), examples()) if what == "sft" else (training.dpo(), pairs())
    models = [adapted(dropout=0.2) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8)):
        torch.rand(seed)  # what was drawn before does not matter
        fit(model, method, items, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.parametrize("how", [{"steps": 2}, {"epochs": 1}, {"epochs": 1.6}, {"steps": 9}, {"steps": 2, "pack": 60}])
def test_seen_items_are_what_the_run_takes(how):
    taken = set()

    class Watched(data.Mix):
        def __getitem__(self, i):
            taken.add(i)
            return super().__getitem__(i)

    mix = Watched([examples(13), examples(20, seed=1)], [1, 0.5])
    how = {"epochs": 1, "steps": None, "batch_size": 2, "accumulate": 2, **how}
    fit(adapted(), training.sft(), mix, **how)
    assert training.seen(mix, Settings(**how)) == taken and len(taken) >= 8


def test_evaluation_and_logging_do_not_touch_the_run():
    plain, watched = adapted(dropout=0.2), adapted(dropout=0.2)
    fit(plain, training.sft(), examples(), log_every=100)
    fit(watched, training.sft(), examples(), examples(3, seed=1), eval_every=1)
    assert same(plain, watched)


def test_the_optimiser_is_the_one_that_is_asked_for(monkeypatch):
    built, plain = [], optim.AdamW.__init__
    monkeypatch.setattr(optim.AdamW, "__init__", lambda self, *args: (built.append(self), plain(self, *args))[1])
    models = [adapted() for _ in range(3)]
    for model, how in zip(models, ({}, {"optimizer": "adamw8bit"}, {"offload": True})):
        fit(model, training.sft(), examples(), **how)
    assert [one.eight_bit for one in built] == [False, True, False]
    assert [one.home for one in built] == [None, None, torch.device("cpu")]
    assert same(models[0], models[2]) and not same(models[0], models[1])


def test_the_rate_is_that_of_the_steps_since_the_last_line(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))  # one second from each look to the next
    fit(adapted(), training.sft(), examples(), folder=tmp_path, log_every=2, steps=6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tokens = [0, *(line["tokens"] for line in lines)]
    rates, seconds = [line["tokens_per_s"] for line in lines], [0, *(line["seconds"] for line in lines)]
    assert [line["step"] for line in lines] == [1, 2, 4, 6] and tokens[2] - tokens[1] != tokens[1]
    for i, rate in enumerate(rates):
        assert rate in {round((tokens[i + 1] - tokens[i]) / took, 1) for took in (1, 2, 3)}, (i, seconds)


def test_the_rate_is_without_the_time_of_saving(tmp_path, monkeypatch):
    clock = [0.0]

    def look():
        clock[0] += 1
        return clock[0]

    def slow(new):
        clock[0] += 1e6

    monkeypatch.setattr(training.time, "perf_counter", look)
    fit(adapted(), training.sft(), examples(), None, tmp_path, Checkpoints(tmp_path, {}, slow, every=1), steps=6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_s"] > 1 for line in lines) and lines[-1]["seconds"] > 5e6


def test_a_plan_is_of_the_largest_batch():
    items = data.Mix([examples(20)])
    settings = Settings(batch_size=2)
    most = max(sum(len(items[i]) for row in rows for i in row) for [rows] in data.order(items, 2, 1, 42, 0))
    assert training.largest(items, settings, training.sft(), torch.device("cpu")).tokens == most
    sizes = data.Mix([[Example([5] * n, [1] * n) for n in (1000, 1000, 100, 1100)]])
    hpu = torch.device("hpu")  # where a batch is as long as its longest row, filled up
    for seed in range(10):
        settings = Settings(batch_size=2, seed=seed)
        batch = training.largest(sizes, settings, training.sft(), hpu)
        assert batch.tensors["ids"].numel() == 2 * device.bucket(1100, hpu) == 4096


def test_gradient_checkpointing_gives_the_same_weights():
    """Bit for bit, with dropout: what is computed again drops the same."""
    for method, items in ((training.sft(), examples()), (training.dpo(), pairs())):
        models = [adapted(dropout=0.2) for _ in range(2)]
        models[1].model.set_checkpointing("block")
        runs = [], []
        for model, seen in zip(models, runs):
            model.model.layers[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
            fit(model, method, items)
        assert same(*models)
        assert len(runs[1]) > len(runs[0])  # the block did run again


def test_eval_numbers_are_those_by_hand():
    """Over all targets of all records, not a mean of batches' means; without dropout."""
    model, items = adapted(dropout=0.5), examples(7, seed=3)
    for module in lora.adapted(model).values():
        module.lora_B.weight.data.normal_(0, 0.1)
    total = 0.0
    for e in items:
        logps = torch.log_softmax(model(torch.tensor([e.ids]))[0].double(), dim=-1)
        total -= sum(logps[t - 1, e.ids[t]].item() for t in range(1, len(e)) if e.mask[t])
    model.train()
    for batch_size in (1, 3, 7):
        found = training.evaluate(model, training.sft(), items, Settings(batch_size=batch_size))
        assert found["loss"] == pytest.approx(total / sum(sum(e.mask) for e in items), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert model.training
    last = fit(model, training.sft(), examples(), items, lr=1e-12)
    assert last["eval_loss"] == pytest.approx(found["loss"], abs=1e-5)


@torch.no_grad()
def answers(model, items):
    """Summed log-probs of the (chosen, rejected) answers, each (B,) float64, one sequence at a time."""
    found = []
    for side in ("chosen", "rejected"):
        for pair in items:
            answer = getattr(pair, side)
            logps = torch.log_softmax(model(torch.tensor([pair.prompt + answer]))[0].double(), dim=-1)
            start = len(pair.prompt)
            found.append(sum(logps[start + i - 1, t] for i, t in enumerate(answer)))
    return torch.stack(found).view(2, -1)


def test_full_dpo_keeps_the_reference_that_it_started_from(tmp_path):
    model, items, method = make(), pairs(), training.dpo(0.5)
    start = copy.deepcopy(model)
    items = data.Referenced(items, training.reference_logps(model, method, items, Settings(batch_size=3)))
    reference = answers(start, items)
    found = torch.tensor([pair.reference for pair in items]).T
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-4)
    last = fit(model, method, items, items, tmp_path, batch_size=4, lr=1e-3)
    first = logged(tmp_path)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["chosen_reward"] == pytest.approx(0, abs=1e-5) == first["rejected_reward"]
    # an adapter that does nothing yet refers to the same
    adapter = training.evaluate(lora.attach(start, r=2), method, [copy.copy(p) for p in pairs()], Settings())
    assert adapter["loss"] == pytest.approx(first["loss"], abs=1e-5)
    lora.remove(start)
    rewards = 0.5 * (answers(model, items) - reference)
    assert last["eval_chosen_reward"] == pytest.approx(rewards[0].mean().item(), abs=1e-3)
    assert last["eval_margin"] == pytest.approx((rewards[0] - rewards[1]).mean().item(), abs=1e-3)
    assert last["eval_accuracy"] == (rewards[0] > rewards[1]).double().mean()
    assert last["eval_margin"] > 0.1


# ---- compiled blocks ----


# torch's tracer does what torch warns of: it makes objects of autograd.Function, and looks for a gradient everywhere
tracer_warns = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated", "ignore:The .grad attribute of a Tensor"
)


@pytest.fixture
def compiler():
    """Lets go of what the test has compiled."""
    yield
    torch._dynamo.reset()


def compile_blocks(model, backend):
    model.model.compile_blocks(device.compiler(model.device, backend))


def uneven_batches(kind):
    """Micro-batches of other lengths and numbers of documents; the first has as many tokens as the model is wide."""
    lengths = [(20, 44), (33,), (3, 4, 5), (130, 2), (2,), (64, 64)]
    if kind == "dpo":
        draw = lambda n: [n % 97] * n  # noqa: E731
        return [data.dpo_batch([[Pair(draw(n), draw(n + 1), draw(3))] for n in each], None) for each in lengths]
    rows = [[Example([n * i % 97 for i in range(n)], [0] + [1] * (n - 1)) for n in each] for each in lengths]
    return [data.sft_batch([[e] for e in row], None) for row in rows]


def compiled_and_plain(kind, again, backend):
    """Losses and gradients of the same model, plain and compiled, of the batches; and the graphs after each of them."""
    model, found = make(num_hidden_layers=4, **WIDE), []
    torch.manual_seed(0)
    if kind == "int4":
        int4.quantize(model)
    if kind == "bf16":
        model.bfloat16()
    if kind == "full":
        model.requires_grad_(True)
    else:
        lora.attach(model, r=4, dropout=0.2)
        for module in lora.adapted(model).values():
            module.lora_B.weight.data.normal_(0, 0.1)
    method = training.dpo() if kind == "dpo" else training.sft()
    model.train()
    model.model.set_checkpointing(*again)
    batches, graphs = uneven_batches(kind), []
    for compiles in (False, True):
        if compiles:
            compile_blocks(model, backend)
            graphs.append(device.graphs_compiled())
        for batch in batches:
            torch.manual_seed(0)
            model.zero_grad()
            loss = method.objective(model, batch.tensors)["loss"] / batch.weight
            loss.backward()
            grads = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
            found.append((loss.detach(), grads / grads.abs().max().clamp_min(1e-3)))
            if compiles:
                graphs.append(device.graphs_compiled())
    return found[: len(batches)], found[len(batches) :], graphs


WIDE = dict(hidden_size=64, intermediate_size=96, head_dim=16)  # multiples of INT4's groups


@tracer_warns
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, again, backend",
    [("sft", ["attention", "mlp", "block", ""], "aot_eager"), ("int4", ["block"], "aot_eager"),
     ("dpo", ["block"], "eager"), ("bf16", [""], "eager"), ("full", [""], "eager")],
)  # fmt: skip
def test_compiled_blocks_learn_the_same_and_are_compiled_once_for_all_lengths(kind, again, backend, compiler):
    plain, compiled, graphs = compiled_and_plain(kind, again, backend)
    assert graphs[0] < graphs[1] == graphs[-1]
    assert graphs[1] - graphs[0] <= 3 * (3 if kind == "dpo" else 2)  # parts; by what has a gradient, and the reference
    for (loss, grads), (expected, expected_grads) in zip(compiled, plain):
        exact = 1e-2 if kind == "bf16" else 1e-5
        torch.testing.assert_close(loss, expected, rtol=exact, atol=exact)
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=exact)


@tracer_warns
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's imports
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist")  # torch 2.6
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_blocks_compiled_to_machine_code_learn_the_same(monkeypatch, compiler):
    """Without dropout, whose numbers differ; its sums are rounded in another order."""
    attach = lora.attach
    monkeypatch.setattr(lora, "attach", lambda model, r, dropout: attach(model, r))
    plain, compiled, graphs = compiled_and_plain("sft", [""], "inductor")
    assert graphs[1] == graphs[-1]
    for (loss, grads), (expected, expected_grads) in zip(compiled, plain):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=3e-5)


@pytest.mark.slow
@tracer_warns
def test_graphs_are_logged_and_one_that_is_made_again_shows(tmp_path, compiler):
    model = adapted()
    compile_blocks(model, "eager")
    last = fit(model, training.sft(), examples(12), examples(3, seed=1), tmp_path, steps=6, eval_every=3)
    records = logged(tmp_path)
    assert records[0]["graphs"] > 0 and last["graphs"] > records[0]["graphs"]  # evaluation's: without a gradient
    assert all(record["recompiled"] == 0 for record in records)

    model = adapted()
    compile_blocks(model, "eager")
    method = training.sft()
    seen = []

    def objective(model, tensors):
        seen.append(tensors)
        model.model.layers[1].mlp.down_proj.lora_on = len(seen) < 3  # what the program depends on changes
        return method.objective(model, tensors)

    last = fit(model, training.Method(objective, data.sft_batch), examples(12), steps=4)
    assert last["recompiled"] > 0

    def with_another(model, tensors):
        device.compiled_for_lengths(lambda x: x + 1, "eager")(torch.zeros(2, 3))  # as attention on CUDA
        return method.objective(model, tensors)

    assert "graphs" not in fit(adapted(), training.Method(with_another, data.sft_batch), examples(4))


# ---- numbers of steps, and what is logged ----


@pytest.mark.parametrize(
    "records, batch_size, accumulate, epochs, expected",
    [
        (8, 2, 1, 1, 4),
        (9, 2, 1, 1, 5),  # a last batch of one
        (9, 2, 2, 1, 3),  # and a last step of one batch
        (9, 2, 2, 2, 6),
        (10, 2, 2, 1.5, 5),  # 4.5, as transformers rounds
        (10, 2, 1, 0.5, 3),
        (8, 2, 1, 0.01, 1),
        (1, 8, 8, 3, 3),
    ],
)
def test_steps_are_counted_over_epochs(records, batch_size, accumulate, epochs, expected, tmp_path):
    seen = []
    method = training.sft()
    watched = training.Method(method.objective, lambda *a: seen.append(data.sft_batch(*a)) or seen[-1], method.summary)
    settings = dict(steps=None, epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    assert training.count_steps(data.Mix([examples(records)]), Settings(**settings)) == expected
    fit(adapted(targets=["q_proj"]), watched, examples(records), folder=tmp_path, **settings)
    assert [record["step"] for record in logged(tmp_path)] == list(range(1, expected + 1))
    names = [name for batch in seen for name in batch.where]
    for start in range(0, len(names) - records + 1, records):  # every whole epoch has every record once
        assert sorted(names[start : start + records]) == sorted(e.where for e in examples(records))
    assert len(set(names)) == min(len(names), records)


def test_every_epoch_has_its_own_order():
    wheres = []
    for _, batches in zip(
        range(8), training.steps(data.Mix([examples(8)]), Settings(batch_size=2), training.sft(), make().device)
    ):
        wheres += batches[0].where
    assert wheres[:8] != wheres[8:] and sorted(wheres[:8]) == sorted(wheres[8:])


def test_metrics_have_what_readers_rely_on(tmp_path):
    items = examples(6)
    settings = dict(steps=10, batch_size=3, accumulate=2, log_every=4, eval_every=3, schedule="linear", warmup=2)
    last = fit(adapted(), training.sft(), items, examples(3, seed=1), tmp_path, **settings)
    records = logged(tmp_path)
    assert [record["step"] for record in records] == [1, 3, 4, 6, 8, 9, 10]
    assert [record["step"] for record in records if "eval_loss" in record] == [3, 6, 9, 10]
    per_step = sum(map(len, items))
    for record in records:
        assert {"step", "loss", "perplexity", "grad_norm", "lr", "tokens", "tokens_per_s"} <= record.keys()
        assert record["tokens"] == per_step * record["step"]
        assert record["tokens_per_s"] > 0
        assert record["lr"] == optim.lr_at(record["step"] - 1, 10, 1e-2, "linear", 2)
        assert record["perplexity"] == pytest.approx(losses.perplexity(record["loss"]))
    assert last.items() <= records[-1].items()
    assert records[0]["lr"] == 0


# ---- what is refused ----


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_and_names_its_records(log_every):
    """Also when it is read later, when the steps after it are not finite either."""
    model, items = adapted(), examples(6)
    [[[a], [b]]] = data.order(data.Mix([items]), 2, 1, 42, 0)[1]
    second = [a, b]
    model.model.embed_tokens.weight.data[50] = math.nan
    for i, e in enumerate(items):
        e.ids = [51 if token == 50 else token for token in e.ids]
        e.ids[0] = 50 if i == second[0] else e.ids[0]
    named = ", ".join(items[i].where for i in second)
    with pytest.raises(BadInput, match=rf"not finite at step 2 .*records: {named};"):
        fit(model, training.sft(), items, steps=3, log_every=log_every)


def test_a_gradient_that_is_not_finite_stops_too():
    """The square root of zero is finite, its gradient is not."""
    method = training.sft()

    def objective(model, tensors):
        return {"loss": (method.objective(model, tensors)["loss"] * 0).sqrt()}

    with pytest.raises(BadInput, match="gradient is not finite at step 1"):
        fit(adapted(), training.Method(objective, data.sft_batch), examples())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The last update may break what no loss has seen: A's first gradient is 0, and 0 / (sqrt(0) + 0) is no number."""
    saved = Checkpoints(tmp_path, {}, lambda new: None, every=1)
    with pytest.raises(
        BadInput, match=r"state.safetensors: weight\..*lora_A.weight is not finite in torch.float32: not saved"
    ):
        fit(adapted(), training.sft(), examples(), steps=1, eps=0.0, checkpoints=saved)
    assert not list(tmp_path.rglob("step-*"))


def test_a_log_that_is_never_written_takes_no_memory():
    fit(adapted(), training.sft(), examples(), steps=2, log_every=10**12)


def test_nothing_to_learn_from_is_an_error():
    for items in ([], ()):
        with pytest.raises(BadInput, match="no record"):
            fit(adapted(), training.sft(), items)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(make().requires_grad_(False), training.sft(), examples())


# ---- trl ----


@pytest.mark.slow
# trl 1.16 sets and reads what transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_dpo_is_trls_trainer_step_for_step(tmp_path, monkeypatch):
    """Full training, 5 steps of 2 x 2 pairs each: trl's logged losses, rewards and gradient norms, and its weights."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    items = pairs(4)
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, dataset, *_: dataset)  # these are ids already
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w1"))
    trainer = trl.DPOTrainer(
        model=theirs(make()),
        ref_model=theirs(make()),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            max_grad_norm=1.0,
            adam_epsilon=1e-4,
            weight_decay=0.0,
            beta=0.3,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="w0", pad_token="w0", unk_token="w1"
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in items]
        ),
    )
    trainer.train()
    expected = [record for record in trainer.state.log_history if "loss" in record]

    model, method = make(), training.dpo(0.3)
    settings = dict(steps=5, batch_size=2, accumulate=2, lr=1e-3, warmup=1, eps=1e-4)
    items = data.Referenced(items, training.reference_logps(model, method, items, Settings()))
    fit(model, method, items, folder=tmp_path, **settings)
    names = {
        "loss": "loss",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
        "lr": "learning_rate",
    }
    assert len(expected) == 5 and expected[-1]["loss"] < 0.6
    for ours, other in zip(logged(tmp_path), expected):
        for name, their_name in names.items():
            if name != "accuracy" or ours["step"] > 2:  # before, of rewards that are 0 but for rounding
                assert ours[name] == pytest.approx(other[their_name], abs=1e-4), (ours["step"], name)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    final = trainer.model.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, final[name], rtol=0, atol=1e-5)
