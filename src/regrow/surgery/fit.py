"""Whether what a plan says of one layer can be true of this kind of layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from regrow.modules import Norm, channels_read, per_channel
from regrow.suggest import nearest
from regrow.surgery.plan import CutPlan, PlanUnfit, shown
from regrow.torch_private import ConvNd, own_parameters


def check_masked(plan: CutPlan, modules: Mapping[str, nn.Module]) -> None:
    """Raise ``PlanUnfit`` unless the layers that the plan leaves masked are convolutions or linear layers."""
    for name in plan.masked:
        if name not in modules:
            raise PlanUnfit(
                f"the plan names {shown(name)}, which the model does not have{nearest(name, modules)}"
            )
        if not isinstance(modules[name], ConvNd | nn.Linear):
            raise PlanUnfit(f"the plan does not fit {name!r}, which is a {type(modules[name]).__name__}.")


def check_kind(plan: CutPlan, name: str, module: Any) -> None:
    """Raise ``PlanUnfit`` if a layer of this kind would compute something else than the plan means.

    The indices are known to be in range.
    """
    if isinstance(module, ConvNd | nn.Linear):
        emitted = _check_weighted(plan, name, module)
    else:
        emitted = _check_norm(plan, name, module)
    if name in plan.placed and len(plan.placed[name][1]) != emitted:
        raise PlanUnfit(
            f"the plan places {len(plan.placed[name][1])} channels of {name!r}, which has {emitted}."
        )


def _check_weighted(plan: CutPlan, name: str, module: Any) -> int:
    """Check the parts about a convolution or linear layer; returns how many channels it will make."""
    if name in plan.rows and name in plan.spread:
        raise PlanUnfit(f"the plan removes rows of {name!r} and spreads the others too.")
    if isinstance(module, nn.Linear):
        if name in plan.groups:
            raise PlanUnfit(f"the plan gives groups to {name!r}, which is a {type(module).__name__}.")
        return len(plan.rows.get(name, range(module.out_features)))
    rows = plan.rows.get(name, range(module.out_channels))
    groups = Counter(row // (module.out_channels // module.groups) for row in rows)
    if len(set(groups.values())) > 1:
        raise PlanUnfit(f"the plan leaves different numbers of filters in the groups of {name!r}.")
    if len(groups) != plan.groups.get(name, module.groups):
        raise PlanUnfit(
            f"the plan leaves filters of {name!r} in {len(groups)} groups, and gives it "
            f"{plan.groups.get(name, module.groups)}."
        )
    return len(rows)


def _check_norm(plan: CutPlan, name: str, module: Any) -> int:
    """Check the parts about any other layer; returns how many channels it will make."""
    width = channels_read(module) or 0
    channels = plan.channels.get(name, range(width))
    norm = isinstance(module, Norm) and per_channel(module)
    kinds = {
        "channels": norm or isinstance(module, nn.PReLU) or len(channels) == width,
        "spread": isinstance(module, Norm),
        "placed": norm,
    }
    for part, fits in kinds.items():
        if name in getattr(plan, part) and not (fits and isinstance(module, Norm | nn.PReLU)):
            raise PlanUnfit(
                f"the plan does not fit {name!r}: {part!r} is for norms with statistics per channel, and "
                f"this is a {type(module).__name__}."
            )
    own = own_parameters(module)
    if any(getattr(module, key, None) is not None and own.get(key) is None for key in ("weight", "bias")):
        raise PlanUnfit(f"the weight or bias of {name!r} is not a plain parameter (a parametrization?).")
    tensors = [parameter for parameter in own.values() if parameter is not None]
    if name in plan.spread and not (tensors and all(each.shape == (width,) for each in tensors)):
        raise PlanUnfit(f"the plan spreads the weights of {name!r}, which has no weight per channel.")
    return len(channels)
