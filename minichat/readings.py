"""Numbers that the device leaves for the host, who reads many of them at once."""

import torch
from torch import Tensor


class Readings:
    """Rows of numbers that the device writes one after another. To read them is one wait for the device.

    Shapes stay, and the row that is written is a device tensor: on an HPU every row is the same graph.
    rows: how many may be unread at a time.
    """

    def __init__(self, rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self.rows = torch.zeros(rows, width, device=device, dtype=dtype)
        self.next = torch.zeros(1, device=device, dtype=torch.int64)  # the row that is written next
        self.unread, self.first = 0, 0  # how many the host has not read, and which of the rows is the first of them

    def put(self, row: Tensor) -> None:
        """Write a (width,) row. Raises IndexError if the oldest would be lost unread."""
        if self.unread == len(self.rows):
            raise IndexError(f"{self.unread} rows are unread: that is all there are")
        self.rows.index_copy_(0, self.next, row[None].to(self.rows.dtype))
        self.next.add_(1).remainder_(len(self.rows))
        self.unread += 1

    def read(self) -> list[list]:
        """The rows since the last time."""
        if not self.unread:
            return []
        rows = self.rows.tolist()
        found = [rows[(self.first + i) % len(rows)] for i in range(self.unread)]
        self.first, self.unread = (self.first + self.unread) % len(rows), 0
        return found
