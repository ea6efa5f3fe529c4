import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regrow
from nets import decoder
from regrow.modules import filters_first
from regrow.noise import bridged
from regrow.noise.draws import places
from regrow.noise.layers import (
    add_bridgeout,
    bridgeout_state,
    load_bridgeout_state,
    remove_bridgeout,
)
from regrow.noise.perturbation import perturbed
from regrow.repr.cycle import RePr
from regrow.repr.narrow import narrow
from regrow.surgery.plan import CutPlan

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Centred(nn.Conv2d):
    """A convolution with a forward method of its own, which reads the weight twice."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class TwoTiedOneEqual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.other = (nn.Conv2d(3, 3, 3, bias=False) for _ in range(3))
        self.two.weight = self.one.weight
        with torch.no_grad():
            self.other.weight.copy_(self.one.weight)

    def forward(self, x):
        return self.one(x), self.two(x), self.one(x), self.other(x)


def snapshot(model):
    return (
        [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        len(model._forward_pre_hooks),
        len(model._forward_hooks),
        [id(parameter) for parameter in model.parameters()],
    )


def noise_of(weight, seed, number, p=0.3, q=1.5, target_fraction=1.0, transposed=0):
    """w̃ of the first layer."""
    (place,) = places([weight.numel()], seed)
    return perturbed(weight, *place, transposed, torch.tensor(number), p, q, target_fraction, False)


def test_the_record_says_what_was_done(make_net):
    record = add_bridgeout(make_net(), p=0.2, q=1, target_fraction=0.5, exclude="conv1", linear=True, seed=7)
    assert json.loads(json.dumps(record)) == {
        "version": 3,
        "layers": ["conv2", "conv3", "head"],
        "settings": {
            "p": 0.2,
            "q": 1.0,
            "target_fraction": 0.5,
            "linear": True,
            "exclude": ["conv1"],
            "seed": 7,
        },
    }
    assert add_bridgeout(make_net())["layers"] == ["conv1", "conv2", "conv3"]


@pytest.mark.devices
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_every_kind_of_convolution_computes_with_the_perturbed_weight(dim, groups):
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dim - 1](4, 6, 3, padding=1, groups=groups)
    x = torch.randn(2, 4, *[5] * dim)
    record = add_bridgeout(layer, p=0.4, q=1, target_fraction=0.5, seed=5)
    assert record["layers"] == [""]
    convolve = [F.conv1d, F.conv2d, F.conv3d][dim - 1]
    for number in (1, 2):
        weight = noise_of(layer.weight, 5, number, p=0.4, q=1.0, target_fraction=0.5)
        assert torch.equal(layer(x), convolve(x, weight, layer.bias, padding=1, groups=groups))
    layer.eval()
    assert torch.equal(layer(x), convolve(x, layer.weight, layer.bias, padding=1, groups=groups))


def test_linear_layers_on_request_but_not_those_inside_attention():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    net = Attentive()
    assert add_bridgeout(net, linear=True)["layers"] == ["head"]
    x = torch.randn(2, 3, 4)
    assert not torch.equal(net(x), net(x))


@pytest.mark.devices
def test_a_layer_with_its_own_forward_method_reads_one_draw():
    layer = Centred(3, 4, 3)
    add_bridgeout(layer, seed=1)
    weight = noise_of(layer.weight, 1, 1)
    expected = F.conv2d(X, weight - weight.mean((1, 2, 3), keepdim=True), layer.bias)
    assert torch.equal(layer(X), expected)
    assert isinstance(layer.weight, nn.Parameter)


def test_parameters_state_and_classes_stay_as_they_were(make_net):
    net = make_net()
    keys, parameters = list(net.state_dict()), dict(net.named_parameters())
    add_bridgeout(net, linear=True)
    net(X)
    assert list(net.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in net.named_parameters())
    assert net.conv1.weight is parameters["conv1.weight"]
    assert isinstance(net.conv1, nn.Conv2d)
    assert isinstance(net.head, nn.Linear)
    other = make_net()
    other.load_state_dict(net.state_dict())
    net.load_state_dict(make_net().state_dict())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(net.conv1.weight, other.conv1.weight)
    net.load_state_dict(other.state_dict())
    assert torch.equal(net.conv1.weight, other.conv1.weight)


@pytest.mark.devices
def test_evaluation_is_the_plain_net_bit_for_bit(make_net):
    net = make_net()
    plain = copy.deepcopy(net).eval()
    add_bridgeout(net)
    assert torch.equal(net.eval()(X), plain(X))


@pytest.mark.devices
def test_the_weight_can_be_replaced(make_net):
    net = make_net()
    add_bridgeout(net)
    net.conv1.weight = weight = nn.Parameter(torch.zeros(6, 3, 3, 3))
    assert net.conv1.weight is weight
    assert dict(net.named_parameters())["conv1.weight"] is weight
    net(X).sum().backward()
    assert weight.grad is not None


@pytest.mark.devices
def test_same_seed_same_run_and_other_seed_other_run(make_net, train):
    def run(seed):
        torch.manual_seed(0)
        net = make_net()
        add_bridgeout(net, seed=seed)
        train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), 4, X)
        return net.conv2.weight.detach()

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(3), run(-3))


def test_training_leaves_pytorchs_generator_alone(make_net):
    net = make_net()
    add_bridgeout(net)
    before = torch.get_rng_state()
    net(X).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.devices
def test_layers_that_share_a_weight_and_a_layer_that_runs_twice_see_one_draw():
    net = TwoTiedOneEqual()
    add_bridgeout(net)
    one, two, again, other = net(X)
    assert torch.equal(one, two)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, net(X)[0])
    # Each use adds its own gradient through the same draw.
    net.zero_grad()
    number = bridgeout_state(net)["passes"] + 1
    sum(out.sum() for out in net(X)[:3]).backward()
    weight = net.one.weight.detach().requires_grad_()
    (3 * F.conv2d(X, noise_of(weight, 0, number)).sum()).backward()
    torch.testing.assert_close(net.one.weight.grad, weight.grad)


@pytest.mark.devices
def test_evaluating_in_between_leaves_the_noise_as_it_is(make_net):
    net = make_net()
    add_bridgeout(net)
    other = copy.deepcopy(net)
    net(X)
    net.eval()(X)
    net.train()
    other(X)
    torch.testing.assert_close(net(X), other(X), rtol=0, atol=0)


def test_layers_in_train_mode_inside_a_model_in_eval_mode_draw_anew_every_pass(make_net):
    net = make_net().eval()
    add_bridgeout(net)
    net.conv2.train()
    first, second = net(X), net(X)
    assert not torch.equal(first, second)
    assert bridgeout_state(net)["passes"] == 2


@pytest.mark.devices
def test_gradients_accumulate_over_passes(make_net):
    net = make_net(norm=nn.Identity)
    add_bridgeout(net)
    separate = copy.deepcopy(net)
    for _ in range(2):
        net(X).square().sum().backward()
    total = torch.zeros_like(net.conv2.weight)
    for _ in range(2):
        separate.zero_grad()
        separate(X).square().sum().backward()
        total += separate.conv2.weight.grad
    torch.testing.assert_close(net.conv2.weight.grad, total)


@pytest.mark.devices
def test_deepcopy_goes_on_by_itself(make_net):
    net = make_net()
    add_bridgeout(net)
    net(X)
    twin = copy.deepcopy(net)
    assert torch.equal(net(X), twin(X))
    net(X)
    assert bridgeout_state(net)["passes"] == 3
    assert bridgeout_state(twin)["passes"] == 2
    remove_bridgeout(twin)
    assert type(twin.conv1) is nn.Conv2d
    assert not torch.equal(net(X), net(X))


@pytest.mark.devices
def test_resume_is_exact(make_net):
    net = make_net()
    add_bridgeout(net, seed=2)
    for _ in range(3):
        net(X)
    saved, state = copy.deepcopy(net.state_dict()), json.loads(json.dumps(bridgeout_state(net)))
    expected = net(X)
    fresh = make_net()
    fresh.load_state_dict(saved)
    add_bridgeout(fresh, seed=2)
    load_bridgeout_state(fresh, state)
    assert torch.equal(fresh(X), expected)


def test_a_state_that_does_not_fit_is_refused(make_net):
    net = make_net()
    add_bridgeout(net)
    net(X)
    state = bridgeout_state(net)
    for wrong, message in (
        ({}, "not a state of Bridgeout"),
        (state | {"version": 2}, "version 3"),
        (state | {"settings": state["settings"] | {"p": 0.5}}, "same settings"),
    ):
        with pytest.raises(ValueError, match=message):
            load_bridgeout_state(net, wrong | ({"passes": 9} if wrong else {}))
    assert bridgeout_state(net) == state


@pytest.mark.devices
def test_remove_leaves_the_model_as_it_was(make_net):
    net = make_net()
    before = snapshot(net)
    plain = copy.deepcopy(net)
    add_bridgeout(net, linear=True)
    net(X)
    assert remove_bridgeout(net) is None
    assert snapshot(net) == before
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net(X), plain(X))
    add_bridgeout(net)
    assert not torch.equal(net(X), net(X))


def test_wrappers_are_looked_through(make_net):
    net = make_net()
    wrapped = nn.DataParallel(net)
    add_bridgeout(wrapped)
    assert not torch.equal(wrapped(X), wrapped(X))
    assert bridgeout_state(net)["passes"] == 2
    remove_bridgeout(torch.compile(net, backend="eager"))
    assert type(net.conv1) is nn.Conv2d


def test_under_autocast_the_noise_is_computed_in_float32(make_net):
    net = make_net()
    add_bridgeout(net, seed=1)
    seen = []
    net.conv1.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    with torch.autocast("cpu", torch.bfloat16):
        net(X).float().sum().backward()
    weight = noise_of(net.conv1.weight, 1, 1)
    assert weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seen[0], F.conv2d(X, weight, net.conv1.bias, padding=1))
    assert net.conv1.weight.grad.dtype == torch.float32
    assert net.conv1.weight.grad.isfinite().all()


def test_compiled_whole_with_new_noise_in_every_pass(make_net):
    net = make_net((4,))
    add_bridgeout(net)
    eager = copy.deepcopy(net)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    outputs = []
    for _ in range(4):
        outputs.append(compiled(X))
        expected = eager(X)
        torch.testing.assert_close(outputs[-1], expected)
        outputs[-1].square().sum().backward()
        expected.square().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert all(not torch.equal(outputs[0], output) for output in outputs[1:])
    torch.testing.assert_close(net.conv1.weight.grad, eager.conv1.weight.grad)


@pytest.mark.devices
@pytest.mark.parametrize("first", ["bridgeout", "repr"])
def test_filters_that_repr_dropped_stay_exactly_0(make_net, train, first):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    if first == "bridgeout":
        add_bridgeout(net)
    # Masked, so that the norms' outputs have all channels to look at.
    cycle = regrow.RePr(
        net, optimizer, fraction=0.4, full=1, sub=1, cycles=1, compact=False, example_inputs=X[:1]
    )
    if first == "repr":
        add_bridgeout(net)
    train(net, optimizer, 2, X)
    dropped = cycle.step().filters
    channels = {}
    for name in dropped:
        module = net.get_submodule(name.replace("conv", "norm"))
        module.register_forward_hook(lambda *a, name=name: channels.__setitem__(name, a[2]))
    train(net, optimizer, 3, X)
    assert sum(map(len, dropped.values())) == 6  # 0.4 of the 8 + 8 behind the first convolution
    for name, filters in dropped.items():
        assert (net.get_submodule(name).weight[filters] == 0).all()
        assert (channels[name][:, filters] == 0).all()
    restored = cycle.step().filters
    assert restored == dropped
    assert all((net.get_submodule(n).weight[i].flatten(1).norm(dim=1) > 0).all() for n, i in restored.items())
    train(net, optimizer, 1, X)
    cycle.remove()
    remove_bridgeout(net)
    assert type(net.conv2) is nn.Conv2d


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, "0 <= p < 1"),
        ({"q": 0}, "above 0"),
        ({"target_fraction": 0.0}, "target_fraction=1.0"),
        ({"seed": 0.5}, "whole number"),
        ({"exclude": ["conv9"]}, "did you mean 'conv"),
        ({"exclude": ["head"]}, "named 'head'"),
        ({"exclude": ["conv1", "conv2", "conv3"]}, "3 are excluded"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_changed(make_net, arguments, message):
    net = make_net()
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        add_bridgeout(net, **arguments)
    assert snapshot(net) == before


def test_models_that_cannot_have_bridgeout_are_refused(make_net):
    parametrized = make_net()
    nn.utils.parametrizations.weight_norm(parametrized.conv2)
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))
    complex_net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, dtype=torch.complex64))
    for model, message in (
        (nn.Sequential(nn.Linear(2, 2)), "linear=True"),
        (parametrized, "'conv2' cannot have Bridgeout: its weight is computed from other parameters"),
        (lazy, "without a weight before its first pass.*Run one forward pass first"),
        (complex_net, "complex64"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            add_bridgeout(model)
        assert snapshot(model) == before
    assert add_bridgeout(parametrized, exclude=["conv2"])["layers"] == ["conv1", "conv3"]


def test_adding_twice_and_removing_what_was_not_added_are_refused(make_net):
    net = make_net()
    with pytest.raises(ValueError, match="no Bridgeout"):
        remove_bridgeout(net)
    add_bridgeout(net, exclude=["conv3"])
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"the model has Bridgeout.*Call remove_bridgeout\(model\) first"):
        add_bridgeout(net, exclude=["conv1", "conv2"])
    with pytest.raises(ValueError, match=r"add_bridgeout was refused.*Call remove_bridgeout\(model\) first"):
        add_bridgeout(nn.Sequential(net))
    for other in (make_net(), nn.Sequential(net), net.conv1):
        with pytest.raises(ValueError, match="no Bridgeout"):
            remove_bridgeout(other)
    assert snapshot(net) == before
    remove_bridgeout(net)
    with pytest.raises(ValueError, match="no Bridgeout"):
        bridgeout_state(net)


def test_a_parametrization_that_came_later_is_named(make_net):
    net = make_net()
    add_bridgeout(net)
    nn.utils.parametrizations.weight_norm(net.conv2)
    with pytest.raises(ValueError, match="no parameter any more"):
        net(X)
    with pytest.raises(ValueError, match="'conv2' was parametrized"):
        remove_bridgeout(net)
    nn.utils.parametrize.remove_parametrizations(net.conv2, "weight")
    remove_bridgeout(net)
    assert type(net.conv2) is nn.Conv2d


@pytest.mark.devices
def test_removed_with_images_the_norms_hold_the_statistics_of_the_weights_without_noise(make_net):
    net = make_net()
    quiet = copy.deepcopy(net)
    add_bridgeout(net, p=0.5)
    net.train()
    for _ in range(3):
        net(X)
    noisy = net.norm2.running_mean.clone()
    remove_bridgeout(net, [X])
    regrow.reestimate_norms(quiet, [X])
    assert not torch.equal(noisy, quiet.norm2.running_mean)
    assert torch.equal(net.norm2.running_mean, quiet.norm2.running_mean)
    assert torch.equal(net.norm2.running_var, quiet.norm2.running_var)
    assert type(net.conv2) is nn.Conv2d


def test_a_calibration_that_fails_leaves_bridgeout_where_it_is(make_net):
    net = make_net()
    add_bridgeout(net)
    before = snapshot(net)
    with pytest.raises(ValueError, match="calibration"):
        remove_bridgeout(net, [])
    assert snapshot(net) == before
    remove_bridgeout(net)


def test_without_batch_norms_images_are_not_needed():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    add_bridgeout(net)
    remove_bridgeout(net, [X])
    assert type(net[0]) is nn.Conv2d


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_that_are_overwritten_are_right(compiled, monkeypatch):
    """Where a layer alone reads w̃, its gradient is scaled in place: shared, repeated and added up too."""
    first = TwoTiedOneEqual()
    found = []
    for alone in (None, False):
        if alone is False:
            monkeypatch.setattr(bridged, "reads_alone", lambda _: False)
        net = copy.deepcopy(first).train()
        add_bridgeout(net, p=0.4, seed=3, compiled=compiled)
        loss = sum((out * out.detach().cos()).sum() for out in net(X))
        parameters = list(net.parameters())
        (*graphed,) = torch.autograd.grad(loss, parameters, create_graph=True)
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in parameters]
        loss.backward()  # added to what is there
        found.append([graphed, once, [p.grad / 2 for p in parameters]])
    for values in found[0]:
        for value, expected in zip(values, found[1][0], strict=True):
            torch.testing.assert_close(value, expected)
    # By the formula: where w̃ moves away from w, the slope is not 1.
    remove_bridgeout(net)
    plain = torch.autograd.grad(sum((out * out.detach().cos()).sum() for out in net(X)), parameters)
    assert not torch.allclose(plain[0], found[0][0][0], rtol=0.01)


def test_who_may_overwrite_a_gradient():
    class Own(nn.Conv2d):
        pass

    patched = nn.Conv2d(3, 3, 3)
    patched._conv_forward = patched._conv_forward
    net = nn.Sequential(nn.Conv2d(3, 3, 3), Own(3, 3, 3), Centred(3, 3, 3), patched)
    add_bridgeout(net)
    assert [bridged.reads_alone(layer) for layer in net] == [True, False, False, False]
    with narrow(net, CutPlan(rows={"0": [0, 2]}, columns={"1": [0, 2]})):
        assert not bridged.reads_alone(net[0])


@pytest.mark.devices
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_transposed_convolutions_compute_with_the_perturbed_weight(dim, groups):
    layer = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dim - 1](4, 8, 3, groups=groups)
    x = torch.randn(2, 4, *[3] * dim)
    assert add_bridgeout(layer, p=0.4, q=1, target_fraction=0.5, seed=5)["layers"] == [""]
    convolve = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d][dim - 1]
    for number in (1, 2):
        whole = layer.weight.detach().clone().requires_grad_()
        filters = filters_first(layer, whole)  # a share of the weights of each filter
        noisy = noise_of(whole, 5, number, p=0.4, q=1.0, target_fraction=0.5, transposed=groups)
        changed = (filters_first(layer, noisy) != filters).flatten(1).sum(1)
        assert 0 < changed.min() <= changed.max() <= filters[0].numel() // 2 + 1
        expected = convolve(x, noisy, layer.bias, groups=groups)
        made = layer(x)
        torch.testing.assert_close(made, expected)
        layer.zero_grad()
        made.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, whole.grad)
    layer.eval()
    assert torch.equal(layer(x), convolve(x, layer.weight, layer.bias, groups=groups))
    remove_bridgeout(layer)
    assert type(layer) is [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dim - 1]


def test_a_decoder_with_noise_in_a_sub_phase():
    net, x = decoder("generator")
    add_bridgeout(net.train(), seed=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    cycle = RePr(net, optimizer, example_inputs=x, full=1, sub=1, cycles=1, skip_first=False)
    dropped = cycle.step().filters
    net(x).square().sum().backward()
    optimizer.step()
    for name, filters in dropped.items():
        assert not net.get_submodule(name).weight[:, filters].any()
    cycle.step()
    cycle.remove()
    remove_bridgeout(net, [x])


# --- statistics are measured without noise ---------------------------------------------------------------


def normed(momentum=0.1):
    torch.manual_seed(0)
    one, two = (nn.BatchNorm2d(channels, momentum=momentum) for channels in (6, 4))
    return nn.Sequential(nn.Conv2d(3, 6, 3), one, nn.ReLU(), nn.Conv2d(6, 4, 3), two).double()


BATCHES = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
AROUND = {
    "plain": lambda net: net,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "inside": nn.Sequential,
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.devices
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn_measures_without_noise_and_training_goes_on_with_the_same_noise(around, momentum):
    plain, net, twin = normed(momentum), normed(momentum), normed(momentum)
    for each in (net, twin):
        add_bridgeout(each, p=0.5)
        each(BATCHES[0])
    wrapped = AROUND[around](net)
    torch.optim.swa_utils.update_bn(BATCHES, wrapped)
    torch.optim.swa_utils.update_bn(BATCHES, plain)
    measured = wrapped.module if around == "averaged" else net
    for place in (1, 4):
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(measured[place], key), getattr(plain[place], key))
    assert bridgeout_state(measured)["passes"] == 1
    assert torch.equal(measured(BATCHES[0]), twin(BATCHES[0]))
    assert not torch.equal(measured(BATCHES[0]), measured(BATCHES[0]))


def test_norms_that_average_while_something_is_trained_read_noise_and_a_warning_says_so_once():
    net = normed()
    add_bridgeout(net)
    for place in (1, 4):
        net[place].momentum = None
    with pytest.warns(UserWarning, match=r"run them under torch\.no_grad\(\)"):
        first = net(BATCHES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(net(BATCHES[0]), first)
        with torch.no_grad():
            assert torch.equal(net(BATCHES[0]), net(BATCHES[0]))
        net.eval()(BATCHES[0])


def test_without_gradients_the_noise_stays_where_no_norm_averages():
    net = normed()
    add_bridgeout(net)
    with torch.no_grad():
        assert not torch.equal(net(BATCHES[0]), net(BATCHES[0]))
