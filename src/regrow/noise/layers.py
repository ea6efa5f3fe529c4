"""Batch Bridgeout on a model: noise on the weights of its layers while it trains."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from regrow.compensation.norms import reestimate_norms, running_norms
from regrow.filters import excluded
from regrow.marks import Mark, borrowed_weight, check, is_spread
from regrow.modules import unwrap
from regrow.noise.kernels import check_compiler
from regrow.noise.passes import Passes
from regrow.noise.perturbation import check_noise, perturbed, pool
from regrow.torch_private import own_parameters

_STOCK = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear}
# 1 drew its random numbers from PyTorch's generator.
_VERSION = 2


def add_bridgeout(
    model: nn.Module,
    p: float = 0.3,
    q: float = 1.5,
    *,
    target_fraction: float = 1.0,
    linear: bool = False,
    exclude: Iterable[str] = (),
    seed: int = 0,
    compiled: bool = False,
) -> dict[str, Any]:
    """Train ``model`` with Batch Bridgeout (arXiv 2009.10893): ``bridgeout`` on the weights it reads.

    A layer in train mode computes with w̃, one in eval mode with w, exactly. Every forward pass of
    ``model`` that trains makes one draw, from ``seed``, the number of the pass and the parameter: layers
    that share a weight, a layer that runs twice and a checkpointed part that is computed again see the
    same w̃. Parameters, ``state_dict()`` keys and ``isinstance`` stay as they are. Every process of a
    distributed run makes the same draws; give each its own ``seed`` to have them differ. Until
    ``remove_bridgeout`` the model cannot be pickled as a whole; its ``state_dict()`` can be saved as ever.

    Args:
        model: any module with Conv1d, Conv2d or Conv3d layers; wrappers are looked through. It must be
            the module that training calls, for its calls mark the passes.
        p, q, target_fraction: see ``bridgeout``.
        linear: perturb the linear layers as well (not those inside an attention layer, which reads
            their weights itself).
        exclude: qualified names of layers, or of containers of them, to leave alone.
        seed: same seed, same model: same noise.
        compiled: compute the noise in one pass over memory, compiled by ``torch.compile`` on the spot (a
            few seconds, the first time on a machine). It takes half of the time, and for large layers
            that shows. The draws are the same, w̃ and gradients are up to rounding, so it is no part of
            ``settings``.

    Returns:
        A JSON-able record: ``version``, ``layers`` (the names of those perturbed) and ``settings``.

    Raises:
        ValueError: an argument out of range, an unknown name, no layer left, a layer that has Bridgeout
            already, or one whose weight is not a plain real parameter. Nothing is changed.
        RuntimeError: ``compiled``, and PyTorch finds no compiler. Nothing is changed.
    """
    check_noise(p, q, target_fraction)
    if not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}.")
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    check(model, "add_bridgeout")
    model = unwrap(model)
    layers = _layers(model, linear, exclude)
    settings: dict[str, Any] = {
        "p": float(p), "q": float(q), "target_fraction": float(target_fraction),
        "linear": bool(linear), "exclude": exclude, "seed": seed,
    }  # fmt: skip
    if compiled:
        for like in {
            (layer.weight.device, layer.weight.dtype): layer.weight for layer in layers.values()
        }.values():
            check_compiler(like, q == 1.5, target_fraction < 1)
    passes = Passes(model, settings)
    model._bridgeout_passes = passes  # type: ignore[assignment]
    keys: dict[int, int] = {}
    for layer in layers.values():
        # By parameter, not by layer: layers that share a weight share its draw.
        layer._bridgeout = _Noise(passes, keys.setdefault(id(layer.weight), len(keys)), bool(compiled))
        layer.__class__ = _bridged(type(layer))  # type: ignore[arg-type]
    return {"version": _VERSION, "layers": list(layers), "settings": settings}


def remove_bridgeout(model: nn.Module, calibration: Iterable[Any] | None = None) -> None:
    """Undo ``add_bridgeout``: the layers are of their own classes again, and the hooks are gone.

    Args:
        model: the module that was given to ``add_bridgeout``.
        calibration: batches of a few hundred unlabelled images, as in ``compensate``. Pass them once
            training is over: the batch norms have recorded the statistics of noisy weights, and the
            network without noise is better with its own (``reestimate_norms``). Without batch norms, or
            without ``calibration``, nothing is re-estimated.

    Raises:
        ValueError: ``model`` is not one that was given to ``add_bridgeout``, a layer has been
            parametrized since, or as ``reestimate_norms``. Nothing is changed.
    """
    check(model, "remove_bridgeout")
    model = unwrap(model)
    passes = _passes(model)
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _Bridged) and layer._bridgeout.passes is passes
    }
    for name, layer in layers.items():
        if "_plain" not in vars(type(layer)):
            raise ValueError(
                f"{name!r} was parametrized after Bridgeout was added: call "
                "torch.nn.utils.parametrize.remove_parametrizations on it first."
            )
    if calibration is not None and running_norms(model):
        reestimate_norms(model, calibration)  # in evaluation mode, in which a layer reads w itself
    for layer in layers.values():
        layer._bridgeout.undo(layer)
    passes.undo(model)
    pool.clear()


def bridgeout_state(model: nn.Module) -> dict[str, Any]:
    """What ``load_bridgeout_state`` needs to go on with the same noise: JSON-able, beside the weights.

    Raises:
        ValueError: ``model`` is not one that was given to ``add_bridgeout``.
    """
    passes = _passes(unwrap(model))
    return {"version": _VERSION, "settings": dict(passes.settings), "passes": int(passes.number)}


def load_bridgeout_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Go on where ``bridgeout_state`` was taken; ``add_bridgeout`` first, with the same settings.

    Raises:
        ValueError: not such a state, of another version or other settings, or ``model`` is not one that
            was given to ``add_bridgeout``. Nothing is changed.
    """
    passes = _passes(unwrap(model))
    if missing := {"version", "settings", "passes"} - set(state):
        raise ValueError(f"not a state of Bridgeout: {', '.join(sorted(missing))} missing.")
    if state["version"] != _VERSION:
        raise ValueError(
            f"this regrow reads Bridgeout states of version {_VERSION}, got {state['version']!r}."
        )
    if state["settings"] != passes.settings:
        raise ValueError(
            f"the state was saved with {state['settings']}, and Bridgeout was added with {passes.settings}: "
            "add it with the same settings."
        )
    passes.number.fill_(int(state["passes"]))


class _Noise(Mark):
    """What one layer with Bridgeout knows: its share of the noise, and w̃ while its forward method runs."""

    def __init__(self, passes: Passes, key: int, compiled: bool) -> None:
        self.passes = passes
        self.key = key
        self.compiled = compiled
        self.noisy: Tensor | None = None

    def state(self) -> str:
        """See ``Mark``."""
        return "bridgeout"

    def undo(self, module: nn.Module) -> None:
        """Give the layer its own class again. ``ValueError`` if another class stands in front of it."""
        if "_plain" not in vars(type(module)):
            raise ValueError(
                "a layer was parametrized after Bridgeout was added: call "
                "torch.nn.utils.parametrize.remove_parametrizations on it first."
            )
        module.__class__ = cast(Any, type(module))._plain
        del module._bridgeout


class _Bridged(nn.Module):
    """In front of a layer's own class: its forward method reads w̃ where it says ``self.weight``."""

    _bridgeout: _Noise
    _plain: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        noisy = self._bridgeout.noisy
        # Else nn.Module's own lookup, which the property stands in front of.
        return cast(Tensor, nn.Module.__getattr__(self, "weight")) if noisy is None else noisy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)
        weight = own_parameters(self).get("weight")
        if weight is None:
            raise ValueError(
                "the weight of a layer with Bridgeout is no parameter any more (a parametrization): call "
                "remove_bridgeout, and add it again without that layer."
            )
        noise = self._bridgeout
        given = noise.passes.settings
        number = noise.passes.current()
        noise.noisy = perturbed(
            weight,
            given["p"],
            given["q"],
            given["target_fraction"],
            given["seed"] % 2**63,
            noise.key,
            number,
            noise.compiled,
            _reads_alone(self),
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            noise.noisy = None


def _reads_alone(layer: _Bridged) -> bool:
    """Whether nothing but one convolution or linear product can read w̃ in ``layer``."""
    return (
        # As add_bridgeout made it: no class in front, and the class behind it PyTorch's own.
        vars(type(layer)).get("_plain") in _STOCK
        and "_conv_forward" not in vars(layer)
        and not torch.compiler.is_compiling()
    )


@functools.cache
def _bridged(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Bridgeout{plain.__name__}", (_Bridged, plain), {"_plain": plain})


def _passes(model: nn.Module) -> Passes:
    if "_bridgeout_passes" not in vars(model):
        raise ValueError("this model has no Bridgeout: pass the one that was given to add_bridgeout.")
    passes = model._bridgeout_passes
    assert isinstance(passes, Passes)
    return passes


def _layers(model: nn.Module, linear: bool, exclude: list[str]) -> dict[str, Any]:
    """The layers to perturb by qualified name, checked."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *([nn.Linear] if linear else []))
    every: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    }
    left_out = excluded(exclude, every)
    layers = {name: layer for name, layer in every.items() if name not in left_out}
    if not layers:
        raise ValueError(
            f"no layer is left to perturb: the model has {len(every)}, {len(left_out)} are excluded. Exclude "
            "fewer layers, or pass a model with Conv1d, Conv2d or Conv3d layers, or with linear layers and "
            "linear=True."
        )
    for name, layer in layers.items():
        weight = own_parameters(layer).get("weight")
        if weight is None:
            raise ValueError(
                f"{name!r} cannot have Bridgeout: {borrowed_weight(layer)} Or leave the layer out with "
                f"exclude=[{name!r}]."
            )
        if is_spread(layer):
            raise ValueError(
                f"{name!r} was cut and holds filters at 0 beside its weight: leave it out with "
                f"exclude=[{name!r}]."
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"the weight of {name!r} is {weight.dtype}, and Bridgeout needs real floating-point numbers: "
                f"leave the layer out with exclude=[{name!r}]."
            )
    return layers
