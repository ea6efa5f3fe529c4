"""w̃ of many layers made at once: it is what each layer would make by itself, whatever a pass does."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from counting import Counted
from nets import chain
from regrow.noise import bridged, groups, passes, vectors
from regrow.noise.draws import places
from regrow.noise.groups import Part, together
from regrow.noise.layers import add_bridgeout, bridgeout_state
from regrow.noise.perturbation import perturbed
from regrow.noise.vectors import Strength

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture
def each_by_itself(monkeypatch):
    """A function that has every layer compute its own w̃ from then on."""
    return lambda: monkeypatch.setattr(bridged, "_kind", lambda _: None)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """All neighbours are joined, as on a GPU, whose kernels are recorded and computed by PyTorch."""
    launched = []

    class Quick:
        @staticmethod
        def noisy(source, target, position, number, seed, _, scale, q, chosen):
            launched.append(("noisy", len(source)))
            with monkeypatch.context() as patch:
                patch.setattr(vectors, "quick_kernels", lambda _: None)
                strength = Strength(1 - 1 / scale, q, 1.0, False)
                vectors.perturb(source, target, position, number, seed, strength, chosen)

        @staticmethod
        def scaled(gradient, weight, noisy, q, target):
            launched.append(("scaled", len(gradient)))
            with monkeypatch.context() as patch:
                patch.setattr(vectors, "quick_kernels", lambda _: None)
                vectors.scale(gradient, weight, noisy, q, False, target)

    def begin(silent=False):
        monkeypatch.setattr(groups, "most", lambda _: 2**30)
        monkeypatch.setattr(groups, "_may_overwrite", lambda *_: False)
        quick = type("Silent", (), dict.fromkeys(("noisy", "scaled"), staticmethod(lambda *_: None)))
        monkeypatch.setattr(vectors, "quick_kernels", lambda _: quick if silent else Quick)
        return launched

    return begin


def weights_like_a_net(dtype=torch.float32):
    torch.manual_seed(3)
    return [
        torch.randn(shape).to(dtype).requires_grad_()
        for shape in [(8, 3, 3, 3), (16, 8, 3, 3), (16, 8, 1, 1), (300, 100, 3, 3), (5, 16, 1, 1), (4, 5)]
    ]


def made_with(weights, fraction=1.0, q=1.5, alone=False, transposed=None, number=4):
    found = places([weight.numel() for weight in weights], 7)
    transposed = transposed or [0] * len(weights)
    parts = [Part(place, each, alone) for place, each in zip(found, transposed, strict=True)]
    return together(weights, parts, torch.tensor(number), Strength(0.3, q, fraction, False))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fraction", "q"), [(1.0, 1.5), (0.5, 1.0)])
def test_a_group_is_its_weights_one_by_one(dtype, fraction, q, gpu, as_on_a_gpu):
    weights = weights_like_a_net(dtype)
    weights[1] = weights[1].detach().to(memory_format=torch.channels_last).requires_grad_()
    upstream = [torch.randn(weight.shape).to(dtype) for weight in weights]
    found = places([weight.numel() for weight in weights], 7)
    singles = [
        perturbed(weight, *place, 0, torch.tensor(4), 0.3, q, fraction, False)
        for weight, place in zip(weights, found, strict=True)
    ]
    expected = torch.autograd.grad(singles, weights, upstream)
    if gpu:
        as_on_a_gpu()
    noisy = made_with(weights, fraction, q)
    eps = torch.finfo(dtype).eps
    for one, other, weight in zip(noisy, singles, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * eps, atol=4 * eps)
        assert torch.equal(one > weight, other > weight)  # the same weights are dropped
        assert one.stride() == weight.stride()
        assert not torch.equal(one, weight)
    slopes = torch.autograd.grad(noisy, weights, upstream)
    for one, other, weight in zip(slopes, expected, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=64 * eps, atol=64 * eps)
        assert one.stride() == weight.stride()


def test_what_a_gpu_would_launch(as_on_a_gpu):
    as_on_a_gpu(silent=True)
    weights = weights_like_a_net()
    with Counted() as forward:
        noisy = made_with(weights)
    with Counted() as backward:
        torch.autograd.grad(noisy, weights, [weight.detach() for weight in weights])
    # Each operator stands for what it does, which is counted below.
    assert forward.names == ["regrow.noisy.default"]
    assert backward.names == ["regrow.noisy_gradients.default"]
    settings = [place.offset for place in places([weight.numel() for weight in weights], 7)]
    plain = [weight.detach() for weight in weights]
    with Counted() as inside:
        outs = groups.noisy(plain, torch.tensor(4), settings, [0] * 6, 1, 0.3, 1.5, 1.0, False)
    assert inside.names == ["cat.default"]
    with Counted() as inside:
        groups.noisy_gradients(plain, plain, outs, settings, [False] * 6, 1.5, False)
    assert inside.names == ["cat.default", "cat.default"]


def test_one_kernel_each_way_for_all_neighbours_of_a_net(as_on_a_gpu):
    launched = as_on_a_gpu()
    net = chain((8, 12, 16)).train()
    add_bridgeout(net, linear=True)
    net(X).square().sum().backward()
    count = sum(-(-layer.weight.numel() // 64) * 64 for layer in net if hasattr(layer, "_bridgeout"))
    assert launched == [("noisy", count), ("scaled", count)]


def test_a_number_on_the_device_is_not_read(as_on_a_gpu, monkeypatch):
    as_on_a_gpu(silent=True)
    net = chain((8, 12)).train()
    add_bridgeout(net)

    def read(*_):
        raise AssertionError("something reads a number, and on a GPU the CPU would wait")

    for name in ("__int__", "__bool__", "__float__", "__index__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    for _ in range(2):
        net(X).square().sum().backward()


def twins(make, **settings):
    one = make().train()
    two = copy.deepcopy(one)
    for net in (one, two):
        add_bridgeout(net, linear=True, seed=3, **settings)
    return one, two


def grads(net):
    return [parameter.grad for parameter in net.parameters()]


def same(one, two):
    for first, second in zip(grads(one), grads(two), strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)


@pytest.mark.parametrize("settings", [{}, {"q": 1.0}, {"target_fraction": 0.4}, {"p": 0.0}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_net_trains_as_with_each_layer_by_itself(settings, layout, each_by_itself):
    one, two = twins(lambda: chain((8, 12)).to(memory_format=layout), **settings)
    for net in (one, two):
        if net is two:
            each_by_itself()
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(X.to(memory_format=layout)), torch.tensor([0, 1, 2])).backward()
            optimizer.step()
    same(one, two)
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_gradients_become_grad_without_a_copy():
    net = chain((8, 12)).train()
    add_bridgeout(net)
    loss = net(X).sum()
    with Counted() as counted:
        loss.backward()
    assert "clone.default" not in counted.names
    assert "copy_.default" not in counted.names
    net(X).sum().backward()  # and adding to one is no change of the others
    single = chain((8, 12)).train()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert [p.grad.stride() for p in net.parameters()] == [p.stride() for p in single.parameters()]


class Branches(nn.Module):
    """Two branches that share nothing; a part of a pass may train one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.unused = (nn.Conv2d(3, 4, 3) for _ in range(3))

    def forward(self, x):
        return self.one(x), self.two(x)


def test_branches_have_backward_passes_of_their_own():
    one, two = twins(Branches)
    sum(out.square().sum() for out in one(X)).backward()
    first, second = two(X)
    first.square().sum().backward()
    assert two.one.weight.grad is not None
    assert two.two.weight.grad is None
    with torch.no_grad():
        two.one.weight.mul_(2)  # trained, before the other has had its gradient
    second.square().sum().backward()
    same(one, two)
    with pytest.raises(RuntimeError, match="second time"):
        second.square().sum().backward()


def test_branches_that_are_kept_can_be_passed_again():
    one, two = twins(Branches)
    (sum(out.square().sum() for out in one(X)) * 2).backward()
    first, second = two(X)
    first.square().sum().backward(retain_graph=True)
    (first.square().sum() + 2 * second.square().sum()).backward()
    same(one, two)


def test_a_weight_that_was_changed_before_its_gradient_came_is_an_error():
    net, _ = twins(Branches)
    first, second = net(X)
    with torch.no_grad():
        net.one.weight.mul_(2)
    second.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_a_layer_without_a_part_in_the_loss_has_no_gradient():
    net, _ = twins(Branches)
    for _ in range(2):
        net(X)[0].sum().backward()
    assert [parameter.grad is None for parameter in net.parameters()] == [False, False] + [True] * 4
    for layer in (net.one, net.two):
        layer.weight.register_hook(lambda gradient: gradient * 2)
    net.zero_grad()
    net(X)[0].sum().backward()  # a hook is not called with None
    assert net.two.weight.grad is None


@pytest.mark.parametrize("case", ["all used", "one does not run", "one is detached"])
def test_under_ddp_a_layer_without_a_part_in_the_loss_has_no_gradient(tmp_path, case):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net, _ = twins(Branches)
        if case != "one does not run":
            del net.unused
        wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=case != "all used")
        idle = {"one does not run": "unused.", "one is detached": "two."}.get(case, "none")
        for _ in range(3):
            net.zero_grad()
            first, second = wrapped(X)
            (
                first.square() + (second.detach() if case == "one is detached" else second).square()
            ).sum().backward()
            for name, parameter in net.named_parameters():
                assert (parameter.grad is None) is name.startswith(idle)
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_weights_have_noise_and_no_gradient(each_by_itself):
    one, two = twins(lambda: chain((8, 12)))
    for net in (one, two):
        net.conv2.weight.requires_grad_(False)
    noisy = []
    one.conv2.register_forward_hook(lambda *arguments: noisy.append(arguments[2]))
    two.conv2.register_forward_hook(lambda *arguments: noisy.append(arguments[2]))
    one(X).square().sum().backward()
    each_by_itself()
    two(X).square().sum().backward()
    torch.testing.assert_close(*noisy)
    assert one.conv2.weight.grad is None
    same(one, two)
    one.conv2.weight.requires_grad_(True)
    one.zero_grad()
    one(X).square().sum().backward()
    assert one.conv2.weight.grad is not None


def test_all_weights_frozen():
    net, _ = twins(lambda: chain((8, 12)))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x = X.clone().requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None


def test_mixed_types_are_groups_of_their_own():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3).double(), nn.Conv2d(3, 4, 3).bfloat16(), nn.Conv2d(4, 4, 3).double()
    )
    net.forward = lambda x: net[2](net[0](x)).sum() + net[1](x.bfloat16()).sum()
    add_bridgeout(net)
    with Counted() as counted:
        net(X.double()).backward()
    assert counted.names.count("regrow.noisy.default") == 2
    assert [layer.weight.grad.dtype for layer in net] == [torch.float64, torch.bfloat16, torch.float64]


def test_mixed_devices_are_groups_of_their_own_and_a_model_that_moves_goes_on():
    net, twin = twins(Branches)
    net.two.to("meta")
    net.forward = lambda x: (net.one(x), net.two(x.to("meta")))
    first = net(X)
    assert first[1].device.type == "meta"
    assert torch.equal(first[0], twin(X)[0])
    assert bridgeout_state(net)["passes"] == 1  # the count stays where it can be read
    net.forward = lambda x: (net.two(x.to("meta")), net.one(x))
    assert torch.equal(net(X)[1], twin(X)[0])


def test_tied_weights_are_drawn_once():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3))
    net[1].weight = net[0].weight
    add_bridgeout(net)
    made = []
    for layer in net:
        layer.register_forward_hook(lambda *_: made.append(net._bridgeout_passes.together.get(_[0]).noisy))
    net(X)
    assert made[0] is made[1]
    assert made[0] is not made[2]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_transposed_and_grouped_convolutions_in_a_group(fraction, each_by_itself):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, groups=1), nn.ConvTranspose2d(8, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 3),
            nn.Conv2d(6, 6, 3, groups=3),
        )  # fmt: skip

    one, two = twins(make, target_fraction=fraction)
    one(X).square().sum().backward()
    each_by_itself()
    two(X).square().sum().backward()
    same(one, two)


def test_a_layer_whose_pre_hook_changes_the_weight_draws_by_itself():
    one, two = twins(lambda: chain((8, 12)))

    def halved(layer, _):
        nn.Module.__getattr__(layer, "weight").data.mul_(0.5)

    with torch.no_grad():
        two.conv2.weight.mul_(0.5)
    one.conv2.register_forward_pre_hook(halved)
    torch.testing.assert_close(one(X), two(X))


def test_a_weight_that_changes_within_a_pass_is_drawn_anew():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            x = self.one(x)
            with torch.no_grad():
                self.two.weight.mul_(2)
            return self.two(x)

    net = Changes()
    add_bridgeout(net, seed=2)
    before = net.two.weight.detach().clone()
    found = net(X)
    net.eval()
    made = places([net.one.weight.numel(), net.two.weight.numel()], 2)
    one, two = (
        perturbed(weight, *place, 0, torch.tensor(1), 0.3, 1.5, 1.0, False)
        for weight, place in zip([net.one.weight, 2 * before], made, strict=True)
    )
    expected = F.conv2d(F.conv2d(X, one, net.one.bias, padding=1), two, net.two.bias)
    torch.testing.assert_close(found, expected)


def test_functional_call_computes_with_the_weights_given():
    one, two = twins(lambda: chain((8, 12)))
    given = {name: (2 * p.detach()).requires_grad_() for name, p in one.named_parameters()}
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.mul_(2)
    functional_call(one, given, (X,)).square().sum().backward()
    two(X).square().sum().backward()
    assert all(parameter.grad is None for parameter in one.parameters())
    for name, parameter in two.named_parameters():
        torch.testing.assert_close(given[name].grad, parameter.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_among_others_and_two_passes_that_wait(reentrant):
    class Partly(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.part, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.use = use

        def forward(self, x):
            x = self.first(x)
            part = checkpoint(self.part, x, use_reentrant=reentrant) if self.use else self.part(x)
            return self.last(torch.tanh(part))

    found = []
    for use in (True, False):
        net = Partly(use)
        add_bridgeout(net)
        for _ in range(2):
            first, second = net(X), net(X + 1)
            (second.square().sum() + first.square().sum()).backward()
        found.append(net)
    same(*found)


def test_an_error_in_a_pass_leaves_nothing_behind(tmp_path):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.fails = False

        def forward(self, x):
            x = self.one(x)
            if self.fails:
                raise KeyError("in the middle")
            return self.two(x)

    net = Fails()
    add_bridgeout(net)
    net(X).sum().backward()
    net.fails = True
    with pytest.raises(KeyError):
        net(X)
    assert not net._bridgeout_passes.together._made
    with pytest.raises(ValueError, match="Call that model"):
        net.one(X)
    twin = copy.deepcopy(net)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    assert set(torch.load(tmp_path / "state.pt", weights_only=True)) == set(net.state_dict())
    net.fails = twin.fails = False
    assert torch.equal(net(X), twin(X))
    assert bridgeout_state(net)["passes"] == bridgeout_state(twin)["passes"] == 3


def test_a_copy_made_within_a_pass_goes_on_by_itself():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.twin = []

        def forward(self, x):
            x = self.one(x)
            if self.training and not self.twin:
                self.twin.append(copy.deepcopy(self))
            return self.two(x)

    net = Copies()
    add_bridgeout(net)
    first = net(X)
    twin = net.twin[0]
    twin.twin.append(None)
    second = twin(X)
    assert second.shape == first.shape
    assert not torch.equal(first, second)
    assert torch.equal(second, net(X))


def test_a_copy_between_backward_and_step_trains_alike():
    net, _ = twins(lambda: chain((8, 12)))
    net(X).square().sum().backward()
    twin = copy.deepcopy(net)
    for each in (net, twin):
        optimizer = torch.optim.SGD(each.parameters(), 0.01, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            each(X).square().sum().backward()
            optimizer.step()
    same(net, twin)


def test_a_copy_of_a_part_takes_no_other_part_along():
    net, _ = twins(lambda: nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3))))
    net(X)
    part = copy.deepcopy(net[0])
    assert part._bridgeout.passes.together is None


def test_replicas_of_data_parallel_are_refused_in_words():
    net, _ = twins(lambda: chain((8, 12)))
    replica = net.conv1._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        replica.weight = net.conv1.weight * 1


def test_scaled_losses_under_autocast(each_by_itself):
    one, two = twins(lambda: chain((8, 12)))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for net in (one, two):
        if net is two:
            each_by_itself()
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(X), torch.tensor([0, 1, 2]))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    same(one, two)


def test_large_gradients_are_overwritten_where_a_layer_alone_reads_them():
    torch.manual_seed(0)
    weight = torch.randn(600, 50, 3, 3, requires_grad=True)
    gradient = torch.randn(weight.shape)
    expected = torch.autograd.grad(made_with([weight])[0], weight, gradient.clone())[0]
    for alone in (False, True):
        given = gradient.clone()
        (noisy,) = made_with([weight], alone=alone)
        (found,) = torch.autograd.grad(noisy, weight, given)
        torch.testing.assert_close(found, expected)
        assert torch.equal(given, gradient) is not alone


def test_a_layer_that_shares_its_weight_with_another_kind_of_layer_overwrites_nothing():
    class Own(nn.Conv2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 3, 3), Own(3, 3, 3))
    net[1].weight = net[0].weight
    add_bridgeout(net)
    seen = []
    made = bridged.together

    def watched(weights, parts, *given):
        seen.extend(parts)
        return made(weights, parts, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridged, "together", watched)
        net(X)
    assert [part.alone for part in seen] == [False]


@pytest.mark.parametrize("first", ["in eval mode", "in a transform", "partly in eval mode"])
def test_layers_that_could_not_be_in_a_group_in_the_first_pass_are_in_one_later(first):
    net = chain((8, 12), norm=nn.Identity).train()
    add_bridgeout(net)
    if first == "in a transform":
        values = {name: parameter.detach() for name, parameter in net.named_parameters()}
        torch.func.grad(lambda given: functional_call(net, given, (X,)).sum())(values)
    elif first == "in eval mode":
        net.eval()(X)
    else:
        hook = net.conv2.register_forward_pre_hook(lambda *_: None)
        net(X)
        hook.remove()
    net.train()
    with Counted() as counted:
        net(X)
    assert counted.names.count("regrow.noisy.default") == 1


def test_a_layer_on_another_stream_waits_and_draws_by_itself(monkeypatch):
    class Stream:
        waited = ()

        def wait_stream(self, other):
            self.waited = (*self.waited, other)

    one, two = Stream(), Stream()
    current = [one]
    for module in (bridged, passes):
        monkeypatch.setattr(module, "stream_on", lambda _: current[0])
    net, twin = twins(Branches)
    net.one.register_forward_hook(lambda *_: current.__setitem__(0, two))
    with Counted() as counted:
        outs = net(X)
    assert counted.names.count("regrow.noisy.default") == 2
    assert two.waited == (one,)
    assert one.waited == ()
    torch.testing.assert_close(outs, twin(X))


def test_a_pass_in_inference_mode_counts_and_leaves_the_next_alone():
    net, twin = twins(lambda: chain((8, 12)))
    with torch.inference_mode():
        first = net(X)
    torch.testing.assert_close(first, twin(X))
    for each in (net, twin):
        each(X).square().sum().backward()
    same(net, twin)


def test_evaluating_and_training_parts_in_turn():
    one, two = twins(lambda: chain((8, 12)))
    for net in (one, two):
        net.conv2.eval()
    torch.testing.assert_close(one(X), two(X))
    for net in (one, two):
        net.conv2.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridged, "_kind", lambda _: None)
        expected = two(X)
    torch.testing.assert_close(one(X), expected)
