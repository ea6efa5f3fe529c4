"""RePr, Bridgeout and cuts in Ultralytics' own trainer.

Ultralytics is under the AGPL: it is installed for these tests alone, and no part of regrow imports it.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import regrow
from regrow.integrations.ultralytics import add_bridgeout, add_repr, prune, trainer_for

PAGE = Path(__file__).parents[2] / "docs" / "ultralytics.md"
CYCLE = {"full": 1, "sub": 1, "cycles": 2, "fraction": 0.1}
TRAINING = {
    "epochs": 5, "imgsz": 64, "batch": 6, "nbs": 6, "device": "cpu", "workers": 0, "amp": False, "plots": False,
    "optimizer": "SGD", "lr0": 0.01, "lrf": 1.0, "warmup_epochs": 0, "mosaic": 0, "val": False, "verbose": False,
    "exist_ok": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def yolo_class(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``ultralytics.YOLO``, whose settings and fonts are in a folder of the tests, and which fetches nothing."""
    folder = tmp_path_factory.mktemp("ultralytics")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(folder))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        ultralytics = pytest.importorskip("ultralytics")
        from ultralytics.utils import USER_CONFIG_DIR

        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        if not (USER_CONFIG_DIR / "Arial.ttf").exists():
            shutil.copy(fonts / "DejaVuSans.ttf", USER_CONFIG_DIR / "Arial.ttf")
        yield ultralytics.YOLO


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen pictures with a bright square each, as Ultralytics reads them."""
    folder, random = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number in range(12):
        picture = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        size, (x, y) = 20, random.integers(0, 44, 2)
        picture[y : y + size, x : x + size] = 230
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        box = [(x + size / 2) / 64, (y + size / 2) / 64, size / 64, size / 64]
        (folder / "labels" / f"{number}.txt").write_text(" ".join(map(str, [0, *box])))
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [square]\n")
    return folder / "data.yaml"


def pictures(data: Path) -> torch.Tensor:
    paths = sorted((data.parent / "images").glob("*.png"))
    return torch.stack([torch.from_numpy(np.asarray(Image.open(path)).copy()) for path in paths]).permute(
        0, 3, 1, 2
    ) / torch.tensor(255.0)


class Watch:
    """What the callbacks of a training see: at its end, and at the end of each epoch."""

    def __init__(self, yolo: Any, stop_after: int | None = None) -> None:
        self.zero: list[int] = []
        self.noisy: list[bool] = []
        self.net: Any = None
        self.optimizer: Any = None
        self._stop = stop_after
        yolo.add_callback("on_train_batch_end", self._see)
        yolo.add_callback("on_fit_epoch_end", self._after)

    def _see(self, trainer: Any) -> None:
        ema = trainer.ema.ema.state_dict()
        weights = [ema[name] for name in ema if name.endswith("conv.weight")]
        self.zero.append(sum(int((each.flatten(1) == 0).all(1).sum()) for each in weights))
        self.net, self.optimizer = trainer.model, trainer.optimizer

    def _after(self, trainer: Any) -> None:
        if self._stop is not None and trainer.epoch == self._stop:
            raise KeyboardInterrupt


def new(yolo_class: Any) -> Any:
    torch.manual_seed(0)
    return yolo_class("yolo11n.yaml")


def regrow_classes(net: torch.nn.Module) -> set[str]:
    own = {type(each).__module__ for each in net.modules()}
    held = {key for each in net.modules() for key, value in vars(each).items() if key.startswith("_regrow")}
    return {name for name in own if name.startswith("regrow")} | held


@pytest.fixture(scope="module")
def trained(yolo_class: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    yolo = new(yolo_class)
    add_bridgeout(yolo, p=0.05, seed=3)
    repr_ = add_repr(yolo, **CYCLE)
    watch = Watch(yolo)
    yolo.train(data=data, project=tmp_path_factory.mktemp("runs"), name="whole", **TRAINING)
    return yolo, repr_, watch


def test_filters_are_dropped_and_restored_and_the_ema_follows(trained: Any) -> None:
    _, repr_, watch = trained
    assert [(each.kind, each.step) for each in repr_.events] == [
        ("drop", 1), ("restore", 2), ("drop", 3), ("restore", 4),
    ]  # fmt: skip
    dropped = [sum(map(len, each.filters.values())) for each in repr_.events]
    assert watch.zero == [0, 0, dropped[0], dropped[0], 0, 0, dropped[2], dropped[2], 0, 0]
    assert not any(name.startswith("model.23.") for each in repr_.events for name in each.filters)


def test_what_is_trained_and_what_is_saved_are_plain(trained: Any) -> None:
    yolo, repr_, watch = trained
    assert repr_.cycle is None
    assert regrow_classes(watch.net) == regrow_classes(yolo.model) == set()
    folder = Path(yolo.ckpt_path if hasattr(yolo, "ckpt_path") else yolo.overrides["model"]).parent
    state = torch.load(folder / "last.regrow.pt", weights_only=True)
    assert state["epoch"] == 4
    assert {"RePr", "Bridgeout"} < set(state)
    saved = (folder / "last.pt").read_bytes()
    assert b"regrow" not in saved


def test_a_training_that_broke_off_goes_on_in_the_sub_phase(
    yolo_class: Any, data: Path, tmp_path: Path
) -> None:
    first = new(yolo_class)
    before = add_repr(first, **CYCLE)
    watch = Watch(first, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        first.train(data=data, project=tmp_path, name="run", **TRAINING)
    assert [each.kind for each in before.events] == ["drop", "restore", "drop"]
    assert regrow_classes(watch.net) == set()

    again = yolo_class(tmp_path / "run" / "weights" / "last.pt")
    after = add_repr(again, **CYCLE)
    watch = Watch(again)
    again.train(resume=True)
    (restored,) = after.events
    assert (restored.kind, restored.step) == ("restore", 4)
    assert restored.filters == before.events[2].filters
    assert watch.zero == [sum(map(len, restored.filters.values()))] * 2 + [0] * 2

    other = yolo_class("yolo11n.yaml")
    add_repr(other, **CYCLE)
    shutil.copy(tmp_path / "run" / "weights" / "last.pt", tmp_path / "last.pt")


def test_a_run_without_a_state_is_not_resumed(yolo_class: Any, data: Path, tmp_path: Path) -> None:
    first = new(yolo_class)
    Watch(first, stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        first.train(data=data, project=tmp_path, name="run", **TRAINING)
    again = yolo_class(tmp_path / "run" / "weights" / "last.pt")
    add_repr(again, **CYCLE)
    with pytest.raises(ValueError, match=r"last\.regrow\.pt has no state of RePr after epoch 2"):
        again.train(resume=True)


@pytest.fixture(scope="module")
def cut(trained: Any, data: Path) -> Any:
    yolo = copy.deepcopy(trained[0])
    whole = copy.deepcopy(yolo.model)
    with pytest.warns(UserWarning, match="images are few"):
        report = prune(yolo, macs=0.6, coupled="individually", calibration=[pictures(data)])
    return yolo, whole, report


def test_a_cut_network_validates_and_predicts_as_it_computes(cut: Any, data: Path, tmp_path: Path) -> None:
    yolo, whole, report = cut
    assert report["macs"]["after"] <= 0.6 * report["macs"]["before"]
    assert not any(name.startswith("model.23.") for name in report["dropped"])
    x = pictures(data)
    yolo = copy.deepcopy(yolo)
    assert any(map(regrow.is_placed if hasattr(regrow, "is_placed") else _placed, yolo.model.modules()))
    with torch.no_grad():
        expected = yolo.model.eval()(x)[0]
    yolo.save(tmp_path / "cut.pt")
    loaded = type(yolo)(tmp_path / "cut.pt")
    folded = copy.deepcopy(loaded.model).fuse(verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(folded.eval()(x)[0], expected, rtol=2e-2, atol=2e-2)
    found = loaded.predict(data.parent / "images" / "0.png", imgsz=64, conf=0.0, verbose=False, project=tmp_path)
    assert len(found) == 1
    loaded.val(data=data, imgsz=64, plots=False, verbose=False, device="cpu", workers=0, project=tmp_path)
    with pytest.raises(ValueError, match="are folded"):
        prune(loaded, macs=0.5, compensate=False)


def _placed(module: torch.nn.Module) -> bool:
    return "_regrow_at" in vars(module)


def test_a_cut_network_trains_on(cut: Any, data: Path, tmp_path: Path) -> None:
    yolo = copy.deepcopy(cut[0])
    shapes = [each.shape for each in yolo.model.parameters()]
    before = copy.deepcopy(yolo.model.state_dict())
    yolo.train(
        trainer=trainer_for(yolo), data=data, project=tmp_path, name="on", **{**TRAINING, "epochs": 2}
    )
    assert [each.shape for each in yolo.model.parameters()] == shapes
    assert any(not torch.equal(value, before[name]) for name, value in yolo.model.state_dict().items())
