"""Prefill, decode, sample, stop, stream: one decode loop for every device.

Its shapes are static, positions are device tensors that advance on the device, and nothing waits for the host but
what streaming needs.
"""

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minichat import device, fused, speculation
from minichat.cache import KVCache
from minichat.errors import BadInput
from minichat.readings import Readings
from minichat.tokenizer import TextStream, Tokenizer


@dataclass
class Sampling:
    """How a token is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    Applied in transformers' order: repetition penalty, temperature, top-k, top-p (arXiv 1904.09751),
    min-p (arXiv 2407.01082). Raises BadInput for a number out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "an integer, 0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
            "seed": (
                self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 1 << 63),
                "0 or more, below 2^63",
            ),
        }
        for name, (right, rule) in rules.items():
            if not right:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be {rule}")

    @property
    def draws(self) -> bool:
        """Or else takes the largest: of temperatures so low there is nothing but that, and to divide would overflow."""
        return self.temperature >= 1e-6


def sample(logits: Tensor, sampling: Sampling, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row: (B, V) logits -> (B,) int64.

    seen: (B, V) bool, the tokens of prompt and answer so far, where a repetition penalty is on. Drawn as
    argmax(logits + Gumbel noise), which is a draw from the softmax (arXiv 1411.0030) without a host round trip.
    """
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty  # CTRL, arXiv 1909.05858, section 4.1
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not sampling.draws:
        return logits.argmax(dim=-1)
    logits = restrict(logits / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    uniform = torch.rand(logits.shape, device=logits.device, generator=generator).clamp_min(1e-20)
    return (logits - torch.log(-torch.log(uniform))).argmax(dim=-1)


def restrict(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(B, V) logits with -inf for the tokens that top-k, then top-p, then min-p exclude."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, indices = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        out = before >= top_p  # what is before the most likely token is 0: one is always left
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, indices, out), -math.inf)
    if min_p > 0:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -math.inf)
    return logits


def prefill(model: nn.Module, forward: fused.Forward, ids: Tensor, positions: Tensor, padded: bool = True) -> Tensor:
    """Read (B, T) prompts, padded on the left, into the cache of `forward`; the last column's (B, V) logits.

    ids and positions are on the host, and go to the device chunk by chunk: cut there, each would be another graph.
    padded: False if no row is, so that attention may know what each sees without a mask.
    """
    few = max(1, fused.MOST_TOKENS // len(ids))
    size = few if isinstance(forward, fused.CpuStep) else device.prompt_chunk(model.device)
    implicit = not (padded or isinstance(forward, fused.CpuStep))
    for part, at in zip(ids.split(size, dim=1), positions.split(size, dim=1)):
        at = None if implicit else at.contiguous().to(model.device)
        hidden = forward(part.contiguous().to(model.device), at)
        last = hidden[:, -1].clone(memory_format=torch.contiguous_format)  # no view: what follows is one graph for all
        device.mark_step(model.device)
    return model.lm_head(last)


class _Loop:
    """What decodes one token a row after the other. All that changes from token to token is on the device, and in
    place, so that a step is one and the same graph."""

    def __init__(
        self, model: nn.Module, rows: int, slots: int, dtype: torch.dtype, sampling: Sampling, stop_ids: Sequence[int]
    ):
        where, vocab = model.device, model.config.vocab_size
        self.model, self.sampling, self.stop_ids = model, replace(sampling, seed=None), tuple(stop_ids)
        self.cache = KVCache(model.config, rows, slots, where, dtype)
        self.forward = fused.decoder(model, self.cache)
        self.token = torch.zeros(rows, dtype=torch.int64, device=where)
        self.position = torch.zeros(rows, 1, dtype=torch.int64, device=where)
        self.done = torch.zeros(rows, dtype=torch.bool, device=where)
        self.stops = torch.tensor(self.stop_ids, dtype=torch.int64).to(where)
        penalised = sampling.repetition_penalty != 1
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=where) if penalised else None
        self.generator = device.generator(where, sampling.seed)
        self.readings = Readings(device.tokens_between_syncs(where), rows, where, torch.int64)
        me = weakref.ref(self)  # a cycle would keep the cache until Python looks for cycles
        draws = [self.generator] if sampling.draws else []  # each costs a replay two small kernels
        self.step = device.graph(lambda: me()._advance(), where, draws)
        self.fresh = True

    def serves(
        self, model: nn.Module, rows: int, slots: int, dtype: torch.dtype, sampling: Sampling, stop_ids: Sequence[int]
    ) -> bool:
        """Whether it is what these would make, with at least so many slots."""
        mine = self.model, len(self.token), self.cache.k[0].dtype, self.sampling, self.stop_ids
        same = mine == (model, rows, dtype, replace(sampling, seed=None), tuple(stop_ids))
        return same and self.cache.slots >= min(slots, model.config.sliding_window or slots)

    def begin(self, prompts: Sequence[Sequence[int]], last: Tensor, seed: int | None) -> None:
        """last: (B, 1) positions of the prompts' last tokens, on the host."""
        if not self.fresh:
            self.cache.clear()
            self.readings.clear()
            self.token.zero_()
            device.set_seed(self.generator, seed)
        self.fresh = False
        self.position.copy_(last + 1)
        self.done.copy_(last[:, 0] < 0)  # rows that are padding
        if self.seen is not None:
            seen = torch.zeros(self.seen.shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, list(prompt)] = True
            self.seen.copy_(seen)

    def choose(self, logits: Tensor) -> None:
        """The next token of each row from (B, V) logits; a row that is done repeats its last."""
        token = sample(logits, self.sampling, self.seen, self.generator)
        self.token.copy_(torch.where(self.done, self.token, token))
        if self.seen is not None:
            self.seen.scatter_(1, self.token[:, None], True)
        if len(self.stops):
            self.done.logical_or_((self.token[:, None] == self.stops).any(dim=1))
        self.readings.put(self.token)

    def _advance(self) -> None:
        logits = self.model.lm_head(self.forward(self.token[:, None], self.position))[:, -1]
        self.position.add_(1)
        self.choose(logits)


@dataclass
class Kept:
    """What decode() records on CUDA, a cache and the graph of a step, kept from one call to the next (not of drafts).

    The model has to stay as it is in between: a graph goes on with the weights of which it was recorded.
    """

    loop: _Loop | None = None


@torch.inference_mode()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    speculate: bool = False,
    kv: torch.dtype | None = None,
    kept: Kept | None = None,
) -> Iterator[list[int]]:
    """Each step's tokens, one a row, until all rows have stopped or max_new_tokens are there.

    A row that has drawn one of stop_ids repeats it from then on. The host reads tokens_between_syncs() steps at a time,
    and so they come. speculate: see speculation.py; of one prompt, greedy. kv: the cache's dtype, int8 too; None is
    bf16 beside INT4 weights on the CPU, and else the model's. kept: what an earlier call has left, and this one leaves.
    """
    check(model, prompts, max_new_tokens)
    if kv not in (None, torch.float32, torch.bfloat16, torch.int8):
        raise BadInput(f"kv is {kv}; choose torch.float32, torch.bfloat16 or torch.int8, or None")
    if speculate and (len(prompts) > 1 or sampling.temperature or sampling.repetition_penalty != 1):
        raise BadInput("speculation takes one prompt and the likeliest tokens: --batch-size 1, --temperature 0")
    where = model.device
    if speculate and device.padding(where):
        raise BadInput(f"speculation checks as many tokens as it guesses, and {where.type} compiles every number anew; "
                       "leave --speculate out")  # fmt: skip
    ids, positions = _padded(prompts, where)
    padded = device.padding(where) is not None or any(len(prompt) < ids.shape[1] for prompt in prompts)
    B, columns = len(ids), max(map(len, prompts)) + max_new_tokens  # padding needs no slot: the ring drops it first
    dtype = kv or (torch.bfloat16 if fused.fits(model) else model.dtype)
    slots = device.cache_slots(columns, B, where)
    if speculate:
        cache = KVCache(model.config, B, slots, where, dtype, spare=speculation.SIZES[-1])
        forward = fused.decoder(model, cache)
        drafter = speculation.Drafter(list(prompts[0]))
        logits = prefill(model, forward, ids, positions, padded)
        yield from _with_drafts(model, forward, cache, logits, drafter, max_new_tokens, set(stop_ids))
        return

    if kept is None or not device.keeps_graphs(where):
        kept = Kept()
    loop, kept.loop = kept.loop, None  # no other call may have it meanwhile
    if loop is None or not loop.serves(model, B, columns, dtype, sampling, stop_ids):
        loop = None  # before the next one takes as much memory
        loop = _Loop(model, B, slots, dtype, sampling, stop_ids)
    try:
        yield from _tokens(loop, prompts, ids, positions, padded, max_new_tokens, sampling.seed)
    except Exception:
        loop = None  # something of it may be half done
        raise
    finally:
        kept.loop = loop


def _tokens(
    loop: _Loop,
    prompts: Sequence[Sequence[int]],
    ids: Tensor,
    positions: Tensor,
    padded: bool,
    max_new_tokens: int,
    seed: int | None,
) -> Iterator[list[int]]:
    """decode()'s, of its loop; ids, positions and padded are prefill's."""
    model, where = loop.model, loop.model.device
    loop.begin(prompts, positions[:, -1:], seed)
    device.mark_step(where)  # what is above is a graph of its own, not a part of the first
    loop.choose(prefill(model, loop.forward, ids, positions, padded))
    every = device.tokens_between_syncs(where)
    stopped, unread, fetched = [False] * len(prompts), 0, deque()
    for made in range(1, max_new_tokens + 1):
        if made > 1:
            loop.step()
        device.mark_step(where)
        unread += 1
        if unread == every or made == max_new_tokens:
            fetched.append(loop.readings.fetch(unread))
            unread = 0
        while len(fetched) > (device.reads_behind(where) if 1 < made < max_new_tokens else 0):
            for tokens in fetched.popleft()():
                tokens = tokens[: len(prompts)]
                yield tokens
                stopped = [was or one in loop.stop_ids for was, one in zip(stopped, tokens)]
                if all(stopped):
                    return


def _padded(prompts: Sequence[Sequence[int]], where: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and positions of prompts, (B, T) on the host: padded on the left, to few shapes where those are dear."""
    longest = max(map(len, prompts))
    chunk = device.prompt_chunk(where)
    whole = longest // chunk * chunk  # chunks are alike but for one
    T = whole if whole == longest else whole + device.bucket(longest - whole, where)
    B = device.rows(len(prompts), where)
    ids, positions = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = torch.tensor(prompt)
        positions[row, T - len(prompt) :] = torch.arange(len(prompt))
    return ids, positions


def warm_up(
    model: nn.Module,
    rows: int,
    longest: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    kv: torch.dtype | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Run all shapes that answers to `rows` prompts of up to `longest` tokens take, where each has to be compiled, so
    that nobody waits for it later; the other arguments are decode's. tell: gets a line for each.
    """
    where = model.device
    if device.padding(where) is None:
        return
    known, lengths, chunk = set(), [], device.prompt_chunk(where)
    for length in [*range(128, longest, 128), longest]:
        B, T = _padded([[0] * length] * rows, where)[0].shape
        slots = device.cache_slots(length + max_new_tokens, B, where)
        slots = min(slots, model.config.sliding_window or slots)
        shapes = {(min(chunk, T - start), slots) for start in range(0, T, chunk)}
        if shapes - known:
            lengths.append(length)
        known |= shapes
    for i, length in enumerate(lengths):
        tell(f"warming up, {i + 1} of {len(lengths)}: prompts of {length} tokens")
        steps = decode(model, [[0] * length] * rows, max_new_tokens, sampling, stop_ids, kv=kv)
        next(steps)
        steps.close()


def _with_drafts(
    model: nn.Module,
    forward: fused.Forward,
    cache: KVCache,
    logits: Tensor,
    drafter: speculation.Drafter,
    max_new_tokens: int,
    stops: set[int],
) -> Iterator[list[int]]:
    """The likeliest tokens one by one, several of them found in one forward pass where a draft was right."""
    position, left = len(drafter.ids), max_new_tokens
    found = [int(logits.argmax(dim=-1))]
    while True:
        for token in found:
            yield [token]
            drafter.append(token)
            left -= 1
            if left == 0 or token in stops:
                return
        draft, start = drafter.propose()[: left - 1], time.perf_counter()
        ids = torch.tensor([[found[-1], *draft]])
        positions = torch.arange(position, position + ids.shape[1])[None]
        best = model.lm_head(forward(ids.to(cache.device), positions.to(cache.device)))[0].argmax(dim=-1).tolist()
        device.mark_step(cache.device)
        right = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
        cache.rewind(len(draft) - right)
        drafter.learn(len(draft), right, time.perf_counter() - start)
        found = best[: right + 1]
        position += right + 1


def check(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise BadInput for prompts that cannot be continued."""
    if max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens is {max_new_tokens}; it must be 1 or more")
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    for prompt in prompts:
        if not len(prompt):
            raise BadInput("the prompt is empty; give at least one token")
        if len(prompt) + max_new_tokens > context:
            raise BadInput(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones pass the model's context of "
                f"{context}; shorten the prompt or lower --max-new-tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise BadInput(f"a prompt has ids from {min(prompt)} to {max(prompt)}; the vocabulary ends at {vocab - 1}")
    if not prompts:
        raise BadInput("no prompt was given")


def default_stops(model: nn.Module) -> tuple[int, ...]:
    """The ids that end an answer by config.json."""
    eos = model.config.eos_token_id
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def cut(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    """A row up to its first stop id, that included."""
    end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    seed: int | None = None,
    speculate: bool = False,
    kv: torch.dtype | None = None,
) -> list[list[int]]:
    """Continue each prompt (a list of ids, of any lengths); the new ids of each, up to a stop id and with it.

    temperature 0 is greedy. stop_ids: None is config.json's eos, () is none. speculate: guess what was there before
    and check several tokens at a time, for one prompt and greedy. kv: dtype of the cache, torch.int8 halves it. Raises
    BadInput for an empty prompt, one that passes the context, or a sampling number out of range.
    """
    stops = default_stops(model) if stop_ids is None else tuple(stop_ids)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    columns = decode(model, prompts, max_new_tokens, sampling, stops, speculate, kv)
    return [cut(list(row), stops) for row in zip(*columns)]


@dataclass
class Answer:
    """A generated text. finish: "stop" (a stop id or string) or "length". seconds to the first token, and in all.

    read_first: how many tokens the host read at once with the first one, and at the same time.
    """

    text: str
    ids: list[int]
    finish: str
    prompt_tokens: int
    first_token_seconds: float
    seconds: float
    read_first: int = 1

    @property
    def tokens_per_s(self) -> float | None:
        """The rate of decoding: the tokens after the first reading over the time after it. None if it was the last."""
        later = len(self.ids) - self.read_first
        return later / max(1e-9, self.seconds - self.first_token_seconds) if later > 0 else None


def all_stops(tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Sequence[int] | None = None) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's, or others in their place, and those of special tokens in `stop`."""
    # a special token has no text in the answer: as a stop string it is its id
    special = [id for text in stop if (id := tokenizer.special_id(text)) is not None]
    return (*(tokenizer.stop_ids if stop_ids is None else stop_ids), *special)


def answer(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    speculate: bool = False,
    kv: torch.dtype | None = None,
    kept: Kept | None = None,
) -> list[Answer]:
    """Texts for prompts, streamed: on_text(row, piece) gets whole characters, never a part of a stop string."""
    stops = all_stops(tokenizer, stop, stop_ids)
    rows = range(len(prompts))
    streams = [TextStream(tokenizer, list(stop)) for _ in rows]
    ids: list[list[int]] = [[] for _ in rows]
    finish = ["length"] * len(prompts)
    ended: list[float | None] = [None] * len(prompts)
    start = time.perf_counter()
    first = None

    def emit(row: int, piece: str) -> None:
        if piece and on_text:
            on_text(row, piece)

    steps = decode(model, prompts, max_new_tokens, sampling, stops, speculate, kv, kept)
    for tokens in steps:
        now = time.perf_counter() - start
        first = now if first is None else first
        for row in rows:
            if ended[row] is not None:
                continue
            ids[row].append(tokens[row])
            if tokens[row] in stops:
                finish[row], ended[row] = "stop", now
                continue
            emit(row, streams[row].put(tokens[row]))
            if streams[row].stopped:
                finish[row], ended[row] = "stop", now
        if all(end is not None for end in ended):
            break
    steps.close()
    total = time.perf_counter() - start
    for row in rows:
        if not streams[row].stopped:
            emit(row, streams[row].flush())
    ends, every = [total if end is None else end for end in ended], device.tokens_between_syncs(model.device)
    return [Answer(streams[r].text, ids[r], finish[r], len(prompts[r]), first, ends[r], every) for r in rows]


def answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
) -> Iterator[dict[int, Answer]]:
    """answer() for many prompts: batch after batch, by number. Longest first: what that leaves serves the others."""
    order, kept = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), Kept()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[i] for i in rows]
        yield dict(zip(rows, answer(model, tokenizer, batch, max_new_tokens, sampling, stop, stop_ids, kept=kept)))
