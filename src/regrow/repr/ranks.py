"""Decisions shared by the processes that train one network: the first process decides for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.torch_private import compiled_from


def group_of(model: nn.Module) -> Any:
    """The process group of the DDP wrapper around ``model``; None without a wrapper or with one process.

    Only the wrapper shows that processes train one network. In a default process group each process may train
    a network of its own, and a process that waited here for the others could wait forever.
    """
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = compiled_from(model)
        if inner is None:
            return None
        model = inner
    return model.process_group if dist.get_world_size(model.process_group) > 1 else None


def first_decides(decide: Callable[[], Any], group: Any, device: torch.device) -> Any:
    """Call ``decide`` in the first process of ``group``, and return its result in all processes.

    Args:
        decide: returns data that JSON can hold.
        group: a process group; with None, this process alone calls ``decide``.
        device: the device from which the group can send tensors.

    Raises:
        ValueError, OSError, ArithmeticError, RuntimeError: the error that ``decide`` raised, in all
            processes. An error of any other class is raised as RuntimeError in the other processes.
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


_ERRORS = {kind.__name__: kind for kind in (ValueError, OSError, ArithmeticError, RuntimeError)}


def share(data: bytes | None, group: Any, device: torch.device) -> bytes:
    """Send ``data`` of the first process of ``group`` to all processes; the others' ``data`` is ignored."""
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
        # A tensor that is not contiguous, such as one in channels_last, is sent as a contiguous copy.
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, source, group)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)
