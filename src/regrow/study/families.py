"""regrow's own nets for small pictures: one function per family, plain modules with readable names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from regrow.study.names import HEADS, INITS, POOLINGS

_VGG_STAGES = {
    7: (2, 2, 2),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_VGG_FILTERS = (64, 128, 256, 512, 512)
_TRUNCATED = 0.04


def convnet(
    classes: int,
    channels: int,
    size: tuple[int, int],
    *,
    depth: int = 3,
    width: float | int = 32,
    batch_norm: bool = True,
    pooling: str = "max",
    head: str = "average",
    kernel: int = 3,
    init: str = "he",
) -> nn.Sequential:
    """RePr's vanilla net Cⁿ(32): ``depth`` convolutions of ``width`` filters, then one linear layer.

    Every block but the last ends in a pool while the picture is at least 4 pixels a side.

    Args:
        classes, channels, size: of the pictures.
        depth, width: convolutions, and filters of each.
        batch_norm: whether a batch norm stands behind each convolution (the paper's net has none).
        pooling: ``"max"`` and ``"avg"`` pool 2×2 pixels, ``"max3"`` 3×3 pixels with stride 2 and padding 1
            (the author's released code), ``"none"`` nothing.
        head: what the linear layer reads: ``"average"`` of each channel's map, or ``"flatten"``, each pixel
            of the last maps (the paper's net).
        kernel: side of the convolutions, an odd number.
        init: first weights: ``"he"`` (convolutions: normal, variance 2 / (filters · kernel²), biases 0),
            ``"torch"`` (as PyTorch makes its layers) or ``"truncated"`` (convolutions and linear layer:
            normal of deviation 0.04, cut at two deviations, biases 0; the author's released code).

    Raises:
        ValueError: a value that is none of these.
    """
    _check_pooling(pooling)
    if depth < 1:
        raise ValueError(f"convnet takes a depth from 1, not {depth}.")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"convnet takes a kernel of an odd number of pixels (1, 3, 5, …), not {kernel}.")
    for name, value, known in (("head", head, HEADS), ("init", init, INITS)):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}.")
    filters = _filters("convnet", width)
    blocks, inputs, sides = [], channels, size
    for layer in range(depth):
        pooled = pooling if layer < depth - 1 and min(sides) >= 4 else "none"
        blocks.append(_block(inputs, filters, batch_norm, pooled, kernel))
        inputs, sides = filters, (_pooled(sides[0], pooled), _pooled(sides[1], pooled))
    features = nn.Sequential(*blocks)
    model = (
        _classifier(features, filters, classes)
        if head == "average"
        else nn.Sequential(
            OrderedDict(
                features=features,
                flatten=nn.Flatten(),
                classifier=nn.Linear(filters * sides[0] * sides[1], classes),
            )
        )
    )
    _start(model, init)
    return model


def vgg(
    classes: int,
    channels: int,
    size: tuple[int, int],
    *,
    depth: int = 16,
    width: float | int = 1.0,
    batch_norm: bool = True,
    pooling: str = "max",
) -> nn.Sequential:
    """VGG for small pictures: five stages of ``width`` × (64 … 512) filters, one linear layer.

    Depth 7 has the first three stages only, of two layers each: for pictures of 14×14 pixels or so. A 2×2
    pool ends each stage while the picture is at least 2 pixels a side.
    """
    _check_pooling(pooling)
    if depth not in _VGG_STAGES:
        raise ValueError(f"vgg takes a depth of {', '.join(map(str, _VGG_STAGES))}, not {depth}.")
    blocks, inputs, side = [], channels, min(size)
    for layers, filters in zip(_VGG_STAGES[depth], _scaled("vgg", _VGG_FILTERS, width), strict=False):
        for layer in range(layers):
            pooled = pooling if layer == layers - 1 and side >= 2 else "none"
            blocks.append(_block(inputs, filters, batch_norm, pooled))
            inputs, side = filters, _pooled(side, pooled)
    return _classifier(nn.Sequential(*blocks), inputs, classes)


def resnet(classes: int, channels: int, *, depth: int = 20, width: float | int = 16) -> nn.Sequential:
    """The CIFAR ResNet of He et al. 2015 (section 4.2): depth 6n+2, ``width`` filters at first.

    Where a stage halves the picture the shortcut is their option B, a 1×1 projection with batch
    norm, not the option A of their CIFAR table, because padding with zero channels leaves nothing to cut.
    So ResNet-20 has 272,474 parameters instead of 269,722.
    """
    if depth not in range(20, 183, 6):
        raise ValueError(f"resnet takes a depth of 6n+2 from 20 to 182 (20, 26, 32, …), not {depth}.")
    first = _filters("resnet", width)
    features: OrderedDict[str, nn.Module] = OrderedDict(
        stem=_block(channels, first, batch_norm=True, pooling="none"),
        stages=_stages(_Residual, (depth - 2) // 6, first, [first, 2 * first, 4 * first]),
    )
    return _classifier(nn.Sequential(features), 4 * first, classes)


def wrn(classes: int, channels: int, *, depth: int = 16, width: float | int = 4) -> nn.Sequential:
    """The wide ResNet of Zagoruyko & Komodakis 2016: depth 6n+4, ``width`` × (16, 32, 64) filters."""
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"wrn takes a depth of 6n+4 from 10 (10, 16, 22, 28, …), not {depth}.")
    filters = _scaled("wrn", (16, 32, 64), width)
    features: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(OrderedDict(conv=_conv(channels, 16))),
        stages=_stages(_PreActivated, (depth - 4) // 6, 16, filters),
        norm=nn.BatchNorm2d(filters[-1]),
        relu=nn.ReLU(),
    )
    return _classifier(nn.Sequential(features), filters[-1], classes)


def densenet(classes: int, channels: int, *, depth: int = 40, width: float | int = 12) -> nn.Sequential:
    """The DenseNet for CIFAR of Huang et al. 2017, without bottlenecks: depth 3n+4, growth ``width``.

    A first convolution of 16 filters, three dense blocks of n layers (norm, ReLU, 3×3 convolution of
    ``width`` filters, whose output is put behind its input), and between them a 1×1 convolution that keeps
    the number of channels and a 2×2 average pool. DenseNet-40 with growth 12 has 1,019,722 parameters for
    ten classes. RePr's paper does not say what its DenseNet-5 is; depth 7, one layer in each block, is the
    shallowest here.
    """
    if depth < 7 or depth % 3 != 1:
        raise ValueError(f"densenet takes a depth of 3n+4 from 7 (7, 10, …, 40, 100), not {depth}.")
    growth, filters = _filters("densenet", width), 16
    features: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(OrderedDict(conv=_conv(channels, filters)))
    )
    for block in range(1, 4):
        layers = [_Dense(filters + growth * layer, growth) for layer in range((depth - 4) // 3)]
        filters += growth * len(layers)
        features[f"block{block}"] = nn.Sequential(*layers)
        if block < 3:
            features[f"transition{block}"] = nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(filters),
                    relu=nn.ReLU(),
                    conv=_conv(filters, filters, kernel=1),
                    pool=nn.AvgPool2d(2),
                )
            )
    features["norm"], features["relu"] = nn.BatchNorm2d(filters), nn.ReLU()
    return _classifier(nn.Sequential(features), filters, classes)


# --- settings -------------------------------------------------------------------------------------


def _check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is one of {', '.join(POOLINGS)}, not {pooling!r}.")


def _filters(family: str, width: float | int) -> int:
    if width < 1 or not float(width).is_integer():
        raise ValueError(f"{family} takes a width that is a number of filters (1, 2, …), not {width}.")
    return int(width)


def _scaled(family: str, filters: tuple[int, ...], width: float | int) -> list[int]:
    if not 0 < width < float("inf"):
        raise ValueError(f"{family} takes a width above 0, which multiplies its filters, not {width}.")
    return [max(1, round(base * width)) for base in filters]


# --- parts ----------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution with He et al.'s first weights: normal, variance 2 / (filters · kernel²); bias 0."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _start(model: nn.Module, init: str) -> None:
    """Draw the first weights of convolutions and linear layers anew, unless ``init`` is "he"."""
    if init == "he":
        return
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if init == "torch":
                layer.reset_parameters()
                continue
            nn.init.trunc_normal_(layer.weight, std=_TRUNCATED, a=-2 * _TRUNCATED, b=2 * _TRUNCATED)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _pooled(side: int, pooling: str) -> int:
    """The side of a map behind the pool, in pixels."""
    return {"none": side, "max3": (side + 1) // 2}.get(pooling, side // 2)


def _pool(pooling: str) -> nn.Module:
    if pooling == "max3":
        return nn.MaxPool2d(3, stride=2, padding=1)
    return nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2)


def _block(inputs: int, outputs: int, batch_norm: bool, pooling: str, kernel: int = 3) -> nn.Sequential:
    conv = _conv(inputs, outputs, kernel, bias=not batch_norm)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if batch_norm:
        layers["norm"] = nn.BatchNorm2d(outputs)
    layers["relu"] = nn.ReLU()
    if pooling != "none":
        layers["pool"] = _pool(pooling)
    return nn.Sequential(layers)


def _classifier(features: nn.Module, filters: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            features=features,
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(filters, classes),
        )
    )


class _Residual(nn.Module):
    """Convolution, norm, ReLU, convolution, norm, plus the shortcut, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = _conv(inputs, outputs, kernel=1, stride=stride)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(outputs)))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class _PreActivated(nn.Module):
    """Norm, ReLU, convolution, norm, ReLU, convolution, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else _conv(inputs, outputs, kernel=1, stride=stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.norm1(x))
        y = self.conv2(self.relu(self.norm2(self.conv1(activated))))
        # As in the authors' code: a projection reads the activated input, the identity the raw one.
        return y + (x if self.shortcut is None else self.shortcut(activated))


class _Dense(nn.Module):
    """Norm, ReLU, convolution; its new channels are put behind the channels of the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = _conv(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], dim=1)


def _stages(
    block: Callable[[int, int, int], nn.Module], blocks: int, inputs: int, filters: list[int]
) -> nn.Sequential:
    """One stage of ``blocks`` per entry of ``filters``; every stage but the first halves the picture."""
    stages = []
    for stage, outputs in enumerate(filters):
        members = []
        for index in range(blocks):
            members.append(block(inputs, outputs, 2 if stage > 0 and index == 0 else 1))
            inputs = outputs
        stages.append(nn.Sequential(*members))
    return nn.Sequential(*stages)
