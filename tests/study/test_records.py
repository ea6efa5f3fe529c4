import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from regrow.study import records

EPOCH = {
    "version": 3,
    "epoch": 1,
    "task": 1,
    "phase": "full",
    "learning_rate": 0.1,
    "train_loss": 1.5,
    "train_accuracy": 0.5,
    "validation_loss": 1.4,
    "validation_accuracy": 0.55,
    "overlap": 3.25,
    "alive": 6,
    "filters": 6,
    "seconds": 2.5,
    "flops": 1000,
}
EVENT = {
    "version": 3,
    "epoch": 2,
    "kind": "drop",
    "cycle": 1,
    "filters": {"features.0.conv": [1, 3]},
    "notes": [],
}
RESULT = {
    "version": 3,
    "test_accuracy": 0.6,
    "test_loss": 1.2,
    "validation_accuracy": 0.62,
    "train_seconds": 5.0,
    "seconds": 6.0,
    "parameters": 99,
    "train_flops": 3000,
    "resumed": 0,
    "filters": {"features.0.conv": 4, "features.1.conv": 2},
    "task_accuracies": [0.6],
    "mean_accuracy_after_switch": None,
}


def make_run(folder: Path, method: str = "repr", seed: int = 0, *, finished: bool = True) -> Path:
    records.write_yaml(
        records.config_path(folder), {"version": 3, "method": method, "seed": seed, "epochs": 3}
    )
    records.write_json(records.environment_path(folder), records.environment("cpu", threads=2))
    for epoch in (1, 2, 3):
        records.append_line(records.epochs_path(folder), EPOCH | {"epoch": epoch})
    records.append_line(records.events_path(folder), EVENT)
    if finished:
        records.write_json(records.result_path(folder), RESULT)
    return folder


def test_one_path_per_artifact():
    assert records.run_folder("out", "repr", 3) == Path("out/repr-seed3")
    names = [
        path("run").name
        for path in (
            records.config_path,
            records.environment_path,
            records.epochs_path,
            records.events_path,
            records.result_path,
            records.weights_path,
            records.comparison_path,
        )
    ]
    assert names == [
        "config.yaml",
        "environment.json",
        "epochs.jsonl",
        "events.jsonl",
        "result.json",
        "weights.safetensors",
        "comparison.json",
    ]


def test_write_json_turns_nan_and_infinity_into_null_at_every_depth(tmp_path):
    path = tmp_path / "new folder" / "a.json"
    records.write_json(path, {"a": float("nan"), "b": {"c": [1.5, float("inf")]}, "d": np.float64(0.5)})
    assert json.loads(path.read_text()) == {"a": None, "b": {"c": [1.5, None]}, "d": 0.5}
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("write", [records.write_json, records.write_yaml, records.append_line])
def test_what_cannot_be_written_leaves_the_old_file_whole(tmp_path, write):
    path = tmp_path / "a"
    path.write_text('{"old": 1}\n')
    with pytest.raises(ValueError, match="Use numbers, strings, booleans, None, lists and mappings"):
        write(path, {"new": object()})
    assert path.read_text() == '{"old": 1}\n'
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_replace_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    records.write_text(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_write_yaml_keeps_order_values_and_letters(tmp_path):
    data = {"z": 1e-05, "a": "größe", "list": [1, "x"], "none": None, "yes": "yes", "tuple": (1, 2)}
    records.write_yaml(tmp_path / "a.yaml", data)
    back = yaml.safe_load((tmp_path / "a.yaml").read_text(encoding="utf-8"))
    assert back == data | {"tuple": [1, 2]}
    assert list(back) == list(data)
    assert "größe" in (tmp_path / "a.yaml").read_text(encoding="utf-8")


def test_lines_come_back_as_written(tmp_path):
    path = tmp_path / "folder" / "a.jsonl"
    assert records.read_lines(path) == []
    lines = [{"epoch": 1, "note": "two\nlines"}, {"epoch": 2, "note": "é", "loss": None}]
    for line in lines:
        records.append_line(path, line)
    assert records.read_lines(path) == lines
    assert path.read_bytes().count(b"\n") == 2


def test_lines_are_replaced_whole_and_none_removes_the_file(tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = [{"epoch": 1, "loss": float("nan")}, {"epoch": 2, "loss": 0.1}]
    records.write_lines(path, lines)
    for line in lines:
        records.append_line(other, line)
    assert path.read_bytes() == other.read_bytes()
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        records.write_lines(path, [{"epoch": object()}])
    assert path.read_bytes() == other.read_bytes()
    records.write_lines(path, [])
    assert not path.exists()


def test_a_torn_last_line_is_dropped_and_cut_off_by_the_next_append(tmp_path):
    path = tmp_path / "a.jsonl"
    records.append_line(path, {"epoch": 1})
    with path.open("a") as file:
        file.write('{"epoch": 2, "los')
    assert records.read_lines(path) == [{"epoch": 1}]
    records.append_line(path, {"epoch": 2})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_a_file_that_is_one_torn_line_has_no_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"epo')
    assert records.read_lines(path) == []
    records.append_line(path, {"epoch": 1})
    assert records.read_lines(path) == [{"epoch": 1}]


@pytest.mark.parametrize("bad", [b"{", b"", b"[1]", b'"text"', b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_any_other_corrupt_line_is_named_by_file_and_number(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + bad + b'\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        records.read_lines(path)


def test_environment_has_every_documented_key_and_a_command_without_folders(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/regrow", "train", "--title", "two words"])
    found = records.environment("cuda:0", threads=3)
    assert list(found) == [
        "version",
        "regrow",
        "python",
        "torch",
        "torchvision",
        "numpy",
        "platform",
        "processor",
        "cores",
        "threads",
        "device",
        "command",
    ]
    assert found["command"] == "regrow train --title 'two words'"
    assert (found["device"], found["threads"], found["numpy"]) == ("cuda:0", 3, np.__version__)
    assert found["processor"]
    assert found["cores"] >= 1


def test_environment_names_the_program_when_run_as_a_module(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/lib/regrow/__main__.py", "compare"])
    assert records.environment("cpu", 1)["command"] == "regrow compare"


def test_environment_says_none_for_what_is_not_installed(monkeypatch):
    def missing(name):
        raise records.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(records.metadata, "version", missing)
    assert records.environment("cpu", 1)["torchvision"] is None


def test_a_run_comes_back_as_written(tmp_path):
    run = records.read_run(make_run(tmp_path / "repr-seed4", seed=4))
    assert (run.method, run.seed) == ("repr", 4)
    assert run.config["epochs"] == 3
    assert run.environment["device"] == "cpu"
    assert [epoch["epoch"] for epoch in run.epochs] == [1, 2, 3]
    assert run.events == [EVENT]
    assert run.result == RESULT


def test_a_run_is_unfinished_until_its_result_is_there(tmp_path):
    folder = make_run(tmp_path, finished=False)
    records.environment_path(folder).unlink()
    assert not records.is_finished(folder)
    run = records.read_run(folder)
    assert (run.result, run.environment) == (None, {})
    records.write_json(records.result_path(folder), RESULT)
    assert records.is_finished(folder)
    with pytest.raises(ValueError, match=r"environment\.json is missing from a finished run"):
        records.read_run(folder)


def test_a_diverged_run_can_be_read(tmp_path):
    folder = make_run(tmp_path)
    records.append_line(
        records.epochs_path(folder),
        EPOCH | {"epoch": 4, "train_loss": float("nan"), "overlap": float("inf")},
    )
    last = records.read_run(folder).epochs[-1]
    assert (last["train_loss"], last["overlap"]) == (None, None)


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "epochs.jsonl", "events.jsonl", "result.json"]
)
def test_a_newer_version_says_to_upgrade(tmp_path, name):
    path = make_run(tmp_path) / name
    path.write_text(
        path.read_text().replace('"version": 3', '"version": 4').replace("version: 3", "version: 4")
    )
    with pytest.raises(ValueError, match=rf"{name}.*newer regrow .*upgrade regrow"):
        records.read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "- a\n", "must hold a mapping"),
        ("config.yaml", "", "must hold a mapping"),
        ("config.yaml", "1: 2\n", "must hold a mapping"),
        ("config.yaml", "a: [", "not valid YAML"),
        ("config.yaml", "method: repr\nseed: 0\n", "has no 'version'"),
        ("config.yaml", "version: 1\nmethod: repr\n", "has no 'seed'"),
        ("config.yaml", "version: 1\nmethod: repr\nseed: true\n", "'seed' must be int, got True"),
        ("config.yaml", "version: 1\nmethod: 3\nseed: 1\n", "'method' must be str, got 3"),
        ("environment.json", '{"version": 1}', "has no 'regrow'"),
        ("environment.json", "{", "not valid JSON"),
        ("result.json", "[]", "must hold a JSON object"),
        ("result.json", json.dumps(RESULT | {"test_accuracy": 88.1}), "'test_accuracy' must be a fraction"),
        ("result.json", json.dumps(RESULT | {"test_accuracy": None}), "'test_accuracy' must be int or float"),
        ("result.json", json.dumps(RESULT).replace("1.2", "1e999"), "'test_loss' must be"),
        ("result.json", json.dumps(RESULT | {"filters": {"a": "4"}}), "each layer's number of filters"),
        ("epochs.jsonl", json.dumps({"version": 1, "epoch": 1}) + "\n", "line 1 has no 'phase'"),
        ("epochs.jsonl", (json.dumps(EPOCH) + "\n") * 2, "line 2: epoch 1 comes after epoch 1"),
        (
            "events.jsonl",
            json.dumps(EVENT | {"kind": "cut"}) + "\n",
            "must be one of 'drop', 'restore', .*, got 'cut'",
        ),
        ("events.jsonl", json.dumps(EVENT | {"filters": {"a": 1}}) + "\n", "list of indices for 'a'"),
        ("events.jsonl", json.dumps(EVENT | {"filters": {"features.0.conv": [4]}}) + "\n", "no filter 4"),
        ("events.jsonl", json.dumps(EVENT | {"filters": {"other": [0]}}) + "\n", "'other' has 0 filters"),
    ],
)
def test_a_malformed_file_is_named_with_its_key(tmp_path, name, content, message):
    (make_run(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        records.read_run(tmp_path)
    assert name in str(caught.value)


def test_find_runs_looks_below_and_counts_no_run_twice(tmp_path):
    make_run(tmp_path / "a" / "standard-seed10", "standard", 10)
    make_run(tmp_path / "a" / "standard-seed2", "standard", 2, finished=False)
    make_run(tmp_path / "a" / "repr-seed2", "repr", 2)
    make_run(tmp_path / "single")
    runs = records.find_runs(tmp_path / "a", str(tmp_path / "a" / "repr-seed2"), tmp_path / "single")
    assert [run.folder.name for run in runs] == ["single", "repr-seed2", "standard-seed2", "standard-seed10"]


def test_find_runs_says_what_a_run_folder_is(tmp_path):
    with pytest.raises(ValueError, match=r"no run found in .*A run folder holds config\.yaml"):
        records.find_runs(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        records.find_runs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run folder"):
        records.read_run(tmp_path)


CURVE = {
    "version": 3,
    "split": "test",
    "criterion": "l2",
    "scope": "layer",
    "seed": None,
    "weights": "ab",
    "classes": 10,
    "images": 100,
    "calibration_images": 50,
    "layers": {"conv": 4},
    "left_out": {},
    "points": [{"reading": "zeroed", "fraction": 0.5, "dropped": 2, "accuracy": 0.75}],
}


def test_curves_are_named_by_how_they_were_measured_and_read_back(tmp_path):
    path = records.curve_path(tmp_path, "validation", "ortho-corrected", "global")
    assert path == tmp_path / "curve-validation-ortho-corrected-global.json"
    records.write_json(path, CURVE)
    records.write_json(records.curve_path(tmp_path, "test", "l2", "layer"), CURVE | {"seed": 3})
    records.write_json(tmp_path / "curve.json", {"what": "regrow curve writes about many runs"})
    assert records.read_curve(path) == CURVE
    assert [record["seed"] for record in records.read_curves(tmp_path)] == [3, None]
    assert records.read_curves(tmp_path / "none") == []


POINT = CURVE["points"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 4}, "newer regrow"),
        ({"weights": None}, "'weights' must be str, got None"),
        ({"classes": 0}, "'classes' must be 1 or more, got 0"),
        ({"points": {}}, "'points' must be list"),
        ({"points": [POINT, 3]}, "point 2 must hold a mapping"),
        ({"points": [POINT | {"fraction": 1.0}]}, "point 1: 'fraction' must be from 0 to below 1, got 1.0"),
        ({"points": [POINT | {"accuracy": 75}]}, "'accuracy' must be a fraction from 0 to 1, got 75"),
        ({"points": [POINT | {"accuracy": None}]}, "'accuracy' must be int or float, got None"),
        ({"points": [{"reading": "zeroed"}]}, "point 1 has no 'fraction'"),
    ],
)
def test_a_malformed_curve_is_refused_by_name(tmp_path, changes, message):
    path = records.curve_path(tmp_path, "test", "l2", "layer")
    records.write_json(path, CURVE | changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        records.read_curves(tmp_path)
    assert path.name in str(caught.value)


def test_the_hash_of_weights_is_that_of_the_file(tmp_path):
    assert records.weights_hash(tmp_path) is None
    records.weights_path(tmp_path).write_bytes(b"abc")
    # The digest of "abc" in FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert records.weights_hash(tmp_path) == expected


def test_bytes_are_written_whole_and_without_a_trace(tmp_path):
    records.write_bytes(tmp_path / "new" / "a.png", b"\x00\xff")
    assert (tmp_path / "new" / "a.png").read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path / "new") == ["a.png"]


def test_records_without_tasks_are_those_of_a_single_task(tmp_path):
    folder = make_run(tmp_path / "run")
    old = {
        key: value
        for key, value in RESULT.items()
        if key not in ("task_accuracies", "mean_accuracy_after_switch")
    }
    records.write_json(records.result_path(folder), old | {"version": 2})
    lines = [
        {key: value for key, value in EPOCH.items() if key != "task"} | {"version": 2, "epoch": epoch}
        for epoch in (1, 2)
    ]
    records.write_lines(records.epochs_path(folder), lines)
    run = records.read_run(folder)
    assert [line["task"] for line in run.epochs] == [1, 1]
    assert run.result["task_accuracies"] is None
    assert run.result["mean_accuracy_after_switch"] is None


def test_accuracies_over_tasks_come_back_as_written(tmp_path):
    folder = make_run(tmp_path / "run")
    accuracies = {"task_accuracies": [0.9, 0.5, 0.7], "mean_accuracy_after_switch": 0.6}
    records.write_json(records.result_path(folder), RESULT | accuracies)
    result = records.read_run(folder).result
    assert {key: result[key] for key in accuracies} == accuracies


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_accuracies": 0.5}, "'task_accuracies' must be list or null, got 0.5"),
        ({"task_accuracies": [0.5, "a"]}, "'task_accuracies' must list fractions from 0 to 1"),
        ({"task_accuracies": [0.5, True]}, "must list fractions from 0 to 1"),
        ({"task_accuracies": [55.0]}, "must list fractions from 0 to 1, got [55.0]"),
        ({"task_accuracies": [0.5, None]}, "must list fractions from 0 to 1"),
        ({"task_accuracies": [0.5, 0.6]}, "'mean_accuracy_after_switch' must be a number where"),
        ({"mean_accuracy_after_switch": 0.6}, "must be a number where 'task_accuracies' has two or more"),
        (
            {"task_accuracies": [0.5, 0.6], "mean_accuracy_after_switch": 60},
            "'mean_accuracy_after_switch' must be a fraction from 0 to 1, got 60",
        ),
    ],
)
def test_malformed_accuracies_over_tasks_are_refused_by_name(tmp_path, changes, message):
    folder = make_run(tmp_path / "run")
    records.write_json(records.result_path(folder), RESULT | changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        records.read_run(folder)
    assert "result.json" in str(caught.value)
