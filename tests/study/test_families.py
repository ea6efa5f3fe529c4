import math

import pytest
import torch
from torch import nn

from regrow.study.families import _PreActivated, _Residual, convnet, resnet, vgg, wrn


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def pools(model: nn.Module) -> int:
    return sum(isinstance(module, nn.MaxPool2d | nn.AvgPool2d) for module in model.modules())


def test_convnet_by_hand() -> None:
    model = convnet(10, 1, (8, 8))
    # 3 convolutions of 32 filters (9·1 and twice 9·32 weights each), 3 × 2 · 32 batch norm, 32 · 10 + 10.
    assert parameters(model) == 32 * (9 + 288 + 288) + 3 * 64 + 330
    assert parameters(convnet(10, 1, (8, 8), batch_norm=False)) == 32 * (9 + 288 + 288) + 3 * 32 + 330
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_convnet_names() -> None:
    names = [name for name, _ in convnet(10, 1, (8, 8), depth=2).named_parameters()]
    assert names == [
        "features.0.conv.weight",
        "features.0.norm.weight",
        "features.0.norm.bias",
        "features.1.conv.weight",
        "features.1.norm.weight",
        "features.1.norm.bias",
        "classifier.weight",
        "classifier.bias",
    ]


@pytest.mark.parametrize(
    ("side", "depth", "pooling", "final"),
    # The last block is never pooled, and no picture below 4 pixels is: 8 → 4 → 2, and there it stays.
    [
        (32, 3, "max", 8),
        (8, 3, "avg", 2),
        (8, 6, "max", 2),
        (28, 6, "max", 3),
        (8, 3, "none", 8),
        (3, 3, "max", 3),
    ],
)
def test_convnet_pooling(side: int, depth: int, pooling: str, final: int) -> None:
    model = convnet(10, 1, (side, side), depth=depth, pooling=pooling)
    assert model.features(torch.zeros(1, 1, side, side)).shape[2:] == (final, final)
    kind = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}.get(pooling)
    assert all(isinstance(module, kind) for name, module in model.named_modules() if name.endswith("pool"))


def test_vgg_counts() -> None:
    # The usual CIFAR form has 14,728,266 with the 4,224 convolution biases that batch norm makes idle.
    assert parameters(vgg(10, 3, (32, 32))) == 14_728_266 - 4_224
    convolutions = {
        depth: sum(isinstance(m, nn.Conv2d) for m in vgg(10, 3, (32, 32), depth=depth, width=0.1).modules())
        for depth in (11, 13, 16, 19)
    }
    assert convolutions == {11: 8, 13: 10, 16: 13, 19: 16}  # and the published three linear layers


def test_the_shallow_vgg_has_three_stages() -> None:
    model = vgg(10, 1, (14, 14), depth=7, width=0.5)
    filters = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert filters == [32, 32, 64, 64, 128, 128]
    assert model(torch.zeros(2, 1, 14, 14)).shape == (2, 10)


def test_vgg_width_and_pools() -> None:
    model = vgg(10, 3, (32, 32), depth=11, width=0.25)
    filters = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert filters == [16, 32, 64, 64, 128, 128, 128, 128]
    assert [pools(vgg(10, 1, (s, s), depth=11, width=0.1)) for s in (32, 28, 8, 1)] == [5, 4, 3, 0]
    assert vgg(10, 1, (28, 28), depth=11, width=0.1)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_resnet_counts() -> None:
    # The paper's 269,722 (option A), and two projections with batch norm: 16·32 + 64, 32·64 + 128.
    assert parameters(resnet(10, 3)) == 269_722 + 576 + 2_176
    convolutions = [m for m in resnet(10, 3, depth=32).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 31 + 2  # 32 layers with the linear one; two projections besides


def test_resnet_halves_the_picture_twice() -> None:
    model = resnet(10, 3, width=4)
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 8, 8)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_wrn_counts() -> None:
    # Published: WRN-16-4 2.7 M, WRN-40-4 8.9 M.
    assert parameters(wrn(10, 3)) == 2_748_890
    assert parameters(wrn(10, 3, depth=40)) == 8_949_210
    assert wrn(10, 3, depth=10, width=1)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_residual_block() -> None:
    block = _Residual(2, 2, stride=1)
    nn.init.zeros_(block.norm2.weight)  # nothing but the shortcut is left
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(block(x), x.relu())
    projected = _Residual(2, 4, stride=2)
    nn.init.zeros_(projected.norm2.weight)
    torch.testing.assert_close(projected(x), projected.shortcut(x).relu())


def test_pre_activated_block() -> None:
    x = torch.randn(3, 2, 6, 6)
    block = _PreActivated(2, 2, stride=1)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)
    projected = _PreActivated(2, 4, stride=2)
    nn.init.zeros_(projected.conv2.weight)
    assert projected.shortcut is not None
    torch.testing.assert_close(projected(x), projected.shortcut(projected.norm1(x).relu()))


def test_he_start() -> None:
    torch.manual_seed(0)
    conv = convnet(10, 64, (8, 8), depth=1, width=128, batch_norm=False).features[0].conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.01)
    assert conv.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: convnet(10, 1, (8, 8), depth=0), "convnet takes a depth from 1, not 0"),
        (lambda: convnet(10, 1, (8, 8), width=0.5), "number of filters"),
        (lambda: convnet(10, 1, (8, 8), pooling="mean"), "pooling is one of max, avg, none"),
        (lambda: vgg(10, 1, (8, 8), depth=12), "vgg takes a depth of 7, 11, 13, 16, 19, not 12"),
        (lambda: vgg(10, 1, (8, 8), width=0), "vgg takes a width above 0"),
        (lambda: vgg(10, 1, (8, 8), pooling="mean"), "pooling is one of"),
        (lambda: resnet(10, 1, depth=18), "resnet takes a depth of 6n.2 from 20 to 110"),
        (lambda: resnet(10, 1, depth=116), "resnet takes a depth"),
        (lambda: resnet(10, 1, width=1.5), "number of filters"),
        (lambda: wrn(10, 1, depth=4), "wrn takes a depth of 6n.4 from 10"),
        (lambda: wrn(10, 1, depth=20), "wrn takes a depth"),
        (lambda: wrn(10, 1, width=float("nan")), "wrn takes a width above 0"),
    ],
)
def test_bad_settings_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
