"""The processes that train one run together, as ``torchrun`` starts them; most runs have one."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.repr.ranks import copy_from_first, first_decides, share

T = TypeVar("T")
_CPU = torch.device("cpu")


class Ranks:
    """This process's place among those of a run, and what they tell each other.

    Attributes:
        rank: of this process, from 0.
        count: of all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    def first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, or raises, in the first process; JSON-able, the others get it too."""
        return first_decides(work, self._group, _CPU)

    def in_turn(self, work: Callable[[], T]) -> T:
        """``work`` in the first process, then in the others: a download is made once."""
        done: list[T] = []
        self.first(lambda: done.append(work()))
        return done[0] if done else work()

    def share(self, data: bytes | None) -> bytes | None:
        """``data`` of the first process, which may be None, in all of them."""
        if self._group is None:
            return data
        there = self.first(lambda: data is not None)
        return share(data, self._group, _CPU) if there else None

    def gather(self, data: bytes) -> list[bytes]:
        """``data`` of every process, in their order, in all of them."""
        if self._group is None:
            return [data]
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor(len(data)), self._group)
        longest = max(map(int, sizes))
        sent = torch.zeros(longest, dtype=torch.uint8)
        sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(parts, sent, self._group)
        return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, in its place."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def wrapped(self, model: nn.Module) -> nn.Module:
        """``model`` in DDP when there are several processes; itself when there is one."""
        if self._group is None:
            return model
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def copy_from_first(self, model: nn.Module) -> None:
        """Give ``model`` the first process's parameters and buffers.

        Running statistics are of what each process saw, until the first one's are taken.
        """
        if self._group is not None:
            copy_from_first([*model.parameters(), *model.buffers()], self._group)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes of this run, by the variables that ``torchrun`` sets; one process without them.

    They find each other on entry, over gloo, and nccl between GPUs. What refers to the group, such as a
    DDP wrapper, must be gone on exit.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    # Imported once a group is there, its default arguments would hold the group for good: its threads
    # would run on while the interpreter ends, which now and then aborts the process. DDP imports it.
    import torch.distributed.nn

    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.group.WORLD)
        dist.barrier()
    finally:
        dist.destroy_process_group()
        gc.collect()


def device_here(name: str) -> str:
    """``name`` of a device for this process: of several processes each takes the GPU of its number."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{_local_rank()}"
    return name


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))
