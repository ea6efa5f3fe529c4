"""Whether a pass that leaves dropped filters out takes less time than one that computes them.

On a CPU it does (benchmarks/repr_time.md). On a GPU the slices and the channels placed among zeros are some
forty more kernels in a ResNet-20, about 0.2 ms of launches, and a small network gains less than that from
fewer multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.looking.calls import run
from regrow.looking.copies import copied
from regrow.repr.narrow import narrow
from regrow.surgery.plan import CutPlan
from regrow.torch_private import tree_leaves

# Multiply-accumulates that a pass must save on a GPU. VGG-16 on 128 pictures of 32×32 saves 2e10, ResNet-20
# 2e9, at 30 % of the filters.
LEAST_SAVED = 6e9


def judge(model: nn.Module, plan: CutPlan, inputs: Any) -> Callable[[Any], bool]:
    """A function of the arguments of a call: whether that pass should leave out what ``plan`` cuts.

    It depends on the sizes alone, and on no clock: equal runs decide alike.

    Args:
        inputs: an example; a call with twice as many numbers saves twice as much.

    Raises:
        NotCopied, PassFailed: the model cannot be copied, or cannot run.
    """
    copy = copied(model)
    whole = _macs(copy, inputs)
    with narrow(copy, plan):
        saved = whole - _macs(copy, inputs)
    return lambda arguments: saved * _size(arguments) / max(_size(inputs), 1) >= LEAST_SAVED


def _macs(model: nn.Module, inputs: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model, inputs, training=False)
    return counter.get_total_flops() / 2


def _size(arguments: Any) -> int:
    """The numbers in the first floating tensor among ``arguments``."""
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return next((tensor.numel() for tensor in tensors if tensor.is_floating_point()), 0)
