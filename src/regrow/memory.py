"""How much memory there is, how the entries of a tensor lie in it, and tensors as vectors in that order."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a new tensor like ``tensor``, which fills its memory."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill their memory without a gap, each with a place of its own."""
    if tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return True
    return dense_strides(tensor) == tensor.stride()


def lies_by(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the entries of ``tensor`` lie in memory as ``strides`` say."""
    if tensor.stride() == strides:
        return True
    # The stride of a dimension of one entry says nothing, and convolutions return any.
    return all(
        size == 1 or one == two for size, one, two in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def in_memory(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` as a vector, its entries in the order that ``strides``, of a dense tensor, give them."""
    if not lies_by(tensor, strides):
        ordered = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    if tensor.dim() == 1:
        return tensor
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def most_memory(device: torch.device) -> int:
    """How many bytes of memory a device has; for a GPU, how many are free. 4 GiB where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 1 << 32
