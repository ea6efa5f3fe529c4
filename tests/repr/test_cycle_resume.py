"""A run that goes on from its saved state ends at the same bits."""

import copy
import sys

import pytest
import torch

import forking
from cycles import (
    OPTIMIZERS,
    STEPS,
    build,
    hooks,
    load,
    repr_on,
    run,
    same_weights,
    save,
    sgd,
    start,
)


@pytest.mark.parametrize("consumers", ["keep", "init"])
@pytest.mark.parametrize("order", ["model-optimizer-cycle", "cycle-model-optimizer", "optimizer-cycle-model"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_stopped_anywhere_ends_at_the_same_bits(tmp_path, kind, order, consumers):
    model, optimizer, cycle = start(kind, consumers=consumers)
    for stop in range(STEPS):
        save(tmp_path / f"{stop}.pt", model, optimizer, cycle)
        run(model, optimizer, cycle, 1, start=stop)
    expected = model.state_dict()

    for stop in range(STEPS):
        again, optimizer, cycle = start(kind, seed=99, consumers=consumers)
        load(tmp_path / f"{stop}.pt", again, optimizer, cycle, order)
        run(again, optimizer, cycle, STEPS - stop, start=stop)
        assert same_weights(again.state_dict(), expected), stop
        assert hooks(again, optimizer) == 0


def test_a_run_goes_on_in_a_new_process(tmp_path):
    model, optimizer, cycle = start("adam")
    run(model, optimizer, cycle, 3)
    assert cycle.phase == "sub"
    save(tmp_path / "checkpoint.pt", model, optimizer, cycle)
    done = forking.script(__file__, tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run(model, optimizer, cycle, STEPS - 3, start=3)
    assert same_weights(torch.load(tmp_path / "end.pt", weights_only=True), model.state_dict())


def go_on(folder):
    torch.set_num_threads(1)
    model, optimizer, cycle = start("adam", seed=99)
    load(f"{folder}/checkpoint.pt", model, optimizer, cycle, "cycle-model-optimizer")
    run(model, optimizer, cycle, STEPS - 3, start=3)
    torch.save(model.state_dict(), f"{folder}/end.pt")


@pytest.mark.devices
def test_loading_over_a_running_sub_phase_replaces_it():
    model, optimizer, cycle = start("sgd")
    early = copy.deepcopy(cycle.state_dict()), copy.deepcopy(model.state_dict())
    run(model, optimizer, cycle, 3)
    late = copy.deepcopy(cycle.state_dict()), copy.deepcopy(model.state_dict())
    for _ in range(2):
        cycle.load_state_dict(early[0])
        model.load_state_dict(early[1])
        assert cycle.phase == "full"
        assert hooks(model, optimizer) == 0
        cycle.load_state_dict(late[0])
        model.load_state_dict(late[1])
        assert cycle.phase == "sub"
        assert len(optimizer._optimizer_step_post_hooks) == 1


@pytest.mark.devices
def test_a_state_is_a_copy():
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 2)
    state = cycle.state_dict()
    before = copy.deepcopy(state)
    run(model, optimizer, cycle, 3, start=2)
    assert state["step"] == before["step"] == 2
    assert all(
        torch.equal(t, before["sub_phase"]["old_rows"][n]) for n, t in state["sub_phase"]["old_rows"].items()
    )


def test_states_that_do_not_fit_are_refused_and_nothing_changes():
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 3)
    state = cycle.state_dict()
    wide, wide_optimizer = build(filters=(6, 10, 8)), None
    wide_optimizer = sgd(wide)
    other = start("sgd")
    for (target, target_optimizer, repr_), changed, message in (
        (other, {"version": 2}, "reads RePr states of version 1, got 2"),
        (other, {"settings": {**state["settings"], "fraction": 0.5}}, r"fraction=0\.5 \(here 0\.3\)"),
        (other, {"settings": {}}, r"other settings: fraction=None \(here 0\.3\)"),
        ((wide, wide_optimizer, repr_on(wide, wide_optimizer)), {}, "does not fit 'conv"),
    ):
        before = copy.deepcopy((target.state_dict(), repr_.state_dict()))
        with pytest.raises(ValueError, match=message):
            repr_.load_state_dict({**state, **changed})
        assert same_weights(target.state_dict(), before[0])
        assert repr_.state_dict() == before[1]
        assert hooks(target, target_optimizer) == 0
    with pytest.raises(ValueError, match="not a state of RePr: sub_phase, version missing"):
        other[2].load_state_dict({k: v for k, v in state.items() if k not in ("version", "sub_phase")})


if __name__ == "__main__":
    go_on(sys.argv[1])
