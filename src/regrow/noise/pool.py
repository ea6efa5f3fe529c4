"""Memory that is used again: for large tensors that are made and dropped in every training step."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

# Smaller tensors come from memory that the C library keeps at hand anyway.
_LEAST = 2**20


class Pool:
    """Tensors on the CPU, out of memory that goes back to the pool when nothing uses it any more.

    The C library gives large blocks back to the system as soon as they are free, and the system clears
    every page before it hands them out again: a third of the time that Bridgeout takes.
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
        # The tensor and all that share its storage keep the array alive, and nothing else does.
        weakref.finalize(lease, free.append, memory).atexit = False
        storage = torch.from_numpy(lease).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, dense.shape, dense.stride())

    def clear(self) -> None:
        """Give back what is not in use; what is goes back to the system once it is free."""
        self._free = {}
