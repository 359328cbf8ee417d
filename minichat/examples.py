"""Records -> token ids, for SFT and for preferences. Imports no torch: tokenising runs in processes of its own."""

import functools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from minichat import chat, formats
from minichat.console import plural
from minichat.errors import BadInput
from minichat.tokenizer import Tokenizer

SHOWN = 1000  # bad records that a report names; more are only counted


@dataclass
class Example:
    """A sequence to learn from: mask[i] is 1 where token i is learnt. where: file and line."""

    ids: list[int]
    mask: list[int]
    where: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Pair:
    """A prompt with a preferred and a dispreferred answer, as ids. masks: 1 on the tokens of each that count."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str = ""
    reference: tuple[float, float] | None = None  # log-probs of the answers under a reference that is gone
    masks: tuple[list[int], list[int]] | None = None  # of chosen and rejected; None: all of their tokens count

    def __post_init__(self):
        if self.masks is None:
            self.masks = [1] * len(self.chosen), [1] * len(self.rejected)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)  # the prompt is read once, for both


@dataclass
class Report:
    """What became of the records, in numbers: nothing is dropped or cut silently."""

    kept: int = 0
    tokens: int = 0
    counts: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)  # file:number: why, of the first SHOWN records that cannot be used
    refused: int = 0  # how many cannot

    def refuse(self, where: str, why: BadInput) -> None:
        self.refused += 1
        if len(self.bad) < SHOWN:
            self.bad.append(f"{where}: {why}")

    def add(self, other: "Report") -> None:
        """Take in what became of other records."""
        self.kept += other.kept
        self.tokens += other.tokens
        self.refused += other.refused
        self.counts.update(other.counts)
        self.bad += other.bad[: SHOWN - len(self.bad)]

    def check(self) -> None:
        """Raises BadInput if there is nothing to learn from."""
        if not self.kept:
            raise BadInput(f"no record is left to learn from ({self})" + "".join(f"; {line}" for line in self.bad[:1]))

    def __str__(self) -> str:
        counts = self.counts + Counter({"bad": self.refused})
        rest = "".join(f", {count:,} {what}" for what, count in counts.items())
        return f"{plural(self.kept, 'record')}, {self.tokens:,} tokens{rest}"


def encode(
    records: Iterable[tuple[str, dict | BadInput]], encoder: "Sft | Dpo", strict: bool = False
) -> tuple[list[Example] | list[Pair], Report]:
    """Records as token ids. Bad ones are named in the report; if `strict`, the first is a BadInput that names it."""
    found, report = [], Report()
    for where, record in records:
        try:
            if isinstance(record, BadInput):
                raise record
            items = encoder(record, report.counts)
        except BadInput as error:
            if strict:
                raise BadInput(f"{where}: {error}") from None
            report.refuse(where, error)
            continue
        for item in items:
            item.where = where
            report.tokens += len(item)
        found += items
    report.kept = len(found)
    report.counts = +report.counts
    return found, report


@dataclass(frozen=True)
class Sft:
    """Encodes records to learn from, as sequences of at most max_length tokens.

    A chat that is too long loses its oldest turns, then its prompt's left, then its answer's right; a text is cut into
    pieces, and so is a chat of which all is learnt. template: Jinja text. format: a name in formats.CHATS, or None to
    tell it by the fields.
    learn: "assistant" turns, or "all" tokens. max_prompt_length: of what comes before the first answer, None for no
    limit of its own.
    """

    tokenizer: Tokenizer
    template: str
    max_length: int
    format: str | None = None
    learn: str = "assistant"
    max_prompt_length: int | None = None

    def __call__(self, record: dict, counts: Counter) -> list[Example]:
        """The sequences of a record, and in `counts` what was cut and dropped. Raises BadInput if it is bad."""
        content = formats.read(record, formats.CHATS, self.format)
        sequences = list(self._text(content, counts) if isinstance(content, str) else self._chat(content, counts))
        found = [Example(ids, mask) for ids, mask in sequences if any(mask[1:])]  # nothing predicts the first token
        if len(found) < len(sequences):
            spoken = self.learn == "all" or isinstance(content, str) or any(m["role"] == "assistant" for m in content)
            why = "no target within --max-length" if spoken else "no assistant turn"
            counts[f"dropped: {why}"] += len(sequences) - len(found)
        return found

    def _text(self, text: str, counts: Counter) -> Iterator[tuple]:
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text)  # in which both may be written already
        ids = [tokenizer.bos_id] * (tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]) + ids
        ids += [tokenizer.eos_id] * (ids[-1:] != [tokenizer.eos_id])
        yield from self._pieces(ids, [1] * len(ids))
        counts["texts cut into pieces"] += len(ids) > self.max_length

    def _pieces(self, ids: list[int], mask: list[int]) -> Iterator[tuple]:
        for start in range(0, len(ids), self.max_length):
            piece = slice(start, start + self.max_length)
            if start == 0 or any(mask[piece][1:]):  # what follows from nothing cannot be learnt
                yield ids[piece], mask[piece]

    def _chat(self, messages: list[dict], counts: Counter) -> Iterator[tuple]:
        longest = self.max_length

        @functools.cache
        def rendered(dropped: int) -> tuple[list[int], list[int]]:
            shorter = _without_oldest_turns(messages, dropped)
            return chat.render(shorter, self.template, self.tokenizer, learn=self.learn)

        if self.learn == "all":  # as a text: there is no prompt to keep, and all of it is learnt
            yield from self._pieces(*rendered(0))
            counts["chats cut into pieces"] += len(rendered(0)[0]) > longest
            return
        dropped = 0
        if len(rendered(0)[0]) > longest and (most := len(_turns(messages)) - 1):
            # as few as make it fit: rendered a few times, not once for each turn, of which some chats have hundreds
            dropped = bisect_left(range(most), True, 1, key=lambda n: len(rendered(n)[0]) <= longest)
        counts["oldest turns dropped"] += dropped
        ids, mask = rendered(dropped)
        prompt = mask.index(1) if any(mask) else 0
        over = len(ids) - longest
        if self.max_prompt_length is not None:
            over = max(over, prompt - self.max_prompt_length)
        if over > 0 and any(mask):
            # never the beginning of what is learnt, nor the token that predicts it: the rest would follow from nothing
            start = min(over, max(0, prompt - 1))
            counts["prompts cut on the left"] += start > 0
            counts["answers cut on the right"] += len(ids) - start > longest
            ids, mask = ids[start : start + longest], mask[start : start + longest]
        yield ids, mask


def _turns(messages: list[dict]) -> list[int]:
    """Where its turns begin, of a user and an assistant each: after a system message, and at each later user."""
    start = 1 if messages[0]["role"] == "system" else 0
    return [start, *(i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user")]


def _without_oldest_turns(messages: list[dict], dropped: int) -> list[dict]:
    """The chat without so many of its first turns, its system message kept."""
    if not dropped:
        return messages
    turns = _turns(messages)
    return [*messages[: turns[0]], *messages[turns[dropped] :]]


@dataclass(frozen=True)
class Dpo:
    """Encodes preference records: prompts keep their last max_prompt_length tokens, answers what max_length leaves.

    Pairs whose answers are equal, or whose prompt fills the length, are dropped and counted. template: Jinja text.
    format: a name in formats.PAIRS, or None to tell it by the fields.
    """

    tokenizer: Tokenizer
    template: str
    max_length: int
    max_prompt_length: int
    format: str | None = None

    def __call__(self, record: dict, counts: Counter) -> list[Pair]:
        """The pair of a record, or none, and in `counts` what was cut and dropped. Raises BadInput if it is bad."""
        prompt, chosen, rejected = formats.read(record, formats.PAIRS, self.format)
        head = chat.prompt_ids(prompt, self.template, self.tokenizer)
        answers = [self._answer(prompt, answer, len(head)) for answer in (chosen, rejected)]
        cut = len(head) > self.max_prompt_length
        head = head[-self.max_prompt_length :]
        room = self.max_length - len(head)
        if room < 1:
            counts["dropped: the prompt fills --max-length"] += 1
            return []
        (good, good_mask), (bad, bad_mask) = ((ids[:room], mask[:room]) for ids, mask in answers)
        if good == bad or not any(good_mask) or not any(bad_mask):
            counts["dropped: equal or empty answers"] += 1
            return []
        counts["prompts cut on the left"] += cut
        counts["answers cut on the right"] += sum(len(ids) > room for ids, _ in answers)
        return [Pair(head, good, bad, masks=(good_mask, bad_mask))]

    def _answer(self, prompt: list[dict], answer: list[dict], start: int) -> tuple[list[int], list[int]]:
        """The ids of an answer to a prompt of `start` ids, and the mask of those that count.

        They are what SFT would learn of it, and what the template writes after that: NeuralHermes' answers end
        "<|im_end|>\n", and its loss sums all of it, as trl's does.
        """
        ids, mask = chat.render([*prompt, *answer], self.template, self.tokenizer)
        # the prompt's ids begin the ids with its answer, whatever the template: what follows is the answer
        ids, mask = ids[start:], mask[start:]
        if answer[-1]["role"] == "assistant":
            last = max((i for i, learnt in enumerate(mask) if learnt), default=len(mask))
            mask[last:] = [1] * len(mask[last:])
        return ids, mask
