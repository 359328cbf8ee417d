"""Drafts by look-up in what is there already: prompt and answer (arXiv 2304.04487 calls it inference with reference).

A copy of an earlier passage, as in a summary or an edit, is guessed right for many tokens on end; the model checks a
draft in one forward pass, which costs about as much as one token where weights are read once for all of them.
"""

LONGEST, SHORTEST = 4, 2  # tokens that have to agree before those that follow them are a draft; one more without credit
SIZES = (1, 3, 7, 15)  # tokens of a draft: with the one before them they fill the kernels' tiles
LOSS = 0.035  # of the time without drafts, what wrong ones may cost
CREDIT, MOST_CREDIT = 1.0, 8.0  # in steps of one token: what may be lost at the start; what gains are kept for misses
GUESS = 0.25  # what a token of a draft costs, until it was measured
PLAIN = 16  # after so many steps with drafts comes one without: what that takes changes as the context grows


class Drafter:
    """Proposes what may follow a sequence of ids, as long as that pays.

    What a draft costs depends on the machine, so that it is measured: a draft takes its seconds beyond those of one
    token from a credit, and each token that was right puts those of one token there. One that the credit does not
    cover is not made. So drafts cost LOSS of the time at most, and CREDIT, whatever the text, as far as a machine's
    next step is like its last ones. Which drafts are made is therefore not the same in every run; what they say is.
    """

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where each n-gram last ended, but the one at the very end
        self._plain: float | None = None  # seconds of a step without a draft, of late
        self._costs: dict[int, float] = {}  # of a draft by its size, of late, in steps of one token
        self._tried: set[int] = set()  # sizes, 0 for none: the first step of one may have to be compiled
        self._drafts = 0  # since the last step without one
        self._credit, self._level = CREDIT, 0
        for id in ids:
            self.append(id)

    def append(self, id: int) -> None:
        for n in range(SHORTEST, LONGEST + 1):
            if len(self.ids) >= n:
                self._ends[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(id)

    def propose(self) -> list[int]:
        """What followed the longest end of the ids that came before; nothing where it is not worth its cost."""
        if self._plain is None or self._drafts >= PLAIN:
            return []
        each = max((cost / n for n, cost in self._costs.items()), default=GUESS)
        for size in SIZES[self._level :: -1]:
            if min(self._costs.get(size, each * size), MOST_CREDIT) <= self._credit:
                break
        else:
            return []
        for n in range(min(LONGEST, len(self.ids)), SHORTEST - 1 + (self._credit < CREDIT), -1):
            if (end := self._ends.get(tuple(self.ids[-n:]))) is not None:
                period = len(self.ids) - end  # what came after it up to now, and that again
                return [self.ids[end + i % period] for i in range(size)]
        return []

    def learn(self, proposed: int, right: int, seconds: float) -> None:
        """How many of a draft's tokens were right, 0 of 0 without one, and how long the step took that found out."""
        again, cost = proposed in self._tried, 0.0
        self._tried.add(proposed)
        self._drafts = self._drafts + 1 if proposed else 0
        if proposed:
            cost = min(max(0.0, seconds / self._plain - 1), proposed)  # no token costs more than a step of its own
            if again:
                self._costs[proposed] = (self._costs.get(proposed, cost) + cost) / 2
        elif again:
            self._plain = seconds if self._plain is None else 0.75 * self._plain + 0.25 * seconds
        self._credit = min(self._credit + LOSS + right - cost, MOST_CREDIT)
        if proposed:
            most = SIZES[min(self._level + 1, len(SIZES) - 1)] if right == proposed else max(right, SIZES[0])
            self._level = max(i for i, size in enumerate(SIZES) if size <= most)
