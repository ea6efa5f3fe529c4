import gzip
import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from regrow.study import sources
from regrow.study.sources import DataNotFound, cifar, default_folder, digits, fashion_mnist, read_idx


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, packed: bool = True) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        files = {
            f"{part}-images-idx3-ubyte": idx(np.arange(count * 6).reshape(count, 2, 3)),
            f"{part}-labels-idx1-ubyte": idx(np.arange(count)),
        }
        for name, content in files.items():
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.fixture
def no_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "no-debian")


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_DATA", "/somewhere")
    assert default_folder() == Path("/somewhere")
    monkeypatch.delenv("REGROW_DATA")
    assert default_folder() == Path("data")


def test_digits() -> None:
    source = digits()
    assert source.train.pixels.shape == (1797, 1, 8, 8)
    assert source.train.pixels.max() == 255
    assert source.classes == tuple("0123456789")
    # The first picture of the set, a 0: its first row is 0 0 5 13 9 1 0 0 of 16.
    assert source.train.pixels[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert source.train.labels[:4].tolist() == [0, 1, 2, 3]


def test_read_idx(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a", tmp_path / "a.gz"
    values = np.array([[[1, 2], [3, 255]]])
    plain.write_bytes(idx(values))
    packed.write_bytes(gzip.compress(idx(values)))
    assert read_idx(plain, 3).tolist() == values.tolist()
    assert read_idx(packed, 3).tolist() == values.tolist()


GOOD = idx(np.arange(6).reshape(1, 2, 3))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", GOOD[:-1], "has 21 bytes in place of 22"),
        ("a", GOOD + b"x", "has more than 22 bytes in place of 22"),
        ("a", GOOD[:4] + b"\xff" * 12, r"says that it holds \[4294967295, 4294967295, 4294967295\] numbers"),
        # 2³² times 2³² is 0 in numbers of 64 bits.
        ("a", GOOD[:4] + b"\x80\0\0\0" * 2 + b"\0\0\0\4", "says that it holds"),
        ("a.gz", gzip.compress(GOOD + bytes(10**8), mtime=0), "has more than 22 bytes"),
        ("a", GOOD[:7], "is not an idx file"),
        ("a", idx(np.arange(6)), "is not an idx file of bytes in 3 dimensions"),
        ("a", b"", "is not an idx file"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-9], "cut short"),
        ("a.gz", b"<html>not found</html>", "damaged"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(tmp_path / name, 3)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.usefixtures("no_debian")
@pytest.mark.parametrize("where", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_found(tmp_path: Path, where: str, packed: bool) -> None:
    write_fashion_mnist(tmp_path / "here" / where, packed)
    source = fashion_mnist(tmp_path / "here")
    assert source.train.pixels[3].tolist() == [[[18, 19, 20], [21, 22, 23]]]
    assert source.train.labels.tolist() == [0, 1, 2, 3]
    assert source.test is not None
    assert len(source.test) == 2
    assert source.classes[9] == "Ankle boot"


def test_debians_fashion_mnist_comes_after_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    write_fashion_mnist(tmp_path / "debian")
    assert len(fashion_mnist(tmp_path / "here").train) == 4
    write_fashion_mnist(tmp_path / "here")
    (tmp_path / "here" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([9, 9, 9, 9]))))
    assert fashion_mnist(tmp_path / "here").train.labels.tolist() == [9, 9, 9, 9]


@pytest.mark.usefixtures("no_debian")
@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1, 2], "3 labels"), ([0, 1, 2, 10], "has the label 10")]
)
def test_fashion_mnist_that_does_not_fit_is_refused(tmp_path: Path, labels: list[int], message: str) -> None:
    write_fashion_mnist(tmp_path / "here", packed=False)
    (tmp_path / "here" / "train-labels-idx1-ubyte").write_bytes(idx(np.array(labels)))
    with pytest.raises(ValueError, match=message):
        fashion_mnist(tmp_path / "here")


@pytest.mark.usefixtures("no_debian")
def test_fashion_mnist_without_pictures_is_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "here", packed=False)
    (tmp_path / "here" / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 2, 3))))
    (tmp_path / "here" / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0)))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte holds no picture"):
        fashion_mnist(tmp_path / "here")


@pytest.mark.usefixtures("no_debian")
def test_fashion_mnist_is_downloaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: Path, download: bool) -> None:
        assert download
        write_fashion_mnist(root / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    assert len(fashion_mnist(tmp_path / "new").train) == 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["FashionMNIST"]


@pytest.mark.usefixtures("no_debian")
def test_failed_download_says_how_to_get_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: Path, download: bool) -> None:
        assert download
        (root / "FashionMNIST").mkdir()
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    with pytest.raises(DataNotFound, match="apt-get install dataset-fashion-mnist") as caught:
        fashion_mnist(tmp_path / "new")
    assert "(no network)" in str(caught.value)
    assert "--data-dir FOLDER" in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


class FakeCifar:
    """Stands in for torchvision's class: same attributes, two pictures of 1×2 pixels for training."""

    base_folder = "cifar-10-batches-py"
    filename = "cifar-10-python.tar.gz"
    tgz_md5 = ""
    network = True
    downloads = 0

    def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
        folder = root / self.base_folder
        if download:
            if not FakeCifar.network:
                raise OSError("no network")
            FakeCifar.downloads += 1
            folder.mkdir()
            (folder / "batch").write_text("good")
        if (folder / "batch").read_text() != "good":
            raise RuntimeError("Dataset not found or corrupted.")
        count = 2 if train else 1
        self.data = np.arange(count * 6, dtype=np.uint8).reshape(count, 1, 2, 3)
        self.targets = [1, 0][:count]
        self.classes = ["cat", "dog"]


@pytest.fixture
def fake_cifar(monkeypatch: pytest.MonkeyPatch) -> type[FakeCifar]:
    monkeypatch.setattr(FakeCifar, "network", True)
    monkeypatch.setattr(FakeCifar, "downloads", 0)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    return FakeCifar


def test_cifar_is_downloaded_once(tmp_path: Path, fake_cifar: type[FakeCifar]) -> None:
    source = cifar("cifar10", tmp_path / "new")
    assert cifar("cifar10", tmp_path / "new").classes == ("cat", "dog")
    assert fake_cifar.downloads == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cifar-10-batches-py"]
    # Pixel (0, 1) of picture 1 holds the bytes 9, 10, 11: red, green, blue.
    assert source.train.pixels.shape == (2, 3, 1, 2)
    assert source.train.pixels[1, :, 0, 1].tolist() == [9, 10, 11]
    assert source.train.labels.tolist() == [1, 0]
    assert source.train.labels.dtype == torch.int64
    assert source.test is not None
    assert len(source.test) == 1


def test_cifar_archive_is_unpacked(
    tmp_path: Path, fake_cifar: type[FakeCifar], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    (tmp_path / "batch").write_text("good")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "batch", "cifar-10-batches-py/batch")
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is damaged"):
        cifar("cifar10", tmp_path)
    monkeypatch.setattr(fake_cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(cifar("cifar10", tmp_path).train) == 2
    assert fake_cifar.downloads == 0


def test_cifar_without_network(
    tmp_path: Path, fake_cifar: type[FakeCifar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cifar, "network", False)
    with pytest.raises(DataNotFound, match=r"no network.*Place cifar-10-python\.tar\.gz there"):
        cifar("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_cifar_is_refused(tmp_path: Path, fake_cifar: type[FakeCifar]) -> None:
    cifar("cifar10", tmp_path)
    (tmp_path / fake_cifar.base_folder / "batch").write_text("bad")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is damaged or incomplete: remove it"):
        cifar("cifar10", tmp_path)
