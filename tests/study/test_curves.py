import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from regrow.study import pruned, records
from regrow.study.config import make_config
from regrow.study.curves import FRACTIONS, READINGS, check_curve, measure_run, pruned_accuracies
from regrow.study.train import train

X = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
LABELS = torch.tensor([0, 1])


def net(filters, head, bias=0.0, *, betas=None):
    """A 1×1 convolution of these filters, on pictures of one pixel; logits 0 and head · channels + bias."""
    conv, linear = nn.Conv2d(1, len(filters), 1, bias=False), nn.Linear(len(filters), 2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(filters).view(-1, 1, 1, 1))
        linear.weight.copy_(torch.tensor([[0.0] * len(filters), head]))
        linear.bias.copy_(torch.tensor([0.0, bias]))
    layers = {"conv": conv}
    if betas is not None:
        layers["norm"] = nn.BatchNorm2d(len(filters))
        with torch.no_grad():
            layers["norm"].bias.copy_(torch.tensor(betas))
    model = nn.Sequential()
    for name, layer in {**layers, "flatten": nn.Flatten(), "head": linear}.items():
        model.add_module(name, layer)
    return model


class Judge:
    """The accuracy on the two pictures, and how often it was asked for."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        assert not model.training
        with torch.no_grad():
            return float((model(X).argmax(1) == LABELS).float().mean())


def by_reading(found):
    curves = {}
    for point in found["points"]:
        curves.setdefault(point["reading"], []).append(point["accuracy"])
    return curves


def test_a_filter_of_zeros_is_cut_first_and_changes_nothing():
    judge = Judge()
    found = pruned_accuracies(
        net([1.0, 0.0], [1.0, 5.0]), judge, example_inputs=X, calibration=[X], fractions=[0.5, 0.0]
    )
    assert found == {
        "layers": {"conv": 2},
        "left_out": {},
        "points": [
            {"reading": reading, "fraction": fraction, "dropped": dropped, "accuracy": 1.0}
            for reading in READINGS
            for fraction, dropped in ((0.0, 0), (0.5, 1))
        ],
    }
    assert judge.calls == 4  # uncut, which is one network, zeroed, removed and compensated


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "gradient"])
def test_criteria_that_take_the_loss_see_the_filter_that_matters(criterion):
    # Of the filters 1 and 2 the head reads the first alone: l2 would cut it, and the loss does not.
    labelled = [(X, LABELS)]
    settings = {"example_inputs": X, "fractions": [0, 0.5], "readings": ["removed"], "criterion": criterion}
    found = pruned_accuracies(net([1.0, 2.0], [1.0, 0.0]), Judge(), calibration=labelled, **settings)
    assert by_reading(found) == {"removed": [1.0, 1.0]}
    with pytest.raises(ValueError, match="reads pictures: pass calibration=, pairs of inputs and labels"):
        pruned_accuracies(net([1.0, 2.0], [1.0, 0.0]), Judge(), **settings)
    with pytest.raises(ValueError, match="takes the cross entropy, so a batch is a pair"):
        pruned_accuracies(net([1.0, 2.0], [1.0, 0.0]), Judge(), calibration=[X], **settings)


def test_the_filter_that_matters_is_missed_when_its_norm_is_smaller():
    found = pruned_accuracies(
        net([1.0, 2.0], [1.0, 0.0]),
        Judge(),
        example_inputs=X,
        fractions=[0, 0.5],
        readings=["zeroed", "removed"],
    )
    assert by_reading(found) == {"zeroed": [1.0, 0.5], "removed": [1.0, 0.5]}


def test_the_three_readings_differ_by_hand():
    # Channels are 0.5 x and 0.1 x + 1; the second logit is their sum − 1. Without the second filter the norm
    # still adds its 1 (zeroed), or nothing does (removed: 0.5 − 1 < 0), or the bias takes its mean of 1 and
    # the first channel is normalised anew to x (compensated).
    model = net([0.5, 0.1], [1.0, 1.0], -1.0, betas=[0.0, 1.0])
    found = pruned_accuracies(model, Judge(), example_inputs=X, calibration=[X], fractions=[0, 0.5])
    assert by_reading(found) == {"zeroed": [1.0, 1.0], "removed": [1.0, 0.5], "compensated": [1.0, 1.0]}


def test_where_nothing_is_cut_every_reading_is_the_network_itself():
    model = net([1.0, 0.5], [1.0, 0.0], betas=[0.0, 0.0])
    model.norm.running_mean.fill_(100.0)
    judge = Judge()
    found = pruned_accuracies(model, judge, example_inputs=X, calibration=[X], fractions=[0, 0.1])
    assert by_reading(found) == {"zeroed": [0.5, 0.5], "removed": [0.5, 0.5], "compensated": [0.5, 0.5]}
    assert {point["dropped"] for point in found["points"]} == {0}
    assert judge.calls == 1


@pytest.mark.filterwarnings("error")
def test_the_best_filter_of_a_layer_stays_and_equal_cuts_are_measured_once():
    judge = Judge()
    found = pruned_accuracies(
        net([4.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]),
        judge,
        example_inputs=X,
        fractions=[0.7, 0.75, 0.8, 0.9, 0.99],
        readings=["removed"],
    )
    assert [point["dropped"] for point in found["points"]] == [3] * 5
    assert by_reading(found) == {"removed": [1.0] * 5}
    assert judge.calls == 1


def test_scopes_by_hand(make_net):
    model = make_net((2, 4), norm=nn.Identity)
    with torch.no_grad():
        model.conv1.weight.fill_(0.01)
        model.conv2.weight.fill_(1.0)
    alive = []

    def look(pruned):
        alive.append([int(conv.weight.flatten(1).any(1).sum()) for conv in (pruned.conv1, pruned.conv2)])
        return 0.0

    for scope in ("layer", "global"):
        pruned_accuracies(
            model,
            look,
            example_inputs=torch.randn(1, 3, 4, 4),
            fractions=[0.5],
            readings=["zeroed"],
            scope=scope,
        )
    # Three of six: globally the small filters first, but one of them stays.
    assert alive == [[1, 2], [1, 2]]
    pruned_accuracies(
        model,
        look,
        example_inputs=torch.randn(1, 3, 4, 4),
        fractions=[0.17],
        readings=["zeroed"],
        scope="global",
    )
    assert alive[-1] == [1, 4]


def test_a_convolution_that_is_the_classifier_is_never_cut():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    found = pruned_accuracies(
        model, lambda _: 0.5, example_inputs=torch.randn(1, 3, 5, 5), readings=["zeroed"], fractions=[0.9]
    )
    assert found["layers"] == {"0": 4}
    assert "like a classifier's" in found["left_out"]["2"]


def test_the_model_and_the_random_generator_are_left_as_they_were(make_net):
    model = make_net()
    x = torch.randn(8, 3, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()

    def spoil(pruned):
        with torch.no_grad():
            for parameter in pruned.parameters():
                parameter.zero_()
        return 0.5

    pruned_accuracies(model, spoil, example_inputs=x[:1], calibration=[x], fractions=[0, 0.3])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("criterion", ["l2", "ortho", "random"])
def test_the_same_call_gives_the_same_points(make_net, criterion):
    model, x = make_net(), torch.randn(16, 3, 6, 6)
    labels = torch.arange(16) % 4

    def accuracy(pruned):
        with torch.no_grad():
            return float((pruned(x).argmax(1) == labels).float().mean())

    settings = {"example_inputs": x[:1], "calibration": iter([x]), "criterion": criterion, "seed": 1}
    first = pruned_accuracies(model, accuracy, **settings)
    assert pruned_accuracies(model, accuracy, **settings | {"calibration": [x]}) == first
    assert [point["fraction"] for point in first["points"]] == [*FRACTIONS] * 3


def test_progress_is_told_of_every_point(make_net):
    told = []
    pruned_accuracies(
        make_net(),
        lambda _: 0.5,
        example_inputs=torch.randn(1, 3, 6, 6),
        readings=["zeroed", "removed"],
        fractions=[0, 0.1, 0.2],
        progress=lambda: told.append(1),
    )
    assert len(told) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "l3"}, "unknown criterion 'l3'; did you mean 'l2' or 'l1'"),
        ({"criterion": "random", "readings": ["removed"]}, "needs a seed"),
        ({"scope": "layers"}, "unknown scope 'layers'; did you mean 'layer'"),
        ({"fractions": [0.1, 1.0]}, r"0 <= fraction < 1, got 1\.0"),
        ({"fractions": [-0.1]}, "0 <= fraction < 1"),
        ({"fractions": []}, "at least one fraction"),
        ({"readings": []}, "one reading"),
        ({"readings": ["zeored"]}, "unknown reading 'zeored'; did you mean 'zeroed'"),
        ({}, "'compensated' needs calibration"),
        ({"calibration": X}, "For one batch x write calibration="),
        ({"example_inputs": torch.randn(1, 7, 6, 6), "readings": ["zeroed"]}, "example_inputs"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(make_net, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        pruned_accuracies(
            make_net(),
            lambda _: pytest.fail("measured"),
            **{"example_inputs": torch.randn(1, 3, 6, 6)} | arguments,
        )
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'validate'; did you mean 'validation'"):
        check_curve("l2", "layer", [0.0], ["zeroed"], "validate")


def test_the_torch_free_names_are_those_of_the_library():
    assert pruned.READINGS == READINGS


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curves") / "run"
    train(make_config({"width": 4, "train_size": 200, "epochs": 1, "threads": 1, "seed": 3}), folder)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def points(record):
    return {(p["reading"], p["fraction"]): (p["dropped"], p["accuracy"]) for p in record["points"]}


def test_a_run_gets_a_record_that_begins_at_its_test_accuracy(run):
    state = torch.get_rng_state()
    assert measure_run(run)
    assert torch.equal(torch.get_rng_state(), state)
    (record,) = records.read_curves(run)
    result = records.read_run(run).result
    found = points(record)
    assert found["zeroed", 0] == found["removed", 0] == (0, result["test_accuracy"])
    assert list(found) == [(reading, fraction) for reading in READINGS for fraction in FRACTIONS]
    # Three layers of 4 filters: 90 % rounds to all 4, of which one stays; the first layer takes part.
    assert list(record["layers"].values()) == [4, 4, 4]
    assert found["zeroed", 0.9][0] == found["zeroed", 0.7][0] == 9
    assert found["zeroed", 0.1][0] == 0
    assert (record["classes"], record["images"], record["calibration_images"]) == (10, 359, 200)
    assert record["seed"] is None
    assert sorted(path.name for path in run.glob("*curve*")) == ["curve-test-l2-layer.json"]


def test_what_is_there_is_not_measured_again_and_what_is_missing_is_added(run):
    path = records.curve_path(run, "test", "l2", "layer")
    told = []
    assert measure_run(run, fractions=[0, 0.5], readings=["zeroed"], progress=lambda: told.append(1))
    first = path.read_bytes()
    assert not measure_run(run, fractions=[0.5], readings=["zeroed"], progress=lambda: told.append(1))
    assert path.read_bytes() == first
    assert len(told) == 3
    assert measure_run(
        run, fractions=[0.5, 0.7], readings=["removed", "zeroed"], progress=lambda: told.append(1)
    )
    assert len(told) == 7
    record = records.read_curve(path)
    assert list(points(record)) == [
        ("zeroed", 0),
        ("zeroed", 0.5),
        ("zeroed", 0.7),
        ("removed", 0.5),
        ("removed", 0.7),
    ]
    assert points(record).items() >= points(json.loads(first)).items()


def test_other_weights_are_measured_anew(run):
    measure_run(run, fractions=[0.5], readings=["zeroed"])
    path = records.curve_path(run, "test", "l2", "layer")
    record = json.loads(path.read_text())
    record["points"][0]["accuracy"] = 0.123
    records.write_json(path, record)
    assert not measure_run(run, fractions=[0.5], readings=["zeroed"])
    records.write_json(path, {**record, "weights": "0" * 64})
    assert measure_run(run, fractions=[0.5], readings=["zeroed"])
    assert points(records.read_curve(path))["zeroed", 0.5][1] != 0.123
    records.write_json(path, record)
    assert measure_run(run, fractions=[0.5], readings=["zeroed"], rerun=True)
    assert points(records.read_curve(path))["zeroed", 0.5][1] != 0.123


def test_random_takes_the_runs_seed_and_splits_have_files_of_their_own(run):
    for split in ("test", "validation"):
        measure_run(run, split=split, criterion="random", scope="global", fractions=[0], readings=["removed"])
    test, validation = records.read_curves(run)
    assert (test["split"], test["seed"], validation["split"]) == ("test", 3, "validation")
    assert points(validation)["removed", 0][1] == records.read_run(run).result["validation_accuracy"]


def test_a_device_that_is_not_here_is_no_hindrance(run):
    config = records.config_path(run)
    config.write_text(config.read_text().replace("device: auto", "device: cuda:77"))
    measure_run(run, fractions=[0], readings=["zeroed"])
    assert records.read_curves(run)[0]["device"] in ("cpu", "cuda")


def test_runs_without_fitting_weights_are_refused_and_nothing_is_written(run):
    weights = records.weights_path(run)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"weights\.safetensors does not fit"):
        measure_run(run)
    weights.unlink()
    with pytest.raises(ValueError, match="missing: train the run again with --rerun"):
        measure_run(run)
    weights.write_bytes(whole)
    config = records.config_path(run)
    config.write_text(config.read_text().replace("width: 4", "width: 5"))
    with pytest.raises(ValueError, match=r"does not fit the network of its config\.yaml"):
        measure_run(run)
    records.result_path(run).unlink()
    with pytest.raises(ValueError, match="unfinished run"):
        measure_run(run)
    with pytest.raises(ValueError, match="not a run folder"):
        measure_run(run.parent)
    assert not list(run.glob("curve*"))
