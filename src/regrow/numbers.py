"""What a GPU has computed, fetched together: the host waits for it at each number that it asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The values of tensors of one number each, in order; one wait for each device and type."""
    found = [0.0] * len(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in kinds.values():
        values = torch.stack([tensors[place].detach() for place in places]).tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` itself if it is float64, else as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def answers_at_once(device: torch.device) -> bool:
    """Whether a number on ``device`` is there as soon as the operation that computes it returns."""
    return device.type == "cpu"


def largest_of(tensor: Tensor) -> Tensor:
    """The largest absolute value, a tensor of one number: 0 for an empty tensor, NaN if there is a NaN."""
    return tensor.abs().max() if tensor.numel() else torch.zeros((), device=tensor.device)


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dimension on the CPU; one wait for each device."""
    found = list(tensors)
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        parts = torch.cat([tensors[place] for place in places]).cpu()
        for place, part in zip(places, parts.split([len(tensors[place]) for place in places]), strict=True):
            found[place] = part
    return found
