from pathlib import Path

import pytest
import torch
from PIL import Image

from regrow.study import data
from regrow.study.data import Splits, load_data
from regrow.study.images import Images, Source


def published(monkeypatch: pytest.MonkeyPatch, validation: Images | None = None) -> None:
    """Stands in for Fashion-MNIST: 100 pictures of 2 classes with a test set of its own."""

    def images(count: int) -> Images:
        pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 3).contiguous()
        return Images(pixels, torch.arange(count) % 2)

    source = Source(images(100), ("even", "odd"), validation, images(10))
    monkeypatch.setattr(data, "fashion_mnist", lambda _: source)


def same(a: Splits, b: Splits) -> bool:
    pairs = [(a.train, b.train), (a.validation, b.validation), (a.test, b.test)]
    return all(torch.equal(x.pixels, y.pixels) and torch.equal(x.labels, y.labels) for x, y in pairs)


def test_digits_are_split_60_20_20() -> None:
    splits = load_data("digits")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1079, 359, 359]
    assert splits.channels == 1
    assert splits.size == (8, 8)
    assert len(splits.classes) == 10
    assert splits.mean == pytest.approx(((splits.train.pixels.double() / 255).mean().item(),))
    everything = torch.cat([splits.train.pixels, splits.validation.pixels, splits.test.pixels]).long()
    # The sum over the bundled set: nothing is lost, nothing is there twice.
    assert everything.sum() == data.digits().train.pixels.long().sum()


def test_digits_parts_are_stratified() -> None:
    splits = load_data("digits")
    everything = data.digits().train.labels.bincount()
    for part in (splits.validation, splits.test):
        assert (part.labels.bincount() - everything * 359 / 1797).abs().max() <= 1


def test_splits_are_a_function_of_the_seed() -> None:
    assert same(load_data("digits", split_seed=1), load_data("digits", split_seed=1))
    assert not same(load_data("digits", split_seed=1), load_data("digits", split_seed=2))


def test_official_test_set_stays_and_a_tenth_is_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch)
    splits = load_data("fashion-mnist")
    assert splits.test.pixels[:, 0, 0, 0].tolist() == list(range(10))
    assert [len(splits.train), len(splits.validation)] == [90, 10]
    assert splits.validation.labels.sum() == 5
    both = torch.cat([splits.train.pixels, splits.validation.pixels])[:, 0, 0, 0]
    assert sorted(both.tolist()) == list(range(100))
    assert splits.size == (2, 3)


def test_own_validation_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Images(torch.full((3, 1, 2, 3), 200, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    published(monkeypatch, validation=own)
    splits = load_data("fashion-mnist")
    assert len(splits.train) == 100
    assert splits.validation.pixels.unique().tolist() == [200]


def test_smaller_training_sets_are_stratified_and_nested() -> None:
    whole, large, small = (load_data("digits", train_size=size) for size in (None, 200, 50))
    assert [len(large.train), len(small.train)] == [200, 50]
    assert torch.equal(large.train.pixels[:50], small.train.pixels)
    assert (small.train.labels.bincount(minlength=10) - 5).abs().max() <= 1
    assert torch.equal(whole.test.pixels, small.test.pixels)
    assert torch.equal(whole.validation.pixels, small.validation.pixels)


def test_label_noise_touches_training_labels_only() -> None:
    clean, noisy = load_data("digits"), load_data("digits", label_noise=0.25)
    assert torch.equal(clean.train.pixels, noisy.train.pixels)
    assert (clean.train.labels != noisy.train.labels).sum() == 270  # round(0.25 · 1079)
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)


def test_pictures_are_made_smaller_in_all_parts() -> None:
    whole, small = load_data("digits"), load_data("digits", image_size=4)
    assert small.size == (4, 4)
    for one, other in ((whole.train, small.train), (whole.test, small.test)):
        assert torch.equal(one.labels, other.labels)
        by_hand = one.pixels[0, 0, :2, :2].float().mean().round()
        assert other.pixels[0, 0, 0, 0] == by_hand
    assert load_data("digits", image_size=8).size == (8, 8)


def test_folder_without_parts_is_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    splits = load_data("folder", data_dir=tmp_path, image_size=6)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [6, 2, 2]
    assert splits.test.labels.tolist() in ([0, 1], [1, 0])
    assert splits.channels == 3
    assert splits.size == (6, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar-10"}, "unknown data 'cifar-10'; did you mean 'cifar10'"),
        ({"name": "zzz"}, "unknown data 'zzz'; choose from 'digits', 'fashion-mnist'"),
        ({"name": "digits", "split_seed": -1}, "split_seed must be 0 or more"),
        ({"name": "digits", "label_noise": 1.0}, "label_noise .* below 1, not 1.0"),
        ({"name": "digits", "train_size": 0}, "train_size must be 1 or more"),
        ({"name": "digits", "train_size": 1080}, "1079 pictures are available"),
        ({"name": "digits", "image_size": 16}, "digits are 8 pixels a side: .*1 to 8, not 16"),
        ({"name": "folder", "image_size": 16}, "--data-dir FOLDER"),
        ({"name": "folder", "data_dir": Path("x")}, "--image-size 64"),
        ({"name": "folder", "data_dir": Path("x"), "image_size": 0}, "--image-size 64"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)


def test_data_dir_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fashion_mnist(folder: Path) -> Source:
        asked.append(folder)
        raise data.DataNotFound("not there")

    monkeypatch.setattr(data, "fashion_mnist", fashion_mnist)
    monkeypatch.setenv("REGROW_DATA", "/env")
    for given in (None, Path("/given")):
        with pytest.raises(ValueError, match="not there"):
            load_data("fashion-mnist", data_dir=given)
    assert asked == [Path("/env"), Path("/given")]
