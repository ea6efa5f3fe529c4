"""Whole runs on real pictures: the bundled digits, and a little of Fashion-MNIST."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.data import Splits, load_data
from regrow.study.feeding import Batches, calibration_batches
from regrow.study.identity import resolved
from regrow.study.models import build_model
from regrow.study.steps import evaluate
from regrow.study.tasks import task_splits
from regrow.study.train import Diverged, train
from regrow.study.trained import from_run

SMALL: dict[str, Any] = {"data": "digits", "width": 8, "train_size": 300, "epochs": 4, "threads": 1}


def run(folder: Path, **settings: Any) -> records.RunRecord:
    train(make_config({**SMALL, **settings}), folder)
    return records.read_run(folder)


def test_a_run_leaves_its_settings_curves_events_and_weights(tmp_path: Path) -> None:
    record = run(tmp_path / "run", method="repr", epochs=6, full=2, sub=1, cycles=1, seed=3)
    assert record.result is not None
    assert [line["epoch"] for line in record.epochs] == [1, 2, 3, 4, 5, 6]
    assert [line["phase"] for line in record.epochs] == ["full", "full", "sub", "full", "full", "full"]
    # 24 filters, of which the 16 behind the first convolution are ranked; 30 % of them are 5.
    assert [line["alive"] for line in record.epochs] == [24, 24, 19, 24, 24, 24]
    drop, restore = record.events
    assert (drop["kind"], drop["epoch"], restore["kind"], restore["epoch"]) == ("drop", 2, "restore", 3)
    assert drop["filters"] == restore["filters"]
    assert sum(map(len, drop["filters"].values())) == 5
    assert record.result["filters"] == {f"features.{i}.conv": 8 for i in range(3)}
    assert record.epochs[0]["learning_rate"] == record.epochs[2]["learning_rate"] == 0.1
    assert record.epochs[-1]["learning_rate"] < 0.1
    assert record.environment["threads"] == 1

    splits = load_data("digits", train_size=300)
    model = build_model("convnet", classes=10, channels=1, size=(8, 8), width=8)
    model.load_state_dict(load_file(tmp_path / "run" / "weights.safetensors"))
    test = Batches(splits.test, batch_size=500, mean=splits.mean, std=splits.std, shuffle=False)
    assert evaluate(model, test)["accuracy"] == record.result["test_accuracy"]
    assert record.result["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_best_epoch_is_tested_with_its_own_weights(tmp_path: Path) -> None:
    settings = {"schedule": "constant", "lr": 0.2, "seed": 1}
    result = run(tmp_path / "whole", epochs=6, **settings).result
    lines = records.read_run(tmp_path / "whole").epochs
    assert result is not None
    best = max(lines, key=lambda line: line["validation_accuracy"])
    assert result["best_epoch"] == best["epoch"] < 6
    assert result["best_validation_accuracy"] == best["validation_accuracy"] > result["validation_accuracy"]
    # A run of so many epochs ends with the weights of that epoch.
    short = run(tmp_path / "short", epochs=best["epoch"], **settings).result
    assert short is not None
    assert short["test_accuracy"] == result["best_test_accuracy"] != result["test_accuracy"]
    assert (short["best_epoch"], short["best_test_accuracy"]) == (best["epoch"], short["test_accuracy"])


def test_a_sequence_has_no_best_epoch_because_each_task_is_tested_once(tmp_path: Path) -> None:
    record = run(tmp_path / "run", epochs=6, tasks=2, regime="permuted-labels", seed=1)
    assert record.result is not None
    found = [record.result[key] for key in ("best_epoch", "best_validation_accuracy", "best_test_accuracy")]
    assert found == [None, None, None]


# Those that need no other settings; tests/study/methods/test_runs.py trains all twice.
@pytest.mark.parametrize(
    "method",
    ["standard", "repr", "bridgeout", "targeted-bridgeout", "dropout", "targeted-dropout", "dsd"],
)
def test_the_same_seed_gives_the_same_weights_bit_for_bit(tmp_path: Path, method: str) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, method=method, seed=5)
        torch.rand(3)  # whatever else the process draws
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    run(tmp_path / "c", method=method, seed=6)
    other = load_file(tmp_path / "c" / "weights.safetensors")
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_cudnn_takes_kernels_that_give_the_same_result_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.study import train as module

    cudnn, real, seen = torch.backends.cudnn, module.evaluate, []

    def evaluated(*arguments: Any) -> dict[str, float]:
        seen.append((cudnn.deterministic, cudnn.benchmark))
        return real(*arguments)

    monkeypatch.setattr(module, "evaluate", evaluated)
    monkeypatch.setattr(cudnn, "benchmark", True)
    run(tmp_path / "run", epochs=1)
    assert seen == [(True, False)] * 2
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


def test_the_last_seed_trains(tmp_path: Path) -> None:
    last = 2**63 - 1
    assert run(tmp_path / "run", method="repr", seed=last, split_seed=last).result is not None


def test_the_runs_of_a_pair_are_the_same_until_the_first_cut(tmp_path: Path) -> None:
    settings = {"epochs": 8, "full": 3, "sub": 1, "cycles": 1}
    standard = run(tmp_path / "standard", **settings)
    regrown = run(tmp_path / "repr", method="repr", **settings)
    for one, other in zip(standard.epochs[:3], regrown.epochs[:3], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert standard.epochs[3]["train_loss"] != regrown.epochs[3]["train_loss"]
    rates = [[line["learning_rate"] for line in record.epochs] for record in (standard, regrown)]
    assert rates[0] == rates[1]


def test_a_finished_run_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    config = make_config(SMALL)
    assert train(config, tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert not train(config, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"epochs=4 \(asked for: 5\).*--rerun"):
        train(make_config({**SMALL, "epochs": 5}), tmp_path / "run")
    curve = records.curve_path(tmp_path / "run", "test", "l2", "layer")
    curve.write_text("of the weights that are about to go")
    assert train(make_config({**SMALL, "epochs": 5}), tmp_path / "run", rerun=True)
    assert not curve.exists()
    assert len(records.read_run(tmp_path / "run").epochs) == 5


def test_an_unfinished_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    whole = run(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = run(tmp_path / "run")
    assert len(again.epochs) == 4
    assert again.result is not None
    assert whole.result is not None
    assert again.result["test_loss"] == whole.result["test_loss"]


def test_the_recorded_settings_repeat_the_run(tmp_path: Path) -> None:
    first = run(tmp_path / "a", method="repr", epochs=6)
    config = make_config(first.config)
    assert resolved(config) == {k: v for k, v in first.config.items() if k != "version"}
    train(config, tmp_path / "b")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", ["bridgeout", "targeted-bridgeout", "dropout", "targeted-dropout"])
def test_with_a_strength_of_0_a_rival_is_standard_training(tmp_path: Path, method: str) -> None:
    standard = run(tmp_path / "standard", seed=5)
    other = run(tmp_path / "other", method=method, p=0.0, reestimate=False, seed=5)
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("standard", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert standard.result is not None
    assert other.result is not None
    assert other.result["test_loss"] == standard.result["test_loss"]
    run(tmp_path / "noisy", method=method, p=0.3, reestimate=False, seed=5)
    noisy = load_file(tmp_path / "noisy" / "weights.safetensors")
    assert not torch.equal(noisy["classifier.weight"], one["classifier.weight"])


def test_targeting_and_q_reach_the_noise(tmp_path: Path) -> None:
    weights = []
    for name, settings in {
        "plain": {"method": "bridgeout"},
        "q": {"method": "bridgeout", "q": 1.0},
        "targeted": {"method": "targeted-bridgeout", "target_fraction": 0.5},
        # All of the weights are targets: no other than plain Bridgeout.
        "all": {"method": "targeted-bridgeout", "target_fraction": 1.0},
    }.items():
        run(tmp_path / name, epochs=1, **settings)
        weights.append(load_file(tmp_path / name / "weights.safetensors")["features.1.conv.weight"])
    assert torch.equal(weights[0], weights[3])
    assert not any(torch.equal(weights[0], other) for other in weights[1:3])


def test_after_bridgeout_the_statistics_are_those_of_the_network_without_noise(tmp_path: Path) -> None:
    settings = {"method": "bridgeout", "epochs": 3, "seed": 1}
    taken = run(tmp_path / "taken", **settings)
    left = run(tmp_path / "left", reestimate=False, **settings)
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("taken", "left"))
    differing = {key for key in one if not torch.equal(one[key], two[key])}
    assert differing == {
        f"features.{i}.norm.{name}"
        for i in range(3)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    # The first norm's mean by another way: the convolution's own mean over the same pictures.
    splits = load_data("digits", train_size=300)
    model = build_model("convnet", classes=10, channels=1, size=(8, 8), width=8)
    model.load_state_dict(one)
    pictures = torch.cat(calibration_batches(splits.train, mean=splits.mean, std=splits.std))
    assert len(pictures) == 300
    mean = model.get_submodule("features.0.conv")(pictures).mean((0, 2, 3))
    torch.testing.assert_close(one["features.0.norm.running_mean"], mean, rtol=1e-3, atol=1e-4)
    assert taken.result is not None
    assert left.result is not None
    # Measured again with the new statistics, not carried over from the last epoch.
    assert taken.result["validation_accuracy"] == evaluate(model, validation_of(splits))["accuracy"]


def validation_of(splits: Splits) -> Batches:
    return Batches(splits.validation, batch_size=500, mean=splits.mean, std=splits.std, shuffle=False)


def test_a_loss_of_nan_ends_the_run_and_names_step_rate_and_last_good_state(tmp_path: Path) -> None:
    settings = {"lr": 1e30, "batch_norm": False, "batch_size": 100}
    with pytest.raises(Diverged, match=r"(nan|inf) in epoch 1, step [23] of 3, at a learning rate of 1e\+30"):
        run(tmp_path / "run", **settings)
    good = load_file(tmp_path / "run" / "last-good.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in good.values())
    assert not records.is_finished(tmp_path / "run")


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a run folder"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "convnt"}, "convnet"),
        ({"train_size": 5000}, "available"),
        ({"device": "cuda:77"}, "--device cpu"),
        ({"method": "repr", "exclude": ["features.9"]}, "did you mean 'features"),
        ({"data": "folder"}, "--data-dir"),
    ],
)
def test_bad_input_is_refused_before_a_folder_is_made(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "standard"},
        {"method": "repr", "consumers": "zero", "criterion": "ortho-corrected", "optimizer": "adam"},
    ],
)
def test_fashion_mnist_end_to_end(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = {"data": "fashion-mnist", "train_size": 1000, "width": 16, "epochs": 4, "batch_size": 50}
    record = run(tmp_path / "run", **config, **settings)
    assert record.result is not None
    # Ten classes: chance is 0.1. A working pipeline is far above it after 80 steps.
    assert record.result["test_accuracy"] > 0.3
    assert len(record.events) == (2 if settings["method"] == "repr" else 0)


REGIMES: dict[str, dict[str, Any]] = {
    "same": {},
    "permuted-labels": {},
    "permuted-pixels": {},
    "growing-data": {},
    "corrected-labels": {"label_noise": 0.4},
    "new-classes": {},
    "new-pictures": {},
    "new-domain": {"second_data": "fashion-mnist"},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_trains_its_tasks_and_tests_each_at_its_end(tmp_path: Path, regime: str) -> None:
    record = run(tmp_path / "run", regime=regime, tasks=2, width=4, train_size=200, **REGIMES[regime])
    assert record.result is not None
    assert [line["task"] for line in record.epochs] == [1, 1, 2, 2]
    accuracies = record.result["task_accuracies"]
    assert len(accuracies) == 2
    assert record.result["test_accuracy"] == accuracies[1] == record.result["mean_accuracy_after_switch"]
    # What a run leaves is judged by the pictures of its last task.
    trained = from_run(tmp_path / "run", device="cpu")
    assert trained.test is not None
    right = sum(int((trained.model(x).argmax(1) == y).sum()) for x, y in trained.test)
    assert right / len(trained.test) == pytest.approx(accuracies[1])


def test_the_first_task_is_what_a_run_of_one_task_trains(tmp_path: Path) -> None:
    settings = {"full": 1, "sub": 1, "cycles": 1, "method": "repr", "width": 4}
    sequence = run(tmp_path / "a", regime="permuted-labels", tasks=3, epochs=9, **settings)
    alone = run(tmp_path / "b", epochs=3, **settings)
    assert sequence.result is not None
    assert alone.result is not None
    assert sequence.result["task_accuracies"][0] == alone.result["test_accuracy"]
    assert alone.result["task_accuracies"] == [alone.result["test_accuracy"]]
    assert alone.result["mean_accuracy_after_switch"] is None
    mean = sum(sequence.result["task_accuracies"][1:]) / 2
    assert sequence.result["mean_accuracy_after_switch"] == pytest.approx(mean)


def test_the_test_pictures_of_each_task_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def counted(model: Any, batches: Batches, *rest: Any) -> dict[str, float]:
        seen.append(batches.labels.tolist())
        return evaluate(model, batches, *rest)

    monkeypatch.setattr("regrow.study.train.evaluate", counted)
    settings = {"regime": "permuted-labels", "tasks": 3, "epochs": 6, "width": 4}
    run(tmp_path / "run", **settings)
    splits, config = load_data("digits", train_size=300), make_config({**SMALL, **settings})
    tasks = [task_splits(splits, config, task) for task in (1, 2, 3)]
    expected = []
    for each in tasks:
        expected += [each.validation.labels.tolist()] * 2 + [each.test.labels.tolist()]
    assert seen == expected


def test_a_regime_that_the_data_does_not_suit_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    for settings, message in (
        ({"regime": "new-classes", "tasks": 4}, "10 classes do not make 4 equal groups"),
        ({"regime": "growing-data", "tasks": 4, "train_size": 30}, "has 7 training pictures, and needs 10"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.gives_up  # maps of one pixel cannot be normalised by one picture
@pytest.mark.parametrize("model", ["resnet", "torchvision:resnet18", "timm:resnet10t"])
def test_repr_trains_residual_nets(tmp_path: Path, model: str) -> None:
    size = {"depth": 20, "width": 4} if model == "resnet" else {"width": None}
    data = {
        "model": model,
        "train_size": 40,
        "batch_size": 20,
        "epochs": 3,
        "method": "repr",
        "consumers": "zero",
    }
    record = run(tmp_path / "run", **size, **data)
    assert [event["kind"] for event in record.events] == ["drop", "restore"]
    assert record.result is not None


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_and_leaves_float32(tmp_path: Path, precision: str) -> None:
    exact = run(tmp_path / "exact", seed=2, epochs=8)
    rounded = run(tmp_path / precision, seed=2, epochs=8, precision=precision)
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("exact", precision))
    assert {tensor.dtype for tensor in two.values()} == {torch.float32, torch.int64}
    assert not torch.equal(one["classifier.weight"], two["classifier.weight"])
    # float16's scaler skips the first steps while it looks for its scale.
    assert rounded.epochs[-1]["train_loss"] == pytest.approx(exact.epochs[-1]["train_loss"], rel=0.3)
    assert rounded.config["precision"] == precision


def test_flops_of_an_epoch_by_hand(tmp_path: Path) -> None:
    settings = {
        "full": 1,
        "sub": 1,
        "cycles": 1,
        "epochs": 3,
        "train_size": 301,
        "batch_size": 100,
        "width": 4,
    }
    record = run(tmp_path / "run", method="repr", **settings)
    # 300 of 301 pictures: a last batch of one is left out. Convolutions over 8×8, 4×4 and 2×2, the first
    # of them without a gradient for its input.
    weights = [(9, 4, 64), (36, 4, 16), (36, 4, 4)]
    convolutions = [2 * inputs * filters * places for inputs, filters, places in weights]
    head = 2 * 4 * 10
    whole = 300 * (2 * convolutions[0] + 3 * sum(convolutions[1:]) + 3 * head)
    flops = [line["flops"] for line in record.epochs]
    assert record.result is not None
    assert record.result["train_flops"] == sum(flops)
    assert flops[0] == flops[2] == whole
    assert flops[1] < whole


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["standard", "repr", "bridgeout"])
def test_a_run_on_a_gpu(tmp_path: Path, device: torch.device, method: str) -> None:
    settings: dict[str, Any] = {"method": method, "epochs": 8, "train_size": 1000, "device": str(device)}
    if method == "repr":
        settings |= {"full": 2, "sub": 2, "cycles": 1}
    record = run(tmp_path / "gpu", **settings)
    assert record.result is not None
    assert record.environment["device"].startswith(str(device))
    assert record.result["test_accuracy"] > 0.25  # 0.1 by chance; under noise eight epochs are few
    if method == "repr":
        assert [event["kind"] for event in record.events] == ["drop", "restore"]
        assert [line["alive"] for line in record.epochs] == [24, 24, 19, 19, 24, 24, 24, 24]
    # The weights are a file that a machine without a GPU reads.
    weights = load_file(tmp_path / "gpu" / "weights.safetensors")
    assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in weights.values())
