"""Each public function, given something of another kind: one clear error that says what to pass instead."""

import collections
import inspect
import pathlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regrow
from regrow.given import is_real, kind_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, torch.zeros(2))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
        )  # fmt: skip


KEEP = {"0": torch.tensor([True, False, True, True])}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# {public function: how it is called with a model and other arguments; those given replace these}
CALLS = {
    "ContinualBackprop": (
        lambda m, **k: regrow.ContinualBackprop(m, k.pop("optimizer"), **k),
        {"optimizer": lambda: sgd(Net()), "example_inputs": X},
    ),
    "DenseSparseDense": (
        lambda m, **k: regrow.DenseSparseDense(m, k.pop("optimizer"), **k),
        {"optimizer": lambda: sgd(Net())},
    ),
    "GradientWatch": (regrow.GradientWatch, {}),
    "KnowledgeEvolution": (regrow.KnowledgeEvolution, {}),
    "RePr": (
        lambda m, **k: regrow.RePr(m, k.pop("optimizer"), **k),
        {"optimizer": lambda: sgd(Net()), "example_inputs": X},
    ),
    "add_bridgeout": (regrow.add_bridgeout, {}),
    "compare_latency": (
        lambda m, **k: regrow.compare_latency({"net": m}, **k),
        {"example_inputs": X},
    ),
    "compensate": (
        lambda m, **k: regrow.compensate(m, k.pop("keep"), k.pop("calibration"), **k),
        {"keep": KEEP, "calibration": [X], "example_inputs": X},
    ),
    "bridgeout_state": (regrow.bridgeout_state, {}),
    "criteria_against_oracle": (
        lambda m, **k: regrow.criteria_against_oracle(m, k.pop("batches"), **k),
        {"batches": [(X, torch.zeros(2).long())]},
    ),
    "cut": (lambda m, **k: regrow.cut(m, k.pop("keep"), **k), {"keep": KEEP, "example_inputs": X}),
    "deploy": (regrow.deploy, {"example_inputs": X}),
    "drop_one_accuracy": (
        lambda m, **k: regrow.drop_one_accuracy(m, k.pop("batches"), **k),
        {"batches": [(X, torch.zeros(2).long())]},
    ),
    "export_onnx": (
        lambda m, **k: regrow.export_onnx(m, k.pop("path"), **k),
        {"path": "x.onnx", "example_inputs": X},
    ),
    "fold_norms": (regrow.fold_norms, {"example_inputs": X}),
    "keep_of_masks": (regrow.keep_of_masks, {}),
    "layer_correlations": (lambda m, **k: regrow.layer_correlations(m, m, [X], **k), {}),
    "load_bridgeout_state": (lambda m: regrow.load_bridgeout_state(m, {}), {}),
    "orthogonal_loss": (regrow.orthogonal_loss, {}),
    "match_norms": (lambda m, **k: regrow.match_norms(m, m, **k), {"calibration": [X]}),
    "plain_layers": (regrow.plain_layers, {}),
    "load": (lambda m, path: regrow.load(m, path), {"path": "x.safetensors"}),
    "prune": (regrow.prune, {"fraction": 0.25, "example_inputs": X, "calibration": [X]}),
    "read_as": (
        lambda m, **k: regrow.read_as(m, k.pop("keep"), k.pop("reading"), **k),
        {"keep": KEEP, "reading": "removed", "example_inputs": X},
    ),
    "redo": (regrow.redo, {"batches": [X], "example_inputs": X}),
    "reestimate_norms": (lambda m, **k: regrow.reestimate_norms(m, **k), {"calibration": [X]}),
    "reinitialize": (regrow.reinitialize, {}),
    "release": (regrow.release, {}),
    "remove_bridgeout": (regrow.remove_bridgeout, {}),
    "restart": (
        lambda m, **k: regrow.restart(m, k.pop("optimizer"), **k),
        {"optimizer": lambda: sgd(Net()), "example_inputs": X},
    ),
    "save": (lambda m, path: regrow.save(m, path), {"path": "x.safetensors"}),
    "score": (regrow.score, {}),
    "shrink_and_perturb": (regrow.shrink_and_perturb, {}),
}  # fmt: skip
# These take no model: a weight, activations, logits, scores, a run folder, what RePr.step returns.
OTHERS = {
    "Event", "bridgeout", "canonical_correlation", "distillation_loss", "load_run", "off_map", "overlap",
    "select",
}  # fmt: skip


def call(function, model, **other):
    act, given = CALLS[function]
    given = {name: value() if callable(value) else value for name, value in given.items()}
    return act(model, **{**given, **other})


def test_the_table_has_every_public_function() -> None:
    assert set(CALLS) | OTHERS == set(regrow.__all__)


NO_MODELS = {
    "a text": ("resnet18", r"the text 'resnet18'\. Build the model first"),
    "a path": (pathlib.Path("net.pt"), "Build the model first"),
    "a class": (Net, r"the class Net\. Pass an instance of it: Net\(…\)"),
    "another class": (dict, "the class dict"),
    "nothing": (None, "None"),
    "layers": ([nn.Conv2d(3, 4, 3), nn.ReLU()], r"a list\. Pass nn\.Sequential"),
    "an empty list": ([], "a list"),
    "a state_dict": (Net().state_dict(), r"an OrderedDict\. Build the model, .*load_state_dict"),
    "a dict": ({"model": Net()}, "a dict"),
    "a tensor": (X, r"a tensor \[2, 3, 8, 8\]"),
    "a parameter": (nn.Parameter(torch.zeros(3)), r"a tensor \[3\]"),
    "an array": (np.zeros(3), "an? ndarray"),
    "a number": (3, "an int"),
    "a function": (lambda: Net(), "Pass the model that it builds"),
    "a program": (
        torch.jit.ScriptModule(),
        r"a ScriptModule\. TorchScript .*pass the model that was scripted",
    ),
    "an optimizer": (sgd(Net()), "an? SGD"),
    "a loader": (DataLoader(DATA), "a DataLoader"),
    "weights": (Net().parameters(), "a generator"),
}


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model(function, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, message = NO_MODELS[kind]
    with pytest.raises(ValueError, match=rf"{function} takes a model, an nn\.Module, and got .*{message}"):
        call(function, value)
    assert not list(tmp_path.iterdir())


NO_INPUTS = {
    "nothing": (None, r"None\. Pass one picture, such as x\[:1\]"),
    "a text": ("x", "the text 'x'"),
    "a loader": (DataLoader(DATA), r"a DataLoader\. .*next\(iter\(loader\)\)\[0\]\[:1\]"),
    "a data set": (DATA, r"a TensorDataset\. .*dataset\[0\]\[0\]\.unsqueeze\(0\)"),
    "an array": (X.numpy(), r"torch\.from_numpy\(array\)"),
    "a number of numpy": (np.float32(1), r"torch\.from_numpy"),
    "a shape": (X.shape, "a Size"),
    "a number": (1, "an int"),
    "a class": (torch.Tensor, "the class Tensor"),
    "an iterator": (iter([X]), "a list_iterator"),
    "a generator": ((x for x in X), "a generator"),
    "a model": (Net(), "a Net"),
    "an empty batch": (X[:0], r"a tensor \[0, .*There are no numbers in it"),
    "a dictionary of empty batches": ({"x": X[:0], "flag": None}, r"a dict\. There are no numbers in it"),
    "a list of empty pictures": (([X[0][:, :0]],), r"a tuple\. There are no numbers in it"),
}


@pytest.mark.parametrize(
    "function", [name for name, (_, given) in CALLS.items() if "example_inputs" in given]
)
@pytest.mark.parametrize("kind", NO_INPUTS)
def test_what_are_no_example_inputs(function, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, message = NO_INPUTS[kind]
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{function} takes as example_inputs .* and got .*{message}"):
        call(function, model, example_inputs=value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["compensate", "cut", "read_as"])
@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (None, "keep maps names of convolutions to boolean masks of their filters, and got None"),
        ([True, False], "a list"),
        (torch.ones(4, dtype=torch.bool), r"a tensor \[4\]"),
        ("0", "the text '0'"),
        ({0: torch.ones(4, dtype=torch.bool)}, "it has an int for a name"),
        ({nn.ReLU(): torch.ones(4, dtype=torch.bool)}, "it has a ReLU for a name"),
        ({"0": "1011"}, r"keep\['0'\] must be a tensor, and got the text '1011'"),
        ({"0": None}, r"keep\['0'\]"),
        ({"0": [1, 0, 1, 1]}, "boolean mask of 4 filters"),
        ({"9": [True]}, "no convolution is named '9'"),
    ],
)
def test_what_is_no_keep(function, keep, message):
    with pytest.raises(ValueError, match=message):
        call(function, Net(), keep=keep)


@pytest.mark.parametrize(
    "function",
    [
        "ContinualBackprop", "DenseSparseDense", "RePr", "cut", "redo", "reinitialize", "restart",
        "shrink_and_perturb",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.SGD, r"the class SGD\. Pass an instance of it: SGD\(model\.parameters\(\), …\)"),
        ("sgd", "the text 'sgd'"),
        (list(Net().parameters()), "a list"),
        (torch.optim.lr_scheduler.StepLR(sgd(Net()), 1), "a StepLR"),
        (sgd(Net()).state_dict(), "a dict"),
    ],
)
def test_what_is_no_optimizer(function, optimizer, message):
    with pytest.raises(ValueError, match=rf"{function} takes as optimizer .*{message}"):
        call(function, Net(), optimizer=optimizer)


@pytest.mark.parametrize(
    "function", ["RePr", "add_bridgeout", "drop_one_accuracy", "orthogonal_loss", "prune", "restart", "score"]
)
@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (None, "exclude lists names of layers, .* and got None"),
        (3, "an int"),
        ([nn.Conv2d(1, 1, 1)], "a Conv2d"),
        (nn.Sequential(nn.ReLU()), "a Sequential"),
        ([0, "3"], "an int"),
        (torch.zeros(2), r"a tensor \[2\]"),
    ],
)
def test_what_are_no_names(function, exclude, message):
    with pytest.raises(ValueError, match=message):
        call(function, Net(), exclude=exclude)


@pytest.mark.parametrize("function", ["save", "load", "export_onnx"])
@pytest.mark.parametrize("path", [None, 3, "", b"x", ["x"], Net()])
def test_what_is_no_path(function, path):
    with pytest.raises(ValueError, match=f"{function} takes the path of a file"):
        call(function, Net(), path=path)


@pytest.mark.parametrize("function", ["compensate", "prune", "reestimate_norms"])
@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (X, r"a tensor \[2, 3, 8, 8\]\. For one batch x write calibration=\[x\]"),
        ("pictures", "the text 'pictures'"),
        ({"x": X}, "a dict"),
        (Net(), "a Net"),
        (DATA, r"a TensorDataset\. Wrap .* DataLoader\(dataset"),
        (3, "an int"),
        ([np.zeros(3)], "got ndarray"),
    ],
)
def test_what_are_no_batches(function, calibration, message):
    with pytest.raises(ValueError, match=message):
        call(function, Net(), calibration=calibration)
    if function == "prune" and message != "got ndarray":
        with pytest.raises(ValueError, match=message.replace("calibration", "validation")):
            call(function, Net(), validation=calibration)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"progress": "bar"}, "progress is a function"),
        ({"criterion": "random", "seed": "one"}, "seed must be a whole number"),
        ({"criterion": "random", "seed": 0.5}, "seed must be a whole number"),
        ({"criterion": "random", "seed": 2**64}, "at most 64 bits"),
        ({"criterion": ["l2"]}, "criterion is a name, .* and got a list"),
        ({"criterion": 3}, "criterion is a name, .* and got"),
        ({"scope": 3}, "unknown scope"),
        ({"coupled": 3}, "unknown way"),
        ({"floor": "0.1"}, "floor is the share"),
        ({"fraction": "0.5"}, "fraction is the share"),
        ({"fraction": torch.tensor(0.5)}, "fraction is the share"),
        ({"fraction": [0.5]}, "fraction is the share"),
        ({"round_to": "8"}, "round_to is a whole number"),
    ],
)
def test_settings_of_another_kind(settings, message):
    with pytest.raises(ValueError, match=message):
        call("prune", Net(), **settings)


@pytest.mark.parametrize("function", [regrow.overlap, regrow.bridgeout])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (nn.Conv2d(3, 4, 3), r"a Conv2d\. Pass layer\.weight"),
        (Net(), r"a Net\. Pass the weight of a convolution"),
        (Net, "the class Net"),
        ("conv1.weight", "the text 'conv1.weight'"),
        (None, "None"),
        ([[1.0, 2.0]], "a list"),
        (np.ones((2, 2)), "ndarray"),
        (Net().state_dict(), "OrderedDict"),
    ],
)
def test_what_is_no_weight(function, weight, message):
    with pytest.raises(ValueError, match=rf"{function.__name__} takes a weight.* and got .*{message}"):
        function(weight)


def test_what_is_no_generator():
    with pytest.raises(ValueError, match=r"generator is a torch\.Generator or None, and got an int"):
        regrow.bridgeout(torch.ones(2, 2), generator=0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores maps names of convolutions to one score per filter, .* and got None"),
        (torch.ones(3), r"a tensor \[3\]"),
        (Net(), "a Net"),
        ([1, 2], "a list"),
        ({1: torch.ones(3)}, "it has an int for a name"),
        ({"a": "high"}, r"scores\['a'\] must be a tensor, and got the text 'high'"),
        ({"a": torch.ones(3, dtype=torch.complex64)}, "real numbers"),
        ({"a": 3.0}, "one number per filter"),
    ],
)
def test_what_are_no_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        regrow.select(scores, 0.5)


@pytest.mark.parametrize("state", [None, 3, "state", [1], {"version": 1}, X])
def test_what_is_no_state_of_a_cycle(state):
    model = Net()
    cycle = regrow.RePr(model, sgd(model), example_inputs=X)
    whole = cycle.state_dict()
    with pytest.raises(ValueError, match="not a state of RePr"):
        cycle.load_state_dict(state)
    with pytest.raises(ValueError, match="not a state of RePr: its settings are a list"):
        cycle.load_state_dict({**whole, "settings": []})
    assert cycle.state_dict() == whole


def test_what_a_message_calls_a_value():
    assert kind_of("x" * 90) == f"the text '{'x' * 39}…'"
    assert kind_of(collections.Counter()) == "a Counter"
    assert kind_of(inspect.signature(kind_of)) == "a Signature"


@pytest.mark.parametrize(
    ("value", "real"), [(1, True), (0.5, True), (True, False), ("1", False), (None, False), (X, False)]
)
def test_what_is_a_number(value, real):
    assert is_real(value) == real
