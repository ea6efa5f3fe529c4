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

from regrow.modules import device_of
from regrow.repr.ranks import copy_from_first, first_decides, share

T = TypeVar("T")
_CPU = torch.device("cpu")


class Ranks:
    """This process's place among the processes of a run, and the messages between them.

    Attributes:
        rank: of this process, from 0.
        count: of all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    def first(self, work: Callable[[], Any]) -> Any:
        """Do ``work`` in the first process; all processes get its result (JSON-able), or its error."""
        return first_decides(work, self._group, _CPU)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do ``work`` in the first process, then in the others, so that a download is made once."""
        done: list[T] = []
        self.first(lambda: done.append(work()))
        return done[0] if done else work()

    def share(self, data: bytes | None) -> bytes | None:
        """Give all processes the ``data`` of the first, which may be None."""
        if self._group is None:
            return data
        there = self.first(lambda: data is not None)
        return share(data, self._group, _CPU) if there else None

    def gather(self, data: bytes) -> list[bytes]:
        """Give all processes the ``data`` of every process, in the order of their ranks."""
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
        """Replace ``tensor`` by its sum over all processes, and return it."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def wrapped(self, model: nn.Module) -> nn.Module:
        """``model`` in DDP when there are several processes; itself when there is one."""
        if self._group is None:
            return model
        device = device_of(model)
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def copy_from_first(self, model: nn.Module) -> None:
        """Give ``model`` the first process's parameters and buffers.

        Each process has running statistics of its own pictures until it gets those of the first.
        """
        if self._group is not None:
            copy_from_first([*model.parameters(), *model.buffers()], self._group)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes of this run, which ``torchrun`` names in variables; one process without them.

    The processes connect on entry, over gloo, and over nccl between GPUs. Objects that refer to the group,
    such as a DDP wrapper, must be gone on exit.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    # DDP imports this module. If that happened once a group is there, the module's default arguments would
    # hold the group for good, and the group's threads would run on while the interpreter ends, which now
    # and then aborts the process.
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
    """The device ``name`` for this process: each of several processes takes the GPU of its number."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{_local_rank()}"
    return name


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))
