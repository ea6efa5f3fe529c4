import copy

import pytest
import torch
from torch import nn

from nets import Standardised, chain
from regrow.modules import (
    as_weight,
    channel_axis,
    channel_dim,
    channel_dims,
    channel_layers,
    channels_read,
    device_of,
    filter_count,
    filters_at,
    filters_first,
    grouped,
    input_first,
    input_name,
    is_depthwise,
    is_stock,
    per_channel,
    tied_modules,
    unwrap,
)


def parallel(model):
    """What stands around a model in a process of several, without the other processes."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrappers",
    [
        [],
        [nn.DataParallel],
        [compiled],
        [parallel],
        [compiled, parallel],
        [parallel, compiled],
        [nn.DataParallel, compiled, nn.DataParallel],
    ],
)
def test_the_users_model_is_found_in_nested_wrappers(wrappers):
    model = wrapped = nn.Sequential(nn.Linear(1, 1))
    for wrap in wrappers:
        wrapped = wrap(wrapped)
    assert (wrapped is model) == (not wrappers)
    assert unwrap(wrapped) is model


def test_a_model_of_the_users_own_that_holds_a_module_is_no_wrapper():
    model = nn.Sequential()
    model.module = nn.Linear(1, 1)
    assert unwrap(model) is model
    inside = nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))
    assert unwrap(inside) is inside


def test_the_device_is_that_of_the_first_parameter():
    assert device_of(nn.Linear(1, 1)) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1, device="meta"), nn.Linear(1, 1))
    assert device_of(model) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(1, affine=False, device="meta")) == torch.device("cpu")  # buffers alone


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("transposed", ["", "Transpose"])
def test_the_channels_of_a_convolution_with_and_without_a_batch(dim, transposed):
    layer = getattr(nn, f"Conv{transposed}{dim}d")(3, 5, 1)
    for batch in ([], [2]):
        x = torch.randn(*batch, 3, *[4] * dim)
        assert channel_dims(layer, x) == [len(batch)]
        assert x.shape[channel_dim(layer, x)] == 3
        made = layer(x)
        assert made.shape[channel_dim(layer, made)] == 5


@pytest.mark.parametrize("shape", [[3], [2, 3], [2, 7, 3], [2, 7, 7, 3]])
def test_the_channels_of_a_linear_layer_come_last(shape):
    layer, x = nn.Linear(3, 5), torch.randn(shape)
    assert channel_dims(layer, x) == [len(shape) - 1]
    assert channel_dim(layer, layer(x)) == len(shape) - 1


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), [2, 3]),
        (nn.BatchNorm1d(3), [2, 3, 4]),
        (nn.BatchNorm2d(3), [2, 3, 4, 4]),
        (nn.BatchNorm3d(3), [2, 3, 4, 4, 4]),
        (nn.SyncBatchNorm(3), [2, 3, 4, 4]),
        (nn.InstanceNorm1d(3), [2, 3, 4]),
        (nn.InstanceNorm2d(3), [2, 3, 4, 4]),
        (nn.InstanceNorm3d(3), [2, 3, 4, 4, 4]),
        (nn.GroupNorm(3, 3), [2, 3]),
        (nn.GroupNorm(1, 3), [2, 3, 4, 4]),
    ],
)
def test_the_channels_of_a_norm_come_behind_the_batch(norm, shape):
    x = torch.randn(shape)
    assert channel_dims(norm, x) == [1]
    assert channel_dim(norm, x) == 1
    assert norm.eval()(x).shape == x.shape


def test_a_layer_norm_may_have_its_channels_in_two_places():
    assert channel_dims(nn.LayerNorm(3), torch.zeros(2, 7, 7, 3)) == [1, 3]
    assert channel_dims(nn.LayerNorm([3, 4, 4]), torch.zeros(2, 3, 4, 4)) == [1, 3]
    assert set(channel_dims(nn.LayerNorm(3), torch.zeros(2, 3))) == {1}


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (nn.Conv1d(3, 5, 1), 3),
        (nn.Conv2d(4, 6, 1, groups=2), 4),
        (nn.Conv3d(3, 5, 1), 3),
        (nn.ConvTranspose2d(3, 5, 1), 3),
        (nn.Linear(3, 5), 3),
        (nn.BatchNorm2d(3), 3),
        (nn.BatchNorm2d(3, affine=False, track_running_stats=False), 3),
        (nn.InstanceNorm2d(3), 3),
        (nn.GroupNorm(2, 4), 4),
        (nn.GroupNorm(2, 4, affine=False), 4),
        (nn.LayerNorm(3), 3),
        (nn.LayerNorm([3, 4, 4]), 3),
        (nn.LayerNorm(3, elementwise_affine=False), None),
        (nn.PReLU(3), 3),
        (nn.PReLU(), None),
        (nn.ReLU(), None),
        (nn.Flatten(), None),
    ],
)
def test_how_many_channels_a_layer_reads(layer, channels):
    assert channels_read(layer) == channels


@pytest.mark.parametrize(
    ("norm", "alone"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4), True),
        (nn.GroupNorm(4, 4), True),
        (nn.GroupNorm(2, 4), False),
        (nn.GroupNorm(1, 1), True),
        (nn.LayerNorm(4), False),
        (nn.LayerNorm([4, 2, 2]), False),
    ],
)
def test_whether_a_norm_keeps_channels_apart(norm, alone):
    assert per_channel(norm) == alone


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(4, 4), nn.GroupNorm(2, 4)]
)
def test_a_norm_that_keeps_channels_apart_does_not_see_the_others(norm):
    x = torch.randn(3, 4, 5, 5)
    other = x.clone()
    other[:, 1:] = torch.randn(3, 3, 5, 5)
    assert torch.allclose(norm(x)[:, 0], norm(other)[:, 0], atol=1e-5) == per_channel(norm)


def test_the_layers_that_have_channels_in_the_order_of_registration():
    model = chain((2,))
    model.extra = nn.ModuleDict(
        {"up": nn.ConvTranspose2d(1, 1, 1), "norm": nn.LayerNorm(1), "act": nn.PReLU(2)}
    )
    assert [name for name, _ in channel_layers(model)] == ["conv1", "norm1", "head", "extra.up", "extra.norm"]
    assert channel_layers(nn.Linear(1, 1))[0][0] == ""
    assert all(module is model.get_submodule(name) for name, module in channel_layers(model))


def test_pytorchs_own_layers_are_told_from_changed_ones():
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for layer in (*(kind(1, 1, 1) for kind in kinds), nn.Linear(1, 1)):
        assert is_stock(layer)
        assert is_stock(copy.deepcopy(layer))
    for layer in (Standardised(1, 1, 1), nn.BatchNorm1d(1), nn.ReLU()):
        assert not is_stock(layer)
    layer = nn.Linear(1, 1)
    layer.forward = lambda x: x
    assert not is_stock(layer)
    assert not is_stock(nn.utils.parametrizations.weight_norm(nn.Linear(1, 1)))


def test_modules_that_hold_a_parameter_of_another_module():
    model = chain((3, 3))
    assert tied_modules(model) == set()
    model.head2 = nn.Linear(3, 4)
    model.head2.weight = model.head.weight
    model.norm2.bias = model.norm1.bias
    assert tied_modules(model) == {"head", "head2", "norm1", "norm2"}


def test_one_module_with_two_names_or_one_parameter_twice_in_it_is_not_tied():
    model = chain((3, 3))
    model.again = model.conv1
    model.norm1.bias = model.norm1.weight
    model.conv2.register_parameter("left_out", None)
    model.norm2.register_parameter("left_out", None)
    assert tied_modules(model) == set()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.InstanceNorm1d(4), (4, 8)), (nn.InstanceNorm2d(4), (4, 8, 8)), (nn.InstanceNorm3d(4), (4, 2, 8, 8))],
)
def test_an_instance_norm_has_its_channels_first_where_there_is_no_batch(norm, shape):
    assert channel_dim(norm, torch.zeros(shape)) == 0
    assert channel_dim(norm, torch.zeros(2, *shape)) == 1


@pytest.mark.parametrize(
    ("layer", "shape", "filters", "kept"),
    [
        # A convolution: filter i is weight[i].
        (nn.Conv2d(4, 6, 1, groups=2), [2, 3, 2, 1, 1], [1, 5], [(1, 0), (1, 1), (5, 0), (5, 1)]),
        (nn.Linear(3, 2), [1, 2, 3], [1], [(1, 0), (1, 1), (1, 2)]),
        # A transposed one: filter i is weight[:, i], and with groups weight[channels of its group, i in it].
        (nn.ConvTranspose1d(2, 3, 1), [1, 3, 2, 1], [0, 2], [(0, 0), (0, 2), (1, 0), (1, 2)]),
        (nn.ConvTranspose2d(4, 6, 1, groups=2), [2, 3, 2, 1, 1], [1, 5], [(0, 1), (1, 1), (2, 2), (3, 2)]),
        (nn.ConvTranspose2d(3, 6, 1, groups=3), [3, 2, 1, 1, 1], [0, 3], [(0, 0), (1, 1)]),
    ],
)
def test_where_the_filters_of_a_layer_lie_in_its_weight(layer, shape, filters, kept):
    weight = layer.weight.detach()
    parts = grouped(layer, weight)
    assert list(parts.shape) == shape
    assert parts.data_ptr() == weight.data_ptr()
    assert filter_count(layer, weight) == shape[0] * shape[1]
    first = filters_first(layer, weight)
    assert torch.equal(as_weight(layer, first), weight)
    assert list(first.shape) == [shape[0] * shape[1], *shape[2:]]
    marked = torch.zeros(weight.shape[:2], dtype=torch.bool)
    marked[filters_at(layer, torch.tensor(filters))] = True
    assert [tuple(at) for at in marked.nonzero().tolist()] == kept
    assert filters_first(layer, marked).all(1).nonzero().flatten().tolist() == filters
    # A filter alone makes its channel: without its weights the others make what they made.
    x = torch.randn(2, getattr(layer, "in_channels", 3), *[2] * (weight.dim() - 2))
    with torch.no_grad():
        layer.bias.zero_()
        whole = layer(x)
        layer.weight[filters_at(layer, torch.tensor(filters))] = 0
        without = layer(x)
    others = [i for i in range(whole.shape[1]) if i not in filters]
    assert not without[:, filters].any()
    assert torch.equal(without[:, others], whole[:, others])


@pytest.mark.parametrize(
    ("layer", "hands_on"),
    [
        (nn.Conv2d(4, 8, 1, groups=4), True),
        (nn.ConvTranspose2d(4, 4, 1, groups=4), True),
        (nn.ConvTranspose2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(1, 4, 1), False),
        (nn.Linear(1, 4), False),
    ],
)
def test_depthwise_layers_hand_channels_on(layer, hands_on):
    assert is_depthwise(layer) == hands_on


def test_the_axis_of_the_channels_is_that_of_a_tensor_of_any_shape():
    for layer, shapes in {
        nn.Linear(4, 4): ([4], [2, 4], [2, 3, 4]),
        nn.Conv1d(4, 4, 1): ([4, 5], [2, 4, 5]),
        nn.Conv3d(4, 4, 1): ([4, 5, 6, 7], [2, 4, 5, 6, 7]),
        nn.ConvTranspose2d(4, 4, 1): ([4, 5, 6], [2, 4, 5, 6]),
        nn.InstanceNorm2d(4): ([4, 5, 6], [2, 4, 5, 6]),
        nn.BatchNorm1d(4): ([2, 4], [2, 4, 5]),
        nn.GroupNorm(2, 4): ([2, 4], [2, 4, 5, 6]),
        nn.PReLU(4): ([2, 4], [2, 4, 5]),
    }.items():
        for shape in shapes:
            tensor = torch.zeros(shape)
            assert tensor.shape[channel_axis(layer)] == 4
            assert channel_dim(layer, tensor) == channel_axis(layer) % tensor.dim()


class Odd(nn.Conv2d):
    def forward(self, picture, scale=1):
        return scale * super().forward(picture)


class Passes(Odd):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class ByKeyword(nn.Conv2d):
    def forward(self, *, picture):
        return super().forward(picture)


class Nothing(nn.Module):
    def forward(self):
        return None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (nn.Conv2d, "input"), (nn.BatchNorm1d, "input"), (nn.LayerNorm, "input"), (nn.PReLU, "input"),
        (Odd, "picture"), (Passes, "picture"), (ByKeyword, ""), (Nothing, ""),
    ],
)  # fmt: skip
def test_the_name_of_what_a_layer_reads(kind, name):
    assert input_name(kind) == name


def test_a_call_by_keyword_is_turned_into_one_by_position():
    assert input_first("x", (), {"scale": 2, "x": 1}) == ((1,), {"scale": 2})
    assert input_first("x", (), {"x": 1}) == ((1,), {})
    for args, kwargs in (((1,), {"scale": 2}), ((), {"y": 1}), ((), {}), ((1, 2), {})):
        assert input_first("x", args, kwargs) == (args, kwargs)
        assert input_first("", args, kwargs) == (args, kwargs)
