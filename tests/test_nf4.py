"""NF4: its values by the paper's formula, its arithmetic by a few lines of one's own, and training over it."""

import copy

import pytest
import torch
from helpers import make
from torch import nn

from minichat import int4, lora, training
from minichat.data import sft_batch
from minichat.errors import BadInput
from minichat.examples import Example
from minichat.int4 import NF4, Int4Linear, Scheme
from minichat.kernels import nf4

SHAPE = dict(hidden_size=64, intermediate_size=128, head_dim=16)


def normal(N, K, seed=0, dtype=torch.float32):
    return (torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / 10).to(dtype)


def test_the_values_are_quantiles_of_a_normal_distribution():
    """arXiv 2305.14314, appendix E, as bitsandbytes does it: 7 below 0 and 8 above, the outermost at 0.9677083."""
    end = 0.9677083
    below, above = (torch.linspace(end, 0.5, n, dtype=torch.float64)[:-1] for n in (8, 9))
    values = torch.cat([-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above)]).sort().values
    torch.testing.assert_close(torch.tensor(nf4.VALUES).double(), values / values.max(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, groups, G", [(33, 3, 64), (1, 1, 128), (7, 2, 32)])
def test_a_weight_becomes_the_nearest_values(dtype, N, groups, G):
    w = normal(N, groups * G, dtype=dtype)
    w[-1, :G] = 0
    module = Int4Linear.from_weight(w, Scheme(group_size=G, nf4=True))
    q, scale, zero = module.unpack()
    blocks, values = w.double().view(N, groups, G), torch.tensor(nf4.VALUES)
    most = blocks.abs().amax(-1, keepdim=True)
    nearest = (blocks / most.clamp_min(1e-30)).unsqueeze(-1).sub(values.double()).abs().argmin(-1)
    assert torch.equal(q.long().view(N, groups, G), nearest) and zero is None
    assert scale.dtype == torch.float32 and torch.equal(scale.double(), most[..., 0])
    expected = (values[nearest] * most.float()).view(N, -1)
    for kind in (torch.float32, torch.bfloat16):
        assert torch.equal(module.dequantize(kind), expected.to(kind))
    assert not expected[-1, :G].any()
    x = torch.randn(2, 3, groups * G)
    torch.testing.assert_close(module(x), x @ expected.T)


def test_normal_weights_lose_less_than_in_int4():
    w = normal(256, 512)
    error = {scheme: (Int4Linear.from_weight(w, scheme).dequantize() - w).norm() for scheme in (NF4, Scheme(4, 64))}
    assert error[NF4] < 0.98 * error[Scheme(4, 64)]
    assert 0.08 < error[NF4] / w.norm() < 0.1


@pytest.mark.parametrize("again", ["", "block"])
def test_a_step_is_that_over_the_float_weights_it_stands_for(again):
    """Loss and the adapter's gradients to 1e-5, as with a float model of the dequantised weights."""
    quantised, plain = make(**SHAPE), make(**SHAPE)
    int4.quantize(quantised, NF4.group_size, nf4=True)
    assert quantised.scheme == NF4 and type(quantised.lm_head) is nn.Linear
    for name, module in quantised.named_modules():
        if isinstance(module, Int4Linear):
            assert module.kernel == "nf4"
            plain.get_submodule(name).weight.data = module.dequantize()
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1)).tolist()
    batch = sft_batch([[Example(row, [0] * 5 + [1] * 16)] for row in ids], None)
    found = []
    for model in (quantised, plain):
        lora.attach(model, r=4, alpha=8)
        for module in lora.adapted(model).values():
            module.lora_B.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        model.model.set_checkpointing(again)
        loss = training.sft().objective(model.train(), batch.tensors)["loss"] / batch.weight
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss.detach()})
    assert len(found[0]) == 2 * 14 + 1 and all(grad.abs().max() > 0 for grad in found[0].values())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_its_table_is_made_once_and_outside_inference_mode():
    nf4.pairs_of_bytes.cache_clear()
    module, x = Int4Linear.from_weight(normal(5, 64), NF4), torch.randn(2, 64)
    with torch.inference_mode():
        module(x)
    module(x.requires_grad_()).sum().backward()
    assert nf4.pairs_of_bytes.cache_info().misses == 1 and not nf4.pairs_of_bytes(x.device).is_inference()


def test_casts_and_devices_leave_it_as_it_is():
    module = Int4Linear.from_weight(normal(5, 64), NF4)
    for changed in (copy.deepcopy(module).to(torch.bfloat16), module.half()):
        assert all(torch.equal(a, b) for a, b in zip(changed.unpack()[:2], module.unpack()[:2]))
        assert changed.scale.dtype == torch.float32
    there = copy.deepcopy(module).to("meta")  # as any other kind of device
    assert there.kernel == "nf4" and there.codes.shape == (5, 32) and there.scale.shape == (5, 1)
    assert 8 * sum(b.nbytes for b in module.buffers()) == 4.5 * 5 * 64  # bits


def test_what_it_cannot_be_is_refused():
    for more in (dict(bits=8), dict(symmetric=False)):
        with pytest.raises(BadInput, match="NF4 has 4 bits and no zero-points"):
            Scheme(nf4=True, **more)
    with pytest.raises(BadInput, match="NF4 base has no files"):
        int4.tensors_of(Int4Linear.from_weight(normal(5, 64), NF4))
    for bad, dtype in ((float("nan"), torch.float32), (float("inf"), torch.float32), (1e30, torch.float16)):
        w = normal(5, 64)
        w[2, 3] = bad
        with pytest.raises(BadInput, match="must be finite"):
            Int4Linear.from_weight(w, NF4, scale_dtype=dtype)
    assert str(NF4) == "nf4 in groups of 64, without lm_head"
