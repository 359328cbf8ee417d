"""The ids of a text from a memory of its words' ids: most words of a data set have come before.

For BPE tokenizers of Mistral's kind, none of whose tokens goes on from a word into the space before the next one. Their
merges never cross such a boundary, so a word's ids are the same in every text (Tokenizer still finds them).
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Collection
from itertools import accumulate, chain

SPACE = "▁"  # as such tokenizers write it
LARGEST = 1 << 17  # words in memory, some 50 MB: then it begins anew
LONGEST = 40  # characters of a word that is kept

_words = re.compile(" *[^ ]+| +").findall


def are_alone(pipeline: dict, vocabulary: Collection[str]) -> bool:
    """Whether words do not depend on each other: by tokenizer.json's pipeline, and by the texts of all tokens. It must
    be one whose characters depend on each other through merges alone."""

    def steps(step: dict | None) -> list[dict]:
        inner = step and step.get("normalizers", step.get("pretokenizers"))
        return [s for part in inner for s in steps(part)] if inner is not None else [step] if step else []

    marks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    found = steps(pipeline["normalizer"]) + steps(pipeline["pre_tokenizer"])
    metaspace = [step for step in found if step["type"] == "Metaspace" and step["replacement"] == SPACE]
    split = {"type": "Split", "pattern": {"String": SPACE}, "behavior": "MergedWithNext", "invert": False}
    others = (marks, split, {"type": "Prepend", "prepend": SPACE})
    known = all(step in others or step in metaspace for step in found) and (metaspace or marks in found)
    alone = SPACE in vocabulary and not any(SPACE in token.lstrip(SPACE) for token in vocabulary)
    return bool(known) and alone and not any(" " in token["content"] for token in pipeline["added_tokens"])


class Words:
    """encode: text -> the tokenizer's `Encoding`. added: the texts of the tokens that are found before all others."""

    def __init__(self, encode: Callable, added: list[str]):
        added = sorted(added, key=len, reverse=True)  # of several that begin at a character the longest is found
        self._added = re.compile(f"({'|'.join(map(re.escape, added)) or '(?!)'})")
        self._alone = _Memory(encode, "")  # the first of a text; and added tokens
        self._after = _Memory(encode, added[0] if added else "")  # the first after an added token
        self._inner = _Memory(encode, "a")

    def __call__(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]] | None:
        """The ids of `text` and how many of them lie before each cut, or None: a token straddles one."""
        if SPACE in text:  # which the tokenizer takes for a space
            return None
        pieces, ids = [], []
        for i, part in enumerate(self._added.split(text)):
            if i % 2:
                pieces.append(part)
                ids.append(self._alone[part])
            elif part:
                first, *rest = words = _words(part)
                pieces += words
                ids.append((self._after if i else self._alone)[first])
                ids.extend(map(self._inner.__getitem__, rest))
        ends, before = [0, *accumulate(map(len, pieces))], [0, *accumulate(map(len, ids))]
        counts, last, starts, stops = [], -1, [], []
        for cut in cuts:
            i = bisect_left(ends, cut)
            if ends[i] == cut:
                counts.append(before[i])
                continue
            if i != last:  # cuts ascend: those inside one piece come together
                last, spans = i, self._spans(pieces[i - 1], pieces[i - 2] if i > 1 else None)
                starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
            inside = cut - ends[i - 1]
            count = bisect_left(starts, inside)
            if count and stops[count - 1] > inside:
                return None
            counts.append(before[i - 1] + count)
        return list(chain.from_iterable(ids)), counts

    def _spans(self, piece: str, previous: str | None) -> list[tuple[int, int]]:
        """The character offsets of a piece's tokens in it."""
        is_added = self._added.fullmatch
        alone = previous is None or is_added(piece)
        return (self._alone if alone else self._after if is_added(previous) else self._inner).spans(piece)


class _Memory(dict):
    """The ids of words where they come after `before`."""

    def __init__(self, encode: Callable, before: str):
        self._encode, self._before = encode, before
        self._skipped = len(encode(before)) if before else 0

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._encode(self._before + word).ids[self._skipped :])
        if len(word) <= LONGEST:
            if len(self) >= LARGEST:
                self.clear()
            self[word] = ids
        return ids

    def spans(self, word: str) -> list[tuple[int, int]]:
        before = len(self._before)
        return [(a - before, b - before) for a, b in self._encode(self._before + word).offsets[self._skipped :]]
