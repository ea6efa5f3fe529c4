"""Captured steps against the same steps one by one. A graph that does the work anew stands in for a GPU's."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import regrow
from regrow.study import captured, records
from regrow.study import train as train_module
from regrow.study.captured import CapturedStep, NotCaptured, _align, training_step
from regrow.study.config import RunConfig, make_config
from regrow.study.snapshot import keeper
from regrow.study.steps import Step
from regrow.study.train import train
from regrow.torch_private import TorchDispatchMode

OFF = torch.amp.GradScaler("cpu", enabled=False)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda those: torch.optim.SGD(those, 0.5, momentum=0.9, nesterov=True, weight_decay=0.01),
    "plain sgd": lambda those: torch.optim.SGD(those, 0.5),
    "adam": lambda those: torch.optim.Adam(those, 0.5, weight_decay=0.01),
    "adamw": lambda those: torch.optim.AdamW(those, 0.5),
}
"""Their rates are powers of 2, which a tensor in float32 holds exactly."""


class Anew:
    """Does the work again at each replay, with the settings that the optimizer had when it was recorded."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def rehearse(self, work: captured.Work, times: int) -> list[Tensor]:
        return [work()[0].clone() for _ in range(times)]

    def capture(self, work: captured.Work) -> tuple[Tensor, Tensor]:
        self.work, self.groups = work, [dict(group) for group in self.optimizer.param_groups]
        loss, right = work()
        self.result = loss.clone(), right.clone()
        return self.result

    def replay(self) -> None:
        now = [dict(group) for group in self.optimizer.param_groups]
        self._set(self.groups)
        for kept, new in zip(self.result, self.work(), strict=True):
            kept.copy_(new)
        self._set(now)

    def _set(self, groups: list[dict[str, Any]]) -> None:
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(values)


class Plain(Anew):
    """As ``Anew``, but with the optimizer's settings of today: no bit differs from steps one by one."""

    def _set(self, groups: list[dict[str, Any]]) -> None:
        pass


class Frozen(Anew):
    """As a graph in which something that changes in Python was recorded as a constant."""

    def replay(self) -> None:
        pass


class Refused(Anew):
    def capture(self, work: captured.Work) -> tuple[Tensor, Tensor]:
        work()
        raise NotCaptured("operation not permitted when stream is capturing")


def bits(state: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: tensor.detach().flatten().tolist() for name, tensor in state.items()}


def net(dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 3)
    ).to(memory_format=torch.channels_last)


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def losses(step: Step, sizes: list[int], rates: Iterator[float]) -> list[tuple[float, int]]:
    """Of a step for each size, at these rates."""
    torch.manual_seed(5)  # for dropout
    step.model.train()
    found = []
    for images, labels in batches(sizes):
        step.optimizer.param_groups[0]["lr"] = next(rates)
        loss, right = step(images, labels, 1.0)
        found.append((float(loss), int(right)))
    return found


def made(graph: type[Anew], optimizer: torch.optim.Optimizer) -> Callable[[torch.device], Anew]:
    return lambda _: graph(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_captured_steps_are_the_steps_one_by_one_at_every_rate(name: str) -> None:
    one, other = net(), net()
    plain = Step(one, OPTIMIZERS[name](one.parameters()), OFF)
    optimizer = OPTIMIZERS[name](other.parameters())
    step = CapturedStep(other, optimizer, OFF, size=8, make_graph=made(Anew, optimizer))
    sizes, rates = [8, 8, 5, 8, 8], [0.5, 0.25, 0.125, 0.0625, 0.0]
    expected = losses(plain, sizes, iter(rates))
    found = losses(step, sizes, iter(rates))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert optimizer.param_groups[0]["lr"] == 0.0  # a number again
    assert not optimizer.param_groups[0]["fused"]


def test_without_the_optimizers_other_kernels_no_bit_differs() -> None:
    one, other = net(), net()
    rates = [0.3, 0.2, 0.1]
    expected = losses(Step(one, OPTIMIZERS["sgd"](one.parameters()), OFF), [8, 8, 8], iter(rates))
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    step = CapturedStep(other, optimizer, OFF, size=8, make_graph=made(Plain, optimizer))
    assert losses(step, [8, 8, 8], iter(rates)) == expected
    assert bits(other.state_dict()) == bits(one.state_dict())


def test_bridgeout_draws_anew_at_each_replay() -> None:
    seen = []
    for graph in (None, Plain):
        model = net(dropout=0)
        regrow.add_bridgeout(model, 0.3)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        step = Step(model, optimizer, OFF)
        if graph is not None:
            step = CapturedStep(model, optimizer, OFF, size=8, make_graph=made(graph, optimizer))
        losses(step, [8, 8, 8], itertools.repeat(0.1))
        seen.append(bits(model.state_dict()))
        assert regrow.bridgeout_state(model)["passes"] == 3
    assert seen[0] == seen[1]


def test_what_is_launched_around_a_replay() -> None:
    class Idle(Plain):
        def replay(self) -> None:
            if counting:
                return
            super().replay()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    counting = False
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = CapturedStep(model, optimizer, OFF, size=8, make_graph=made(Idle, optimizer))
    ((images, labels),) = batches([8])
    step(images, labels, 1.0)
    counting = True
    with Counted():
        step(images, labels, 1.0)
    assert names == ["copy_", "copy_", "fill_"]  # pictures, labels, rate


def test_a_step_is_recorded_once_and_again_when_filters_were_dropped_or_restored() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    graphs: list[Anew] = []

    def make(_: torch.device) -> Anew:
        graphs.append(Plain(optimizer))
        return graphs[-1]

    step = CapturedStep(model, optimizer, OFF, size=8, make_graph=make)
    losses(step, [5], itertools.repeat(0.1))
    assert len(graphs) == 0
    losses(step, [8, 8, 5, 8], itertools.repeat(0.1))
    assert len(graphs) == 1
    step.renew()
    losses(step, [8, 8], itertools.repeat(0.1))
    assert len(graphs) == 2


@pytest.mark.gives_up
@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (Refused, "operation not permitted when stream is capturing"),
        (Frozen, r"its loss is [\d.]+, and one launch after another it is [\d.]+"),
    ],
)
def test_a_step_that_cannot_be_recorded_trains_as_before(
    graph: type[Anew], why: str, given_up: list[str]
) -> None:
    one, other = net(), net()
    expected = losses(
        Step(one, OPTIMIZERS["sgd"](one.parameters()), OFF), [8, 8, 5, 8], itertools.repeat(0.1)
    )
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    step = CapturedStep(other, optimizer, OFF, size=8, make_graph=made(graph, optimizer))
    assert losses(step, [8, 8, 5, 8], itertools.repeat(0.1)) == expected
    assert bits(other.state_dict()) == bits(one.state_dict())
    step.renew()  # nor is it tried again
    losses(step, [8], itertools.repeat(0.1))
    (said,) = given_up
    assert re.fullmatch(f"gave up the CUDA graph of a training step: {why}", said)


def test_an_error_of_the_model_is_its_own() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, _: Tensor) -> Tensor:
            raise KeyError("mine")

    model = Wrong()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    step = CapturedStep(model, optimizer, OFF, size=8, make_graph=made(Plain, optimizer))
    with pytest.raises(KeyError, match="mine"):
        losses(step, [8], itertools.repeat(0.1))
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("device", "processes", "half", "kind"),
    [
        ("cpu", 1, False, Step),
        ("cuda", 1, False, CapturedStep),
        ("cuda", 2, False, Step),
        ("cuda", 1, True, Step),
    ],
)
def test_where_steps_are_captured(
    monkeypatch: pytest.MonkeyPatch, device: str, processes: int, half: bool, kind: type[Step]
) -> None:
    monkeypatch.setattr(captured, "device_of", lambda _: torch.device(device))
    model = net()
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = training_step(model, optimizer, scaler, torch.float32, processes, size=8)
    assert type(step) is kind
    assert step.processes == processes


def test_gradients_and_slots_get_the_strides_of_their_parameters() -> None:
    # A convolution of one input channel: the stride of that dimension is 1 in the weight, and may be any.
    weight = nn.Parameter(torch.rand(4, 1, 3, 3).to(memory_format=torch.channels_last))
    assert weight.stride() == (9, 1, 3, 1)
    optimizer = torch.optim.SGD([weight], 0.5, momentum=0.9)
    values = torch.rand(4, 1, 3, 3)
    for _ in range(2):
        weight.grad = torch.empty_strided((4, 1, 3, 3), (9, 9, 3, 1)).copy_(values)
        optimizer.step()
    slots = optimizer.state[weight]
    before = slots["momentum_buffer"].clone()
    _align(optimizer)
    assert weight.grad.stride() == slots["momentum_buffer"].stride() == weight.stride()
    assert torch.equal(weight.grad, values)
    assert torch.equal(slots["momentum_buffer"], before)
    kept = weight.grad
    _align(optimizer)
    assert weight.grad is kept


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_keeper_puts_back_in_place_whatever_steps_change(name: str, trained: bool) -> None:
    model = net()
    regrow.add_bridgeout(model, 0.3)
    optimizer = OPTIMIZERS[name](model.parameters())
    step = Step(model, optimizer, OFF)
    if trained:
        losses(step, [8], itertools.repeat(0.1))
    before = bits(model.state_dict())
    slots = [{key: slot.clone() for key, slot in held.items()} for held in optimizer.state.values()]
    put_back = keeper(model, optimizer)
    expected = torch.rand(2)  # the draw of whoever comes next
    for _ in range(2):
        losses(step, [8, 8], itertools.repeat(0.1))
        put_back()
        assert bits(model.state_dict()) == before
        assert regrow.bridgeout_state(model)["passes"] == int(trained)
        assert torch.equal(torch.rand(2), expected)
        for number, held in enumerate(optimizer.state.values()):
            for key, slot in held.items():
                wanted = slots[number][key] if trained else torch.zeros_like(slot)
                assert torch.equal(slot, wanted)
    # A momentum of 0 is the same start as none.
    torch.manual_seed(5)
    fresh = net()
    if not trained:
        regrow.add_bridgeout(fresh, 0.3)
        losses(Step(fresh, OPTIMIZERS[name](fresh.parameters()), OFF), [8, 8], itertools.repeat(0.1))
        losses(step, [8, 8], itertools.repeat(0.1))
        assert bits(model.state_dict()) == bits(fresh.state_dict())


SMALL: dict[str, Any] = {
    "data": "digits", "width": 4, "train_size": 130, "batch_size": 50, "epochs": 5, "threads": 1, "seed": 7,
    "device": "cpu",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "repr": {"method": "repr", "full": 1, "sub": 1, "cycles": 2},
    "bridgeout": {"method": "bridgeout", "p": 0.2},
    "dropout": {"method": "dropout", "p": 0.2, "precision": "bfloat16"},
    "orthogonal-loss": {"method": "orthogonal-loss"},
    "ban": {"method": "ban", "generations": 5},
    "dsd": {"method": "dsd"},
    "continual-backprop": {"method": "continual-backprop", "replacement_rate": 0.3, "maturity": 1},
}
# How many graphs a run takes: RePr drops and restores twice, and the last restore is followed by an epoch.
GRAPHS = {"repr": 5, "ban": 5, "dsd": 3, "continual-backprop": 5}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Anew]:
    """Has runs on the CPU capture their steps, by graphs that are listed here."""
    made: list[Anew] = []

    class Listed(CapturedStep):
        def __init__(self, model: nn.Module, optimizer: Any, *others: Any, **options: Any) -> None:
            def make(_: torch.device) -> Anew:
                made.append(Plain(optimizer))
                return made[-1]

            super().__init__(model, optimizer, *others, **options, make_graph=make)

    monkeypatch.setattr(captured, "_why_not", lambda *_: None)
    monkeypatch.setattr(captured, "CapturedStep", Listed)
    return made


def ended(folder: Path) -> tuple[Any, ...]:
    run = records.read_run(folder)
    lines = [{**line, "seconds": 0} for line in run.epochs]
    return bits(load_file(records.weights_path(folder))), lines, run.events


def stopped(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop before the third checkpoint is written."""
    real, writes = train_module.write_checkpoint, itertools.count(1)

    def write(*arguments: Any) -> Any:
        if next(writes) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "write_checkpoint", write)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder)
    assert not records.is_finished(folder)


@pytest.mark.parametrize("method", METHODS)
def test_whole_runs_end_alike_captured_or_not_and_resumed_or_not(
    tmp_path: Path, method: str, graphs: list[Anew], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({**SMALL, **METHODS[method]})
    with monkeypatch.context() as patched:
        patched.setattr(captured, "_why_not", lambda *_: "this one is the reference")
        train(config, tmp_path / "plain")
    assert len(graphs) == 0
    train(config, tmp_path / "captured")
    assert len(graphs) == GRAPHS.get(method, 1)
    assert ended(tmp_path / "captured") == ended(tmp_path / "plain")

    stopped(config, tmp_path / "resumed", monkeypatch)
    train(config, tmp_path / "resumed")
    assert ended(tmp_path / "resumed") == ended(tmp_path / "plain")


def on_gpu(kind: type[Step], name: str, dtype: torch.dtype, rates: list[float]) -> list[float]:
    model = net().to("cuda", memory_format=torch.channels_last).train()
    optimizer = OPTIMIZERS[name](model.parameters())
    step = kind(model, optimizer, OFF, dtype, **({"size": 8} if kind is CapturedStep else {}))
    torch.manual_seed(5)
    found = []
    for (images, labels), rate in zip(batches([8, 8, 5, 8, 8]), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss, _ = step(images.cuda(), labels.cuda(), 1.0)
        found.append(float(loss))
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_steps_are_captured_and_give_the_same_losses(name: str, dtype: torch.dtype) -> None:
    """With dropout: a graph draws anew at each replay, and what the steps one by one would have drawn."""
    rates = [0.125, 0.125, 0.0625, 0.03125, 0.0]
    expected, found = (on_gpu(kind, name, dtype, rates) for kind in (Step, CapturedStep))
    assert found == pytest.approx(expected, rel=1e-3 if dtype is torch.float32 else 3e-2)


@pytest.mark.cuda
@pytest.mark.gives_up
def test_on_a_gpu_a_net_that_reads_a_number_trains_without_a_graph(given_up: list[str]) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()  # with dropout, which a broken capture would have stopped

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) * float(x.abs().max() > 0)

    model = Reading().to("cuda", memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = CapturedStep(model, optimizer, OFF, size=8)
    for images, labels in batches([8, 8]):
        loss, _ = step(images.cuda(), labels.cuda(), 1.0)
        assert torch.isfinite(loss)
    assert len(given_up) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_a_resumed_run_ends_as_one_that_was_not(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({**SMALL, **METHODS[method], "device": "cuda"})
    train(config, tmp_path / "whole")
    stopped(config, tmp_path / "resumed", monkeypatch)
    train(config, tmp_path / "resumed")
    assert ended(tmp_path / "resumed") == ended(tmp_path / "whole")
