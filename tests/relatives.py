"""What the tests of restarts share: a net, a step of training, optimizers with memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}


def net() -> nn.Sequential:
    """conv1, norm1, conv2 (no norm), a hidden linear layer with a norm, and the head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Linear(5, 3),
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, x: Tensor = X) -> None:
    """Some steps of training towards fixed numbers."""
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(x).sub(1).square().mean().backward()
        optimizer.step()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
