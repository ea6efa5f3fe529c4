import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import regrow
from nets import Residual, conv, head, keep_but, unsettled
from regrow.surgery.cut import cut
from regrow.surgery.layers import apply_plan, cuts
from regrow.surgery.plan import CutPlan
from regrow.surgery.removal import remove_filters

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


KEEP = {"stem": keep_but(4, 1, 2), "a": keep_but(3, 0), "b": keep_but(4, 1)}


def residual():
    return unsettled(Residual(4, 3, stem_bias=False)).train()


def masked(net, keep=KEEP):
    other = copy.deepcopy(net)
    remove_filters(other, keep, example_inputs=X[:1])
    return other


def check_equal(small, whole):
    for training in (False, True, False):
        torch.testing.assert_close(small.train(training)(X), whole.train(training)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.devices
@pytest.mark.gives_up
def test_three_filters_on_paper():
    """conv (3 filters, 1×1, one channel) → norm → conv (1×1): filter 1 leaves."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2.0, -3.0]).view(3, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        net[1].running_var.fill_(1 - net[1].eps)
        net[1].bias.copy_(torch.tensor([0.5, 5.0, 1.0]))
        net[3].weight.copy_(torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1))
        net[3].bias.fill_(7.0)
    net.eval()
    # With x = 1: the first filter gives 1 + 0.5, the third max(0, −3 + 2 + 1) = 0. 1.5 · 1 + 0 · 100 + 7.
    x = torch.ones(1, 1, 1, 1)
    record = cut(net, {"0": keep_but(3, 1)}, example_inputs=x)
    assert net(x).item() == pytest.approx(8.5)
    assert net[0].weight.flatten().tolist() == [1, -3]
    assert net[0].bias.tolist() == [0, 2]
    assert net[1].bias.tolist() == [0.5, 1]
    assert net[1].running_var.shape == (2,)
    assert net[3].weight.flatten().tolist() == [1, 100]
    assert (net[0].out_channels, net[1].num_features, net[3].in_channels) == (2, 2, 2)
    assert record == {
        "version": 1,
        "plan": CutPlan(rows={"0": [0, 2]}, channels={"1": [0, 2]}, columns={"3": [0, 2]}).to_dict(),
        "dropped": {"0": [1]},
        "layers": {"0": {"before": 3, "after": 2}, "3": {"before": 1, "after": 1}},
        # rows: 1 + bias; norm: weight and bias; column: 1
        "parameters": {"before": 16, "after": 11},
        "masked": {},
    }
    assert json.loads(json.dumps(record)) == record


@pytest.mark.devices
def test_a_residual_stream_is_cut_filter_by_filter():
    net = residual()
    whole, keys = masked(net), list(net.state_dict())
    record = cut(net, KEEP, example_inputs=X[:1])
    check_equal(net, whole)
    assert {name: layer["after"] for name, layer in record["layers"].items()} == {"stem": 2, "a": 2, "b": 3}
    assert list(net.state_dict()) == keys
    assert [net.stem.weight.shape, net.a.weight.shape, net.b.weight.shape] == [
        (2, 3, 3, 3), (2, 2, 3, 3), (3, 2, 3, 3)
    ]  # fmt: skip
    assert (net.norm.num_features, net.norm_a.num_features, net.norm_b.num_features) == (2, 2, 3)
    assert net.head[2].in_features == 3
    assert isinstance(net.a, nn.Conv2d)
    assert isinstance(net.norm, nn.BatchNorm2d)


def train(net, optimizer, steps=3):
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), LABELS).backward()
        optimizer.step()


@pytest.mark.devices
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.Adagrad(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, 0.01),
        lambda p: torch.optim.Rprop(p, 0.01),
    ],
)
def test_the_optimizer_goes_on_with_what_is_left(make):
    net = residual()
    groups = [{"params": list(net.stem.parameters())}, {"params": [*net.a.parameters()], "lr": 0.001}]
    rest = [p for name, p in net.named_parameters() if not name.startswith(("stem", "a."))]
    optimizer = make([*groups, {"params": rest}])
    train(net, optimizer)
    before = {name: dict(optimizer.state[p]) for name, p in net.named_parameters()}
    cut(net, KEEP, example_inputs=X[:1], optimizer=optimizer)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(2, 3, 3, 3)]
    assert optimizer.param_groups[1]["params"] == list(net.a.parameters())
    assert optimizer.param_groups[1]["lr"] == 0.001
    assert set(optimizer.state) == set(net.parameters())
    for slot, old in before["a.weight"].items():
        new = optimizer.state[net.a.weight][slot]
        if isinstance(old, torch.Tensor) and old.shape == (3, 4, 3, 3):
            assert torch.equal(new, old[[1, 2]][:, [0, 3]])
        elif isinstance(old, torch.Tensor) and not old.dim():
            assert torch.equal(new, old)
    train(net, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.devices
def test_a_scheduler_and_other_parameters_stay_with_the_optimizer():
    net, other = residual(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*net.parameters(), other], 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    cut(net, KEEP, example_inputs=X[:1], optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][-1] is other
    train(net, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_an_optimizer_that_remembers_in_other_shapes_is_refused():
    net = residual()
    optimizer = torch.optim.LBFGS(net.parameters())

    def loss():
        optimizer.zero_grad()
        F.cross_entropy(net(X), LABELS).backward()
        return F.cross_entropy(net(X), LABELS)

    optimizer.step(loss)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"LBFGS keeps .* of 'stem.weight' in another shape"):
        cut(net, KEEP, example_inputs=X[:1], optimizer=optimizer)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.devices
def test_gradients_flags_and_memory_format_stay():
    net = residual().to(memory_format=torch.channels_last)
    net.a.requires_grad_(False)
    net.b.weight.note = "mine"
    F.cross_entropy(net(X), LABELS).backward()
    gradient = net.b.weight.grad.clone()
    net.train()
    cut(net, KEEP, example_inputs=X[:1])
    assert torch.equal(net.b.weight.grad, gradient[[0, 2, 3]][:, [1, 2]])
    assert net.a.weight.grad is None
    assert not net.a.weight.requires_grad
    assert net.b.weight.requires_grad
    assert net.b.weight.note == "mine"
    assert net.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.b.weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert net.training


@pytest.mark.devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net = residual().to(dtype)
    whole = copy.deepcopy(net)
    remove_filters(whole, KEEP, example_inputs=X[:1].to(dtype))
    cut(net, KEEP, example_inputs=X[:1].to(dtype))
    net.eval(), whole.eval()
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(net(X.to(dtype)), whole(X.to(dtype)), rtol=tolerance, atol=tolerance)


def small_net():
    net = residual()
    cut(net, KEEP, example_inputs=X[:1])
    return net.eval()


@pytest.mark.devices
def test_a_cut_model_is_copied_pickled_saved_and_loaded():
    net = small_net()
    expected = net(X)
    assert torch.equal(copy.deepcopy(net)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), expected)
    other = small_net()
    assert not torch.equal(other(X), expected)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), expected)
    assert not any("regrow" in key for key in net.state_dict())


def test_a_cut_model_is_compiled_and_exported():
    net = small_net()
    expected = net(X)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(X), expected)
    batch = torch.export.Dim("batch", min=2, max=1024)  # PyTorch 2.6 takes no open end in the strict way
    for strict in (False, True):
        exported = torch.export.export(net, (X,), dynamic_shapes=({0: batch},), strict=strict)
        torch.testing.assert_close(exported.module()(X[:3]), expected[:3])


@pytest.mark.devices
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
def test_a_cut_model_is_traced(gradients):
    net = small_net()  # whose trace is checked by one without gradients
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(net, X)
    torch.testing.assert_close(traced(X[:3]), net(X[:3]))


def test_a_compiled_model_is_cut_inside_its_wrapper():
    net = residual().eval()
    compiled = torch.compile(net, backend="eager")
    compiled(X)
    cut(compiled, KEEP, example_inputs=X[:1])
    torch.testing.assert_close(compiled(X), net(X))
    assert net.stem.out_channels == 2


@pytest.mark.devices
def test_a_norm_over_groups_keeps_what_is_left_of_its_weights():
    net = nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 4), head(4))
    nn.init.uniform_(net[1].bias, 0.2, 0.5)
    keep = {"0": keep_but(4, 1)}
    whole = masked(net, keep)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    cut(net, keep, example_inputs=X[:1], optimizer=optimizer)
    assert dict(net.named_parameters())["1.bias"].shape == (3,)
    check_equal(net, whole)
    train(net, optimizer)  # what was dropped cannot come back
    assert net[1].bias.tolist()[1] == net[1].weight.tolist()[1] == 0
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), net(X))
    exported = torch.export.export(net.eval(), (X,))
    torch.testing.assert_close(exported.module()(X), net(X))


@pytest.mark.devices
def test_filters_that_cannot_leave_alone_are_masked_and_named():
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 6, groups=2), nn.ReLU(), conv(6, 4), head(4))
    keep = {"2": keep_but(6, 0)}
    whole = masked(net, keep)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    record = cut(net, keep, example_inputs=X[:1], optimizer=optimizer)
    assert record["masked"] == {"2": "its groups lose different numbers of filters"}
    assert record["layers"]["2"] == {"before": 6, "after": 5}
    check_equal(net, whole)
    train(net, optimizer)
    assert not net[2].weight[0].any()
    assert net[2].weight[1:].all()


def test_a_replayed_plan_gives_the_same_model():
    net = residual()
    fresh = copy.deepcopy(net)
    record = cut(net, KEEP, example_inputs=X[:1])
    plan = CutPlan.from_dict(json.loads(json.dumps(record["plan"])))
    apply_plan(fresh.to("meta"), plan)
    assert cuts(fresh) == cuts(net) == [record["plan"]]
    assert cuts(copy.deepcopy(net)) == cuts(net)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert {key: value.shape for key, value in fresh.state_dict().items()} == shapes
    fresh.to_empty(device="cpu").load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(X), net.eval()(X))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("rows", {"stem": [0, 9]}, "does not fit 'stem', which has 4 channels"),
        ("rows", {"stem": []}, "does not fit 'stem'"),
        ("rows", {"norm": [0]}, "does not fit 'norm', which is a BatchNorm2d"),
        ("columns", {"stme": [0]}, "names 'stme'.*did you mean 'stem'"),
        ("channels", {"a": [0]}, "does not fit 'a', which is a Conv2d"),
        ("placed", {"a": (3, [0])}, "places 1 channels of 'a', which has 3"),
        ("placed", {"a": (9, [0, 1, 2])}, "places 'a' in 9 channels, and it has 3"),
        ("picked", {"a": [0]}, "picks 1 channels for 'a', which reads 4"),
        ("groups", {"a": 2}, "3 filters of 'a' do not go into 2 groups"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(part, value, message):
    net = residual()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_plan(net, CutPlan(**{"rows": {"b": [0]}, part: value}))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert type(net.b) is nn.Conv2d


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        CutPlan().to_dict() | {"more": {}},
        CutPlan().to_dict() | {"rows": [1]},
        CutPlan().to_dict() | {"rows": {"a": [-1]}},
        CutPlan().to_dict() | {"rows": {"a": [True]}},
        CutPlan().to_dict() | {"rows": {1: [1]}},
        CutPlan().to_dict() | {"placed": {"a": [1]}},
        CutPlan().to_dict() | {"groups": {"a": "2"}},
        CutPlan().to_dict() | {"masked": {"a": 2}},
    ],
)
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(ValueError, match="cut plan"):
        CutPlan.from_dict(data)


@pytest.mark.devices
def test_cutting_again_counts_the_filters_that_are_left():
    net, once = residual(), residual()
    once.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    cut(net, {"stem": keep_but(4, 1), "b": keep_but(4, 1)}, example_inputs=X[:1], optimizer=optimizer)
    record = cut(
        net,
        {"stem": keep_but(3, 1), "a": keep_but(3, 0)},  # the second left of the stem's is filter 2
        example_inputs=X[:1],
        optimizer=optimizer,
    )
    cut(once, KEEP, example_inputs=X[:1])
    assert record["layers"]["stem"] == {"before": 3, "after": 2}
    assert record["dropped"] == {"stem": [1, 2], "a": [0], "b": [1]}
    assert cuts(net) == cuts(once) == [record["plan"]]
    assert set(net.state_dict()) == set(once.state_dict())
    for key, value in once.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=0, msg=key)
    assert set(optimizer.param_groups[0]["params"]) == set(net.parameters())
    check_equal(net, once)


@pytest.mark.devices
@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_training_between_two_cuts_is_remembered(name):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    }[name]
    net = residual()
    optimizer = make(net.parameters())
    cut(net, {"a": keep_but(3, 0)}, example_inputs=X[:1], optimizer=optimizer)
    train(net, optimizer)
    before = copy.deepcopy(net)
    slot = next(iter(optimizer.state[net.b.weight].values())).clone()
    cut(net, {"b": keep_but(4, 3)}, example_inputs=X[:1], optimizer=optimizer)
    assert torch.equal(net.b.weight, before.b.weight[:3])
    assert torch.equal(net.a.weight, before.a.weight)
    if name == "sgd":
        assert torch.equal(optimizer.state[net.b.weight]["momentum_buffer"], slot[:3])
    check_equal(net, masked_once_more(before))
    train(net, optimizer)


def masked_once_more(net):
    """``net`` with the fourth filter of b silenced by hand."""
    with torch.no_grad():
        for tensor in (net.b.weight, net.b.bias, net.norm_b.weight, net.norm_b.bias, net.norm_b.running_mean):
            tensor[3] = 0
    return net


def test_cutting_nothing_changes_nothing():
    net = residual()
    parameters = list(net.parameters())
    record = cut(net, {"stem": keep_but(4)}, example_inputs=X[:1])
    assert record["plan"] == CutPlan().to_dict()
    assert record["parameters"]["before"] == record["parameters"]["after"]
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert cuts(net) == []


class TiedAndComputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 4), conv(3, 4), head(4)
        self.b.weight = self.a.weight
        self.computed = parametrizations.weight_norm(conv(4, 4))

    def forward(self, x):
        return self.head(self.computed(F.relu(self.a(x) * self.b(x))))


@pytest.mark.parametrize(
    ("make", "keep", "x", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, X, "no convolution to cut|no Conv1d"),
        (residual, KEEP, torch.randn(1, 5, 8, 8), r"forward pass fails on example_inputs.*x\[:1\]"),
        (residual, {"stem": torch.zeros(4, dtype=torch.bool)}, X, "'stem'.* leaves no filter alive"),
        (residual, {"stem": keep_but(5, 1)}, X, "boolean mask of 4 filters"),
        (residual, {"steam": keep_but(4, 1)}, X, "no convolution is named 'steam'.*stem"),
        (TiedAndComputed, {"a": keep_but(4, 1)}, X, "'a' cannot be dropped: it shares its weight"),
        (TiedAndComputed, {"computed": keep_but(4, 1)}, X, "computed from other parameters"),
        (lambda: nn.DataParallel(residual()), KEEP, X, "wrapped in DataParallel.*model.module"),
        (
            lambda: nn.Sequential(nn.LazyConv2d(4, 3), head(4)),
            {},
            X,
            "a layer without a weight before its first pass \\(see '0'\\). Run one forward pass first",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_and_left_alone(make, keep, x, message):
    net = make()
    before = [(name, p, p.detach().clone()) for name, p in net.named_parameters() if "Lazy" not in str(net)]
    with pytest.raises(ValueError, match=message):
        cut(net, keep, example_inputs=x[:1])
    after = dict(net.named_parameters())
    assert all(after[name] is p and torch.equal(p, value) for name, p, value in before)


def test_a_model_with_bridgeout_is_refused():
    net = residual()
    regrow.add_bridgeout(net)
    with pytest.raises(
        ValueError,
        match=r"cut was refused, because the model has Bridgeout.*Call remove_bridgeout\(model\) first",
    ):
        cut(net, KEEP, example_inputs=X[:1])


@pytest.mark.devices
def test_bridgeout_on_a_cut_model():
    net = small_net()
    expected = net(X)
    regrow.add_bridgeout(net)
    assert not torch.equal(net.train()(X), expected)
    regrow.remove_bridgeout(net)
    net.eval()
    assert net.a.out_channels == 2
    assert torch.isfinite(net(X)).all()
