"""The class in front of a layer with Batch Bridgeout, and how its w̃ is made together with that of others."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from regrow.marks import Mark
from regrow.memory import is_dense
from regrow.modules import CONSUMER_CLASSES, filter_dim
from regrow.noise.draws import Place
from regrow.noise.groups import Part, together
from regrow.noise.passes import Passes, stream_on
from regrow.noise.perturbation import drawn
from regrow.noise.vectors import Strength
from regrow.together import Together
from regrow.torch_private import (
    has_gradient_hooks,
    has_pre_hooks,
    is_transformed,
    own_parameters,
    writes_to,
)  # fmt: skip

_STOCK = tuple(CONSUMER_CLASSES)


class Noise(Mark):
    """The mark on a layer with Bridgeout; ``noisy`` is w̃ while the layer's forward method runs."""

    def __init__(self, passes: Passes, place: Place, compiled: bool) -> None:
        self.passes, self.place, self.compiled = passes, place, compiled
        self.noisy: Tensor | None = None

    @property
    def strength(self) -> Strength:
        given = self.passes.settings
        return Strength(given["p"], given["q"], given["target_fraction"], self.compiled)

    def state(self) -> str:
        return "bridgeout"

    def undo(self, module: nn.Module) -> None:
        """Give the layer its own class again."""
        module.__class__ = plain_class(module, "a layer")
        del module._bridgeout


class Bridged(nn.Module):
    """A class put in front of a layer's class, so that ``self.weight`` in its forward method is w̃."""

    _bridgeout: Noise
    _plain: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        noisy = self._bridgeout.noisy
        # This property hides the parameter, which nn.Module.__getattr__ still finds.
        return cast(Tensor, nn.Module.__getattr__(self, "weight")) if noisy is None else noisy

    @weight.setter
    def weight(self, _: Any) -> None:
        # PyTorch comes here with what is no parameter; it keeps parameters elsewhere.
        raise ValueError(
            "the weight of a layer with Bridgeout must stay a parameter. In place of nn.DataParallel over "
            "several devices use DistributedDataParallel; before pruning masks or weight norms call "
            "remove_bridgeout."
        )

    def _regrow_weight_ahead(self) -> Tensor | None:
        """The weight of the forward method in the running pass; None if only that method can make it."""
        noise = self._bridgeout
        if not self.training or noise.passes.measuring:
            return own_parameters(self)["weight"]
        made = None if noise.passes.together is None else noise.passes.together.get(self)
        return None if made is None else cast(Tensor, made.noisy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        noise = self._bridgeout
        if not self.training or noise.passes.measuring:
            return super().forward(*args, **kwargs)
        weight = own_parameters(self).get("weight")
        if weight is None:
            raise ValueError(
                "the weight of a layer with Bridgeout is no parameter any more, because the layer was "
                "parametrized: call remove_bridgeout, and then add_bridgeout without that layer."
            )
        made = None if noise.passes.together is None else noise.passes.together.get(self)
        if made is None:
            number = noise.passes.current(weight.device)
            noise.noisy = drawn(weight, _part(self), number, noise.strength)
        else:
            noise.noisy = made.noisy
        try:
            return super().forward(*args, **kwargs)
        finally:
            noise.noisy = None


class _Made(NamedTuple):
    noisy: Tensor
    weight: Tensor  # kept, so that no other tensor takes its id


def bridge(layer: nn.Module, passes: Passes, place: Place, compiled: bool) -> None:
    """Put the class in front of the class of ``layer``."""
    layer._bridgeout = Noise(passes, place, compiled)  # type: ignore[assignment]
    layer.__class__ = _bridged(cast(Any, type(layer)))


def plain_class(layer: nn.Module, name: str) -> Any:
    """The class before ``add_bridgeout``; ``ValueError`` if another class was put in front since."""
    if "_plain" not in vars(type(layer)):
        raise ValueError(
            f"{name} was parametrized after Bridgeout was added: call "
            "torch.nn.utils.parametrize.remove_parametrizations on it first."
        )
    return cast(Any, type(layer))._plain


def grouped(model: nn.Module, passes: Passes) -> Together[Any]:
    """What makes w̃ for groups of the layers of ``model`` that belong to ``passes``."""
    layers = [
        layer for layer in model.modules() if isinstance(layer, Bridged) and layer._bridgeout.passes is passes
    ]
    # Before the first pass nobody knows which layers run. That matters to DDP alone: it takes every weight in
    # a group for one that runs.
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Together(_make, _kind, _size, _stamp, [] if several else layers)


def reads_alone(layer: nn.Module) -> bool:
    """Whether only one convolution or linear product reads w̃ in ``layer``."""
    # No class was put in front since add_bridgeout, and the layer's own class is PyTorch's.
    # In words that torch.compile follows in PyTorch 2.6 too.
    kind: Any = type(layer)
    return kind.__bases__[0] is Bridged and kind._plain in _STOCK and "_conv_forward" not in layer.__dict__


def _make(layers: Sequence[nn.Module]) -> list[_Made | None]:
    noise = cast(Any, layers[0])._bridgeout
    # Layers that share a weight share its w̃, and then all of them must be harmless.
    keys: list[Hashable] = []
    distinct: dict[Hashable, tuple[Tensor, Part]] = {}
    for layer in layers:
        weight, part = own_parameters(layer)["weight"], _part(layer)
        key = None if _by_itself(layer, weight) else (id(weight), part.place, part.transposed)
        keys.append(key)
        if key is not None:
            alone = part.alone and (key not in distinct or distinct[key][1].alone)
            distinct[key] = weight, Part(part.place, part.transposed, alone)
    if not distinct:
        return [None] * len(layers)
    weights, parts = zip(*distinct.values(), strict=True)
    number = noise.passes.current(weights[0].device)
    noisy = together(weights, parts, number, noise.strength)
    made = {key: _Made(*each) for key, each in zip(distinct, zip(noisy, weights, strict=True), strict=True)}
    return [None if key is None else made[key] for key in keys]


def _by_itself(layer: nn.Module, weight: Tensor) -> bool:
    """Whether ``layer`` takes no part in a group now."""
    return (
        not layer.training
        or has_pre_hooks(layer)  # which may change the weight
        or has_gradient_hooks(weight)  # which are called with None if the layer has no part in a loss
        or not is_dense(weight)
        or is_transformed(weight)
    )


def _part(layer: Any) -> Part:
    transposed = layer.groups if filter_dim(layer) else 0
    return Part(layer._bridgeout.place, transposed, reads_alone(layer))


def _kind(layer: nn.Module) -> Hashable:
    weight, noise = own_parameters(layer).get("weight"), cast(Any, layer)._bridgeout
    if weight is None or type(weight) not in (nn.Parameter, Tensor):
        return None
    return weight.device, weight.dtype, weight.requires_grad, noise.place.base, noise.compiled


def _size(layer: nn.Module) -> int:
    weight = own_parameters(layer).get("weight")
    return 0 if weight is None else int(weight.nbytes)


def _stamp(layer: nn.Module) -> Any:
    weight = own_parameters(layer).get("weight")
    # What one stream of a GPU makes is not there for another.
    return None if weight is None else (id(weight), writes_to(weight), stream_on(weight.device))


@functools.cache
def _bridged(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Bridgeout{plain.__name__}", (Bridged, plain), {"_plain": plain})
