"""The rivals of Batch Bridgeout: dropout behind every activation, plain or targeted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.hooks import RemovableHandle

from regrow.modules import unwrap

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish,
)  # fmt: skip


def targeted_dropout(x: Tensor, p: float, target_fraction: float) -> Tensor:
    """Dropout among the ``target_fraction`` of each sample's activations that are smallest in magnitude.

    The rival of Batch Bridgeout's experiments (arXiv 2009.10893): an activation that is dropped becomes
    0, one that is targeted and not dropped is divided by 1 − p, the others stay as they are. All activations
    whose magnitude equals the limit are targeted.

    Args:
        x: [samples, ...].
        p: probability of dropping a targeted activation, 0 ≤ p < 1.
        target_fraction: share of each sample's activations, 0 < target_fraction ≤ 1, rounded to a whole
            number of them.
    """
    sizes = x.detach().abs().flatten(1)
    count = math.floor(target_fraction * sizes.shape[1] + 0.5)
    if count == 0:
        return x
    limit = _kth_smallest(sizes, count)
    return torch.where((sizes <= limit).view_as(x), dropout(x, p), x)


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest value, from 1, of each row of ``values`` [rows, columns]: [rows, 1]."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        # Half the time of kthvalue, which would take longer than the convolutions in front.
        return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return values.kthvalue(k, dim=1, keepdim=True).values


def add_dropout(model: nn.Module, p: float, target_fraction: float = 1.0) -> list[RemovableHandle]:
    """Put dropout behind every activation module of ``model``, in place; active in train mode.

    Masks are drawn from PyTorch's global generator.

    Args:
        model: any module whose activations are modules; it may be in a wrapper such as DDP.
        p, target_fraction: see ``targeted_dropout``; with a target_fraction of 1 it is plain dropout.

    Returns:
        Handles; ``handle.remove()`` removes the dropout behind one activation.

    Raises:
        ValueError: an argument out of range, or a model without activation modules.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p is the probability of dropping an activation, 0 <= p < 1, got {p!r}.")
    if not 0 < target_fraction <= 1:
        raise ValueError(f"target_fraction is a share, 0 < target_fraction <= 1, got {target_fraction!r}.")
    activations = [module for module in unwrap(model).modules() if isinstance(module, _ACTIVATIONS)]
    if not activations:
        raise ValueError(
            "the model has no activation modules to put dropout behind (functions such as F.relu cannot be "
            "seen): write them as modules, such as nn.ReLU."
        )
    return [module.register_forward_hook(_hook(p, target_fraction)) for module in activations]


def _hook(p: float, target_fraction: float) -> Callable[..., Tensor]:
    def drop(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        return dropout(output, p) if target_fraction == 1 else targeted_dropout(output, p, target_fraction)

    return drop
