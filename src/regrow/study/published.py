"""Published accuracies beside those measured here: RePr's paper, by data, net and method. Imports no PyTorch.

``published.json`` holds the numbers and their source.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from regrow.study.presets import PRESETS

# The paper's names of nets: model, depth and width. Its DenseNet-5 cannot be built here.
_NETS = {
    **{f"C{depth}(32)": ("convnet", depth, 32) for depth in (3, 8, 13, 18)},
    **{f"ResNet-{depth}": ("resnet", depth, 16) for depth in (20, 32, 110, 182)},
    **{f"DenseNet-{depth}": ("densenet", depth, 12) for depth in (40, 100)},
}
# Depth and width that a model has where the settings give none.
_DEFAULTS = {"convnet": (3, 32), "resnet": (20, 16), "densenet": (40, 12)}
# Settings that a run must have, and what an older record without them means. All pictures, in one task:
_WHOLE = {"train_size": (None, None), "label_noise": (0, 0), "image_size": (None, None), "tasks": (1, 1)}
# The paper's plain net has no batch norm. The paper does not say whether it has pooling.
_OF_CONVNET = {"batch_norm": (False, True), "head": ("flatten", "average")}
# Shares of the filters that RePr drops in the paper, and in its author's code.
_FRACTIONS = tuple(preset["fraction"] for preset in PRESETS.values())


def source() -> str:
    """The paper that the numbers are from."""
    return str(_published()["source"])


def published_accuracy(config: Mapping[str, Any]) -> float | None:
    """The published test accuracy, a fraction, of the run with these settings; None if there is none.

    A run matches a row of the paper's tables by its data, net, method and criterion, if it has all pictures
    of CIFAR-10 or CIFAR-100; the plain net must have no batch norm and a linear layer that reads every pixel,
    and RePr must drop the share of filters that it drops in the paper or in its author's code. The paper
    leaves most other settings open, so they do not decide.

    Args:
        config: settings, as in a run's ``config.yaml``.
    """
    rules = {**_WHOLE, **(_OF_CONVNET if config.get("model") == "convnet" else {})}
    if any(config.get(key, missing) != wanted for key, (wanted, missing) in rules.items()):
        return None
    depth, width = _DEFAULTS.get(str(config.get("model")), (None, None))
    net = config.get("model"), config.get("depth") or depth, config.get("width") or width
    method = str(config.get("method"))
    criterion = None
    if "repr" in method.split("+"):
        criterion = config.get("criterion")
        if config.get("fraction") not in _FRACTIONS:
            return None
    for row in _published()["rows"]:
        if (row["data"], row["method"], row.get("criterion")) != (config.get("data"), method, criterion):
            continue
        if _NETS.get(row["net"]) == net:
            return round(float(row["accuracy"]) / 100, 6)
    return None


@functools.cache
def _published() -> dict[str, Any]:
    text = resources.files("regrow.study").joinpath("published.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
