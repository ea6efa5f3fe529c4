"""Cycles and restarts by criteria that read pictures, and by functions of the model."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regrow
from cycles import X, batch, build, fit, load, repr_on, run, same_weights, save, sgd
from regrow.criteria.score import DATA_CRITERIA, score
from regrow.criteria.select import select
from regrow.repr.weakest import Weakest

pytestmark = pytest.mark.devices
BATCHES = [batch(20), batch(21)]
SETTINGS = {"fraction": 0.3, "scope": "global", "floor": 0.1}
LEFT_OUT = {"conv1": "the first convolution"}


def by_index(model):
    """A criterion by which the last filters of each layer are the weakest."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {name: -torch.arange(layer.out_channels) for name, layer in layers.items()}


def dropped(keep):
    return {name: (~mask).nonzero().flatten().tolist() for name, mask in keep.items() if not mask.all()}


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_the_weakest_are_those_that_score_and_select_find(criterion):
    model = build()
    loss = None if criterion in ("mean-activation", "apoz") else F.cross_entropy
    scores = score(model, criterion, exclude=["conv1"], batches=BATCHES, loss=loss)
    expected = dropped(select(scores, 0.3))
    found, said = Weakest(criterion, BATCHES, loss).of(model, SETTINGS, exclude=LEFT_OUT, seed=0)
    assert (found, said) == (expected, [])
    record = regrow.restart(
        model,
        sgd(model),
        example_inputs=X[:1],
        fraction=0.3,
        criterion=criterion,
        batches=iter(BATCHES),
        loss=loss,
    )
    assert record["filters"] == expected
    assert record["settings"]["criterion"] == criterion


@pytest.mark.parametrize("sub", [0, 2])
@pytest.mark.parametrize("given", ["list", "function"])
def test_batches_are_read_in_every_cycle(given, sub):
    reads = []

    class Loader:
        def __iter__(self):
            reads.append(1)
            return iter(BATCHES)

    model = build()
    optimizer = sgd(model)
    batches = Loader() if given == "list" else lambda: itertools.islice(Loader(), 1)
    cycle = repr_on(model, optimizer, sub=sub, criterion="taylor", batches=batches)
    assert not reads
    events = [event for event in run(model, optimizer, cycle, 8) if event]
    assert len(reads) == 2
    assert {event.kind for event in events} == ({"drop", "restore"} if sub else {"restart"})


def test_a_function_decides_and_a_state_knows_its_name():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, sub=0, criterion=by_index)
    events = [event for event in run(model, optimizer, cycle, 4) if event]
    assert [event.filters for event in events] == [{"conv2": [5, 6, 7], "conv3": [6, 7]}] * 2
    state = cycle.state_dict()
    assert state["settings"]["criterion"].endswith("test_weakest.by_index")
    with pytest.raises(ValueError, match=r"criterion='.*by_index' \(here 'ortho'\)"):
        repr_on(build(), sub=0).load_state_dict(state)
    repr_on(build(), sub=0, criterion=by_index).load_state_dict(state)


class Callable:
    def __call__(self, model):
        return by_index(model)


def test_functions_of_any_kind_have_a_name():
    assert Weakest(Callable()).name.endswith("test_weakest.Callable")
    assert Weakest(lambda model: by_index(model)).name.endswith("<lambda>")
    assert Weakest("taylor", BATCHES).name == "taylor"


@pytest.mark.parametrize("sub", [0, 2])
@pytest.mark.parametrize("criterion", ["taylor", by_index])
def test_a_run_stopped_anywhere_ends_at_the_same_bits(tmp_path, criterion, sub):
    def start(seed=0):
        model = build(seed)
        optimizer = sgd(model)
        return model, optimizer, repr_on(model, optimizer, sub=sub, criterion=criterion, batches=BATCHES)

    model, optimizer, cycle = start()
    for stop in range(6):
        save(tmp_path / f"{stop}.pt", model, optimizer, cycle)
        run(model, optimizer, cycle, 1, start=stop)
    expected = model.state_dict()
    for stop in range(6):
        again, optimizer, cycle = start(99)
        load(tmp_path / f"{stop}.pt", again, optimizer, cycle, "cycle-model-optimizer")
        run(again, optimizer, cycle, 6 - stop, start=stop)
        assert same_weights(again.state_dict(), expected), stop


def test_scoring_leaves_gradients_modes_and_statistics_as_they_are():
    model = build()
    optimizer = sgd(model)
    fit(model, optimizer)
    model.norm2.eval()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    Weakest("hessian", BATCHES).of(model, SETTINGS, exclude=LEFT_OUT, seed=0)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())
    assert same_weights(dict(model.named_buffers()), buffers)
    assert [name for name, module in model.named_modules() if not module.training] == ["norm2"]


@pytest.mark.parametrize(
    ("criterion", "batches", "message"),
    [
        (lambda _: {}, None, "the criterion returns no scores for 'conv2'"),
        (
            lambda model: {**by_index(model), "conv2": torch.ones(3)},
            None,
            "one real number for each of its 8",
        ),
        (lambda model: {**by_index(model), "conv2": torch.full((8,), torch.nan)}, None, "returns NaN"),
        ("taylor", [X], "a criterion of the loss takes .*a batch is a pair of inputs and labels"),
        ("apoz", [], "yields no batch"),
        ("apoz", lambda: 7, "batches is an iterable of batches, got an int"),
    ],
)
def test_errors_at_the_restart_change_and_count_nothing(criterion, batches, message):
    model = build()
    cycle = repr_on(model, full=1, sub=0, criterion=criterion, batches=batches)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        cycle.step()
    assert cycle.state_dict()["step"] == 0
    assert same_weights(model.state_dict(), before)


def test_nan_weights_are_refused_where_a_function_scores_too():
    model = build()
    cycle = repr_on(model, full=1, sub=0, criterion=by_index)
    with torch.no_grad():
        model.conv3.weight[0] = torch.nan
    with pytest.raises(ValueError, match="'conv3' holds NaN"):
        cycle.step()


def test_batches_that_can_be_read_once_do_for_one_cycle():
    model = build()
    cycle = repr_on(model, full=1, sub=0, cycles=1, criterion="apoz", batches=iter([X]))
    assert cycle.step().kind == "restart"
    with pytest.raises(ValueError, match=r"a list_iterator can be read only once: .*lambda: itertools"):
        repr_on(model, cycles=2, criterion="apoz", batches=iter([X]))
