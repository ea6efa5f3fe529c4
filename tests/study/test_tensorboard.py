import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from regrow.study.records import RunRecord
from regrow.study.tensorboard import write_tensorboard


def run(folder="runs/repr-seed3", epochs=2, *, finished=True):
    return RunRecord(
        folder=Path(folder),
        config={"version": 2, "method": "repr", "seed": 3, "lr": 0.1, "depth": None, "exclude": ["a"]},
        environment={},
        epochs=[
            {"epoch": number, "train_loss": 1 / number, "overlap": None, "seconds": 2.5, "flops": 10**10}
            for number in range(1, epochs + 1)
        ],
        events=[],
        result={"test_accuracy": 0.75, "train_seconds": 5.0, "train_flops": None} if finished else None,
    )


def read(file):
    """TensorBoard's own view of a folder with an event file."""
    found = EventAccumulator(str(file.parent))
    found.Reload()
    return found


def test_scalars_are_there_by_epoch_and_time(tmp_path):
    (file,) = write_tensorboard([run()], tmp_path)
    assert file == tmp_path / "repr-seed3" / "events.out.tfevents.0.regrow"
    found = read(file)
    losses = found.Scalars("loss/train")
    assert [(each.wall_time, each.step, each.value) for each in losses] == [(2.5, 1, 1), (5, 2, 0.5)]
    assert [(each.step, each.value) for each in found.Scalars("accuracy/test")] == [(2, 0.75)]
    assert found.Scalars("training/FLOPs per epoch")[0].value == 1e10
    assert "filters/overlap" not in found.Tags()["scalars"]  # never a number in this run
    assert "training/FLOPs" not in found.Tags()["scalars"]


def test_each_task_has_its_test_accuracy_at_its_last_epoch(tmp_path):
    one = run(epochs=4)
    for line, task in zip(one.epochs, (1, 1, 2, 3), strict=True):
        line["task"] = task
    accuracies = {"task_accuracies": [0.5, 0.25, 0.75], "mean_accuracy_after_switch": 0.5}
    (file,) = write_tensorboard([replace(one, result={**one.result, **accuracies})], tmp_path)
    found = read(file)
    assert [(each.step, each.value) for each in found.Scalars("accuracy/test")] == [
        (2, 0.5), (3, 0.25), (4, 0.75),
    ]  # fmt: skip
    assert found.Scalars("accuracy/test, mean of all tasks but the first")[0].value == 0.5


def test_settings_are_hyperparameters(tmp_path):
    one = run()
    (file,) = write_tensorboard([one], tmp_path, {one.folder: "RePr, fraction 0.2"})
    data = read(file).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(data).session_start_info.hparams
    assert settings["method"].string_value == "RePr, fraction 0.2"
    assert (settings["seed"].number_value, settings["lr"].number_value) == (3, 0.1)
    assert (settings["depth"].string_value, settings["exclude"].string_value) == ("not set", "['a']")


def test_a_second_time_replaces_the_file_with_the_same_bytes(tmp_path):
    (file,) = write_tensorboard([run(epochs=1, finished=False)], tmp_path)
    first = file.read_bytes()
    assert write_tensorboard([run(epochs=1, finished=False)], tmp_path) == [file]
    assert file.read_bytes() == first
    write_tensorboard([run()], tmp_path)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert len(read(file).Scalars("loss/train")) == 2


def test_runs_of_the_same_name_have_a_folder_each(tmp_path):
    files = write_tensorboard([run("a/run"), run("b/run"), run("c/run", epochs=0)], tmp_path)
    assert [file.parent.name for file in files] == ["run", "run-2", "run-3"]
    assert read(files[2]).Scalars("accuracy/test")[0].step == 0


def test_it_needs_no_torch_and_says_what_to_install(tmp_path, monkeypatch):
    code = (
        "import sys; from regrow.study.tensorboard import write_tensorboard;"
        "write_tensorboard([], sys.argv[1]);"
        "print([name for name in ('torch', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'regrow\[tensorboard\]'"):
        write_tensorboard([replace(run())], tmp_path)
