"""Networks whose own code opens autocast, in the ways that people write it, around a net that does not."""

import functools
import types

import torch
from torch import Tensor, nn

from nets import chain, unsettled

HALVES = (torch.bfloat16, torch.float16)


class Inside(nn.Module):
    """A block in the forward method."""

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.net(x).float()


class Decorated(nn.Module):
    """The decorator; the output stays in half precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Nested(nn.Module):
    """A block with a block without autocast in it, and a tensor that is cast by hand."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.net[:6](x.to(torch.get_autocast_dtype("cpu")))
            with torch.autocast("cpu", enabled=False):
                x = self.net[6:9](x.float())
            return self.net[9:](x)


class InPart(nn.Module):
    """A block in one submodule alone."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        self.part = Inside(net[3:6])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[6:](self.part(self.net[:3](x)))


def to_float32(function):
    @functools.wraps(function)
    def convert(*args):
        return function(*args).float()

    return convert


def wrapped(net: nn.Module) -> nn.Module:
    """The decorator on the bound method of one object."""
    net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)
    return net


def prepared(net: nn.Module) -> nn.Module:
    """As Accelerate's ``prepare`` with mixed precision: two wrappers around the function, bound anew."""
    function = torch.autocast("cpu", torch.bfloat16)(net.forward.__func__)
    net.forward = types.MethodType(function, net)
    net.forward = types.MethodType(to_float32(net.forward.__func__), net)
    return net


class _ToFloat32:
    def __init__(self, function):
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args):
        return self.function(*args).float()

    def __getstate__(self):
        raise TypeError("prepared for mixed precision, and not to be copied")  # as Accelerate's


def prepared_twice(net: nn.Module) -> nn.Module:
    """As Accelerate prepares a forward method that is no method any more: by objects and closures."""
    convert = _ToFloat32(torch.autocast("cpu", torch.bfloat16)(net.forward))

    def forward(*args):
        return convert(*args)

    forward.__wrapped__ = convert
    net.forward = forward
    return net


# name → (what opens autocast around a ``nets.chain``, the prefix of the names of the chain's layers)
FORMS = {
    "inside": (Inside, "net."),
    "float16": (functools.partial(Inside, dtype=torch.float16), "net."),
    "decorated": (Decorated, "net."),
    "nested": (Nested, "net."),
    "in a part": (InPart, "net."),
    "wrapped": (wrapped, ""),
    "prepared": (prepared, ""),
    "prepared twice": (prepared_twice, ""),
}


def pair(form: str) -> tuple[nn.Module, nn.Module, str]:
    """A net, the same with autocast in its forward method, and the prefix of its layers' names there."""
    make, prefix = FORMS[form]
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(unsettled(chain()))
    return nets[0], make(nets[1]), prefix
