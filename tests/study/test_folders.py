from pathlib import Path

import pytest
import torch
from PIL import Image

from regrow.study.folders import image_folder


def write_pictures(
    folder: Path, count: int, colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)
) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")


def test_classes_and_colours(tmp_path: Path) -> None:
    write_pictures(tmp_path / "blue", 2, (0, 0, 200))
    write_pictures(tmp_path / "red", 3, (100, 0, 0))
    source = image_folder(tmp_path, 2)
    assert source.classes == ("blue", "red")
    assert source.test is None
    assert source.validation is None
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.train.pixels.shape == (5, 3, 2, 2)
    assert source.train.pixels.dtype == torch.uint8
    assert source.train.pixels[0, :, 0, 0].tolist() == [0, 0, 200]
    assert source.train.pixels[4, :, 1, 1].tolist() == [100, 0, 0]


def test_short_side_is_resized_and_the_middle_kept(tmp_path: Path) -> None:
    # 12×4: a third white, a third grey, a third black. At a short side of 2 it is 6×2; the middle is grey.
    picture = Image.new("L", (12, 4))
    picture.paste(255, (0, 0, 4, 4))
    picture.paste(128, (4, 0, 8, 4))
    (tmp_path / "one").mkdir()
    picture.save(tmp_path / "one" / "a.png")
    pixels = image_folder(tmp_path, 4).train.pixels
    assert pixels.shape == (1, 3, 4, 4)
    assert (pixels == 128).all()
    assert image_folder(tmp_path, 2).train.pixels.shape == (1, 3, 2, 2)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_named_parts(tmp_path: Path, name: str) -> None:
    for part, count in (("train", 3), (name, 2), ("test", 1)):
        write_pictures(tmp_path / part / "a", count, (1, 1, 1))
        write_pictures(tmp_path / part / "b", count, (2, 2, 2))
    source = image_folder(tmp_path, 4)
    assert source.validation is not None
    assert source.test is not None
    assert [len(part) for part in (source.train, source.validation, source.test)] == [6, 4, 2]
    assert source.classes == ("a", "b")


def test_parts_with_other_classes_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train" / "a", 1, (1, 1, 1))
    write_pictures(tmp_path / "test" / "b", 1, (1, 1, 1))
    with pytest.raises(ValueError, match=r"has other classes than .*: a, b must be in both"):
        image_folder(tmp_path, 4)


def test_train_without_test_is_not_taken_for_a_class(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train" / "a", 1, (1, 1, 1))
    write_pictures(tmp_path / "val" / "a", 1, (1, 1, 1))
    with pytest.raises(ValueError, match="has train, val but not test: add it"):
        image_folder(tmp_path, 4)


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        image_folder(tmp_path / "absent", 4)
    with pytest.raises(ValueError, match="sub folder with pictures for every class"):
        image_folder(tmp_path, 4)


def test_too_many_pixels_are_refused_before_reading(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_text("no picture")
    with pytest.raises(
        ValueError, match=r"1 pictures of 40000×40000 need 4\.5 GiB of memory; 4 GiB is the most"
    ):
        image_folder(tmp_path, 40000)


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", 2, (1, 1, 1))
    (tmp_path / "a" / "1.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a/1\.png cannot be read as a picture"):
        image_folder(tmp_path, 4)
