"""Ctrl-C inside a model's passes and inside changes: none is swallowed, and no model is left half changed."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow.compensation.compensate import compensate
from regrow.compensation.norms import reestimate_norms
from regrow.pruning.prune import prune
from regrow.repr.cycle import RePr
from regrow.structure.read import read_structure
from regrow.surgery.cut import cut
from regrow.surgery.removal import Removal, remove_filters

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Stopping(nn.Module):
    """A net that raises KeyboardInterrupt in its pass of that number, copies counted too."""

    left = -1

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        Stopping.left -= 1
        if Stopping.left == 0:
            raise KeyboardInterrupt
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


def seen(model: nn.Module) -> dict[str, Any]:
    """What a user could find changed: weights, shapes, modes, attributes and hooks."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        hooks = {key: len(value) for key, value in vars(module).items() if "hooks" in key}
        found[f"{name}:"] = {**plain, **hooks}, type(module)
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def equal(key: str) -> bool:
        mine, theirs = one[key], other[key]
        return torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs

    return one.keys() == other.keys() and all(map(equal, one))


KEEP = {"a": torch.arange(8) > 2}
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "read_structure": lambda model: read_structure(model, X),
    "cut": lambda model: cut(model, KEEP, example_inputs=X),
    "remove_filters": lambda model: remove_filters(model, KEEP, example_inputs=X),
    "compensate": lambda model: compensate(model, KEEP, [X], example_inputs=X),
    "reestimate_norms": lambda model: reestimate_norms(model, [X]),
    "prune to a fraction": lambda model: prune(model, example_inputs=X, fraction=0.4, compensate=False),
    "prune to a budget": lambda model: prune(model, example_inputs=X, macs=0.6, calibration=[X]),
    "prune for latency": lambda model: prune(model, example_inputs=X, latency=0.9, calibration=[X]),
    "RePr": lambda model: RePr(model, torch.optim.SGD(model.parameters(), 0.1), example_inputs=X),
}


@pytest.fixture(autouse=True)
def _not_stopping() -> Iterator[None]:
    yield
    Stopping.left = -1


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_in_any_pass_comes_out_and_changes_nothing(name: str) -> None:
    model = Stopping()
    Stopping.left = -1
    before = seen(model)
    number = 1
    while number < 300:
        Stopping.left = number
        try:
            CALLS[name](model)
        except KeyboardInterrupt:
            assert same(before, seen(model)), f"the pass of number {number} left something"
            number = number + 1 if number < 12 else number * 2
        except ValueError:  # the budget of the latency may be out of reach on a busy machine
            assert name == "prune for latency"
            break
        else:
            assert Stopping.left > 0, f"the interrupt in the pass of number {number} was swallowed"
            break
    assert number > 1


def test_an_interrupt_while_repr_plans_its_drop_leaves_the_cycle_as_it_was() -> None:
    model = Stopping()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cycle = RePr(model, optimizer, example_inputs=X, full=1, sub=1, cycles=1, fraction=0.3)
    before, state = seen(model), cycle.state_dict()
    for number in range(1, 100):
        Stopping.left = number
        try:
            event = cycle.step()
        except KeyboardInterrupt:
            assert same(before, seen(model))
            assert cycle.state_dict() == state
        else:
            break
    assert number > 1
    assert event is not None
    assert event.kind == "drop"
    assert cycle.phase == "sub"


def interrupted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Ctrl-C arrives when ``owner.name`` is called, and the call goes on."""
    real = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.fixture
def _listening() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_listening")
@pytest.mark.parametrize("name", ["cut", "remove_filters"])
def test_an_interrupt_in_a_change_comes_when_it_is_done(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = Stopping(), Stopping()
    whole.load_state_dict(model.state_dict())
    CALLS[name](whole)
    real = Removal.apply

    def apply(self: Removal, to: nn.Module, **how: Any) -> None:
        if to is model:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, to, **how)

    monkeypatch.setattr(Removal, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        CALLS[name](model)
    assert same({**whole.state_dict()}, {**model.state_dict()})


@pytest.mark.usefixtures("_listening")
def test_an_interrupt_in_a_drop_or_restore_counts_it_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.repr import restoring

    model = Stopping()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cycle = RePr(model, optimizer, example_inputs=X, full=1, sub=1, cycles=1, fraction=0.3)
    with monkeypatch.context() as patch:
        interrupted(patch, restoring, "silence")
        with pytest.raises(KeyboardInterrupt):
            cycle.step()
    assert (cycle.phase, cycle.state_dict()["step"]) == ("sub", 1)
    with monkeypatch.context() as patch:
        interrupted(patch, restoring, "orthogonal_rows")
        with pytest.raises(KeyboardInterrupt):
            cycle.step()
    assert cycle.state_dict()["step"] == 2
    assert cycle.state_dict()["sub_phase"] is None
    assert all(filters.abs().sum() > 0 for filters in model.a.weight)


@pytest.mark.usefixtures("_listening")
def test_the_import_of_torch_pruning_does_not_swallow_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def bring(name: str, *rest: Any) -> Any:
        if name == "torch_pruning":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except:  # noqa: E722, as torch-pruning has it around its imports
                raise AssertionError("the interrupt arrived inside the import") from None
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", bring)
    with pytest.raises(KeyboardInterrupt):
        read_structure(Stopping(), X)
