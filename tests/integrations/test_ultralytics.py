"""RePr, Bridgeout and cuts in Ultralytics' own trainer.

Ultralytics is under the AGPL: it is installed for these tests alone, and no part of regrow imports it.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from regrow.integrations.ultralytics import add_bridgeout, add_repr, prune, trainer_for
from regrow.marks import is_placed

PAGE = Path(__file__).parents[2] / "docs" / "ultralytics.md"
CYCLE = {"full": 1, "sub": 1, "cycles": 2, "fraction": 0.1}
TRAINING = {
    "epochs": 5, "imgsz": 64, "batch": 6, "nbs": 6, "device": "cpu", "workers": 0, "amp": False,
    "plots": False, "optimizer": "SGD", "lr0": 0.01, "lrf": 1.0, "warmup_epochs": 0, "mosaic": 0,
    "val": False, "verbose": False, "exist_ok": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def yolo_class(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``ultralytics.YOLO``, with settings and a font in a folder of the tests; it fetches nothing."""
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
        self.net: Any = None
        self._stop = stop_after
        yolo.add_callback("on_train_batch_end", self._see)
        yolo.add_callback("on_fit_epoch_end", self._after)

    def _see(self, trainer: Any) -> None:
        ema = trainer.ema.ema.state_dict()
        weights = [ema[name] for name in ema if name.endswith("conv.weight")]
        self.zero.append(sum(int((each.flatten(1) == 0).all(1).sum()) for each in weights))
        self.net, self.folder = trainer.model, trainer.wdir

    def _after(self, trainer: Any) -> None:
        if self._stop is not None and trainer.epoch == self._stop:
            raise KeyboardInterrupt


# Blocks of YOLO11 in all their kinds, but few of each: regrow reads yolo11n.yaml in five seconds or more.
SMALL = """
nc: 1
scales: {n: [1.0, 1.0, 128]}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C3k2, [32, False, 0.5]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C3k2, [32, True]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, SPPF, [128, 5]]
  - [-1, 1, C2PSA, [128]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 1, C3k2, [32, False]]
  - [[-1], 1, Detect, [nc]]
"""
HEAD = "model.11."


@pytest.fixture(scope="module")
def new(yolo_class: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    path = tmp_path_factory.mktemp("nets") / "yolo11n.yaml"  # the n is the scale
    path.write_text(SMALL)

    def build() -> Any:
        torch.manual_seed(0)
        return yolo_class(path)

    return build


def regrow_classes(net: torch.nn.Module) -> set[str]:
    own = {type(each).__module__ for each in net.modules()}
    held = {key for each in net.modules() for key, value in vars(each).items() if key.startswith("_regrow")}
    return {name for name in own if name.startswith("regrow")} | held


@pytest.fixture(scope="module")
def trained(new: Callable[[], Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    yolo = new()
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
    assert not any(name.startswith(HEAD) for each in repr_.events for name in each.filters)


def test_what_is_trained_and_what_is_saved_are_plain(trained: Any) -> None:
    yolo, repr_, watch = trained
    assert repr_.cycle is None
    assert regrow_classes(watch.net) == regrow_classes(yolo.model) == set()
    folder = watch.folder
    state = torch.load(folder / "last.regrow.pt", weights_only=True)
    assert state["epoch"] == 4
    assert {"RePr", "Bridgeout"} < set(state)
    saved = (folder / "last.pt").read_bytes()
    assert b"regrow" not in saved


def test_a_training_that_broke_off_goes_on_in_the_sub_phase(
    yolo_class: Any, new: Callable[[], Any], data: Path, tmp_path: Path
) -> None:
    first = new()
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


@pytest.mark.parametrize("order", [1, -1])
def test_both_may_break_off_in_the_sub_phase_and_go_on_in_either_order(
    yolo_class: Any, new: Callable[[], Any], data: Path, tmp_path: Path, order: int
) -> None:
    def add(yolo: Any) -> Any:
        adding = [lambda: add_bridgeout(yolo, p=0.05), lambda: add_repr(yolo, **CYCLE)][::order]
        return next(filter(None, [call() for call in adding]))

    first = new()
    add(first)
    watch = Watch(first, stop_after=0)
    with pytest.raises(KeyboardInterrupt):  # and no error of regrow's
        first.train(data=data, project=tmp_path, name="run", **{**TRAINING, "epochs": 2})
    assert regrow_classes(watch.net) == set()
    again = yolo_class(tmp_path / "run" / "weights" / "last.pt")
    after = add(again)
    again.train(resume=True)
    assert [(each.kind, each.step) for each in after.events] == [("restore", 2)]
    with pytest.raises(ValueError, match=r"callbacks of RePr already; yolo\.reset_callbacks\(\)"):
        add_repr(again, **CYCLE)
    again.reset_callbacks()
    add(again)


def test_a_run_without_a_state_is_not_resumed(
    yolo_class: Any, new: Callable[[], Any], data: Path, tmp_path: Path
) -> None:
    first = new()
    Watch(first, stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        first.train(data=data, project=tmp_path, name="run", **TRAINING)
    again = yolo_class(tmp_path / "run" / "weights" / "last.pt")
    add_repr(again, **CYCLE)
    with pytest.raises(ValueError, match=r"last\.regrow\.pt has no state of RePr after epoch 2"):
        again.train(resume=True)


def test_a_loss_of_nan_takes_the_cycle_back_with_the_checkpoint(
    new: Callable[[], Any], data: Path, tmp_path: Path
) -> None:
    yolo, spoilt = new(), []

    def spoil(trainer: Any) -> None:
        if trainer.epoch == 1 and not spoilt:
            spoilt.append(trainer.epoch)
            trainer.loss = trainer.loss * float("nan")

    yolo.add_callback("on_train_epoch_end", spoil)
    add_bridgeout(yolo, p=0.05)
    added = add_repr(yolo, **{**CYCLE, "cycles": 1})
    watch = Watch(yolo)
    yolo.train(data=data, project=tmp_path, name="nan", **{**TRAINING, "epochs": 3})
    assert [(each.kind, each.step) for each in added.events] == [("drop", 1), ("restore", 2)]
    dropped = sum(map(len, added.events[0].filters.values()))
    assert watch.zero == [0, 0] + [dropped] * 4 + [0, 0]
    assert b"regrow." not in (watch.folder / "last.pt").read_bytes()  # no class of regrow's


@pytest.fixture(scope="module")
def cut(yolo_class: Any, trained: Any, data: Path) -> Callable[[], Any]:
    folder = trained[2].folder
    yolo = yolo_class(folder / "best.pt")
    before = {name: len(each) for name, each in yolo.model.named_parameters()}
    with pytest.warns(UserWarning, match="images are few"):
        report = prune(yolo, macs=0.6, coupled="individually", calibration=[pictures(data)])
    assert report["macs"]["after"] <= 0.6 * report["macs"]["before"]
    after = {name: len(each) for name, each in yolo.model.named_parameters()}
    assert {name for name in after if after[name] != before.get(name)}
    assert not any(name.startswith(HEAD) for name, indices in report["dropped"].items() if indices)
    assert any(map(is_placed, yolo.model.modules()))
    yolo.save(folder / "cut.pt")
    return lambda: yolo_class(folder / "cut.pt")


def test_a_cut_network_validates_and_predicts_as_it_computes(
    cut: Callable[[], Any], data: Path, tmp_path: Path
) -> None:
    yolo, x = cut(), pictures(data)
    with torch.no_grad():
        expected = yolo.model.eval()(x)[0]
        folded = copy.deepcopy(yolo.model).fuse(verbose=False).eval()(x)[0]
    torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-3)
    picture = data.parent / "images" / "0.png"
    (found,) = yolo.predict(picture, imgsz=64, conf=0.0, verbose=False, project=tmp_path)
    assert len(found.boxes)
    yolo.val(data=data, imgsz=64, plots=False, verbose=False, device="cpu", workers=0, project=tmp_path)
    yolo.fuse()
    with pytest.raises(ValueError, match="are folded"):
        prune(yolo, macs=0.5, compensate=False)


def test_a_cut_network_trains_on(cut: Callable[[], Any], data: Path, tmp_path: Path) -> None:
    yolo = cut()
    before = {name: each.clone() for name, each in yolo.model.named_parameters()}
    training = {**TRAINING, "epochs": 2, "name": "on", "project": tmp_path, "data": data}
    yolo.train(trainer=trainer_for(yolo), **training)
    after = dict(yolo.model.named_parameters())
    assert {name: each.shape for name, each in after.items()} == {
        name: each.shape for name, each in before.items()
    }
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_the_lines_on_the_page_run_as_printed(
    yolo_class: Any,
    new: Callable[[], Any],
    trained: Any,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, cutting = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    small, squares = {**TRAINING, "project": tmp_path, "name": "page"}, data

    class Small(yolo_class):
        def train(self, *, data: str, epochs: int, **others: Any) -> None:
            assert (data, epochs) in (("mine.yaml", 200), ("mine.yaml", 20))
            super().train(data=squares, **{**small, "epochs": 2}, **others)

    def open_yolo(name: str) -> Any:
        return Small(trained[2].folder / name if name.endswith("pt") else new().overrides["model"])

    names: dict[str, Any] = {"YOLO": open_yolo, "pictures": pictures(data)}
    exec(training.replace("full=20, sub=10, cycles=3", "full=1, sub=1, cycles=1"), names)
    assert [each.kind for each in names["added"].events] == ["drop", "restore"]
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="images are few"):
        exec(cutting, names)
    assert names["report"]["macs"]["after"] <= 0.6 * names["report"]["macs"]["before"]
    assert (tmp_path / "cut.pt").exists()
