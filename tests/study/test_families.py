import math

import pytest
import torch
from torch import nn

from regrow.study.families import _Dense, _PreActivated, _Residual, convnet, densenet, resnet, vgg, wrn


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
        (32, 3, "max3", 8),
        (15, 6, "max3", 2),  # 15 → 8 → 4 → 2: a pixel more than 2×2 pools leave
    ],
)
def test_convnet_pooling(side: int, depth: int, pooling: str, final: int) -> None:
    model = convnet(10, 1, (side, side), depth=depth, pooling=pooling)
    assert model.features(torch.zeros(1, 1, side, side)).shape[2:] == (final, final)
    kind = {"max": nn.MaxPool2d, "max3": nn.MaxPool2d, "avg": nn.AvgPool2d}.get(pooling)
    assert all(isinstance(module, kind) for name, module in model.named_modules() if name.endswith("pool"))


@pytest.mark.parametrize(
    ("depth", "pooling", "size", "pixels"),
    [
        (3, "none", (32, 32), 1024),
        (3, "max", (32, 28), 8 * 7),
        (3, "max3", (15, 9), 4 * 3),
        (8, "max3", (8, 8), 4),
        (1, "max", (5, 7), 35),
    ],
)
def test_the_flattened_head(depth: int, pooling: str, size: tuple[int, int], pixels: int) -> None:
    model = convnet(10, 3, size, depth=depth, width=4, pooling=pooling, head="flatten")
    assert [name for name, _ in model.named_children()] == ["features", "flatten", "classifier"]
    assert model.classifier.in_features == 4 * pixels
    assert model(torch.zeros(2, 3, *size)).shape == (2, 10)


def test_the_paper_s_net() -> None:
    # Three convolutions with bias, and 10 logits of 32 · 32 · 32 pixels.
    model = convnet(10, 3, (32, 32), batch_norm=False, pooling="none", head="flatten")
    assert parameters(model) == 32 * 28 + 2 * 32 * 289 + 10 * (32 * 1024 + 1)


def test_the_released_code_s_net() -> None:
    torch.manual_seed(0)
    options = {"batch_norm": False, "pooling": "max3", "head": "flatten", "kernel": 5, "init": "truncated"}
    model = convnet(10, 3, (32, 32), **options)
    assert parameters(model) == 32 * 76 + 2 * 32 * 801 + 10 * (32 * 64 + 1)
    for layer in (*(block.conv for block in model.features), model.classifier):
        assert layer.weight.abs().max() <= 0.08
        # Cut at two deviations, a normal variable has 0.880 of the deviation.
        assert layer.weight.std().item() == pytest.approx(0.04 * 0.8796, rel=0.05)
        assert layer.bias.abs().max() == 0


def test_pytorch_s_own_start() -> None:
    torch.manual_seed(5)
    conv = convnet(10, 8, (8, 8), depth=1, batch_norm=False, init="torch").features[0].conv
    bound = 1 / math.sqrt(8 * 9)  # of PyTorch's uniform weights and biases
    assert 0.95 * bound < conv.weight.abs().max() <= bound
    assert 0.5 * bound < conv.bias.abs().max() <= bound


def test_densenet_counts() -> None:
    # Published: DenseNet-40 1.0 M, DenseNet-100 7.0 M, both with growth 12.
    assert parameters(densenet(10, 3)) == 1_019_722
    assert parameters(densenet(10, 3, depth=100)) == 6_979_642
    convolutions = [m for m in densenet(10, 3).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 39  # 40 layers with the linear one


def test_densenet_by_hand() -> None:
    model = densenet(10, 1, depth=7, width=2)
    filters = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert filters == [16, 2, 18, 2, 20, 2]
    assert model.features(torch.zeros(1, 1, 9, 8)).shape == (1, 22, 2, 2)


def test_dense_layer_keeps_its_input() -> None:
    layer, x = _Dense(3, 2), torch.randn(4, 3, 5, 5)
    out = layer(x)
    assert torch.equal(out[:, :3], x)
    torch.testing.assert_close(out[:, 3:], layer.conv(layer.norm(x).relu()))


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
        (lambda: convnet(10, 1, (8, 8), pooling="mean"), "pooling is one of max, avg, max3, none"),
        (lambda: vgg(10, 1, (8, 8), depth=12), "vgg takes a depth of 7, 11, 13, 16, 19, not 12"),
        (lambda: vgg(10, 1, (8, 8), width=0), "vgg takes a width above 0"),
        (lambda: vgg(10, 1, (8, 8), pooling="mean"), "pooling is one of"),
        (lambda: resnet(10, 1, depth=18), "resnet takes a depth of 6n.2 from 20 to 182"),
        (lambda: resnet(10, 1, depth=188), "resnet takes a depth"),
        (lambda: resnet(10, 1, width=1.5), "number of filters"),
        (lambda: wrn(10, 1, depth=4), "wrn takes a depth of 6n.4 from 10"),
        (lambda: wrn(10, 1, depth=20), "wrn takes a depth"),
        (lambda: convnet(10, 1, (8, 8), head="mean"), "head is one of average, flatten, not 'mean'"),
        (lambda: convnet(10, 1, (8, 8), init="xavier"), "init is one of he, torch, truncated"),
        (lambda: convnet(10, 1, (8, 8), kernel=4), "kernel of an odd number of pixels"),
        (lambda: densenet(10, 1, depth=4), "densenet takes a depth of 3n.4 from 7"),
        (lambda: densenet(10, 1, depth=41), "densenet takes a depth"),
        (lambda: densenet(10, 1, width=0.5), "number of filters"),
        (lambda: wrn(10, 1, width=float("nan")), "wrn takes a width above 0"),
    ],
)
def test_bad_settings_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
