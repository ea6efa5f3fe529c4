"""Build untrained reference nets by name: regrow's families, and classifiers of torchvision and timm."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from regrow.short import short
from regrow.study import families
from regrow.study.names import MODEL_FAMILIES
from regrow.study.typed import Mistyped

# With auxiliary heads the training output would be a tuple instead of logits; and GoogLeNet warns if
# init_weights is not given.
_TORCHVISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


MOST_PARAMETERS = 10**9


def build_model(
    name: str,
    *,
    classes: int,
    channels: int,
    size: tuple[int, int],
    depth: int | None = None,
    width: float | int | None = None,
    batch_norm: bool = True,
    pooling: str = "max",
    head: str = "average",
    kernel: int = 3,
    init: str = "he",
) -> nn.Module:
    """Build an untrained classifier, pictures [n, channels, height, width] → logits [n, classes].

    It is in train mode. Its weights come from PyTorch's global random generator; the forward pass
    that tries the picture size leaves the generator and every buffer as they were.

    Args:
        name: a family (``convnet``, ``vgg``, ``resnet``, ``wrn``, ``densenet``) or a library's net:
            ``torchvision:NAME``, ``timm:NAME``, or a bare NAME, looked up in torchvision first.
        classes: number of logits.
        channels: of the data; ``model_channels`` says how many the net itself reads.
        size: (height, width) of the pictures.
        depth: convnet from 1 (default 3); vgg 7, 11, 13, 16 (default) or 19; resnet 6n+2 from 20
            (default) to 182; wrn 6n+4 from 10 (default 16); densenet 3n+4 from 7 (default 40).
        width: convnet filters per layer (default 32); vgg multiplier (default 1); resnet filters of
            the first stage (default 16); wrn widening factor (default 4); densenet growth (default 12).
        batch_norm: False leaves batch norm out; convnet and vgg only.
        pooling: ``max``, ``avg``, ``max3`` (3×3, stride 2) or ``none``; convnet and vgg only.
        head: ``average`` or ``flatten``: what the linear layer of convnet reads.
        kernel: side of the convolutions of convnet.
        init: ``he``, ``torch`` or ``truncated``: first weights of convnet.

    Raises:
        ValueError: an unknown name, a setting that the net does not take, a library that is not
            installed, or pictures too small for the net.
    """
    if classes < 1 or channels < 1 or min(size) < 1:
        raise ValueError(
            f"a net needs at least one class, channel and pixel, not classes={classes}, "
            f"channels={channels}, size={size}."
        )
    source, bare = _find(name)
    reads = _channels(source, bare, channels)
    given: dict[str, Any] = {"depth": depth, "width": width}
    given = {key: value for key, value in given.items() if value is not None}
    blocks: dict[str, Any] = {"batch_norm": batch_norm, "pooling": pooling}
    plain = blocks == {"batch_norm": True, "pooling": "max"}
    parts: dict[str, Any] = {"head": head, "kernel": kernel, "init": init}
    if bare != "convnet" and parts != {"head": "average", "kernel": 3, "init": "he"}:
        raise ValueError(f"head, kernel and init are settings of convnet: leave them out with {short(name)}.")
    if source == "house":
        build = partial(getattr(families, bare), classes, reads, **given)
        if bare in ("convnet", "vgg"):
            build = partial(build, size, **blocks, **(parts if bare == "convnet" else {}))
        elif not plain:
            raise ValueError(
                f"{bare} takes depth and width only: it always has batch norm and its own pooling. "
                "Leave batch_norm and pooling out, or use convnet or vgg."
            )
        if given:
            _check_size(build, given)
        model = build()
    elif given or not plain:
        raise ValueError(
            f"{name} is built as its library has it: leave depth, width, batch_norm and pooling out. "
            f"They are for {', '.join(MODEL_FAMILIES)}."
        )
    elif source == "torchvision":
        model = _torchvision_model(bare, classes)
    else:
        model = _timm_model(bare, classes, reads)
    _try(model, name, reads, size)
    return model


def _check_size(build: Callable[[], nn.Module], given: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the net would have too many parameters; no memory is taken for them."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build().parameters())
    if count > MOST_PARAMETERS:
        settings = " and ".join(f"{key} {value:g}" for key, value in given.items())
        raise ValueError(
            f"with {settings} the network would have {count:,} parameters; {MOST_PARAMETERS:,} are the most. "
            "Choose a smaller width or depth."
        )


def model_channels(name: str, channels: int) -> int:
    """How many input channels ``build_model(name, channels=channels, …)`` reads.

    torchvision's nets read 3: repeat the channel of grey pictures (``Batches(…, channels=3)``).

    Raises:
        ValueError: an unknown name, or a torchvision net for data of neither 1 nor 3 channels.
    """
    return _channels(*_find(name), channels)


def _find(name: str) -> tuple[str, str]:
    """The source of a net, and its name there: ("house" for regrow, "torchvision" or "timm", name)."""
    prefix, _, bare = name.rpartition(":")
    if name in MODEL_FAMILIES:
        return "house", name
    if prefix in ("", "torchvision") and bare in _torchvision_names():
        return "torchvision", bare
    if prefix in ("", "timm") and _has_timm() and _is_timm(bare):
        return "timm", bare
    if prefix == "timm" and not _has_timm():
        raise ValueError(f"{name} needs timm, which is not installed: pip install 'regrow[timm]'.")
    raise Mistyped(f"unknown model {short(name)}. {_nearest(prefix, bare)}")


def _nearest(prefix: str, bare: str) -> str:
    names = list(MODEL_FAMILIES)
    if prefix != "timm":
        names += _torchvision_names()
    if prefix != "torchvision" and _has_timm():
        import timm

        names += timm.list_models()
    near = difflib.get_close_matches(bare, dict.fromkeys(names), n=4)
    question = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{question}There are {', '.join(MODEL_FAMILIES)}, torchvision:NAME and timm:NAME."


def _has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def _is_timm(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


def _torchvision_names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _channels(source: str, bare: str, channels: int) -> int:
    if source != "torchvision":
        return channels
    if channels not in (1, 3):
        raise ValueError(f"torchvision's {bare} reads 3 channels: the data must have 1 or 3, not {channels}.")
    return 3


def _torchvision_model(name: str, classes: int) -> nn.Module:
    import torchvision

    arguments = _TORCHVISION_ARGUMENTS.get(name, {})
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **arguments)
    return model


def _timm_model(name: str, classes: int, channels: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return model


def _try(model: nn.Module, name: str, channels: int, size: tuple[int, int]) -> None:
    """One forward pass on zeros, in evaluation mode so that running statistics stay as they are."""
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(torch.zeros(1, channels, *size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"a picture of {size[0]}×{size[1]} is too small for {name}, or not the one size it is made for "
            f"({reason}). Use larger pictures, or one of {', '.join(MODEL_FAMILIES)}."
        ) from error
    model.train()
