"""Numbers that the device leaves for the host, who reads many of them at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from minichat import device


class Readings:
    """Rows of numbers that the device writes one after another. To read them is one wait for the device.

    Shapes stay, and the row that is written is a device tensor: every row is the same graph, which the host may replay
    without this code. So whoever reads has to know how many rows there are. rows: how many may be unread at a time.
    """

    def __init__(self, rows: int, width: int, where: torch.device, dtype: torch.dtype = torch.float32):
        self.rows = torch.zeros(rows, width, device=where, dtype=dtype)
        self.next = torch.zeros(1, device=where, dtype=torch.int64)  # the row that is written next
        self.first = 0  # of those that the host has not read

    def clear(self) -> None:
        """Forget what was not read."""
        self.next.zero_()
        self.first = 0

    def put(self, row: Tensor) -> None:
        """Write a (width,) row."""
        self.rows.index_copy_(0, self.next, row[None].to(self.rows.dtype))
        self.next.add_(1).remainder_(len(self.rows))

    def fetch(self, count: int) -> Callable[[], list[list]]:
        """Have the `count` rows since the last time brought to the host; what it gives waits for them.

        Raises IndexError if the first of them are overwritten.
        """
        if count > len(self.rows):
            raise IndexError(f"{count} rows are unread: {len(self.rows)} are all there are")
        if not count:
            return list
        numbers = [(self.first + i) % len(self.rows) for i in range(count)]
        self.first = (self.first + count) % len(self.rows)
        on_its_way = device.fetch(self.rows)

        def wait() -> list[list]:
            rows = on_its_way().tolist()
            return [rows[number] for number in numbers]

        return wait

    def read(self, count: int) -> list[list]:
        """The `count` rows since the last time, as fetch() has them."""
        return self.fetch(count)()
