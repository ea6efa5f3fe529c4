"""A tiny ResNet of transformers with random weights, and pictures for it."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification

X = torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def resnet() -> ResNetForImageClassification:
    shape = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    # A Trainer orders its pictures by the seed that was set last.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, **shape))
