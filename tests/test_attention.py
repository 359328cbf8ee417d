"""A packed row's attention in one call, against the mask by its definition and against document after document."""

import random
import shutil

import pytest
import torch

from minichat import attention, device
from minichat.attention import FLEX_BLOCK, FORKS, Documents, visible

CPU = torch.device("cpu")


def trees(rng, largest):
    """Lengths of documents and of trees, as of packed texts and of pairs; two tokens at the least."""
    size = lambda: rng.choice([1, 2, rng.randrange(1, largest)])  # noqa: E731
    found = [tuple(size() for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(1, 5))]
    return [(2, *found[0]), *found]


def seen_by_definition(lengths, window):
    """(T, T) bool: `visible` of positions and documents' numbers as a padded batch has them (data.py)."""
    positions, numbers = [], []
    for n, (trunk, *forks) in enumerate(lengths):
        for fork, m in enumerate((trunk, *forks)):
            first = trunk if fork else 0
            positions += range(first, first + m)
            numbers += [FORKS * n + fork] * m
    positions, numbers = torch.tensor([positions]), torch.tensor([numbers])
    return visible(positions, positions, window, numbers, numbers)[0, 0]


@pytest.fixture
def one_kernel():
    """As on CUDA, but run as it is by torch, which says what it means."""
    yield device.compiled_for_lengths(attention._flex, "eager")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("seed", range(6))
def test_one_call_sees_what_is_visible_and_skips_the_rest(seed, window):
    lengths = trees(random.Random(seed), 250)
    expected = seen_by_definition(lengths, window)
    T, documents = len(expected), Documents(lengths, window, CPU)
    n = documents._blocks()[0].numel() // FLEX_BLOCK
    # of scores that are all 0, the weights: 1 / count where a key is seen
    v = torch.eye(T, 1 << (T - 1).bit_length())[None, None]  # older torch takes powers of 2 alone
    found = documents.flex(torch.zeros(1, 1, T, 16), torch.zeros(1, 1, T, 16), v, attention._flex)
    assert torch.equal(found[0, 0, :, :T] > 0, expected)

    tiles = torch.zeros(n * FLEX_BLOCK, n * FLEX_BLOCK, dtype=torch.bool)
    tiles[:T, :T] = expected
    beyond = torch.arange(T, len(tiles))
    tiles[beyond, beyond] = True  # what fills up the row sees itself
    tiles = tiles.unflatten(1, (n, FLEX_BLOCK)).unflatten(0, (n, FLEX_BLOCK)).transpose(1, 2).flatten(2)  # (n, n, …)
    some, full = tiles.any(2), tiles.all(2)
    counts, indices, full_counts, full_indices = (x[0, 0] for x in documents.blocks[3:7])
    listed, listed_full = torch.zeros(2, n, n, dtype=torch.bool)
    for i in range(n):
        listed[i, indices[i, : counts[i]].long()] = True
        listed_full[i, full_indices[i, : full_counts[i]].long()] = True
    assert torch.equal(listed | listed_full, some)
    assert not (listed & listed_full).any() and not (listed_full & ~full).any()


def test_one_call_is_document_after_document_for_all_lengths_alike(one_kernel):
    """Also where the number of blocks is that of the heads, or of tokens that of a head's size, at first."""
    rng, made = random.Random(0), device.graphs_compiled()
    for lengths, window in [([(500,), (2 * FLEX_BLOCK,)], 100), *((trees(rng, 400), 100) for _ in range(6))]:
        documents, T = Documents(lengths, window, CPU), sum(map(sum, lengths))
        q, k, v = (torch.randn(1, heads, T, 64) for heads in (6, 2, 2))
        found = documents.flex(q, k, v, one_kernel)
        torch.testing.assert_close(found, documents._each(q, k, v), rtol=0, atol=1e-5)
    assert device.graphs_compiled() == made + 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's imports
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # torch 2.6, of its own settings
def test_the_compiled_call_skips_what_it_may(one_kernel):
    """As machine code it goes by the lists of blocks, which torch's own run of it does not look at."""
    kernel, made = device.compiled_for_lengths(attention._flex), device.graphs_compiled()
    for lengths in ([(200, 50, 300), (30,), (77, 13)], [(1, 1)], [(300, 9, 4), (600,)]):
        documents, T = Documents(lengths, 100, CPU), sum(map(sum, lengths))
        q, k, v = (torch.randn(1, heads, T, 16) for heads in (4, 2, 2))
        found = documents.flex(q, k, v, kernel)
        torch.testing.assert_close(found, documents._each(q, k, v), rtol=0, atol=1e-5)
    assert device.graphs_compiled() == made + 1


def test_only_cuda_takes_it_and_only_where_it_helps(monkeypatch):
    assert attention._one_kernel(CPU, torch.bfloat16, 2, 2, 16) is None
    calls = []
    instead = lambda q, *_: calls.append(q.shape[2]) or q  # noqa: E731
    monkeypatch.setattr(attention, "_one_kernel", lambda *kind: instead)
    for lengths, dtype in [([(9, 4)], torch.bfloat16), ([(9,), (4,)], torch.float32)]:
        x = torch.randn(1, 2, 13, 16, dtype=dtype)
        Documents(lengths, None, CPU).attention(x, x, x)
    assert not calls  # one causal sequence, and a dtype whose blocks are too large
    for lengths, window in [([(9,), (4,)], None), ([(5, 4, 4)], None), ([(13,)], 6)]:
        x = torch.randn(1, 2, 13, 16, dtype=torch.bfloat16)
        assert torch.equal(Documents(lengths, window, CPU).attention(x, x, x), x)
    assert calls == [2 * FLEX_BLOCK] * 3


@pytest.mark.parametrize("capability, tried", [((7, 5), 0), ((8, 0), 1)])
def test_what_fails_when_it_is_tried_is_not_taken(capability, tried, monkeypatch, capsys):
    seen = []

    def trial(kernel):
        seen.append(kernel)
        raise RuntimeError("no C compiler\nwas found")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    assert device.one_kernel(attention._flex, torch.device("cuda"), trial) is None
    said = capsys.readouterr().err.splitlines()
    assert len(seen) == len(said) == tried and all(line.endswith("slower: no C compiler was found") for line in said)
    assert device.one_kernel(attention._flex, torch.device("cuda"), lambda kernel: None) is not None or not tried


@pytest.mark.parametrize("around", ["checkpoint", "inference", "no_grad"])
def test_the_trial_is_a_step_whatever_is_going_on(around, monkeypatch):
    """And the block that it happens in is computed again only as often as without it."""
    runs, tried = [], []

    class Kernel(torch.autograd.Function):  # for _flex, which has no gradient on the CPU
        forward = staticmethod(lambda ctx, q, *more: ctx.save_for_backward(q) or q * 2)
        backward = staticmethod(lambda ctx, y: (tried.append(ctx.saved_tensors[0].shape) or y * 2, *[None] * 13))

    def one_kernel(function, where, trial):
        kernel = lambda *args: Kernel.apply(*args)  # noqa: E731
        trial(kernel)
        return kernel

    def block(x):
        runs.append(1)
        return Documents([(3,), (2,)], None, CPU).attention(x, x, x)

    monkeypatch.setattr(attention, "one_kernel", one_kernel)
    attention._one_kernel.cache_clear()
    x = torch.ones(1, 2, 5, 16, dtype=torch.bfloat16, requires_grad=True)
    try:
        if around == "checkpoint":
            torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
            assert torch.equal(x.grad, torch.full_like(x, 2))
        else:
            with torch.inference_mode() if around == "inference" else torch.no_grad():
                block(x.detach())
    finally:
        attention._one_kernel.cache_clear()
    steps = 2 if around == "checkpoint" else 1
    assert len(runs) == len(tried) == steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's imports
@pytest.mark.parametrize("first", ["with a gradient", "without"])
@pytest.mark.parametrize("window", [None, 100])
def test_on_a_card_values_and_gradients_are_those_of_document_after_document(window, first):
    """first: what it is called for at first; DPO asks for the reference's values before any gradient."""
    card = torch.device("cuda", torch.cuda.current_device())
    attention._one_kernel.cache_clear()  # compiled anew: it is tried with a gradient, and that graph is the step's
    made = device.graphs_compiled()
    assert attention._one_kernel(card, torch.bfloat16, 8, 2, 128) is not None
    for lengths in ([(200, 50, 300), (30,), (77, 13)], [(1, 1), (9,)], [(300, 9, 4), (600,)]):
        documents, T = Documents(lengths, window, card), sum(map(sum, lengths))
        q, k, v = (torch.randn(1, heads, T, 128, device=card, dtype=torch.bfloat16) for heads in (8, 2, 2))
        found, weights = [], torch.randn_like(q)
        if first == "without":
            with torch.no_grad():
                values = documents.attention(q, k, v)
        for function in (documents.attention, documents._each):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            y = function(*inputs)
            found.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
        if first == "without":
            found = [[values, *found[0]], [found[1][0], *found[1]]]
        for one, other in zip(*found):
            assert (one - other).float().norm() < 1e-2 * other.float().norm()
    assert device.graphs_compiled() == made + (2 if first == "without" else 1)
