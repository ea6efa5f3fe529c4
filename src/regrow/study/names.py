"""The names of data, models and settings that make up a study. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

DATA_NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")
AUGMENTATIONS = ("none", "shift", "flip", "shift-flip")
MODEL_FAMILIES = ("convnet", "vgg", "resnet", "wrn", "densenet")
POOLINGS = ("max", "avg", "max3", "none")
HEADS = ("average", "flatten")
INITS = ("he", "torch", "truncated")
# Names that the papers use.
METHOD_ALIASES = {"backprop": "standard"}
PRECISION_ALIASES = {"bf16": "bfloat16"}
# Methods that act where a round begins, and into how many generations they divide the epochs of each task by
# themselves: with a single task, and with several.
DEFAULT_GENERATIONS = {
    "ban": (3, 3),
    "knowledge-evolution": (3, 1),
    "later-layer-forgetting": (3, 1),
    "shrink-and-perturb": (3, 1),
    "shrink-and-perturb+new-head": (3, 1),
    **dict.fromkeys(("restart", "new-head", "last-layers", "from-scratch", "redo"), (1, 1)),
    **dict.fromkeys(("continual-backprop+new-head", "restart+new-head", "redo+new-head"), (1, 1)),
    **dict.fromkeys(("restart+last-layers", "restart+shrink-and-perturb+new-head"), (1, 1)),
}
# Settings in which a run may differ and still be the same run: where it ran and where its data lay.
WHERE = frozenset({"device", "threads", "data_dir"})


def unjoined(methods: Iterable[str]) -> list[str]:
    """``methods`` without those that join others, such as "repr+distillation"; all, if there is no other."""
    every = list(methods)
    return [method for method in every if "+" not in method] or every
