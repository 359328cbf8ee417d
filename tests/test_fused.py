"""The CPU's decode step against the plain model over the same INT4 weights, and where it is used."""

import threading

import pytest
import torch

from minichat import fused, generation, int4, lora
from minichat.cache import KVCache
from minichat.kernels import cpu
from minichat.model import Config, Mistral

SETS = ["portable", "avx2", "avx512", "avx512_bf16"]
#          H KvH Hd  inner window exact symmetric
SHAPES = [(8, 2, 32, 192, None, True, True), (8, 4, 64, 320, 6, True, False), (6, 1, 32, 96, 4, False, True)]
SHAPES += [(4, 4, 128, 160, 9, True, True), (10, 2, 32, 64, None, True, True), (6, 1, 96, 64, None, True, True)]
SHAPES += [(2, 1, 256, 64, 7, True, True), (8, 2, 64, 96, 5, False, True), (5, 1, 128, 64, None, False, False)]


@pytest.fixture(scope="module", params=SETS)
def isa(request):
    if not cpu.available():
        pytest.skip("no C++ compiler")
    if SETS.index(request.param) > cpu.isa():
        pytest.skip(f"this machine has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "isa", lambda: SETS.index(request.param))
        yield request.param


def make(H=8, KvH=2, Hd=32, inner=192, window=None, exact=True, symmetric=True, bits=4):
    torch.manual_seed(0)
    # other constants than Config's defaults, large enough to show
    model = Mistral(Config(97, 256, inner, 3, H, KvH, Hd, window, 4096, rope_theta=500.0, rms_norm_eps=0.1))
    model.init_weights(1)
    for weight in model.parameters():
        weight.data = weight * 3 if weight.dim() > 1 else weight + 0.2 * torch.randn_like(weight)
    int4.quantize(model, 32, bits, symmetric)
    return int4.set_exact(model, exact).eval()


def caches(model, rows, slots, dtype):
    return [KVCache(model.config, rows, slots, torch.device("cpu"), dtype) for _ in range(2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_the_step_is_the_model(isa, shape, dtype):
    """A prompt, single tokens, several at once; rows of other lengths; round the ring and past the window."""
    model = make(*shape)
    plain, ours = caches(model, 3, 20, dtype)
    step, column = fused.CpuStep(model, ours), 0
    limit = (2e-3 if dtype == torch.float32 else 3e-2) if shape[5] else 5e-2  # roundings that fall to the other side
    for T in (5, 1, 1, 3, 1, 1, 1, 4, 1):
        ids = torch.randint(0, 97, (3, T))
        positions = torch.arange(column, column + T).repeat(3, 1) - torch.tensor([[0], [2], [4]])
        positions = positions.clamp_min(-1)
        expected, found = model.model(ids, positions, plain), step(ids, positions)
        real = positions >= 0
        assert (found - expected)[real].norm() / expected[real].norm() < limit
        assert torch.equal(plain.positions, ours.positions) and plain.filled == ours.filled
        column += T


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
def test_the_cache_of_int4_is_in_bf16(monkeypatch):
    made = []
    monkeypatch.setattr(generation, "KVCache", lambda *args, **more: (made.append(args[4]), KVCache(*args, **more))[1])
    for kv in (None, torch.float32, torch.int8):
        generation.generate(make(), [[3, 4, 5]], 2, stop_ids=(), kv=kv)
    assert made == [torch.bfloat16, torch.float32, torch.int8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_keys_that_nobody_sees(isa, dtype):
    """Whole blocks of them: before a row that is padded on the left, and of what has left the window."""
    for window in (None, 20):
        model = make(8, 2, 64, window=window)
        spare = 80 if window else 0  # slots that hold what the window has left
        plain, ours = [KVCache(model.config, 2, 100 - spare, torch.device("cpu"), dtype, spare) for _ in range(2)]
        step, column = fused.CpuStep(model, ours), 0
        for T in (75, 1, 1, 8, 1):
            ids, positions = torch.randint(0, 97, (2, T)), torch.arange(column, column + T).repeat(2, 1)
            positions[1] = (positions[1] - 70).clamp_min(-1)
            expected, found = model.model(ids, positions, plain), step(ids, positions)
            real = positions >= 0
            limit = 2e-3 if dtype == torch.float32 else 3e-2
            assert (found - expected)[real].norm() / expected[real].norm() < limit
            column += T


@pytest.mark.parametrize("dtype, exact", [(torch.bfloat16, True), (torch.int8, True), (torch.int8, False)])
@torch.inference_mode()
def test_attention_adds_little_to_what_is_rounded_anyway(isa, dtype, exact):
    """Its products are of 16-bit numbers, or of 8 bits where activations have as many: what they round over many keys
    is small beside what the cache and the activations have rounded."""
    model = make(8, 2, 64, exact=exact)
    ids, positions = torch.randint(0, 97, (2, 400)), torch.arange(400).repeat(2, 1)
    ours, rounded, whole = (caches(model, 2, 400, each)[0] for each in (dtype, dtype, torch.float32))

    def read(forward):
        return torch.cat([forward(ids[:, i : i + 20], positions[:, i : i + 20]) for i in range(0, 400, 20)], dim=1)

    plain, found = read(lambda part, at: model.model(part, at, rounded)), read(fused.CpuStep(model, ours))
    truth = int4.set_exact(model, True).model(ids, positions, whole)
    assert (found - truth).norm() < (1.3 if exact else 1.1) * (plain - truth).norm()
    if exact:
        assert (found - plain).norm() < 0.8 * (plain - truth).norm()


@pytest.mark.parametrize("exact", [True, False])
@torch.inference_mode()
def test_a_key_or_value_that_is_no_number_is_not_lost(isa, exact):
    """Whatever the cache's dtype, and though integers have no NaN."""
    model = make(8, 2, 64, exact=exact)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for which in (0, 1):
            cache = caches(model, 1, 80, dtype)[0]
            step = fused.CpuStep(model, cache)
            step(torch.zeros(1, 70, dtype=torch.int64), torch.arange(70)[None])
            if dtype == torch.int8:
                cache.scales[1][which][0, 1, 3] = torch.nan
            else:
                (cache.k, cache.v)[which][1][0, 1, 3, 5] = torch.nan
            assert step(torch.tensor([[1]]), torch.tensor([[70]])).isnan().all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("window, dtype", [(12, torch.bfloat16), (None, torch.bfloat16), (None, torch.int8)])
@torch.inference_mode()
def test_a_token_has_the_same_logits_alone_and_among_others(isa, window, dtype, exact):
    """Bit for bit: what a draft is checked by is what greedy decoding would have said."""
    model = make(8, 2, 64, window=window, exact=exact)
    one, several = caches(model, 1, 80, dtype)
    ids, positions = torch.randint(0, 97, (1, 70)), torch.arange(70)[None]
    singly = fused.CpuStep(model, one)
    rows = [singly(ids[:, i : i + 1], positions[:, i : i + 1]) for i in range(70)]
    together = fused.CpuStep(model, several)
    parts = [together(ids[:, a:b], positions[:, a:b]) for a, b in ((0, 1), (1, 8), (8, 10), (10, 50), (50, 70))]
    assert torch.equal(torch.cat(rows, 1), torch.cat(parts, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.k, several.k))


@torch.inference_mode()
def test_a_cache_of_bytes_costs_little(isa):
    """Against one of fp32: the error that --help tells."""
    model = make()
    cache = [KVCache(model.config, 2, 70, torch.device("cpu"), dtype) for dtype in (torch.float32, torch.int8)]
    ids, positions = torch.randint(0, 97, (2, 64)), torch.arange(64).repeat(2, 1)
    exact, found = (fused.CpuStep(model, each)(ids, positions) for each in cache)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 3e-2  # of three layers, in a model of large weights
    kept = cache[1].k[0].float() * cache[1].scales[0][0][..., None]
    assert (kept - cache[0].k[0]).norm() / cache[0].k[0].norm() < 1e-2
    sizes = [sum(k.nbytes for k in each.k) for each in cache]
    assert sizes[1] * 4 == sizes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_threads_change_nothing(isa, dtype):
    model = make(8, 2, 64, window=12, exact=dtype == torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 9):  # more than heads, and than cores: some are late for everything
            torch.set_num_threads(threads)
            step = fused.CpuStep(model, caches(model, 2, 20, dtype)[0])
            ids = torch.arange(32).view(2, 16)
            found.append(step(ids, torch.arange(16).repeat(2, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_several_python_threads_at_once():
    if not cpu.available():
        pytest.skip("no C++ compiler")
    model, found = make(), {}
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    expected = [generation.generate(model, [p], 20, stop_ids=()) for p in prompts]

    def work(i):
        found[i] = generation.generate(model, [prompts[i]], 20, stop_ids=())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == expected


def test_what_fits():
    if not cpu.available():
        pytest.skip("no C++ compiler")
    assert fused.fits(make()) and fused.fits(make(bits=8, symmetric=False))
    assert not fused.fits(Mistral(make().config))  # float
    assert not fused.fits(make().to(torch.bfloat16))
    mixed = make()
    mixed.model.layers[1].mlp.up_proj.exact = False
    assert not fused.fits(mixed)
    mixed = make()  # gate and up read the same integers, which know one zero-point
    mixed.model.layers[1].mlp.up_proj = make(symmetric=False).model.layers[1].mlp.up_proj
    assert not fused.fits(mixed)
    adapted = make()
    lora.attach(adapted, 4, 8)
    assert not fused.fits(adapted)
    lora.freeze(adapted)  # under another adapter, which may leave the blocks alone
    assert not fused.fits(adapted)
    hooked = make()
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    assert not fused.fits(hooked)


@torch.inference_mode()
def test_a_long_prompt_goes_in_parts(monkeypatch):
    if not cpu.available():
        pytest.skip("no C++ compiler")
    model = make(window=16)
    whole, parts = caches(model, 2, 60, torch.bfloat16)
    ids, positions = torch.randint(0, 97, (2, 50)), torch.arange(50).repeat(2, 1)
    expected = model.lm_head(fused.CpuStep(model, whole)(ids, positions)[:, -1])
    monkeypatch.setattr(fused, "MOST_TOKENS", 14)
    step, sizes = fused.CpuStep(model, parts), []
    monkeypatch.setattr(fused.CpuStep, "__call__", counted(fused.CpuStep.__call__, sizes))
    assert torch.equal(generation.prefill(model, step, ids, positions), expected)
    assert sizes == [7] * 7 + [1]


def counted(call, sizes):
    def counting(step, ids, positions):
        sizes.append(ids.shape[1])
        return call(step, ids, positions)

    return counting
