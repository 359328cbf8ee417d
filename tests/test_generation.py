"""Sampling against transformers' processors; stopping, batching, streaming."""

import gc
import math
import weakref

import pytest
import torch
from helpers import make

from minichat import generation
from minichat.cli import BASE
from minichat.errors import BadInput
from minichat.generation import Kept, Sampling, answer, decode, generate, restrict, sample
from minichat.tokenizer import Tokenizer


def logits(seed=0, rows=3, vocab=50) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def warped(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """transformers' chain of warpers."""
    process = pytest.importorskip("transformers.generation.logits_process")
    if temperature != 1:
        scores = process.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = process.MinPLogitsWarper(min_p)(None, scores)
    return scores


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(5, 1, 0), (0, 0.7, 0), (0, 1, 0.2), (20, 0.9, 0.05), (1, 1, 0), (0, 0.01, 0)]
)
def test_restrict_is_transformers_warpers(top_k, top_p, min_p):
    expected = warped(logits(), top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(restrict(logits(), top_k, top_p, min_p), expected)


def test_repetition_penalty_is_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.randint(0, 50, (3, 8))
    expected = process.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits()).argmax(-1)
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(sample(logits(), Sampling(repetition_penalty=1.7), seen, None), expected)


def test_generate_with_penalty_is_transformers():
    from helpers import theirs

    model = make()
    ids = torch.tensor([[5, 6, 7]])
    kwargs = dict(do_sample=False, max_new_tokens=40, repetition_penalty=1.3, eos_token_id=None, pad_token_id=0)
    expected = theirs(model).generate(ids, **kwargs)[0, 3:].tolist()
    assert generate(model, [[5, 6, 7]], 40, repetition_penalty=1.3, stop_ids=()) == [expected]


@pytest.mark.parametrize(
    "numbers",
    [
        dict(temperature=0.8, top_k=5),
        dict(temperature=2.0, top_p=0.7, min_p=0.1),  # here top-p leaves less than min-p,
        dict(temperature=2.0, top_k=9, top_p=0.95, min_p=0.2),  # and here min-p
    ],
)
def test_draws_follow_transformers_warpers(numbers):
    """Frequencies of 20,000 draws against the probabilities, within five standard deviations."""
    row = logits(seed=1, rows=1, vocab=20)
    probs = warped(row, **numbers).softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    draws = sample(row.expand(20000, -1), Sampling(**numbers), None, generator)
    counts = torch.bincount(draws, minlength=20) / 20000
    assert ((counts - probs).abs() <= 5 * (probs * (1 - probs) / 20000).sqrt()).all()
    assert (counts[probs == 0] == 0).all()


def test_the_seed_gives_the_same_draw():
    model = make()
    draw = dict(max_new_tokens=20, temperature=1.0, stop_ids=())
    rows = [generate(model, [[1, 2]], seed=seed, **draw) for seed in (0, 0, 2**63 - 1)]
    assert rows[0] == rows[1] != rows[2]
    assert generate(model, [[1, 2]], **draw) != generate(model, [[1, 2]], **draw)  # no seed: another draw each time


def test_temperature_goes_to_greedy():
    model = make()
    greedy = generate(model, [[3, 4]], 15, stop_ids=())
    for temperature in (1e-4, 1e-7, 1e-39):
        assert generate(model, [[3, 4]], 15, temperature=temperature, stop_ids=(), seed=0) == greedy
    assert generate(model, [[3, 4]], 15, temperature=1.0, top_k=1, stop_ids=(), seed=0) == greedy


def test_rows_stop_by_themselves():
    model = make()
    prompts = [[1, 2, 3], [4], [9, 8, 7, 6]]
    free = generate(model, prompts, 30, stop_ids=())
    stop = free[0][4]
    stopped = generate(model, prompts, 30, stop_ids=[stop])
    for long, short in zip(free, stopped):
        end = long.index(stop) + 1 if stop in long else 30
        assert short == long[:end]


def test_config_eos_is_the_default_stop():
    model = make()
    free = generate(model, [[1, 2]], 30, stop_ids=())[0]
    model.config.eos_token_id = free[3]
    assert generate(model, [[1, 2]], 30)[0] == free[: free.index(free[3]) + 1]
    model.config.eos_token_id = [96, free[2]]
    assert generate(model, [[1, 2]], 30)[0] == free[: min(free.index(i) for i in (96, free[2]) if i in free) + 1]


BAD = {
    "empty": ([[]], 5, {}),
    "none": ([], 5, {}),
    "too long": ([[1] * 4090], 10, {}),
    "no tokens": ([[1]], 0, {}),
    "beyond the vocabulary": ([[97]], 5, {}),
    "negative id": ([[-1]], 5, {}),
    "temperature": ([[1]], 5, {"temperature": -1}),
    "nan": ([[1]], 5, {"temperature": math.nan}),
    "top_p": ([[1]], 5, {"top_p": 0}),
    "top_k": ([[1]], 5, {"top_k": -2}),
    "min_p": ([[1]], 5, {"min_p": 1.5}),
    "penalty": ([[1]], 5, {"repetition_penalty": 0}),
    "half a token": ([[1]], 5, {"temperature": 1, "top_k": 2.5}),
    "a cache of integers": ([[1]], 5, {"kv": torch.int64}),
    "seed below 0": ([[1]], 5, {"seed": -1}),
    "seed too large": ([[1]], 5, {"seed": 2**64}),
}


@pytest.mark.parametrize("prompts, new, flags", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(prompts, new, flags):
    with pytest.raises(BadInput) as error:
        generate(make(), prompts, new, **flags)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def talker():
    """A random model over the shipped tokenizer: it speaks in bytes and pieces of words."""
    tokenizer = Tokenizer(BASE)
    return make(vocab_size=tokenizer.vocab_size, sliding_window=64), tokenizer


def test_streamed_pieces_are_the_answers(talker):
    model, tokenizer = talker
    prompts = [tokenizer.encode(text) for text in ("calculate 1 + 2", "What", "é")]
    pieces = ["", "", ""]

    def on_text(row, piece):
        pieces[row] += piece

    answers = answer(model, tokenizer, prompts, 60, Sampling(temperature=1.5, seed=3), on_text=on_text)
    for piece, found in zip(pieces, answers):
        assert piece == found.text == tokenizer.decode(found.ids)
        assert found.finish == ("stop" if found.ids[-1] in tokenizer.stop_ids else "length")


def test_stop_strings_end_a_row_before_them(talker):
    model, tokenizer = talker
    prompts = [tokenizer.encode(text) for text in ("calculate", "add")]
    free = answer(model, tokenizer, prompts, 60, Sampling(), stop_ids=())
    text = free[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    for found, whole in zip(answer(model, tokenizer, prompts, 60, Sampling(), stop=[stop], stop_ids=()), free):
        assert found.text == whole.text.split(stop)[0]
        assert found.finish == ("stop" if stop in whole.text else "length")
        assert whole.ids[: len(found.ids)] == found.ids


def test_a_special_token_as_a_stop_string(talker):
    """It has no text in an answer: it ends one by its id, and beside the ids that end one anyway."""
    model, tokenizer = talker
    prompts = [tokenizer.encode(text) for text in ("calculate", "add")]
    free = answer(model, tokenizer, prompts, 30, Sampling(), stop_ids=())[0].ids
    at = next(i for i in range(5, 30) if free[i] not in free[:i] and free[i] > 2)
    head = model.lm_head.weight.data
    swapped = make(vocab_size=tokenizer.vocab_size, sliding_window=64)  # says <s> where the other says that token
    swapped.lm_head.weight.data[[1, free[at]]] = head[[free[at], 1]]
    assert tokenizer.special_id("<s>") == 1 and tokenizer.special_id("calculate") is None
    for stop_ids in ((), (2,), None):
        found = answer(swapped, tokenizer, prompts, 30, Sampling(), stop=["never said", "<s>"], stop_ids=stop_ids)[0]
        assert found.ids == [*free[:at], 1] and found.finish == "stop"
        assert found.text == tokenizer.decode(free[:at])
    early = answer(swapped, tokenizer, prompts, 30, Sampling(), stop=["<s>"], stop_ids=[free[2]])[0]
    assert early.ids == free[: free.index(free[2]) + 1] and early.finish == "stop"


def test_answers_are_generates(talker):
    model, tokenizer = talker
    prompts = [tokenizer.encode("calculate 4"), tokenizer.encode("sum of 3 and 4")]
    rows = generate(model, prompts, 25, stop_ids=tokenizer.stop_ids)
    assert [a.ids for a in answer(model, tokenizer, prompts, 25, Sampling())] == rows


def test_a_graph_ends_with_each_chunk_and_each_token(monkeypatch):
    """On an HPU nothing runs before: what is set up, a prompt of 10 in chunks of 4, then 7 tokens."""
    marks = []
    monkeypatch.setattr("minichat.device.mark_step", marks.append)
    monkeypatch.setattr("minichat.device.prompt_chunk", lambda where: 4)
    steps = decode(make(), [list(range(10)), [3]], 7, Sampling(), stop_ids=())
    assert [len(marks) for _ in steps] == [1 + 3 + 1, 6, 7, 8, 9, 10, 11]
    assert set(marks) == {torch.device("cpu")}


def test_no_host_synchronisation_between_reads(monkeypatch):
    """The loop asks the device for a value only to see whether all rows are done, as often as the device says."""
    from minichat import device

    reads = []
    monkeypatch.setattr(device, "tokens_between_syncs", lambda where: 8)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, plain=plain: (reads.append(1), plain(self, *a))[1])
    steps = list(decode(make(), [[1, 2], [3]], 32, Sampling(temperature=1.0, seed=0), stop_ids=[96]))
    assert len(reads) <= 32 // 8 and len(steps) >= 8


def test_the_rate_is_of_tokens_after_the_first_reading(monkeypatch):
    """Where the host reads 16 tokens at once, the time between the first and the last of them says nothing."""
    from minichat import device

    tokenizer, model = Tokenizer(BASE), make(vocab_size=Tokenizer(BASE).vocab_size)
    clock = iter(range(10**6))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(clock))  # a second for every look at it

    def rate(new, every):
        monkeypatch.setattr(device, "tokens_between_syncs", lambda where: every)
        [answer] = generation.answer(model, tokenizer, [[5, 6]], new, Sampling(), stop_ids=())
        assert len(answer.ids) == new
        return answer.tokens_per_s

    assert rate(1, 1) is rate(16, 16) is rate(12, 16) is None
    assert rate(9, 1) == pytest.approx(8 / 9) and rate(40, 16) == pytest.approx(24 / 40)


@pytest.fixture
def keeping(monkeypatch):
    monkeypatch.setattr("minichat.device.keeps_graphs", lambda where: True)  # as on CUDA


def test_a_kept_loop_says_what_a_new_one_says(keeping):
    """Other lengths, seeds, penalties, caches and numbers of rows; and after one that was left in the middle."""
    model, kept = make(sliding_window=None), Kept()
    longer, shorter, two = [[5, 6, 7] * 9], [[8, 9]], [[5], [6, 7, 8]]
    cold, warm, warmer = Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=1.0, seed=4)
    strict, bytes_ = Sampling(repetition_penalty=1.4), torch.int8
    steps = [  # prompts, how, and whether what is there serves
        (shorter, cold, None, False), (longer, cold, None, False), (shorter, cold, None, True),
        (longer, cold, None, True), (two, cold, None, False), (two, warm, None, False), (two, warmer, None, True),
        (two, warm, None, True), (two, strict, None, False), (longer, strict, None, False),
        (shorter, strict, None, True), (shorter, strict, bytes_, False), (shorter, strict, bytes_, True),
    ]  # fmt: skip
    for prompts, sampling, kv, served in steps:
        before = kept.loop
        next(decode(model, prompts, 20, sampling, (3,), kv=kv, kept=kept))
        assert (kept.loop is before) == served
        expected = list(decode(model, prompts, 20, sampling, (3,), kv=kv))
        assert list(decode(model, prompts, 20, sampling, (3,), kv=kv, kept=kept)) == expected


def test_a_loop_goes_with_its_answer(keeping):
    """At once, a cache being large, and not when Python looks for cycles; a kept one when another takes its place."""
    model, caches, kept = make(), [], Kept()
    made = generation.KVCache.__init__

    def watched(cache, *args, **kwargs):
        made(cache, *args, **kwargs)
        caches.append(weakref.ref(cache))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation.KVCache, "__init__", watched)
            list(decode(model, [[4, 5]], 10, Sampling(), ()))
            next(decode(model, [[4, 5]], 10, Sampling(), ()))
            list(decode(model, [[4, 5]], 10, Sampling(), (), kept=kept))
            list(decode(model, [[4, 5], [6]], 10, Sampling(), (), kept=kept))
        assert [cache() is None for cache in caches] == [True, True, True, False]
    finally:
        gc.enable()


def test_a_loop_that_failed_is_not_kept(keeping, monkeypatch):
    model, kept = make(), Kept()
    list(decode(model, [[4, 5]], 10, Sampling(), (), kept=kept))
    steps = decode(model, [[4, 5]], 10, Sampling(), (), kept=kept)
    next(steps)
    monkeypatch.setattr(generation, "sample", None)
    with pytest.raises(TypeError):
        next(steps)
    assert kept.loop is None


def test_a_kept_loop_is_one_answers_alone(keeping):
    """Two at once, and stop ids and a model that are others."""
    model, kept = make(), Kept()
    list(decode(model, [[4, 5]], 10, Sampling(), (), kept=kept))
    first, second = (decode(model, [[id, 5, 6]], 10, Sampling(), (), kept=kept) for id in (5, 9))
    both = list(zip(first, second))
    for row, id in enumerate((5, 9)):
        assert [tokens[row] for tokens in both] == list(decode(model, [[id, 5, 6]], 10, Sampling(), ()))
    stop = generate(model, [[5, 5, 6]], 10, stop_ids=())[0][4]
    found = list(decode(model, [[5, 5, 6]], 10, Sampling(), (stop,), kept=kept))
    assert len(found) <= 5 and found[-1] == [stop]
    other = make(seed=1)
    assert list(decode(other, [[5, 6]], 9, Sampling(), (), kept=kept)) == list(
        decode(other, [[5, 6]], 9, Sampling(), ())
    )


def test_nothing_is_kept_where_a_graph_costs_nothing():
    kept = Kept()
    list(decode(make(), [[4, 5]], 10, Sampling(), (), kept=kept))
    assert kept.loop is None
