"""The recipe for timm's training: examples/timm_training.py and docs/timm.md."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver
from torch import nn

import forking
import regrow

ROOT = Path(__file__).parents[2]
SIZE = ("--epochs", 7, "--train-size", 128)


def train(folder: Path, *arguments: object) -> str:
    done = forking.script(ROOT / "examples" / "timm_training.py", *SIZE, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def happened(printed: str) -> list[tuple[str, str, str]]:
    return re.findall(r"^epoch (\d+): (\w+) (.*)$", printed, re.MULTILINE)


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def test_filters_are_dropped_and_restored_and_the_result_is_cut(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    events = happened(printed)
    assert [each[:2] for each in events] == [("2", "drop"), ("3", "restore"), ("5", "drop"), ("6", "restore")]
    assert events[0][2] == events[1][2] != "{}"
    assert "accuracy" in printed
    model = create_model("test_resnet", num_classes=10)
    parameters = sum(each.numel() for each in model.parameters())
    small = regrow.load(model, folder / "output" / "small.safetensors")
    assert sum(each.numel() for each in small.parameters()) < 0.9 * parameters
    state = torch.load(folder / "output" / "last.pth.tar", weights_only=True)
    plain = create_model("test_resnet", num_classes=10)
    assert list(state["state_dict"]) == list(state["state_dict_ema"]) == list(plain.state_dict())


def test_a_run_that_stopped_in_a_sub_phase_ends_as_the_other(whole: tuple[Path, str], tmp_path: Path) -> None:
    first = train(tmp_path, "--stop-after", 5)
    assert [each[1] for each in happened(first)] == ["drop", "restore", "drop"]
    saved = torch.load(tmp_path / "output" / "last.pth.tar", weights_only=True)
    dropped = saved["saver"]["regrow"]["cycle"]["sub_phase"]["dropped"]
    assert sum(map(len, dropped.values())) > 0
    for name, gone in dropped.items():
        assert saved["state_dict_ema"][name + ".weight"][gone].count_nonzero() == 0
    second = train(tmp_path, "--resume", "output/last.pth.tar")
    assert happened(first) + happened(second) == happened(whole[1])
    assert second.splitlines()[-2:] == whole[1].splitlines()[-2:]
    ends = [
        torch.load(folder / "output" / "last.pth.tar", weights_only=True) for folder in (whole[0], tmp_path)
    ]
    for key in ("state_dict", "state_dict_ema", "optimizer", "amp_scaler"):
        assert equal(*(end[key] for end in ends)), key


def test_the_lines_for_timms_own_script_run_as_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "timm.md").read_text(encoding="utf-8")
    building, saving, stepping, ending = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    x, labels = torch.randn(4, 3, 64, 64), torch.arange(4)

    def build(resume: str) -> dict[str, object]:
        torch.manual_seed(0)
        task = ClassificationTask(
            create_model("test_resnet", num_classes=4), nn.CrossEntropyLoss(), verbose=False
        )
        model = task.get_trainable_module()
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
        task.setup_ema(decay=0.5)
        names = {
            "task": task, "model": model, "optimizer": optimizer, "device": torch.device("cpu"),
            "data_config": {"input_size": (3, 64, 64)}, "args": SimpleNamespace(resume=resume),
            "utils": SimpleNamespace(CheckpointSaver=CheckpointSaver), "torch": torch,
        }  # fmt: skip
        if resume:
            state = torch.load(resume, weights_only=True)
            model.load_state_dict(state["state_dict"])
            optimizer.load_state_dict(state["optimizer"])
        exec(saving + building.replace("full=60, sub=30", "full=1, sub=1"), names)
        names["saver"] = names["Saver"](model, optimizer, task=task, checkpoint_dir=str(tmp_path))
        names["saver"].cycle = names["cycle"]
        return names

    def epoch(names: dict[str, object], number: int) -> None:
        names["task"](x, labels)["loss"].backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        names["task"].update_ema()
        exec(stepping, names)
        names["saver"].save_checkpoint(number, metric=float(number))

    one = build("")
    epoch(one, 0)
    assert one["cycle"].phase == "sub"
    again = build(str(tmp_path / "last.pth.tar"))
    assert again["cycle"].phase == "sub"
    assert all(equal(one["cycle"].keep[name], kept) for name, kept in again["cycle"].keep.items())
    for names in (one, again):
        epoch(names, 1)
        exec(ending, names)
    assert equal(one["model"].state_dict(), again["model"].state_dict())
    assert all(type(each).__module__.split(".")[0] in ("torch", "timm") for each in again["model"].modules())
