import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from nets import chain, conv, unsettled
from regrow.surgery.layers import (
    Replaced,
    apply_plan,
    cuts,
    filters_left,
    is_cut,
    layers,
    sliced,
    widen,
)
from regrow.surgery.plan import CutPlan, PlanUnfit
from regrow.surgery.small import Small

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
# conv1 loses filters 1 and 3 of 4, conv2 filter 0 of 3.
PLAN = CutPlan(
    rows={"conv1": [0, 2], "conv2": [1, 2]},
    channels={"norm1": [0, 2], "norm2": [1, 2]},
    columns={"conv2": [0, 2], "head": [1, 2]},
)


def net():
    torch.manual_seed(0)
    return unsettled(chain((4, 3)))


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items() if tensor.dim()}


def test_the_shapes_that_a_plan_leaves():
    model = net()
    before = shapes(model)
    apply_plan(model, PLAN)
    assert shapes(model) == {
        "conv1.weight": [2, 3, 3, 3],
        "conv1.bias": [2],
        "norm1.weight": [2],
        "norm1.bias": [2],
        "norm1.running_mean": [2],
        "norm1.running_var": [2],
        "conv2.weight": [2, 2, 3, 3],
        "conv2.bias": [2],
        "norm2.weight": [2],
        "norm2.bias": [2],
        "norm2.running_mean": [2],
        "norm2.running_var": [2],
        "head.weight": [4, 2],
        "head.bias": [4],
    }
    assert list(shapes(model)) == list(before)
    assert (model.conv1.out_channels, model.conv1.in_channels) == (2, 3)
    assert (model.conv2.out_channels, model.conv2.in_channels) == (2, 2)
    assert (model.norm1.num_features, model.norm2.num_features) == (2, 2)
    assert (model.head.in_features, model.head.out_features) == (2, 4)
    assert model(X).shape == (2, 4)
    assert not any(isinstance(module, Small) for module in model.modules())


@pytest.mark.devices
def test_the_values_that_a_plan_leaves():
    model, whole = net(), net()
    apply_plan(model, PLAN)
    assert torch.equal(model.conv1.weight, whole.conv1.weight[[0, 2]])
    assert torch.equal(model.conv1.bias, whole.conv1.bias[[0, 2]])
    assert torch.equal(model.norm1.running_var, whole.norm1.running_var[[0, 2]])
    assert torch.equal(model.conv2.weight, whole.conv2.weight[[1, 2]][:, [0, 2]])
    assert torch.equal(model.head.weight, whole.head.weight[:, [1, 2]])
    assert torch.equal(model.head.bias, whole.head.bias)


@pytest.mark.devices
@pytest.mark.parametrize(
    ("layer", "parts", "left", "numbers"),
    [
        (nn.Conv1d(4, 6, 3), {"rows": [5]}, {"weight": [1, 4, 3], "bias": [1]}, {"out_channels": 1}),
        (
            nn.Conv3d(4, 2, 1, bias=False),
            {"columns": [0, 3]},
            {"weight": [2, 2, 1, 1, 1]},
            {"in_channels": 2},
        ),
        # Four groups of two rows, each group with one channel: the first and the last group stay.
        (
            nn.Conv2d(4, 8, 1, groups=4),
            {"rows": [0, 1, 6, 7], "groups": 2},
            {"weight": [4, 1, 1, 1], "bias": [4]},
            {"out_channels": 4, "in_channels": 2, "groups": 2},
        ),
        # Two groups of three rows, each with two channels: one row of each group leaves.
        (
            nn.Conv2d(4, 6, 1, groups=2),
            {"rows": [0, 1, 4, 5]},
            {"weight": [4, 2, 1, 1], "bias": [4]},
            {"out_channels": 4, "in_channels": 4, "groups": 2},
        ),
        (
            nn.Linear(4, 3),
            {"columns": [1]},
            {"weight": [3, 1], "bias": [3]},
            {"in_features": 1, "out_features": 3},
        ),
        (
            nn.Linear(4, 3),
            {"rows": [1, 2]},
            {"weight": [2, 4], "bias": [2]},
            {"in_features": 4, "out_features": 2},
        ),
        (
            nn.GroupNorm(4, 4),
            {"channels": [1]},
            {"weight": [1], "bias": [1]},
            {"num_channels": 1, "num_groups": 1},
        ),
        (nn.PReLU(4), {"channels": [1, 2, 3]}, {"weight": [3]}, {"num_parameters": 3}),
        (nn.InstanceNorm2d(4), {"channels": [1, 2, 3]}, {}, {"num_features": 3}),
        (
            nn.BatchNorm1d(4, affine=False),
            {"channels": [0]},
            {"running_mean": [1], "running_var": [1]},
            {"num_features": 1},
        ),
    ],
)
def test_each_kind_of_layer_by_hand(layer, parts, left, numbers):
    model = nn.ModuleDict({"layer": layer})
    whole = copy.deepcopy(layer)
    before = dict(vars(whole))
    apply_plan(model, CutPlan(**{part: {"layer": value} for part, value in parts.items()}))
    assert shapes(layer) == left
    assert {name: vars(layer)[name] for name in numbers} == numbers
    widen(model)
    assert shapes(layer) == shapes(whole)
    assert {name: vars(layer)[name] for name in numbers} == {name: before[name] for name in numbers}


def test_which_parameter_stands_for_which():
    model = net()
    before = dict(model.named_parameters())
    replaced = apply_plan(model, PLAN)
    after = dict(model.named_parameters())
    pairs = {id(one.old): one for one in replaced}
    assert len(pairs) == len(replaced) == 9  # all but the head's bias
    assert "head.bias" in before
    for name, old in before.items():
        if name == "head.bias":
            assert after[name] is old
        else:
            assert pairs[id(old)].new is after[name]
    assert pairs[id(before["conv2.weight"])].kept == {0: [1, 2], 1: [0, 2]}
    assert pairs[id(before["head.weight"])].kept == {1: [1, 2]}
    assert pairs[id(before["norm1.bias"])].kept == {0: [0, 2]}


def test_what_a_plan_keeps_of_each_parameter_without_a_cut():
    model = net()
    state = copy.deepcopy(model.state_dict())
    kept = {f"{layer.name}.{key}": at for layer in layers(model, PLAN) for key, at in layer.kept.items()}
    assert {name: at for name, at in kept.items() if "running" not in name} == {
        "conv1.weight": {0: [0, 2]},
        "conv1.bias": {0: [0, 2]},
        "norm1.weight": {0: [0, 2]},
        "norm1.bias": {0: [0, 2]},
        "conv2.weight": {0: [1, 2], 1: [0, 2]},
        "conv2.bias": {0: [1, 2]},
        "norm2.weight": {0: [1, 2]},
        "norm2.bias": {0: [1, 2]},
        "head.weight": {1: [1, 2]},
    }
    assert not is_cut(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_is_to_be_left_of_a_layer():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4))
    plan = CutPlan(channels={"1": [0, 2, 3]}, spread={"1": [0, 3]}, rows={"0": [1]}, placed={"0": (4, [2])})
    one, other = layers(model, plan)
    assert (one.name, one.module) == ("0", model[0])
    assert one.kept == {"weight": {0: [1]}, "bias": {0: [1]}}
    assert one.numbers == {"out_channels": 1, "in_channels": 3, "groups": 1}
    assert (one.placed, one.picked, one.spread) == ((4, [2]), None, None)
    assert other.kept["weight"] == other.kept["bias"] == {0: [0, 3]}
    assert other.kept["running_mean"] == other.kept["running_var"] == {0: [0, 2, 3]}
    assert other.numbers == {"num_features": 3}
    assert other.spread == (3, [0, 2])  # of the channels 0, 2, 3 that are left, 0 and 3
    assert layers(model, CutPlan(masked={"0": "why"})) == []


def test_a_model_tells_what_was_cut():
    model = net()
    assert not is_cut(model)
    assert cuts(model) == []
    first, second = (
        CutPlan(rows={"conv1": [0, 2, 3]}, columns={"conv2": [0, 2, 3]}),
        CutPlan(rows={"conv2": [2]}),
    )
    first.channels["norm1"], second.channels["norm2"], second.columns["head"] = [0, 2, 3], [2], [2]
    apply_plan(nn.DataParallel(model), first)
    apply_plan(model, second)
    assert cuts(model) == cuts(nn.DataParallel(model)) == [first.to_dict(), second.to_dict()]
    assert is_cut(model)
    assert is_cut(nn.Sequential(model))
    cuts(model).clear()
    assert len(cuts(model)) == 2
    assert cuts(copy.deepcopy(model)) == cuts(model)
    widen(model)
    assert not is_cut(model)
    assert cuts(model) == []


def test_a_plan_of_nothing_is_a_cut_that_left_all():
    model = net()
    before = dict(model.named_parameters())
    assert apply_plan(model, CutPlan()) == []
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert cuts(model) == [CutPlan().to_dict()]
    assert not is_cut(model)


def masked(model, plan):
    """The whole ``model`` with what ``plan`` cuts away at 0, the statistics at those of a new norm."""
    model = copy.deepcopy(model)
    for layer in layers(model, plan):
        own = dict(layer.module.named_parameters()) | dict(layer.module.named_buffers())
        for key, kept in layer.kept.items():
            gone = torch.ones(own[key].shape, dtype=torch.bool)
            places = [torch.tensor(kept.get(dim, range(size))) for dim, size in enumerate(gone.shape)]
            gone[torch.meshgrid(*places, indexing="ij")] = False
            own[key].data[gone] = float(key == "running_var")
    return model


def equal(one, other):
    state = other.state_dict()
    return list(one.state_dict()) == list(state) and all(
        torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items()
    )


def attributes(model):
    """Everything on the layers that is neither a tensor nor a module."""
    return [
        (type(module), {key: value for key, value in vars(module).items() if key != "_modules"
                        and key not in ("_parameters", "_buffers", "_regrow_cuts")})
        for module in model.modules()
    ]  # fmt: skip


@pytest.mark.devices
@settings(max_examples=30)
@given(data=st.data())
def test_widening_undoes_a_plan(data):
    def some(width):
        return data.draw(st.sets(st.integers(0, width - 1), min_size=1).map(sorted))

    model = net()
    one, two = some(4), some(3)
    plan = CutPlan(rows={"conv1": one, "conv2": two}, channels={"norm1": one, "norm2": two})
    plan.columns.update({"conv2": one, "head": two})
    if data.draw(st.booleans()):  # the first convolution's channels stay in the tensors, and conv2 picks
        del plan.channels["norm1"]
        plan.placed["conv1"], plan.picked["conv2"], plan.spread["norm1"] = (4, one), one, one
    expected, small = masked(model, plan), copy.deepcopy(model)
    apply_plan(small, plan)
    narrow = small(X)
    replaced = widen(small)
    assert equal(small, expected)
    assert attributes(small) == attributes(model)
    torch.testing.assert_close(small(X), narrow)
    assert {id(one.new) for one in replaced} == {
        id(p) for name, p in small.named_parameters() if name != "head.bias"
    }


@settings(max_examples=30)
@given(data=st.data())
def test_widening_undoes_one_plan_on_top_of_another(data):
    def some(width):
        return data.draw(st.sets(st.integers(0, width - 1), min_size=1).map(sorted))

    model, once = net(), net()
    first = some(4)
    second = some(len(first))
    for kept in (first, second):
        apply_plan(model, CutPlan(rows={"conv1": kept}, channels={"norm1": kept}, columns={"conv2": kept}))
    both = [first[i] for i in second]
    plan = CutPlan(rows={"conv1": both}, channels={"norm1": both}, columns={"conv2": both})
    expected = masked(once, plan)
    apply_plan(once, plan)
    assert equal(model, once)
    widen(model)
    assert equal(model, expected)
    assert attributes(model) == attributes(net())


def test_a_second_plan_may_cut_another_dimension():
    model, whole = net(), net()
    apply_plan(model, CutPlan(rows={"conv2": [1, 2]}, channels={"norm2": [1, 2]}, columns={"head": [1, 2]}))
    apply_plan(model, CutPlan(rows={"conv1": [3]}, channels={"norm1": [3]}, columns={"conv2": [3]}))
    assert torch.equal(model.conv2.weight, whole.conv2.weight[[1, 2]][:, [3]])
    widen(model)
    expected = torch.zeros(3, 4, 3, 3)
    expected[[1, 2], 3] = whole.conv2.weight.detach()[[1, 2], 3]
    assert torch.equal(model.conv2.weight, expected)


def test_widening_a_model_that_was_not_cut_changes_nothing():
    model = net()
    before = dict(model.named_parameters())
    assert widen(model) == []
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def test_gradients_and_all_else_on_a_parameter_go_along():
    model = net()
    model(X).sum().backward()
    gradient = model.conv2.weight.grad.clone()
    model.conv2.weight.note = "mine"
    model.conv1.requires_grad_(False)
    model.conv1.weight.grad = None
    apply_plan(model, PLAN)
    assert torch.equal(model.conv2.weight.grad, gradient[[1, 2]][:, [0, 2]])
    assert model.conv2.weight.note == "mine"
    assert model.conv1.weight.grad is None
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad
    widen(model)
    expected = torch.zeros(3, 4, 3, 3)
    expected[1:, ::2] = gradient[1:, ::2]
    assert torch.equal(model.conv2.weight.grad, expected)
    assert model.conv2.weight.note == "mine"
    assert not model.conv1.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_and_memory_format_stay(dtype):
    model = net().to(dtype).to(memory_format=torch.channels_last)
    for change in (lambda: apply_plan(model, PLAN), lambda: widen(model)):
        change()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
        assert not model.conv2.weight.is_contiguous()


def test_a_plan_needs_no_values():
    model = net().to("meta")
    apply_plan(model, PLAN)
    assert model.conv2.weight.shape == (2, 2, 3, 3)
    widen(model)
    assert model.conv2.weight.shape == (3, 4, 3, 3)
    assert model.conv2.weight.device.type == "meta"


def test_slices_by_hand():
    tensor = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert sliced(tensor, {}).tolist() == tensor.tolist()
    assert sliced(tensor, {1: [0, 2]}).tolist() == [[1, 3], [4, 6]]
    assert sliced(tensor, {0: [1], 1: range(1, 3)}).tolist() == [[5, 6]]
    assert sliced(tensor, {1: torch.tensor([2])}).tolist() == [[3], [6]]
    last = torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last)
    part = sliced(last, {0: [0, 2], 1: [1, 3, 4]})
    assert torch.equal(part, last[[0, 2]][:, [1, 3, 4]])
    assert part.is_contiguous(memory_format=torch.channels_last)
    assert sliced(last.contiguous(), {0: [0, 2]}).is_contiguous()


def replaced(old, new, kept):
    return Replaced(nn.Parameter(torch.zeros(old)), nn.Parameter(torch.zeros(new)), kept)


def test_a_slot_of_a_parameter_that_became_smaller():
    one = replaced((3, 4), (2, 2), {0: [0, 2], 1: [1, 3]})
    slot = torch.arange(12).view(3, 4)
    assert one.of(slot).tolist() == [[1, 3], [9, 11]]
    # Sums over rows or columns, as an optimizer that factors its slots keeps them.
    assert one.of(slot[:1]).tolist() == [[1, 3]]
    assert one.of(slot[:, :1]).tolist() == [[0], [8]]
    assert one.of(slot[:1, :1]).tolist() == [[0]]


def test_a_slot_of_a_parameter_that_became_large_again():
    one = replaced((2, 2), (3, 4), {0: [0, 2], 1: [1, 3]})
    slot = torch.tensor([[1, 2], [3, 4]])
    assert one.of(slot).tolist() == [[0, 1, 0, 2], [0, 0, 0, 0], [0, 3, 0, 4]]
    assert one.of(slot[:1]).tolist() == [[0, 1, 0, 2]]
    assert one.of(slot[:, :1]).tolist() == [[1], [0], [3]]
    rows = replaced((2, 4), (3, 4), {0: [1, 2]})
    assert rows.of(torch.ones(2, 4)).tolist() == [[0] * 4, [1] * 4, [1] * 4]
    assert rows.of(torch.ones(1, 4)).tolist() == [[1] * 4]


@pytest.mark.devices
@given(data=st.data())
def test_a_slot_is_there_again_after_both_ways(data):
    some = st.sets(st.integers(0, 3), min_size=2).map(sorted)
    kept = {dim: data.draw(some) for dim in data.draw(st.sets(st.integers(0, 2)))}
    full = [4, 4, 4]
    less = [len(kept[dim]) if dim in kept else 4 for dim in range(3)]
    shape = [data.draw(st.sampled_from([1, size])) for size in less]
    slot = torch.randn(shape)
    large = replaced(less, full, kept).of(slot)
    assert [*large.shape] == [1 if size == 1 else 4 for size in shape]
    assert torch.equal(replaced(full, less, kept).of(large), slot)
    assert large.count_nonzero() == slot.count_nonzero()


@pytest.mark.devices
def test_momentum_is_what_it_would_have_been():
    # The slots of an optimizer are cut like the gradients that they were made of.
    model, whole = net(), net()
    momentum = {}
    for each in (model, whole):
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)
        each(X).sum().backward()
        optimizer.step()
        momentum[each] = {
            name: optimizer.state[parameter]["momentum_buffer"] for name, parameter in each.named_parameters()
        }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for one in apply_plan(model, PLAN):
        slot = one.of(momentum[model][names[id(one.old)]])
        assert slot.shape == one.new.shape
        assert torch.equal(slot, sliced(momentum[whole][names[id(one.old)]], one.kept))


def many_kinds():
    model = chain((4, 4))
    model.conv2 = conv(4, 4, groups=2)
    model.prelu = nn.PReLU(4)
    model.free = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    model.none = nn.LayerNorm(4, elementwise_affine=False)
    model.fits = conv(3, 2)
    model.table, model.both = nn.Embedding(4, 4), nn.Bilinear(4, 4, 4)
    model.layer, model.two = nn.LayerNorm(4), nn.GroupNorm(2, 4)
    model.bare = nn.BatchNorm2d(4, affine=False)
    model.own = parametrizations.weight_norm(nn.GroupNorm(4, 4))
    return model


UNFIT = [
    ({"rows": {"conv1": [0, 4]}}, "'conv1', which has 4 channels"),
    ({"rows": {"conv1": [-1, 0]}}, r"cannot hold \[-1, 0\] for 'conv1'"),
    ({"rows": {"conv1": (0, 1)}}, r"cannot hold \(0, 1\) for 'conv1'"),
    ({"rows": {"conv1": "01"}}, "cannot hold '01' for 'conv1'"),
    ({"rows": {"conv1": [True]}}, r"cannot hold \[True\] for 'conv1'"),
    ({"rows": {"conv1": [0.0]}}, r"cannot hold \[0.0\] for 'conv1'"),
    ({"rows": {"conv1": [[0]]}}, r"cannot hold \[\[0\]\] for 'conv1'"),
    ({"rows": {1: [0]}}, r"cannot hold \[0\] for 1"),
    ({"rows": {"fits": [0]}, "groups": None}, "'groups' of a cut plan maps names to values, got None"),
    ({"groups": {"conv2": True}}, "cannot hold True for 'conv2'"),
    ({"placed": {"conv1": 4}}, "cannot hold 4 for 'conv1'"),
    ({"masked": {"conv1": 1}}, "cannot hold 1 for 'conv1'"),
    ({"masked": {"conv9": "why"}}, "names 'conv9', which the model does not have"),
    ({"masked": {"relu1": "why"}}, "'relu1', which is a ReLU"),
    ({"rows": {"conv1": [0]}, "spread": {"conv1": [0, 1]}}, "removes rows of 'conv1' and spreads"),
    ({"groups": {"head": 1}}, "gives groups to 'head', which is a Linear"),
    ({"groups": {"head": 2}}, "gives groups to 'head', which is a Linear"),
    ({"rows": {"head": [0, 1]}, "placed": {"head": (4, [0])}}, "places 1 channels of 'head', which has 2"),
    ({"placed": {"head": (4, [0, 1])}}, "places 2 channels of 'head', which has 4"),
    ({"rows": {"head": [0]}, "placed": {"head": (5, [0])}}, "places 'head' in 5 channels, and it has 4"),
    ({"groups": {"conv1": 2}}, "filters of 'conv1' in 1 groups, and gives it 2"),
    ({"groups": {"conv2": 1}}, "filters of 'conv2' in 2 groups, and gives it 1"),
    ({"groups": {"conv2": 4}}, "filters of 'conv2' in 2 groups, and gives it 4"),
    ({"groups": {"conv2": 1 << 80}}, "do not go into 1208925819614629174706176 groups"),
    ({"rows": {"conv2": [0, 1]}}, "filters of 'conv2' in 1 groups, and gives it 2"),
    ({"rows": {"conv2": [0, 1, 2, 3]}, "groups": {"conv2": 1}}, "in 2 groups, and gives it 1"),
    ({"rows": {"conv2": [0, 1, 2]}, "groups": {"conv2": 1}}, "different numbers of filters in the groups"),
    ({"spread": {"conv2": [0, 1]}, "groups": {"conv2": 1}}, "in 2 groups, and gives it 1"),
    ({"channels": {"table": [0]}}, "'channels' is for norms .* this is a Embedding"),
    ({"spread": {"table": [0]}}, "'spread' is for norms .* this is a Embedding"),
    ({"rows": {"table": [0]}}, "'table', which is a Embedding"),
    ({"channels": {"table": [0]}, "placed": {"table": (4, [0])}}, "this is a Embedding"),
    ({"channels": {"both": [0]}}, "'channels' is for norms .* this is a Bilinear"),
    ({"channels": {"relu1": []}}, "'relu1', which has 0 channels"),
    ({"channels": {"prelu": [0]}, "placed": {"prelu": (4, [0])}}, "'placed' is for norms"),
    ({"spread": {"prelu": [0]}}, "'spread' is for norms .* this is a PReLU"),
    ({"channels": {"layer": [0, 1]}}, "'channels' is for norms .* this is a LayerNorm"),
    ({"channels": {"two": [0, 1]}}, "'channels' is for norms .* this is a GroupNorm"),
    ({"spread": {"none": [0]}}, "'none', which has 0 channels"),
    ({"spread": {"bare": [0]}}, "spreads the weights of 'bare', which has no weight"),
    ({"channels": {"own": [0]}}, "the weight or bias of 'own' is not a plain parameter"),
    ({"channels": {"": [0]}}, "'', which has 0 channels"),
    ({"channels": {"norm1": [0]}, "placed": {"norm1": (4, [0, 1])}}, "places 2 channels of 'norm1'"),
    ({"placed": {"norm1": (4, [0, 1, 2, 3])}}, "places 'norm1' in 4 channels, and it has 0"),
    ({"rows": {"conv1": list(range(10_000))}}, "'conv1', which has 4 channels: .{0,90}$"),
    ({"rows": {"x" * 10_000: [0]}}, "names 'x{70,80}…, which the model does not have"),
    ({"rows": {"conv1": [1, 0]}}, "'conv1', which has 4 channels"),
    ({"rows": {"conv1": [1, 1]}}, "'conv1', which has 4 channels"),
    ({"rows": {"conv1": []}}, "'conv1', which has 4 channels"),
    ({"columns": {"conv1": [0, 3]}}, "'conv1', which has 3 channels"),
    ({"columns": {"conv2": [2]}}, "'conv2', which has 2 channels"),  # a group reads two
    ({"columns": {"head": [4]}}, "'head', which has 4 channels"),
    ({"channels": {"norm1": [4]}}, "'norm1', which has 4 channels"),
    ({"channels": {"prelu": [0, 5]}}, "'prelu', which has 4 channels"),
    ({"channels": {"relu1": [0]}}, "'relu1', which has 0 channels"),
    ({"channels": {"none": [0]}}, "'none', which has 0 channels"),
    ({"spread": {"norm1": [4]}}, "'norm1', which has 4 channels"),
    ({"spread": {"conv1": [4]}}, "'conv1', which has 4 channels"),
    (
        {"channels": {"norm1": [0, 1]}, "spread": {"norm1": [1, 2]}},
        "spreads channels of 'norm1' that it leaves out",
    ),
    ({"rows": {"norm1": [0]}}, "'norm1', which is a BatchNorm2d"),
    ({"columns": {"norm1": [0]}}, "'norm1', which is a BatchNorm2d"),
    ({"groups": {"norm1": 1}}, "'norm1', which is a BatchNorm2d"),
    ({"picked": {"norm1": [0]}}, "'norm1', which is a BatchNorm2d"),
    ({"picked": {"relu1": [0]}}, "'relu1', which is a ReLU"),
    ({"channels": {"conv1": [0]}}, "'conv1', which is a Conv2d"),
    ({"channels": {"head": [0]}}, "'head', which is a Linear"),
    ({"rows": {"conv2": [0, 1, 2]}}, "3 filters of 'conv2' do not go into 2 groups"),
    ({"groups": {"conv2": 3}}, "4 filters of 'conv2' do not go into 3 groups"),
    ({"groups": {"conv2": 0}}, "4 filters of 'conv2' do not go into 0 groups"),
    (
        {"rows": {"conv1": [0, 1]}, "placed": {"conv1": (5, [0, 1])}},
        "places 'conv1' in 5 channels, and it has 4",
    ),
    ({"rows": {"conv1": [0, 1]}, "placed": {"conv1": (4, [0, 4])}}, "'conv1', which has 4 channels"),
    ({"rows": {"conv1": [0, 1]}, "placed": {"conv1": (4, [0])}}, "places 1 channels of 'conv1', which has 2"),
    (
        {"channels": {"norm1": [0, 1]}, "placed": {"norm1": (4, [0])}},
        "places 1 channels of 'norm1', which has 2",
    ),
    ({"placed": {"conv1": (4, [0, 1])}}, "places 2 channels of 'conv1', which has 4"),
    ({"placed": {"relu1": (1, [0])}}, "places 'relu1' in 1 channels, and it has 0"),
    ({"picked": {"conv1": [0, 1]}}, "picks 2 channels for 'conv1', which reads 3"),
    ({"columns": {"head": [0]}, "picked": {"head": [0, 1]}}, "picks 2 channels for 'head', which reads 1"),
    ({"columns": {"head": [0]}, "picked": {"head": [4]}}, "'head', which has 4 channels"),
    ({"rows": {"free": [0]}}, "the weight of 'free' is not a plain parameter"),
    ({"rows": {"con1": [0]}}, "names 'con1', which the model does not have; did you mean 'conv1'"),
]


@pytest.mark.parametrize(("parts", "message"), UNFIT)
def test_a_plan_that_does_not_fit_names_the_layer_and_changes_nothing(parts, message):
    model = many_kinds()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    plan = CutPlan(**(parts | {"rows": {"fits": [0]} | parts.get("rows", {})}))  # begins with one that fits
    for attempt in (apply_plan, layers):
        with pytest.raises(PlanUnfit, match=message):
            attempt(model, plan)
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, values) for name, (p, values) in before.items())
    assert [type(module) for module in model.modules()] == kinds
    assert model.fits.out_channels == 2
    assert not is_cut(model)
    assert cuts(model) == []


def test_layers_that_share_a_parameter_are_refused_and_nothing_is_changed():
    model = net()
    model.norm2.weight = nn.Parameter(torch.ones(4))
    model.norm1.weight = model.norm2.weight
    plan = CutPlan(rows={"conv1": [0]}, channels={"norm1": [0]})
    with pytest.raises(PlanUnfit, match="'norm1' and 'norm2' share a parameter"):
        apply_plan(model, plan)
    assert model.conv1.out_channels == len(model.conv1.weight) == 4
    assert not is_cut(model)
    apply_plan(model, CutPlan(rows={"conv1": [0]}, columns={"conv2": [0]}))  # names neither of them
    assert model.conv1.out_channels == 1


def test_a_layer_that_picks_or_places_takes_no_other_plan():
    model = net()
    apply_plan(model, CutPlan(rows={"conv1": [0, 2]}, placed={"conv1": (4, [0, 2])}))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanUnfit, match="'conv1' has been cut before"):
        apply_plan(model, CutPlan(columns={"head": [0]}, rows={"conv1": [0]}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(cuts(model)) == 1
    widen(model)
    apply_plan(model, CutPlan(rows={"conv1": [0]}, placed={"conv1": (4, [0])}))
    assert model.conv1.weight.shape == (1, 3, 3, 3)
    assert issubclass(PlanUnfit, ValueError)


def test_a_cut_model_keeps_its_own_index_lists():
    model = nn.ModuleDict({"l": nn.Linear(4, 2)})
    plan = CutPlan(columns={"l": [0, 2]}, picked={"l": [0, 2]})
    apply_plan(model, plan)
    x = torch.randn(3, 4)
    expected = model["l"](x)
    plan.picked["l"][0] = cuts(model)[0]["picked"]["l"][0] = 1
    model.double().float()  # the indices are made again
    torch.testing.assert_close(model["l"](x), expected)


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(PlanUnfit, match="the weight of '0' is not a plain parameter"):
        apply_plan(nn.Sequential(nn.LazyConv2d(4, 3)), CutPlan(rows={"0": [0]}))


def test_a_group_norm_without_weights_becomes_narrower():
    model = nn.Sequential(nn.GroupNorm(4, 4, affine=False))
    apply_plan(model, CutPlan(channels={"0": [0, 2]}))
    assert (model[0].num_channels, model[0].num_groups) == (2, 2)
    assert model(torch.randn(2, 2, 3, 3)).shape == (2, 2, 3, 3)


TRANSPOSED = [
    # (layer, what the plan says, what stays of the weight in dim 0 and 1, numbers)
    (nn.ConvTranspose1d(4, 6, 3), {"rows": [0, 5]}, (range(4), [0, 5]), (4, 2, 1)),
    (nn.ConvTranspose3d(4, 2, 1), {"columns": [0, 3]}, ([0, 3], range(2)), (2, 2, 1)),
    (nn.ConvTranspose2d(3, 3, 2), {"rows": [1], "columns": [0, 2]}, ([0, 2], [1]), (2, 1, 1)),
    # Four groups of two filters, each with one channel: the first and the last stay.
    (
        nn.ConvTranspose2d(4, 8, 1, groups=4),
        {"rows": [0, 1, 6, 7], "groups": 2},
        ([0, 3], range(2)),
        (2, 4, 2),
    ),
    # Two groups of three filters, each with two channels: the second filter of both leaves.
    (nn.ConvTranspose2d(4, 6, 1, groups=2), {"rows": [0, 2, 3, 5]}, (range(4), [0, 2]), (4, 4, 2)),
    # One group leaves, and of the other one filter.
    (nn.ConvTranspose2d(4, 6, 1, groups=2), {"rows": [3, 5], "groups": 1}, ([2, 3], [0, 2]), (2, 2, 1)),
]


@pytest.mark.parametrize(("layer", "parts", "left", "numbers"), TRANSPOSED)
def test_what_a_plan_leaves_of_a_transposed_convolution(layer, parts, left, numbers):
    model = copy.deepcopy(nn.ModuleDict({"layer": layer}))
    whole = copy.deepcopy(model)
    apply_plan(model, CutPlan(**{part: {"layer": value} for part, value in parts.items()}))
    small = model["layer"]
    assert torch.equal(small.weight, layer.weight[list(left[0])][:, list(left[1])])
    assert torch.equal(small.bias, layer.bias[parts.get("rows", range(layer.out_channels))])
    assert (small.in_channels, small.out_channels, small.groups) == numbers
    small(torch.randn(1, numbers[0], *[2] * (layer.weight.dim() - 2)))
    rows, count = parts.get("rows"), small.weight.numel()
    assert filters_left(small) == (None if rows is None else (layer.out_channels, rows))
    assert filters_left(layer) is None
    widen(model)
    assert shapes(model) == shapes(whole)
    assert (model["layer"].in_channels, model["layer"].groups) == (layer.in_channels, layer.groups)
    both = model["layer"].weight != 0
    assert torch.equal(model["layer"].weight[both], layer.weight[both])
    assert int(both.sum()) == count


@pytest.mark.parametrize(
    "parts",
    [
        {"rows": {"layer": [0, 4]}},  # another filter in one group than in the other
        {"rows": {"layer": [0, 1, 3]}},
        {"rows": {"layer": [0, 1, 2]}},  # a group without filters is still counted
        {"groups": {"layer": 1}},
        {"columns": {"layer": [0]}},
        {"spread": {"layer": [0, 3]}},
        {"rows": {"layer": [6]}},
    ],
)
def test_plans_that_no_grouped_transposed_convolution_fits(parts):
    model = nn.ModuleDict({"layer": nn.ConvTranspose2d(4, 6, 1, groups=2)})
    before = shapes(model)
    with pytest.raises(PlanUnfit, match="'layer'"):
        apply_plan(model, CutPlan(**parts))
    assert shapes(model) == before


def test_a_spread_transposed_convolution_computes_with_all_its_filters():
    layer = nn.ConvTranspose2d(3, 4, 2, 2)
    model, x = nn.ModuleDict({"layer": copy.deepcopy(layer)}), torch.randn(2, 3, 4, 4)
    apply_plan(model, CutPlan(spread={"layer": [1, 3]}))
    small = model["layer"]
    assert [list(p.shape) for p in small._parameters.values()] == [[3, 2, 2, 2], [2]]
    made = small(x)
    assert not made[:, [0, 2]].any()
    torch.testing.assert_close(made[:, [1, 3]], layer(x)[:, [1, 3]])
    assert filters_left(small) == (4, [1, 3])
    widen(model)
    torch.testing.assert_close(model["layer"](x), made)
