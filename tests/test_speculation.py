"""Drafts change nothing but the number of forward passes."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import make
from hypothesis import given, settings
from hypothesis import strategies as st

from minichat import generation
from minichat.cache import KVCache
from minichat.errors import BadInput
from minichat.generation import generate
from minichat.speculation import LONGEST, SHORTEST, SIZES, Drafter


@pytest.mark.parametrize("window", [None, 8])
def test_the_same_tokens_in_fewer_passes(window, monkeypatch):
    """Of a random model, and of one whose tokens follow from the last one alone, so that it soon repeats itself."""
    # a clock by which a step takes as long with a draft as without: what is tried here is no speed
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    model, passes = make(sliding_window=window), []
    looping = make(sliding_window=window)
    for block in looping.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    for seed in range(5):
        prompt = torch.randint(0, 97, (9,), generator=torch.Generator().manual_seed(seed)).tolist() * 3
        expected = generate(looping, [prompt], 200, stop_ids=())
        passes.clear()
        assert generate(looping, [prompt], 200, stop_ids=(), speculate=True) == expected
        assert len(passes) < 150
        expected = generate(model, [prompt], 200, stop_ids=())
        assert generate(model, [prompt], 200, stop_ids=(), speculate=True) == expected
        stop = expected[0][60]
        until = generate(model, [prompt], 200, stop_ids=[stop])
        assert generate(model, [prompt], 200, stop_ids=[stop], speculate=True) == until
    for new in (1, 2, 7):
        assert generate(model, [prompt], new, stop_ids=(), speculate=True)[0] == expected[0][:new]


@pytest.mark.parametrize("right", range(16))
def test_a_draft_that_is_wrong_from_some_token_on(right, monkeypatch):
    """15 tokens of which the first `right` are the model's, again and again round a full ring."""
    model = make(sliding_window=8)
    expected = generate(model, [[1, 2, 3]], 100, stop_ids=())

    def propose(self):
        here = len(self.ids) - 3
        true = expected[0][here : here + 15]
        return [id if i < right else (id + 1) % 97 for i, id in enumerate(true)]

    monkeypatch.setattr(Drafter, "propose", propose)
    monkeypatch.setattr(Drafter, "learn", lambda *a: None)
    assert generate(model, [[1, 2, 3]], 100, stop_ids=(), speculate=True) == expected


def test_it_takes_one_greedy_prompt():
    for prompts, flags in (([[1], [2]], {}), ([[1]], {"temperature": 1.0}), ([[1]], {"repetition_penalty": 1.1})):
        with pytest.raises(BadInput, match="speculation"):
            generate(make(), prompts, 5, speculate=True, **flags)


@given(ids=st.lists(st.integers(0, 3), max_size=60))
@settings(deadline=None, max_examples=200)
def test_a_draft_is_what_followed_the_longest_end_that_came_before(ids):
    drafter = Drafter(ids)
    assert drafter.propose() == []  # before it is known what a step takes
    for _ in range(2):
        drafter.learn(0, 0, 1.0)
    draft = drafter.propose()
    expected = []
    for n in range(SHORTEST, LONGEST + 1):
        for end in range(n, len(ids)):
            if ids[end - n : end] == ids[len(ids) - n :]:  # the latest of the longest
                expected = ids[end : end + SIZES[0]] or expected
    assert draft == expected


def drafted(text: list[int], prompt: list[int], each, slow=lambda step: 1.0, compiling: float = 0) -> float:
    """How many steps of one token a text with drafts takes as long as; a token more costs each(step) of such a step.

    slow: how many times as long a step takes as it would; compiling: what the first of a number of tokens takes beyond
    that, which is not counted.
    """
    drafter, total, at, known, step = Drafter(prompt), 0.0, 0, set(), 0
    while at < len(text):
        draft = drafter.propose()[: len(text) - at - 1]
        right = next((i for i, id in enumerate(draft) if id != text[at + i]), len(draft))
        cost = (1 + each(step) * len(draft)) * slow(step)
        drafter.learn(len(draft), right, cost + compiling * (len(draft) not in known))
        known.add(len(draft))
        for id in text[at : at + right + 1]:
            drafter.append(id)
        total, at, step = total + cost, at + right + 1, step + 1
    return total


@given(
    ids=st.lists(st.integers(0, 5), min_size=120, max_size=400),
    each=st.floats(0, 1),
    growth=st.floats(0, 1),
    compiling=st.floats(0, 50),
)
@settings(deadline=None, max_examples=200)
def test_drafts_never_cost_more_than_a_twentieth(ids, each, growth, compiling):
    """Whatever the text, and whatever a token more costs on a machine, also if it costs more and more."""
    costs = drafted(ids, ids[:20], lambda step: min(each + growth * step / 400, 1), compiling=compiling)
    assert costs <= len(ids) / 0.95


def test_a_noisy_machine_loses_little():
    """Steps that take up to half as long again, of a text in which many drafts are found and few are right."""
    for seed in range(5):
        draw = random.Random(seed)
        ids = draw.choices(range(5), k=3000)
        noise = [1 + draw.random() / 2 for _ in ids]
        costs = drafted(ids, ids[:20], lambda step: 0.02 + 0.6 * step / 3000, noise.__getitem__)
        assert costs <= sum(noise) / 0.93


def test_one_slow_step_does_not_end_drafts():
    """The machine does something else for a while, at any of the first steps: a copy is found in long drafts yet."""
    text = [*range(200), *range(50, 450)]
    quick = drafted(text, list(range(500)), lambda step: 0.02)
    for at in range(40):
        costs = drafted(text, list(range(500)), lambda step: 0.02, lambda step, at=at: 10.0 if step == at else 1.0)
        assert costs <= 9 + 1.5 * quick


@pytest.mark.parametrize("each, least", [(0.02, 6), (0.2, 2.7), (0.5, 1.5)])
def test_a_copy_is_found_in_long_drafts(each, least):
    text = list(range(300))
    assert len(text) / drafted(text, text, lambda step: each, compiling=10) > least


def test_a_drafter_that_is_wrong_stops_and_tries_again_later():
    drafter, tried = Drafter([1, 2, 3, 4, 5] * 3), []
    for step in range(600):
        proposed = drafter.propose()
        if proposed:
            tried.append(step)
        drafter.learn(len(proposed), 0, 1 + 0.5 * len(proposed))
    assert 30 <= len(tried) <= 50 and tried[-1] > 550  # 0.035 of the time, and the credit at the start


def test_what_is_taken_back_was_never_there():
    """A rewound cache continues as one that never saw the columns, round the ring too."""
    model = make(sliding_window=8)
    where = torch.device("cpu")
    rewound = KVCache(model.config, 1, 100, where, torch.float32, spare=5)
    straight = KVCache(model.config, 1, 100, where, torch.float32)
    column = 0
    with torch.inference_mode():
        for size, wrong in ((3, 0), (2, 5), (1, 4), (6, 2), (1, 5), (7, 1), (2, 0)):
            ids = torch.randint(0, 97, (1, size))
            positions = torch.arange(column, column + size)[None]
            extra = torch.arange(column, column + size + wrong)[None]
            drafted = torch.cat([ids, torch.randint(0, 97, (1, wrong))], 1)
            found = model.model(drafted, extra, rewound)[:, :size]
            rewound.rewind(wrong)
            torch.testing.assert_close(found, model.model(ids, positions, straight), rtol=0, atol=1e-5)
            column += size
    assert rewound.filled == straight.filled == int(rewound.columns)
