"""Drafts by look-up in what is there already: prompt and answer (arXiv 2304.04487 calls it inference with reference).

A copy of an earlier passage, as in a summary or an edit, is guessed right for many tokens on end; the model checks a
draft in one forward pass, which costs about as much as one token where weights are read once for all of them.
"""

LONGEST, SHORTEST = 4, 2  # tokens that have to agree before those that follow them are a draft
FEWEST, MOST = 2, 15  # tokens of a draft


class Drafter:
    """Proposes what may follow a sequence of ids, and how much of it as its proposals turn out."""

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where each n-gram last ended, but the one at the very end
        self._size, self._wait, self._pause = FEWEST, 0, 1
        for id in ids:
            self.append(id)

    def append(self, id: int) -> None:
        for n in range(SHORTEST, LONGEST + 1):
            if len(self.ids) >= n:
                self._ends[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(id)

    def propose(self) -> list[int]:
        """What followed the longest end of the ids that came before; nothing for a while after it was wrong."""
        if self._wait:
            self._wait -= 1
            return []
        for n in range(min(LONGEST, len(self.ids)), SHORTEST - 1, -1):
            if (end := self._ends.get(tuple(self.ids[-n:]))) is not None:
                period = len(self.ids) - end  # what came after it up to now, and that again
                return [self.ids[end + i % period] for i in range(self._size)]
        return []

    def learn(self, proposed: int, right: int) -> None:
        """Of a draft's tokens so many were right: the next is longer; or none were, and there is a longer pause."""
        if right == proposed > 0:
            self._size = min(2 * self._size, MOST)
        elif proposed:
            self._size = max(FEWEST, right)
        if right:
            self._pause = 1
        elif proposed:
            self._wait, self._pause = self._pause, min(2 * self._pause, 32)
