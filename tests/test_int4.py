"""Int4Linear in a model: gradients, memory, devices; and compressed-tensors' format, bit for bit."""

import copy
import gc
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from minichat import int4, kernels, lora
from minichat.errors import BadInput
from minichat.int4 import Int4Linear, Scheme

many = settings(max_examples=40, deadline=None, derandomize=True)
schemes = st.builds(Scheme, st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.booleans())


@pytest.fixture(autouse=True, params=["", "reference"], ids=["default kernel", "reference"])
def choice(request, monkeypatch):
    monkeypatch.setenv("MINICHAT_KERNEL", request.param)


def layer(N=40, K=128, scheme=None, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator) / 10
    b = torch.randn(N, generator=generator) if bias else None
    return Int4Linear.from_weight(w, scheme or Scheme(), bias=b)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False), nn.SiLU(), nn.Linear(32, 7))


def everything(module):
    return [t for t in (*module.unpack(), module.dequantize()) if t is not None]


# ---- the layer ----


@pytest.mark.parametrize("bits, limit", [(4, 0.1), (8, 0.01)])
def test_a_quantised_linear_is_near_the_float_one(bits, limit):
    linear = nn.Linear(256, 33)
    module = Int4Linear.from_weight(linear.weight.detach(), Scheme(bits), bias=linear.bias)
    x = torch.randn(3, 5, 256)
    y = linear(x)
    assert ((module(x) - y).norm() / y.norm()).item() < limit
    assert (module.in_features, module.out_features, module.bits, module.group_size) == (256, 33, bits, 32)
    assert module.symmetric and module.device == torch.device("cpu") and f"bits={bits}" in repr(module)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128)])
def test_gradient_to_the_input(dtype, limit, shape):
    module = layer(bias=True)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = x.detach().double().requires_grad_()
    expected = nn.functional.linear(exact, module.dequantize(torch.float64), module.bias.double())
    expected.backward(grad.double())
    assert y.dtype == x.grad.dtype == dtype and y.shape == (*shape[:-1], 40)
    assert (y - expected).norm() / expected.norm() < limit
    assert (x.grad - exact.grad).norm() / exact.grad.norm() < limit


def test_modes_agree():
    """Plain, no_grad, inference_mode and both kinds of checkpoint give one result and one gradient."""
    module, x = layer(), torch.randn(4, 128, requires_grad=True)
    y = module(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    with torch.no_grad():
        assert torch.equal(module(x), y) and not module(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(module(x), y)
        assert torch.equal(layer()(x), y)  # made in inference mode
    for reentrant in (False, True):
        x.grad = None
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(x.grad, expected)


def test_nothing_of_the_weights_size_stays():
    """Neither forward nor backward leaves a float tensor as large as the weight, in a chain that shares a graph."""
    modules = [layer(256, 256, seed=i) for i in range(3)]
    x = torch.randn(4, 256, requires_grad=True)

    def large(but=()):
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.numel() >= 256 * 256]
        return [t for t in found if not any(t is other for other in but)]

    others = large()  # of other tests and kernels: the codes are words, an eighth of it
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = x
        for module in modules:
            y = torch.tanh(module(y))
    assert not large(others) and saved and max(saved) < 256 * 256
    y.sum().backward()
    assert not large(others) and x.grad is not None


def test_lora_over_int4_trains_the_adapter_alone():
    model = int4.quantize(network(), 32)
    x = torch.randn(5, 64)
    before = model(x)
    lora.attach(model, r=4, targets=["0", "2"])
    assert isinstance(model[0], Int4Linear) and torch.equal(model(x), before)
    model(x).sum().backward()
    assert all((p.grad is not None) == ("lora" in n) for n, p in model.named_parameters())
    with torch.no_grad():
        model[0].lora_B.weight.normal_()
    assert not torch.equal(model(x), before)
    with lora.disabled(model):
        assert torch.equal(model(x), before)
    with pytest.raises(BadInput, match="quantised already"):
        int4.quantize(model, 32)


def test_casts_leave_the_codes_alone_and_copies_are_whole():
    module = layer(33, scheme=Scheme(symmetric=False), bias=True)
    before, x = everything(module), torch.randn(2, 128)
    y = module(x)
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, lambda m: m.to("cpu", torch.bfloat16)):
        changed = change(copy.deepcopy(module))
        after = everything(changed)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed.bias.dtype == torch.bfloat16  # as any other parameter
    assert changed(x).dtype == torch.float32
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert list(module.state_dict()) == ["bias"]


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 4])
def test_a_move_that_fails_leaves_the_layer_as_it_was(fail_at):
    """As where the other device has no room for the codes, the scales, the zero-points or the bias."""
    module, x = layer(33, scheme=Scheme(symmetric=False), bias=True), torch.randn(2, 128)
    y, calls = module(x), []

    def move(tensor):
        calls.append(tensor)
        if len(calls) > fail_at:
            raise RuntimeError("out of memory")
        return tensor.to("meta")

    with pytest.raises(RuntimeError, match="out of memory"):
        module._apply(move)
    assert len(calls) == fail_at + 1 and torch.equal(module(x), y)


def test_another_kind_of_device_gets_its_own_layout(monkeypatch):
    module = layer(33, scheme=Scheme(symmetric=False))
    before = everything(module)
    away = copy.deepcopy(module).to("meta")
    assert away.kernel == "int4_reference" and away.device.type == "meta"
    assert away.codes.shape == (33, 16) and away.scale.shape == away.zero.shape == (33, 4)
    if torch.cuda.is_available():
        moved = copy.deepcopy(module).to("cuda")
        assert moved.device.type == "cuda"
        x = torch.randn(3, 128)
        assert torch.allclose(moved(x.cuda()).cpu(), module(x), atol=1e-3)
        assert all(torch.equal(a, b) for a, b in zip(everything(moved.to("cpu")), before, strict=True))
    # a layer keeps to the kernel that packed it, whatever the environment says later
    monkeypatch.setenv("MINICHAT_KERNEL", "reference")
    assert all(torch.equal(a, b) for a, b in zip(everything(module), before, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_may_be_written_over(bits, dtype):
    """As the loss does with its logits, where the head is quantised: no product is a view of something else."""
    linear = Int4Linear.from_weight(torch.randn(32, 64), Scheme(bits, 32, skip=()))
    x = torch.randn(2, 3, 64).to(dtype).requires_grad_()
    y = linear(x)
    y.detach().mul_(0)
    y.backward(torch.ones_like(y))
    expected = linear.dequantize().sum(dim=0).expand(2, 3, 64)
    assert (x.grad.float() - expected).norm() < 2e-2 * expected.norm()


# ---- a whole model ----


def test_quantize_replaces_what_it_should():
    model = network()
    x, expected = torch.randn(9, 64), None
    expected = model(x)
    same = int4.quantize(model, group_size=32, skip=["4"])
    assert same is model and model.scheme == Scheme(4, 32, True, ("4",))
    assert [type(m).__name__ for m in model] == ["Int4Linear", "SiLU", "Int4Linear", "SiLU", "Linear"]
    assert (model(x) - expected).norm() / expected.norm() < 0.2
    assert model[0].bias is not None and model[2].bias is None
    assert model[0].scale.dtype == torch.bfloat16
    assert int4.quantize(network().half(), skip=["re:[02]"])[4].scale.dtype == torch.float16


def test_quantize_checks_before_it_changes_anything():
    model = network()
    with pytest.raises(BadInput, match=r"2: in_features 96 is not a multiple of group size 64; choose --group-size"):
        int4.quantize(model, group_size=64)
    assert not any(isinstance(m, Int4Linear) for m in model)
    with pytest.raises(BadInput, match="no nn.Linear to quantise"):
        int4.quantize(model, skip=["re:.*"])
    with pytest.raises(BadInput, match="choose --bits 4 or 8"):
        int4.quantize(model, bits=3)
    with pytest.raises(BadInput, match="choose --group-size from 32"):
        int4.quantize(model, group_size=48)
    with pytest.raises(BadInput, match="no regular expression"):
        int4.quantize(model, skip=["re:("])
    with pytest.raises(BadInput, match="too many ways"):
        int4.quantize(model, skip=[r"re:(\w+\.?)+!"])
    lora.attach(model, r=2, targets=["0"])
    with pytest.raises(BadInput, match="0 carries or is an adapter"):
        int4.quantize(model)
    lora.remove(model)
    int4.quantize(model, skip=["0"])
    with pytest.raises(BadInput, match="quantised already"):
        int4.quantize(model)  # not even what was skipped: there is one scheme for all
    assert type(model[0]) is nn.Linear and model.scheme.skip == ("0",)


def test_quantize_holds_one_weight_at_a_time(monkeypatch):
    """When the next linear is quantised, the float weight of the one before is gone."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    left, from_weight = [], Int4Linear.from_weight

    def watched(*arguments, **named):
        gc.collect()
        left.append(sum(issubclass(type(t), torch.Tensor) and t.shape == (64, 64) for t in gc.get_objects()))
        return from_weight(*arguments, **named)

    monkeypatch.setattr(Int4Linear, "from_weight", watched)
    int4.quantize(model)
    assert [a - b for a, b in zip(left, left[1:])] == [1, 1, 1]


# ---- on disk ----


@given(scheme=schemes, N=st.integers(1, 40), groups=st.integers(1, 3), dtype=st.sampled_from(["bfloat16", "float16"]))
@many
def test_disk_round_trip(scheme, N, groups, dtype):
    w = torch.randn(N, groups * scheme.group_size, generator=torch.Generator().manual_seed(N)).to(getattr(torch, dtype))
    module = Int4Linear.from_weight(w, scheme)
    tensors = int4.tensors_of(module)
    assert set(tensors) == set(int4.KEYS[: 3 if scheme.symmetric else 4])
    assert all(t.is_contiguous() for t in tensors.values())
    back = int4.from_tensors(tensors, tuple(w.shape), scheme)
    for ours, theirs in zip(everything(module), everything(back), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@given(scheme=schemes, N=st.integers(1, 40), groups=st.integers(1, 3))
@many
def test_compressed_tensors_agrees_bit_for_bit(scheme, N, groups):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Theirs
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    K, middle = groups * scheme.group_size, 1 << (scheme.bits - 1)
    generator = torch.Generator().manual_seed(N)
    q = torch.randint(0, 2 * middle, (N, K), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2 * middle, (N, groups), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(N, groups, generator=generator) + 0.1).bfloat16()
    module = Int4Linear.from_quantized(q, scale, None if scheme.symmetric else zero, scheme.bits)
    tensors = int4.tensors_of(module)
    signed = (q.int() - middle).to(torch.int8)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(signed, scheme.bits))
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], scheme.bits, q.shape), signed)
    if not scheme.symmetric:
        signed_zero = (zero.int() - middle).to(torch.int8)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(signed_zero, scheme.bits, packed_dim=0))
    config = QuantizationConfig.model_validate(int4.quantization_config(scheme))
    decompressed = Theirs.decompress(tensors, config.config_groups["group_0"])["weight"]
    assert torch.equal(decompressed, module.dequantize(decompressed.dtype))
    # and what they write, with every entry that their version adds, is read back
    assert int4.parse_quantization_config(json.loads(json.dumps(config.to_dict()))) == scheme


def test_config_round_trip():
    for scheme in (Scheme(), Scheme(8, 128, False, ("lm_head", "re:.*o_proj")), Scheme(skip=())):
        assert int4.parse_quantization_config(int4.quantization_config(scheme)) == scheme
    assert int4.parse_quantization_config(None) is None
    assert str(Scheme()) == "int4 in groups of 32, symmetric, without lm_head"


def with_entry(path, value):
    config = copy.deepcopy(int4.quantization_config(Scheme()))
    *folders, key = path.split("/")
    inside = config
    for folder in folders:
        inside = inside[folder]
    inside[key] = value
    return config


WEIGHTS = "config_groups/group_0/weights"


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("quant_method", "gptq", "quant_method is 'gptq'; wanted is 'compressed-tensors'"),
        ("format", "marlin-24", "format is 'marlin-24'"),
        ("quantization_status", "frozen", "quantization_status is 'frozen'"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is"),
        ("transform_config", {"R1": {}}, "transform_config is"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config is"),
        ("config_groups", {}, "exactly one group"),
        ("config_groups", {"a": {}, "b": {}}, "exactly one group"),
        ("config_groups", None, "exactly one group"),
        ("config_groups/group_0", [], "is .*; wanted is a JSON object"),
        ("config_groups/group_0/targets", ["re:.*q_proj"], "targets is"),
        ("config_groups/group_0/format", "float-quantized", "group_0: format is"),
        ("config_groups/group_0/input_activations", {"num_bits": 8}, "input_activations is"),
        ("config_groups/group_0/output_activations", {"num_bits": 8}, "output_activations is"),
        (WEIGHTS, None, "weights is None"),
        (WEIGHTS + "/num_bits", 3, "num_bits is 3; wanted is 4 or 8"),
        (WEIGHTS + "/type", "float", "type is 'float'"),
        (WEIGHTS + "/symmetric", 1, "symmetric is 1"),
        (WEIGHTS + "/strategy", "channel", "strategy is 'channel'; wanted is 'group'"),
        (WEIGHTS + "/dynamic", True, "dynamic is True"),
        (WEIGHTS + "/actorder", "group", "actorder is 'group'"),
        (WEIGHTS + "/group_size", 48, "group size 48"),
        (WEIGHTS + "/group_size", None, "group size None"),
        ("ignore", "lm_head", "ignore is 'lm_head'"),
        ("ignore", ["re:("], "no regular expression"),
    ],
)
def test_config_that_would_be_read_wrongly(path, value, words):
    with pytest.raises(BadInput, match=words):
        int4.parse_quantization_config(with_entry(path, value))


def test_config_entries_that_change_nothing():
    for path, value in [
        ("kv_cache_scheme", None),
        ("version", "0.20"),
        ("global_compression_ratio", 1.5),
        ("sparsity_config", {}),
        ("config_groups/group_0/format", "pack-quantized"),
        (WEIGHTS + "/actorder", "weight"),
        (WEIGHTS + "/observer", "mse"),
    ]:
        assert int4.parse_quantization_config(with_entry(path, value)) == Scheme()


def test_tensors_that_do_not_fit():
    scheme = Scheme(symmetric=False)
    good = int4.tensors_of(layer(scheme=scheme))
    nan = good["weight_scale"].clone()
    nan[3, 1] = float("nan")
    for change, words in [
        ({"weight_packed": good["weight_packed"][:, :8]}, r"weight_packed is \(40, 8\) .* it is \(40, 16\) int32"),
        ({"weight_packed": good["weight_packed"].long()}, "weight_packed is .*int64"),
        ({"weight_scale": good["weight_scale"][:, :2]}, "weight_scale is"),
        ({"weight_scale": good["weight_scale"].double()}, "it is .* bfloat16 or float16 or float32"),
        ({"weight_scale": nan}, "NaN or infinity"),
        ({"weight_shape": torch.tensor([40, 64])}, r"weight_shape says \[40, 64\]"),
        ({"weight_zero_point": good["weight_zero_point"][:4]}, "weight_zero_point is"),
        ({"weight_g_idx": torch.arange(128)}, "found .*weight_g_idx"),
    ]:
        with pytest.raises(BadInput, match=words):
            int4.from_tensors({**good, **change}, (40, 128), scheme)
    del good["weight_zero_point"]
    with pytest.raises(BadInput, match="found"):
        int4.from_tensors(good, (40, 128), scheme)
    assert int4.from_tensors(good, (40, 128), Scheme()).symmetric
    with pytest.raises(BadInput, match="not a multiple of group size 32"):
        int4.from_tensors(good, (40, 120), scheme)


def test_the_kernel_is_the_devices_own(choice):
    module = layer()
    assert module.kernel == kernels.for_device(torch.device("cpu")).__name__.rpartition(".")[2]
