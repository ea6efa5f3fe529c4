"""The names of data, models and settings that make up a study. Imports no PyTorch."""

from __future__ import annotations

DATA_NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")
AUGMENTATIONS = ("none", "shift", "flip", "shift-flip")
MODEL_FAMILIES = ("convnet", "vgg", "resnet", "wrn", "densenet")
POOLINGS = ("max", "avg", "max3", "none")
HEADS = ("average", "flatten")
INITS = ("he", "torch", "truncated")
# Names that the papers use.
METHOD_ALIASES = {"backprop": "standard"}
PRECISION_ALIASES = {"bf16": "bfloat16"}
# Settings in which a run may differ and still be the same run: where it ran and where its data lay.
WHERE = frozenset({"device", "threads", "data_dir"})
