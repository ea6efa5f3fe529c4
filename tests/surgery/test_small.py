import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan
from regrow.surgery.small import Small, small_class


def left_of(layer, **parts):
    """What a plan leaves of ``layer``: ``rows=[0, 2]`` and so on, as in the plan."""
    holder = nn.ModuleDict({"layer": layer})
    apply_plan(holder, CutPlan(**{part: {"layer": value} for part, value in parts.items()}))
    return holder["layer"]


def linear():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    return layer


def conv():
    """Filter i multiplies its one channel by i + 1 and adds 10 · (i + 1)."""
    layer = nn.Conv2d(1, 3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))
        layer.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
    return layer


def norm():
    """Multiplies channel i by i + 1 and adds 10 · (i + 1)."""
    layer = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        layer.running_var.fill_(1 - layer.eps)
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
    return layer


def channels(*values):
    """A picture of one pixel."""
    return torch.tensor(values).view(1, -1, 1, 1)


@pytest.mark.devices
def test_a_layer_picks_channels_of_its_input():
    layer = left_of(linear(), columns=[0, 2], picked=[0, 2])
    assert layer(torch.tensor([1.0, 100.0, 2.0])).tolist() == [10 + 1 + 6, 20 + 4 + 12]
    assert layer(torch.tensor([[[1.0, 100.0, 2.0]]])).tolist() == [[[17, 36]]]
    assert layer.weight.tolist() == [[1, 3], [4, 6]]
    # The picked channels are those of the tensor that arrives, which may be narrow already.
    narrow = left_of(linear(), columns=[0, 2], picked=[0, 1])
    assert narrow(torch.tensor([1.0, 2.0])).tolist() == [17, 36]


@pytest.mark.devices
def test_a_layer_places_its_output_among_zeros():
    layer = left_of(conv(), rows=[0, 2], placed=(3, [0, 2]))
    assert layer(channels(2.0)).flatten().tolist() == [10 + 2, 0, 30 + 6]
    assert layer(torch.full((1, 2, 2), 2.0)).shape == (3, 2, 2)  # without a batch
    assert layer.weight.flatten().tolist() == [1, 3]
    narrow = left_of(conv(), rows=[1], placed=(2, [1]))
    assert narrow(channels(2.0)).flatten().tolist() == [0, 24]


@pytest.mark.devices
def test_a_norm_places_its_output_too():
    layer = left_of(norm(), channels=[0, 2], placed=(3, [0, 2]))
    torch.testing.assert_close(layer(channels(1.0, 1.0)).flatten(), torch.tensor([11.0, 0.0, 33.0]))


@pytest.mark.devices
def test_a_layer_picks_and_places():
    layer = left_of(linear(), columns=[1, 2], picked=[1, 2], rows=[1], placed=(2, [1]))
    assert layer(torch.tensor([100.0, 1.0, 2.0])).tolist() == [0, 20 + 5 + 12]


@pytest.mark.devices
def test_a_norm_computes_with_its_weights_spread_among_zeros():
    layer = left_of(norm(), spread=[0, 2])
    assert {name: p.tolist() for name, p in layer.named_parameters()} == {"weight": [1, 3], "bias": [10, 30]}
    assert layer.weight.tolist() == [1, 0, 3]
    assert layer.bias.tolist() == [10, 0, 30]
    torch.testing.assert_close(layer(channels(1.0, 1.0, 1.0)).flatten(), torch.tensor([11.0, 0.0, 33.0]))


def test_a_norm_that_loses_channels_spreads_the_rest():
    # Channel 0 leaves; of channels 1 and 2, which stay, 2 alone has a weight.
    layer = left_of(norm(), channels=[1, 2], spread=[2])
    assert layer.weight.tolist() == [0, 3]
    assert [p.tolist() for p in layer.parameters()] == [[3], [30]]
    assert layer.running_mean.shape == (2,)
    torch.testing.assert_close(layer(channels(1.0, 1.0)).flatten(), torch.tensor([0.0, 33.0]))


@pytest.mark.devices
def test_a_convolution_computes_with_its_rows_spread_among_zeros():
    layer = left_of(conv(), spread=[1])
    assert layer(channels(2.0)).flatten().tolist() == [0, 20 + 4, 0]
    assert {name: list(p.shape) for name, p in layer.named_parameters()} == {
        "weight": [1, 1, 1, 1],
        "bias": [1],
    }
    without_bias = left_of(nn.Conv2d(1, 3, 1, bias=False), spread=[1])
    assert without_bias.bias is None
    assert without_bias(channels(2.0)).count_nonzero() == 1


@pytest.mark.devices
def test_gradients_reach_what_is_left_of_a_spread_weight():
    layer = left_of(conv(), spread=[0, 2])
    layer(channels(2.0)).sum().backward()
    parameters = dict(layer.named_parameters())
    assert parameters["weight"].grad.flatten().tolist() == [2, 2]
    assert parameters["bias"].grad.tolist() == [1, 1]
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert layer.weight.flatten().tolist() == [0, 0, 2]
    assert layer.bias.tolist() == [9.5, 0, 29.5]


@pytest.mark.devices
def test_gradients_of_what_is_picked_and_placed():
    layer, x = left_of(linear(), columns=[0, 2], picked=[0, 2]), torch.ones(3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [1 + 4, 0, 3 + 6]
    assert layer.weight.grad.tolist() == [[1, 1], [1, 1]]


@given(data=st.data())
def test_it_computes_what_the_whole_layer_does_with_the_other_channels_at_0(data):
    some = st.sets(st.integers(0, 4), min_size=1).map(sorted)
    rows, columns = data.draw(some), data.draw(some)
    whole = nn.Conv2d(5, 5, 2)
    small = left_of(copy.deepcopy(whole), rows=rows, columns=columns, picked=columns, placed=(5, rows))
    x = torch.randn(2, 5, 3, 3)
    masked = torch.zeros_like(x)
    masked[:, columns] = x[:, columns]
    expected = whole(masked)
    expected[:, [i for i in range(5) if i not in rows]] = 0
    torch.testing.assert_close(small(x), expected)
    torch.testing.assert_close(small(x.to(memory_format=torch.channels_last)), expected)


def layers():
    """A cut layer of each kind, and what it reads."""
    return {
        "picked": (left_of(linear(), columns=[0, 2], picked=[0, 2]), torch.randn(2, 3)),
        "placed": (left_of(conv(), rows=[0, 2], placed=(3, [0, 2])), torch.randn(2, 1, 4, 4)),
        "spread": (left_of(norm(), spread=[1]), torch.randn(2, 3, 4, 4)),
        "spread rows": (left_of(conv(), spread=[1]), torch.randn(2, 1, 4, 4)),
    }


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.devices
@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved],
    ids=["copy", "pickle", "file"],
)
def test_copies_and_pickles(kind, again):
    layer, x = layers()[kind]
    twin = again(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.state_dict().keys() == layer.state_dict().keys()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).any()
    assert layer(x).any()


@pytest.mark.devices
@pytest.mark.parametrize("kind", layers())
def test_it_moves_to_other_numbers(kind):
    layer, x = layers()[kind]
    expected = layer(x)
    assert layer.double() is layer
    torch.testing.assert_close(layer(x.double()), expected.double())
    torch.testing.assert_close(layer.to(torch.float32)(x), expected)


@pytest.mark.parametrize("kind", layers())
def test_it_moves_to_a_device_without_memory_and_back(kind):
    layer, x = layers()[kind]
    expected, state = layer(x), layer.state_dict()
    layer.to("meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer(x.to("meta")).shape == expected.shape
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_its_indices_are_in_no_state_dict():
    for kind, (layer, _) in layers().items():
        assert not any("regrow" in key for key in layer.state_dict()), kind
        assert any(tensor.dtype == torch.int64 and tensor.dim() == 1 for tensor in layer.buffers()), kind


def test_it_is_still_of_the_layers_own_class():
    layer = left_of(conv(), rows=[0], placed=(3, [0]))
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(layer, Small)
    assert type(layer).__name__ == "SmallConv2d"
    assert type(layer) is small_class(nn.Conv2d, ()) is type(left_of(conv(), rows=[1], placed=(3, [1])))
    assert small_class(nn.Conv2d, ()) is not small_class(nn.Conv2d, ("weight",))
    assert not isinstance(left_of(conv(), rows=[0]), Small)


class Doubled(nn.Conv2d):
    """Its output is twice that of a plain convolution."""

    def forward(self, x, times=2):
        return times * super().forward(x)


def test_the_forward_of_a_class_of_the_users_own_runs_inside():
    layer = conv()
    layer.__class__ = Doubled
    small = left_of(layer, rows=[0, 2], placed=(3, [0, 2]))
    assert small(channels(2.0)).flatten().tolist() == [24, 0, 72]
    assert small(channels(2.0), times=1).flatten().tolist() == [12, 0, 36]
    whole = Doubled(3, 2, 1)
    picking = left_of(copy.deepcopy(whole), columns=[0, 2], picked=[0, 2])
    torch.testing.assert_close(picking(channels(1.0, 9.0, 2.0), 3), whole(channels(1.0, 0.0, 2.0), 3))


def test_users_hooks_see_the_wide_tensors():
    layer, seen = left_of(linear(), columns=[0, 2], picked=[0, 2], rows=[1], placed=(2, [1])), []
    layer.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    layer(torch.ones(4, 3))
    assert seen == [((4, 3), (4, 2))]


def test_a_transposed_convolution_that_picks_and_places_makes_the_size_it_is_told():
    model = nn.ModuleDict({"layer": nn.ConvTranspose2d(5, 6, 3, 2, 1)})
    whole = copy.deepcopy(model["layer"])
    apply_plan(
        model,
        CutPlan(
            rows={"layer": [1, 4]},
            columns={"layer": [0, 3]},
            picked={"layer": [0, 3]},
            placed={"layer": (5, [0, 3])},
        ),
    )
    x = torch.randn(2, 5, 4, 4)
    x[:, [1, 2, 4]] = 0
    for size in (None, [7, 8], [2, 5, 8, 7]):
        made, expected = model["layer"](x, output_size=size), whole(x, size)
        assert not made[:, [1, 2, 4]].any()
        torch.testing.assert_close(made[:, [0, 3]], expected[:, [1, 4]])
    torch.testing.assert_close(model["layer"](x, [8, 8])[:, [0, 3]], whole(x, [8, 8])[:, [1, 4]])


class Handed(nn.Conv2d):
    """A convolution that hands on whatever it is called with."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_layer_is_called_by_keyword():
    x = torch.randn(2, 3, 4, 4)
    for kind, name in ((nn.Conv2d, "input"), (Doubled, "x"), (Handed, "input")):
        layer = left_of(kind(3, 3, 1), columns=[0, 2], picked=[0, 2], rows=[1], placed=(3, [1]))
        assert torch.equal(layer(**{name: x}), layer(x))
    doubled = left_of(Doubled(3, 3, 1), columns=[0, 2], picked=[0, 2])
    assert torch.equal(doubled(times=3, x=x), doubled(x, 3))
    with pytest.raises(TypeError):
        doubled(times=3)


def test_torch_fx_writes_down_a_layer_of_the_users_own():
    x = torch.randn(2, 3, 4, 4)
    for kind in (Doubled, Handed):
        net = nn.Sequential(left_of(kind(3, 3, 1), columns=[0, 2], picked=[0, 2], rows=[1], placed=(3, [1])))
        graph = torch.fx.symbolic_trace(net)
        assert torch.equal(graph(x), net(x))
        assert "call_module" not in {node.op for node in graph.graph.nodes}  # it looked into the layer
        with pytest.raises(ValueError, match=r"give it regrow.plain_layers\(model\)"):
            torch.fx.symbolic_trace(nn.Sequential(left_of(kind(3, 3, 1), spread=[0, 2])))
