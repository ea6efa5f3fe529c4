"""What the README and the examples show is what runs."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import nn

import forking
import regrow
from killing import variables_of_two

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_lines_for_ones_own_loop_run_as_printed() -> None:
    block = next(block for block in python_blocks() if "RePr" in block)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip
    x = torch.randn(6, 1, 8, 8)
    events = []

    def train_one_epoch(model: nn.Module, loader: object, optimizer: torch.optim.Optimizer) -> None:
        assert loader is None
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    scope = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        "x": x,
        "epochs": 91,
        "loader": None,
        "train_one_epoch": train_one_epoch,
        "note": events.append,
    }
    exec(block.replace("event = cycle.step()", "event = cycle.step(); note(event)"), scope)
    kinds = {number: event.kind for number, event in enumerate(events, start=1) if event is not None}
    assert kinds == {20: "drop", 30: "restore", 50: "drop", 60: "restore", 80: "drop", 90: "restore"}
    assert sum(map(len, events[19].filters.values())) == 2  # 30 % of the 8 behind the first convolution


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip


def test_the_lines_about_bridgeout_run_as_printed() -> None:
    block = next(block for block in python_blocks() if "add_bridgeout" in block)
    model, x = network(), torch.randn(6, 1, 8, 8)
    keys = list(model.state_dict())
    trained = []

    def train_one_epoch(model: nn.Module, *_: object) -> None:
        trained.append(torch.equal(model(x), model(x)))

    names = {"regrow": regrow, "model": model, "x": x, "loader": None, "optimizer": None}
    exec(block, {**names, "train_one_epoch": train_one_epoch})
    assert trained == [False]  # two passes, two draws
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)))


def test_the_first_line_halves_the_arithmetic() -> None:
    block = next(block for block in python_blocks() if "macs=0.5" in block)
    scope = {"regrow": regrow, "model": network().eval(), "x": torch.randn(64, 1, 8, 8)}
    exec(block, scope)
    macs = scope["report"]["macs"]
    assert 0.4 * macs["before"] < macs["after"] <= 0.5 * macs["before"]


@pytest.mark.needs_torch("2.13", "export_onnx")
def test_the_lines_about_cutting_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(block for block in python_blocks() if "regrow.save" in block)
    monkeypatch.chdir(tmp_path)
    model, x = network().eval(), torch.randn(6, 1, 8, 8)
    names = {"regrow": regrow, "model": model, "x": x, "MyNet": network}
    exec(block, names)
    assert model[0].out_channels + model[3].out_channels == 11  # 30 % of 16 are 5
    assert torch.equal(names["small"].eval()(x), model(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.safetensors"]


def new_block(words: str) -> dict[str, object]:
    """The names after the first block with ``words`` has run, on a net of two layers and its teacher."""
    block = next(block for block in python_blocks() if words in block)
    model, x, labels = network(), torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    names: dict[str, object] = {
        "regrow": regrow,
        "torch": torch,
        "model": model,
        "teacher": network(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        "x": x,
        "labels": labels,
        "loader": [(x, labels)],
        "task": 1,
    }
    exec(block, names)
    return names


def test_the_lines_about_criteria_run_as_printed() -> None:
    found = new_block("regrow.select")
    assert {name: len(each) for name, each in found["scores"].items()} == {"0": 8, "3": 8}
    assert sum(int((~each).sum()) for each in found["keep"].values()) == 5  # 30 % of 16


def test_the_lines_about_changed_data_run_as_printed() -> None:
    found = new_block("regrow.restart")
    assert found["record"]["parameters"] == ["6.weight", "6.bias"]


def test_the_lines_about_losses_run_as_printed() -> None:
    found = new_block("regrow.distillation_loss")
    assert found["loss"].shape == ()
    assert found["loss"].requires_grad


def test_the_lines_about_analysis_run_as_printed() -> None:
    found = new_block("regrow.drop_one_accuracy")
    assert {name: len(each) for name, each in found["accuracies"].items()} == {"0": 8, "3": 8}
    assert len(found["record"]["mean"]) == 2


CUTTING = ROOT / "examples" / "cut_and_finetune.py"
# These have tests of their own.
TESTED = {CUTTING, ROOT / "examples" / "timm_training.py", ROOT / "examples" / "cut_then_int8.py"}


@pytest.mark.parametrize(
    "script", sorted({*(ROOT / "examples").glob("*.py")} - TESTED), ids=lambda path: path.name
)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    done = forking.script(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_the_example_of_cutting_says_what_each_way_costs(tmp_path: Path) -> None:
    done = forking.script(CUTTING, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split("  ")[-1].strip().endswith("test accuracy")
    found = re.findall(r"^(.*?) +([\d,]+) +([\d.]+)%$", "\n".join(lines), re.MULTILINE)
    assert len(found) == len(lines) == 6
    parameters = [int(count.replace(",", "")) for _, count, _ in found]
    uncut, plain, plain_tuned, made_up, tuned, stepwise = (float(accuracy) for *_, accuracy in found)
    assert parameters[1] == parameters[2]
    assert parameters[3] == parameters[4]
    assert max(parameters[1:]) < 0.6 * parameters[0]
    assert plain < made_up - 10, "making up for removed filters brought nothing"
    assert min(plain_tuned, tuned, stepwise) > uncut - 4, "the cut networks did not train on"
    assert plain_tuned > plain + 10
    assert made_up > uncut - 4


def test_the_recipe_runs_as_printed_and_trains_on() -> None:
    page = (ROOT / "docs" / "prune.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "falling" in each]
    model, x = network().eval(), torch.randn(64, 1, 8, 8)
    labels = torch.arange(64) % 4
    rates, losses = [], []

    def train_one_epoch(model: nn.Module, _loader: object, optimizer: torch.optim.Optimizer) -> None:
        assert {*map(id, model.parameters())} == {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert model.training
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    names = {"regrow": regrow, "torch": torch, "model": model, "x": x, "rate": 0.1}
    exec(block, {**names, "loader": [(x, labels)], "train_one_epoch": train_one_epoch})
    assert model[0].out_channels + model[3].out_channels < 16
    assert rates == pytest.approx([0.03, 0.015])
    assert losses[-1] < losses[0]


def test_the_page_of_a_cut_is_written_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "prune.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "write_prune_page" in b)
    monkeypatch.chdir(tmp_path)
    exec(block, {"regrow": regrow, "model": network().eval(), "x": torch.randn(128, 1, 8, 8)})
    assert "small.safetensors" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_example_of_ddp_runs_in_two_processes(tmp_path: Path) -> None:
    def run(variables: dict[str, object]) -> CompletedProcess[str]:
        folder = tmp_path / str(variables["RANK"])
        folder.mkdir()
        return forking.script(ROOT / "examples" / "ddp.py", folder=folder, variables=variables)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(run, variables_of_two())
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert re.findall(r"^epoch (\d+): (\w+)", first.stdout, re.MULTILINE) == [("2", "drop"), ("4", "restore")]
    assert "2 processes, equal weights" in first.stdout
    assert second.stdout == ""
