"""Every net that can be named trains, is scored, dropped and restored by RePr, and cut."""

import pytest
import torch

import regrow
from regrow.study.building import make_optimizer
from regrow.study.config import make_config
from regrow.study.models import build_model, model_channels
from regrow.study.names import MODEL_FAMILIES

pytestmark = pytest.mark.devices

# The smallest pictures of GoogLeNet are 15×15; those of torchvision's inception_v3 are 75×75.
NETS = {
    "convnet": {"model": "convnet", "width": 6},
    "convnet, average pools, no norm": {
        "model": "convnet",
        "width": 6,
        "pooling": "avg",
        "batch_norm": False,
    },
    "c3": {"model": "C3(6)"},
    "c8": {"model": "C8(4)"},
    "c13, pooled": {"model": "C13(4)", "pooling": "max"},
    "c18, with norms": {"model": "C18(4)", "batch_norm": True},
    "paper": {"model": "convnet", "preset": "paper", "width": 6},
    "author": {"model": "convnet", "preset": "author", "width": 6},
    "vgg 7": {"model": "vgg", "depth": 7, "width": 0.1},
    "vgg 16": {"model": "vgg", "width": 0.1},
    "vgg 19, no norm": {"model": "vgg", "depth": 19, "width": 0.1, "batch_norm": False, "pooling": "max3"},
    "resnet 20": {"model": "resnet", "width": 4},
    "resnet 32": {"model": "resnet", "depth": 32, "width": 2},
    "wrn 10": {"model": "wrn", "depth": 10, "width": 0.5},
    "densenet 7": {"model": "densenet", "depth": 7, "width": 4},
    "densenet 13": {"model": "densenet", "depth": 13, "width": 3},
    "googlenet": {"model": "googlenet"},
}


def test_every_family_is_here() -> None:
    assert set(MODEL_FAMILIES) <= {make_config(settings).model for settings in NETS.values()}


@pytest.mark.parametrize("name", NETS)
def test_trains_is_scored_dropped_restored_and_cut(name: str) -> None:
    config = make_config({"lr": 0.01, **NETS[name]})
    channels, size = model_channels(config.model, 1), (16, 16)
    torch.manual_seed(0)
    model = build_model(
        config.model,
        classes=3,
        channels=1,
        size=size,
        **{key: getattr(config, key) for key in ("depth", "width", "batch_norm", "pooling")},
        **{key: getattr(config, key) for key in ("head", "kernel", "init")},
    )
    images, labels = torch.randn(6, channels, *size), torch.tensor([0, 1, 2, 0, 1, 2])
    model.to(images.device)
    optimizer = make_optimizer(model, config)
    cycle = regrow.RePr(model, optimizer, example_inputs=images[:2], full=1, sub=1, cycles=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    phases, dropped = [], 0
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        cycle.step()
        phases.append(cycle.phase)
        dropped = max(dropped, sum(int((~mask).sum()) for mask in cycle.keep.values()))
    assert phases == ["sub", "done", "done"]
    assert all(bool(mask.all()) for mask in cycle.keep.values())
    scores = regrow.score(model)
    filters = sum(len(each) for each in scores.values())
    assert 0.15 * filters < dropped <= 0.5 * filters
    assert all(value.isfinite().all() for value in scores.values())
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert set(moved) >= {key for key, _ in model.named_parameters() if key.endswith("conv.weight")}
    cycle.remove()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.eval()
    regrow.prune(model, example_inputs=images[:2], fraction=0.3, calibration=[images])
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.85 * parameters
    assert model(images).shape == (6, 3)
    assert model(images).isfinite().all()
