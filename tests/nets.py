"""The networks that several test files work on, and the masks and values that they give them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def chain(
    filters: tuple[int, ...] = (6, 8, 8),
    *,
    dim: int = 2,
    norm: Callable[[int], nn.Module] | None = None,
    bias: bool = True,
    kernel: int = 3,
) -> nn.Sequential:
    """conv1, norm1, relu1, conv2, … pool, flatten, head (4 classes), for pictures of 3 channels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, width in enumerate(filters, 1):
        layers[f"conv{i}"] = _CONVS[dim](channels, width, kernel, padding=kernel // 2, bias=bias)
        layers[f"norm{i}"] = (norm or _BATCH_NORMS[dim])(width)
        layers[f"relu{i}"] = nn.ReLU()
        channels = width
    layers["pool"], layers["flatten"] = _POOLS[dim](1), nn.Flatten()
    layers["head"] = nn.Linear(channels, 4)
    return nn.Sequential(layers)


def conv(channels: int, filters: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    """A convolution that keeps the size of its pictures."""
    return nn.Conv2d(channels, filters, kernel, padding=kernel // 2, **settings)


def head(channels: int) -> nn.Sequential:
    """A pooling, a flattening and a linear layer for 4 classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


class Drawn(nn.Module):
    """A net drawn by hand: a function of (modules, x) and the modules by name."""

    def __init__(self, draw: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._draw = draw
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self._draw(self, x)


class Residual(nn.Module):
    """A stem of ``width`` filters and one block, a (``inner`` filters) and b, that is added to what it reads.

    The norms stand behind the convolutions, the last one before the sum; ``normed=False`` leaves them out.
    """

    def __init__(self, width: int, inner: int, *, normed: bool = True, stem_bias: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if normed else nn.Identity
        self.stem, self.norm = conv(3, width, bias=stem_bias), norm(width)
        self.a, self.norm_a = conv(width, inner), norm(inner)
        self.b, self.norm_b = conv(inner, width), norm(width)
        self.head = head(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))))


class Ahead(nn.Module):
    """A stream with norms ahead of the convolutions, the shortcut of the last block behind its norm.

    ``shift`` is added to the stream beside the first block.
    """

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), conv(4, 4)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), conv(4, 4)
        self.norm3, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x))) + self.shift
        y = F.relu(self.norm2(x))
        return self.head(F.relu(self.norm3(y + self.conv2(y))).mean((2, 3)))


class Standardised(nn.Conv2d):
    """Each filter scaled to mean 0 and variance 1, as in networks without norms."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-5).sqrt()
        return self._conv_forward(x, flat.view_as(self.weight), self.bias)


class UNet(nn.Module):
    """Two halvings and two transposed convolutions, with concatenations; scores of 2 classes a pixel.

    Args:
        sized: the transposed convolutions are told the size of the picture that theirs is put beside: the
            first by keyword, with batch and channels, the second by position, without them.
    """

    def __init__(self, *, sized: bool = False) -> None:
        super().__init__()
        self.sized = sized
        self.down1, self.norm1 = conv(3, 6), nn.BatchNorm2d(6)
        self.down2, self.norm2 = conv(6, 8), nn.BatchNorm2d(8)
        self.middle, self.norm3 = conv(8, 10), nn.BatchNorm2d(10)
        self.up2, self.up1 = nn.ConvTranspose2d(10, 8, 2, 2), nn.ConvTranspose2d(7, 6, 2, 2)
        self.join2, self.join1, self.out = conv(16, 7), conv(12, 5), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm1(self.down1(x)))
        b = F.relu(self.norm2(self.down2(F.max_pool2d(a, 2))))
        x = F.relu(self.norm3(self.middle(F.max_pool2d(b, 2))))
        x = self.up2(x, output_size=b.size()) if self.sized else self.up2(x)
        x = F.relu(self.join2(torch.cat([x, b], 1)))
        x = self.up1(x, a.shape[2:]) if self.sized else self.up1(x)
        return self.out(F.relu(self.join1(torch.cat([x, a], 1))))


class Scores(nn.Module):
    """Two scales of class scores, added and scaled up by fixed depthwise weights, as in FCN heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 7, 3, 2, 1)
        self.score_a, self.score_b = nn.Conv2d(6, 4, 1), nn.Conv2d(7, 4, 1)
        self.up_b = nn.ConvTranspose2d(4, 4, 4, 2, 1, bias=False)
        self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4, bias=False).requires_grad_(False)
        side = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            self.up_b.weight.zero_()
            self.up_b.weight[range(4), range(4)] = side[:, None] * side
            self.up.weight.copy_((side[:, None] * side).expand(4, 1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        return self.up(self.up_b(self.score_b(F.relu(self.b(a)))) + self.score_a(a))


def _up(channels: int, filters: int, dim: int = 2, **settings: Any) -> nn.Module:
    """A transposed convolution that doubles the sides of its pictures."""
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    return kind(channels, filters, **{"kernel_size": 4, "stride": 2, "padding": 1, **settings})


def _generator() -> nn.Module:
    """As DCGAN's: from a latent vector to a picture."""
    return nn.Sequential(
        nn.ConvTranspose2d(6, 12, 4, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        _up(12, 8, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), _up(8, 3, bias=False), nn.Tanh(),
    )  # fmt: skip


def _autoencoder(act: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), act or nn.PReLU(6),
        nn.ConvTranspose2d(6, 1, 3, 2, 1, output_padding=1), nn.Sigmoid(),
    )  # fmt: skip


def _latent() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8 * 9), nn.Unflatten(1, (8, 3, 3)), _up(8, 6), nn.InstanceNorm2d(6, affine=True),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 5, (3, 2), (1, 2), (2, 0), output_padding=(0, 1), dilation=(2, 1)),
        nn.SiLU(), conv(5, 2),
    )  # fmt: skip


def _audio() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 8, 7, padding=3), nn.ELU(), _up(8, 6, 1), nn.ELU(),
        _up(6, 4, 1, kernel_size=8, stride=4),
        nn.GroupNorm(2, 4), nn.ELU(), nn.Conv1d(4, 1, 7, padding=3), nn.Tanh(),
    )  # fmt: skip


def _volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), _up(4, 5, 3, bias=False),
        nn.BatchNorm3d(5), nn.ReLU(), nn.ConvTranspose3d(5, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1),
    )  # fmt: skip


def _summed() -> nn.Module:
    return Drawn(
        lambda s, x: s.out(F.relu(s.norm_a(s.a(x)) + s.norm_b(s.b(F.relu(s.stem(x)))))),
        stem=conv(3, 6), a=nn.ConvTranspose2d(3, 8, 2, 2), norm_a=nn.BatchNorm2d(8), b=_up(6, 8),
        norm_b=nn.BatchNorm2d(8), out=nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def _depthwise() -> nn.Module:
    """Depthwise layers that double sides; the second makes two channels of each."""
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), _up(8, 8, groups=8, bias=False), nn.ReLU(), conv(8, 6),
        nn.ReLU(), nn.ConvTranspose2d(6, 12, 2, 2, groups=6), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 2, 1),
    )  # fmt: skip


def _grouped() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), _up(8, 12, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 2, 1),
    )  # fmt: skip


# Nets with transposed convolutions: name → (how to build it, the shape of its input).
DECODERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "u-net": (UNet, (2, 3, 8, 8)),
    "u-net of odd sizes": (lambda: UNet(sized=True), (2, 3, 9, 11)),
    "u-net, channels last": (lambda: UNet().to(memory_format=torch.channels_last), (2, 3, 8, 8)),
    "generator": (_generator, (3, 6, 1, 1)),
    "autoencoder": (_autoencoder, (2, 1, 8, 8)),
    "autoencoder, one picture": (lambda: _autoencoder(nn.ReLU()), (1, 8, 8)),
    "from a vector": (_latent, (3, 5)),
    "audio": (_audio, (2, 2, 9)),
    "volume": (_volume, (2, 2, 3, 4, 3)),
    "sum": (_summed, (2, 3, 6, 6)),
    "class scores": (Scores, (2, 3, 8, 8)),
    "depthwise": (_depthwise, (2, 3, 5, 5)),
    "grouped": (_grouped, (2, 3, 5, 5)),
}


def decoder(name: str) -> tuple[nn.Module, Tensor]:
    """One of ``DECODERS`` in double precision, settled as after training, and an input of it."""
    build, shape = DECODERS[name]
    torch.manual_seed(0)
    return unsettled(build()).double(), torch.randn(shape, dtype=torch.float64)


class FullyShardedDataParallel(nn.Sequential):
    """A wrapper that is known by its name alone, as that of PyTorch is."""


def keep_but(filters: int, *dropped: int) -> Tensor:
    """The mask of ``filters`` filters that keeps all but those ``dropped``."""
    keep = torch.ones(filters, dtype=torch.bool)
    keep[list(dropped)] = False
    return keep


def unsettled(net: nn.Module, lowest_bias: float = -0.5) -> nn.Module:
    """``net`` in eval mode with norms as after training: no weight, bias or statistic at 0 or 1."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, lowest_bias, 0.5)
            if getattr(module, "running_mean", None) is not None:
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def away_from_zero(net: nn.Module) -> nn.Module:
    """``net`` with every norm and bias at values that a dropped filter must not pass on."""
    with torch.no_grad():
        for module in net.modules():
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and tensor.dim() == 1:
                    tensor.uniform_(0.5, 1.5)
    return net
