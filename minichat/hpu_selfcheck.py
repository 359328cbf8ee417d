"""What a Gaudi's owner wants to know before a run: does minichat work here as it should?

    python -m minichat.hpu_selfcheck                        # the embedded model
    python -m minichat.hpu_selfcheck --model mistralai/Mistral-7B-v0.1

It decodes and trains, and says whether graphs are still compiled after each shape was seen, whether a replayed HPU
graph gives the tokens of the same loop without one, whether operations fell back to the host, what the bridge's own
operations and INT4 differ from plain ones, tokens/s and peak memory: one line of JSON on standard output, a verdict on
standard error, exit code 1 if something is wrong.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from minichat import cli

COUNTS = ("graph_compilation", "cpu_fallback")


def parse():
    parser = cli.Parser(__doc__, prog="python -m minichat.hpu_selfcheck")
    cli.model_flags(parser, "without it: the embedded base")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to decode")
    return parser.parse_args()


def counts() -> dict[str, int]:
    """How many graphs the bridge has compiled, and how many operations it left to the host, so far."""
    from habana_frameworks.torch.hpu import metrics

    return {name: dict(metrics.metric_global(name).stats())["TotalNumber"] for name in COUNTS}


def decoding(model, new: int) -> dict:
    """Prompts of several lengths of one bucket after a first one: nothing is compiled."""
    from minichat import device
    from minichat.generation import Sampling, decode

    def run(lengths) -> float:
        start = time.perf_counter()
        for length in lengths:
            list(decode(model, [[5] * length], new, Sampling(), ()))
        return len(lengths) * new / (time.perf_counter() - start)

    run([100])
    before = counts()["graph_compilation"]
    rate = run([90, 110, 128])
    compiled = counts()["graph_compilation"] - before
    return {"compiled_after_warm_up": compiled, "tokens_per_s": round(rate, 1),
            "peak_gib": round(device.peak_memory_gib(model.device), 2)}  # fmt: skip


def replays(model) -> dict:
    """Tokens by an HPU graph and without one, past what its first call saw; and what is drawn is not one number."""
    from unittest import mock

    import torch

    from minichat import device
    from minichat.generation import Sampling, decode

    def run(sampling, kv=None) -> list[int]:
        return [tokens[0] for tokens in decode(model, [[5, 6, 7]], 40, sampling, (), kv=kv)]

    found = {}
    likeliest = {
        "": (Sampling(), None),
        "_penalised": (Sampling(repetition_penalty=1.3), None),
        "_of_an_int8_cache": (Sampling(), torch.int8),
    }
    for name, kind in likeliest.items():
        graphed = run(*kind)
        with mock.patch.object(device, "graph", lambda function, where, generators: function):
            found[f"same_tokens_without_a_graph{name}"] = run(*kind) == graphed
    for name, more in {"": {}, "_of_a_few": {"top_k": 1000, "top_p": 0.99, "min_p": 1e-9}}.items():
        first, second = (run(Sampling(temperature=50.0, seed=1, **more)) for _ in range(2))
        found |= {f"same_draws_with_a_seed{name}": first == second, f"different_draws{name}": len(set(first))}
    return found


def trains(model) -> dict:
    """LoRA over what the model is, 12 steps of one shape: the first two compile, and then none does."""
    from minichat import lora, training
    from minichat.examples import Example
    from minichat.metrics import Metrics

    lora.freeze(model)
    lora.attach(model, 8, 16)
    items = [Example([5 + i % 50] * 100, [0] * 50 + [1] * 50) for i in range(48)]
    compiled = []

    class Watched(Metrics):
        def write(self, numbers):
            compiled.append(counts()["graph_compilation"])
            super().write(numbers)

    settings = training.Settings(steps=12, batch_size=2, accumulate=2, log_every=2, lr=1e-4)
    with tempfile.TemporaryDirectory() as folder, Watched(Path(folder), 12, "selfcheck") as log:
        last = training.fit(model, training.sft(), items, settings, log)
    return {"compiled_after_warm_up": compiled[-1] - compiled[1], "tokens_per_s": last["tokens_per_s"],
            "loss": last["loss"]}  # fmt: skip


def operations(where) -> dict:
    """Relative differences between the bridge's own operations and plain ones; INT4's weights are the very same."""
    import torch
    import torch.nn.functional as F

    from minichat import attention, device, int4, model

    def apart(a, b) -> float:
        return float((a.detach().cpu().double() - b.double()).norm() / b.double().norm())

    torch.manual_seed(0)
    x, q, k = torch.randn(4, 256), torch.randn(1, 8, 64, 64), torch.randn(1, 2, 64, 64)
    norm = model.RMSNorm(256, 1e-5)
    found = {"plain_norm": apart(norm.to(where)(x.to(where)), norm.cpu()(x).detach())}
    expected = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    there = F.scaled_dot_product_attention(*(t.to(where) for t in (q, k, k)), is_causal=True, enable_gqa=True)
    found["plain_attention"] = apart(there, expected)
    # as the model calls it: with a window, which a causal kernel without a mask would lose; and backward
    places = torch.arange(64)[None]
    band = attention.visible(places, places, 16)

    def banded(where) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = q.to(where).requires_grad_()
        out = attention.attend(leaf, k.to(where), k.to(where), band.to(where))
        out.square().sum().backward()
        return out.detach(), leaf.grad

    for name, there, here in zip(("attention_with_a_window", "its_gradient"), banded(where), banded("cpu")):
        found[name] = apart(there, here)
    # a prompt at the end of a cache that is empty: no query sees the first 4,096 keys
    here, keys = torch.randn(1, 8, 512, 64).bfloat16(), torch.randn(1, 2, 4608, 64).bfloat16()
    filled = torch.cat([torch.full((4096,), -1), torch.arange(512)])[None]
    seen = attention.visible(torch.arange(512)[None], filled, None)
    there = attention.attend(here.to(where), keys.to(where), keys.to(where), seen.to(where))
    found["attention_past_an_empty_cache"] = apart(
        there, attention.attend(here.float(), keys.float(), keys.float(), seen)
    )
    try:
        from habana_frameworks.torch.hpex.kernels import FusedSDPA
        from habana_frameworks.torch.hpex.normalization import FusedClipNorm, FusedRMSNorm

        clipped = [torch.nn.Parameter(torch.zeros_like(x).to(place)) for place in (where, "cpu")]
        for parameter in clipped:
            parameter.grad = x.to(parameter.device)
        FusedClipNorm(clipped[:1], 1.0).clip_norm(clipped[:1])
        torch.nn.utils.clip_grad_norm_(clipped[1:], 1.0)
        found["FusedClipNorm"] = apart(clipped[0].grad, clipped[1].grad)
        found["FusedRMSNorm"] = apart(
            FusedRMSNorm.apply(x.to(where), torch.ones(256).to(where), 1e-5), norm(x).detach()
        )
        found["FusedSDPA"] = apart(FusedSDPA.apply(*(t.to(where) for t in (q, k, k)), None, 0.0, True), expected)
    except ImportError as error:
        found["fused"] = f"not there: {error}"
    weight = torch.randn(64, 256)
    on_device = int4.Int4Linear.from_weight(weight, int4.Scheme(skip=()), where)
    on_host = int4.Int4Linear.from_weight(weight, int4.Scheme(skip=()))
    dtype = torch.bfloat16
    found["int4_kernel"] = on_device.kernel
    found["int4_weights"] = apart(on_device.dequantize(dtype), on_host.dequantize(dtype))
    eight = int4.Int4Linear.from_weight(weight, int4.Scheme(8, skip=()), where)
    graphed, expected = device.graph(eight.forward, where), x.to(dtype).float() @ eight.dequantize().cpu().T
    found["int8_in_a_graph"] = max(apart(graphed(x.to(where, dtype)), expected) for _ in range(3))
    found["int4_matmul"] = apart(on_device(x.to(where, dtype)), (x.to(dtype).float() @ on_host.dequantize().T))
    return found


def wrong(found: dict) -> list[str]:
    """What is not as it should be, a line each."""
    lines = [f"{part}: {found[part]['compiled_after_warm_up']} graphs were compiled after every shape was seen"
             for part in ("decoding", "training") if found[part]["compiled_after_warm_up"]]  # fmt: skip
    lines += [f"HPU graphs: {name} is {value}" for name, value in found["replays"].items()
              if not value or name.startswith("different_draws") and value < 2]  # fmt: skip
    if found["cpu_fallback"]:
        lines.append(f"{found['cpu_fallback']} operations fell back to the host")
    for name, value in found["operations"].items():
        limit = 0 if name == "int4_weights" else 2e-2
        if isinstance(value, float) and not value <= limit:
            lines.append(f"{name}: a relative difference of {value:.2e}, more than {limit}")
    return lines


def main() -> None:
    args = parse()
    cli.emulate(args)
    args.device = "hpu"
    args.model = args.model or str(cli.BASE)
    model, _ = cli.load(args)
    found = {"model": args.model, "dtype": str(model.dtype), "operations": operations(model.device)}
    found |= {"decoding": decoding(model, args.new_tokens), "replays": replays(model), "training": trains(model)}
    found["cpu_fallback"] = counts()["cpu_fallback"]
    found["wrong"] = wrong(found)
    print(json.dumps(found))
    for line in found["wrong"]:
        print(f"minichat: {line}", file=sys.stderr)
    print(f"minichat: {'not as it should be' if found['wrong'] else 'all is well'}", file=sys.stderr)
    if found["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
