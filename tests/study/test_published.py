import json
import subprocess
import sys
from importlib import resources

import pytest

from regrow.study.config import make_config
from regrow.study.published import _NETS, published_accuracy, source


def accuracy(**settings):
    given = {"preset": "paper", "data": "cifar10", **settings}
    return published_accuracy(make_config(given).model_dump(mode="json"))


def test_it_needs_no_torch():
    code = "import sys, regrow.study.published as p; p.source(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 72.1),
        ({"method": "repr"}, 76.4),
        ({"method": "repr", "criterion": "random"}, 73.4),
        ({"method": "repr", "criterion": "l2"}, 74.6),
        ({"method": "repr", "model": "C8(32)"}, 80.5),
        ({"method": "repr", "model": "c18", "data": "cifar100"}, 60.5),
        ({"method": "repr", "preset": "author"}, 76.4),
        ({"method": "repr", "pooling": "max", "lr": 0.1}, 76.4),
        ({"model": "resnet"}, 91.6),
        ({"model": "resnet", "depth": 182, "method": "repr", "data": "cifar100"}, 74.7),
        ({"model": "densenet", "depth": 100, "method": "repr"}, 94.4),
        # No row of the paper:
        ({"data": "digits"}, None),
        ({"train_size": 500}, None),
        ({"label_noise": 0.1}, None),
        ({"image_size": 16}, None),
        ({"batch_norm": True}, None),
        ({"head": "average"}, None),
        ({"width": 16}, None),
        ({"model": "c5"}, None),
        ({"model": "resnet", "depth": 26}, None),
        ({"model": "vgg"}, None),
        ({"method": "dropout"}, None),
        ({"method": "repr", "criterion": "l1"}, None),
        ({"method": "repr", "fraction": 0.1}, None),
        ({"method": "repr", "criterion": "random", "model": "c8"}, None),
    ],
)
def test_a_run_finds_its_row(settings, expected):
    found = accuracy(**settings)
    assert found == (None if expected is None else pytest.approx(expected / 100))


def test_a_record_without_the_newer_settings_has_what_regrow_did_then():
    old = {"data": "cifar10", "model": "convnet", "batch_norm": False, "method": "standard"}
    assert published_accuracy(old) is None  # its head was an average
    assert published_accuracy({"data": "cifar10", "model": "resnet", "method": "standard"}) == 0.916
    assert published_accuracy({}) is None


def test_the_table_is_whole():
    rows = json.loads(resources.files("regrow.study").joinpath("published.json").read_text())["rows"]
    places = [(row["data"], row["net"], row["method"], row.get("criterion")) for row in rows]
    assert len(places) == len(set(places)) == 63
    assert {row["net"] for row in rows} - set(_NETS) == {"DenseNet-5"}
    assert all(30 < row["accuracy"] < 100 for row in rows)
    assert all(("repr" in row["method"]) == ("criterion" in row) for row in rows)
    assert "1811.07275" in source()
