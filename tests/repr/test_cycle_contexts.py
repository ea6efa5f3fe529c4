"""A cycle that is stepped, saved, copied or pickled in unusual places."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch

from cycles import X, fit, is_dead, repr_on, run, same_weights, start
from regrow.repr.cycle import release


def step_of(cycle, context):
    with context():
        return cycle.step()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("consumers", ["zero", "keep", "init"])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_stepped_where_no_gradients_are_taken(context, consumers, compact) -> None:
    found = []
    for inside in (context, torch.enable_grad):
        model, optimizer, cycle = start("sgd", consumers=consumers, compact=compact)
        for step in range(10):
            fit(model, optimizer, step)
            step_of(cycle, inside)
            assert is_dead(model, cycle)
            assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        found.append(model.state_dict())
    assert same_weights(*found)


def test_stepped_by_a_function_in_inference_mode() -> None:
    model, optimizer, cycle = start("adam")

    @torch.inference_mode()
    def validate():
        model.eval()(X)
        model.train()
        return cycle.step()

    for step in range(8):
        fit(model, optimizer, step)
        validate()
    assert cycle.phase == "done"


def test_saved_and_loaded_in_inference_mode() -> None:
    found = []
    for context in (torch.inference_mode, torch.enable_grad):
        model, optimizer, cycle = start("sgd")
        run(model, optimizer, cycle, 3)  # in the sub phase
        assert cycle.phase == "sub"
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with context():
            state = cycle.state_dict()
        model, optimizer, cycle = start("sgd", seed=9)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        with context():
            cycle.load_state_dict(state)
        run(model, optimizer, cycle, 5, start=3)
        found.append(model.state_dict())
    assert same_weights(*found)


def by_torch_save(cycle):
    torch.save(cycle, io.BytesIO())


def by_spawn(cycle):
    multiprocessing.get_context("spawn").Process(target=print, args=(cycle,)).start()


@pytest.mark.parametrize("steps", [0, 2, 8])
@pytest.mark.parametrize(
    "way",
    [pickle.dumps, lambda cycle: pickle.dumps({"trainer": [cycle]}), copy.deepcopy, copy.copy,
     by_torch_save, by_spawn],
)  # fmt: skip
def test_a_cycle_is_not_copied_or_pickled(way, steps) -> None:
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, steps)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Save cycle\.state_dict\(\); build RePr anew"):
        way(cycle)
    assert same_weights(model.state_dict(), before)
    run(model, optimizer, cycle, 8 - steps, start=steps)
    assert cycle.phase == "done"


def test_what_the_refusal_says_works() -> None:
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 3)
    again = copy.deepcopy(model)
    twin = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other = repr_on(again, twin)
    other.load_state_dict(pickle.loads(pickle.dumps(cycle.state_dict())))
    run(model, optimizer, cycle, 5, start=3)
    run(again, twin, other, 5, start=3)
    assert same_weights(model.state_dict(), again.state_dict())


def test_a_model_in_a_cycle_is_copied_and_pickled_without_it() -> None:
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 3)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_weights(again.state_dict(), model.state_dict())
        assert release(again)["dropped"] == {}
