"""Checkpoints with a right digest and hostile contents: each is found out before anything is changed."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from killing import start
from regrow.repr.cycle import RePr
from regrow.study import records
from regrow.study.checkpoints import find_checkpoints, from_bytes, to_bytes, write_checkpoint
from regrow.study.config import make_config
from regrow.study.data import load_data
from regrow.study.methods.regrown import Regrown
from regrow.study.parts import Parts
from regrow.study.progress import Progress
from regrow.study.ranks import Ranks
from regrow.study.snapshot import load_random_state, load_state, random_state, state_of
from regrow.study.steps import train_epoch
from regrow.study.train import train

SMALL: dict[str, Any] = {
    "data": "digits", "width": 4, "depth": 2, "train_size": 100, "batch_size": 50, "epochs": 4, "threads": 1,
    "device": "cpu",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "repr": {"method": "repr", "full": 1, "sub": 2, "cycles": 1},
    "bridgeout": {"method": "bridgeout", "p": 0.2, "optimizer": "adam"},
}
_FILES = 300
_HOSTILE: list[Any] = [
    None, True, -1, 2**63, 2**64, 10**30, 0.5, -1.5, float("nan"), float("inf"), "", "x" * 100_000, "weight",
    [], [1], [[[]]], {}, {"a": 1}, {0: 1}, (), (1, 2), torch.zeros(0), torch.zeros(3, 3),
    torch.zeros((), dtype=torch.int8), torch.zeros(5, dtype=torch.complex64), torch.full((2,), float("nan")),
    torch.zeros(7, dtype=torch.uint8),
]  # fmt: skip


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest) -> tuple[Parts, dict[str, Any]]:
    """The parts of a run, and its state after the second epoch, in the middle of RePr's sub phase."""
    config = make_config({**SMALL, **METHODS[request.param]})
    ranks = Ranks()
    parts = Parts(config, load_data("digits", train_size=100), torch.device("cpu"), ranks)
    epochs, events = [], []
    progress = Progress(quiet=True)
    progress.start("run", 4)
    for epoch in (1, 2):
        loss, accuracy = train_epoch(parts.step, parts.train, epoch, parts.scheduler, ranks, progress)
        line = {
            "version": 2, "epoch": epoch, "phase": "full", "learning_rate": 0.1, "train_loss": loss,
            "train_accuracy": accuracy, "validation_loss": 1.0, "validation_accuracy": 0.5, "overlap": None,
            "alive": 8, "filters": 8, "seconds": 0.1, "flops": 10,
        }  # fmt: skip
        epochs.append(line)
        events += [{"version": 2, "epoch": epoch, **each} for each in parts.method.after_epoch()]
    state = {
        "epoch": 2, "epochs": epochs, "events": events, "measured": {"loss": 1.0, "accuracy": 0.5},
        "seconds": 1.0, "environment": {**records.environment("cpu", 1), "resumed": 0},
        "trained": state_of(*parts.trained), "random": [random_state()],
    }  # fmt: skip
    return parts, from_bytes(to_bytes(state))


def cycle_of(parts: Parts) -> RePr | None:
    part = parts.method.parts.get("repr")
    return part.cycle if isinstance(part, Regrown) else None


def check(parts: Parts, state: Any) -> None:
    parts.check(state)


def test_a_state_of_the_run_itself_fits(run: tuple[Parts, dict[str, Any]]) -> None:
    parts, state = run
    check(parts, state)
    load_state(copy.deepcopy(state["trained"]), *parts.trained)
    load_random_state(state["random"][0])


def test_a_state_from_a_gpu_fits(run: tuple[Parts, dict[str, Any]]) -> None:
    """Adam is capturable there, and stays here what it is here."""
    parts, state = run
    if not isinstance(parts.optimizer, torch.optim.Adam):
        pytest.skip("SGD is the same everywhere")
    at = ("trained", "optimizer", "param_groups", 0, "capturable")
    check(parts, changed(state, at, replaced(True)))
    with pytest.raises(ValueError, match="capturable is 1, and here False"):
        check(parts, changed(state, at, replaced(1)))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside ``value``; of a long list, to the first values only."""
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value[:4]):
            yield from places(item, (*at, index))


def changed(value: Any, at: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """A copy of ``value`` in which ``change(container, key)`` gives the container at its end anew."""
    if len(at) == 1:
        return change(value, at[0])
    inner = changed(value[at[0]], at[1:], change)
    if isinstance(value, dict):
        return {**value, at[0]: inner}
    return type(value)(inner if index == at[0] else item for index, item in enumerate(value))


def replaced(new: Any) -> Callable[[Any, Any], Any]:
    def change(container: Any, key: Any) -> Any:
        if isinstance(container, dict):
            return {**container, key: new}
        return type(container)(new if index == key else item for index, item in enumerate(container))

    return change


def removed(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return {name: item for name, item in container.items() if name != key}
    return type(container)(item for index, item in enumerate(container) if index != key)


def renamed(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return {(f"{name}x" if name == key else name): item for name, item in container.items()}
    return [*container, container[key]]


def hostile(state: dict[str, Any], count: int, seed: int) -> Iterator[tuple[str, Any]]:
    draws = random.Random(seed)
    everywhere = [at for at in places(state) if at]
    for _ in range(count):
        at = draws.choice(everywhere)
        what = draws.choice([*map(replaced, _HOSTILE), removed, renamed, removed, renamed])
        yield repr(at), changed(state, at, what)


def snapshot(parts: Parts) -> Any:
    return to_bytes({"trained": state_of(*parts.trained), "random": random_state()})


def test_hostile_states_are_refused_or_harmless(run: tuple[Parts, dict[str, Any]]) -> None:
    parts, state = run
    before, refused, taken = snapshot(parts), [], []
    for where, each in hostile(state, _FILES, seed=3):
        try:
            check(parts, each)
        except ValueError as error:
            refused.append(str(error))
        else:
            taken.append((where, each))
        assert snapshot(parts) == before, where
    assert len(refused) > _FILES / 2
    assert all(len(message) < 500 and message.isprintable() for message in refused)
    for _, each in taken:  # what is taken can be loaded and trained on
        load_state(copy.deepcopy(each["trained"]), *parts.trained)
        load_random_state(each["random"][0])
        parts.optimizer.zero_grad()
        parts.model(torch.zeros(2, 1, 8, 8)).sum().backward()
        parts.optimizer.step()
        parts.scheduler.step()
        load_state(copy.deepcopy(state["trained"]), *parts.trained)


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        ("epoch", 0, "epoch must be a whole number from 1 to 4"),
        ("epoch", 5, "epoch must be a whole number from 1 to 4"),
        ("epochs", [], "records of 2 epochs"),
        ("task_accuracies", [0.5], "1 accuracies of tasks do not fit epoch 2"),
        ("task_accuracies", [1.5], "must list fractions from 0 to 1"),
        ("task_accuracies", {}, "must list fractions from 0 to 1"),
        ("trained.model", {}, "which the file lacks"),
        ("trained.model.classifier\u2024weight", torch.zeros(10, 5), r"shape \[10, 5\] in the file"),
        ("trained.model.classifier\u2024weight", torch.zeros(10, 4).double(), "torch.float64 in the file"),
        ("trained.optimizer.state", {99: {}}, "the number of a parameter"),
        ("trained.optimizer.param_groups", [], "groups of parameters"),
        ("trained.scheduler.last_epoch", 10**30, "last_epoch"),
        ("trained.scheduler.step", "x", "has no 'step'"),
        ("trained.scheduler.load_state_dict", 3, "has no 'load_state_dict'"),
        ("trained.scaler.scale", 3.0, "has no 'scale'"),
        ("random.0.torch", torch.zeros(3, dtype=torch.uint8), "does not take its state"),
        ("random.0.torch", torch.zeros(5056, dtype=torch.uint8), "does not take its state"),
        ("random.0.torch", torch.zeros(5056), "as bytes"),
        ("random.0.numpy", ("MT19937", torch.zeros(624, dtype=torch.int64), 10**6, 0, 0.0), "position"),
        ("random.0.numpy", ("MT19937", torch.zeros(3, dtype=torch.int64), 0, 0, 0.0), "624 numbers"),
        ("random.0.numpy", ("MT19937", torch.full((624,), 2**40), 0, 0, 0.0), "32 bits"),
        ("random.0.python", (3, (1, 2), None), "does not take its state"),
        ("random.0.python", (3, (2**70,) * 625, None), "does not take its state"),
        ("random.0.cuda", [torch.zeros(3)], "as bytes"),
        ("random", [], "each process"),
        ("measured.accuracy", 2.0, "accuracy"),
        ("environment.resumed", "many", "resumed"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    run: tuple[Parts, dict[str, Any]], at: str, new: Any, message: str
) -> None:
    parts, state = run
    way = [int(key) if key.isdigit() else key.replace("\u2024", ".") for key in at.split(".")]
    with pytest.raises(ValueError, match=message):
        check(parts, changed(state, tuple(way), replaced(new)))


MEMORY: list[tuple[str, Any]] = [
    ("dropped", []), ("dropped", {"features.1.conv": []}), ("dropped", {"features.1.conv": [99]}),
    ("dropped", {"features.1.conv": [-1]}), ("dropped", {"features.1.conv": [0.5]}),
    ("dropped", {"features.1.conv": [True]}), ("dropped", {"features.1.conv": [0, 0]}),
    ("dropped", {"features.1.conv": [0, 1, 2, 3]}), ("dropped", {"features.1.conv": "01"}),
    ("dropped", {"no": [0]}), ("dropped", {3: [0]}), ("dropped", None), ("old_rows", None), ("old_rows", {}),
    ("old_rows", {"features.1.conv": [1.0]}), ("old_rows", {"features.1.conv": torch.zeros(1)}),
    ("old_rows", {"features.1.conv": torch.zeros(10**4, 4, 3, 3)}), ("old_columns", None), ("old_columns", 3),
    ("silenced", {"no": [0]}), ("silenced", {"features.1.norm": [0]}), ("silenced", []), ("old_norms", 3),
    ("plan", 3), ("plan", {}), ("plan", {"rows": {}}), ("plan", [1]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MEMORY)))
def test_hostile_memory_of_repr_changes_nothing(run: tuple[Parts, dict[str, Any]], number: int) -> None:
    parts, state = run
    if (cycle := cycle_of(parts)) is None:
        assert state["trained"]["method"] == {}
        return
    key, new = MEMORY[number]
    before = snapshot(parts)
    repr_state = state["trained"]["method"]["repr"]
    bad = {**repr_state, "sub_phase": {**repr_state["sub_phase"], key: new}}
    for load in (cycle.check_state_dict, cycle.load_state_dict):
        with pytest.raises(ValueError, match=r"."):
            load(bad)
        assert snapshot(parts) == before


def test_states_of_repr_that_do_not_agree_with_themselves(run: tuple[Parts, dict[str, Any]]) -> None:
    parts, state = run
    if (cycle := cycle_of(parts)) is None:
        return
    good = state["trained"]["method"]["repr"]
    for change, message in (
        ({"step": 0}, "is in its full phase, and the state has a sub phase"),
        ({"sub_phase": None}, "is in its sub phase, and the state has no"),
        ({"step": -1}, "step in a state"),
        ({"step": "2"}, "step in a state"),
        ({"step": 2**64}, "step in a state"),
        ({"highest_rate": float("nan")}, "highest_rate"),
        ({"highest_rate": "x"}, "highest_rate"),
        ({"settings": []}, "its settings are a list"),
        ({"settings": {"fraction": "x" * 10**6}}, "other settings"),
        ({"version": "x" * 10**6}, "version"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            cycle.load_state_dict({**good, **change})
        assert len(str(refused.value)) < 600
    for other in (None, 3, [], "state"):
        with pytest.raises(ValueError, match="not a state of RePr"):
            cycle.load_state_dict(other)


def test_the_checkpoint_before_a_hostile_one_is_taken(tmp_path: Path) -> None:
    settings = {**SMALL, "method": "repr", "full": 1, "sub": 1, "cycles": 1, "epochs": 5}
    train(make_config(settings), tmp_path / "whole")
    process = start(settings, tmp_path / "run", kill=("step", 7))
    process.join()
    last, _ = find_checkpoints(tmp_path / "run")
    for number, change in enumerate(
        [("trained",), ("trained", "model", "classifier.weight"), ("random", 0, "torch"), ("epochs",)]
    ):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        state = changed(from_bytes(last.read_bytes()), change, replaced(torch.zeros(3)))
        (folder / last.name).unlink()
        write_checkpoint(folder, 3, state)
        with pytest.warns(UserWarning, match=r"checkpoint-00003.*is damaged .*trying the one before it"):
            assert train(make_config(settings), folder)
        for name in ("weights.safetensors", "events.jsonl"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
