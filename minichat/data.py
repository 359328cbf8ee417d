"""Records -> token ids -> batches."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minichat import chat, formats
from minichat.errors import BadInput
from minichat.tokenizer import Tokenizer


@dataclass
class Example:
    """A sequence to learn from: mask[i] is 1 where token i is learnt. where: file and line."""

    ids: list[int]
    mask: list[int]
    where: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Pair:
    """A prompt with a preferred and a dispreferred answer, as ids. masks: 1 on the tokens of each that count."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str
    reference: tuple[float, float] | None = None  # log-probs of the answers under a reference that is gone
    masks: tuple[list[int], list[int]] | None = None  # of chosen and rejected; None: all of their tokens count

    def __post_init__(self):
        if self.masks is None:
            self.masks = [1] * len(self.chosen), [1] * len(self.rejected)

    def __len__(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass
class Batch:
    """One micro-batch. weight: what its loss sum is divided by (target tokens, or pairs), counted on the host."""

    tensors: dict[str, Tensor]
    weight: int
    tokens: int
    where: list[str]


@dataclass
class Report:
    """What became of the records, in numbers: nothing is dropped or cut silently."""

    kept: int = 0
    tokens: int = 0
    counts: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)  # file:number: why, of the records that could not be learnt from

    def refuse(self, where: str, why: BadInput, strict: bool) -> None:
        """A bad record is dropped and counted, or is the end where `strict`."""
        if strict:
            raise BadInput(f"{where}: {why}") from None
        self.bad.append(f"{where}: {why}")
        if len(self.bad) == 100 and not self.kept:
            raise BadInput(f"the first 100 records are all bad, {self.bad[0]}") from None

    def checked(self) -> "Report":
        """Itself without zeros. Raises BadInput if there is nothing to learn from."""
        self.counts = +self.counts
        if not self.kept:
            raise BadInput(f"no record is left to learn from ({self})" + "".join(f"; {line}" for line in self.bad[:1]))
        return self

    def __str__(self) -> str:
        counts = self.counts + Counter({"bad": len(self.bad)})
        rest = "".join(f", {count:,} {what}" for what, count in counts.items())
        return f"{self.kept:,} records, {self.tokens:,} tokens{rest}"


# ---- ids ----


def examples(
    records: Iterable[tuple[str, dict | BadInput]],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    format: str | None = None,
    learn: str = "assistant",
    strict: bool = False,
) -> tuple[list[Example], Report]:
    """Records for SFT as sequences of at most max_length tokens.

    A chat that is too long loses its oldest turns, then its prompt's left, then its answer's right; a text is cut into
    pieces. learn: "assistant" turns, or "all" tokens. A bad record is dropped and named in the report.
    Raises BadInput if none is left, and naming the record at the first bad one if `strict`.
    """
    found, report = [], Report()
    for where, record in records:
        try:
            content = formats.read(_whole(record), formats.CHATS, format)
            sequences = list(_sequences(content, tokenizer, template, max_length, learn, report))
        except BadInput as error:
            report.refuse(where, error, strict)
            continue
        is_text = isinstance(content, str)
        spoken = is_text or learn == "all" or any(message["role"] == "assistant" for message in content)
        for ids, mask in sequences:
            if not any(mask[1:]):  # nothing predicts the first token
                why = "no target within --max-length" if spoken else "no assistant turn"
                report.counts[f"dropped: {why}"] += 1
                continue
            found.append(Example(ids, mask, where))
            report.kept += 1
            report.tokens += len(ids)
    return found, report.checked()


def _whole(record: dict | BadInput) -> dict:
    if isinstance(record, BadInput):
        raise record
    return record


def _sequences(content, tokenizer, template, max_length, learn, report) -> Iterator[tuple]:
    if isinstance(content, str):
        ids = [tokenizer.bos_id] * tokenizer.add_bos + tokenizer.encode(content) + [tokenizer.eos_id]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            yield piece, [1] * len(piece)
        report.counts["texts cut into pieces"] += len(ids) > max_length
        return
    ids, mask = chat.render(content, template, tokenizer, learn=learn)
    while len(ids) > max_length and (shorter := _without_oldest_turn(content)):
        content = shorter
        ids, mask = chat.render(content, template, tokenizer, learn=learn)
        report.counts["oldest turns dropped"] += 1
    over = len(ids) - max_length
    if over > 0 and any(mask):
        # never the beginning of what is learnt, nor the token that predicts it: the rest would follow from nothing
        start = min(over, max(0, mask.index(1) - 1))
        ids, mask = ids[start : start + max_length], mask[start : start + max_length]
        report.counts["prompts cut on the left"] += start > 0
        report.counts["answers cut on the right"] += start < over
    yield ids, mask


def _without_oldest_turn(messages: list[dict]) -> list[dict] | None:
    """The chat without its first user and assistant turn, its system message kept; None if it is the only one."""
    start = 1 if messages[0]["role"] == "system" else 0
    later = [i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user"]
    return [*messages[:start], *messages[later[0] :]] if later else None


def pairs(
    records: Iterable[tuple[str, dict | BadInput]],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    max_prompt_length: int,
    format: str | None = None,
    strict: bool = False,
) -> tuple[list[Pair], Report]:
    """Preference records as ids: prompts keep their last max_prompt_length tokens, answers what max_length leaves.

    Pairs whose answers are equal, or whose prompt fills the length, are dropped and counted; bad records as in
    examples().
    """
    found, report = [], Report()
    template = chat.template_text(template, tokenizer)
    for where, record in records:
        try:
            prompt, chosen, rejected = formats.read(_whole(record), formats.PAIRS, format)
            head = chat.prompt_ids(prompt, template, tokenizer)
            answers = [_answer(prompt, answer, len(head), template, tokenizer) for answer in (chosen, rejected)]
        except BadInput as error:
            report.refuse(where, error, strict)
            continue
        cut = len(head) > max_prompt_length
        head = head[-max_prompt_length:]
        room = max_length - len(head)
        if room < 1:
            report.counts["dropped: the prompt fills --max-length"] += 1
            continue
        (good, good_mask), (bad, bad_mask) = ((ids[:room], mask[:room]) for ids, mask in answers)
        if good == bad or not any(good_mask) or not any(bad_mask):
            report.counts["dropped: equal or empty answers"] += 1
            continue
        report.counts["prompts cut on the left"] += cut
        report.counts["answers cut on the right"] += sum(len(ids) > room for ids, _ in answers)
        found.append(Pair(head, good, bad, where, masks=(good_mask, bad_mask)))
        report.kept += 1
        report.tokens += 2 * len(head) + len(good) + len(bad)
    return found, report.checked()


def _answer(prompt: list[dict], answer: list[dict], start: int, template: str, tokenizer: Tokenizer) -> tuple:
    """The ids of an answer to a prompt of `start` ids, and the mask of those that count.

    They are what SFT would learn of it, and what the template writes after that: NeuralHermes' answers end
    "<|im_end|>\\n", and its loss sums all of it, as trl's does.
    """
    ids, mask = chat.render([*prompt, *answer], template, tokenizer)
    # the prompt's ids begin the ids with its answer, whatever the template: what follows is the answer
    ids, mask = ids[start:], mask[start:]
    if answer[-1]["role"] == "assistant":
        last = max((i for i, learnt in enumerate(mask) if learnt), default=len(mask))
        mask[last:] = [1] * len(mask[last:])
    return ids, mask


# ---- batches ----


class Mix(Sequence):
    """The items of one or several sources, and which of them an epoch takes.

    weights: the sources' shares of an epoch, which is as long as it can be with no item taken twice; the next one
    takes others as long as there are any. None: every epoch takes all items. Raises BadInput if only some have one.
    """

    def __init__(self, parts: Sequence[Sequence], weights: Sequence[float | None] | None = None):
        self.items = [item for part in parts for item in part]
        self.sizes = [len(part) for part in parts]
        given = [weight is not None for weight in weights or ()]
        if any(given) and not all(given):
            raise BadInput("some sources have a weight and some have none; give each one its share, or none")
        self.counts = self.sizes
        if any(given):
            whole = min(size / weight for size, weight in zip(self.sizes, weights))
            self.counts = [max(1, round(whole * weight)) for weight in weights]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def epoch(self, seed: int, epoch: int) -> list[int]:
        """The indices of an epoch's items, in random order; by seed and epoch alone."""
        indices, start = [], 0
        for part, (size, count) in enumerate(zip(self.sizes, self.counts)):
            walk = list(range(start, start + size))
            if count < size:  # a walk over the source in a few epochs, then in another order
                lap, turn = divmod(epoch, size // count)
                random.Random(f"lap {seed} {part} {lap}").shuffle(walk)
                walk = walk[turn * count : (turn + 1) * count]
            indices += walk
            start += size
        random.Random(f"order {seed} {epoch}").shuffle(indices)
        return indices


def order(mix: Mix, batch_size: int, accumulate: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """Indices of an epoch's items: the micro-batches of each optimiser step; by seed and epoch alone.

    A step is a random sample, and only within it do similar lengths go together, so that less is padded. Whole steps
    of similar lengths would be cheaper and learn worse: lengths go with content, and a step of short answers alone
    teaches that answers are short.
    """
    lengths = [len(item) for item in mix]
    indices = mix.epoch(seed, epoch)
    size = batch_size * accumulate
    samples = [indices[i : i + size] for i in range(0, len(indices), size)]
    return [by_length(lengths, batch_size, sample) for sample in samples]


def by_length(lengths: list[int], batch_size: int, indices: Iterable[int] | None = None) -> list[list[int]]:
    """These indices (None: all) in batches of similar lengths, short ones first."""
    near = sorted(range(len(lengths)) if indices is None else indices, key=lengths.__getitem__)
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
