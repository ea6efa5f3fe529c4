"""Build networks of torchvision and timm with their published weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch import nn

from regrow.study.own_network import meant
from regrow.study.typed import Mistyped
from regrow.suggest import nearest


@dataclass(frozen=True)
class LibraryModel:
    """A network as its library defines it, and the kind of pictures that its weights expect.

    Attributes:
        model: in train mode.
        mean, std: of each channel of the pictures, in 0..1 units; None for random weights.
        side: of the pictures, in pixels; None if the library does not say.
    """

    model: nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    side: int | None


def library_model(name: str, weights: str) -> LibraryModel:
    """Build a network with 3 input channels and the classes that its library gives it.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, or a bare NAME, looked up in torchvision first.
        weights: ``default``, ``none`` (random), or a name: torchvision's (``IMAGENET1K_V1``), or timm's tag.

    Raises:
        ValueError: an unknown name or weights, or weights that cannot be downloaded.
    """
    prefix, _, bare = name.rpartition(":")
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    if prefix in ("", "torchvision") and bare in names:
        return _torchvision(bare, weights)
    if prefix in ("", "timm") and importlib.util.find_spec("timm") is not None:
        import timm

        if timm.is_model(bare):
            return _timm(bare, weights)
        names += timm.list_models()
    hint = "" if importlib.util.find_spec("timm") else " timm is not installed: pip install 'regrow[timm]'."
    known = meant(name) or nearest(bare, dict.fromkeys(names))
    raise Mistyped(
        f"{name!r} is neither a run folder nor a network of torchvision or timm, and does not have the form "
        f"module.path:function{known}{hint}"
    )


def _torchvision(name: str, weights: str) -> LibraryModel:
    import torchvision

    known = torchvision.models.get_model_weights(name)
    if weights == "none":
        # Without init_weights, GoogLeNet and Inception warn, and take minutes to build.
        arguments: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return LibraryModel(torchvision.models.get_model(name, weights=None, **arguments), None, None, None)
    wanted = "DEFAULT" if weights == "default" else weights
    if wanted not in known.__members__:
        raise Mistyped(
            f"{name} has no weights {weights!r}{nearest(weights, ['default', *known.__members__])}"
        )
    chosen = known[wanted]
    try:
        model = torchvision.models.get_model(name, weights=chosen)
    except OSError as error:
        raise _unavailable(name, weights, error) from error
    preset = chosen.transforms()
    return LibraryModel(model, tuple(preset.mean), tuple(preset.std), int(preset.crop_size[0]))


def _timm(name: str, weights: str) -> LibraryModel:
    import timm

    known = timm.list_pretrained(f"{name}*")
    tagged = name if weights in ("default", "none") else f"{name}.{weights}"
    if weights not in ("default", "none") and tagged not in known:
        tags = [each.partition(".")[2] for each in known if each.startswith(f"{name}.")]
        raise Mistyped(f"{name} has no weights {weights!r}{nearest(weights, ['default', *tags])}")
    try:
        model = timm.create_model(tagged, pretrained=weights != "none")
    except (OSError, RuntimeError) as error:
        raise _unavailable(name, weights, error) from error
    about: Any = model.pretrained_cfg
    side = int(about["input_size"][-1]) if about.get("input_size") else None
    if weights == "none":
        return LibraryModel(model, None, None, side)
    return LibraryModel(model, tuple(about["mean"]), tuple(about["std"]), side)


def _unavailable(name: str, weights: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(
        f"the weights {weights!r} of {name} cannot be obtained: {reason}. With --weights none the net is "
        "pruned with random weights, which shows its sizes."
    )
