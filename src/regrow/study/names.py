"""The names a study is put together from, importable without PyTorch."""

from __future__ import annotations

DATA_NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")
AUGMENTATIONS = ("none", "shift", "flip", "shift-flip")
MODEL_FAMILIES = ("convnet", "vgg", "resnet", "wrn")
POOLINGS = ("max", "avg", "none")
# What the papers call them.
METHOD_ALIASES = {"backprop": "standard"}
