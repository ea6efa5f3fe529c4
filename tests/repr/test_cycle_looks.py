"""When a cycle waits for the device to see whether dropped filters are at 0; what it says of CUDA graphs."""

import copy

import pytest

from cycles import build, fit, repr_on, sgd
from regrow.repr.hold import Hold


def start(sub, compact=True):
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=1, sub=sub, cycles=1, compact=compact)
    fit(model, optimizer)
    cycle.step()
    return model, optimizer, cycle


@pytest.mark.parametrize(
    ("sub", "expected"), [(1, [1]), (3, [1, 2, 3]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])]
)
def test_the_1st_2nd_4th_and_8th_call_look_and_the_last(sub, expected, monkeypatch):
    model, optimizer, cycle = start(sub)
    fit(model, optimizer)
    fit(model, optimizer)  # what Hold watches is over
    looks, moved = [], Hold.moved
    monkeypatch.setattr(Hold, "moved", lambda self: (looks.append(call), moved(self))[1])
    for call in range(1, sub + 1):  # noqa: B007
        event = cycle.step()
    assert looks == expected
    assert event.kind == "restore"


@pytest.mark.parametrize("compact", [True, False])
def test_what_has_moved_is_named_put_back_and_held_firmly(compact):
    model, optimizer, cycle = start(20, compact)
    name, mask = next((name, mask) for name, mask in cycle.keep.items() if not mask.all())
    weight = model.get_submodule(name).weight
    for _ in range(4):
        fit(model, optimizer)
        cycle.step()
    weight.data[~mask] = 1
    for call in range(5, 9):
        fit(model, optimizer)
        if call == 8:
            with pytest.warns(UserWarning, match=f"dropped filters of '{name}' held other values than 0"):
                cycle.step()
        else:
            cycle.step()
    assert not weight[~mask].any()
    weight.data[~mask] = 1
    fit(model, optimizer)
    assert not weight[~mask].any()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("captured", [True, False])
def test_a_captured_pass_is_to_be_captured_again(captured, compact, monkeypatch):
    model, optimizer, cycle = start(2, compact)
    with monkeypatch.context() as patch:
        patch.setattr("regrow.repr.subphase.capturing", lambda: captured)
        fit(model, optimizer)
    cycle.step()
    fit(model, optimizer)
    notes = cycle.step().notes
    assert any(note.startswith("capture your CUDA graph again") for note in notes) == captured


def test_an_optimizer_that_loads_an_older_state_is_seen_at_the_next_look():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=1, sub=20, cycles=1)
    fit(model, optimizer)
    older = copy.deepcopy(optimizer.state_dict())
    cycle.step()
    for _ in range(3):
        fit(model, optimizer)
        cycle.step()
    optimizer.load_state_dict(older)  # with momentum of the dropped filters
    fit(model, optimizer)
    with pytest.warns(UserWarning, match="held other values than 0"):
        cycle.step()
    fit(model, optimizer)
    assert not cycle._sub.moved()
