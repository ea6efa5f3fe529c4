import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from nets import keep_but, unsettled
from regrow.surgery.removal import remove_filters, zero_filters

X = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(1))


def seen_by(net: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """The input of layer ``name``."""
    seen: list[torch.Tensor] = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0]


class Depthwise(nn.Module):
    """expand → depthwise → project, as in a MobileNet."""

    def __init__(self, filters: int = 6, groups: int | None = None) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, filters, 1)
        self.norm1 = nn.BatchNorm2d(filters)
        self.depth = nn.Conv2d(filters, filters, 3, padding=1, groups=groups or filters)
        self.norm2 = nn.BatchNorm2d(filters)
        self.project = nn.Conv2d(filters, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm1(self.expand(x)))
        x = nn.functional.relu6(self.norm2(self.depth(x)))
        return self.head(self.project(x).mean((2, 3)))


def test_zeroed_touches_rows_and_biases_only(make_net: Callable[..., nn.Sequential]) -> None:
    net = unsettled(make_net())
    before = copy.deepcopy(net.state_dict())
    record = zero_filters(net, {"conv1": keep_but(6, 1, 4), "conv2": keep_but(8)})
    assert record == {"version": 1, "reading": "zeroed", "dropped": {"conv1": [1, 4]}}
    expected = copy.deepcopy(before)
    expected["conv1.weight"][[1, 4]] = 0
    expected["conv1.bias"][[1, 4]] = 0
    assert all(torch.equal(net.state_dict()[key], expected[key]) for key in expected)


def test_a_zeroed_channel_emits_the_constant_of_its_norm(make_net: Callable[..., nn.Sequential]) -> None:
    net = unsettled(make_net())
    zero_filters(net, {"conv1": keep_but(6, 1)})
    norm = net.norm1
    constant = norm.bias[1] - norm.weight[1] * norm.running_mean[1] / (norm.running_var[1] + norm.eps).sqrt()
    torch.testing.assert_close(
        seen_by(net, "conv2", X)[:, 1], constant.relu().detach().expand(4, 7, 7), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_removed_channel_emits_exact_zeros(make_net: Callable[..., nn.Sequential], training: bool) -> None:
    net = unsettled(make_net()).train(training)
    before = seen_by(net, "conv2", X)
    keys = list(net.state_dict())
    record = remove_filters(net, {"conv1": keep_but(6, 1, 4), "conv3": keep_but(8, 0)}, example_inputs=X[:1])
    before[:, [1, 4]] = 0
    torch.testing.assert_close(seen_by(net, "conv2", X), before, rtol=0, atol=0)
    assert not seen_by(net, "head", X)[:, 0].any()
    assert list(net.state_dict()) == keys
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "version": 1, "reading": "removed", "dropped": {"conv1": [1, 4], "conv3": [0]},
        "followers": {}, "silenced": {},
    }  # fmt: skip


def test_removed_is_what_a_smaller_network_computes(make_net: Callable[..., nn.Sequential]) -> None:
    net = unsettled(make_net((6, 8)))
    small = make_net((4, 8)).eval()
    kept, state = [0, 2, 3, 5], net.state_dict()
    for key in small.state_dict():
        value = state[key]
        if key.startswith(("conv1", "norm1")) and value.dim():
            value = value[kept]
        small.state_dict()[key].copy_(value[:, kept] if key == "conv2.weight" else value)
    remove_filters(net, {"conv1": keep_but(6, 1, 4)}, example_inputs=X[:1])
    with torch.no_grad():
        torch.testing.assert_close(net(X), small(X))


def test_depthwise_rows_go_with_the_channels_they_read() -> None:
    net = unsettled(Depthwise())
    before = seen_by(net, "project", X)
    record = remove_filters(net, {"expand": keep_but(6, 2, 3)}, example_inputs=X[:1])
    assert record["followers"] == {"depth": [2, 3]}
    before[:, [2, 3]] = 0
    assert torch.equal(seen_by(net, "project", X), before)


def test_a_grouped_row_stays_while_one_of_its_inputs_is_alive() -> None:
    net = unsettled(Depthwise(groups=2))  # rows 0 to 2 read channels 0 to 2, rows 3 to 5 read 3 to 5
    before = net.depth.weight.clone()
    record = remove_filters(net, {"expand": keep_but(6, 0, 1, 3)}, example_inputs=X[:1])
    assert record["followers"] == {}
    assert torch.equal(net.depth.weight, before)
    record = remove_filters(net, {"expand": keep_but(6, 0, 1, 2)}, example_inputs=X[:1])
    assert record["followers"] == {"depth": [0, 1, 2]}


def test_wrappers_are_looked_through(make_net: Callable[..., nn.Sequential]) -> None:
    net = unsettled(make_net())
    wrapped = torch.compile(nn.DataParallel(copy.deepcopy(net)), backend="eager")
    keep = {"conv2": keep_but(8, 3)}
    assert remove_filters(net, keep, example_inputs=X[:1]) == remove_filters(
        wrapped, keep, example_inputs=X[:1]
    )
    state = wrapped.state_dict()
    assert all(
        torch.equal(value, state[f"_orig_mod.module.{key}"]) for key, value in net.state_dict().items()
    )


class Awkward(nn.Module):
    """Convolutions whose filters cannot simply go."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.twin = nn.Conv2d(4, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        self.second.weight = self.twin.weight
        self.computed = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.unused = nn.Conv2d(4, 4, 1)
        self.classes = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(self.computed(self.second(self.twin(self.first(x)).relu()).relu()).relu())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"frist": keep_but(4, 0)}, "no convolution is named 'frist'.*first"),
        ({"first": keep_but(5, 0)}, "boolean mask of 4 filters"),
        ({"first": torch.tensor([1.0, 0, 1, 1])}, "boolean mask of 4 filters"),
        ({"first": torch.zeros(4, dtype=torch.bool)}, "keep at least one"),
        ({"first": keep_but(4, 0), "twin": keep_but(4, 0)}, "'twin'.*shares its weight"),
        ({"first": keep_but(4, 0), "computed": keep_but(4, 0)}, "'computed'.*computed from other parameters"),
        ({"first": keep_but(4, 0), "unused": keep_but(4, 0)}, "'unused'.*do not reach"),
        ({"first": keep_but(4, 0), "classes": keep_but(3, 0)}, "'classes'.*network's output"),
    ],
)
def test_bad_masks_change_nothing(keep: dict[str, torch.Tensor], message: str) -> None:
    net = Awkward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        remove_filters(net, keep, example_inputs=X[:1])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_zeroing_shared_rows_is_refused() -> None:
    net = Awkward()
    before = net.first.weight.clone()
    with pytest.raises(ValueError, match="shares its weight"):
        zero_filters(net, {"first": keep_but(4, 0), "twin": keep_but(4, 0)})
    assert torch.equal(net.first.weight, before)


def test_a_norm_that_serves_others_too_is_named() -> None:
    class SharedNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.b(self.norm(self.a(x)).relu())).relu()).mean((2, 3))

    with pytest.raises(ValueError, match=r"'a' cannot be removed: 'norm' behind it cannot be silenced"):
        remove_filters(unsettled(SharedNorm()), {"a": keep_but(4, 0)}, example_inputs=X[:1])
