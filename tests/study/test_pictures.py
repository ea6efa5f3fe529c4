import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regrow.study.folders import image_folder
from regrow.study.pictures import find_pictures, read_picture

# Noise, so that no format packs it into a few bytes: what is cut off is missed.
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "ppm": "PPM",
    "pgm": "PPM",
    "pbm": "PPM",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "webp": "WEBP",
}
GREY = {"pgm": "L", "pbm": "1", "gif": "P"}


def encoded(ending: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(GREY.get(ending, "RGB")).save(file, FORMATS[ending])
    return file.getvalue()


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    begin = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return begin + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, width, height, 1, 24, *(0,) * 6)


def refused(path: Path, content: bytes) -> bool:
    """Whether the picture is refused by name; if not, it must be a picture that fits in memory."""
    path.write_bytes(content)
    said = None
    try:
        picture = read_picture(path)
    except ValueError as error:
        said = str(error)
    if said is not None:
        assert said.startswith(f"{path} cannot be read as a picture (")
        assert "\n" not in said
        assert len(said) < len(str(path)) + 250
        return True
    assert picture.mode == "RGB"
    assert 0 < picture.width * picture.height <= 89_478_485
    return False


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_pictures_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    whole, path = encoded(ending), tmp_path / f"a.{ending}"
    assert not refused(path, whole)
    cuts = [0, 1, 2, 3, 5, 8, 13, 20, len(whole) // 4, len(whole) // 2, 3 * len(whole) // 4]
    assert [cut for cut in cuts if not refused(path, whole[:cut])] == []
    for wrong in (b"no picture", b"\x00" * 4000, whole[1:], b"%!PS-Adobe-3.0\n" + whole, b"<svg/>" + whole):
        assert refused(path, wrong)
    # Flipped bits in the header may leave a picture, but no other error and no other message.
    for place in range(min(60, len(whole))):
        refused(path, whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])


PNM_RESTS = (
    b"",
    b"4",
    b"4 4",
    b"x 4\n255",
    b"4 x\n255\n0",
    b"-4 4\n255\n" + b"0 " * 90,
    b"0 4\n255\n0",
    b"4 0\n255\n0",
    b"40000 40000\n255\n0",
    b"10000 10000\n255\n0",
    b"4" * 30 + b" 4\n255\n",
    b"# only a remark",
)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "content",
    [
        *(b"P%d\n%s\n" % (kind, rest) for kind in range(1, 7) for rest in PNM_RESTS),
        *(
            b"P%d\n4 4\n%s\n" % (kind, most) + b"0 " * 90
            for kind in (2, 3, 5, 6)
            for most in (b"0", b"70000")
        ),
        *(b"P%d\n4 4\n255\n999 " % kind + b"0 " * 90 for kind in (2, 3)),
        b"P1\n4 4\n2 x",
        *(png(width, height, 8, 2, b"") for width, height in ((0, 4), (4, 0), (4, 4), (40_000, 40_000))),
        png(10_000, 10_000, 8, 2, b"\0" * 300),
        png(4, 4, 9, 2, b"\0" * 300),
        png(4, 4, 8, 9, b"\0" * 300),
        *(bmp(width, height) for width, height in ((0, 4), (4, 0), (4, 4), (-4, 4), (40_000, 40_000))),
    ],
)
def test_sizes_and_depths_that_cannot_be_are_refused(tmp_path: Path, content: bytes) -> None:
    assert refused(tmp_path / "a.png", content)


def saved(path: Path, picture: Image.Image, kind: str = "PNG", **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, kind, **how)
    return path


SIXTEEN = np.array([[0, 300, 32768, 65535]], dtype=np.uint16)
UPPER = [0, 1, 128, 255]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: png(4, 1, 16, 0, b"\0" + SIXTEEN.astype(">u2").tobytes()), id="png"),
        pytest.param(lambda: b"P5 4 1 65535\n" + SIXTEEN.astype(">u2").tobytes(), id="pgm"),
        pytest.param(lambda: b"P2 4 1 65535\n0 300 32768 65535", id="plain pgm"),
        pytest.param(
            lambda: b"P6 4 1 65535\n" + SIXTEEN.repeat(3).astype(">u2").tobytes(), id="ppm of three channels"
        ),
    ],
)
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, content: Callable[[], bytes]) -> None:
    (tmp_path / "a.png").write_bytes(content())
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == UPPER


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_sixteen_bits_of_a_tiff(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(SIXTEEN.astype(kind)), "TIFF")
    assert np.asarray(read_picture(path))[0].tolist() == [[value] * 3 for value in UPPER]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path / "a.tif", Image.new(mode, (4, 4), 1), "TIFF")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as a picture \(its pixels are num"):
        read_picture(path)


def test_modes_are_read_as_their_colours(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    clear = red.copy()
    clear.putalpha(0)
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    green = Image.new("RGB", (4, 3), (0, 255, 0))
    for path in (
        saved(tmp_path / "cmyk.jpg", red.convert("CMYK"), "JPEG", quality=100),
        saved(tmp_path / "alpha.png", clear),
        saved(tmp_path / "index.png", palette, transparency=0),
        saved(tmp_path / "indices.png", palette, transparency=bytes([0] * 16)),
        saved(tmp_path / "moving.gif", red, "GIF", save_all=True, append_images=[green]),
        saved(tmp_path / "moving.webp", red, "WEBP", save_all=True, append_images=[green], lossless=True),
        saved(tmp_path / "moving.png", red, save_all=True, append_images=[green]),
        saved(tmp_path / "pages.tif", red, "TIFF", save_all=True, append_images=[green]),
        saved(tmp_path / "größe 图.png", red),
        saved(tmp_path / "really a jpeg.png", red, "JPEG", quality=100),
    ):
        picture = read_picture(path)
        assert (picture.mode, picture.size) == ("RGB", (4, 3)), path
        assert np.abs(np.asarray(picture).astype(int) - [255, 0, 0]).max() < 4, path
    for mode, value in (("1", 1), ("L", 255), ("LA", (255, 0))):
        assert (
            np.asarray(read_picture(saved(tmp_path / "a.png", Image.new(mode, (2, 2), value)))) == 255
        ).all()


@pytest.mark.parametrize("size", [(1, 70_000), (70_000, 1)])
def test_a_long_strip_is_cut_before_it_is_resized(tmp_path: Path, size: tuple[int, int]) -> None:
    strip = Image.new("RGB", size, (255, 0, 0))
    begin, end = (
        [side // 2 + shift if side > 1 else side * (shift > 0) for side in size] for shift in (-20, 20)
    )
    strip.paste((0, 0, 255), (*begin, *end))
    path = saved(tmp_path / "a" / "a.png", strip)
    assert sorted(read_picture(path).size) == [1, 100]
    pixels = image_folder(tmp_path, 200).train.pixels
    assert pixels[0, :, 100, 100].tolist() == [0, 0, 255]


def test_the_error_of_the_system_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture \(No such file or"):
        read_picture(tmp_path / "a.png")
    error = PermissionError(13, "Permission denied", "a.png")

    def denied(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture \(Permission denied\)\.$"):
        read_picture(tmp_path / "a.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cat and two dogs."""
    grey = Image.new("L", (2, 2), 7)
    for name in ("cat/1.png", "dog/1.png", "dog/young/2.png"):
        saved(tmp_path / "data" / name, grey)
    return tmp_path / "data"


def found(folder: Path) -> dict[str, list[str]]:
    pictures = find_pictures(folder, {})
    return {name: [file.relative_to(folder).as_posix() for file in files] for name, files in pictures.items()}


ALL = {"cat": ["cat/1.png"], "dog": ["dog/1.png", "dog/young/2.png"]}


def test_pictures_are_found_below_their_class(folder: Path) -> None:
    assert found(folder) == ALL
    assert image_folder(folder, 2).train.labels.tolist() == [0, 1, 1]


def test_hidden_names_and_other_files_are_left_out(folder: Path) -> None:
    for name in (".checkpoints/1.png", "cat/._1.png", "cat/.hidden/2.png", "cat/notes.txt", "top.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no picture")
    (folder / "cat" / ".gone.png").symlink_to("nowhere")
    (folder / "cat" / "folder.png").mkdir()
    assert found(folder) == ALL


def test_names_of_any_letters_and_case(folder: Path) -> None:
    for name in ("Cat/1.PNG", "Ü 图/größe.Jpeg", os.fsdecode(b"z\xff/\xfe.gif")):
        saved(folder / name, Image.new("L", (2, 2), 7))
    assert found(folder) == {
        "Cat": ["Cat/1.PNG"],
        **ALL,
        os.fsdecode(b"z\xff"): [os.fsdecode(b"z\xff/\xfe.gif")],
        "Ü 图": ["Ü 图/größe.Jpeg"],
    }
    assert image_folder(folder, 2).train.labels.tolist() == [0, 1, 2, 2, 3, 4]


def test_links_to_files_and_to_folders_elsewhere_are_followed(folder: Path, tmp_path: Path) -> None:
    saved(tmp_path / "elsewhere" / "deep" / "3.png", Image.new("L", (2, 2), 7))
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "4.png").symlink_to(tmp_path / "elsewhere" / "deep" / "3.png")
    (folder / "emu").symlink_to(saved(tmp_path / "emus" / "1.png", Image.new("L", (2, 2), 7)).parent)
    assert found(folder) == {
        "cat": ["cat/1.png", "cat/4.png", "cat/more/deep/3.png"],
        "dog": ALL["dog"],
        "emu": ["emu/1.png"],
    }


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("cat/again", "."),
        ("cat/again", ".."),
        ("cat/again", "../.."),
        ("cat/again", "/"),
        ("cat/again", "../dog"),
        ("cat/again", "../dog/young"),
        ("dog/young/again", ".."),
        ("dog/again", "young"),
        ("kitten", "cat"),
        ("all", "."),
        ("all", ".."),
        ("puppy", "dog/young"),
    ],
)
def test_a_link_that_makes_pictures_count_twice_is_refused(folder: Path, link: str, to: str) -> None:
    (folder / link).symlink_to(to)
    with pytest.raises(ValueError, match=r"leads to the same folder as .* Remove the link") as caught:
        image_folder(folder, 2)
    assert str(folder) in str(caught.value)


def test_two_links_in_a_circle_are_refused(folder: Path) -> None:
    (folder / "cat" / "a").symlink_to("../dog/b")
    (folder / "dog" / "b").symlink_to("../cat/a")
    with pytest.raises(ValueError, match=r"cat/a is a link that leads nowhere"):
        image_folder(folder, 2)


@pytest.mark.parametrize("name", ["emu", "cat/2.png", "cat/more", "dog/young/3.png", "train"])
def test_a_link_that_leads_nowhere_is_refused(folder: Path, name: str) -> None:
    (folder / name).symlink_to("gone")
    with pytest.raises(ValueError, match=rf"{name} is a link that leads nowhere: mend it or remove it\.$"):
        image_folder(folder, 2)


@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_what_is_not_a_file_is_not_opened(folder: Path, device: str | None) -> None:
    path = folder / "cat" / "2.png"
    if device is None:
        os.mkfifo(path)
    else:
        path.symlink_to(device)
    with pytest.raises(ValueError, match=r"cat/2\.png is not a file: remove it"):
        image_folder(folder, 2)


def test_a_folder_that_cannot_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "young":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"dog/young cannot be read \(Permission denied\)\.$"):
        image_folder(folder, 2)


def test_a_class_without_pictures_is_named(folder: Path) -> None:
    (folder / "emu").mkdir()
    (folder / "emu" / "1.docx").touch()
    with pytest.raises(ValueError, match=r"for every class; there is none in emu\. Pictures end in \.bmp"):
        image_folder(folder, 2)


def test_bombs_are_refused_by_name_in_a_folder(folder: Path) -> None:
    for side, said in ((10_000, "limit of 89478485"), (20_000, "limit of 178956970")):
        (folder / "dog" / "2.png").write_bytes(png(side, side, 8, 0, b"\0" * 300))
        with pytest.raises(ValueError, match=rf"dog/2\.png cannot be read as a picture .*{said}"):
            image_folder(folder, 2)


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "test"), ("train", "TEST")])
def test_parts_are_parts_in_capitals_too(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        saved(tmp_path / name / "cat" / "1.png", Image.new("L", (2, 2), 7))
    source = image_folder(tmp_path, 2)
    assert source.classes == ("cat",)
    assert source.test is not None


def test_a_train_may_be_a_class_beside_a_car(tmp_path: Path) -> None:
    for name in ("Train", "Car"):
        saved(tmp_path / name / "1.png", Image.new("L", (2, 2), 7))
    assert image_folder(tmp_path, 2).classes == ("Car", "Train")


def test_a_part_twice_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test", "Test"):
        saved(tmp_path / name / "cat" / "1.png", Image.new("L", (2, 2), 7))
    with pytest.raises(ValueError, match=r"Test and .*test are the same part of the data"):
        image_folder(tmp_path, 2)


def test_test_pictures_that_are_training_pictures_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "train" / "cat" / "1.png", Image.new("L", (2, 2), 7))
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(ValueError, match="leads to the same folder as"):
        image_folder(tmp_path, 2)
