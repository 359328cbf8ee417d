"""Items to batches: what an epoch takes, in which order, and where each target stands."""

import math
import random
import statistics

import pytest
import torch
from helpers import make
from hypothesis import given, settings
from hypothesis import strategies as st

from minichat import data, training
from minichat.attention import FORKS
from minichat.cli import BASE
from minichat.errors import BadInput
from minichat.examples import Example, Pair
from minichat.tokenizer import Tokenizer

TOKENIZER = Tokenizer(BASE)
EOS = TOKENIZER.eos_id


def mix(*lengths, weights=None):
    """Sources of items that have these lengths, and nothing else."""
    return data.Mix([[range(n) for n in each] for each in lengths], weights)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_an_epoch_is_a_permutation_by_seed_and_epoch_alone(lengths, batch_size, accumulate, seed, epoch):
    steps = data.order(mix(lengths), batch_size, accumulate, seed, epoch)
    assert sorted(i for step in steps for batch in step for [i] in batch) == list(range(len(lengths)))
    assert len(steps) == math.ceil(len(lengths) / (batch_size * accumulate))
    assert all(0 < len(step) <= accumulate for step in steps)
    assert all(0 < len(batch) <= batch_size for step in steps for batch in step)
    torch.manual_seed(epoch)  # other randomness does not reach it
    assert data.order(mix(lengths), batch_size, accumulate, seed, epoch) == steps


def test_epochs_and_seeds_differ():
    orders = [data.order(mix([5] * 40), 2, 1, seed, epoch) for seed in (0, 1, 10) for epoch in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_a_step_is_a_random_sample_whatever_the_lengths_are():
    """The mean length of a step scatters as that of a sample does: short and long answers meet in every step."""
    lengths = [10, 10, 10, 100] * 160
    for batch_size, accumulate in ((16, 1), (4, 4)):
        means = [
            sum(lengths[i] for b in s for [i] in b) / 16 for s in data.order(mix(lengths), batch_size, accumulate, 0, 0)
        ]
        expected = statistics.pstdev(lengths) / 4
        assert 0.5 * expected < statistics.pstdev(means) < 1.5 * expected


def test_weights_are_the_shares_of_an_epoch():
    """7 : 3 of 100 and 90 records: all of the first that 7 : 3 allows, nothing twice, and in the end everything."""
    both = mix([1] * 100, [2] * 90, weights=[0.7, 0.3])
    epochs = [both.epoch(0, e) for e in range(9)]
    for indices in epochs:
        assert len(indices) == len(set(indices)) == sum(both.counts) == 143
        assert sum(i < 100 for i in indices) == 100
    seen = [i for indices in epochs[:2] for i in indices if i >= 100]
    assert len(seen) == len(set(seen)) == 86  # the second epoch takes what the first left
    assert set().union(*epochs) == set(range(190))
    assert set(both.epoch(1, 0)) != set(epochs[0])  # by the seed too
    assert mix([1] * 100, [2] * 90, weights=[7, 3]).counts == both.counts  # shares, whatever they add up to
    assert mix([1] * 100, [2] * 90).counts == [100, 90]
    assert mix([1] * 3, [2] * 1000, weights=[1, 1e-6]).counts == [3, 1]
    assert mix([1] * 3, [2] * 1000, weights=[1e9, 1e-9]).counts == [3, 1]
    assert mix([1] * 3, [2] * 1000, weights=[1e-9, 1e9]).counts == [1, 1000]
    with pytest.raises(BadInput, match="some have none"):
        mix([1], [2], weights=[0.5, None])


def test_micro_batches_hold_similar_lengths():
    lengths = [(37 * i) % 101 for i in range(640)]
    batches = [batch for step in data.order(mix(lengths), 4, 8, 0, 0) for batch in step] + data.by_length(lengths, 4)
    spans = [max(lengths[i] for [i] in batch) - min(lengths[i] for [i] in batch) for batch in batches]
    assert sum(spans) / len(spans) < 15  # of 100: what is padded is little


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(8, 64), st.integers(0, 3), st.integers(0, 3))
def test_packed_rows_hold_every_item_once_and_no_more_than_they_can(lengths, capacity, seed, epoch):
    steps = data.order(mix(lengths), 2, 3, seed, epoch, capacity)
    rows = [row for step in steps for batch in step for row in batch]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity or len(row) == 1 for row in rows)
    assert all(len(batch) <= 2 for step in steps for batch in step) and all(len(step) <= 3 for step in steps)
    assert steps == data.order(mix(lengths), 2, 3, seed, epoch, capacity)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 64))
def test_packing_is_best_fit(lengths, capacity):
    """By the definition: of the rows that an item fits in, one with the least room."""
    rooms = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else max(capacity, length)) - length)
    rows = data.pack(lengths, range(len(lengths)), capacity, "seed")
    found = [max(capacity, *(lengths[i] for i in row)) - sum(lengths[i] for i in row) for row in rows]
    assert sorted(found) == sorted(rooms)


def test_packing_fills_rows_of_a_slimorca_like_mix():
    """Over 97 % of the positions, and rows remain mixtures: their mean length scatters as that of any sample."""
    random.seed(0)
    lengths = [min(2048, max(30, int(random.lognormvariate(5.8, 0.6)))) for _ in range(20000)]
    rows = data.pack(lengths, mix(lengths).epoch(0, 0), 2048, "seed")
    assert sum(lengths) / (2048 * len(rows)) > 0.97
    means = [statistics.fmean(lengths[i] for i in row) for row in rows]
    halves = means[: len(means) // 2], means[len(means) // 2 :]
    assert statistics.fmean(halves[0]) == pytest.approx(statistics.fmean(halves[1]), rel=0.05)


EXAMPLES = [
    Example([1, 5, 6, 7, EOS], [0, 0, 1, 1, 1], "a"),
    Example([1, 8, EOS], [1, 1, 1], "b"),  # nothing predicts the first token
    Example([1, 9, EOS, 10, 11, EOS, 12], [0, 1, 1, 0, 1, 1, 0], "c"),  # turns
]


def targets_of(items):
    """(row, position that predicts, token) of every target, by the definition."""
    return [(b, t - 1, e.ids[t]) for b, e in enumerate(items) for t in range(1, len(e)) if e.mask[t]]


def index_of(found):
    """The flat position that predicts each target, in the order of "labels"; real ones alone, and which those are."""
    index = found.get("index")
    if index is None:
        index = torch.cat([torch.arange(found["ids"].numel()), found.get("again", torch.arange(0))])
    real = found["weights"] > 0
    return index[real], real


def test_sft_batch_puts_each_target_where_it_is_predicted():
    batch = data.sft_batch([[e] for e in EXAMPLES], lambda n: n)
    found = batch.tensors
    assert found["ids"].shape == (3, 7)
    for row, example in zip(found["ids"].tolist(), EXAMPLES):
        assert row[: len(example)] == example.ids
    T = 7
    index, real = index_of(found)
    where = [(int(i) // T, int(i) % T, int(label)) for i, label in zip(index, found["labels"][real])]
    assert where == targets_of(EXAMPLES)
    assert found["document"][real].tolist() == [b for b, _, _ in targets_of(EXAMPLES)]
    assert len(found["weights"]) == 21  # as many as there are tokens: no shape follows from them
    assert (batch.weight, batch.tokens, batch.where) == (9, 15, ["a", "b", "c"])
    # eos is learnt, three times in the answers, whatever the padding is
    assert found["labels"][real].tolist().count(EOS) == 4


@pytest.mark.parametrize("pad_to", [None, lambda n: n, lambda n: n + 5], ids=["ragged", "rows", "padded"])
def test_packed_documents_keep_their_targets_and_start_their_positions_again(pad_to):
    rows = [[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[2]]]
    batch = data.sft_batch(rows, pad_to)
    found = batch.tensors
    flat, n = found["ids"].flatten(), 9  # targets
    index, real = index_of(found)
    where = [(int(d), int(label)) for d, label in zip(found["document"][real], found["labels"][real])]
    assert where == [(b, token) for b, _, token in targets_of(EXAMPLES)]
    assert torch.equal(flat[index + 1], found["labels"][real])
    assert found["weights"].sum() == n == batch.weight
    if pad_to is None:
        assert found["documents"] == [(5,), (3,), (7,)] and found["ids"].shape == (1, 15) and "positions" not in found
    else:
        T = pad_to(8)
        assert found["positions"].tolist() == [
            [0, 1, 2, 3, 4, 0, 1, 2] + [-1] * (T - 8),
            [0, 1, 2, 3, 4, 5, 6] + [-1] * (T - 7),
        ]
        a, b, c = (FORKS * n for n in range(3))
        assert found["documents"].tolist() == [[a] * 5 + [b] * 3 + [-1] * (T - 8), [c] * 7 + [-1] * (T - 7)]
    assert "documents" not in data.sft_batch([[e] for e in EXAMPLES], lambda n: n).tensors  # nothing is packed


@pytest.mark.parametrize("pad_to", [None, lambda n: n], ids=["ragged", "rows"])
def test_dpo_batch_has_each_prompt_once_and_its_answers_after_it(pad_to):
    items = [Pair([1, 5], [6, 7, EOS], [8, EOS], "a"), Pair([1, 9, 10], [11, EOS], [12, 13, 14, EOS], "b")]
    batch = data.dpo_batch([[pair] for pair in items], pad_to)
    found = batch.tensors
    rows = [[1, 5, 6, 7, EOS, 8, EOS], [1, 9, 10, 11, EOS, 12, 13, 14, EOS]]
    flat = found["ids"].flatten().tolist()
    if pad_to is None:
        assert flat == rows[0] + rows[1] and found["documents"] == [(2, 3, 2), (3, 2, 4)]
    else:
        assert found["ids"].tolist() == [rows[0] + [0] * 2, rows[1]]
        assert found["positions"].tolist() == [[0, 1, 2, 3, 4, 2, 3, -1, -1], [0, 1, 2, 3, 4, 3, 4, 5, 6]]
        a, b = 0, FORKS
        assert found["documents"].tolist() == [
            [a, a, a + 1, a + 1, a + 1, a + 2, a + 2, -1, -1],
            [b, b, b, b + 1, b + 1, b + 2, b + 2, b + 2, b + 2],
        ]
    # by the definition: (what predicts, what is predicted) of the chosen answers, then of the rejected
    answers = [[(5, 6), (6, 7), (7, EOS)], [(10, 11), (11, EOS)], [(5, 8), (8, EOS)]]
    answers += [[(10, 12), (12, 13), (13, 14), (14, EOS)]]
    for number, answer in enumerate(answers):
        index, real = index_of(found)
        mine = found["document"][real] == number
        pairs = list(zip((flat[i] for i in index[mine].tolist()), found["labels"][real][mine].tolist()))
        # where shapes have to stay, the first token of a rejected answer comes last
        assert pairs == answer if pad_to is None else sorted(pairs) == sorted(answer)
    assert found["weights"].sum() == 11
    assert (batch.weight, batch.tokens, batch.where) == (2, sum(map(len, rows)), ["a", "b"])
    assert "reference" not in found
    for pair, reference in zip(items, ((-1.0, -2.0), (-3.0, -4.0))):
        pair.reference = reference
    assert data.dpo_batch([[pair] for pair in items], lambda n: n).tensors["reference"].tolist() == [-1, -3, -2, -4]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
@torch.no_grad()
def test_dpo_sums_or_averages_the_answers_tokens_that_count(kind):
    pair = Pair([1, 5], [6, 7, EOS, 8, 9, EOS, 10], [11, EOS], "a", masks=([1, 1, 1, 0, 0, 1, 0], [1, 1]))
    model = make(vocab_size=TOKENIZER.vocab_size)
    expected = []
    for answer, mask in zip((pair.chosen, pair.rejected), pair.masks):
        full = model(torch.tensor([pair.prompt + answer]))[0].log_softmax(-1)
        each = torch.stack([full[1 + i, token] for i, token in enumerate(answer) if mask[i]])
        expected.append(each.mean() if kind == "ipo" else each.sum())
    method = training.dpo(kind=kind)
    found = method.logps(model, method.batch([[pair]], lambda n: n).tensors)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("kind", ["sft", "sigmoid", "ipo"])
def test_a_bucket_changes_no_loss_and_no_gradient(kind):
    """Padding to a device's static shapes, of length and of rows, adds targets and pairs of weight 0 only."""
    model = make(vocab_size=TOKENIZER.vocab_size)
    if kind == "sft":
        method, items = training.sft(), EXAMPLES
    else:
        method, items = training.dpo(kind=kind, reference_free=True), [Pair([1, 5], [6, 7, EOS], [8, EOS], "a")]
    results = []
    for pad_to, empty in ((lambda n: n, []), (lambda n: n + 13, [[], []])):
        batch = method.batch([[item] for item in items] + empty, pad_to)
        model.zero_grad()
        sums = method.objective(model, batch.tensors)
        sums["loss"].backward()
        results.append((batch, {k: v.detach() for k, v in sums.items()}, [p.grad.clone() for p in model.parameters()]))
    (plain, sums, grads), (padded, padded_sums, padded_grads) = results
    assert padded.tensors["ids"].shape[1] == plain.tensors["ids"].shape[1] + 13
    assert len(padded.tensors["labels"]) == padded.tensors["ids"].numel() + (kind != "sft") * 3
    assert padded.tensors["weights"].sum() == plain.tensors["weights"].sum()
    assert (padded.weight, padded.tokens) == (plain.weight, plain.tokens)
    torch.testing.assert_close(padded_sums, sums)
    for one, other in zip(padded_grads, grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
