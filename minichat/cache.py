"""The rolling KV cache: W slots a layer, each with the position that it holds."""

import torch
from torch import Tensor

from minichat.device import bucket


class KVCache:
    """Keys and values of the last `slots` columns of a batch, for every layer.

    A column is one tick for all rows: rows of different lengths are padded on the left, and padding has position
    -1. Column c goes to slot c % slots. Attention reads `positions`, never the layout: it is right at any rotation.
    All writes are index_copy_ with device tensors, so that one graph serves every token; slots that nothing has been
    written to yet are seen only as far as the device's buckets of lengths go.

    k, v: per layer (B, KvH, slots, Hd); positions: (B, slots) int64, -1 = empty. spare: slots beyond those, as many
    as rewind() may take back.
    """

    def __init__(self, config, batch: int, slots: int, device: torch.device, dtype: torch.dtype, spare: int = 0):
        if config.sliding_window is not None:
            slots = min(slots, config.sliding_window)
        slots += spare
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.slots, self.device = slots, device
        self.filled = 0  # columns written so far, as the host knows without asking the device
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.positions = torch.full((batch, slots), -1, device=device)
        self.columns = torch.zeros((), device=device, dtype=torch.int64)  # the same, on the device

    def advance(self, positions: Tensor) -> Tensor:
        """Make room for T columns with these (B, T) positions; the (B, S) positions of the keys they will see.

        One column replaces the slot that falls out of the window, so the ring alone is seen (S <= slots). Several
        would overwrite keys that the first of them still see, so they are seen beside the old ring
        (S <= slots + T) and written afterwards.
        """
        T = positions.shape[1]
        self._old = min(self.slots, bucket(self.filled, self.device))
        self._new = min(self.slots, bucket(self.filled + T, self.device))
        seen = None if T == 1 else torch.cat([self.positions[:, : self._old], positions], dim=1)
        # only the last `slots` columns survive; T and slots are shapes, so this is no new graph
        self._kept = min(T, self.slots)
        columns = self.columns + torch.arange(T - self._kept, T, device=positions.device)
        self._write = columns % self.slots
        self.positions.index_copy_(1, self._write, positions[:, T - self._kept :])
        self.columns.add_(T)
        self.filled += T
        return self.positions[:, : self._new] if seen is None else seen

    def rewind(self, count: int) -> None:
        """Forget the last `count` columns, at most `spare`: what they replaced was out of every window."""
        if count:
            last = (self.columns - 1 - torch.arange(count, device=self.device)) % self.slots
            self.positions.index_fill_(1, last, -1)
            self.columns.sub_(count)
            self.filled -= count

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, KvH, T, Hd) keys and values of the columns just advanced; those that the queries see, S long."""
        T = k.shape[2]
        seen = []
        for ring, new in ((self.k[layer], k), (self.v[layer], v)):
            dtype, new = new.dtype, new.to(ring.dtype)
            if T > 1:
                seen.append(torch.cat([ring[:, :, : self._old], new], dim=2).to(dtype))
            ring.index_copy_(2, self._write, new[:, :, T - self._kept :])
            if T == 1:
                seen.append(ring[:, :, : self._new].to(dtype))
        return tuple(seen)
