"""Batch Bridgeout (arXiv 2009.10893) on the layers of a model that trains."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from regrow.compensation.norms import reestimate_norms, running_norms
from regrow.filters import excluded
from regrow.given import check_module, names_given
from regrow.marks import borrowed_weight, check, is_spread
from regrow.modules import CONVOLUTION_CLASSES, unwrap
from regrow.noise.bridged import Bridged, bridge, grouped, plain_class
from regrow.noise.draws import places
from regrow.noise.groups import pool
from regrow.noise.kernels import check_compiler
from regrow.noise.passes import Passes
from regrow.noise.perturbation import check_noise
from regrow.noise.vectors import quick_kernels
from regrow.torch_private import own_parameters

# Version 1 drew its random numbers from PyTorch's generator, version 2 a start and a key for each layer.
_VERSION = 3


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
    """Add Batch Bridgeout's noise (arXiv 2009.10893) to the weights of ``model`` in train mode.

    A layer in train mode computes with w̃ (see ``bridgeout``), a layer in eval mode exactly with w. So does a
    layer in a pass that only measures the statistics of batch norms, as PyTorch's ``update_bn`` does. In each
    other pass in train mode, each parameter gets one draw, which depends on ``seed``, the number of the
    pass and the parameter. So layers that share a weight, a layer that runs twice, and a checkpointed part
    that is computed again see the same w̃. Parameters, ``state_dict()`` keys and ``isinstance`` do not change.
    All processes of a distributed run make the same draws; give each its own ``seed`` for different draws.
    Until ``remove_bridgeout`` the model cannot be pickled as a whole, but its ``state_dict()`` can be saved.

    Args:
        model: any module with convolutions, transposed ones too, in its wrappers or without. It must be the
            module that training calls, because its calls mark the passes.
        p, q, target_fraction: see ``bridgeout``.
        linear: perturb linear layers too, except inside attention layers, which read those weights directly.
        exclude: qualified names of layers, or of containers of layers, to leave alone.
        seed: for an equal model, the same seed gives the same noise.
        compiled: on a CPU, compute the noise with a kernel from ``torch.compile``, in half the time, which
            matters for large layers. The first compilation on a machine takes a few seconds. The same weights
            are dropped; w̃ and gradients are equal up to rounding, so ``settings`` does not contain
            ``compiled``. On a GPU the noise has kernels of its own either way.

    Returns:
        A JSON-able record: ``version``, ``layers`` (the names of the perturbed layers) and ``settings``.

    Raises:
        ValueError: an argument out of range, an unknown name, no layer left, a layer that has Bridgeout
            already, or a layer whose weight is not a plain real parameter. Nothing is changed.
        RuntimeError: ``compiled``, and PyTorch finds no compiler. Nothing is changed.
    """
    check(model, "add_bridgeout")
    check_noise(p, q, target_fraction)
    if not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}.")
    exclude = names_given(exclude, "exclude")
    model = unwrap(model)
    layers = _layers(model, linear, exclude)
    settings: dict[str, Any] = {
        "p": float(p), "q": float(q), "target_fraction": float(target_fraction),
        "linear": bool(linear), "exclude": exclude, "seed": seed,
    }  # fmt: skip
    if compiled:
        weights = [layer.weight for layer in layers.values()]
        for like in {weight.dtype: weight for weight in weights if weight.is_cpu}.values():
            check_compiler(like, q == 1.5, target_fraction < 1)
    # One place per parameter, so that layers which share a weight share its draw.
    parameters = {id(layer.weight): layer.weight for layer in layers.values()}
    found = places([weight.numel() for weight in parameters.values()], seed)
    place = dict(zip(parameters, found, strict=True))
    for weight in parameters.values():
        quick_kernels(weight)  # tried, and compiled, before somebody captures a step
    passes = Passes(model, settings, next(iter(parameters.values())).device, grouped)
    model._bridgeout_passes = passes  # type: ignore[assignment]
    for layer in layers.values():
        bridge(layer, passes, place[id(layer.weight)], bool(compiled))
    return {"version": _VERSION, "layers": list(layers), "settings": settings}


def remove_bridgeout(model: nn.Module, calibration: Iterable[Any] | None = None) -> None:
    """Undo ``add_bridgeout``: give the layers their own classes again, and remove the hooks.

    Args:
        model: the module that was given to ``add_bridgeout``.
        calibration: batches of a few hundred unlabelled images, as in ``compensate``. Give them at the end
            of training: the batch norms have recorded statistics under noise, and the network without
            noise is more accurate with statistics of its own (``reestimate_norms``). Without batch norms or
            without ``calibration`` nothing is re-estimated.

    Raises:
        ValueError: ``model`` was not given to ``add_bridgeout``, a layer has been parametrized since, or an
            error of ``reestimate_norms``. Nothing is changed.
    """
    check(model, "remove_bridgeout")
    model = unwrap(model)
    passes = _passes(model)
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Bridged) and layer._bridgeout.passes is passes
    }
    for name, layer in layers.items():
        plain_class(layer, repr(name))
    if calibration is not None and running_norms(model):
        reestimate_norms(model, calibration)  # runs the layers in eval mode, so with w instead of w̃
    for layer in layers.values():
        layer._bridgeout.undo(layer)
    passes.undo(model)
    pool.clear()


def bridgeout_state(model: nn.Module) -> dict[str, Any]:
    """The state of the noise, for ``load_bridgeout_state``: save it beside the model's ``state_dict()``.

    Args:
        model: the module that was given to ``add_bridgeout``, in its wrappers or without.

    Returns:
        JSON-able data: ``version``, ``settings`` and ``passes``, the number of passes that drew noise.

    Raises:
        ValueError: ``model`` was not given to ``add_bridgeout``.
    """
    check_module(model, "bridgeout_state")
    passes = _passes(unwrap(model))
    return {"version": _VERSION, "settings": copy.deepcopy(passes.settings), "passes": int(passes.number)}


def load_bridgeout_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Continue the noise from ``bridgeout_state``: the next pass draws what it would have drawn then.

    Args:
        model: a module on which ``add_bridgeout`` was called with the same settings.
        state: from ``bridgeout_state``; it may have been through JSON.

    Raises:
        ValueError: ``state`` is something else, of another version or has other settings, or ``model`` was
            not given to ``add_bridgeout``. Nothing is changed.
    """
    check_module(model, "load_bridgeout_state")
    passes = _passes(unwrap(model))
    if not isinstance(state, Mapping) or {"version", "settings", "passes"} - set(state):
        raise ValueError(
            f"not a state of Bridgeout: {state!r:.80}. Give what bridgeout_state(model) returned, with "
            "version, settings and passes."
        )
    if state["version"] != _VERSION:
        raise ValueError(
            f"this regrow reads Bridgeout states of version {_VERSION}, got {state['version']!r:.80}."
        )
    number, settings = state["passes"], state["settings"]
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
        raise ValueError(f"passes in a state of Bridgeout is a number of forward passes, got {number!r:.80}.")
    theirs = settings if isinstance(settings, Mapping) else {}
    other = [
        f"{key!r:.80}: {theirs.get(key)!r:.80} (here {passes.settings.get(key)!r})"
        for key in [*passes.settings, *(theirs.keys() - passes.settings.keys())]
        if key not in theirs or theirs[key] != passes.settings.get(key)
    ]
    if other:
        raise ValueError(
            f"the state was saved with other settings: {', '.join(other[:3])}. Call add_bridgeout with the "
            "same settings."
        )
    passes.number.fill_(number)


def _passes(model: nn.Module) -> Passes:
    passes = vars(model).get("_bridgeout_passes")
    if not isinstance(passes, Passes):
        raise ValueError("this model has no Bridgeout: pass the one that was given to add_bridgeout.")
    return passes


def _layers(model: nn.Module, linear: bool, exclude: list[str]) -> dict[str, Any]:
    """The layers to perturb, by qualified name; ``ValueError`` if one of them cannot have Bridgeout."""
    kinds = (*CONVOLUTION_CLASSES, *([nn.Linear] if linear else []))
    every: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    }
    left_out = excluded(exclude, every)
    layers = {name: layer for name, layer in every.items() if name not in left_out}
    if not layers:
        raise ValueError(
            f"no layer is left to perturb: of {len(every)} layers {len(left_out)} are excluded. Exclude "
            "fewer layers, or pass a model with convolutions (Conv1d to Conv3d, ConvTranspose1d to "
            "ConvTranspose3d), or with linear layers and linear=True."
        )
    for name, layer in layers.items():
        weight = own_parameters(layer).get("weight")
        if weight is None:
            reason = borrowed_weight(layer)
        elif is_spread(layer):
            reason = "it was cut, and computes with its weight among zeros"
        elif not weight.is_floating_point():
            reason = f"its weight is {weight.dtype}, and the noise needs real floating-point numbers"
        else:
            continue
        raise ValueError(
            f"{name!r} cannot have Bridgeout: {reason}. You can leave it out by exclude=[{name!r}]."
        )
    return layers
