"""``regrow prune module:function``: a network of the user's own, from weights in a file to small files."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import forking
from regrow.cli import app
from regrow.shipping.checkpoint import load

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )
"""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """own_nets.py and weights for it; the current folder is theirs."""
    from PIL import Image

    (tmp_path / "own_nets.py").write_text(NET)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(10):
            picture = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(tmp_path / "pictures" / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(3)
    model: nn.Module = importlib.import_module("own_nets").build()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pth")
    yield tmp_path / "mine.pth"
    sys.modules.pop("own_nets", None)


PICTURES = ["--data", "folder", "--data-dir", "pictures", "--image-size", "16"]


def test_to_small_files(weights: Path, tmp_path: Path) -> None:
    settings = ["--fraction", 0.5, "--scope", "layer", "--device", "cpu", "--threads", 1, "--out", "small"]
    done = forking.regrow(
        "prune", "own_nets:build", "--weights", weights, *PICTURES, *settings, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "small" / "prune.json").read_text())
    assert report["source"] == {"function": "own_nets:build", "weights": str(weights), "data": "folder"}
    assert report["layers"]["0"] == {"before": 8, "after": 4}
    assert report["compensation"]["images"] == 12
    assert report["accuracy"]["images"] == report["test_accuracy"]["images"] == 4
    assert "cut and reconstructed" in done.stdout
    small = load(sys.modules["own_nets"].build(), tmp_path / "small" / "pruned.safetensors")
    assert small.get_submodule("0").weight.shape[0] == 4
    page = (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
    assert "from own_nets import build" in page
    assert "<h1>A smaller network: own_nets:build</h1>" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_net:build", "--weights", "mine.pth"], "there is no module 'own_net'"),
        (["own_nets:make", "--weights", "mine.pth"], "own_nets has no function 'make'"),
        (["own_nets:nn.Linear", "--weights", "mine.pth"], "takes the arguments in_features, out_features"),
        (["own_nets:nn.Identity", "--weights", "mine.pth"], "the network has no '0.weight', '0.bias', "),
        (["own_nets.build", "--weights", "none"], "did you mean own_nets:build?"),
        (["own_nets:build", "--weights", "none", "--data", "pictures"], "--data folder --data-dir pictures"),
        (
            ["own_nets:build", "--weights", "none", "--fraction", "50%"],
            "--fraction takes a share such as 0.5",
        ),
        (["own_nets:build", "--weights", "none", "--image-size", "2"], "image_size: input should be greater"),
        (["own_nets:build"], "pass the weights of own_nets:build: --weights FILE"),
        (["own_nets:build", "--weights", "other.pth"], "there is no file --weights other.pth"),
    ],
)
@pytest.mark.usefixtures("weights")
def test_what_is_refused_before_anything_is_written(arguments: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, ["prune", *PICTURES, "--fraction", "0.5", "--out", "out", *arguments])
    assert isinstance(refused.exception, ValueError)
    assert message in str(refused.exception)
    assert not Path("out").exists()
