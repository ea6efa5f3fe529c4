"""What a run trains with: data, net, optimizer and rates as its settings say."""

from typing import Any

import pytest
import torch
from torch import nn

from regrow.study.building import (
    build,
    device_of,
    load_splits,
    make_optimizer,
    make_scheduler,
)
from regrow.study.config import RunConfig, make_config
from regrow.study.data import Splits
from regrow.study.images import Images


def config(**settings: Any) -> RunConfig:
    return make_config({"data": "digits", "threads": 1, **settings})


def splits(classes: int = 10, channels: int = 1, side: int = 8) -> Splits:
    images = Images(torch.zeros(1, channels, side, side, dtype=torch.uint8), torch.tensor([0]))
    names = tuple(map(str, range(classes)))
    return Splits(images, images, images, names, (0.5,) * channels, (0.5,) * channels)


def test_the_pictures_follow_the_settings() -> None:
    plain = load_splits(config(train_size=50))
    assert len(plain.train) == 50
    # 1,797 digits: a fifth each for validation and test.
    assert (len(plain.validation), len(plain.test)) == (359, 359)
    noisy = load_splits(config(train_size=50, label_noise=0.2))
    assert torch.equal(noisy.train.pixels, plain.train.pixels)
    assert int((noisy.train.labels != plain.train.labels).sum()) == 10
    small = load_splits(config(train_size=50, image_size=4, split_seed=1))
    assert small.size == (4, 4)
    other = load_splits(config(train_size=50, split_seed=1))
    assert not torch.equal(other.train.pixels, plain.train.pixels)
    with pytest.raises(ValueError, match="train_size 2000 is too large: 1079 pictures"):
        load_splits(config(train_size=2000))


def test_the_folder_of_the_data_is_the_one_in_the_settings(tmp_path) -> None:
    with pytest.raises(ValueError, match="pass --data-dir FOLDER"):
        load_splits(config(data="folder", image_size=8))
    with pytest.raises(ValueError, match="missing is not a folder"):
        load_splits(config(data="folder", image_size=8, data_dir=str(tmp_path / "missing")))


def test_the_net_follows_the_settings_and_the_data() -> None:
    settings = config(model="convnet", depth=2, width=3, batch_norm=False, pooling="avg")
    model = build(settings, splits(classes=7, channels=2))
    # 2·3·9 + 3, 3·3·9 + 3 and 3·7 + 7 weights.
    assert sum(parameter.numel() for parameter in model.parameters()) == 57 + 84 + 28
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(nn.AvgPool2d), kinds.count(nn.MaxPool2d), kinds.count(nn.BatchNorm2d)) == (1, 0, 0)
    with pytest.raises(ValueError, match="unknown model 'convnett'"):
        build(config(model="convnett"), splits())


def test_first_weights_come_from_the_global_generator() -> None:
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(build(config(width=2), splits()).state_dict()["features.0.conv.weight"])
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_optimizers() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    sgd = make_optimizer(model, config(momentum=0.8, weight_decay=0.01))
    (group,) = sgd.param_groups
    assert type(sgd) is torch.optim.SGD
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (
        0.1,
        0.8,
        True,
        0.01,
    )
    assert [id(each) for each in group["params"]] == [id(model.weight)]
    (group,) = make_optimizer(model, config(momentum=0, lr=0.3)).param_groups
    assert (group["lr"], group["nesterov"]) == (0.3, False)  # SGD refuses Nesterov without momentum
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        optimizer = make_optimizer(model, config(optimizer=name, weight_decay=0.02))
        assert type(optimizer) is kind
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (0.002, 0.02)


def rates(settings: RunConfig, steps: int) -> list[float]:
    """The rate of each step of a run, and the one after it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], settings.rate)
    scheduler = make_scheduler(optimizer, settings, steps)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(settings.epochs * steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_of_every_step() -> None:
    # One cycle of 1 + 1 epochs in 4: held for 2 epochs of 5 steps, then half a cosine over 10 steps.
    held = rates(config(epochs=4, lr=0.4, full=1, sub=1, cycles=1), 5)
    assert held[:11] == [0.4] * 11
    assert (held[15], held[20]) == (pytest.approx(0.2), pytest.approx(0))
    stepped = rates(config(epochs=4, lr=0.4, schedule="step"), 5)
    assert [stepped[place] for place in (9, 10, 14, 15)] == pytest.approx([0.4, 0.04, 0.04, 0.004])
    # The shortest cycle is of two epochs: with a single one, standard training holds its rate to the end.
    assert rates(config(epochs=1, lr=0.4), 5)[:5] == [0.4] * 5


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu") == torch.device("cpu")
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of("auto") == torch.device(expected)


@pytest.mark.parametrize(
    "name",
    [
        *("cuda:99", "cuda:-1", "cuda:99999999999999999999", "cpu:3", "cpu:99999", "cpu:", "CPU", "gpu", ""),
        *("meta", "meta:0", "mkldnn", "opengl", "xla", "lazy", "privateuseone", "hpu", "xpu", "vulkan"),
    ],
)
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"device '{name}' cannot be used here \(.+\)\. Write --device cpu\."
    ):
        device_of(name)


def test_the_pictures_of_a_sequence_of_tasks_follow_the_settings() -> None:
    plain = load_splits(config())
    corrected = load_splits(config(regime="corrected-labels", tasks=2, label_noise=0.2))
    assert torch.equal(corrected.train.labels, plain.train.labels)  # ``task_splits`` falsifies them
    with pytest.raises(ValueError, match="10 classes do not make 3 equal groups"):
        load_splits(config(regime="new-classes", tasks=3))


def test_a_second_data_set_is_loaded_by_the_same_settings(monkeypatch) -> None:
    asked = []

    def load(name: str, **settings: Any) -> Splits:
        asked.append((name, settings))
        images = Images(
            torch.zeros(20, 1, *((8, 8) if name == "digits" else (28, 28)), dtype=torch.uint8),
            torch.arange(20) % 10,
        )
        return Splits(images, images, images, tuple(map(str, range(10))), (0.5,), (0.5,))

    monkeypatch.setattr("regrow.study.building.load_data", load)
    settings = {"regime": "new-domain", "tasks": 2, "second_data": "fashion-mnist", "data_dir": "here"}
    found = load_splits(config(split_seed=3, train_size=20, **settings))
    assert [name for name, _ in asked] == ["digits", "fashion-mnist"]
    assert asked[0][1] == asked[1][1]
    assert (asked[0][1]["split_seed"], asked[0][1]["data_dir"].name) == (3, "here")
    assert found.second is not None
    assert found.size == found.second.size == (8, 8)
    # Pictures of one's own lie in a folder that does not hold the published ones, and have any size.
    load_splits(config(**settings | {"data": "folder", "image_size": 64}))
    assert [each["data_dir"] and each["data_dir"].name for _, each in asked[2:]] == ["here", None]
    assert [each["image_size"] for _, each in asked[2:]] == [64, None]
