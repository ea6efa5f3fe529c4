"""A memory pool for large tensors that every training step makes and drops."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

# The C library itself keeps the memory of smaller tensors for later use.
_LEAST = 2**20


class Pool:
    """Makes tensors on the CPU whose memory returns to the pool when nothing uses it any more.

    The C library returns large free blocks to the system, and the system clears every page before it hands
    the block out again, which took a third of Bridgeout's time.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def empty_like(self, tensor: Tensor) -> Tensor:
        """``torch.empty_like(tensor)``, from the pool if it is dense, large and on the CPU."""
        dense = torch.empty_like(tensor, device="meta")
        size = dense.numel() * dense.element_size()
        if not tensor.is_cpu or size < _LEAST:
            return torch.empty_like(tensor)
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        lease = memory.numpy()
        # Only the tensors that share the storage keep the array alive.
        weakref.finalize(lease, free.append, memory).atexit = False
        storage = torch.from_numpy(lease).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, dense.shape, dense.stride())

    def clear(self) -> None:
        """Give unused memory back to the system; memory in use goes back there once it is free."""
        self._free = {}
