"""A cut network made of PyTorch's own layers, for tools that know layers by their class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor, is_quick, pad_and_select, place, sources, take
from regrow.looking.copies import NotCopied, copied
from regrow.marks import check, strip
from regrow.modules import unwrap
from regrow.surgery.small import Small, undo_small
from regrow.torch_private import has_hooks, own_modules, own_parameters


@torch.no_grad()
def plain_layers(model: nn.Module) -> nn.Module:
    """Return a copy of a cut ``model`` in which every layer is of its own class again.

    A layer that picks channels of its input, or puts its output among zeros, becomes an ``nn.Sequential`` of
    ``pick``, ``layer`` and ``place``, as far as it needs them: ``layer`` is the convolution, linear layer or
    norm, the other two are modules of a few plain operations. So ``state_dict()`` keys of such a layer get
    ``.layer`` (``bn1.weight`` becomes ``bn1.layer.weight``). A layer that computes with its weight among
    zeros gets this weight as its own. The copy computes the same as ``model``. For the tools of quantization
    it is an ordinary network; regrow does not know any more that it was cut.

    Args:
        model: any module, cut or not; wrappers are looked through. It is only read.

    Raises:
        ValueError: the model cannot be copied, or such a layer has forward hooks, which would see other
            tensors than before.
    """
    check(model, "plain_layers")
    model = unwrap(model)
    for name, module in model.named_modules():
        if isinstance(module, Small) and has_hooks(module):
            raise ValueError(f"{name!r} has forward hooks, which would see other tensors: remove them first.")
    try:
        whole = copied(model, torch.clone)
    except NotCopied as error:
        raise ValueError(f"{error}.") from error
    strip(whole)
    modules = list(whole.modules())
    plain: dict[nn.Module, nn.Module] = {
        module: _plain(module) for module in modules if isinstance(module, Small)
    }
    for module in modules:
        for mark in ("_regrow_left", "_regrow_cuts"):
            vars(module).pop(mark, None)
    replace_modules(whole, {old: new for old, new in plain.items() if old is not new})
    return plain.get(whole, whole)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules in the places of the old ones, in place, under each name that they have."""
    for module in list(model.modules()):
        for key, child in list(own_modules(module).items()):
            if child in replacements:
                setattr(module, key, replacements[child])


class Picked(nn.Module):
    """Take the channels ``positions`` of the input, which has them in dimension ``dim``.

    The positions are no part of the ``state_dict()``.
    """

    if TYPE_CHECKING:  # torch.jit.script reads annotations, and does not know such
        positions: Tensor

    def __init__(self, positions: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("positions", positions, persistent=False)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return x.index_select(self.dim, self.positions)
        else:  # noqa: RET505 - torch.jit.script compiles what stands behind the block
            return take(x, self.positions, self.dim)

    def extra_repr(self) -> str:
        return f"{len(self.positions)} channels"


class Placed(nn.Module):
    """Place the channels of the input, in dimension ``dim``, at ``positions`` of a tensor of zeros, ``width``
    wide. The positions are no part of the ``state_dict()``."""

    if TYPE_CHECKING:
        positions: Tensor
        sources: Tensor

    def __init__(self, positions: Tensor, width: int, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("positions", positions, persistent=False)
        where = index_tensor(sources(positions.tolist(), width), positions.device)
        self.register_buffer("sources", where, persistent=False)
        self.width, self.dim = width, dim

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return pad_and_select(x, self.sources, self.dim)
        else:  # noqa: RET505 - torch.jit.script compiles what stands behind the block
            if is_quick(x):
                return place(x, self.positions, self.dim, self.width)
            return pad_and_select(x, self.sources, self.dim)

    def extra_repr(self) -> str:
        return f"{len(self.positions)} among {self.width}"


def placing(layer: Small) -> Placed | None:
    """A module that places channels as ``layer`` does; None if it places none."""
    if layer._regrow_placed is None:
        return None
    # PyTorch's own norms for pictures and volumes take no input without a batch.
    dims: dict[type[nn.Module], int] = {nn.BatchNorm2d: -3, nn.BatchNorm3d: -4}
    dim = dims.get(layer._regrow_plain[0], layer._regrow_axis)
    return Placed(layer._regrow_placed, layer._regrow_widths[0], dim)


def _plain(layer: Small) -> nn.Module:
    """``layer`` in its own class, alone or between a picking and a placing module. Changes ``layer``."""
    picked = layer._regrow_picked
    pick = None if picked is None else Picked(picked, layer._regrow_axis)
    place = placing(layer)
    wide = {name: cast(Tensor, getattr(layer, name)) for name in type(layer)._regrow_plain[1]}
    undo_small(layer)
    for name, values in wide.items():
        trains: Any = own_parameters(layer)[name].requires_grad
        layer.register_parameter(name, nn.Parameter(values, requires_grad=trains))
    parts: dict[str, nn.Module | None] = {"pick": pick, "layer": layer, "place": place}
    steps = OrderedDict((name, part) for name, part in parts.items() if part is not None)
    return nn.Sequential(steps).train(layer.training) if len(steps) > 1 else layer
