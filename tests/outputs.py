"""Networks that hand out what they compute in every form, drawn at random from a seed."""

import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = namedtuple("Pair", "logits features")


@dataclass
class Record:
    logits: Any
    label: str = "a"


class Thing:
    def __init__(self, logits):
        self.logits = logits
        self.me = self  # an object may refer to itself


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


def in_object(_net, y):
    return Thing(y)


def as_attribute(net, y):
    net.last = y


def in_list_of_the_model(net, y):
    net.seen = [y]
    return y.mean()


def in_generator(_net, y):
    return (part for part in [y])


def read_as_numbers(_net, y):
    return y.flatten().tolist()


# Each hands out the tensor y, which carries the network's outputs in dimension 1.
KINDS = {
    "tensor": lambda _, y: y,
    "tuple": lambda _, y: (y, None),
    "list": lambda _, y: [[y]],
    "dict": lambda _, y: {"out": y},
    "ordered dict": lambda _, y: OrderedDict(out=y),
    "named tuple": lambda _, y: Pair(y, 1),
    "dataclass": lambda _, y: Record(y),
    "object": in_object,
    "slots": lambda _, y: Slotted(y),
    "set": lambda _, y: {y},
    "generator": in_generator,
    "iterator": lambda _, y: iter([y]),
    "map": lambda _, y: map(torch.relu, [y]),
    "nested": lambda _, y: {"a": [Record((y, Thing(2)))]},
    "detached": lambda _, y: y.detach(),
    "data": lambda _, y: y.data,
    "argmax": lambda _, y: y.argmax(1),
    "top": lambda _, y: y.topk(2, 1)[1],
    "mask": lambda _, y: y > 0,
    "rounded": lambda _, y: y.round().long(),
    "one hot": lambda _, y: F.one_hot(y.argmax(1), y.shape[1]),
    "softmax": lambda _, y: y.softmax(1),
    "numpy": lambda _, y: y.detach().numpy(),
    "numpy copy": lambda _, y: y.detach().numpy().copy(),
    "array": lambda _, y: y.detach().__array__() + 1,
    "numbers": read_as_numbers,
    "item": lambda _, y: [y[0, i].mean().item() for i in range(y.shape[1])],
    "text": lambda _, y: f"{y.detach()}",
    "sentence": lambda _, y: "yes" if y.mean() > 0 else "no",
    "attribute": as_attribute,
    "list of the model": in_list_of_the_model,
    "half seen": lambda _, y: {"seg": y.argmax(1), "depth": y[:, :1].mean()},
    "added in place": lambda _, y: torch.zeros_like(y).add_(y),
    "written": lambda _, y: y.new_zeros(y.shape[0], y.shape[1] + 1, *y.shape[2:]).index_copy_(
        1, torch.arange(y.shape[1], device=y.device), y
    ),
    "sliced in": lambda _, y: _written_to_a_slice(y),
    "clamped mean": lambda _, y: y.flatten(2).mean(2).clamp(0, 1),
    "sparse": lambda _, y: y.flatten(2).mean(2).to_sparse(),
    "bytes": lambda _, y: y.detach().numpy().tobytes(),
}


def _written_to_a_slice(y):
    room = y.new_zeros(y.shape[0], 2 * y.shape[1], *y.shape[2:])
    room[:, y.shape[1] :] = y
    return room


# Each runs the network's code in another state of autograd.
STATES = {
    "plain": lambda _: torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad(),
    "no grad": lambda _: torch.no_grad(),
    "grad in training": lambda net: torch.set_grad_enabled(net.training),
    "inference in eval": lambda net: torch.inference_mode(not net.training),
    "grad": lambda _: torch.enable_grad(),
}


class RandomNet(nn.Module):
    """A random network of a few blocks whose heads make outputs of the kind ``kind``.

    ``heads``: the layers whose filters are the network's outputs.
    """

    def __init__(self, seed: int, kind: str, state: str = "plain"):
        super().__init__()
        draw = random.Random(seed)
        self.kind, self.state = kind, state
        self.norms = draw.random() < 0.5
        width = draw.choice([4, 6, 8])
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        self.plan = []
        for _ in range(draw.randint(1, 3)):
            what = draw.choice(["chain", "residual", "cat", "gate", "depthwise", "split"])
            self.plan.append(what)
            block = nn.ModuleDict()
            if what == "residual":
                block["a"], block["b"] = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
                out = width
            elif what == "cat":
                block["a"], block["b"] = nn.Conv2d(width, 4, 3, padding=1), nn.Conv2d(width, 3, 1)
                out = 7 + width
            elif what == "gate":
                block["a"], block["b"] = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)
                out = width
            elif what == "depthwise":
                block["a"] = nn.Conv2d(width, width, 3, padding=1, groups=width)
                block["b"] = nn.Conv2d(width, 6, 1)
                out = 6
            elif what == "split":
                block["a"] = nn.Conv2d(width, 8, 1)
                block["b"] = nn.Conv2d(4, 4, 3, padding=1)
                out = 8
            else:
                block["a"] = nn.Conv2d(width, out := draw.choice([4, 8]), 3, padding=1)
            if self.norms:
                block["n"] = nn.BatchNorm2d(out)
            self.blocks.append(block)
            width = out
        self.ending = draw.choice(["head", "two heads", "sum of heads", "norm behind", "pooled", "depthwise"])
        self.head = nn.Conv2d(width, 5, 1)
        self.heads = {"head"}
        if self.ending in ("two heads", "sum of heads"):
            self.other = nn.Conv2d(width, 5, 3, padding=1)
            self.heads.add("other")
        if self.ending == "norm behind":
            self.last_norm = nn.BatchNorm2d(5)
        if self.ending == "depthwise":
            self.other = nn.Conv2d(5, 5, 3, padding=1, groups=5)
            self.heads.add("other")

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for what, block in zip(self.plan, self.blocks, strict=True):
            y = block["a"](x)
            if what == "residual":
                y = x + block["b"](F.relu(y))
            elif what == "cat":
                y = torch.cat([y, block["b"](x), x], 1)
            elif what == "gate":
                y = x * block["b"](F.relu(y).mean((2, 3), keepdim=True)).sigmoid()
            elif what == "depthwise":
                y = block["b"](F.relu(y))
            elif what == "split":
                one, two = y.split((4, 4), 1)
                y = torch.cat([one, block["b"](F.relu(two))], 1)
            x = F.relu(block["n"](y) if self.norms else y)
        return x

    def forward(self, x: Tensor) -> Any:
        with STATES[self.state](self):
            x = self.features(x)
            y = self.head(x)
            if self.ending == "two heads":
                return {"one": KINDS[self.kind](self, y), "other": self.other(x)}
            if self.ending == "sum of heads":
                y = y + self.other(x)
            elif self.ending == "norm behind":
                y = self.last_norm(y)
            elif self.ending == "pooled":
                y = F.adaptive_avg_pool2d(y, 1)
            elif self.ending == "depthwise":
                y = self.other(y)
            return KINDS[self.kind](self, y)
