import copy
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nets import keep_but, unsettled
from regrow.compensation.compensate import METHODS, READINGS, compensate, read_as
from regrow.compensation.norms import reestimate_norms
from regrow.modules import filters_first
from regrow.structure.read import read_structure
from regrow.surgery.removal import remove_filters, zero_filters

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def set_to(parameter: torch.Tensor | None, values: object) -> None:
    assert parameter is not None
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(values).view_as(parameter))


@torch.no_grad()
def outputs(net: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    return net.eval()(x)


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(net.state_dict())


def same(net: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


# --- by hand ---------------------------------------------------------------------------------------


@pytest.mark.devices
def test_a_constant_channel_goes_into_the_bias_of_a_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 2), nn.AdaptiveAvgPool2d(1))
    set_to(net[0].weight, [1.0, 0.0])
    set_to(net[0].bias, [0.0, 3.0])  # filter 1 is 3 everywhere
    set_to(net[2].weight, [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]]])  # its kernel sums to 10
    set_to(net[2].bias, [0.5])
    x = torch.arange(18.0).view(2, 1, 3, 3)
    before = outputs(net, x)
    record = compensate(net, {"0": keep_but(2, 1)}, [x], example_inputs=x[:1], method="means")
    assert net[2].bias.item() == 0.5 + 3 * 10
    torch.testing.assert_close(outputs(net, x), before)
    assert record == {
        "version": 1, "reading": "compensated", "dropped": {"0": [1]}, "followers": {}, "silenced": {},
        "method": "means", "layers": {"2": {"how": "mean"}},
        "unfolded": {}, "images": 2,
    }  # fmt: skip
    assert json.loads(json.dumps(record)) == record


@pytest.mark.devices
def test_in_float64_means_beyond_float32_are_folded_too() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)).double()
    set_to(net[0].weight, [1.0, 0.0])
    set_to(net[0].bias, torch.tensor([0.0, 3e60], dtype=torch.float64))
    set_to(net[1].weight, [1.0, 2.0])
    set_to(net[1].bias, [0.0])
    compensate(net, {"0": keep_but(2, 1)}, [X[:, :1].double()], example_inputs=X[:1, :1].double())
    assert net[1].bias.item() == pytest.approx(6e60, rel=1e-12)


@pytest.mark.devices
def test_the_mean_is_that_behind_norm_activation_and_pooling() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=1e-12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2, 1, 1), nn.AdaptiveAvgPool2d(1),
    ).eval()  # fmt: skip
    set_to(net[0].weight, [1.0, 1.0])
    set_to(net[1].weight, [1.0, 2.0])
    set_to(net[1].bias, [0.0, 1.0])
    set_to(net[1].running_mean, [0.0, -1.0])
    set_to(net[1].running_var, [1.0, 4.0])
    set_to(net[4].weight, [1.0, 5.0])
    set_to(net[4].bias, [0.0])
    # Filter 1 turns a value v into max(v + 2, 0), and of each 2×2 square the largest stays.
    x = torch.tensor([[[1.0, 3, 5, 4], [-1, 2, 0, 1]], [[-4, -5, 7, 1], [-6, -7, 2, 3]]]).unsqueeze(1)
    compensate(net, {"0": keep_but(2, 1)}, [x], example_inputs=x[:1], method="means")
    assert net[4].bias.item() == pytest.approx(5 * (5 + 7 + 0 + 9) / 4)


@pytest.mark.devices
def test_behind_a_flatten_every_column_has_its_own_mean() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 1))
    set_to(net[0].weight, [1.0, 2.0])
    set_to(net[2].weight, [1.0, 1, 1, 1, 1, 10, 100, 1000])
    set_to(net[2].bias, [7.0])
    x = torch.tensor([[1.0, 2, 3, 4], [3, 4, 5, 8]]).view(2, 1, 2, 2)  # filter 1 has the means 4, 6, 8, 12
    compensate(net, {"0": keep_but(2, 1)}, [x[:1], x[1:]], example_inputs=x[:1], method="means")
    assert net[2].bias.item() == 7 + 4 * 1 + 6 * 10 + 8 * 100 + 12 * 1000


def test_at_a_padded_border_the_fold_is_right_on_average() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 3, padding=1))
    set_to(net[0].weight, [1.0, 0.0])
    set_to(net[0].bias, [0.0, 2.0])
    set_to(net[1].weight, torch.ones(1, 2, 3, 3))
    set_to(net[1].bias, [0.0])
    x = torch.zeros(1, 1, 3, 3)  # the constant 2 is read 9 times in the middle, 6 at an edge, 4 in a corner
    compensate(net, {"0": keep_but(2, 1)}, [x], example_inputs=x, method="means")
    assert net[1].bias.item() == pytest.approx(2 * (9 + 4 * 6 + 4 * 4) / 9)


@pytest.mark.devices
def test_batches_count_by_their_images() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 1))
    set_to(net[0].weight, [1.0, 1.0])
    set_to(net[2].weight, [1.0, 1.0])
    set_to(net[2].bias, [0.0])
    x = torch.tensor([1.0, 2, 3, 10]).view(4, 1, 1, 1)
    record = compensate(net, {"0": keep_but(2, 1)}, [x[:3], x[3:]], example_inputs=x[:1], method="means")
    assert net[2].bias.item() == 4
    assert record["images"] == 4


def test_without_a_bias_the_norm_behind_takes_the_fold() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip
    unsettled(net, lowest_bias=0.2)
    set_to(net[0].weight.data[2], torch.zeros(3))
    set_to(net[0].bias.data[2], 1.5)
    before, mean = outputs(net), net[3].running_mean.clone()
    record = compensate(net, {"0": keep_but(4, 2)}, [X], example_inputs=X[:1], method="means")
    assert list(record["layers"]) == ["2"]
    torch.testing.assert_close(net[3].running_mean, mean - 1.5 * net[2].weight[:, 2].sum((1, 2)).detach())
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)


def test_without_a_bias_and_a_norm_nothing_is_added_and_the_record_says_so() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 1),
        nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    removed, keep = copy.deepcopy(net), {"0": keep_but(4, 2)}
    remove_filters(removed, keep, example_inputs=X[:1])
    record = compensate(net, keep, [X], example_inputs=X[:1], method="means")
    assert list(record["unfolded"]) == ["2"]
    assert record["layers"] == {}
    assert same(net, removed.state_dict())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_behind_the_activation_takes_no_fold(inplace: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(inplace), nn.BatchNorm2d(5),
        nn.Conv2d(5, 2, 1), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    mean = net[4].running_mean.clone()
    record = compensate(net, {"0": keep_but(4, 2)}, [X], example_inputs=X[:1], method="means")
    assert list(record["unfolded"]) == ["2"]
    assert torch.equal(net[4].running_mean, mean)


@pytest.mark.devices
def test_the_last_of_two_cuts_is_folded_as_if_the_first_had_not_been() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    set_to(net[0].weight, [1.0, 2.0])
    set_to(net[0].bias, [0.0, 0.0])
    set_to(net[2].weight, [[1.0, 1.0], [3.0, 4.0]])
    set_to(net[2].bias, [0.0, 0.0])
    set_to(net[4].weight, [1.0, 5.0])
    set_to(net[4].bias, [0.0])
    x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    compensate(net, {"0": keep_but(2, 1), "2": keep_but(2, 1)}, [x], example_inputs=x[:1])
    assert net[2].bias.tolist() == [1 * 4, 0]  # filter 1 of the first layer: mean 4; the dropped row stays 0
    assert net[4].bias.item() == 5 * (3 * 2 + 4 * 4)  # filter 1 of the second: 3·1st + 4·2nd, as it was


# --- constant channels: nothing is lost ------------------------------------------------------------


class Sum(nn.Module):
    """A residual stream that two blocks write to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.a, self.norm_a, self.b = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)
        self.c, self.head = nn.Conv2d(6, 5, 3), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = x + self.b(self.norm_a(self.a(x)).relu())
        x = nn.functional.avg_pool2d(x, 2)
        return self.head(torch.cat([x.mean((2, 3))[:, :1], self.c(x).relu().amax((2, 3))], 1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.a, self.norm2, self.b = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(11), nn.Conv2d(11, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.a(self.norm1(x).relu())], 1)
        return self.head(self.b(self.norm2(x).relu()).relu().mean((2, 3)))


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.depth, self.norm2 = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.point, self.norm3, self.head = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.norm1(self.stem(x)))
        x = nn.functional.hardswish(self.norm2(self.depth(x)))
        return self.head(self.norm3(self.point(x)).relu().mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.group, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.group(self.stem(x).sigmoid()).relu().mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excitation; the gate of the constant channel is constant too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.down, self.up = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.out, self.head = nn.Conv2d(6, 4, 3), nn.Linear(4, 4)
        nn.init.zeros_(self.up.weight.data[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.out(x).relu().mean((2, 3)))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(54, 5, bias=False)
        self.norm1, self.head = nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.norm(self.stem(x)).relu(), 2)
        return self.head(self.norm1(self.fc(x.flatten(1))).relu())


class InPlace(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        for name, module in {
            "stem": nn.Conv2d(3, 6, 1), "relu": nn.ReLU(inplace=True), "conv": nn.Conv2d(6, 5, 3, stride=2),
            "relu2": nn.ReLU(inplace=True), "drop": nn.Dropout(0.9), "pool": nn.AdaptiveMaxPool2d(1),
            "flat": nn.Flatten(), "head": nn.Linear(5, 4),
        }.items():  # fmt: skip
            self.add_module(name, module)


class Upward(nn.Module):
    """Transposed convolutions, the second depthwise: what they miss differs from pixel to pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.ConvTranspose2d(3, 6, 1), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 6, 2, 2, groups=6)
        self.last, self.head = nn.ConvTranspose2d(6, 5, 2, 2), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.up(self.norm(self.stem(x)).relu())).mean((2, 3)))


NETS = [Sum, Dense, Depth, Grouped, Squeeze, Flat, InPlace, Upward]


def with_constant(build: type[nn.Module], filter_: int = 1, value: float = 0.8) -> nn.Module:
    """A net whose filter ``filter_`` of ``stem`` is the same everywhere."""
    net = unsettled(build(), lowest_bias=0.2)
    stem: nn.Conv2d = net.stem  # type: ignore[assignment]
    nn.init.zeros_(filters_first(stem, stem.weight.data)[filter_])
    if stem.bias is not None:
        stem.bias.data[filter_] = value
    return net


@pytest.mark.parametrize("build", NETS)
def test_a_constant_channel_is_folded_without_loss(build: type[nn.Module]) -> None:
    net = with_constant(build).train()
    before, keys = outputs(copy.deepcopy(net)), list(net.state_dict())
    removed = copy.deepcopy(net)
    remove_filters(removed, {"stem": keep_but(6, 1)}, example_inputs=X[:1])
    compensate(net, {"stem": keep_but(6, 1)}, [X], example_inputs=X[:1], method="means")
    assert all(module.training for module in net.modules())
    assert hooks(net) == 0
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(removed), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", NETS)
def test_nothing_is_lost_with_the_norms_re_estimated(build: type[nn.Module]) -> None:
    net = with_constant(build)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        reestimate_norms(net, [X])
    before = outputs(net)
    record = compensate(net, {"stem": keep_but(6, 1)}, [X], example_inputs=X[:1])
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)
    assert record["images"] == len(X)


@given(
    seed=st.integers(0, 2**16),
    dropped=st.sets(st.integers(0, 5), min_size=1, max_size=5),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    value=st.floats(-2, 2),
)
def test_any_constant_channels_are_folded_without_loss(
    seed: int, dropped: set[int], kernel: int, stride: int, bias: bool, value: float
) -> None:
    torch.manual_seed(seed)
    net = unsettled(
        nn.Sequential(
            nn.Conv2d(3, 6, kernel), nn.GELU(), nn.Conv2d(6, 5, kernel, stride, bias=bias), nn.BatchNorm2d(5),
            nn.Tanh(), nn.Flatten(1), nn.LazyLinear(3),
        ),
        lowest_bias=0.2,
    )  # fmt: skip
    net(X)
    net[0].weight.data[list(dropped)] = 0
    net[0].bias.data[list(dropped)] = value
    before = outputs(net)
    compensate(net, {"0": keep_but(6, *dropped)}, [X[:5], X[5:]], example_inputs=X[:1], method="means")
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)


def test_the_mean_in_front_of_the_next_layer_is_kept_whatever_the_channel_does() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    )
    before = outputs(net).mean(0)
    compensate(net, {"0": keep_but(6, 0, 5)}, [X[:7], X[7:]], example_inputs=X[:1], method="means")
    torch.testing.assert_close(outputs(net).mean(0), before)


# --- readings --------------------------------------------------------------------------------------


def test_each_reading_is_its_function(make_net: Callable[..., nn.Sequential]) -> None:
    net, keep = unsettled(make_net(), lowest_bias=0.2), {"conv1": keep_but(6, 0, 3), "conv2": keep_but(8, 1)}
    nets = {reading: copy.deepcopy(net) for reading in READINGS}
    for reading in READINGS:
        record = read_as(nets[reading], keep, reading, example_inputs=X[:1], calibration=iter([X]))
        assert record["reading"] == reading
        assert record["dropped"] == {"conv1": [0, 3], "conv2": [1]}
    expected = [copy.deepcopy(net) for _ in READINGS]
    zero_filters(expected[0], keep)
    remove_filters(expected[1], keep, example_inputs=X[:1])
    compensate(expected[2], keep, [X], example_inputs=X[:1])
    for (_reading, got), wanted in zip(nets.items(), expected, strict=True):
        assert same(got, wanted.state_dict())
    assert len({tuple(outputs(got).flatten().tolist()) for got in nets.values()}) == 3


def test_an_unknown_reading_and_a_missing_calibration_are_named(
    make_net: Callable[..., nn.Sequential],
) -> None:
    net, keep = make_net(), {"conv1": keep_but(6, 0)}
    before = state_of(net)
    with pytest.raises(ValueError, match=r"unknown reading 'zero'.*zeroed"):
        read_as(net, keep, "zero", example_inputs=X[:1])
    with pytest.raises(ValueError, match="needs calibration="):
        read_as(net, keep, "compensated", example_inputs=X[:1])
    assert same(net, before)


@pytest.mark.devices
@pytest.mark.parametrize("reading", READINGS)
def test_with_nothing_dropped_every_reading_is_the_network_itself(
    make_net: Callable[..., nn.Sequential], reading: str
) -> None:
    net = unsettled(make_net(), lowest_bias=0.2)
    before = state_of(net)
    record = read_as(net, {"conv1": keep_but(6)}, reading, example_inputs=X[:1], calibration=[X])
    assert record["dropped"] == {}
    assert same(net, before)


# --- calibration -----------------------------------------------------------------------------------


@pytest.mark.devices
def test_labels_keywords_generators_and_wrappers_make_no_difference(
    make_net: Callable[..., nn.Sequential],
) -> None:
    net, keep = unsettled(make_net(), lowest_bias=0.2), {"conv1": keep_but(6, 0, 3)}
    labels = torch.zeros(6)

    def once() -> Iterator[list[torch.Tensor]]:
        yield from ([X[:6], labels], [X[6:], labels])

    calibrations = {
        "tensors": [X[:6], X[6:]], "tuples": [(X[:6], labels), (X[6:], labels)], "generator": once(),
        "keywords": [{"input": X[:6]}, {"input": X[6:]}],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(12)), 6),
    }  # fmt: skip
    results = []
    for calibration in calibrations.values():
        copied = copy.deepcopy(net)
        compensate(copied, keep, calibration, example_inputs=X[:1])
        results.append(copied.state_dict())
    wrapped = copy.deepcopy(net)
    compensate(
        torch.compile(nn.DataParallel(wrapped), backend="eager"), keep, [X[:6], X[6:]], example_inputs=X[:1]
    )
    results.append(wrapped.state_dict())
    assert all(same(wrapped, result) for result in results)


BAD = [
    ([], "yields no batch"),
    (iter([]), "yields no batch"),
    (X, r"calibration=\[x\]"),
    ([X, X[:, :2]], "fails on a calibration batch"),
    ([X, 3], "got int"),
    ([X, X * float("nan")], "NaN or infinite"),
]


@pytest.mark.parametrize(("calibration", "message"), BAD)
@pytest.mark.parametrize("method", METHODS)
def test_bad_calibration_changes_nothing(
    make_net: Callable[..., nn.Sequential], calibration: object, message: str, method: str
) -> None:
    net = unsettled(make_net(), lowest_bias=0.2).train()
    net.norm2.eval()
    before, modes = state_of(net), [module.training for module in net.modules()]
    with pytest.raises(ValueError, match=message):
        compensate(
            net,
            {"conv1": keep_but(6, 0)},
            calibration,  # type: ignore[arg-type]
            example_inputs=X[:1],
            method=method,
        )
    assert same(net, before)
    assert [module.training for module in net.modules()] == modes
    assert hooks(net) == 0


def test_a_shared_bias_is_not_moved_twice() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 1))
    net[4].bias = net[2].bias
    bias = net[2].bias.clone()
    record = compensate(net, {"0": keep_but(4, 0)}, [X], example_inputs=X[:1], method="means")
    assert list(record["unfolded"]) == ["2"]
    assert torch.equal(net[2].bias, bias)


def test_a_layer_called_twice_takes_the_mean_of_both_calls() -> None:
    class CalledTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.out(self.a(x)), self.out(self.b(x))], 1).mean((2, 3))

    net = CalledTwice()
    set_to(net.a.weight, [0.0, 1.0])
    set_to(net.a.bias, [4.0, 0.0])
    set_to(net.out.weight, [3.0, 1.0])
    set_to(net.out.bias, [0.0])
    x = X[:, :1]
    compensate(net, {"a": keep_but(2, 0)}, [x], example_inputs=x[:1], method="means")
    assert net.out.bias.item() == pytest.approx(3 * 4 / 2)


# --- batch norm ------------------------------------------------------------------------------------


def test_removed_channels_keep_harmless_statistics(make_net: Callable[..., nn.Sequential]) -> None:
    net = unsettled(make_net(), lowest_bias=0.2)
    compensate(net, {"conv2": keep_but(8, 2, 5)}, [X], example_inputs=X[:1])
    assert net.norm2.running_mean[[2, 5]].tolist() == [0, 0]
    assert (net.norm2.running_var[[2, 5]] > 0).all()
    assert not net.norm2.weight[[2, 5]].any()
    assert not net.norm2.bias[[2, 5]].any()


# --- a trained network -----------------------------------------------------------------------------


def test_compensation_recovers_much_of_what_removal_costs_on_real_digits() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) - 4.9) / 6
    y = torch.tensor(labels)
    layers: list[nn.Module] = []
    for inputs, filters in ((1, 16), (16, 16), (16, 24), (24, 24)):
        layers += [nn.Conv2d(inputs, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if inputs == filters else []
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for batch in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    keep = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            lowest = module.weight.flatten(1).norm(dim=1).argsort()[: round(0.3 * module.out_channels)]
            keep[name] = keep_but(module.out_channels, *lowest.tolist())

    def accuracy(reading: str) -> float:
        cut = copy.deepcopy(net)
        read_as(cut, keep, reading, example_inputs=x[:1], calibration=[x[:250]])
        return float((outputs(cut, x[1200:]).argmax(1) == y[1200:]).float().mean())

    full = float((outputs(net, x[1200:]).argmax(1) == y[1200:]).float().mean())
    assert full > 0.9
    assert accuracy("compensated") > accuracy("removed") + 0.1


@pytest.mark.devices
def test_known_readers_save_the_look_for_them(make_net, monkeypatch):
    model = make_net()
    readers = read_structure(model, torch.randn(1, 3, 8, 8))
    other = copy.deepcopy(model)
    keep = {"conv2": torch.arange(8) < 5}
    images = [torch.randn(16, 3, 8, 8)]
    record = compensate(model, keep, images, example_inputs=torch.randn(1, 3, 8, 8))
    monkeypatch.setattr("regrow.surgery.removal.read_structure", None)
    assert compensate(other, keep, images, example_inputs=torch.randn(1, 3, 8, 8), readers=readers) == record
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.devices
@pytest.mark.gives_up
def test_a_shift_of_channels_that_are_no_filters_goes_into_the_norm():
    class Shuffled(nn.Conv2d):
        def forward(self, x):
            return nn.functional.pixel_shuffle(super().forward(x), 2)

    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Shuffled(8, 16, 1), nn.BatchNorm2d(4), nn.Flatten())
    bias = net[2].bias.clone()
    record = compensate(net, {"0": torch.arange(8) > 2}, [x], example_inputs=x[:1], method="means")
    assert list(record["layers"]) == ["2"]
    assert torch.equal(net[2].bias, bias)
    assert net[3].running_mean.any()
