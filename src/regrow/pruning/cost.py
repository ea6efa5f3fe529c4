"""Count what a network costs on any machine: parameters, multiply-accumulates, memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.looking.calls import call, evaluating
from regrow.modules import unwrap
from regrow.torch_private import TorchDispatchMode, storage_key, tree_leaves


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters; a parameter that several layers share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Count the multiply-accumulates of one pass over the whole batch ``example_inputs``, in evaluation mode.

    This is PyTorch's own count (``torch.utils.flop_counter``), halved: convolutions, linear layers, matrix
    products and attention, called as layers or as functions. Norms, activations and additions do not count.
    """
    model = unwrap(model)
    with evaluating(model), FlopCounterMode(display=False) as counter:
        call(model, example_inputs)
    return int(counter.get_total_flops()) // 2


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and buffers; a tensor that several layers share counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def activation_bytes(model: nn.Module, example_inputs: Any) -> int:
    """Return the most bytes that the tensors made in a pass over ``example_inputs`` hold at one time.

    The pass runs in evaluation mode without gradients. A tensor that a PyTorch operation returns counts
    until it is freed, so the number is the same on every machine. Weights, inputs and the workspaces inside
    operations are not counted.
    """
    model = unwrap(model)
    inputs = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    with evaluating(model), _Live([*model.parameters(), *model.buffers(), *inputs]) as live:
        call(model, example_inputs)
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside the ``with`` block, but not the memory of ``known`` tensors."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._seen = {storage_key(storage) for tensor in known for storage in _storages(tensor)}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            for storage in _storages(tensor):
                if (key := storage_key(storage)) in self._seen:
                    continue
                self._seen.add(key)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return output

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def _storages(tensor: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
        yield tensor.untyped_storage()
