"""Settings under one name: the presets, and the names of RePr's plain nets. Imports no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from regrow.short import short
from regrow.suggest import nearest

# Arguments that both presets share: plain SGD, no regularisation, and what reads a restored filter is kept.
_PLAIN: dict[str, Any] = {
    "augmentation": "none",
    "batch_size": 64,
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "criterion": "ortho",
    "consumers": "keep",
    "scope": "global",
}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # As the paper says (arXiv 1811.07275). It leaves open the batch size, momentum, weight decay,
        # augmentation and pooling (here as in its author's code, but no pooling), and the readers (kept).
        "paper": {
            **_PLAIN,
            "epochs": 100,
            "lr": 0.01,
            "schedule": "constant",
            "fraction": 0.3,
            "full": 20,
            "sub": 10,
            "cycles": 3,
            "skip_first": True,
        },
        # As its author's released code. Nine changes between the whole net and a part of it fit into 199
        # epochs at 20 epochs each; the last drop would have no epoch behind it, so four cycles are left.
        "author": {
            **_PLAIN,
            "epochs": 199,
            "lr": 0.05,
            "schedule": "halving",
            "halve_every": 25_000,
            "fraction": 0.5,
            "full": 20,
            "sub": 20,
            "cycles": 4,
            "skip_first": False,
        },
    }
)
# Of the net, if it is convnet: the other nets have no such settings.
_CONVNET: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {"batch_norm": False, "pooling": "none", "head": "flatten"},
        "author": {
            "batch_norm": False,
            "pooling": "max3",
            "head": "flatten",
            "kernel": 5,
            "init": "truncated",
        },
    }
)
_PLAIN_NET = re.compile(r"c(\d{1,3})(?:\((\d{1,5})\))?", re.IGNORECASE)


def with_names_resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with the preset and the name of a plain net replaced by what they stand for.

    ``preset: paper`` and ``preset: author`` give every setting that is not there a value. The model ``c8``
    or ``C8(32)`` is the paper's net of eight convolutions of 32 filters: ``convnet`` without batch norm and
    pooling, whose linear layer reads every pixel. What ``settings`` say goes first, then the preset, then
    the name of the net.

    Raises:
        ValueError: an unknown preset, or a name such as C8(32) beside another depth or width.
    """
    resolved = {key: value for key, value in settings.items() if key != "preset"}
    named = _plain_net(resolved)
    preset = settings.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset: unknown {short(preset)}{nearest(str(preset), PRESETS)}")
        resolved = {**PRESETS[preset], **resolved}
        if resolved.get("model", "convnet") == "convnet" or named:
            resolved = {**_CONVNET[preset], **resolved}
    return {**named, **resolved, **({"model": "convnet"} if named else {})}


def net_of(name: str) -> str:
    """The model that ``name`` stands for: ``convnet`` for ``c8``, and otherwise the name itself."""
    return "convnet" if _PLAIN_NET.fullmatch(name) else name


def _plain_net(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a name such as C8(32) stands for; none for another name."""
    name = settings.get("model")
    found = _PLAIN_NET.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        return {}
    said = {"depth": int(found[1]), "width": float(found[2] or 32)}
    for key, value in said.items():
        given = settings.get(key)
        if given is not None and given != value and (key == "depth" or found[2]):
            raise ValueError(f"{name} has a {key} of {value:g}: leave {key} out, or use the model convnet.")
    return {"model": "convnet", **said, **_CONVNET["paper"]}
