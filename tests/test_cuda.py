"""The CUDA kernels against float64 and the plain model: on a card, or in Triton's interpreter on the CPU.

`make test-gpu` runs these on the card; what only a card can show is skipped elsewhere.
"""

import json
import operator
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", minversion="3.5")
from minichat import fused, generation, int4, kernels
from minichat.attention import attend, rotary, rotate, visible
from minichat.cache import KVCache
from minichat.fused_cuda import CudaStep, misfit
from minichat.kernels import int4_reference as reference
from minichat.kernels import int4_triton, step_triton
from minichat.model import Config, Mistral

ROOT = Path(__file__).parent.parent
CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CARD else torch.device("cpu")
on_a_card = pytest.mark.skipif(not CARD, reason="needs a GPU")
# of results: the interpreter cuts bf16 off where a card rounds, and has float32 too, which is the sharper test
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 2e-6}
#         M   N    K   G  symmetric dtype
SHAPES = [(1, 64, 256, 128, True, torch.bfloat16), (3, 80, 512, 32, False, torch.float16)]
SHAPES += [
    (9, 40, 384, 64, True, torch.bfloat16),
    (17, 144, 256, 256, False, torch.float16),
    (1, 7, 128, 32, False, torch.float16),
    (33, 130, 256, 32, True, torch.bfloat16),
    (65, 70, 128, 128, False, torch.float16),
    (128, 48, 256, 64, True, torch.bfloat16),
]
drawn = random.Random(0).randint
SHAPES += [(drawn(1, 40), drawn(1, 150), 256 * drawn(1, 2), G, G == 64, torch.bfloat16) for G in (32, 64, 128, 256)]


def codes(N, K, G, symmetric, seed=0):
    """Codes, scales and zero-points of every value, as `pack` takes them."""
    torch.manual_seed(seed)
    q = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = ((torch.rand(N, K // G) + 0.1) / 30).bfloat16()
    zero = None if symmetric else torch.randint(0, 16, (N, K // G), dtype=torch.uint8)
    return [x if x is None else x.to(DEVICE) for x in (q, scale, zero)]


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


# ---- the kernel's functions ----


@pytest.mark.parametrize("N, K, G, symmetric", [(64, 256, 128, True), (40, 384, 32, False), (5, 512, 256, False)])
def test_packing_is_exact(N, K, G, symmetric):
    q, scale, zero = codes(N, K, G, symmetric)
    packed = int4_triton.pack(q, scale, zero, 4)
    assert packed.codes.dtype == torch.int16 and packed.codes.numel() * 4 == -(-N // 16) * 16 * K
    for found, given in zip(int4_triton.unpack(packed), (q, scale, zero)):
        assert found is given is None or torch.equal(found, given)
    for dtype in (torch.float32, torch.float16):
        expected = reference.dequantize(reference.pack(q, scale, zero, 4), dtype)
        assert torch.equal(int4_triton.dequantize(packed, dtype), expected)


@pytest.mark.parametrize("M, N, K, G, symmetric, dtype", SHAPES)
def test_matmul_against_float64(M, N, K, G, symmetric, dtype):
    q, scale, zero = codes(N, K, G, symmetric)
    packed = int4_triton.pack(q, scale, zero, 4)
    weight = reference.dequantize(reference.pack(q, scale, zero, 4), torch.float32).double()
    for kind in (dtype,) if CARD else (dtype, torch.float32):
        x = torch.randn(M, K, device=DEVICE).to(kind)
        out = [torch.full((M, N), torch.nan, dtype=kind, device=DEVICE) for _ in range(2)]
        for each in out:
            int4_triton.linear(x, packed, each)
        assert error(out[0], x.double() @ weight.T) < LIMITS[kind]
        assert torch.equal(*out)  # shared columns are added up in a fixed order
    assert not int4_triton.workspace(DEVICE)[1].any()  # nobody is left to wait for


@pytest.mark.parametrize("rows, warps, programs", [(16, 4, 3), (32, 4, 1), (128, 8, 2)])
def test_tiles_of_other_heights(rows, warps, programs, monkeypatch):
    """Those of other cards, or that were found by timing: matmuls, and what a sum leaves for the next norm."""
    for M, (N, K) in ((3, (144, 256)), (1, (96, 512))):
        tile = {f"8 {N} {K} 64 asymmetric": (rows, warps, 3, programs)}
        monkeypatch.setattr(int4_triton, "tuned", lambda device, tile=tile: tile)
        packed = int4_triton.pack(*codes(N, K, 64, False), 4)
        weight, kind = int4_triton.dequantize(packed, torch.float32).double(), torch.bfloat16 if CARD else torch.float32
        x, out = torch.randn(M, K, device=DEVICE).to(kind), torch.full((M, N), 2.0, device=DEVICE, dtype=kind)
        next_x, squares = torch.full_like(out, torch.nan), torch.full((-(-N // 16), M), torch.nan, device=DEVICE)
        norm = torch.rand(N, device=DEVICE).to(kind)
        parts = int4_triton.linear(x, packed, out, then="add", next_norm=(norm, next_x, squares))
        expected = x.double() @ weight.T + 2
        assert parts == -(-N // rows) and error(out, expected) < LIMITS[kind]
        assert error(squares[:parts].sum(dim=0), expected.square().sum(dim=1)) < 2 * LIMITS[kind]
        assert error(next_x, expected * norm.double()) < LIMITS[kind]


@pytest.mark.parametrize("content", ["", '{"8 ', "[]"])
def test_tuned_tiles_that_cannot_be_read_are_left_out(monkeypatch, tmp_path, capsys, content):
    monkeypatch.setenv("MINICHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(int4_triton, "tuned", int4_triton.tuned.__wrapped__)
    int4_triton.tuned_file(DEVICE).write_text(content)
    assert int4_triton.tuned(DEVICE) == {} and "tiles" in capsys.readouterr().err


def test_tuned_tiles_are_of_their_groups_alone(monkeypatch):
    """Floats of such a tile may be more than the card's shared memory, other groups more than its registers."""
    monkeypatch.setattr(int4_triton, "tuned", lambda device: {"8 4096 4096 128": [128, 4, 4, 2]})
    assert int4_triton.tiling(DEVICE, 1, 4096, 4096, 1, "128")[:3] == (128, 4, 4)
    kind, _ = int4_triton.card(DEVICE)
    for other in (None, "32", "128 asymmetric"):
        assert int4_triton.tiling(DEVICE, 1, 4096, 4096, 1, other)[:3] == int4_triton.TABLES[kind][8][:3]


def test_matmul_by_its_number_of_tokens():
    q, scale, zero = codes(32, 128, 32, True)
    packed = int4_triton.pack(q, scale, zero, 4)
    weight = int4_triton.dequantize(packed, torch.float32)
    x = torch.randn(2, 70, 128, device=DEVICE, dtype=torch.float16)
    assert error(int4_triton.matmul(x, packed), x.double() @ weight.double().T) < 1e-3  # 140: over scratch
    assert int4_triton.matmul(x[:, :0], packed).shape == (2, 0, 32)
    wide = torch.randn(3, 128, device=DEVICE)
    assert torch.equal(int4_triton.matmul(wide, packed), F.linear(wide, weight))


def test_the_gradient_to_the_input():
    q, scale, zero = codes(48, 256, 64, False)
    linear = int4.Int4Linear(int4_triton.pack(q, scale, zero, 4), "int4_triton")
    x = torch.randn(2, 3, 256, device=DEVICE, dtype=torch.float16, requires_grad=True)
    grad = torch.randn(2, 3, 48, device=DEVICE, dtype=torch.float16)
    linear(x).backward(grad)
    assert error(x.grad, grad.double() @ linear.dequantize().double()) < 1e-3


@pytest.mark.parametrize("G, bits, symmetric, dtype", [(32, 4, True, torch.float32), (128, 8, False, torch.bfloat16)])
def test_quantize_is_the_references(G, bits, symmetric, dtype):
    torch.manual_seed(0)
    w = torch.randn(24, 256, device=DEVICE).to(dtype)
    w[0], w[1, :G], w[2], w[3] = (
        0,
        1e-30,
        w[2] * 100,
        w[3] * (3e19 if CARD else 1),
    )  # whose squares overflow, where numpy would complain
    found = int4_triton.quantize(w, G, bits, symmetric, torch.bfloat16)
    for ours, theirs in zip(found, reference.quantize(w, G, bits, symmetric, torch.bfloat16)):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_what_the_layout_does_not_hold_runs_on_the_reference(capsys):
    int4_triton._warn.cache_clear()
    for K, G, bits in ((96, 32, 4), (128, 32, 8), (256, 32, 8), (384, 96, 4)):
        q, scale = torch.randint(0, 16, (32, K), dtype=torch.uint8), torch.rand(32, K // G).bfloat16()
        packed = int4_triton.pack(q, scale, None, bits)
        x = torch.randn(2, K)
        assert torch.equal(int4_triton.matmul(x, packed), reference.matmul(x, reference.pack(q, scale, None, bits)))
        assert torch.equal(int4_triton.unpack(packed)[0], q)
    lines = capsys.readouterr().err.splitlines()
    said = ["INT4 weights of 96 columns run", "INT8 weights run", "INT4 weights in groups of 96 run"]
    assert len(lines) == 3 and all(what in line for what, line in zip(said, lines))


def test_a_kernel_that_cannot_be_built_means_the_reference(monkeypatch, capsys):
    """No C compiler, another Triton: one line, and everything runs; the same where it computes wrongly."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for index, fails in enumerate((RuntimeError("Failed to find C compiler.\nPlease specify"), None)):

        def matmul(x, packed, fails=fails):
            if fails:
                raise fails
            return x

        with monkeypatch.context() as patched:
            patched.setattr(int4_triton, "matmul", matmul)
            patched.setattr(int4_triton, "try_out", lambda _, real=int4_triton.try_out: real(DEVICE))
            where = torch.device("cuda", 70 + index)
            assert kernels.for_device(where) is kernels.for_device(where) is reference
        [line] = capsys.readouterr().err.splitlines()
        assert "slow reference" in line and ("Failed to find C compiler. Please" in line if fails else "128" in line)


def test_the_kernel_tried_out_is_right():
    int4_triton.try_out(DEVICE)


# ---- the step ----


@pytest.mark.parametrize("M, packs", [(1, True), (2, False), (5, True)])
def test_a_block_of_kernels_against_float64(M, packs):
    """x + linear, and what it leaves for the norm; then that norm and silu(gate) * up."""
    K, eps, kind = 256, 1e-5, torch.bfloat16 if CARD else torch.float32
    torch.manual_seed(1)

    def weight(rows, columns):
        if not packs:
            w = (torch.randn(rows, columns, device=DEVICE) / 16).to(kind)
            return w, w.double()
        packed = int4_triton.pack(*codes(rows, columns, 32, True), 4)
        return packed, int4_triton.dequantize(packed, torch.float32).double()

    N = 128  # of the first, and the columns of the second
    (down, exact_down), (gate_up, exact_gate_up) = weight(N, K), weight(2 * 48, N)
    h = torch.randn(M, K, device=DEVICE).to(kind)
    x, norm = torch.randn(M, N, device=DEVICE).to(kind), torch.rand(N, device=DEVICE).to(kind)
    expected = x.double() + h.double() @ exact_down.T
    next_x = torch.full_like(x, torch.nan)
    squares = torch.full((N // 16, M), torch.nan, device=DEVICE)
    parts = int4_triton.linear(h, down, x, then="add", next_norm=(norm, next_x, squares))
    assert error(x, expected) < LIMITS[kind]
    normed = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + eps) * norm.double()
    gate, up = (normed @ exact_gate_up.T).chunk(2, dim=-1)
    out = torch.full((M, 48), torch.nan, dtype=kind, device=DEVICE)
    int4_triton.linear(next_x, gate_up, out, norm=(squares, parts, eps), then="silu")
    assert error(out, F.silu(gate) * up) < 2 * LIMITS[kind]


#        B  H KvH Hd slots columns window
RINGS = [
    (1, 4, 2, 32, 100, 0, None),
    (2, 4, 2, 32, 100, 70, None),
    (1, 8, 2, 64, 200, 500, 150),
    (2, 3, 1, 32, 300, 300, 50),
]


@pytest.mark.parametrize("B, H, KvH, Hd, slots, columns, window", RINGS)
def test_attention_over_the_ring_against_float64(B, H, KvH, Hd, slots, columns, window):
    kind = torch.bfloat16 if CARD else torch.float32
    torch.manual_seed(0)
    qkv = torch.randn(B, (H + 2 * KvH) * Hd, device=DEVICE).to(kind)
    keys, values = (torch.zeros(B, KvH, slots, Hd, device=DEVICE, dtype=kind) for _ in range(2))
    positions = torch.full((B, slots), -1, device=DEVICE)
    for column in range(max(0, columns - slots), columns):
        keys[:, :, column % slots] = torch.randn(B, KvH, Hd).to(DEVICE, kind)
        values[:, :, column % slots] = torch.randn(B, KvH, Hd).to(DEVICE, kind)
        positions[:, column % slots] = column
    if B > 1:
        positions[1, :3] = -1  # padding
    now = torch.full((B,), columns, device=DEVICE)
    cos, sin = rotary(now[:, None], Hd, 1e4, kind)
    q, k, v = qkv.view(B, -1, 1, Hd).split([H, KvH, KvH], dim=1)
    q, k = (rotate(x.double(), cos.double(), sin.double()) for x in (q, k))
    after = [x.clone().double() for x in (keys, values)]
    after[0][:, :, columns % slots], after[1][:, :, columns % slots] = k[:, :, 0], v[:, :, 0].double()
    seen = positions.clone()
    seen[:, columns % slots] = now
    expected = attend(q, *after, visible(now[:, None], seen, window)).reshape(B, -1)
    out = torch.full((B, H * Hd), torch.nan, device=DEVICE, dtype=kind)
    column = torch.tensor(columns, device=DEVICE)
    step_triton.attend(qkv, cos[:, 0, 0], sin[:, 0, 0], keys, values, positions, now, column, window, out)
    assert error(out, expected) < LIMITS[kind]
    assert error(keys, after[0]) < LIMITS[kind] and torch.equal(values.double(), after[1])
    assert not int4_triton.workspace(DEVICE)[1].any()


def make(quantised, G=32, symmetric=True, window=None, kind=torch.bfloat16 if CARD else torch.float32, **shape):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2} | shape
    shape = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1 << 16,
        "rope_theta": 500.0,
        "rms_norm_eps": 0.1,
    } | shape
    model = Mistral(Config(**shape, sliding_window=window)).requires_grad_(False)
    model.init_weights(0)
    for weight in model.parameters():
        weight.copy_(weight * 5 if weight.dim() > 1 else weight + 0.2 * torch.randn_like(weight))
    model = model.to(DEVICE, kind).eval()
    for name, module in list(model.model.named_modules()) if quantised else ():
        if isinstance(module, torch.nn.Linear):
            q, scale, zero = reference.quantize(module.weight, G, 4, symmetric, torch.bfloat16)
            parent, _, leaf = name.rpartition(".")
            linear = int4.Int4Linear(int4_triton.pack(q, scale, zero, 4), "int4_triton")
            setattr(model.model.get_submodule(parent), leaf, linear)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantised, symmetric, B, window, layers, tokens",
    [(True, True, 2, None, 2, 2), (True, False, 1, 4, 1, 5), (False, 0, 3, 8, 1, 5)],
)
def test_the_step_is_the_model(quantised, symmetric, B, window, layers, tokens):
    """A padded prompt, then single tokens: from block to block, or round the ring and past the window."""
    model = make(quantised, 32, symmetric, window, num_hidden_layers=layers)
    plain, ours = (KVCache(model.config, B, 6, DEVICE, model.dtype) for _ in range(2))
    step = CudaStep(model, ours)
    positions = (torch.arange(4).repeat(B, 1) - torch.arange(B)[:, None]).clamp_min(-1).to(DEVICE)
    for T in (4, *[1] * tokens):  # the third goes round, and two come after it
        ids = torch.randint(0, 97, (B, T), device=DEVICE)
        with torch.inference_mode():
            expected, found = model.model(ids, positions, plain), step(ids, positions)
        real = positions >= 0
        assert error(found[real], expected[real].double()) < (3e-2 if CARD else 5e-6)
        assert torch.equal(plain.positions, ours.positions)
        positions = positions[:, -1:] + 1


def test_joined_weights_are_the_models_own():
    for quantised in (True, False):
        model = make(quantised, kind=torch.bfloat16)
        address = operator.attrgetter("codes" if quantised else "data")
        before = [x.clone() for x in model.buffers()] + [x.clone() for x in model.parameters()]
        with torch.inference_mode():
            cache = KVCache(model.config, 1, 8, DEVICE, torch.bfloat16)
            assert misfit(model, cache) is None
            first, again = CudaStep(model, cache), CudaStep(model, cache)
        for found, expected in zip([*model.buffers(), *model.parameters()], before):
            assert torch.equal(found, expected)
        for one, other in zip(sum(first.blocks, []), sum(again.blocks, [])):
            assert address(one).data_ptr() == address(other).data_ptr()  # joined once
        q = model.model.layers[0].self_attn.q_proj
        assert address(first.blocks[0][0]).data_ptr() == address(q if quantised else q.weight).data_ptr()
        x = torch.randn(1, 3, 128, device=DEVICE, dtype=torch.float16, requires_grad=True)
        if quantised:
            q(x).sum().backward()
            assert x.grad.isfinite().all()


def test_a_model_that_the_step_does_not_compute():
    def why(model, kind=torch.bfloat16, B=1):
        return misfit(model, KVCache(model.config, B, 8, DEVICE, kind))

    assert why(make(True, kind=torch.bfloat16)) is why(make(False, kind=torch.bfloat16)) is None
    assert "float16" in why(make(False, kind=torch.float16), torch.float16)
    assert "int8" in why(make(True, kind=torch.bfloat16), torch.int8)
    assert "33 rows" in why(make(False, kind=torch.bfloat16), B=33)
    assert "does not take" in why(make(False, kind=torch.bfloat16, hidden_size=96))
    hooked = make(False, kind=torch.bfloat16)
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hook" in why(hooked)


def test_a_graph_of_the_modules_reads_the_same_weights_as_the_step(monkeypatch):
    """Whichever is recorded first: its weights may not move when the other comes."""
    monkeypatch.setattr(Mistral, "device", torch.device("cuda"))
    monkeypatch.setattr(kernels, "for_device", lambda device: int4_triton)
    said = []
    monkeypatch.setattr(fused, "_say", said.append)
    model = make(True, kind=torch.bfloat16)
    first = fused.decoder(model, KVCache(model.config, 1, 8, DEVICE, torch.int8))
    before = [x.data_ptr() for x in model.buffers()]
    monkeypatch.setattr(Mistral, "device", DEVICE)
    step = CudaStep(model, KVCache(model.config, 1, 8, DEVICE, torch.bfloat16))
    assert not isinstance(first, CudaStep) and "KV cache is int8" in said[0]
    assert [x.data_ptr() for x in model.buffers()] == before and len(step.blocks) == 2


# ---- what the compiler leaves ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets, names, count",
    [((90,), "", 16), ((80, 100), "1 token$|heads of 128", 4), ((89, 120), "silu, 1 token", 2)],
    ids=["all", "main", "largest"],
)
def test_no_spills_and_few_instructions(targets, names, count):
    """What a token's kernels become on sm_90, the main ones elsewhere too: nothing spilled, no more shared memory than
    there is, at most 3.5 instructions a weight."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", ROOT / "bench" / "cuda_static.py", "--tokens", 1, "--json"]
    command += ["--targets", *targets, "--kernels", names]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == [f"sm_{target}" for target in targets]
    for kernels_of in found.values():
        assert len(kernels_of) == count
        for name, figures in kernels_of.items():
            assert figures["spills"] == 0 and figures["fits"], name
            assert figures.get("instructions_per_weight", 0) <= 3.5, name


# ---- on a card ----


@on_a_card
@pytest.mark.parametrize("quantised", [True, False])
def test_greedy_tokens_of_the_step_are_the_models(quantised):
    """Told what the step has said, the plain model over dequantised weights says the same next, but where two of its
    logits are as near as bf16's rounding: of these random ones, at 1 to 4 of 100 tokens."""
    model = make(quantised, window=64)
    plain = make(False, window=64)
    for name, module in model.model.named_modules() if quantised else ():
        if isinstance(module, int4.Int4Linear):
            plain.model.get_submodule(name).weight.data = module.dequantize(model.dtype)
    prompts = [[5, 6, 7, 8], [9] * 11]
    for prompt, row in zip(prompts, generation.generate(model, prompts, 200, stop_ids=())):
        with torch.inference_mode():
            logits = plain(torch.tensor([prompt + row[:-1]], device=DEVICE))[0, len(prompt) - 1 :]
        assert (logits.argmax(dim=-1).cpu() == torch.tensor(row)).float().mean() > 0.9


@on_a_card
@pytest.mark.parametrize("sampling", [generation.Sampling(), generation.Sampling(1.0, seed=3, repetition_penalty=1.2)])
def test_a_graph_says_what_the_step_says_without(sampling, monkeypatch):
    model, prompts = make(True, window=64), [[5, 6, 7, 8], [9] * 11]
    recorded = list(generation.decode(model, prompts, 100, sampling, ()))
    monkeypatch.setattr("minichat.device.graph", lambda function, *_: function)
    assert list(generation.decode(model, prompts, 100, sampling, ())) == recorded


@on_a_card
def test_a_kept_graph_says_what_a_new_one_says():
    model, kept, loops = make(True), generation.Kept(), []
    for sampling in (generation.Sampling(), generation.Sampling(1.0, seed=1), generation.Sampling(1.0, seed=2)):
        for prompt in ([8, 9], [5, 6, 7] * 400, [8, 9]):
            expected = list(generation.decode(model, [prompt], 100, sampling, ()))
            steps = generation.decode(model, [prompt], 100, sampling, (), kept=kept)
            assert [next(steps) for _ in range(3)] == expected[:3]
            steps.close()
            assert list(generation.decode(model, [prompt], 100, sampling, (), kept=kept)) == expected
            loops.append(kept.loop)
    assert len(set(map(id, loops))) == 4 and loops[1] is loops[2] and loops[4] is loops[-1]  # two sizes of each kind


@on_a_card
def test_the_triton_kernel_serves_this_card():
    assert kernels.for_device(DEVICE) is int4_triton


@on_a_card
@pytest.mark.parametrize("bits", [4, 8])
def test_a_linear_of_the_card_and_one_that_is_brought_there(bits):
    weight, scheme = torch.randn(40, 128) / 10, int4.Scheme(bits, symmetric=False)
    there = int4.Int4Linear.from_weight(weight, scheme, DEVICE)
    x = torch.randn(4, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = there(x)
    y.sum().backward()
    assert (y - x @ there.dequantize(torch.bfloat16).T).abs().max() < 1e-1 and x.grad.device.type == "cuda"
    weight = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16)
    made_there = int4.Int4Linear.from_weight(weight, int4.Scheme(bits))
    assert made_there.device.type == "cuda" and (made_there.dequantize() - weight).norm() / weight.norm() < 0.1


@on_a_card
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_assembly_unpacks_as_plain_operations_do(dtype, monkeypatch):
    q, scale, zero = codes(64, 256, 32, False)
    packed, x = int4_triton.pack(q, scale, zero, 4), torch.randn(3, 256, device=DEVICE).to(dtype)
    out = [torch.empty(3, 64, device=DEVICE, dtype=dtype) for _ in range(2)]
    int4_triton.linear(x, packed, out[0])
    monkeypatch.setattr(int4_triton, "INTERPRETED", True)
    int4_triton.linear(x, packed, out[1])
    assert error(out[0], out[1].double()) < LIMITS[dtype]  # products of either are exact, sums in another order are not


@on_a_card
def test_32k_tokens_past_the_window():
    model = make(True, window=4096)
    [row] = generation.generate(model, [[5, 6, 7]], 32768, stop_ids=())
    assert len(row) == 32768
    starts = [28000, 29000, 30000, 31000, 32000]  # at one of them two logits may be as near as bf16's rounding
    again = [generation.generate(model, [[5, 6, 7, *row[:start]]], 1, stop_ids=())[0][0] for start in starts]
    assert sum(row[start] == token for start, token in zip(starts, again)) >= 4
