"""habana_frameworks.torch as far as programs call it, over the emulated device of lazy.py.

Names, arguments and defaults are those of Gaudi's bridge 1.19; what they compute is written in plain torch.
"""

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from minichat import lazy

METRICS = ("graph_compilation", "cpu_fallback", "recipe_cache", "memory_defragmentation")


def install(hpu: types.ModuleType) -> None:
    """Put the modules where `import` finds them. hpu: torch.hpu."""

    def module(name: str, **content) -> None:
        made = types.ModuleType(name)
        made.__path__ = []
        made.__dict__.update(content)
        sys.modules[name] = made
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, made)

    base = "habana_frameworks"
    public = {name: getattr(hpu, name) for name in dir(hpu) if not name.startswith("__")}
    module(base)
    module(f"{base}.torch")
    module(f"{base}.torch.core", mark_step=mark_step)
    module(f"{base}.torch.hpu", **public, wrap_in_hpu_graph=wrap_in_hpu_graph, ModuleCacher=ModuleCacher)
    module(f"{base}.torch.hpu.metrics", metric_global=Metric, metric_localcontext=_local_metric)
    module(f"{base}.torch.distributed")
    module(f"{base}.torch.distributed.hccl")
    module(f"{base}.torch.hpex")
    module(f"{base}.torch.hpex.kernels", FusedSDPA=FusedSDPA)
    module(f"{base}.torch.hpex.normalization", FusedRMSNorm=FusedRMSNorm, FusedClipNorm=FusedClipNorm)
    module(f"{base}.torch.hpex.optimizers", FusedAdamW=FusedAdamW)


def mark_step(device_str: str = "", sync: bool = False) -> None:
    lazy.RECORDER.mark()
    if sync:
        lazy.RECORDER.sync("mark_step(sync=True)")


def wrap_in_hpu_graph(module, asynchronous=False, disable_tensor_cache=False, dry_run=False, max_graphs=None):
    """A module whose forward is recorded once for each kind of input, by shapes and by the value of what is no tensor.

    Then it is replayed: inputs are copied into those of the first time, its Python does not run, and what a call
    returned is overwritten by the next.
    """
    kept: dict[str, tuple] = {}
    fresh: set[str] = set()  # recorded, and not replayed yet
    forward = module.forward

    def replayed(*args, **kwargs):
        kwargs.pop("cache_tensors_list", None)
        if kwargs.pop("bypass_hpu_graphs", False):
            return forward(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        key = repr(([(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in flat], spec))
        recorder = lazy.RECORDER
        if key not in kept:
            if max_graphs is not None and len(kept) == max_graphs:
                return forward(*args, **kwargs)
            recorder.end(lazy.caller())
            before, recorder.tape = len(recorder.runs), []
            try:
                outputs = forward(*args, **kwargs)
                recorder.end(f"{lazy.caller()} (HPU graph)")
                kept[key] = flat, outputs, recorder.tape, recorder.runs[before:]
                fresh.add(key)
            finally:
                recorder.tape = None
            return outputs
        static, outputs, tape, names = kept[key]
        static_args, static_kwargs = tree_unflatten(static, spec)
        for to, new in zip(static, flat):
            if isinstance(to, Tensor) and to is not new:
                to.copy_(new)
        recorder.end(lazy.caller())
        if key in fresh and len(names) == 1:
            recorder.rehearse(names[0], lambda: forward(*static_args, **static_kwargs))
        fresh.discard(key)
        lazy.replay(tape)
        recorder.again(names)
        return outputs

    module.forward, module.clear_cache = replayed, kept.clear
    return module


class ModuleCacher(nn.Module):
    """HPU graphs of a module that trains: ModuleCacher(max_graphs)(model=…) gives the module."""

    def __init__(self, max_graphs=10):
        super().__init__()
        self.max_graphs = max_graphs

    def __call__(self, model, use_lfu=False, inplace=True, allow_unused_input=False, asynchronous=False,
                 have_grad_accumulation=False, log_frequency=100, verbose=False, disable_tensor_cache=False,
                 dry_run=False):  # fmt: skip
        model = model if inplace else copy.copy(model)
        forward = model.forward

        def cached(*args, **kwargs):
            lazy.RECORDER.end(lazy.caller())
            found = forward(*args, **kwargs)
            lazy.RECORDER.end(f"{lazy.caller()} (HPU graph)")
            return found

        model.forward = cached
        return model


class Metric:
    """metric_global(name): counts since the process began."""

    def __init__(self, name: str):
        if name not in METRICS:
            raise KeyError(f"metric {name!r}; there are {', '.join(METRICS)}")
        self.name, self.since = name, 0

    def stats(self) -> list[tuple[str, object]]:
        fallen = {what.split(" ")[0] for what, _ in lazy.RECORDER.advice if lazy.FALLBACK in what}
        count = len(lazy.RECORDER.graphs) if self.name == "graph_compilation" else 0
        if self.name == "cpu_fallback":
            return [("TotalNumber", len(fallen) - self.since), ("FallbackOps", dict.fromkeys(fallen, 1))]
        return [("TotalNumber", count - self.since), ("TotalTime", 0), ("AvgTime", 0)]

    def reset(self) -> None:
        self.since += self.stats()[0][1]


@contextmanager
def _local_metric(name: str):
    metric = Metric(name)
    metric.reset()
    yield metric


class FusedSDPA:
    @staticmethod
    def apply(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, softmax_mode="None",
              recompute_mode=None, valid_seq_len=None, seq_padding_type="left", return_dropout_mask=False,
              return_attn_probs=False):  # fmt: skip
        """(B, H, T, Hd) queries, (B, KvH, S, Hd) keys and values; KvH may be a part of H."""
        grouped = q.dim() == 4 and q.shape[1] != k.shape[1]
        plain = functools.partial(
            F.scaled_dot_product_attention, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        if recompute_mode and torch.is_grad_enabled():  # backward makes the scores again instead of keeping them
            return checkpoint(plain, q, k, v, attn_mask, use_reentrant=False, preserve_rng_state=bool(dropout_p))
        return plain(q, k, v, attn_mask)


class FusedRMSNorm:
    @staticmethod
    def apply(data_in, gamma, eps, use_stages=True, bwd_mode=0, fast_math=False):
        exact = data_in.float()
        return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps) * gamma.float()).to(data_in.dtype)


class FusedClipNorm:
    def __init__(self, parameters: Iterable[nn.Parameter], max_norm):
        self.max_norm = max_norm

    def clip_norm(self, parameters) -> Tensor:
        mark_step()
        return nn.utils.clip_grad_norm_(parameters, self.max_norm)


class FusedAdamW(torch.optim.AdamW):
    """With weight decay, the rate times it is a number in its graph: one that changes makes a graph each time."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 0.0, bias_correction: bool = True,
                 moments_dtype=None):  # fmt: skip
        if not bias_correction or moments_dtype is not None:
            raise NotImplementedError("the emulated FusedAdamW corrects its bias and keeps its moments in float32")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)

    def step(self, closure: Callable | None = None):
        mark_step()
        loss = super().step(closure)
        mark_step()
        return loss
