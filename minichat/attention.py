"""Sliding-window, grouped-query attention. What a query sees follows from positions alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minichat.device import one_kernel, sdpa

FORKS = 4  # document numbers in a packed row: FORKS * n is a document or its trunk, which FORKS * n + 1, … continue
FLEX_BLOCK = 128  # queries and keys of a block that is skipped where no query sees any of its keys
BLOCK_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
               "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")  # fmt: skip
QUERY_BLOCK = 512  # queries at a time where there are more: bounds the mask and the scores


def visible(
    q_pos: Tensor,
    k_pos: Tensor,
    window: int | None,
    q_doc: Tensor | None = None,
    k_doc: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: (B, T), (B, S) integer positions -> (B, 1, T, S) bool.

    A query sees the `window` keys that end with itself (Mistral 7B, arXiv 2310.06825); None is full causal attention.
    Position -1 marks an empty slot or padding: no query sees it. A padding query sees all keys, because a row of
    softmax with nothing in it is NaN, and a NaN value times an attention weight of 0 would reach real tokens.
    q_doc, k_doc: (B, T) and (B, S), the number of the packed row's document that each belongs to; a query sees its
    own, and the trunk that its own continues (see FORKS).
    """
    q, k = q_pos[:, None, :, None], k_pos[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= k > q - window
    if q_doc is not None:
        own, other = q_doc[:, None, :, None], k_doc[:, None, None, :]
        seen &= (other == own) | (other == own - own % FORKS)
    return seen | (q < 0)


@dataclass
class View:
    """What the queries of one forward pass see; made once and used by every layer. None in its place is causal.

    q_pos: (B or 1, T), k_pos: (B or 1, S), int64. ordered: the keys' columns are in order and end with the queries'
    own, so that a block of queries needs only a slice of them; a ring buffer's are not. consecutive: the keys'
    positions are 0, 1, 2, …, so that blocks of as many queries and keys see alike. doc: (B, T), of packed rows the
    document that each token belongs to.
    """

    q_pos: Tensor
    k_pos: Tensor
    window: int | None
    ordered: bool
    consecutive: bool = False
    doc: Tensor | None = None

    def __post_init__(self):
        one_block = self.q_pos.shape[1] <= QUERY_BLOCK and not self.consecutive
        self.mask = self._visible(slice(None), slice(None)) if one_block else None
        self._biases: dict[tuple[int, int], Tensor] = {}

    def block(self, start: int, end: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The mask of queries start..end over keys first..last, for SDPA.

        Of consecutive positions it is kept, as what is added to the scores: backward holds on to every layer's mask
        in that form, and so the layers and most blocks hold one and the same.
        """
        queries, keys = slice(start, end), slice(first, last)
        if not self.consecutive:
            return self._visible(queries, keys)
        key = end - start, last - first
        if key not in self._biases:
            seen = self._visible(queries, keys)
            self._biases[key] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return self._biases[key]

    def _visible(self, queries: slice, keys: slice) -> Tensor:
        docs = () if self.doc is None else (self.doc[:, queries], self.doc[:, keys])
        return visible(self.q_pos[:, queries], self.k_pos[:, keys], self.window, *docs)


class Documents:
    """In a View's place: a row of documents one after another, whose tokens see those of their own.

    lengths: of each document, T together. (n,) is a sequence; (trunk, n, m) are two, that begin with the same tokens:
    trunk, then n that continue it, then m that continue it too and see nothing of the n. Each sequence goes through
    attention by itself: what a mask hides would cost as much as what it shows. On CUDA they go in one call of a kernel
    that skips blocks of such a mask.
    """

    def __init__(self, lengths: list[tuple[int, ...]], window: int | None, device: torch.device):
        self.lengths, self.window = lengths, window
        pieces = [(start, n) for trunk, *forks in lengths for start, n in ((0, trunk), *((trunk, n) for n in forks))]
        positions = torch.cat([torch.arange(start, start + n) for start, n in pieces])
        self._known = positions  # on the host, which waits for nothing to read it
        self.positions = positions[None].to(device, non_blocking=True)
        self.views: dict[tuple[int, int], View] = {}
        self.blocks: tuple[Tensor, ...] | None = None  # once flex() has made them, for all layers

    def view(self, queries: int, keys: int) -> View | None:
        """What the last `queries` tokens of a sequence of `keys` see; None is all before them, of all of them."""
        if queries == keys and (self.window is None or keys <= self.window):
            return None
        if (queries, keys) not in self.views:
            k_pos = torch.arange(keys, device=self.positions.device)[None]
            view = View(k_pos[:, keys - queries :], k_pos, self.window, ordered=True, consecutive=True)
            self.views[queries, keys] = view
        return self.views[queries, keys]

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the function of this name, with B = 1."""
        # float32's blocks do not fit a card's shared memory, and its products take no smaller head
        fits = q.dtype != torch.float32 and q.shape[3] >= 16
        kernel = (
            _one_kernel(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3]) if fits and self._several() else None
        )
        return self._each(q, k, v) if kernel is None else self.flex(q, k, v, kernel)

    def _several(self) -> bool:
        """Whether it is more than a plain causal sequence."""
        n = sum(self.lengths[0])
        return len(self.lengths) > 1 or len(self.lengths[0]) > 2 or self.view(n, n) is not None

    def spans(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which columns each query sees, (T,) int64 each: those from the first tensor's on up to its own, and of its
        trunk those from the second's on, before the third's."""
        counts, pieces, end = [], [], 0
        for trunk, *forks in self.lengths:
            start = end
            for fork, n in enumerate((trunk, *forks)):
                counts.append(n)
                pieces.append((end, start, start + trunk if fork else start))
                end += n
        own, head, until = torch.tensor(pieces).repeat_interleave(torch.tensor(counts), dim=0).unbind(1)
        if self.window is not None:
            own = own.maximum(torch.arange(end) - self.window + 1)
            head = head + (self._known - self.window + 1).clamp_min(0)
        return own, head, until

    def _blocks(self) -> tuple[Tensor, ...]:
        """The spans, and the tensors of flex_attention's BlockMask, as _flex takes them.

        Made block by block: no (T, T) mask exists. T is rounded up to whole blocks, whose queries see themselves.
        """
        from torch.nn.attention.flex_attention import BlockMask

        own, head, until = self.spans()
        T = max(2, -(-len(own) // FLEX_BLOCK)) * FLEX_BLOCK  # never one block: torch takes sizes of 1 for a constant
        filler = torch.arange(len(own), T)
        own, head, until = (torch.cat([x, y]) for x, y in ((own, filler), (head, filler), (until, filler)))
        # (T, 1) queries beside the first and last columns of each block
        here, first = torch.arange(T)[:, None], torch.arange(0, T, FLEX_BLOCK)
        last = first + FLEX_BLOCK - 1
        a, b, c = own[:, None], head[:, None], until[:, None]
        some = ((last >= a) & (first <= here)) | ((last >= b) & (first < c) & (b < c))
        full = ((first >= a) & (last <= here)) | ((first >= b) & (last < c))
        some, full = (x.unflatten(0, (-1, FLEX_BLOCK)) for x in (some, full))
        some, full = some.any(1), full.all(1)
        kinds = [some & ~full, full]
        where = self.positions.device
        found = [(kind.sum(1), kind.int().argsort(dim=1, descending=True, stable=True)) for kind in kinds]
        found = [x[None, None].to(where, torch.int32, non_blocking=True) for pair in found for x in pair]
        own, head, until = (x.to(where, non_blocking=True) for x in (own, head, until))
        mask = BlockMask.from_kv_blocks(*found, BLOCK_SIZE=FLEX_BLOCK)
        return own, head, until, *(getattr(mask, name) for name in BLOCK_LISTS)

    def flex(self, q: Tensor, k: Tensor, v: Tensor, one_kernel: Callable) -> Tensor:
        """In one call: blocks that no query sees cost nothing. one_kernel: _flex, or that compiled."""
        if self.blocks is None:
            self.blocks = self._blocks()
        T = q.shape[2]
        # where nothing is to pad, strides would stay, and other strides are another graph
        q, k, v = (F.pad(x, (0, 0, 0, len(self.blocks[0]) - T)).contiguous() for x in (q, k, v))
        return one_kernel(q, k, v, *self.blocks)[:, :, :T]

    def _each(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence after the other. A trunk and what comes next to it are one as they are."""
        counts = [n for trunk, *forks in self.lengths for n in (trunk + sum(forks[:1]), *forks[1:])]
        # one cut for all: the gradient of a slice is as long as the row; and as (B, T, H, Hd), see below
        cut = [x.transpose(1, 2).split(counts, dim=1) for x in (q, k, v)]
        pieces = iter([[x.transpose(1, 2) for x in piece] for piece in zip(*cut)])
        found = []
        for trunk, *forks in self.lengths:
            q, k, v = next(pieces)
            found.append(attention(q, k, v, self.view(q.shape[2], q.shape[2])))
            for n in forks[1:]:
                q, *own = next(pieces)
                keys, values = (torch.cat([x[:, :, :trunk], y], dim=2) for x, y in zip((k, v), own))
                found.append(attention(q, keys, values, self.view(n, trunk + n)))
        if len(found) == 1:
            return found[0]
        # put together as (B, T, H, Hd), which is how the next linear wants them: no other copy
        return torch.cat([x.transpose(1, 2) for x in found], dim=1).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, own: Tensor, head: Tensor, until: Tensor, *blocks: Tensor) -> Tensor:
    """Attention by Documents._blocks(). They are tensors, and the mask is made in here, so that nothing that another
    batch changes is a constant of what is compiled."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def seen(_b, _h, q, k):
        return ((k >= own[q]) & (k <= q)) | ((k >= head[q]) & (k < until[q]))

    T = q.shape[2]
    mask = BlockMask((T, T), *blocks, (FLEX_BLOCK, FLEX_BLOCK), seen)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _one_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> Callable | None:
    """What Documents.flex takes there for heads like these, and for no others: each have their graphs; or None."""

    def trial(kernel: Callable) -> None:
        # a forward and a backward pass, whatever is going on around it: inference, or gradient checkpointing, whose
        # hooks would compute a block again for what is saved here
        keep = lambda x: x  # noqa: E731
        with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
            q, k, v = (
                torch.zeros(1, n, 2, size, device=device, dtype=dtype, requires_grad=True)
                for n in (heads, kv_heads, kv_heads)
            )
            Documents([(1,), (1,)], None, device).flex(q, k, v, kernel).sum().backward()

    return one_kernel(_flex, device, trial)


def attention(q: Tensor, k: Tensor, v: Tensor, view: View | Documents | None) -> Tensor:
    """(B, H, T, Hd) queries, (B, KvH, S, Hd) keys and values -> (B, H, T, Hd).

    With many queries the mask exists for QUERY_BLOCK of them at a time: memory grows with T, never with T * S.
    """
    if isinstance(view, Documents):
        return view.attention(q, k, v)
    if view is None or view.mask is not None:
        return attend(q, k, v, None if view is None else view.mask)
    T, S, W = q.shape[2], k.shape[2], view.window
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        last = S - T + end
        first = max(0, S - T + start - W + 1) if view.ordered and W is not None else 0
        mask = view.block(start, end, first, last, q.dtype)
        blocks.append(attend(q[:, :, start:end], k[:, :, first:last], v[:, :, first:last], mask))
    return torch.cat(blocks, dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax(q k^T / sqrt(Hd)) v by SDPA; mask (B or 1, 1, T, S) as SDPA takes it, None causal with T == S.

    Query head h reads key head h // (H / KvH). A few queries fold their group into T, so that decoding reads the
    cache once and never repeats it.
    """
    B, H, T, Hd = q.shape
    KvH = k.shape[1]
    if KvH != H and mask is not None and T <= 16:
        G = H // KvH
        rows = mask.expand(-1, G, -1, -1).reshape(mask.shape[0], 1, G * T, -1)
        return sdpa(q.reshape(B, KvH, G * T, Hd), k, v, rows).view(B, H, T, Hd)
    return sdpa(q, k, v, mask)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and sines for (B, T) positions, each (B, 1, T, Hd) (RoFormer, arXiv 2104.09864, eq. 34).

    Angles are float32 and cast last: in bf16, positions beyond 256 would share angles.
    """
    # 1 / theta^x, rounded as transformers rounds it: an ulp more would be a thousand times that at position 10,000
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, T, Hd) by its positions' angles; half rotation, the layout of Hugging Face's weights."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
