"""Several processes that train one model: each has a share of every step, and gradients and sums are added up.

    torchrun --nproc-per-node 8 train.py …

Whoever starts them says in the environment which is which (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT:
torchrun, accelerate, DeepSpeed; mpirun's own are taken on Gaudi). One process by itself needs none of it: then nothing
here does anything.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minichat import device

PIECE = 1 << 26  # numbers that are added up at a time: bounds the copy of them
_host = []  # the group of the processes' hosts, once there is one: what they tell each other waits for no device


def start(where: torch.device) -> None:
    """Meet the other processes, if the environment says that there are any."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        dist.init_process_group(device.distributed_backend(where))
        # they wait for what the first one does alone: 30 minutes, the default, are too few to tokenise or to save much
        _host.append(dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def stop() -> None:
    if _host:
        _host.clear()
        dist.destroy_process_group()


def rank() -> int:
    """Which of the processes this one is; the first, 0, writes files and logs."""
    return dist.get_rank() if _host else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _host else 1


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes the sum of it over all processes, which have the same shapes."""
    if not _host:
        return
    part, size = [], 0
    for i, tensor in enumerate(tensors):
        part.append(tensor)
        size += tensor.numel()
        if size >= PIECE or i + 1 == len(tensors):
            flat = torch.cat([each.flatten() for each in part])
            dist.all_reduce(flat)
            for each, total in zip(part, flat.split([each.numel() for each in part])):
                each.copy_(total.view_as(each))
            part, size = [], 0


def host_sum(*numbers: int) -> list[int]:
    """The sum of each number over the processes; of what the host knows, so that nothing waits for the device."""
    return _of_hosts(numbers, dist.ReduceOp.SUM)


def host_max(number: int) -> int:
    """The largest of the processes' numbers: what all of them agree on."""
    return _of_hosts([number], dist.ReduceOp.MAX)[0]


def _of_hosts(numbers: Sequence[int], how) -> list[int]:
    if not _host:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(found, how, group=_host[0])
    return found.tolist()


def all_gather(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every process's tensors of the host, of the same names and shapes, in the order of their ranks."""
    if not _host:
        return [tensors]
    found: list[dict[str, Tensor]] = [{} for _ in range(world())]
    for name, tensor in tensors.items():  # one by one: objects would be pickled
        each = [torch.empty_like(tensor) for _ in found]
        dist.all_gather(each, tensor.contiguous(), group=_host[0])
        for of, one in zip(found, each):
            of[name] = one
    return found


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process does what is inside before the others do it: what it leaves in files, they find."""
    if rank():
        dist.barrier(group=_host[0])
    yield
    if _host and rank() == 0:
        dist.barrier(group=_host[0])
