import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nets import Drawn, Standardised, chain, conv, head, unsettled
from regrow.indexing import index_tensor
from regrow.looking.calls import PassFailed
from regrow.looking.dropout import NoDropout
from regrow.surgery import evidence
from regrow.surgery.evidence import Look, Refuted, Seen, close, compare, largest, scale_of, see
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NAMES = ["conv1", "norm1", "conv2", "norm2", "head"]


@pytest.fixture(params=["at once", "at the end of a pass"], autouse=True)
def asking(request, monkeypatch):
    """On a GPU numbers are asked for at the end of a pass, which must say the same."""
    monkeypatch.setattr(evidence, "answers_at_once", lambda _device: request.param == "at once")


def net():
    torch.manual_seed(0)
    return unsettled(chain((3, 4)))


def test_what_a_pass_shows():
    model, read = net(), {}
    for name in ("conv1", "conv2", "head"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: read.update({name: inputs[0].detach().clone()})
        )
    seen = see(model, X)
    assert seen.ran == NAMES
    assert [name for name, _, _ in seen.given] == ["conv1", "conv2", "head"]  # norms' inputs are not kept
    for name, tensor, scale in seen.given:
        assert torch.equal(tensor, read[name])
        assert scale == read[name].abs().max().item()
    assert seen.made == set(NAMES)
    assert len(seen.outputs) == 1
    assert torch.equal(seen.outputs[0], model(X).detach())
    assert seen.noise == []
    assert not seen.drew


def test_a_pass_keeps_copies_of_what_is_written_to_later():
    def draw(s, x):
        y = s.a(x)
        z = s.b(y)
        y.zero_()
        return s.head(z)

    seen = see(Drawn(draw, a=conv(3, 4), b=conv(4, 4), head=head(4)), X)
    assert seen.given[1][1].any()


def test_a_pass_in_train_mode_shows_what_training_does():
    model = nn.Sequential(conv(3, 4), nn.Dropout(), conv(4, 2), head(2)).eval()
    assert not see(model, X).drew
    assert see(model, X, training=True).drew
    assert not see(model, X, training=True, dropout=NoDropout()).drew
    norms = net()
    assert not torch.equal(see(norms, X).outputs[0], see(norms, X, training=True).outputs[0])


def test_what_stands_behind_each_layer_may_replace_its_output():
    model, order = net(), []

    def then(seen, name, module, given, output):
        assert module is model.get_submodule(name)
        assert isinstance(given, tuple)
        order.append((name, list(seen.ran)))
        return torch.zeros_like(output) if name == "conv1" else None

    seen = see(model, X, then=then)
    assert [name for name, _ in order] == NAMES
    assert order[2] == ("conv2", ["conv1", "norm1", "conv2"])
    with torch.no_grad():
        behind = F.relu(model.norm1(torch.zeros(2, 3, 6, 6)))
    torch.testing.assert_close(seen.given[1][1], behind)


def test_layers_that_ran_and_made_nothing():
    # A detector without a box calls its head with nothing.
    model = Drawn(lambda s, x: (s.a(x), s.box(x.mean((2, 3))[:0])), a=conv(3, 4), box=nn.Linear(3, 2))
    seen = see(model, X)
    assert seen.ran == ["a", "box"]
    assert seen.made == {"a"}
    assert seen.given[1][2] == 0
    assert [tensor.shape for tensor in seen.outputs] == [(2, 4, 6, 6), (0, 2)]


def test_a_layer_that_runs_twice_is_in_the_order_twice():
    model = Drawn(lambda s, x: s.n(s.a(s.n(s.a(x)))), a=conv(3, 3), n=nn.BatchNorm2d(3)).eval()
    assert see(model, X).ran == ["a", "n", "a", "n"]
    by_keyword = Drawn(lambda s, x: s.b(input=s.a(x)), a=conv(3, 3), b=conv(3, 3))
    seen = see(by_keyword, X)
    assert seen.ran == ["a", "b"]
    assert [name for name, _, _ in seen.given] == ["a", "b"]


def test_reaching_a_layer_by_hand():
    seen = Seen()
    for name, output in (
        ("a", torch.ones(1)),
        ("a", torch.ones(1)),
        ("b", torch.ones(0)),
        ("a", torch.ones(1)),
    ):
        seen.reach(name, output)
    assert seen.ran == ["a", "b", "a"]
    assert seen.made == {"a"}


def test_a_model_that_fails():
    with pytest.raises(PassFailed):
        see(net(), X[:, :2])


def test_a_copy_shows_the_same():
    model = net()
    for training in (False, True):
        expected, ran = see(copy.deepcopy(model), X, training), []
        assert compare(copy.deepcopy(model), X, expected, 1e-6, training, ran=ran) is None
        assert ran == NAMES


def refuted(other, expected, message, **settings):
    """The layers that had run when the difference showed."""
    ran = []
    with pytest.raises(Refuted, match=message):
        compare(other, X, expected, 1e-6, ran=ran, **settings)
    assert not any("forward" in vars(module) for module in other.modules())
    return ran


def changed(name, by=0.1):
    model = net()
    with torch.no_grad():
        next(model.get_submodule(name).parameters()).add_(by)
    return model


@pytest.mark.parametrize(
    ("name", "message", "last"),
    [
        ("conv1", "'conv2' reads something else", "conv2"),
        ("norm1", "'conv2' reads something else", "conv2"),
        ("conv2", "'head' reads something else", "head"),
        ("norm2", "'head' reads something else", "head"),
        ("head", "the outputs differ", "head"),
    ],
)
def test_a_difference_shows_at_the_next_layer_that_reads_it(name, message, last):
    ran = refuted(changed(name), see(net(), X), message)
    assert ran == NAMES[: NAMES.index(last) + 1]


def test_a_difference_within_the_tolerance_is_none():
    expected = see(net(), X)
    compare(changed("conv1", 1e-7), X, expected, 1e-3)
    with pytest.raises(Refuted):
        compare(changed("conv1", 1e-2), X, expected, 1e-3)


def test_rounding_does_not_add_up():
    # Each layer is off by half of the tolerance; each reads exactly what was expected nonetheless.
    layers = [nn.Conv2d(3, 3, 1, bias=False) for _ in range(8)]
    for layer in layers:
        nn.init.dirac_(layer.weight)
    model, other = nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 5e-4)
    made = model(X).detach()
    assert not close(made, other(X).detach(), 1e-3, largest(made))
    compare(other, X, see(model, X), 1e-3)


def test_another_order_of_layers():
    def pair(first):
        torch.manual_seed(0)
        return Drawn(
            lambda s, x: s.head(s.b(x) + s.a(x) if first == "b" else s.a(x) + s.b(x)),
            a=conv(3, 2), b=conv(3, 2), head=head(2),
        )  # fmt: skip

    assert refuted(pair("b"), see(pair("a"), X), "'b' runs where another layer should") == ["b"]


def test_one_layer_more_or_one_less():
    def times(count):
        torch.manual_seed(0)

        def draw(s, x):
            for _ in range(count):
                x = s.a(x)
            return x

        return Drawn(draw, a=conv(3, 3))

    expected = see(times(2), X)
    compare(times(2), X, expected, 1e-6)
    assert refuted(times(3), expected, "'a' runs where another layer should") == ["a", "a", "a"]
    assert refuted(times(1), expected, "the outputs differ") == ["a"]


def test_other_outputs():
    def giving(*which):
        torch.manual_seed(0)
        return Drawn(lambda s, x: [(s.a(x), s.a(x).argmax(), -s.a(x))[i] for i in which], a=conv(3, 3))

    expected = see(giving(0, 1, 2), X)
    compare(giving(0, 1, 2), X, expected, 1e-6)
    compare(giving(1, 0, 2), X, expected, 1e-6)  # floating numbers alone are compared
    refuted(giving(2, 1, 0), expected, "the outputs differ")
    refuted(giving(0, 1), see(giving(0, 2), X), "the outputs differ")


def test_numbers_that_are_not_finite():
    model = Drawn(lambda s, x: s.b(s.a(x) / 0), a=conv(3, 3), b=conv(3, 3))
    expected = see(model, X)
    assert refuted(model, expected, "'b' reads numbers that are not finite") == ["a", "b"]


def test_a_difference_on_the_outputs_that_are_not_finite():
    def dividing(by):
        torch.manual_seed(0)
        return Drawn(lambda s, x: s.a(x) / by, a=conv(3, 3))

    compare(
        dividing(torch.tensor([0.0, 1, 1, 1, 1, 1])),
        X,
        see(dividing(torch.tensor([0.0, 1, 1, 1, 1, 1])), X),
        1e-6,
    )
    refuted(
        dividing(torch.tensor([1.0, 0, 1, 1, 1, 1])),
        see(dividing(torch.tensor([0.0, 1, 1, 1, 1, 1])), X),
        "differ",
    )


def masked_and_cut(plan):
    """What the net shows without filter 1 of conv1, and a copy that was cut by ``plan``."""
    model = net()
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.conv1.bias, model.norm1.weight, model.norm1.bias):
            tensor[1] = 0
    other = copy.deepcopy(model)
    apply_plan(other, plan)
    return see(model, X), other


OUT = CutPlan(rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, columns={"conv2": [0, 2]})
PRESENT = {"conv2": torch.tensor([True, False, True])}


def test_a_narrow_tensor_is_held_against_what_the_plan_leaves_of_the_wide_one():
    expected, other = masked_and_cut(OUT)
    compare(other, X, expected, 1e-6, plan=OUT, present=PRESENT)
    # Without being told what is present a narrow tensor is another one.
    assert refuted(other, expected, "'conv2' reads something else", plan=OUT) == ["conv1", "norm1", "conv2"]
    wrong = {"conv2": torch.tensor([True, True, False])}
    refuted(other, expected, "'conv2' reads something else", plan=OUT, present=wrong)
    everything = {"conv2": torch.ones(3, dtype=torch.bool)}
    refuted(other, expected, "'conv2' reads something else", plan=OUT, present=everything)


def test_a_tensor_that_is_placed_is_held_against_the_wide_one():
    plan = CutPlan(
        rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, placed={"norm1": (3, [0, 2])},
        columns={"conv2": [0, 2]}, picked={"conv2": [0, 2]},
    )  # fmt: skip
    expected, other = masked_and_cut(plan)
    compare(other, X, expected, 1e-6, plan=plan)
    refuted(other, expected, "'conv2' reads something else", plan=plan, present=PRESENT)


def test_a_layer_that_leaves_out_a_channel_that_carries_something():
    plan = CutPlan(columns={"conv2": [0, 2]}, picked={"conv2": [0, 2]})
    model = net()
    other = copy.deepcopy(model)
    apply_plan(other, plan)
    # What conv2 reads is right; what it makes is not.
    assert refuted(other, see(model, X), "'head' reads something else", plan=plan) == NAMES


def noisy(model, silent=None):
    """What a pass shows in which noise stands for the outputs of convolutions and linear layers."""

    def then(seen, name, _module, _given, output):
        if name.startswith("norm"):
            return None
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(len(seen.noise)))
        if name == silent:
            noise[:, 1] = 0
        seen.noise.append((name, noise))
        return noise.clone()

    return see(model, X, then=then)


def test_noise_in_place_of_outputs_is_replayed_and_cut():
    model = net()
    with torch.no_grad():
        model.norm1.bias[1] = model.norm1.running_mean[1] = 0
    expected = noisy(model, "conv1")
    assert [name for name, _ in expected.noise] == ["conv1", "conv2", "head"]
    whole = copy.deepcopy(model)
    with torch.no_grad():  # weights of the layers that noise stands for play no part
        whole.conv1.weight.zero_()
        whole.head.weight.zero_()
    compare(whole, X, expected, 1e-6)
    cut = copy.deepcopy(model)
    apply_plan(cut, OUT)
    compare(cut, X, expected, 1e-6, plan=OUT, present=PRESENT)
    placed = CutPlan(rows={"conv1": [0, 2]}, placed={"conv1": (3, [0, 2])})
    cut = copy.deepcopy(model)
    apply_plan(cut, placed)
    compare(cut, X, expected, 1e-6, plan=placed)
    compare(copy.deepcopy(model), X, expected, 1e-6)
    assert torch.equal(expected.outputs[0], expected.noise[-1][1])


def test_noise_shows_what_the_code_between_the_layers_does():
    expected = noisy(net())
    assert refuted(changed("norm1"), expected, "'conv2' reads something else")[-1] == "conv2"
    # Where noise stands for outputs, no later layer shows that conv2 lacks a channel: it is told at once.
    plan = CutPlan(columns={"conv2": [0, 2]}, picked={"conv2": [0, 2]})
    other = net()
    apply_plan(other, plan)
    message = "'conv2' leaves out channels that carry something"
    assert refuted(other, expected, message, plan=plan) == ["conv1", "norm1", "conv2"]


def test_noise_is_handed_out_call_by_call():
    def sum_of(*names):
        return Drawn(lambda s, x: sum(getattr(s, name)(x) for name in names), a=conv(3, 3), b=conv(3, 3))

    def noise(seen, name, _module, _given, _output):
        seen.noise.append((name, torch.full((2, 3, 6, 6), len(seen.noise) + 1.0)))
        return seen.noise[-1][1].clone()

    expected = see(sum_of("a", "b"), X, then=noise)
    assert torch.equal(expected.outputs[0], torch.full((2, 3, 6, 6), 3.0))
    compare(sum_of("a", "b"), X, expected, 1e-6)
    expected.noise.reverse()
    refuted(sum_of("a", "b"), expected, "'a' runs where 'b' should")
    expected.noise.clear()
    refuted(sum_of("a", "b"), expected, "the outputs differ")


def looked(model, removed=(), stock=("0", "2")):
    look = Look(
        dict(model.named_modules()), stock, {name: index_tensor(at) for name, at in dict(removed).items()}
    )
    see(model, X, then=lambda _seen, *call: look.note(*call))
    return look


def small(norm=None, layer=None):
    norm = nn.BatchNorm2d(4) if norm is None else norm
    return unsettled(nn.Sequential(conv(3, 4), norm, conv(4, 2) if layer is None else layer, head(2)))


def test_a_look_notes_the_way_and_who_has_a_norm_of_its_own():
    look = looked(small())
    assert look.way == [("0", 4), ("1", 4), ("2", 2), ("3.2", 4)]
    assert look.own() == {"0": "1"}


@pytest.mark.parametrize("norm", [nn.LayerNorm([4, 6, 6]), nn.GroupNorm(2, 4)])
def test_a_norm_over_several_channels_is_no_ones_own(norm):
    assert looked(small(norm)).own() == {}
    assert looked(small(nn.GroupNorm(4, 4))).own() == {"0": "1"}


def test_two_norms_or_a_linear_layer_in_front_are_not_own():
    two = Drawn(
        lambda s, x: s.n(y := s.a(x)) + s.m(y), a=conv(3, 4), n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4)
    )
    assert looked(two.eval()).own() == {}
    linear = Drawn(lambda s, x: s.n(s.a(x.mean((2, 3)))), a=nn.Linear(3, 4), n=nn.BatchNorm1d(4))
    assert looked(linear.eval()).own() == {}


def test_a_look_keeps_inputs_of_layers_that_are_not_pytorchs_own():
    model = small(layer=Standardised(4, 2, 3))
    look = looked(model, stock={"0", "3.2"})
    assert set(look.samples) == {"2"}
    with torch.no_grad():
        assert torch.equal(look.samples["2"], model[1](model[0](X)))
    assert looked(model, stock={"0", "2", "3.2"}).samples == {}


def test_a_look_tells_whether_removed_filters_are_silent_at_their_norms():
    model = small()
    assert not looked(model, {"1": [1]}).silent
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].bias, model[1].running_mean):
            tensor[1] = 0
    assert looked(model, {"1": [1]}).silent
    assert not looked(model, {"1": [1, 2]}).silent
    assert looked(model).silent
    with torch.no_grad():
        model[1].bias[1] = 1  # the norm makes something of 0
    assert not looked(model, {"1": [1]}).silent


def test_close_by_hand():
    a = torch.tensor([1.0, 100.0])
    assert close(a, a.clone(), 0, 0)
    assert close(a, torch.tensor([1.9, 100.0]), 0.01, 100)  # 1 % of the scale is 1
    assert not close(a, torch.tensor([2.1, 100.0]), 0.01, 100)
    assert close(a, torch.tensor([1.0, 100.9]), 0.01, 0)  # 1 % of itself
    assert not close(a, torch.tensor([1.1, 100.0]), 0.01, 0)
    assert not close(a, a.view(1, 2), 1, 1)
    assert not close(a, a[:1], 1, 1)
    assert close(torch.zeros(0, 3), torch.zeros(0, 3), 0, 0)
    assert not close(torch.zeros(0, 3), torch.zeros(0, 2), 1, 1)


def test_what_is_no_number_is_close_to_its_like_alone():
    nan, inf = torch.tensor([torch.nan, 1.0]), torch.tensor([torch.inf, 1.0])
    assert close(nan, nan.clone(), 0.1, 1)
    assert close(inf, inf.clone(), 0.1, 1)
    for one, other in ((nan, inf), (nan, torch.ones(2)), (inf, torch.ones(2)), (inf, -inf)):
        assert not close(one, other, 0.1, 1)
        assert not close(other, one, 0.1, 1)


numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


@given(values=numbers, data=st.data())
def test_close_is_what_it_says(values, data):
    a = torch.tensor(values)
    b = a + torch.tensor(data.draw(st.lists(st.floats(-2, 2), min_size=len(values), max_size=len(values))))
    tolerance, scale = data.draw(st.sampled_from([1e-3, 1e-2])), float(a.abs().max())
    apart = (a - b).abs()
    if (apart <= 0.99 * tolerance * scale).all():
        assert close(a, b, tolerance, scale)
    if (apart > 1.01 * tolerance * (scale + b.abs())).any():
        assert not close(a, b, tolerance, scale)


def test_the_largest_number():
    assert largest(torch.tensor([1.0, -3.0, 2.0])) == scale_of(torch.tensor([1.0, -3.0, 2.0])) == 3
    assert largest(torch.zeros(0)) == scale_of(torch.zeros(0)) == 0
    strange = torch.tensor([1.0, torch.nan, -2.0, -torch.inf])
    assert scale_of(strange) == 2
    assert largest(strange) != largest(strange)
    assert largest(torch.tensor([-torch.inf, 1.0])) == torch.inf
    assert scale_of(torch.tensor([torch.nan, torch.inf])) == 0
