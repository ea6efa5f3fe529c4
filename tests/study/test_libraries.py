"""Networks of torchvision and timm by name, without a download."""

import pytest
import torch
import torchvision

from regrow.study.libraries import library_model


def test_random_weights_take_nothing_from_the_net():
    found = library_model("torchvision:squeezenet1_1", "none")
    assert (found.mean, found.std, found.side) == (None, None, None)
    assert found.model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_published_weights_come_with_their_pictures(monkeypatch):
    plain = torchvision.models.get_model
    asked = []

    def without_download(name, weights):
        asked.append(weights)
        return plain(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", without_download)
    found = library_model("squeezenet1_1", "default")
    assert asked == [torchvision.models.SqueezeNet1_1_Weights.DEFAULT]
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.std == (0.229, 0.224, 0.225)
    assert found.side == 224


def test_what_cannot_be_downloaded_is_said(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(ValueError, match=r"squeezenet1_1 cannot be obtained: no route.*--weights none"):
        library_model("squeezenet1_1", "default")


def test_timm():
    pytest.importorskip("timm")
    found = library_model("timm:test_resnet", "none")
    assert found.side == 160
    assert found.mean is None
    with pytest.raises(ValueError, match=r"test_resnet has no weights 'r161_in1k'; did you mean 'r160_in1k'"):
        library_model("timm:test_resnet", "r161_in1k")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet19", "none", "neither a run folder nor a network.*did you mean 'resnet1"),
        ("squeezenet1_1", "IMAGENET1K_V2", "did you mean 'IMAGENET1K_V1'"),
    ],
)
def test_unknown_names(name, weights, message):
    with pytest.raises(ValueError, match=message):
        library_model(name, weights)
