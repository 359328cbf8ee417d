"""Records in JSON lines -> token ids -> batches. A format is one function in FORMATS."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minichat import chat
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

    def __str__(self) -> str:
        rest = "".join(f", {count:,} {what}" for what, count in self.counts.items())
        return f"{self.kept:,} records, {self.tokens:,} tokens{rest}"


# ---- records ----


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(file:line, record) for each line of a JSON-lines file. Raises BadInput at a line that is not an object."""
    path = Path(path)
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"{where}: not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise BadInput(f"{where}: a {type(record).__name__}, not an object; one JSON object a line")
                yield where, record
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; --data takes a file of JSON lines") from None


def _chat(record: dict) -> list[dict]:
    return record["messages"]


def _messages(record: dict, field: str, role: str) -> list[dict]:
    """A field that holds messages, or one of them as a string."""
    value = record[field]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadInput(f"{field!r} is a {type(value).__name__}; it must be a string or a list of messages")
    return value


def _completion(record: dict) -> list[dict]:
    return [*_messages(record, "prompt", "user"), *_messages(record, "completion", "assistant")]


def _preference(record: dict) -> tuple[list[dict], list[dict], list[dict]]:
    prompt = _messages(record, "prompt", "user")
    if record.get("system"):
        prompt = [{"role": "system", "content": record["system"]}, *prompt]
    answers = []
    for side in ("chosen", "rejected"):
        answer = _messages(record, side, "assistant")
        if not (answer and isinstance(answer[0], dict) and answer[0].get("role") == "assistant"):
            raise BadInput(f"{side!r} is {answer!r:.80}; it must begin with the assistant's answer to 'prompt'")
        answers.append(answer)
    return prompt, *answers


# name -> (the fields that tell it, record -> messages); "preference" gives prompt, chosen and rejected messages
FORMATS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "chat": (("messages",), _chat),
    "completion": (("prompt", "completion"), _completion),
    "preference": (("prompt", "chosen", "rejected"), _preference),
    "text": (("text",), lambda record: record["text"]),
}


def recognise(record: dict, where: str, wanted: str | None = None) -> str:
    """The format of a record by its fields, or `wanted` if it has that one's. Raises BadInput naming both."""
    for name in [wanted] if wanted else FORMATS:
        if all(key in record for key in FORMATS[name][0]):
            return name
    rule = " | ".join(" + ".join(FORMATS[name][0]) for name in ([wanted] if wanted else FORMATS))
    raise BadInput(f"{where}: fields {sorted(record)} fit no format; wanted: {rule}")


# ---- ids ----


def examples(
    sources: Iterable[tuple[str, dict]],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    format: str | None = None,
    learn: str = "assistant",
) -> tuple[list[Example], Report]:
    """Records for SFT as sequences of at most max_length tokens.

    A chat that is too long loses its oldest turns, then its prompt's left, then its answer's right; a text is cut into
    pieces. learn: "assistant" turns, or "all" tokens. Raises BadInput, naming the line, for a record that fits no
    format, and if none is left.
    """
    found, report = [], Report()
    for where, record in sources:
        name = recognise(record, where, format)
        if name == "preference":
            raise BadInput(f"{where}: a preference pair; train.py learns from chats and texts, dpo.py from pairs")
        try:
            content = FORMATS[name][1](record)
            sequences = list(_sequences(name, content, tokenizer, template, max_length, learn, report))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        spoken = name == "text" or learn == "all" or any(message["role"] == "assistant" for message in content)
        for ids, mask in sequences:
            if not any(mask[1:]):  # nothing predicts the first token
                why = "no target within --max-length" if spoken else "no assistant turn"
                report.counts[f"dropped: {why}"] += 1
                continue
            found.append(Example(ids, mask, where))
            report.tokens += len(ids)
    report.kept = len(found)
    report.counts = +report.counts
    if not found:
        raise BadInput(f"no record is left to learn from ({report})")
    return found, report


def _sequences(name, content, tokenizer, template, max_length, learn, report) -> Iterator[tuple]:
    if name == "text":
        if not isinstance(content, str):
            raise BadInput(f"'text' is a {type(content).__name__}, not a string")
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
    sources: Iterable[tuple[str, dict]],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    max_prompt_length: int,
) -> tuple[list[Pair], Report]:
    """Preference records as ids: prompts keep their last max_prompt_length tokens, answers what max_length leaves.

    Pairs whose answers are equal are dropped. Raises BadInput for a record that is none, or if none is left.
    """
    found, report = [], Report()
    template = chat.template_text(template, tokenizer)
    for where, record in sources:
        recognise(record, where, "preference")
        try:
            prompt, chosen, rejected = _preference(record)
            head = chat.prompt_ids(prompt, template, tokenizer)
            answers = [_answer(prompt, answer, len(head), template, tokenizer) for answer in (chosen, rejected)]
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        if len(head) > max_prompt_length:
            head = head[-max_prompt_length:]
            report.counts["prompts cut on the left"] += 1
        room = max(0, max_length - len(head))
        report.counts["answers cut on the right"] += sum(len(ids) > room for ids, _ in answers)
        (good, good_mask), (bad, bad_mask) = ((ids[:room], mask[:room]) for ids, mask in answers)
        if good == bad or not any(good_mask) or not any(bad_mask):
            report.counts["dropped: equal or empty answers"] += 1
            continue
        found.append(Pair(head, good, bad, where, masks=(good_mask, bad_mask)))
        report.tokens += 2 * len(head) + len(good) + len(bad)
    report.kept = len(found)
    report.counts = +report.counts
    if not found:
        raise BadInput(f"no pair is left to learn from ({report})")
    return found, report


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


def order(lengths: list[int], batch_size: int, accumulate: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """Indices of an epoch's records: the micro-batches of each optimiser step; by seed and epoch alone.

    A step is a random sample, and only within it do similar lengths go together, so that less is padded. Whole steps
    of similar lengths would be cheaper and learn worse: lengths go with content, and a step of short answers alone
    teaches that answers are short.
    """
    indices = list(range(len(lengths)))
    random.Random(f"order {seed} {epoch}").shuffle(indices)
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
