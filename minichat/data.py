"""Token ids -> batches: which items an epoch takes, in which order, padded how."""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from minichat.errors import BadInput
from minichat.examples import Example, Pair


@dataclass
class Batch:
    """One micro-batch. weight: what its loss sum is divided by (target tokens, or pairs), counted on the host."""

    tensors: dict[str, Tensor]
    weight: int
    tokens: int
    where: list[str]


class Mix(Sequence):
    """The items of one or several sources, and which of them an epoch takes.

    weights: the sources' shares of an epoch, which is as long as it can be with no item taken twice; the next one
    takes others as long as there are any. None: every epoch takes all items. Raises BadInput if only some have one.
    """

    def __init__(self, parts: Sequence[Sequence], weights: Sequence[float | None] | None = None):
        self.parts = parts
        self.sizes = [len(part) for part in parts]
        self.starts = [0, *accumulate(self.sizes)]
        given = [weight is not None for weight in weights or ()]
        if any(given) and not all(given):
            raise BadInput("some sources have a weight and some have none; give each one its share, or none")
        self.counts = self.sizes
        if any(given):
            whole = min(size / weight for size, weight in zip(self.sizes, weights))
            self.counts = [max(1, round(whole * weight)) for weight in weights]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int):
        if not 0 <= i < len(self):  # what ends a loop over a sequence
            raise IndexError(i)
        part = bisect_right(self.starts, i) - 1
        return self.parts[part][i - self.starts[part]]

    def lengths(self) -> list[int]:
        return [length for part in self.parts for length in lengths(part)]

    def epoch(self, seed: int, epoch: int) -> list[int]:
        """The indices of an epoch's items, in random order; by seed and epoch alone."""
        indices = []
        for part, (start, size, count) in enumerate(zip(self.starts, self.sizes, self.counts)):
            walk = list(range(start, start + size))
            if count < size:  # a walk over the source in a few epochs, then in another order
                lap, turn = divmod(epoch, size // count)
                random.Random(f"lap {seed} {part} {lap}").shuffle(walk)
                walk = walk[turn * count : (turn + 1) * count]
            indices += walk
        random.Random(f"order {seed} {epoch}").shuffle(indices)
        return indices


class Referenced(Sequence):
    """Pairs, each with the log-probs of its answers under a reference that is gone: logps (n, 2)."""

    def __init__(self, pairs: Sequence[Pair], logps: Tensor):
        self.pairs, self.logps = pairs, logps

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Pair:
        return replace(self.pairs[i], reference=tuple(self.logps[i].tolist()))

    def lengths(self) -> list[int]:
        return lengths(self.pairs)


def lengths(items: Sequence) -> list[int]:
    """len() of each item; a Store and a Mix know them without making the items."""
    return items.lengths() if hasattr(items, "lengths") else [len(item) for item in items]


def order(mix: Mix, batch_size: int, micro_batches: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """Indices of an epoch's items: the micro-batches of each optimiser step; by seed and epoch alone.

    A step is a random sample, and only within it do similar lengths go together, so that less is padded. Whole steps
    of similar lengths would be cheaper and learn worse: lengths go with content, and a step of short answers alone
    teaches that answers are short.
    """
    known = lengths(mix)
    indices = mix.epoch(seed, epoch)
    size = batch_size * micro_batches
    samples = [indices[i : i + size] for i in range(0, len(indices), size)]
    return [by_length(known, batch_size, sample) for sample in samples]


def by_length(known: list[int], batch_size: int, indices: Iterable[int] | None = None) -> list[list[int]]:
    """Indices (None: all) of items with these lengths in batches of similar ones, short ones first."""
    near = sorted(range(len(known)) if indices is None else indices, key=known.__getitem__)
    return [near[i : i + batch_size] for i in range(0, len(near), batch_size)]


def _padded(rows: list[list[int]], masks: list[list[int]], pad_to: Callable[[int], int]) -> dict[str, Tensor]:
    """Rows as (B, T) ids, padded on the right, and the flat index, label and row of every target."""
    T = pad_to(max(map(len, rows)))
    ids = torch.zeros(len(rows), T, dtype=torch.int64)
    index, labels, row = [], [], []
    for b, (tokens, mask) in enumerate(zip(rows, masks)):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        targets = [t for t in range(1, len(tokens)) if mask[t]]
        index += [b * T + t - 1 for t in targets]  # the one shift: position t - 1 predicts token t
        labels += [tokens[t] for t in targets]
        row += [b] * len(targets)
    # padding by mask, never by id: eos may be the padding token and is still learnt
    N = pad_to(len(index))
    weights = [1.0] * len(index) + [0.0] * (N - len(index))
    filler = [0] * (N - len(index))
    return {
        "ids": ids,
        "index": torch.tensor(index + filler),
        "labels": torch.tensor(labels + filler),
        "row": torch.tensor(row + filler),
        "weights": torch.tensor(weights),
    }


def sft_batch(items: list[Example], pad_to: Callable[[int], int]) -> Batch:
    """A micro-batch of sequences; its weight is its number of target tokens."""
    tensors = _padded([e.ids for e in items], [e.mask for e in items], pad_to)
    return Batch(tensors, int(tensors["weights"].sum()), sum(map(len, items)), [e.where for e in items])


def dpo_batch(items: list[Pair], pad_to: Callable[[int], int]) -> Batch:
    """A micro-batch of B pairs as 2B rows, the chosen ones first; its weight is its number of pairs."""
    rows = [p.prompt + p.chosen for p in items] + [p.prompt + p.rejected for p in items]
    masks = [[0] * len(p.prompt) + p.masks[side] for side in (0, 1) for p in items]
    tensors = _padded(rows, masks, pad_to)
    if items[0].reference is not None:
        tensors["reference"] = torch.tensor([p.reference[side] for side in (0, 1) for p in items])
    return Batch(tensors, len(items), sum(map(len, rows)), [p.where for p in items])
