"""Token ids -> batches: which items an epoch takes, in which order, padded how."""

import itertools
import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minichat.attention import FORKS
from minichat.errors import BadInput
from minichat.examples import Example, Pair


@dataclass
class Batch:
    """One micro-batch. weight: what its loss sum is divided by (target tokens, or pairs), counted on the host."""

    tensors: dict  # Tensors, and "documents" as a list of their lengths where nothing is padded
    weight: int
    tokens: int
    where: list[str]


class Mix(Sequence):
    """The items of one or several sources, and which of them an epoch takes.

    weights: the sources' shares of an epoch, which is as long as it can be with no item taken twice. Of a source that
    is more than that, the next epoch takes others, until fewer are left than it needs: then it draws from all again.
    None: every epoch takes all items. Raises BadInput if only some have one.
    """

    def __init__(self, parts: Sequence[Sequence], weights: Sequence[float | None] | None = None):
        self.parts = list(parts)
        self.sizes = [len(part) for part in parts]
        self.starts = [0, *itertools.accumulate(self.sizes)]
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
    """len() of each item; Items and a Mix know them without making the items."""
    return items.lengths() if hasattr(items, "lengths") else [len(item) for item in items]


Row = list[int]  # the items of a row: one, or several that are packed


def order(
    mix: Mix, batch_size: int, micro_batches: int, seed: int, epoch: int, capacity: int | None = None
) -> list[list[list[Row]]]:
    """Indices of an epoch's items: the rows of the micro-batches of each optimiser step; by seed and epoch alone.

    capacity: of a packed row, in tokens; None packs none. A step is a random sample, and only within it do similar
    lengths go together, so that less is padded. Whole steps of similar lengths would be cheaper and learn worse:
    lengths go with content, and a step of short answers alone teaches that answers are short.
    """
    known = lengths(mix)
    indices = mix.epoch(seed, epoch)
    rows = [[i] for i in indices] if capacity is None else pack(known, indices, capacity, f"pack {seed} {epoch}")
    size = batch_size * micro_batches
    return [by_length(known, batch_size, rows[i : i + size]) for i in range(0, len(rows), size)]


def by_length(known: list[int], batch_size: int, rows: Iterable[Row] | None = None) -> list[list[Row]]:
    """Rows (None: one of each item) in batches of similar lengths, short ones first."""
    rows = ([i] for i in range(len(known))) if rows is None else rows
    near = sorted(rows, key=lambda row: sum(known[i] for i in row))
    return [near[i : i + batch_size] for i in range(0, len(near), batch_size)]


def pack(known: list[int], indices: Iterable[int], capacity: int, seed: str) -> list[Row]:
    """Items in rows of at most `capacity` tokens (a longer one is a row by itself), the rows in random order.

    Best fit: each item goes to the row that it leaves the least room in. In the order given, not from the longest
    down, so that a row is a mixture as well.
    """
    rows: list[Row] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left in them
    rooms: list[int] = []  # which of those lists are not empty, in order
    for i in indices:
        at = bisect_left(rooms, known[i])
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, max(capacity, known[i])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[at]
        rows[row].append(i)
        left = room - known[i]
        if left:
            if not open_rows[left]:
                insort(rooms, left)
            open_rows[left].append(row)
    random.Random(seed).shuffle(rows)
    return rows


Piece = tuple[list[int], list[int], int]  # of a document: tokens, mask, and the sum that its targets go into


def _tensors(rows: list[list[list[Piece]]], pad_to: Callable[[int], int] | None) -> dict:
    """Rows of documents as ids; and the flat index, label and sum's number ("document") of every target.

    A document is a sequence in one piece, or one and others that each continue the first, without a view of each other:
    a prompt and two answers to it. pad_to None: all in one row, without padding: ids (1, T) and the documents' lengths.
    Else ids (B, T), padded on the right, and for rows of several pieces each token's position and document's number,
    (B, T); and no index: a target for every token, (B * T,), those that are none with weight 0. A trunk's last token
    predicts the first one of each piece that continues it: the second piece's comes after all those, predicted at the
    flat indices "again". Where a row is one pair, no index is there twice: of two gradients for one, Gaudi's bridge
    (1.19) keeps one.
    """
    lengths = [tuple(len(tokens) for tokens, _, _ in document) for row in rows for document in row]
    if pad_to is None:
        rows, T = [[document for row in rows for document in row]], sum(map(sum, lengths))
    else:
        T = pad_to(max(sum(len(tokens) for document in row for tokens, _, _ in document) for row in rows))
    ids, positions, documents = (torch.full((len(rows), T), fill) for fill in (0, -1, -1))
    index, labels, sums = [], [], []
    numbers = itertools.count()
    for b, row in enumerate(rows):
        end = 0
        for document, n in zip(row, numbers):
            trunk = end, end + len(document[0][0])
            for fork, (tokens, mask, number) in enumerate(document):
                start, end = end, end + len(tokens)
                first = trunk[1] - trunk[0] if fork else 0
                ids[b, start:end] = torch.tensor(tokens, dtype=torch.int64)
                positions[b, start:end] = torch.arange(first, first + len(tokens))
                documents[b, start:end] = FORKS * n + fork
                # the one shift: a token is predicted where the one before it is, which may be the trunk's last
                before = [trunk[1] - 1 if fork else -1, *range(start, end - 1)]
                found = [t for t, learnt in enumerate(mask) if learnt and before[t] >= trunk[0]]
                index += [b * T + before[t] for t in found]
                labels += [tokens[t] for t in found]
                sums += [number] * len(found)
    targets = {"labels": torch.tensor(labels, dtype=torch.int64), "document": torch.tensor(sums, dtype=torch.int64)}
    targets["weights"] = torch.ones(len(index))
    at = torch.tensor(index, dtype=torch.int64)
    if pad_to is None:
        return {"ids": ids, "index": at, **targets, "documents": lengths}
    most = max(sum(max(0, len(document) - 2) for document in row) for row in rows)  # in a row: 1 where each is a pair
    again = torch.arange(len(rows))[:, None] * T + torch.arange(most)  # others of the row where it has fewer
    places, known, counts = at.clone(), set(), [0] * len(rows)
    for n, place in enumerate(index):
        if place in known:
            b = place // T
            again[b, counts[b]], places[n] = place, len(rows) * T + b * most + counts[b]
            counts[b] += 1
        known.add(place)
    # padding by mask, never by id: eos may be the padding token and is still learnt
    size = len(rows) * (T + most)
    tensors = {"ids": ids, **{k: x.new_zeros(size).index_copy_(0, places, x) for k, x in targets.items()}}
    if any(sum(map(len, row)) > 1 for row in rows):
        tensors |= {"positions": positions, "documents": documents}
    return tensors | {"again": again.flatten()} if most else tensors


def sft_batch(rows: list[list[Example]], pad_to: Callable[[int], int] | None) -> Batch:
    """A micro-batch of rows of examples; its weight is its number of target tokens."""
    items = [example for row in rows for example in row]
    number = itertools.count()
    tensors = _tensors([[[(e.ids, e.mask, next(number))] for e in row] for row in rows], pad_to)
    return Batch(tensors, int(tensors["weights"].sum()), sum(map(len, items)), [e.where for e in items])


def dpo_batch(rows: list[list[Pair]], pad_to: Callable[[int], int] | None) -> Batch:
    """A micro-batch of B pairs, each a document `prompt | chosen | rejected`; its weight is its number of pairs.

    The sums of the chosen answers have the numbers 0 .. B - 1, those of the rejected ones the B next. Empty rows, where
    shapes have to stay, come last: "pairs" (B,) is 1 for a pair and 0 for those.
    """
    items = [pair for row in rows for pair in row]
    missing = [0.0] * sum(not row for row in rows)  # rows that are padding
    B, number = len(items) + len(missing), itertools.count()

    def document(p: Pair) -> list[Piece]:
        n = next(number)
        good, bad = p.masks
        return [(p.prompt, [0] * len(p.prompt), n), (p.chosen, good, n), (p.rejected, bad, B + n)]

    tensors = _tensors([[document(pair) for pair in row] for row in rows], pad_to)
    tensors["pairs"] = torch.tensor([1.0] * len(items) + missing)
    if items[0].reference is not None:
        known = [[p.reference[side] for p in items] + missing for side in (0, 1)]
        tensors["reference"] = torch.tensor(known).flatten()
    return Batch(tensors, len(items), sum(map(len, items)), [p.where for p in items])
