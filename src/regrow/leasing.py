"""Memory that is used again: large tensors made and dropped in every step, and what nobody else reads."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

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


def unshared(tensor: Tensor, like: Tensor) -> bool:
    """Whether ``tensor`` may be overwritten, because nothing else refers to it or to its memory.

    To be called in the backward pass only. True as well means that the memory is PyTorch's own, and that
    no graph of the backward pass is made, which would need the values later.

    Args:
        tensor: on the CPU; on other devices it counts as shared.
        like: a tensor that nobody else has, which the caller got and holds in just the same way.
    """
    plain = type(tensor) is Tensor and tensor.is_cpu and not torch.is_grad_enabled()
    # A mode sees every tensor, and so may keep both of these.
    if not plain or _get_current_dispatch_mode() is not None:
        return False
    # The method is PyTorch's own affair: where it is missing, every tensor counts as shared.
    return hasattr(tensor, "_use_count") and _references(tensor) == _references(like)


def _references(tensor: Any) -> tuple[int, int, int, int, bool]:
    """How many refer to it and to its storage, in Python and within; whether PyTorch owns the memory."""
    storage = tensor.untyped_storage()
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
        storage.resizable(),
    )
