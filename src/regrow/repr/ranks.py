"""Processes that train one network together, and go by what the first of them says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.torch_private import compiled_from


def group_of(model: nn.Module) -> Any:
    """The process group that ``model`` is trained in: its DDP wrapper's, None without one.

    The wrapper is what says that processes train one network. That a group is up does not: they may
    train a network each, and only one of them might ask here, which would wait for the others for good.
    """
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = compiled_from(model)
        if inner is None:
            return None
        model = inner
    return model.process_group if dist.get_world_size(model.process_group) > 1 else None


def first_decides(decide: Callable[[], Any], group: Any, device: torch.device) -> Any:
    """What ``decide`` returns in the first process of ``group``, in all of them.

    Args:
        decide: called in the first process only; returns what JSON can hold.
        group: a process group; with None, ``decide`` is simply called.
        device: where the group can send tensors from.

    Raises:
        ValueError, OSError, ArithmeticError, RuntimeError: what ``decide`` raised, in all processes;
            what is none of the first three becomes the last in the others.
    """
    if group is None:
        return decide()
    if dist.get_rank(group) > 0:
        told = json.loads(share(None, group, device))
        if "error" in told:
            raise _ERRORS[told["kind"]](told["error"])
        return told["decided"]
    try:
        decided = decide()
        message = json.dumps({"decided": decided}).encode()
    except Exception as error:
        kind = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "RuntimeError")
        share(json.dumps({"error": str(error), "kind": kind}).encode(), group, device)
        raise
    share(message, group, device)
    return decided


_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "OSError": OSError,
    "ArithmeticError": ArithmeticError,
    "RuntimeError": RuntimeError,
}


def share(data: bytes | None, group: Any, device: torch.device) -> bytes:
    """``data`` of the first process of ``group``, in all of them; what the others pass is not looked at."""
    source = dist.get_global_rank(group, 0)
    first = dist.get_rank(group) == 0
    size = torch.tensor(len(data or b"") if first else 0, device=device)
    dist.broadcast(size, source, group)
    sent = torch.empty(int(size), dtype=torch.uint8, device=device)
    if first and data:
        sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(sent, source, group)
    return sent.cpu().numpy().tobytes()


@torch.no_grad()
def copy_from_first(tensors: list[Tensor], group: Any) -> None:
    """Give ``tensors`` the values they have in the first process of ``group``, bit for bit."""
    source = dist.get_global_rank(group, 0)
    for tensor in tensors:
        # Sent as they lie in memory only if that is without gaps, which channels_last is not.
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, source, group)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)
