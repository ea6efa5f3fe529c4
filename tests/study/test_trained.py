"""Trained networks from run folders and by name, with pictures fed the way the weights want them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regrow.study import records, trained
from regrow.study.building import build, load_splits
from regrow.study.config import make_config
from regrow.study.data import load_data
from regrow.study.images import Images
from regrow.study.libraries import LibraryModel
from regrow.study.run_folder import save_weights
from regrow.study.trained import Loader, by_name, from_run

SMALL: dict[str, Any] = {"width": 2, "train_size": 20, "threads": 1, "device": "cpu", "seed": 3}


def make_run(folder: Path, **settings: Any) -> Path:
    """The folder of a run as training leaves it, with first weights in place of trained ones."""
    config = make_config({**SMALL, **settings})
    model = build(config, load_splits(config))
    version = {"version": records.VERSION}
    records.write_yaml(records.config_path(folder), {**version, **config.model_dump(mode="json")})
    records.write_json(records.environment_path(folder), records.environment("cpu", 1))
    result = {
        "test_accuracy": 0.5, "test_loss": 1.0, "validation_accuracy": 0.5, "train_seconds": 1.0,
        "seconds": 1.0, "parameters": 1, "filters": {}, "train_flops": None, "resumed": 0,
    }  # fmt: skip
    records.write_json(records.result_path(folder), version | result)
    save_file(model.state_dict(), records.weights_path(folder))
    return folder


def test_a_loader_gives_its_pictures_again_and_again() -> None:
    images = Images(torch.arange(251, dtype=torch.uint8).repeat(2).view(-1, 1, 1, 1), torch.arange(502))
    loader = Loader(images, mean=[0.2], std=[0.4])
    assert len(loader) == 502
    for _ in range(2):
        first, second = loader
        assert (len(first[1]), len(second[1])) == (500, 2)
        assert torch.cat([first[1], second[1]]).tolist() == list(range(502))
        assert second[0].flatten().tolist() == pytest.approx(
            [(249 / 255 - 0.2) / 0.4, (250 / 255 - 0.2) / 0.4]
        )


def test_a_run_comes_back_with_its_weights_and_pictures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    drawn = torch.get_rng_state()
    found = from_run(folder)
    assert torch.equal(torch.get_rng_state(), drawn)
    saved = records.weights_path(folder).read_bytes()
    assert found.source == {
        "run": str(folder), "weights": hashlib.sha256(saved).hexdigest(), "data": "digits",
    }  # fmt: skip
    assert (found.seed, found.model.training) == (3, False)
    weights = found.model.state_dict()
    assert all(
        torch.equal(weights[name], value) for name, value in load_file(records.weights_path(folder)).items()
    )
    assert torch.equal(found.example, torch.zeros(1, 1, 8, 8))
    splits = load_data("digits", train_size=20)
    (calibration,) = found.calibration
    torch.testing.assert_close(calibration, _normalised(splits.train, splits.mean, splits.std))
    ((labelled, labels),) = found.labelled
    assert labelled is calibration
    assert torch.equal(labels, splits.train.labels)
    for loader, images in ((found.validation, splits.validation), (found.test, splits.test)):
        assert len(loader) == len(images)
        ((pictures, labels),) = loader
        assert torch.equal(labels, images.labels)
        torch.testing.assert_close(pictures, _normalised(images, splits.mean, splits.std))


def _normalised(images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Of grey pictures."""
    return (images.pixels.float() / 255 - mean[0]) / std[0]


def test_the_device_may_be_another_one_than_the_run_had(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", device="cuda:99")
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used here"):
        from_run(folder)
    assert from_run(folder, device="cpu").example.device.type == "cpu"


def test_the_data_may_have_moved_since(tmp_path: Path) -> None:
    pictures = _folder(tmp_path / "then")
    run = make_run(tmp_path / "run", data="folder", data_dir=str(pictures), image_size=8, train_size=None)
    pictures.rename(tmp_path / "now")
    with pytest.raises(ValueError, match="then is not a folder"):
        from_run(run)
    found = from_run(run, data_dir=str(tmp_path / "now"))
    assert found.example.shape == (1, 3, 8, 8)
    assert (len(found.validation), len(found.test)) == (2, 2)  # a fifth of ten each


def _folder(folder: Path) -> Path:
    from PIL import Image

    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(5):
            picture = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(folder / label / f"{number}.png")
    return folder


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty is not a run folder: it has no config\.yaml"):
        from_run(tmp_path / "empty")
    folder = make_run(tmp_path / "run")
    records.result_path(folder).unlink()
    with pytest.raises(ValueError, match="unfinished run, which has no final weights: finish it first"):
        from_run(folder)


def test_weights_that_are_missing_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = records.weights_path(folder)
    other = {**load_file(path), "features.0.conv.weight": torch.zeros(5, 1, 3, 3)}
    save_file(other, path)
    with pytest.raises(
        ValueError, match=r"does not fit the network of its config\.yaml: .*conv\.weight"
    ) as one:
        from_run(folder)
    assert "\n" not in str(one.value)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"does not fit the network of its config\.yaml"):
        from_run(folder)
    path.unlink()
    with pytest.raises(ValueError, match="is missing: train the run again with --rerun"):
        from_run(folder)


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "change", [_flipped, lambda data: data[:-1], lambda data: data + b"0", lambda _: b""]
)
def test_damaged_weights_are_refused_by_name(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    folder = make_run(tmp_path / "run")
    path = records.weights_path(folder)
    save_weights(load_file(path), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"weights.safetensors does not fit the network") as refused:
        from_run(folder)
    assert len(str(refused.value)) < 500


def test_weights_from_before_there_was_a_checksum_and_those_of_another_type(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = records.weights_path(folder)
    tensors = load_file(path)
    save_file(tensors, path)
    assert from_run(folder).model.state_dict().keys() == tensors.keys()
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"is torch.float64 in the file and torch.float32 in the model"):
        from_run(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        from_run(folder)


class Net(nn.Module):
    """A stand-in for a library's network: ``classes`` logits for pictures of one size, or of any."""

    def __init__(self, classes: int, side: int | None = None) -> None:
        super().__init__()
        self.classifier, self.side = nn.Linear(3, classes), side

    def forward(self, x: Tensor) -> Tensor:
        if self.side not in (None, x.shape[-1]):
            raise AssertionError(f"made for {self.side} pixels\nand nothing else")
        return self.classifier(x.mean((2, 3)))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    """``library(model, mean, std, side)`` is what the next ``by_name`` finds under any name."""

    def put(*found: Any) -> None:
        monkeypatch.setattr(trained, "library_model", lambda _name, _weights: LibraryModel(*found))

    return put


@pytest.mark.parametrize(
    ("side", "image_size", "expected"), [(None, None, 224), (96, None, 96), (96, 32, 32), (None, 32, 32)]
)
def test_without_data_there_is_an_example_and_nothing_to_judge_by(
    library, side: int | None, image_size: int | None, expected: int
) -> None:
    library(Net(1000), None, None, side)
    found = by_name("any", weights="none", image_size=image_size, device="cpu")
    assert torch.equal(found.example, torch.zeros(1, 3, expected, expected))
    assert found.calibration is found.validation is found.test is None
    assert found.source == {"model": "any", "weights": "none", "data": None}
    assert found.seed == 0


def test_grey_pictures_are_normalised_by_the_mean_of_the_colours(library) -> None:
    library(Net(10), (0.1, 0.2, 0.6), (0.2, 0.4, 0.6), 224)
    found = by_name("any", data="digits", device="cpu")
    assert not found.model.training
    assert found.example.shape == (1, 3, 8, 8)
    splits = load_data("digits")
    expected = _normalised(splits.train, (0.3,), (0.4,))[:512].expand(-1, 3, -1, -1)
    torch.testing.assert_close(torch.cat(found.calibration), expected)
    assert (len(found.validation), len(found.test)) == (359, 359)
    first, _ = next(iter(found.test))
    torch.testing.assert_close(first, _normalised(splits.test, (0.3,), (0.4,)).expand(-1, 3, -1, -1))


def test_random_weights_take_the_statistics_of_the_pictures(library) -> None:
    library(Net(10), None, None, None)
    found = by_name("any", weights="none", data="digits", device="cpu")
    splits = load_data("digits")
    expected = _normalised(splits.train, splits.mean, splits.std)[:512].expand(-1, 3, -1, -1)
    torch.testing.assert_close(torch.cat(found.calibration), expected)


def test_pictures_of_other_classes_calibrate_only(library) -> None:
    library(Net(7), None, None, None)
    found = by_name("any", data="digits", device="cpu")
    assert found.validation is found.test is found.labelled is None
    assert sum(map(len, found.calibration)) == 512


def test_pictures_that_the_network_does_not_take_are_refused(library) -> None:
    library(Net(10, side=32), None, None, 32)
    with pytest.raises(
        ValueError, match=r"does not take pictures of 8×8 with 3 channels \(.*: made for 32 pixels\)"
    ):
        by_name("any", data="digits", device="cpu")
    with pytest.raises(ValueError, match="unknown data 'digit'; did you mean 'digits'"):
        by_name("any", data="digit", device="cpu")


def test_the_families_have_no_published_weights() -> None:
    for name in ("convnet", "vgg", "resnet", "wrn"):
        with pytest.raises(ValueError, match=f"{name} has no published weights: train one"):
            by_name(name)
    with pytest.raises(ValueError, match="'resnet19' is neither a run folder nor a network of torchvision"):
        by_name("resnet19")
