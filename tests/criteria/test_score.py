import contextlib
import copy
import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import regrow
from nets import UNet, chain, keep_but, unsettled
from regrow.criteria.score import (
    CRITERIA,
    DATA_CRITERIA,
    WEIGHT_CRITERIA,
    l1,
    l2,
    ortho,
    ortho_corrected,
    overlap,
    score,
)
from regrow.criteria.select import select
from regrow.surgery.removal import remove_filters

# Three filters of two weights: directions (1, 0), (√½, √½) and (0, 1), at lengths 1, √2 and 2.
# |cos|: first–second √½, first–third 0, second–third √½. Divided by the three filters of the layer:
# (√½ + 0)/3, (√½ + √½)/3, (0 + √½)/3.
THREE = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
THREE_OVERLAPS = torch.tensor([0.2357023, 0.4714045, 0.2357023])


@pytest.mark.devices
@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 1, 2), (3, 2, 1, 1), (3, 1, 1, 2), (3, 1, 2, 1, 1)])
def test_overlap_of_three_filters_by_hand(shape):
    torch.testing.assert_close(overlap(THREE.view(shape)), THREE_OVERLAPS)
    torch.testing.assert_close(regrow.overlap(THREE.view(shape)), THREE_OVERLAPS)


def test_ortho_is_the_negative_overlap():
    torch.testing.assert_close(ortho(THREE), -THREE_OVERLAPS)


@pytest.mark.devices
def test_ortho_corrected_by_hand():
    # Chance gives sqrt(2 / (π·2)) = 0.5641896 in two dimensions: 0.2357023 / 0.5641896 = 0.4177714.
    torch.testing.assert_close(ortho_corrected(THREE), torch.tensor([-0.4177714, -0.8355428, -0.4177714]))


def test_ortho_corrected_undoes_what_short_filters_suffer_by_chance():
    long, short = torch.randn(64, 512), torch.randn(64, 8)
    assert ortho(short).mean() < 5 * ortho(long).mean()
    assert ortho_corrected(short).mean() == pytest.approx(ortho_corrected(long).mean().item(), rel=0.05)


@pytest.mark.devices
def test_lengths_by_hand():
    weight = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])
    assert l1(weight).tolist() == [7, 0]
    assert l2(weight).tolist() == [5, 0]


def test_a_zero_row_has_no_overlap_and_adds_none():
    with_zero = torch.cat([THREE, torch.zeros(1, 2)])
    torch.testing.assert_close(overlap(with_zero)[:3], THREE_OVERLAPS * 3 / 4)
    assert overlap(with_zero)[3] == 0
    assert overlap(torch.zeros(3, 2, 3, 3)).tolist() == [0, 0, 0]


def test_the_sign_of_a_row_does_not_matter():
    signs = torch.tensor([[-1.0], [1.0], [-1.0]])
    torch.testing.assert_close(overlap(THREE * signs), THREE_OVERLAPS)


@pytest.mark.devices
@pytest.mark.parametrize("factors", [(1e-30, 1, 1), (1e30, 1, 1), (1e30, 1e-30, 1e-38)])
def test_tiny_and_huge_rows_count_by_direction_alone(factors):
    torch.testing.assert_close(overlap(THREE * torch.tensor(factors)[:, None]), THREE_OVERLAPS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lengths_where_float32_does_not_reach(dtype):
    small, large = (1e-4, 1e4) if dtype == torch.float16 else (1e-30, 1e30)
    if dtype == torch.float64:
        small, large = 1e-250, 1e250
    weight = torch.tensor([[3.0, -4.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    for factor in (small, 1.0, large):
        given = (factor * weight).to(dtype)
        exact = given.double() / factor
        for found, by_hand in ((l1(given), [7, 2, 0]), (l2(given), [5, math.sqrt(2), 0])):
            assert found.dtype == torch.float64
            torch.testing.assert_close(found / factor, torch.tensor(by_hand).double(), rtol=1e-2, atol=0)
        torch.testing.assert_close(l1(given) / factor, exact.abs().sum(1), rtol=1e-6, atol=0)


def test_sums_beyond_float32_are_told_apart():
    weight = torch.full((3, 100), 3e38)
    weight[1, :50] = 1e38
    assert l1(weight).argsort().tolist()[0] == l2(weight).argsort().tolist()[0] == 1
    assert l1(weight).isfinite().all()


def test_sums_beyond_float64_are_refused(make_net):
    model = make_net((4, 5)).double()
    nn.init.constant_(model.conv2.weight, 1.7e308)
    with pytest.raises(ValueError, match=r"'conv2' are so large that l1 .* beyond float64"):
        score(model, "l1")


@given(
    st.sampled_from(sorted(WEIGHT_CRITERIA)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(-90, 90),
    st.integers(0, 999),
)
def test_the_ranking_over_all_layers_does_not_depend_on_the_scale(criterion, dtype, power, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 1), nn.Conv1d(1, 3, 2)).to(dtype)
    scaled = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), scaled.parameters(), strict=True):
        mine.data = torch.randn(mine.shape, generator=generator).to(dtype)
        theirs.data = mine * 2.0**power  # exact in each of these types
    one, other = (torch.cat([*score(each, criterion).values()]) for each in (model, scaled))
    assert one.argsort(stable=True).tolist() == other.argsort(stable=True).tolist()
    assert len(one.unique()) > 6
    keep = select(score(scaled, criterion), 0.5)
    assert {name: mask.tolist() for name, mask in keep.items()} == {
        name: mask.tolist() for name, mask in select(score(model, criterion), 0.5).items()
    }


@pytest.mark.devices
def test_layers_of_very_different_scales_keep_their_order():
    model = nn.Sequential(*(nn.Conv2d(2, 3, 1) for _ in range(3)))
    for layer, factor in zip(model, (1e-30, 1.0, 1e30), strict=True):
        nn.init.uniform_(layer.weight, factor, 2 * factor)
    for criterion in ("l1", "l2"):
        lowest, middle, highest = score(model, criterion).values()
        assert lowest.max() < middle.min() < middle.max() < highest.min()


@pytest.mark.parametrize("criterion", [*WEIGHT_CRITERIA, "random"])
def test_complex_weights_are_refused_by_name(make_net, criterion):
    model = make_net((4, 5))
    model.conv2 = nn.Conv2d(4, 5, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"'conv2' has complex weights \(torch\.complex64\)"):
        score(model, criterion, seed=0)
    assert list(score(model, criterion, seed=0, exclude="conv2")) == ["conv1"]


@pytest.mark.parametrize(
    "weight",
    [torch.tensor(1.0), torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(2, 3, dtype=torch.complex64)],
)
def test_overlap_of_what_has_none_is_refused(weight):
    with pytest.raises(ValueError, match=r"real numbers, and got torch\..* of shape \["):
        overlap(weight)


def test_types():
    assert overlap(THREE.double()).dtype == torch.float64
    torch.testing.assert_close(overlap(THREE.double()), overlap(THREE).double(), rtol=1e-6, atol=0)
    assert overlap(THREE.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(overlap(THREE.bfloat16()), THREE_OVERLAPS)
    assert not overlap(nn.Parameter(THREE)).requires_grad


@st.composite
def weights(draw):
    filters, length = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    entry = st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-3 else 0.0)
    numbers = draw(st.lists(entry, min_size=filters * length, max_size=filters * length))
    return torch.tensor(numbers).view(filters, length)


@given(weights(), st.randoms(use_true_random=False), st.floats(-20, 20))
def test_overlap_is_bounded_and_follows_permutations_and_not_scale(weight, random, power):
    found = overlap(weight)
    assert ((found >= 0) & (found < 1)).all()
    order = list(range(len(weight)))
    random.shuffle(order)
    torch.testing.assert_close(overlap(weight[order]), found[order], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(overlap(weight * 2**power), found, rtol=1e-4, atol=1e-6)


@pytest.mark.devices
def test_score_names_every_usable_layer_in_order_and_only_reads(make_net):
    model = make_net((4, 5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = score(model)
    assert list(scores) == ["conv1", "conv2"]
    assert [len(values) for values in scores.values()] == [4, 5]
    torch.testing.assert_close(scores["conv2"], -overlap(model.conv2.weight))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.devices
@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"oracle"}))
def test_every_criterion_by_name(make_net, criterion):
    model = make_net((4, 5)).bfloat16()
    batches = [(torch.randn(3, 3, 8, 8).bfloat16(), torch.tensor([0, 1, 2]))]
    scores = score(model, criterion, seed=3, exclude=["conv1"], batches=batches)
    assert list(scores) == ["conv2"]
    assert scores["conv2"].shape == (5,)
    assert scores["conv2"].isfinite().all()


@pytest.mark.devices
def test_random_scores_follow_the_seed_alone(make_net):
    one, other = make_net((4, 5)), make_net((4, 5))
    first, again, third = (
        score(one, "random", seed=1),
        score(other, "random", seed=1),
        score(one, "random", seed=2),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1"], third["conv1"])


def test_random_draws_leave_the_global_generator_alone(make_net):
    model = make_net()
    state = torch.get_rng_state()
    score(model, "random", seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input(make_net):
    model = make_net()
    with pytest.raises(ValueError, match=r"unknown criterion 'orto'; did you mean 'ortho'"):
        score(model, "orto")
    with pytest.raises(ValueError, match=r"needs a seed: score\(model, 'random', seed=0\)"):
        score(model, "random")
    with pytest.raises(ValueError, match=r"no convolution is named 'conv9'; did you mean 'conv"):
        score(model, exclude=["conv9"])
    model.conv2.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="'conv2' holds NaN"):
        score(model)
    assert list(score(model, exclude="conv2")) == ["conv1", "conv3"]


@pytest.mark.devices
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_transposed_convolution_is_scored_as_the_convolution_with_its_filters(criterion, dim):
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1](3, 5, 2)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](3, 5, 2)
    with torch.no_grad():
        plain.weight.copy_(transposed.weight.transpose(0, 1))
    both = score(nn.ModuleDict({"a": transposed, "b": plain}), criterion)
    torch.testing.assert_close(both["a"], both["b"])


def test_the_length_of_a_transposed_filter_by_hand():
    layer = nn.ConvTranspose1d(2, 3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0, 5.0], [4.0, 1.0, 12.0]]).unsqueeze(2))
    assert score(nn.Sequential(layer), "l2")["0"].tolist() == pytest.approx([5, 1, 13])


def test_grouped_transposed_convolutions_have_no_score():
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=4), nn.ConvTranspose2d(4, 4, 2))
    assert set(score(model, "l1")) == {"1"}


READS_PICTURES = sorted(set(DATA_CRITERIA) - {"oracle"})


def pictures():
    return torch.randn(6, 3, 8, 8), torch.tensor([0, 3, 1, 2, 0, 1])


def same(one, other):
    assert list(one) == list(other)
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-5, atol=1e-9)


class Counting(nn.Module):
    """Counts its passes in a buffer, and draws random numbers and drops some in each."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        self.passes += 1
        torch.rand(1)
        return self.dropout(x)


@pytest.mark.devices
@pytest.mark.parametrize("criterion", READS_PICTURES)
def test_a_model_that_is_training_is_only_read(criterion):
    model = nn.Sequential(Counting(), *chain())
    model[5].eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    batches = [pictures()]
    generator = torch.get_rng_state()
    scores = score(model, criterion, batches=batches)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(each.grad, grads[name]) for name, each in model.named_parameters())
    assert all(each.requires_grad and not vars(each) for each in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    same(scores, score(copy.deepcopy(model).eval(), criterion, batches=batches))


@pytest.mark.parametrize("criterion", READS_PICTURES)
def test_an_error_leaves_the_model_as_it_was(criterion):
    model = chain().train()
    with pytest.raises(ValueError, match="forward pass fails on a batch"):
        score(model, criterion, batches=[pictures(), (torch.randn(2, 5, 8, 8), torch.zeros(2).long())])
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("criterion", READS_PICTURES)
@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_contexts_play_no_part(criterion, context):
    model, batches = unsettled(chain()), [pictures()]
    plain = score(model, criterion, batches=batches)
    with context():
        same(score(model, criterion, batches=batches), plain)
        made_there = [(batches[0][0] + 0, batches[0][1])]
        same(score(model, criterion, batches=made_there), plain)


@pytest.mark.parametrize("criterion", READS_PICTURES)
@pytest.mark.parametrize("wrap", ["DDP", "DataParallel", "compile", "compiled in place"])
def test_wrappers_are_looked_through(criterion, wrap, tmp_path):
    model, batches = unsettled(chain()), [pictures()]
    plain = score(model, criterion, batches=batches)
    with contextlib.ExitStack() as stack:
        if wrap == "DDP":
            where = f"file://{tmp_path}/group"
            torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
            stack.callback(torch.distributed.destroy_process_group)
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif wrap == "DataParallel":
            wrapped = nn.DataParallel(model)
        elif wrap == "compile":
            wrapped = torch.compile(model, backend="eager")
            wrapped(batches[0][0])
        else:
            wrapped = model
            model.compile(backend="eager")
        same(score(wrapped, criterion, batches=batches), plain)


@pytest.mark.parametrize("criterion", READS_PICTURES)
def test_a_model_in_the_sub_phase_of_a_cycle(criterion):
    model, batches = unsettled(chain()), [pictures()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = regrow.RePr(
        model, optimizer, example_inputs=batches[0][0][:1], full=1, sub=2, fraction=0.5, compact=True
    )
    dropped = cycle.step().filters
    assert dropped
    scores = score(model, criterion, batches=batches)
    cycle.remove()
    same(scores, score(model, criterion, batches=batches))
    for name, filters in dropped.items():
        assert not scores[name][filters].any()


@pytest.mark.parametrize("criterion", READS_PICTURES)
def test_a_model_that_was_cut_has_a_score_for_each_filter_that_it_has(criterion):
    """A cut into a stream leaves layers that put their channels among zeros."""
    model, (x, labels) = unsettled(UNet()), pictures()

    def loss(outputs, labels):
        return torch.nn.functional.cross_entropy(outputs.mean((2, 3)), labels % 2)

    keep = {"down1": keep_but(6, 0, 4), "up1": keep_but(6, 1), "norm": keep_but(1)}
    keep.pop("norm")
    whole = copy.deepcopy(model)
    remove_filters(whole, keep, example_inputs=x[:1])
    expected = score(whole, criterion, batches=[(x, labels)], loss=loss)
    regrow.cut(model, keep, example_inputs=x[:1])
    scores = score(model, criterion, batches=[(x, labels)], loss=loss)
    for name, values in scores.items():
        filters = model.get_submodule(name).out_channels
        assert values.shape == (filters,)
        mask = keep.get(name, torch.ones(len(expected[name]), dtype=torch.bool))
        left = expected[name][mask] if filters < len(mask) else expected[name]
        if (
            criterion == "utility" and left.any()
        ):  # in shares of the mean over the layer, whose filters are fewer now
            left = left / left.mean()
        if criterion != "gradient":  # the mean over a filter's weights, of which the cut leaves fewer
            torch.testing.assert_close(values, left, rtol=1e-4, atol=1e-7)


def test_the_oracle_is_asked_with_what_score_was_given(monkeypatch, make_net):
    asked = []

    def oracle_scores(*args, **kwargs):
        asked.append((args, kwargs))
        return {"conv1": torch.zeros(4)}

    monkeypatch.setitem(
        sys.modules, "regrow.criteria.oracle", types.SimpleNamespace(oracle_scores=oracle_scores)
    )
    model, batches = make_net(), [pictures()]
    assert list(score(model, "oracle", batches=batches, exclude="conv2")) == ["conv1"]
    assert asked == [((model, batches, None), {"exclude": "conv2"})]


@pytest.mark.devices
def test_a_function_as_the_criterion(make_net):
    model = make_net((4, 5))

    def biases(given):
        assert given is model
        return {name: given.get_submodule(name).bias for name in ("conv2", "conv1")}

    scores = score(nn.DataParallel(model), biases)
    assert list(scores) == ["conv1", "conv2"]
    assert torch.equal(scores["conv2"], model.conv2.bias)
    assert not scores["conv2"].requires_grad
    assert list(score(model, biases, exclude="conv1")) == ["conv2"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "maps names of convolutions to one score per filter, and got None"),
        ({"conv1": torch.zeros(4)}, "returns no scores for 'conv2': add them, or exclude that layer"),
        ({"conv1": torch.zeros(4), "conv2": torch.zeros(4)}, r"each of its 5 filters, and returned .* \[4\]"),
        ({"conv1": torch.zeros(4, 1), "conv2": torch.zeros(5)}, r"each of its 4 filters, .* \[4, 1\]"),
        (
            {"conv1": torch.zeros(4), "conv2": torch.full((5,), math.nan)},
            "returns NaN for filters of 'conv2'",
        ),
        ({"conv1": torch.zeros(4), "conv_2": torch.zeros(5)}, "scores for 'conv_2'; did you mean 'conv2'"),
        ({"conv1": "high", "conv2": torch.zeros(5)}, "for 'conv1' must be a tensor, and got the text 'high'"),
        ({"conv1": 1j * torch.ones(4), "conv2": torch.zeros(5)}, "returns for 'conv1' one real number"),
    ],
)
def test_a_function_that_returns_something_else(make_net, returned, message):
    with pytest.raises(ValueError, match=message):
        score(make_net((4, 5)), lambda _: returned)


def test_bad_input_of_criteria_that_read_pictures(make_net):
    model = make_net()
    with pytest.raises(ValueError, match=r"'apoz' reads pictures: pass batches=, inputs of"):
        score(model, "apoz")
    with pytest.raises(
        ValueError, match=r"'hessian' reads pictures: pass batches=, pairs of inputs and labels"
    ):
        score(model, "hessian")
    with pytest.raises(ValueError, match="unknown criterion 'tailor'; did you mean 'taylor'"):
        score(model, "tailor", batches=[pictures()])
    with pytest.raises(ValueError, match=r"criterion is a name.*, and got None"):
        score(model, None)
    with pytest.raises(ValueError, match=r"criterion is a name.*, and got a CrossEntropyLoss"):
        score(model, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"loss is a function of outputs and labels .* got the text 'mse'"):
        score(model, "taylor", batches=[pictures()], loss="mse")
    with pytest.raises(ValueError, match=r"loss is a function .* got the class CrossEntropyLoss"):
        score(model, "taylor", batches=[pictures()], loss=nn.CrossEntropyLoss)
    model.lazy = nn.LazyBatchNorm2d()
    with pytest.raises(ValueError, match=r"without a weight before its first pass \(see 'lazy'\)"):
        score(model, "taylor", batches=[pictures()])
