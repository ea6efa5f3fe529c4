import pytest
import torch
from torch import Tensor, nn

from regrow.study import families, models
from regrow.study.models import build_model, model_channels


def build(name: str, **options: object) -> nn.Module:
    return build_model(name, **{"classes": 10, "channels": 1, "size": (32, 32), **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet", {"depth": 4, "width": 8, "batch_norm": False, "pooling": "avg"}),
        ("vgg", {"depth": 11, "width": 0.1, "pooling": "none", "size": (4, 4)}),
        ("resnet", {"depth": 26, "width": 4}),
        ("wrn", {"depth": 10, "width": 0.5}),
        ("densenet", {"depth": 7, "width": 2}),
        ("convnet", {"pooling": "max3", "head": "flatten", "kernel": 5, "init": "torch", "width": 4}),
        ("torchvision:squeezenet1_1", {}),
        ("mobilenet_v3_small", {}),
        ("timm:test_resnet", {}),
        ("test_resnet", {"channels": 2}),
    ],
)
def test_builds_a_net_in_train_mode_for_the_data(name: str, options: dict) -> None:
    model = build(name, **options)
    assert model.training
    assert all(module.training for module in model.modules())
    channels = model_channels(name, options.get("channels", 1))
    pictures = torch.randn(2, channels, *options.get("size", (32, 32)))
    assert model(pictures).shape == (2, 10)


def test_settings_reach_the_family() -> None:
    model = build("convnet", depth=4, width=8, batch_norm=False, pooling="avg")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [8] * 4
    assert all(conv.bias is not None for conv in convolutions)
    assert sum(isinstance(module, nn.AvgPool2d) for module in model.modules()) == 3


def test_trying_the_size_leaves_generator_and_buffers_alone() -> None:
    torch.manual_seed(3)
    plain = families.convnet(10, 1, (32, 32))
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    built = build("convnet")
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), built.parameters(), strict=True))
    assert {name: buffer.abs().sum().item() for name, buffer in built.named_buffers()} == {
        f"features.{block}.norm.{name}": {"running_mean": 0, "running_var": 32, "num_batches_tracked": 0}[
            name
        ]
        for block in range(3)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_a_net_that_draws_in_evaluation_leaves_the_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand(len(x), 10)

    monkeypatch.setattr(families, "convnet", lambda *_, **__: Noisy())
    before = torch.get_rng_state()
    build("convnet")
    assert torch.equal(torch.get_rng_state(), before)


def test_googlenet_has_no_auxiliary_heads() -> None:
    logits = build("googlenet")(torch.zeros(2, 3, 32, 32))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 10)


def test_model_channels() -> None:
    assert model_channels("convnet", 1) == 1
    assert model_channels("resnet18", 1) == 3
    assert model_channels("torchvision:resnet18", 3) == 3
    assert model_channels("timm:resnet18", 1) == 1
    with pytest.raises(ValueError, match="reads 3 channels: the data must have 1 or 3, not 2"):
        model_channels("resnet18", 2)
    with pytest.raises(ValueError, match="unknown model"):
        model_channels("resnet1", 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("covnet", "unknown model 'covnet'. Did you mean convnet"),
        ("torchvision:resnt18", "Did you mean resnet18"),
        ("timm:resnt18", "Did you mean resnet18"),
        ("torchvision:fcn_resnet50", "unknown model"),  # segmentation
        ("timm:hf-hub:some/model", "unknown model"),  # would be fetched
        ("keras:resnet18", "unknown model 'keras:resnet18'"),
        ("", "There are convnet, vgg, resnet, wrn, densenet, torchvision:NAME and timm:NAME"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convnet", {"depth": 0}, "convnet takes a depth from 1"),
        ("resnet", {"depth": 21}, "resnet takes a depth of 6n"),
        ("resnet", {"batch_norm": False}, "resnet takes depth and width only"),
        ("wrn", {"pooling": "avg"}, "wrn takes depth and width only"),
        ("densenet", {"batch_norm": False}, "densenet takes depth and width only"),
        ("vgg", {"head": "flatten"}, "head, kernel and init are settings of convnet: .* with 'vgg'"),
        ("resnet18", {"kernel": 5}, "head, kernel and init are settings of convnet"),
        ("timm:resnet18", {"init": "torch"}, "head, kernel and init are settings of convnet"),
        ("resnet18", {"depth": 18}, "is built as its library has it"),
        ("resnet18", {"width": 2}, "is built as its library has it"),
        ("timm:resnet18", {"batch_norm": False}, "is built as its library has it"),
        ("timm:resnet18", {"pooling": "none"}, "is built as its library has it"),
        ("convnet", {"classes": 0}, "at least one class"),
        ("convnet", {"size": (8, 0)}, "at least one class, channel and pixel"),
    ],
)
def test_bad_settings_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "size"), [("squeezenet1_1", (8, 8)), ("timm:vit_tiny_patch16_224", (32, 32))]
)
def test_a_picture_that_does_not_fit_is_refused(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"a picture of {size[0]}×{size[1]} is too small for {name}"):
        build(name, size=size)


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_has_timm", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'regrow\[timm\]'"):
        build("timm:resnet18")
    with pytest.raises(ValueError, match="unknown model 'test_resnet'"):
        build("test_resnet")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet", {"width": 10_000}),
        ("convnet", {"width": 1000, "depth": 200}),
        ("vgg", {"width": 10_000}),
        ("vgg", {"width": 60, "depth": 19}),
        ("resnet", {"width": 10_000, "depth": 110}),
        ("wrn", {"width": 10_000}),
        ("densenet", {"width": 10_000}),
        ("convnet", {"width": 10_000, "head": "flatten", "depth": 1, "size": (64, 64), "classes": 100}),
    ],
)
def test_a_net_too_large_for_memory_is_refused_before_it_is_built(name: str, options: dict) -> None:
    with pytest.raises(ValueError, match=r"width [0-9,e+.]+.* would have [0-9,]+ parameters; 1,000,000,000"):
        build(name, **options)


def test_the_count_of_parameters_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    plain = build("convnet")
    torch.manual_seed(1)
    sized = build("convnet", width=32, depth=3)
    for one, other in zip(plain.parameters(), sized.parameters(), strict=True):
        assert torch.equal(one, other)
