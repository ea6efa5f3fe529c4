"""The trained network of a run folder, by the public name."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import regrow
from regrow.pruning.accuracy import top1
from regrow.study import records
from regrow.study.config import make_config
from regrow.study.train import train
from regrow.study.trained import from_run


def test_the_network_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(make_config({"epochs": 1, "width": 4, "train_size": 100, "threads": 1, "device": "cpu"}), folder)
    drawn = torch.get_rng_state()
    model = regrow.load_run(folder)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(module.training for module in model.modules())
    result = records.read_run(folder).result
    assert result is not None
    test = from_run(folder).test
    assert test is not None
    assert top1(model, test)[0] == pytest.approx(result["test_accuracy"], abs=0.003)
    saved = load_file(records.weights_path(folder))
    again = regrow.load_run(str(folder)).state_dict()
    assert saved.keys() == model.state_dict().keys() == again.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name])
        assert torch.equal(tensor, again[name])


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(ValueError, match="run is not a run folder"):
        regrow.load_run(folder)
    config = make_config({}).model_dump(mode="json")
    records.write_yaml(records.config_path(folder), {"version": records.VERSION, **config})
    with pytest.raises(ValueError, match="unfinished run, which has no final weights"):
        regrow.load_run(folder)


@pytest.mark.parametrize(("folder", "kind"), [(None, "None"), (3, "an int"), ("", "the text ''")])
def test_what_is_no_folder(folder: object, kind: str) -> None:
    with pytest.raises(ValueError, match=f"load_run takes a run folder, such as 'runs/one', and got {kind}"):
        regrow.load_run(folder)  # type: ignore[arg-type]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "yaml" else name)
    with pytest.raises(ImportError, match=r"load_run needs yaml: pip install 'regrow\[study\]'"):
        regrow.load_run("run")
