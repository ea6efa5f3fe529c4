"""The reconstruction criterion: by hand where a picture is one pixel, and against plain sums elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets import DECODERS, Drawn, Residual, chain, conv, decoder, head, unsettled
from regrow import score
from regrow.criteria import reconstruction
from regrow.least_squares.elimination import Reading, eliminate

# Two channels of one pixel that do not depend on each other, of mean 0 and variance 1.
PIXELS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[:, :, None, None]


def scores(model: nn.Module, *batches: Tensor) -> dict[str, list[float]]:
    found = score(model, "reconstruction", batches=list(batches))
    assert all(values.dtype == torch.float64 for values in found.values())
    return {name: values.tolist() for name, values in found.items()}


def weighted(layer: Any, weight: list[list[float]]) -> Any:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
    return layer


def two(
    first: list[list[float]], second: list[list[float]], *behind: nn.Module, **settings: Any
) -> nn.Module:
    made, kept = len(first), len(second)
    return nn.Sequential(
        weighted(nn.Conv2d(len(first[0]), made, 1, bias=False), first),
        weighted(nn.Conv2d(made, kept, 1, bias=False, **settings), second),
        *behind,
    )


@pytest.mark.devices
def test_the_second_of_two_equal_channels_costs_nothing() -> None:
    # y = 2 a + b + 0.5 c, where b and c are the same: variance 4 + 1.5². c goes first; b then does for both.
    found = scores(two([[1, 0], [0, 1], [0, 1]], [[2, 1, 0.5]], nn.Flatten()), PIXELS)
    assert found["0"] == pytest.approx([4 / 6.25, 2.25 / 6.25, 0], abs=1e-3)


@pytest.mark.devices
def test_errors_are_those_behind_the_readers_norm() -> None:
    norm = nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, -1.0]))
        norm.running_var.copy_(torch.tensor([1.0, 4.0]) - norm.eps)
    model = two([[1, 0], [0, 1]], [[1, 0.5], [1, 2]], norm, nn.Flatten())
    # The outputs are a + b/2 and a + 2b, which the norm multiplies by 3 and −½: their variances are 11.25 and
    # 1.25, of which a makes 9 + ¼, and b 9/4 + 1. The penalty adds a thousandth.
    expected = [1.001 * 9.25 / 12.5, 1.001 * 3.25 / 12.5]
    assert scores(model, PIXELS)["0"] == pytest.approx(expected, rel=1e-5)
    assert scores(model, *PIXELS.split(3))["0"] == pytest.approx(expected, rel=1e-5)


def test_each_group_has_a_system_of_its_own() -> None:
    # In the first group b is a copy of a; in the second c and d do not depend on each other.
    model = two([[1, 0], [1, 0], [1, 0], [0, 1]], [[2, 1], [1, 1]], nn.Flatten(), groups=2)
    # y = 3 a, and c + d: variances 9 and 2.
    assert scores(model, PIXELS)["0"] == pytest.approx([9 / 11, 0, 1 / 11, 1 / 11], abs=2e-3)


def test_no_filter_is_worth_less_than_one_that_goes_earlier() -> None:
    # b and c together say what a says: without a they cost more than they do beside it.
    x = torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    found = score(two([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0.1]], [[1, 1, 1]]), "reconstruction", batches=[x])[
        "0"
    ]
    order = found.argsort()
    assert (found[order].diff() > 0).all()


def plainly(rows: Tensor, weights: Tensor, channels: list[int], count: int, total: float) -> list[float]:
    """The scores that follow from ``rows`` of inputs, one for each output."""
    rows = rows.double() - rows.double().mean(0)
    one = Reading(rows.T @ rows / len(rows), weights.double() / total**0.5, torch.tensor(channels))
    order, errors = eliminate([one], count)
    found = torch.zeros(count, dtype=torch.float64)
    found[order] = errors.cummax(0).values
    return found.tolist()


def spread(x: Tensor) -> Tensor:
    return x.double().movedim(1, -1).flatten(0, -2).var(0, correction=0)


@torch.no_grad()
def test_a_residual_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "_SHARE", 1.0)
    model = unsettled(Residual(4, 6)).eval()
    x = torch.randn(8, 3, 6, 6)
    found = scores(model, *x.split(3))
    stem = model.norm(model.stem(x))
    inner = F.relu(model.norm_a(model.a(stem.relu())))
    added = model.norm_b(model.b(inner))
    total = float(spread(stem.relu() + added).sum())
    assert found["stem"] == pytest.approx((spread(stem) / spread(stem).sum()).tolist(), rel=1e-4)
    assert found["b"] == pytest.approx((spread(added) / total).tolist(), rel=1e-4)
    rows = F.unfold(inner, 3, padding=1).transpose(1, 2).flatten(0, 1)
    scale = model.norm_b.weight / (model.norm_b.running_var + model.norm_b.eps).sqrt()
    columns = [channel for channel in range(6) for _ in range(9)]
    expected = plainly(rows, model.b.weight.flatten(1).T * scale, columns, 6, total)
    assert found["a"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_linear_layer_behind_a_flatten_reads_a_channel_at_all_its_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(40, 1, 4, 4)
    rows, total = model[:3](x), float(spread(model(x)).sum())
    expected = plainly(rows, model[3].weight.T, [0] * 4 + [1] * 4 + [2] * 4, 3, total)
    assert scores(model, x)["0"] == pytest.approx(expected, rel=1e-4)


def twin(layer: Any, one: int, other: int) -> None:
    """Make the filter ``other`` the same as ``one``, and what the next layers see of it."""
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor[other] = tensor[one]


READERS: dict[str, Any] = {
    "transposed": lambda: [nn.ConvTranspose2d(4, 5, 2, 2)],
    "strided": lambda: [nn.Conv2d(4, 5, 3, 2, bias=False), nn.GroupNorm(1, 5)],
    "pooled": lambda: [nn.MaxPool2d(2), conv(4, 5)],
    "without a norm's statistics": lambda: [conv(4, 5), nn.InstanceNorm2d(5)],
}


@pytest.mark.devices
@pytest.mark.parametrize("reader", READERS)
def test_a_twin_costs_little_whatever_reads_it(reader: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.ReLU(), *READERS[reader](), nn.ReLU(), head(5))
    twin(model[0], 0, 2)
    found = score(model, "reconstruction", batches=[torch.randn(16, 3, 8, 8)])["0"]
    lowest, *others = found.sort().values.tolist()
    assert int(found.argmin()) in (0, 2)
    assert lowest < 0.02 * min(others)


def test_depthwise_layers_are_looked_through() -> None:
    torch.manual_seed(0)
    depthwise = conv(4, 8, groups=4)
    model = nn.Sequential(
        conv(3, 4), nn.ReLU(), depthwise, nn.BatchNorm2d(8), nn.ReLU(), conv(8, 5, 1), head(5)
    )
    x = torch.randn(16, 3, 8, 8)
    twin(model[0], 0, 2)
    apart = score(model, "reconstruction", batches=[x])["0"]
    twin(depthwise, 0, 4)
    twin(depthwise, 1, 5)
    alike = score(model, "reconstruction", batches=[x])["0"]
    assert float(alike.min()) < 0.02 * float(apart.min())
    with torch.no_grad():
        model[5].weight[:, [2, 3]] = 0  # what is made of the second filter is not read
    unread = score(model, "reconstruction", batches=[x])["0"]
    assert float(unread[1]) < 1e-9


def test_several_readers_and_concatenations() -> None:
    torch.manual_seed(0)
    model = Drawn(
        lambda m, x: m.head(m.both(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)) + m.side(F.relu(m.a(x)))),
        a=conv(3, 4),
        b=conv(3, 2),
        both=conv(6, 5),
        side=conv(4, 5),
        head=head(5),
    )
    with torch.no_grad():
        model.both.weight[:, 1] = 0
    x = torch.randn(8, 3, 6, 6)
    read_once = score(model, "reconstruction", batches=[x])
    assert float(read_once["a"][1]) > 0.01  # by the side alone
    with torch.no_grad():
        model.side.weight[:, 1] = 0
    unread = score(model, "reconstruction", batches=[x])
    assert float(unread["a"][1]) < 1e-9
    assert (unread["b"] > 0).all()


def test_a_bound_on_memory_does_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = unsettled(chain((6, 8, 8))), torch.randn(9, 3, 8, 8)
    expected = scores(model, *x.split(4))
    for name, value in (("_MOST_BYTES", 1), ("_ROWS", 1)):
        monkeypatch.setattr(reconstruction, name, value)
    found = scores(model, *x.split(4))
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3)


def test_batches_are_read_once_and_labels_are_not() -> None:
    model, x = unsettled(chain((4, 4))), torch.randn(6, 3, 8, 8)
    expected = scores(model, x)
    for batches in (iter([x]), iter([(x, "no labels")]), [{"input": x}]):
        found = score(model, "reconstruction", batches=batches)
        assert {name: values.tolist() for name, values in found.items()} == expected


@pytest.mark.parametrize("build", [lambda: chain((4, 4)), lambda: Residual(4, 4)], ids=["chain", "residual"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_pictures_that_are_no_numbers_are_refused(build: Any, bad: float, first: bool) -> None:
    x = torch.randn(4, 3, 8, 8)
    x[0 if first else 3, 0, 2, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite values of criterion 'reconstruction'"):
        score(build(), "reconstruction", batches=[x])


def test_a_layer_that_no_picture_reaches_and_pictures_that_are_all_the_same() -> None:
    model = unsettled(chain((4, 4)))
    model.spare = conv(3, 2)
    model.forward = lambda x: nn.Sequential(*list(model.children())[:-1])(x)  # type: ignore[method-assign]
    assert scores(model, torch.randn(4, 3, 8, 8))["spare"] == [0, 0]
    found = scores(two([[1, 0], [0, 1]], [[1, 1]], nn.Flatten()), torch.ones(4, 2, 1, 1))
    assert found["0"] == [0, 0]


@pytest.mark.parametrize("name", DECODERS)
def test_transposed_convolutions_of_all_kinds(name: str) -> None:
    model, x = decoder(name)
    found = score(model, "reconstruction", batches=[x, x + 0.1])
    for values in found.values():
        assert (values >= 0).all()
        assert values.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_than_float32(dtype: torch.dtype) -> None:
    model, x = unsettled(Residual(4, 6)), torch.randn(16, 3, 8, 8).bfloat16()
    model = model.bfloat16()
    found = score(model.to(dtype), "reconstruction", batches=[x.to(dtype)])
    plain = score(model.float(), "reconstruction", batches=[x.float()])
    for name, values in plain.items():
        torch.testing.assert_close(found[name], values, rtol=0.1, atol=0.01 * float(values.max()))
