"""Whether a pass that leaves dropped filters out takes less time than one that computes them.

On a CPU it does (benchmarks/repr_time.md). On a GPU the slices, and the channels placed among zeros, start 33
more kernels in a ResNet-20 (tests/repr/test_launches.py). A small network is expected to gain less from fewer
multiply-accumulates than these launches cost; nobody has timed it yet.
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

# Multiply-accumulates that a pass must save on a GPU: an estimate between VGG-16, which saves 2e10 on 128
# pictures of 32×32 without 30 % of its filters, and ResNet-20, which saves 2e9.
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
