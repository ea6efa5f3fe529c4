"""What only a GPU can do: steps that are captured in a CUDA graph, with Bridgeout and with RePr."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets import chain
from regrow.noise.layers import add_bridgeout, bridgeout_state, load_bridgeout_state
from regrow.repr.cycle import RePr

pytestmark = pytest.mark.cuda


def capture(work: Callable[[], object], rehearsals: int = 3) -> torch.cuda.CUDAGraph:
    """``work`` as a graph, after ``rehearsals`` on a stream of their own, as PyTorch asks for."""
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(rehearsals):
            work()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 8, 8).to(device), (torch.arange(8) % 4).to(device)


def trainee(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = chain().to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def training(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A step of training, which can be captured."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def one_layer(device: torch.device) -> tuple[nn.Module, Tensor]:
    """A convolution, and a picture of one bright pixel: the output is w̃, mirrored."""
    picture = torch.zeros(1, 1, 5, 5)
    picture[0, 0, 2, 2] = 1
    return nn.Conv2d(1, 64, 3, bias=False).to(device), picture.to(device)


def test_each_replay_draws_new_noise(device: torch.device) -> None:
    layer, picture = one_layer(device)
    add_bridgeout(layer, p=0.5, seed=3)
    seen: dict[str, Tensor] = {}

    def work() -> None:
        with torch.no_grad():
            seen["noisy"] = layer(picture).flip(2, 3)

    graph = capture(work)
    first = bridgeout_state(layer)["passes"]
    draws = []
    for _ in range(4):
        graph.replay()
        draws.append((seen["noisy"] < layer.weight.detach().view_as(seen["noisy"])).flatten().tolist())
    assert bridgeout_state(layer)["passes"] == first + 4
    assert len(set(map(tuple, draws))) == 4
    # 576 weights, p = 0.5: a share beyond 5 standard deviations (0.021 each) has a chance below 1e-6.
    assert all(0.39 < sum(draw) / len(draw) < 0.61 for draw in draws)


def test_a_replay_draws_what_the_same_pass_draws_outside_of_a_graph(device: torch.device) -> None:
    layer, picture = one_layer(device)
    other, _ = one_layer(device)
    other.load_state_dict(layer.state_dict())
    for each in (layer, other):
        add_bridgeout(each, p=0.3, seed=3)
    seen: dict[str, Tensor] = {}

    def work() -> None:
        with torch.no_grad():
            seen["noisy"] = layer(picture)

    graph = capture(work)
    for _ in range(3):
        state = bridgeout_state(layer)
        graph.replay()
        load_bridgeout_state(other, state)
        torch.testing.assert_close(seen["noisy"], other(picture).detach())


@pytest.mark.parametrize("noisy", [False, True])
def test_a_captured_step_trains_as_one_launch_after_another(device: torch.device, noisy: bool) -> None:
    x, y = batch(device)
    (model, optimizer), (other, other_optimizer) = trainee(device), trainee(device)
    if noisy:
        for each in (model, other):
            add_bridgeout(each, seed=3)
    step = training(other, other_optimizer, x, y)
    graph = capture(training(model, optimizer, x, y))
    for _ in range(3 + 4):  # the rehearsals train too; the capture itself computes nothing
        step()
    if noisy:
        # The capture runs the model in Python once, and that may count as a pass.
        load_bridgeout_state(model, {**bridgeout_state(other), "passes": 3})
    for _ in range(4):
        graph.replay()
    if noisy:
        assert bridgeout_state(model)["passes"] == bridgeout_state(other)["passes"] == 7
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)


def test_a_graph_from_before_a_drop_is_noticed_and_a_new_one_trains_without_the_filters(
    device: torch.device,
) -> None:
    x, y = batch(device)
    model, optimizer = trainee(device)
    cycle = RePr(model, optimizer, fraction=0.3, full=1, sub=3, cycles=1, example_inputs=x[:1], compact=True)
    step = training(model, optimizer, x, y)
    old = capture(step)
    dropped = cycle.step()
    assert dropped is not None
    assert dropped.kind == "drop"
    step()  # as is usual; the graph goes on training what is dropped
    old.replay()
    with pytest.warns(UserWarning, match="capture it again"):
        cycle.step()
    new = capture(step)
    new.replay()
    for name, filters in dropped.filters.items():
        assert not model.get_submodule(name).weight[filters].any()
    cycle.step()
    event = cycle.step()
    assert event is not None
    assert event.kind == "restore"
    assert any("capture your CUDA graph again" in note for note in event.notes)
