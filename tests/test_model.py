"""The model against transformers', and attention and cache against the definition of the window."""

import math

import pytest
import torch
from helpers import make, theirs

from minichat import device, fused
from minichat.attention import QUERY_BLOCK, View, attention, visible
from minichat.cache import KVCache
from minichat.errors import BadInput
from minichat.generation import generate, prefill
from minichat.model import Config, RMSNorm

CONFIGS = {
    "window below T": {},
    "window above T": {"sliding_window": 64},
    "no window": {"sliding_window": None},
    "window 2": {"sliding_window": 2},
    "one key head": {"num_key_value_heads": 1},
    "no GQA": {"num_key_value_heads": 4},
    "tied head": {"tie_word_embeddings": True},
    "head_dim given": {"head_dim": 20},
    "theta 1e6": {"rope_theta": 1e6},
    "llama": {"architecture": "LlamaForCausalLM", "sliding_window": None},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_and_greedy_tokens_are_transformers(changes):
    model = make(**changes)
    other = theirs(model)
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids), other(ids).logits, rtol=0, atol=1e-4)
    # 200 steps: 25 turns of the window of 8
    expected = other.generate(ids[:1], do_sample=False, max_new_tokens=200, eos_token_id=None, pad_token_id=0)
    assert generate(model, [ids[0].tolist()], 200, stop_ids=()) == [expected[0, 33:].tolist()]


@pytest.mark.parametrize("dtype, kernel", [(torch.float32, "eager"), (torch.bfloat16, "sdpa")])
@pytest.mark.parametrize("first", [2_000, 30_000])
@torch.no_grad()
def test_logits_at_far_positions_are_transformers(first, dtype, kernel):
    """There an angle's error is the position's multiple of its frequency's: of one ulp, or of 8 bits."""
    model = make(sliding_window=None, head_dim=64)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = (first + 37 * torch.arange(24)).expand(2, -1)
    expected = theirs(model.to(dtype), kernel)(ids, position_ids=positions).logits
    found = model(ids, positions)
    assert found.dtype == expected.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    else:  # where a rounding is left out or added, 0.02
        assert (found - expected).float().norm() / expected.float().norm() < 0.01


def test_rms_norm_rounds_as_transformers():
    """In bf16: once after the normalisation in float32, once after the weight."""
    mistral = pytest.importorskip("transformers.models.mistral.modeling_mistral")
    ours, other = (kind(48, 1e-5).bfloat16() for kind in (RMSNorm, mistral.MistralRMSNorm))
    ours.weight.data.normal_()
    other.load_state_dict(ours.state_dict())
    for size in (1e-3, 1, 100):
        x = (torch.randn(50, 48) * size).bfloat16()
        assert torch.equal(ours(x), other(x))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size", [1e-3, 1, 100])
def test_rms_norms_gradients_are_those_of_its_formula(dtype, tolerance, size):
    """By autograd in float64, of the input and the weight: relative L2."""
    norm = RMSNorm(48, 1e-5).to(dtype)
    norm.weight.data.normal_()
    x, slope = (torch.randn(2, 25, 48) * size).to(dtype).requires_grad_(), torch.randn(2, 25, 48).to(dtype)
    found = torch.autograd.grad(norm(x), (x, norm.weight), slope)
    x64, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    exact = weight * x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5)
    for one, other in zip(found, torch.autograd.grad(exact, (x64, weight), slope.double())):
        assert one.dtype == dtype and (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("T, window", [(21, 8), (131, 20), (131, 50)])
def test_loss_and_gradients_are_transformers(T, window, monkeypatch):
    """Also of several blocks of queries, longer and shorter than the window."""
    monkeypatch.setattr("minichat.attention.QUERY_BLOCK", 32)
    model = make(sliding_window=window)
    other = theirs(model)
    ids = torch.randint(0, 97, (3, T))
    torch.testing.assert_close(model(ids), other(ids).logits, rtol=0, atol=1e-4)
    torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    other(ids, labels=ids).loss.backward()
    expected = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not device.CPU_GROUPS, reason="keys are written out for each block of queries")
@pytest.mark.parametrize("window", [100, 300])
def test_training_keeps_no_mask_per_layer(window, monkeypatch):
    """One more layer keeps for backward what it keeps without a window; masks would be a quarter more at least."""
    monkeypatch.setattr("minichat.attention.QUERY_BLOCK", 128)
    ids = torch.randint(0, 97, (1, 1024))

    def kept(layers, window):
        model, storages = make(num_hidden_layers=layers, sliding_window=window), {}

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address is used twice
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(ids)
        return sum(storage.nbytes() for storage in storages.values())

    layer, plain = (kept(3, w) - kept(2, w) for w in (window, None))
    assert plain > 0 and layer < 1.1 * plain


@pytest.mark.parametrize("window", [None, 1, 5, 600])
@pytest.mark.parametrize("T", [7, 2 * QUERY_BLOCK + 3])
def test_attention_sees_exactly_the_window(T, window):
    """Against softmax over an explicit list of visible keys."""
    q, k, v = (torch.randn(1, heads, T, 4) for heads in (4, 2, 2))
    pos = torch.arange(T)[None]
    found = attention(q, k, v, View(pos, pos, window, ordered=True))
    for i in {0, 1, 4, 5, T // 2, T - 1}:
        first = 0 if window is None else max(0, i - window + 1)
        for head in range(4):
            keys, values = k[0, head // 2, first : i + 1], v[0, head // 2, first : i + 1]
            expected = torch.softmax(keys @ q[0, head, i] / 2, dim=0) @ values
            torch.testing.assert_close(found[0, head, i], expected, rtol=1e-4, atol=1e-5)


def test_window_counts_the_query_itself():
    pos = torch.arange(10)[None]
    assert visible(pos, pos, 3)[0, 0].sum(-1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("window, slots", [(8, 100), (None, 64), (8, 3), (5, 5), (30, 100)])
@torch.no_grad()
def test_chunked_prefill_is_the_full_forward(window, slots, size, monkeypatch):
    """Every way to cut 40 tokens, also into chunks longer than the window and the ring; and what is seen of the ring
    is what was written, up to the next of the device's sizes."""

    def rounded(filled, columns, slots, where):
        return min(slots, -(-filled // size) * size)

    seen = []
    monkeypatch.setattr("minichat.cache.reach", rounded)
    monkeypatch.setattr("minichat.model.attention", lambda q, k, v, view: seen.append(k) or attention(q, k, v, view))
    model = make(sliding_window=window if slots != 3 else 3)
    ids = torch.randint(0, 97, (2, 40))
    full = model(ids)
    for cuts in ([1] * 40, [40], [13, 27], [9, 1, 1, 20, 9], [8, 8, 8, 16], [39, 1]):
        cache = KVCache(model.config, 2, slots, ids.device, torch.float32)
        start = 0
        for length in cuts:
            positions = torch.arange(start, start + length).expand(2, -1)
            found = model(ids[:, start : start + length], positions, cache)
            torch.testing.assert_close(found, full[:, start : start + length], rtol=0, atol=1e-4)
            # a single token's key is in the ring already, those of several are seen beside it
            ring, beside = (start + 1, 0) if length == 1 else (start, length)
            assert seen[-1].shape[2] == rounded(ring, length, min(slots, window or slots), None) + beside
            start += length


@torch.no_grad()
def test_decode_is_a_new_prefill_at_every_position():
    """Past several turns of the ring, for a batch of different lengths."""
    model = make(sliding_window=6)
    prompts = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [3]]
    rows = generate(model, prompts, 30, stop_ids=())
    for prompt, row in zip(prompts, rows):
        for step in (0, 1, 5, 6, 12, 29):
            logits = model(torch.tensor([prompt + row[:step]]))[0, -1]
            assert logits.argmax() == row[step]


@torch.no_grad()
def test_a_batch_is_its_rows_whatever_the_padding():
    model = make()
    prompts = [list(range(1, n)) for n in (2, 5, 14, 30, 31)]
    alone = [generate(model, [prompt], 25, stop_ids=())[0] for prompt in prompts]
    assert generate(model, prompts, 25, stop_ids=()) == alone


@pytest.mark.parametrize("block", [QUERY_BLOCK, 4])
@torch.no_grad()
def test_padding_on_either_side_does_not_reach_a_token(block, monkeypatch):
    monkeypatch.setattr("minichat.attention.QUERY_BLOCK", block)
    model = make()
    ids = torch.randint(0, 97, (1, 12))
    expected = model(ids)
    right = model(torch.cat([ids, torch.full((1, 5), 96)], dim=1))[:, :12]
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-5)
    positions = torch.cat([torch.full((1, 5), -1), torch.arange(12)[None]], dim=1)
    left = model(torch.cat([torch.full((1, 5), 96), ids], dim=1), positions)[:, 5:]
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-4)
    assert not model(torch.full((1, 5), 96), torch.full((1, 5), -1)).isnan().any()


@torch.no_grad()
def test_prefill_gives_the_last_columns_logits():
    model = make(sliding_window=100)
    ids = torch.randint(0, 97, (1, 1200))  # three chunks
    cache = KVCache(model.config, 1, 1300, ids.device, torch.float32)
    found = prefill(model, fused.decoder(model, cache), ids, torch.arange(1200)[None])
    torch.testing.assert_close(found, model(ids)[:, -1], rtol=0, atol=1e-4)


def test_long_prefill_needs_no_quadratic_memory():
    """16,384 tokens through a window of 4,096 keep no (T, T) mask or scores: it would take 268 MB as bool alone."""
    T, window = 16384, 4096
    q, k, v = (torch.randn(1, heads, T, 8) for heads in (2, 1, 1))
    pos = torch.arange(T)[None]
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    with torch.no_grad(), Watch():
        attention(q, k, v, View(pos, pos, window, ordered=True))
    assert max(made) <= QUERY_BLOCK * (window + QUERY_BLOCK) * 2


def test_hooks_on_attention_see_all_of_it():
    """In training, in gradient checkpointing too, and in decoding: what goes in and what the block adds."""
    model, seen = make().train(), []
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda module, given, y: seen.append((module, given, y)))
    for again in ("", "attention", "block"):
        seen.clear()
        model.model.set_checkpointing(again)
        model(torch.arange(5)[None]).sum().backward()
        assert len(seen) >= 2
    module, given, y = seen[0]
    assert y.shape == (1, 5, 48) and torch.equal(module(*given), y)
    seen.clear()
    generate(model.eval(), [[1, 2, 3]], 4, stop_ids=())
    assert len(seen) >= 2 * 4 and {y.shape[1] for *_, y in seen} >= {1, 3}


def test_gradient_checkpointing_changes_no_gradient():
    model = make().train()
    ids = torch.randint(0, 97, (2, 20))
    grads, kept = [], []
    for names in ([], ["attention"], ["mlp"], ["block"], ["", "block"], ["block", "attention"]):
        model.model.set_checkpointing(*names)
        sizes: dict[int, int] = {}
        pack = lambda x, sizes=sizes: sizes.update({x.data_ptr(): x.nbytes}) or x  # noqa: E731
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids).square().mean()
            kept.append(sum(sizes.values()))
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, grads[0]))
    everything, attention, mlp, block, second, both = kept
    assert block < both < attention < everything and block < mlp < everything and block < second < everything


@pytest.mark.parametrize("again", ["", "attention", "mlp", "block"])
@pytest.mark.parametrize("layout", ["rows", "a pair in one row", "rows of documents"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_wanted_positions_are_those_of_the_whole_output(layout, again, in_parts):
    """Values and every gradient, whatever is asked for twice; and the last block's MLP computes no other row."""
    where = {}
    if layout == "a pair in one row":
        where = {"documents": [(5, 3, 4), (8,)]}
    if layout == "rows of documents":
        documents = torch.tensor([[0] * 6 + [4] * 4, [0] * 10])
        where = {"documents": documents, "positions": torch.tensor([[*range(6), *range(4)], [*range(10)]])}
    model = make().train()
    model.model.set_checkpointing(again)
    if in_parts:
        model.model.compile_blocks(lambda part: part)
    ids = torch.randint(0, 97, (1, 20) if layout == "a pair in one row" else (2, 10))
    wanted, seen = torch.tensor([4, 17, 4, 9, 0, 12]), []
    model.model.layers[-1].mlp.gate_proj.register_forward_hook(lambda _, __, y: seen.append(y.shape[:-1].numel()))

    def run(rows):
        grads = torch.autograd.grad(
            (rows * torch.linspace(-1, 2, 6 * 48).view(6, 48)).sum(), [*model.model.parameters()]
        )
        return rows, *grads

    found = run(model.model(ids, wanted=wanted, **where))
    assert set(seen) == {6}
    expected = run(model.model(ids, **where).flatten(0, 1)[wanted])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", [[], [7], [3] * 12, [*range(12)], [5] * 20])
@torch.no_grad()
def test_as_many_positions_as_there_are_may_be_wanted_or_one_or_none(wanted):
    model, ids, wanted = make(), torch.arange(12).view(2, 6), torch.tensor(wanted, dtype=torch.int64)
    assert torch.equal(model.model(ids, wanted=wanted), model.model(ids).flatten(0, 1)[wanted])


@torch.no_grad()
def test_rope_keeps_far_positions_apart_in_bf16():
    model = make(sliding_window=None).to(torch.bfloat16)
    ids = torch.tensor([[5, 6]])
    near = model(ids, torch.tensor([[3000, 3001]]))
    far = model(ids, torch.tensor([[3000, 3004]]))
    assert not torch.equal(near[:, -1], far[:, -1])


RAW = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_config_reads_both_generations_of_transformers():
    four = {**RAW, "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "sliding_window": None}
    five = {**RAW, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
    five |= {"sliding_window": None, "head_dim": None}
    assert Config.from_dict(four) == Config.from_dict(five)
    assert Config.from_dict(four).rope_theta == 1e6 and Config.from_dict(four).sliding_window is None
    assert Config.from_dict(RAW).sliding_window == 4096  # the default of transformers' class
    assert Config.from_dict({**RAW, "architectures": "MistralForCausalLM"}) == Config.from_dict(RAW)
    assert Config.from_dict({**RAW, "eos_token_id": [2, 7]}).eos_token_id == [2, 7]
    assert Config.from_dict({**RAW, "eos_token_id": None}).eos_token_id is None
    assert Config.from_dict(Config.from_dict(four).to_dict(torch.bfloat16)) == Config.from_dict(four)


BAD = {
    "architecture": {"architectures": ["GPT2LMHeadModel"]},
    "none": {"architectures": None},
    "rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "scaling beside the newer entry": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "rope by kind of layer": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "bias": {"attention_bias": True},
    "activation": {"hidden_act": "gelu"},
    "size": {"hidden_size": "large"},
    "zero": {"num_hidden_layers": 0},
    "missing": {"vocab_size": None},
    "heads": {"num_key_value_heads": 3},
    "indivisible": {"hidden_size": 18},
    "odd": {"head_dim": 3},
    "window": {"sliding_window": -1},
    "eps": {"rms_norm_eps": 0},
    "rope in a word": {"rope_scaling": "linear"},
    "architecture a number": {"architectures": 7},
    "another model_type": {"model_type": "gemma"},
    "eos in words": {"eos_token_id": "2"},
    "one eos in words": {"eos_token_id": [2, "x"]},
    "several bos": {"bos_token_id": [1, 2]},
    "huge": {"vocab_size": 10**21},
    "layers without end": {"num_hidden_layers": 2**30},
    "more bytes than can be counted": {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4},
    "wide heads": {"num_attention_heads": 2**30, "head_dim": 2**30},
    "infinite": {"rope_theta": math.inf},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_config_refuses_what_the_model_is_not(change):
    with pytest.raises(BadInput) as error:
        Config.from_dict({**RAW, **change})
    assert "\n" not in str(error.value)


def test_gqa_repeats_each_key_head_in_place():
    """Query heads 0 and 1 read key head 0: repeat_interleave, not tile."""
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    pos = torch.arange(3)[None]
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    for view in (None, View(pos, pos, None, ordered=True)):
        torch.testing.assert_close(attention(q, k, v, view), attention(q, *repeated, view))


def test_initial_weights_follow_the_seed():
    same, other = make(seed=0), make(seed=1)
    for a, b, c in zip(make(seed=0).parameters(), same.parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)
