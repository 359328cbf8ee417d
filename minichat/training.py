"""The one training loop. A method is an objective (model, tensors -> sums) plus a batch maker."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minichat import data, device, distributed, lora, losses, optim
from minichat.checkpoint import Checkpoints, Stopped
from minichat.console import speaks
from minichat.errors import BadInput
from minichat.examples import Pair
from minichat.metrics import Metrics
from minichat.readings import Readings


@dataclass
class Settings:
    """The hyper-parameters of a run, in the recipes' words. steps None: `epochs` passes over the data."""

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8  # sequences, or pairs, per micro-batch
    accumulate: int = 1  # micro-batches per step, of each process
    pack: int | None = None  # SFT: several sequences in a row of this many tokens; batch_size counts rows then
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.03  # steps, or a share of them if below 1
    clip: float = 1.0  # total gradient norm; 0: no clipping
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    optimizer: str = "adamw"  # or adamw8bit
    offload: bool = False  # keep the optimiser's moments on the host
    seed: int = 42
    log_every: int = 10
    eval_every: int = 0  # 0: at the end only


@dataclass
class Method:
    """What makes SFT SFT and DPO DPO.

    objective: (model, tensors of a micro-batch) -> sums over it, called `keys`, each divided by the batch's weight to
    be a mean. batch: items -> Batch. summary: adds what follows from the means (perplexity).
    """

    objective: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
    batch: Callable[[list, Callable[[int], int] | None], data.Batch]
    summary: Callable[[dict[str, float]], dict[str, float]] = lambda means: means
    logps: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None  # DPO: of each row's answer, (2B,)
    keys: tuple[str, ...] = ("loss",)  # of what objective gives


def sft() -> Method:
    """Cross-entropy over target tokens: the mean over all of an optimiser step's, however the step is split."""

    def objective(model, tensors):
        logps = losses.target_logps(hidden_states(model, tensors), model.lm_head, tensors["labels"])
        return {"loss": -(logps * tensors["weights"]).sum()}

    def summary(means):
        return {**means, "perplexity": losses.perplexity(means["loss"])}

    return Method(objective, data.sft_batch, summary)


def hidden_states(model: nn.Module, tensors: dict) -> Tensor:
    """The decoder's output where a batch's targets are predicted, (N, D)."""
    index, again = tensors.get("index"), tensors.get("again")
    found = model.model(tensors["ids"], tensors.get("positions"), documents=tensors.get("documents"), wanted=index)
    found = found if index is not None else found.flatten(0, 1)
    return found if again is None else torch.cat([found, found.index_select(0, again)])


def dpo(beta: float = 0.1, kind: str = "sigmoid", label_smoothing: float = 0.0, reference_free: bool = False) -> Method:
    """Direct preference optimisation. The reference is the model with its adapters off, in the same batch;
    for full fine-tuning its log-probs come with the batch as "reference", (2B,). Raises ValueError as dpo_loss does.
    """
    losses.check_preference(beta, kind, label_smoothing)

    def logps(model, tensors):
        count = 2 * len(tensors["pairs"])
        hidden = hidden_states(model, tensors)
        each = losses.target_logps(hidden, model.lm_head, tensors["labels"]) * tensors["weights"]
        sums = losses.row_sums(each, tensors["document"], count)
        if kind == "ipo":  # the mean over the answer's tokens, not their sum
            sums = sums / losses.row_sums(tensors["weights"], tensors["document"], count).clamp_min(1)
        return sums

    def objective(model, tensors):
        if reference_free:
            reference = torch.zeros(2 * len(tensors["pairs"]), device=tensors["pairs"].device)
        elif "reference" in tensors:
            reference = tensors["reference"]
        else:
            # dropout off as well: the reference is the model as it was, not a sample of it; first, while no activations
            # are kept
            with torch.no_grad(), lora.disabled(model):
                reference = logps(model, tensors)
        policy = logps(model, tensors)
        (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
        each, good, bad = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, kind, label_smoothing)
        return {
            "loss": (each * tensors["pairs"]).sum(),
            "accuracy": (good > bad).sum(),
            "margin": (good - bad).sum(),
            "chosen_reward": good.sum(),
            "rejected_reward": bad.sum(),
        }

    keys = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
    return Method(objective, data.dpo_batch, logps=logps, keys=keys)


@torch.no_grad()
def reference_logps(model: nn.Module, method: Method, pairs: Sequence[Pair], settings: Settings) -> Tensor:
    """The log-probs of the pairs' answers, (n, 2), under the model as it is now, without its adapter. Several processes
    share the work."""
    where = model.device
    found = torch.zeros(len(pairs), 2)
    batches = data.by_length(data.lengths(pairs), settings.batch_size)[distributed.rank() :: distributed.world()]
    # None: no bar where nobody watches
    for rows in tqdm(batches, desc="reference", disable=None if speaks() else True):
        indices = [i for row in rows for i in row]
        batch = micro_batch(method, pairs, rows, settings, where)
        with lora.disabled(model) if lora.adapted(model) else nullcontext():
            logps = method.logps(model, on(where, batch.tensors)).float().cpu()
        found[indices] = logps.view(2, -1).T[: len(indices)]
    return sum(each["logps"] for each in distributed.all_gather({"logps": found}))


def fit(
    model: nn.Module,
    method: Method,
    items: Sequence,
    settings: Settings,
    metrics: Metrics,
    eval_items: Sequence | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train what requires a gradient; the last logged numbers. items: a data.Mix, or a list.

    resume: continue from the last of `checkpoints`, to the numbers that the run would have had without a break.

    Every step's gradient is that of the mean over all of its targets, whatever batch_size and accumulate are, and over
    how many processes the micro-batches go (distributed.py).
    Raises BadInput when the loss is no longer a number, naming the records of that step; nothing is saved then. Raises
    Stopped where a signal has asked for it and a checkpoint is saved.
    """
    where = model.device
    if where.type == "cpu":
        device.keep_host_memory()
    items = items if isinstance(items, data.Mix) else data.Mix([items])
    total = count_steps(items, settings)
    how = settings.optimizer == "adamw8bit", torch.device("cpu") if settings.offload else None
    optimizer = optim.AdamW(model, settings.betas, settings.eps, settings.weight_decay, *how)
    torch.manual_seed(settings.seed + distributed.rank())  # dropout is another one in each process
    warmup = 0 if settings.warmup * total < 1 else settings.warmup  # its one step, at rate 0, would be the run
    model.train()
    pending = _Pending(min(settings.log_every, total), (*method.keys, "grad_norm"), where)
    done, tokens, last = 0, 0, {}
    compiled, expected = device.graphs_compiled(), 0  # before; and by the first logged step and by evaluation
    if resume:
        done, tokens = checkpoints.resume(model, optimizer, metrics)
    device.mark_step(where)  # what is above is a graph of its own, not a part of the first step's
    logged_tokens, start = tokens, time.perf_counter()
    for step, batches in zip(range(done, total), steps(items, settings, method, where, done)):
        # a tensor: a number would make another graph of each step
        targets, read = distributed.host_sum(sum(b.weight for b in batches), sum(b.tokens for b in batches))
        weight = torch.tensor(float(targets)).to(where, non_blocking=True)
        lr = optim.lr_at(step, total, settings.lr, settings.schedule, warmup)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            found = method.objective(model, on(where, batch.tensors))
            (found["loss"] / weight).backward()
            optimizer.collect()
            for key, value in found.items():
                sums[key] = sums[key] + value.detach() if key in sums else value.detach()
            device.mark_step(where)
        if distributed.world() > 1:
            sums = _over_all(sums, method.keys, optimizer.gradients(), where)
        means = {key: value / weight for key, value in sums.items()}
        means["grad_norm"] = optimizer.step(lr, settings.clip)
        pending.put(step + 1, means, [name for batch in batches for name in batch.where])
        device.mark_step(where)
        tokens += read
        done = step + 1
        evaluates = bool(eval_items) and (done == total or (settings.eval_every and done % settings.eval_every == 0))
        scores = {}
        if done % settings.log_every == 0 or done in (1, total) or evaluates:
            means = pending.read()
            now = time.perf_counter()
            rate = (tokens - logged_tokens) / (now - start)
            graphs = device.graphs_compiled() - compiled
            expected = expected if last else graphs
            last = {"step": done, **method.summary(means), "lr": lr, "tokens": tokens, "tokens_per_s": round(rate, 1)}
            if model.model.compiled:  # attention compiles for itself too
                last |= {"graphs": graphs, "recompiled": graphs - expected}
            if evaluates:
                found = evaluate(model, method, eval_items, settings)
                scores = {f"eval_{key}": value for key, value in found.items()}
                expected += device.graphs_compiled() - compiled - graphs
            last |= scores
            metrics.write(last)
            start, logged_tokens = time.perf_counter(), tokens
        if checkpoints and checkpoints.due(done, scores):
            pending.read()  # raises where a number is not finite: nobody resumes from that
            began = time.perf_counter()
            checkpoints.save(done, model, optimizer, metrics, {"tokens": tokens, **scores})
            start += time.perf_counter() - began
            if checkpoints.asked and done < total:
                raise Stopped(checkpoints.asked, done)
    model.eval()
    return last


def _over_all(
    sums: dict[str, Tensor], keys: tuple[str, ...], grads: Sequence[Tensor], where: torch.device
) -> dict[str, Tensor]:
    """The sums over all processes, and the gradients too, in place; a process may have had no micro-batch."""
    row = torch.stack([sums[key].float() if key in sums else torch.zeros((), device=where) for key in keys])
    distributed.all_reduce([*grads, row])
    return dict(zip(keys, row))


class _Pending:
    """The numbers of the steps that nobody has read yet, on the device: to read them is one wait for it."""

    def __init__(self, rows: int, keys: tuple[str, ...], where: torch.device):
        self.keys, self.readings = keys, Readings(rows, len(keys), where)
        self.steps: list[tuple[int, list[str]]] = []  # number, and names of the records

    def put(self, step: int, means: dict[str, Tensor], names: list[str]) -> None:
        self.steps.append((step, names))
        self.readings.put(torch.stack([means[key].float() for key in self.keys]))

    def read(self) -> dict[str, float]:
        """The newest step's, {} if there is none. Raises BadInput where one is not finite."""
        found = [dict(zip(self.keys, row)) for row in self.readings.read(len(self.steps))]
        for (step, names), means in zip(self.steps, found):
            if not math.isfinite(means["loss"]) or not math.isfinite(means["grad_norm"]):
                shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
                raise BadInput(
                    f"the loss or its gradient is not finite at step {step} (loss {means['loss']}); "
                    f"its records: {shown}; it is not saved; try a lower --lr, from the beginning"
                )
        self.steps.clear()
        return found[-1] if found else {}


def steps(
    items: data.Mix, settings: Settings, method: Method, where: torch.device, done: int = 0
) -> Iterator[list[data.Batch]]:
    """The micro-batches of one optimiser step after another, epoch after epoch, without end; from step `done` on."""
    epoch = 0
    while True:
        planned = order(items, settings, epoch)
        skipped = min(done, len(planned))
        done -= skipped
        for batches in planned[skipped:]:
            batches = batches[distributed.rank() :: distributed.world()]  # short and long ones go round
            yield [micro_batch(method, items, rows, settings, where) for rows in batches]
        epoch += 1


def micro_batch(
    method: Method, items: Sequence, rows: list[data.Row], settings: Settings, where: torch.device
) -> data.Batch:
    """The batch of these rows of items, filled up with empty ones where shapes have to stay."""
    pad_to = device.padding(where)
    full = [[items[i] for i in row] for row in rows]
    return method.batch(full + [[]] * (settings.batch_size - len(rows)) if pad_to else full, pad_to)


def order(items: data.Mix, settings: Settings, epoch: int) -> list[list[list[data.Row]]]:
    """The steps of an epoch: the rows of each one's micro-batches, of all processes."""
    micro_batches = settings.accumulate * distributed.world()
    return data.order(items, settings.batch_size, micro_batches, settings.seed, epoch, settings.pack)


def count_steps(items: data.Mix, settings: Settings) -> int:
    """How many optimiser steps a run takes; a last epoch that is not whole is rounded up to a step."""
    if not items:
        raise BadInput("there is no record to train on")
    if settings.steps:
        return settings.steps
    if settings.pack is None:
        micro_batches = math.ceil(sum(items.counts) / settings.batch_size)
        per_epoch = math.ceil(micro_batches / (settings.accumulate * distributed.world()))
        return math.ceil(per_epoch * settings.epochs)
    whole, rest = divmod(settings.epochs, 1)
    count = lambda epoch: len(order(items, settings, epoch))  # noqa: E731  # packing differs from epoch to epoch
    return sum(map(count, range(int(whole)))) + (math.ceil(count(int(whole)) * rest) if rest else 0)


def seen(items: data.Mix, settings: Settings) -> set[int]:
    """The items that a run learns from."""
    found, left, epoch = set(), count_steps(items, settings), 0
    while left > 0:
        steps = order(items, settings, epoch)[:left]
        found.update(i for step in steps for batch in step for row in batch for i in row)
        left, epoch = left - len(steps), epoch + 1
    return found


def sizes(items: data.Mix, settings: Settings, where: torch.device) -> list[tuple[int, list[data.Row]]]:
    """The micro-batches of the first epoch: their tokens, padding among them, and their rows."""
    known, padding = items.lengths(), device.padding(where)

    def tokens(rows: list[data.Row]) -> int:
        lengths = [sum(known[i] for i in row) for row in rows]
        return settings.batch_size * padding(max(lengths)) if padding else sum(lengths)

    return [(tokens(rows), rows) for step in order(items, settings, 0) for rows in step]


def largest(items: data.Mix, settings: Settings, method: Method, where: torch.device) -> data.Batch:
    """The micro-batch of the first epoch that has the most tokens; one with more targets may hold a little more."""
    _, rows = max(sizes(items, settings, where), key=lambda batch: batch[0])
    return micro_batch(method, items, rows, settings, where)


@torch.no_grad()
def evaluate(model: nn.Module, method: Method, items: Sequence, settings: Settings) -> dict[str, float]:
    """The method's means over all items, with dropout off."""
    where = model.device
    was_training = model.training
    model.eval()
    sums: dict[str, Any] = {}
    weight = 0
    batches = data.by_length(data.lengths(items), settings.batch_size)
    for rows in batches[distributed.rank() :: distributed.world()]:
        batch = micro_batch(method, items, rows, settings, where)
        for key, value in method.objective(model, on(where, batch.tensors)).items():
            sums[key] = sums[key] + value if key in sums else value
        weight += batch.weight
        device.mark_step(where)
    model.train(was_training)
    if distributed.world() > 1:
        sums = _over_all(sums, method.keys, (), where)
    (weight,) = distributed.host_sum(weight)
    values = torch.stack([value.float() for value in sums.values()]).tolist()
    return method.summary({key: value / weight for key, value in zip(sums, values)})


def on(where: torch.device, tensors: dict) -> dict:
    """The batch with its tensors on the device; what the host knows of it stays there."""
    return {k: v.to(where, non_blocking=True) if isinstance(v, Tensor) else v for k, v in tensors.items()}
