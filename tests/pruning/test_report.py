"""The report of ``prune``: plain data that prints as tables."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import regrow
from regrow.pruning.report import Report


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 2),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    batches = [(x, torch.tensor([0, 1, 0, 1]))]
    return regrow.prune(
        model,
        fraction=0.5,
        exclude=["2"],
        example_inputs=x[:1],
        compensate=False,
        validation=batches,
    )


def test_it_prints_as_tables(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    print(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["filters", "of", "before", "after", "left"]
    assert set(lines[1]) == {"─"}
    assert lines[2].split() == ["0", "8", "4", "50", "%"]
    assert lines[3].split() == ["2", "6", "6", "100", "%", "excluded"]
    assert lines[4] == ""
    assert lines[-1].startswith("validation accuracy")
    assert len(lines[2].rstrip()) == lines[2].rfind("%") + 1


def test_it_is_a_plain_dict_in_all_other_ways(report: Report) -> None:
    plain = dict(report)
    assert isinstance(report, dict)
    assert report == plain
    assert plain == report
    assert repr(report) == repr(plain)
    assert json.dumps(report) == json.dumps(plain)
    assert json.loads(json.dumps(report)) == report
    assert report | {} == plain
    assert list(report) == list(plain)


def test_yaml_takes_it_as_a_plain_dict(report: Report) -> None:
    with pytest.raises(yaml.representer.RepresenterError):
        yaml.safe_dump(report)
    assert yaml.safe_load(yaml.safe_dump(dict(report))) == report  # as docs/prune.md says


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, Report])
def test_a_copy_is_equal_and_prints_alike(report: Report, again) -> None:
    copied = again(report)
    assert copied == report
    assert str(copied) == str(report)
    assert type(copied) is Report


def test_it_is_read_with_weights_only_and_without_regrow(report: Report, tmp_path: Path) -> None:
    torch.save({"report": report}, tmp_path / "run.pt")
    read = torch.load(tmp_path / "run.pt", weights_only=True)["report"]
    assert read == report
    assert json.dumps(read) == json.dumps(report)
    assert pickle.loads(pickle.dumps(report)) == report
    assert b"regrow" not in pickle.dumps(report)


def test_a_part_of_a_report_prints_as_a_dict() -> None:
    assert str(Report(layers={})) == "{'layers': {}}"


def test_a_deep_copy_shares_nothing(report: Report) -> None:
    copied = copy.deepcopy(report)
    copied["layers"]["0"]["after"] = 99
    assert report["layers"]["0"]["after"] == 4
