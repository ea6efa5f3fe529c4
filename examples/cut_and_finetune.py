"""Cut a small ResNet to half of its multiply-accumulates, and train it on: at once, or in three steps.

Usage: python cut_and_finetune.py [SEED]
"""

import copy
import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import regrow

EPOCHS, FINE_TUNING = 15, 2  # the epochs of fine-tuning are for all steps together
RATE, FINE_RATE = 0.1, 0.03


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def make() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16),
        Block(16, 32, stride=2), Block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: float, rate: float) -> None:
    """Train with a new optimizer, for parts of an epoch too, at a rate that falls from ``rate`` to 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps, done = round(epochs * len(images) / 64), 0
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    while done < steps:
        for chosen in torch.randperm(len(images)).split(64)[: steps - done]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            falling.step()
            done += 1


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    known, unseen = order[:1300], order[1300:]
    pictures, test = (images[known], labels[known]), (images[unseen], labels[unseen])

    def cut(model: nn.Module, share: float, compensate: bool = True) -> None:
        given = [pictures[0][:512]] if compensate else None
        regrow.prune(model, macs=share, example_inputs=images[:1], calibration=given, compensate=compensate)

    def show(name: str, model: nn.Module) -> None:
        left = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:<47} {left:>10,} {accuracy(model, *test):>13.2%}")

    uncut = make()
    train(uncut, *pictures, EPOCHS, RATE)
    print(f"{'':<47} {'parameters':>10} {'test accuracy':>13}")
    show("uncut", uncut)

    plain = copy.deepcopy(uncut)
    cut(plain, 0.5, compensate=False)
    show("half of the MACs at once", plain)
    train(plain, *pictures, FINE_TUNING, FINE_RATE)
    show(f"  and {FINE_TUNING} epochs", plain)

    once = copy.deepcopy(uncut)
    cut(once, 0.5)
    show("half of the MACs at once, reconstructed", once)
    train(once, *pictures, FINE_TUNING, FINE_RATE)
    show(f"  and {FINE_TUNING} epochs", once)

    steps = copy.deepcopy(uncut)
    for _ in range(3):
        cut(steps, 0.5 ** (1 / 3))  # of what the network has by then
        train(steps, *pictures, FINE_TUNING / 3, FINE_RATE)
    show(f"in three steps, reconstructed, {FINE_TUNING} epochs in all", steps)


if __name__ == "__main__":
    main()
