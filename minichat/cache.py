"""The rolling KV cache: W slots a layer, each with the position that it holds."""

import torch
from torch import Tensor

from minichat.device import reach, zeros


class KVCache:
    """Keys and values of the last `slots` columns of a batch, for every layer.

    A column is one tick for all rows: rows of different lengths are padded on the left, and padding has position
    -1. Column c goes to slot c % slots. Attention reads `positions`, never the layout: it is right at any rotation.
    All writes are index_copy_ with device tensors, so that one graph serves every token; slots that nothing has been
    written to yet are read where the device wants shapes that stay.

    k, v: per layer (B, KvH, slots, Hd) of `dtype`; scales: of int8, (B, KvH, slots) of keys and of values per layer.
    positions: (B, slots) int64, -1 = empty. spare: slots beyond those, as many as rewind() may take back.
    """

    def __init__(self, config, batch: int, slots: int, device: torch.device, dtype: torch.dtype, spare: int = 0):
        if config.sliding_window is not None:
            slots = min(slots, config.sliding_window)
        slots += spare
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        layers = config.num_hidden_layers
        self.slots, self.device = slots, device
        self.filled = 0  # columns written so far, as the host knows without asking; not those of a graph's replays
        rings = zeros(2 * layers, shape, device, dtype)
        self.k, self.v = rings[:layers], rings[layers:]
        scales = zeros(2 * layers, shape[:3], device, torch.float32) if dtype == torch.int8 else []
        self.scales = [*zip(scales[:layers], scales[layers:])]
        self.positions = torch.full((batch, slots), -1, device=device)
        self.columns = torch.zeros((), device=device, dtype=torch.int64)  # the same, on the device

    def advance(self, positions: Tensor) -> Tensor:
        """Make room for T columns with these (B, T) positions; the (B, S) positions of the keys they will see.

        One column replaces the slot that falls out of the window, so the ring alone is seen (S <= slots). Several
        would overwrite keys that the first of them still see, so they are seen beside the old ring
        (S <= slots + T) and written afterwards.
        """
        T = positions.shape[1]
        self._old = reach(self.filled, T, self.slots, self.device)
        self._new = reach(self.filled + T, T, self.slots, self.device)
        seen = None if T == 1 else torch.cat([self.positions[:, : self._old], positions], dim=1)
        # only the last `slots` columns survive; T and slots are shapes, so this is no new graph
        self._kept = min(T, self.slots)
        columns = self.columns + torch.arange(T - self._kept, T, device=positions.device)
        self._write = columns % self.slots
        self.positions.index_copy_(1, self._write, positions[:, T - self._kept :])
        self.columns.add_(T)
        self.filled += T
        return self.positions[:, : self._new] if seen is None else seen

    def clear(self) -> None:
        """Forget everything. Zeros, and not only positions: what is not seen is still multiplied, by 0."""
        for tensor in (*self.k, *self.v, *(scale for pair in self.scales for scale in pair), self.columns):
            tensor.zero_()
        self.positions.fill_(-1)
        self.filled = 0

    def rewind(self, count: int) -> None:
        """Forget the last `count` columns, at most `spare`: what they replaced was out of every window."""
        if count:
            last = (self.columns - 1 - torch.arange(count, device=self.device)) % self.slots
            self.positions.index_fill_(1, last, -1)
            self.columns.sub_(count)
            self.filled -= count

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, KvH, T, Hd) keys and values of the columns just advanced; those that the queries see, S long."""
        if self.scales:
            rings = zip((self.k[layer], self.v[layer]), (k, v), self.scales[layer])
            return tuple(self._in_bytes(*ring) for ring in rings)
        rings = ((self.k[layer], k.to(self.k[layer].dtype)), (self.v[layer], v.to(self.v[layer].dtype)))
        return tuple(self._written(ring, new).to(k.dtype) for ring, new in rings)

    def _written(self, ring: Tensor, new: Tensor) -> Tensor:
        """Put (B, KvH, T, …) into a ring; what the queries see of it, (B, KvH, S, …)."""
        T = new.shape[2]
        seen = torch.cat([ring[:, :, : self._old], new], dim=2) if T > 1 else None
        ring.index_copy_(2, self._write, new[:, :, T - self._kept :])
        return ring[:, :, : self._new] if seen is None else seen

    def _in_bytes(self, ring: Tensor, new: Tensor, scales: Tensor) -> Tensor:
        """The same for a ring of int8: each token's head has a scale, its largest magnitude / 127."""
        scale = new.abs().amax(dim=-1).float() / 127
        rounded = (new / scale.clamp_min(2.0**-100)[..., None]).round().to(torch.int8)
        return (self._written(ring, rounded) * self._written(scales, scale)[..., None]).to(new.dtype)
