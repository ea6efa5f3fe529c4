import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nets import Drawn, FullyShardedDataParallel, Residual, away_from_zero, conv, head
from regrow.filters import convolutions
from regrow.noise.layers import add_bridgeout, remove_bridgeout
from regrow.repr.hold import Hold
from regrow.repr.narrow import narrow
from regrow.structure.read import read_structure
from regrow.structure.readers import silence, silent_entries
from regrow.surgery.plan import CutPlan
from regrow.surgery.planning import plan_cut
from regrow.surgery.removal import plan_removal

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 4
FORMATS = [torch.contiguous_format, torch.channels_last]

# On make_net(): conv2 loses filters 1, 2 and 7 of 8, conv3 loses filter 5 of 8.
SECOND, THIRD = [0, 3, 4, 5, 6], [0, 1, 2, 3, 4, 6, 7]
PLAN = CutPlan(
    rows={"conv2": SECOND, "conv3": THIRD},
    columns={"conv3": SECOND, "head": THIRD},
    channels={"norm2": SECOND, "norm3": THIRD},
)
DROPPED = {"conv2": [1, 2, 7], "conv3": [5]}


def silenced(model, dropped=None, x=X):
    readers = read_structure(model, x[:1])
    silence(model, readers, dropped or DROPPED)
    return model


def held(model, optimizer, dropped=None):
    readers = read_structure(model, X[:1])
    return Hold(silent_entries(model, readers, dropped or DROPPED), optimizer)


def born(model):
    """A net born at the size that PLAN leaves of make_net(), with its parameters and statistics."""
    small = nn.Sequential()
    for name, layer in model.named_children():
        new = copy.deepcopy(layer)
        for key, tensor in (layer._parameters | layer._buffers).items():
            if tensor is None or not tensor.dim():
                continue
            for kept in (PLAN.rows.get(name), PLAN.channels.get(name)):
                tensor = tensor if kept is None else tensor[kept]
            if key == "weight" and name in PLAN.columns:
                tensor = tensor[:, PLAN.columns[name]]
            (new._parameters if key in layer._parameters else new._buffers)[key] = (
                nn.Parameter(tensor.detach().clone()) if key in layer._parameters else tensor.clone()
            )
        small.add_module(name, new)
    return small


def loss_of(model, x=X):
    return F.cross_entropy(model(x), LABELS[: len(x)])


# --- what the narrowed network computes ------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_a_net_born_at_that_size_does(make_net, training, fmt):
    model = away_from_zero(make_net()).train(training).to(memory_format=fmt)
    x = X.to(memory_format=fmt)
    small = born(model)
    with narrow(model, PLAN):
        ours, theirs = model(x), small(x)
        assert torch.equal(ours, theirs)
        F.cross_entropy(ours, LABELS).backward()
    F.cross_entropy(theirs, LABELS).backward()
    for (name, parameter), other in zip(model.named_parameters(), small.parameters(), strict=True):
        layer, key = name.rsplit(".", 1)
        gradient = parameter.grad
        assert gradient.stride() == parameter.stride()
        for kept in (PLAN.rows.get(layer), PLAN.channels.get(layer)):
            gradient = gradient if kept is None else gradient[kept]
        if key == "weight" and layer in PLAN.columns:
            gradient = gradient[:, PLAN.columns[layer]]
        assert torch.equal(gradient, other.grad), name
        # What is left out has a gradient, and it is 0: the optimizer treats it as under masks.
        assert parameter.grad.count_nonzero() == other.grad.count_nonzero()
    for (name, tensor), other in zip(model.named_buffers(), small.buffers(), strict=True):
        kept = PLAN.channels.get(name.rsplit(".", 1)[0])
        assert torch.equal(tensor if kept is None or not tensor.dim() else tensor[kept], other), name


@pytest.mark.devices
def test_on_paper():
    # One pixel, three 1×1 filters on two channels; filter 1 is left out, and a linear layer reads the rest.
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Flatten(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [3, 4], [5, 6]]).view(3, 2, 1, 1))
        model[2].weight.copy_(torch.tensor([[1.0, 10, 100]]))
    x = torch.tensor([1.0, -1]).view(1, 2, 1, 1)
    with narrow(model, CutPlan(rows={"0": [0, 2]}, columns={"2": [0, 2]})):
        output = model(x)
        assert output.item() == -1 * 1 + -1 * 100
        output.backward()
    assert model[2].weight.grad.tolist() == [[-1, 0, -1]]
    assert model[0].weight.grad.flatten(1).tolist() == [[1, -1], [0, 0], [100, -100]]
    assert model(x).item() == -1 - 10 - 100


@pytest.mark.devices
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_land_where_they_belong(make_net, momentum):
    model = away_from_zero(make_net())
    for norm in (model.norm1, model.norm2, model.norm3):
        norm.momentum = momentum
    masked = silenced(copy.deepcopy(model))
    before = copy.deepcopy(model.state_dict())
    with narrow(model, PLAN):
        for _ in range(3):
            model(X)
            masked(X)
        trained = copy.deepcopy(model.state_dict())
        model.eval()(X)
        assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    for name, dropped in (("norm2", [1, 2, 7]), ("norm3", [5])):
        norm, other = model.get_submodule(name), masked.get_submodule(name)
        kept = PLAN.channels[name]
        assert norm.num_batches_tracked == other.num_batches_tracked == 3
        for key in ("running_mean", "running_var"):
            ours, theirs = getattr(norm, key), getattr(other, key)
            torch.testing.assert_close(ours[kept], theirs[kept])
            assert (ours[kept] != before[f"{name}.{key}"][kept]).all()
            assert torch.equal(ours[dropped], before[f"{name}.{key}"][dropped])


@pytest.mark.devices
def test_parameters_keep_shape_and_identity_and_the_classes_come_back(make_net):
    model = make_net()
    parameters, state = list(model.parameters()), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    narrowing = narrow(model, PLAN)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    assert isinstance(model.conv2, nn.Conv2d)
    assert model.conv2.weight is parameters[4]
    assert (model.conv2.out_channels, model.norm2.num_features, model.head.in_features) == (8, 8, 8)
    model(X)
    assert (model.conv2.out_channels, model.norm2.num_features, model.head.in_features) == (8, 8, 8)
    model.load_state_dict(model.state_dict())
    for _ in range(2):
        narrowing.release()
        assert [type(module) for module in model.modules()] == classes
        assert "_narrow" not in vars(model.conv2)


def test_an_exception_in_a_forward_pass_leaves_whole_parameters_behind(make_net):
    model = make_net()
    with narrow(model, PLAN):
        with pytest.raises(RuntimeError):
            model.conv3(X)  # three channels, where it reads five
        assert model.conv3.weight.shape == (8, 8, 3, 3)
        model(X)


# --- training, and the end of it -------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
}


@pytest.mark.devices
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_move_the_same_way_as_under_masks(make_net, train, kind):
    masked = away_from_zero(make_net()).double()
    narrowed = copy.deepcopy(masked)
    x = X.double()
    states = []
    for model in (masked, narrowed):
        optimizer = OPTIMIZERS[kind](model.parameters())
        train(model, optimizer, 3, x)  # momentum everywhere
        silenced(model, x=x)
        readers = read_structure(model, x[:1])
        Hold(silent_entries(model, readers, DROPPED), optimizer)
        narrowing = narrow(model, PLAN if model is narrowed else CutPlan())
        train(model, optimizer, 10, x)
        narrowing.release()
        states.append((model.state_dict(), [optimizer.state[p] for p in model.parameters()]))
    (ours, our_slots), (theirs, their_slots) = states
    for name, tensor in ours.items():
        if "running_var" not in name:  # of dropped channels: what is behind a weight of 0
            torch.testing.assert_close(tensor, theirs[name], msg=name)
    for ours, theirs in zip(our_slots, their_slots, strict=True):
        torch.testing.assert_close(dict(ours), dict(theirs))


@pytest.mark.devices
def test_release_moves_nothing_that_training_made(make_net, train):
    model = make_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with narrow(model, PLAN):
        train(model, optimizer, 3, X)
        made = copy.deepcopy(model.state_dict())
    assert all(torch.equal(tensor, made[name]) for name, tensor in model.state_dict().items())


@pytest.mark.devices
def test_the_last_loss_and_its_graph_outlive_both_changes(make_net):
    model, twin = make_net(), make_net()
    twin.load_state_dict(model.state_dict())
    whole = loss_of(model)
    narrowing = narrow(model, PLAN)
    small = loss_of(model)
    whole.backward()
    loss_of(twin).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    narrowing.release()
    again = loss_of(model)
    model.zero_grad()
    small.backward()
    assert not model.conv2.weight.grad[[1, 2, 7]].any()
    assert model.conv2.weight.grad[SECOND].any()
    again.backward()
    assert model.conv2.weight.grad[[1, 2, 7]].any()


def test_copies_made_meanwhile_are_plain_and_averaged_ones_go_on(make_net):
    model = silenced(away_from_zero(make_net()))
    early = torch.optim.swa_utils.AveragedModel(model)
    narrowing = narrow(model, PLAN)
    late = torch.optim.swa_utils.AveragedModel(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), late.module):
        assert type(twin.conv2) is nn.Conv2d
        assert "_narrow" not in vars(twin.conv2)
        torch.testing.assert_close(twin.eval()(X), model.eval()(X))
    early.update_parameters(model)
    narrowing.release()
    with torch.no_grad():
        model.conv2.weight.fill_(1)
    for averaged in (early, late):
        averaged.update_parameters(model)
        averaged.update_parameters(model)
        assert averaged.module.conv2.weight[1].any()
        assert averaged(X).shape == (8, 4)


@pytest.mark.devices
def test_gradients_accumulate_over_phases(make_net):
    model = make_net()
    loss_of(model).backward()
    before = model.conv2.weight.grad.clone()
    with narrow(model, PLAN):
        loss_of(model).backward()
    assert torch.equal(model.conv2.weight.grad[[1, 2, 7]], before[[1, 2, 7]])
    assert not torch.equal(model.conv2.weight.grad[0], before[0])


# --- layers and nets of every shape ----------------------------------------------------------------------


def separable():
    return nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.PReLU(4), conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.ReLU6(),
        conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), head(6),
    )  # fmt: skip


def grouped():
    return nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 6, groups=2), nn.ReLU(), head(6))


NETS = {
    "residual": (
        lambda: Residual(4, 6),
        {"a": [0, 5], "b": [1], "stem": [1]},
        # Channel 1 of the stream is 0 everywhere: a reads the others, and norm places what it has.
        CutPlan(
            rows={"a": [1, 2, 3, 4], "b": [0, 2, 3], "stem": [0, 2, 3]},
            columns={"b": [1, 2, 3, 4], "a": [0, 2, 3]},
            channels={"norm_a": [1, 2, 3, 4], "norm_b": [0, 2, 3], "norm": [0, 2, 3]},
            placed={"norm_b": (4, [0, 2, 3]), "norm": (4, [0, 2, 3])},
            picked={"a": [0, 2, 3]},
        ),
    ),
    "separable": (
        separable,
        {"0": [2], "3": [2], "6": [0, 4]},
        CutPlan(
            rows={"0": [0, 1, 3], "3": [0, 1, 3], "6": [1, 2, 3, 5]},
            columns={"6": [0, 1, 3], "9.2": [1, 2, 3, 5]},
            channels={"1": [0, 1, 3], "2": [0, 1, 3], "4": [0, 1, 3], "7": [1, 2, 3, 5]},
            groups={"3": 3},
        ),
    ),
    "placed before a norm of several channels": (
        grouped,
        {"0": [1]},
        CutPlan(rows={"0": [0, 2, 3]}, placed={"0": (4, [0, 2, 3])}, spread={"1": [0, 2, 3]}),
    ),
    "spread": (grouped, {"0": [1]}, CutPlan(spread={"0": [0, 2, 3], "1": [0, 2, 3]})),
}  # fmt: skip


@pytest.mark.devices
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_masked_and_narrowed_are_one_network_whatever_its_shape(net, training, fmt):
    build, dropped, plan = NETS[net]
    model = away_from_zero(build()).train(training).to(memory_format=fmt)
    x = X.to(memory_format=fmt)
    masked = silenced(copy.deepcopy(model), dropped)
    narrowing = narrow(model, plan)
    ours, theirs = model(x), masked(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for output in (ours, theirs):
        F.cross_entropy(output, LABELS).backward()
    narrowing.release()
    readers = read_structure(model, X[:1])
    for parameter, rows in silent_entries(masked, readers, dropped):
        parameter.grad.index_fill_(0, rows, 0)  # as Hold does
    for (name, parameter), other in zip(model.named_parameters(), masked.parameters(), strict=True):
        if parameter.grad is None:
            assert not other.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.devices
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("kind", ["batch", "instance", "instance-tracked", "instance-plain", "group"])
def test_norms_of_every_kind(make_net, dim, kind):
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dim - 1]
    norm = {
        "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1],
        "instance": lambda c: instance(c, affine=True),
        "instance-tracked": lambda c: instance(c, affine=True, track_running_stats=True),
        "instance-plain": instance,
        "group": lambda c: nn.GroupNorm(c, c),
    }[kind]
    model = away_from_zero(make_net(dim=dim, norm=norm))
    x = torch.randn(4, 3, *[5] * dim)
    masked = silenced(copy.deepcopy(model), x=x)
    with narrow(model, PLAN):
        for training in (True, False):
            torch.testing.assert_close(model.train(training)(x), masked.train(training)(x))
    for name, tensor in model.named_buffers():
        kept = PLAN.channels.get(name.rsplit(".", 1)[0])
        if kept is not None and tensor.dim():
            torch.testing.assert_close(tensor[kept], masked.get_buffer(name)[kept])


@pytest.mark.devices
def test_layers_with_a_forward_method_of_their_own():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        layers.Conv2dSame(3, 4, 3, stride=2),
        layers.BatchNormAct2d(4),
        conv(4, 6, padding_mode="circular"),
        head(6),
    )
    masked = silenced(copy.deepcopy(away_from_zero(model)), {"0": [1]})
    plan = CutPlan(rows={"0": [0, 2, 3]}, channels={"1": [0, 2, 3]}, columns={"2": [0, 2, 3]})
    with narrow(model, plan):
        torch.testing.assert_close(model(X), masked(X))
        torch.testing.assert_close(model.eval()(X), masked.eval()(X))
    torch.testing.assert_close(model[1].running_mean[[0, 2, 3]], masked[1].running_mean[[0, 2, 3]])


@pytest.mark.devices
def test_a_layer_that_runs_twice_and_a_picture_without_a_batch():
    model = Drawn(
        lambda s, x: s.head(F.relu(s.b(F.relu(s.b(F.relu(s.a(x))))))).flatten(),
        a=conv(3, 4), b=conv(4, 4), head=conv(4, 2),
    )  # fmt: skip
    masked = copy.deepcopy(model)
    for layer in (masked.a, masked.b):
        layer.weight.data[1], layer.bias.data[1] = 0, 0
    kept = [0, 2, 3]
    plan = CutPlan(rows={"a": kept, "b": kept}, columns={"b": kept, "head": kept})
    with narrow(model, plan):
        torch.testing.assert_close(model(X), masked(X))
        torch.testing.assert_close(model(X[0]), masked(X[0]))
    picked = CutPlan(
        rows={"a": kept, "b": kept},
        placed={"a": (4, kept), "b": (4, kept)},
        picked={"head": kept},
        columns={"head": kept},
    )
    with narrow(model, picked):
        torch.testing.assert_close(model(X[0]), masked(X[0]))


# --- nets at random, as plan_cut plans them --------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, channels, width, normed):
        super().__init__()
        self.one, self.two = conv(channels, width), conv(width, channels)
        self.norm = nn.BatchNorm2d(channels) if normed else nn.Identity()

    def forward(self, x):
        return F.relu(x + self.norm(self.two(F.relu(self.one(x)))))


class DenseBlock(nn.Module):
    def __init__(self, channels, width, normed):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if normed else nn.Identity()
        self.conv = conv(channels, width)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def block(kind, channels, width, normed):
    """A block of the kind asked for, and how many channels it emits."""
    if kind == "residual":
        return ResidualBlock(channels, width, normed), channels
    if kind == "dense":
        return DenseBlock(channels, width, normed), channels + width
    groups = {"plain": 1, "grouped": 2, "depthwise": channels}[kind]
    width = channels if kind == "depthwise" else width
    norm = nn.BatchNorm2d(width) if normed else nn.Identity()
    return nn.Sequential(conv(channels, width, groups=groups), norm, nn.ReLU()), width


@st.composite
def nets(draw):
    """A net, and which of its filters to keep."""
    torch.manual_seed(draw(st.integers(0, 99)))
    kinds = st.sampled_from(["plain", "residual", "dense", "grouped", "depthwise"])
    first = draw(st.sampled_from([4, 6]))
    blocks, channels = [block("plain", 3, first, True)[0]], first
    for _ in range(draw(st.integers(1, 3))):
        made, channels = block(draw(kinds), channels, draw(st.sampled_from([2, 4, 6])), draw(st.booleans()))
        blocks.append(made)
    tail = [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 4)]
    model = away_from_zero(nn.Sequential(*blocks, *(head(channels) if draw(st.booleans()) else tail)))
    keep = {}
    for name, layer in convolutions(model).items():
        if layer.groups == 1:
            mask = torch.rand(layer.out_channels) > 0.4
            mask[draw(st.integers(0, layer.out_channels - 1))] = True
            keep[name] = mask
    return model, keep


@given(nets())
def test_masked_and_narrowed_train_alike_in_nets_at_random(case):
    masked, keep = case
    masked = masked.double()
    x, readers = X.double(), read_structure(masked, X[:1].double())
    narrowed = copy.deepcopy(masked)
    removal = plan_removal(masked, keep, x[:1], readers)
    plan = plan_cut(masked, keep, x[:1], readers=readers)
    assert not plan.masked
    outputs = []
    for model in (masked, narrowed):
        removal.apply(model)
        entries = silent_entries(model, readers, removal.gone)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        hold = Hold(entries, optimizer)
        narrowing = narrow(model, plan if model is narrowed else CutPlan())
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
        outputs.append((loss, model.eval()(x)))
        made = copy.deepcopy(model.state_dict())
        narrowing.release()
        hold.release()
        outputs[-1] += (model(x),)
        assert all(torch.equal(tensor, made[name]) for name, tensor in model.state_dict().items())
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)
    for (name, parameter), other in zip(narrowed.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=name)


# --- beside what else a loop uses ------------------------------------------------------------------------


def test_compiled_without_a_break_and_compiled_again_when_the_phase_changes(make_net):
    model = silenced(away_from_zero(make_net()))
    masked = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(X)
    model.load_state_dict(masked.state_dict())
    narrowing = narrow(model, PLAN)
    torch.testing.assert_close(compiled(X), masked(X))
    torch.testing.assert_close(model.norm2.running_mean[SECOND], masked.norm2.running_mean[SECOND])
    loss_of(compiled).backward()
    assert not model.conv2.weight.grad[1].any()
    narrowing.release()
    with torch.no_grad():
        model.conv2.weight.fill_(1)
    model.eval()
    torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.devices
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(make_net, reentrant):
    model = make_net()
    twin = copy.deepcopy(model)
    x = X.clone().requires_grad_()
    with narrow(model, PLAN), narrow(twin, PLAN):
        F.cross_entropy(model[9:](checkpoint(model[:9], x, use_reentrant=reentrant)), LABELS).backward()
        loss_of(twin).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_autocast(make_net):
    model = make_net()
    masked = silenced(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16), narrow(model, PLAN):
        output = model(X)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, masked(X), rtol=0.05, atol=0.05)
        loss_of(model).backward()
    assert model.conv2.weight.grad.dtype == torch.float32


@pytest.mark.devices
@pytest.mark.parametrize("linear", [False, True])
def test_bridgeout_draws_for_whole_weights(make_net, linear):
    model = silenced(away_from_zero(make_net()))
    masked = copy.deepcopy(model)
    for each in (model, masked):
        add_bridgeout(each, p=0.4, linear=linear, seed=3)
    narrowing = narrow(model, PLAN)
    torch.testing.assert_close(model(X), masked(X))
    loss_of(model).backward()
    loss_of(masked).backward()
    torch.testing.assert_close(
        model.conv3.weight.grad[THIRD][:, SECOND], masked.conv3.weight.grad[THIRD][:, SECOND]
    )
    with pytest.raises(ValueError, match="conv2"):
        remove_bridgeout(model)  # the layers are not in a state to lose it
    narrowing.release()
    torch.testing.assert_close(model(X), masked(X))
    remove_bridgeout(model)
    assert type(model.conv2) is nn.Conv2d


def test_another_class_in_front_meanwhile(make_net):
    model = make_net()
    narrowing = narrow(model, PLAN)
    add_bridgeout(model)
    with pytest.raises(ValueError, match="has got another class"):
        model(X)
    narrowing.release()
    assert model(X).shape == (8, 4)
    with pytest.raises(ValueError, match="'conv2' is narrowed already"):
        narrow(model, PLAN)
    remove_bridgeout(model)


@pytest.mark.parametrize("plan", [PLAN, CutPlan()])
def test_passes_in_several_threads_at_once_compute_what_one_does(make_net, plan):
    model = away_from_zero(make_net()).eval()
    dead = silent_entries(model, read_structure(model, X[:1]), DROPPED)
    silence(model, read_structure(model, X[:1]), DROPPED)
    inputs = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    with narrow(model, plan, dead=dead), torch.no_grad():
        expected = [model(x) for x in inputs]
        start = threading.Barrier(4)

        def work(_):
            start.wait()
            with torch.no_grad():
                return [model(x) for x in inputs * 5]

        with ThreadPoolExecutor(4) as pool:
            for outputs in pool.map(work, range(4)):
                for output, other in zip(outputs, expected * 5, strict=True):
                    torch.testing.assert_close(output, other)


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CutPlan(rows={"conv9": [0]}), "the plan names 'conv9', which the model does not have.*conv"),
        (CutPlan(rows={"conv2": [0, 8]}), r"does not fit 'conv2', which has 8 channels: \[0, 8\]"),
        (CutPlan(rows={"conv2": []}), "does not fit 'conv2'"),
        (CutPlan(rows={"conv2": [1, 0]}), "does not fit 'conv2'"),
        (CutPlan(columns={"conv2": [6]}), "does not fit 'conv2', which has 6 channels"),
        (CutPlan(channels={"norm2": [3, 9]}), "does not fit 'norm2', which has 8 channels"),
        (CutPlan(rows={"weighted": [0]}), "the weight of 'weighted' is not a plain parameter"),
    ],
)
def test_plans_that_do_not_fit_are_refused(make_net, plan, message):
    model = make_net()
    model.weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    classes = [type(module) for module in model.modules()]
    both = CutPlan(rows={"conv1": [0], **plan.rows}, columns=plan.columns, channels=plan.channels)
    with pytest.raises(ValueError, match=message):
        narrow(model, both)
    assert [type(module) for module in model.modules()] == classes


def test_narrowing_twice_and_models_that_cannot_be_narrowed(make_net):
    model = make_net()
    with narrow(model, PLAN), pytest.raises(ValueError, match="'conv2' is narrowed already"):
        narrow(model, PLAN)
    with narrow(model, PLAN):
        model(X)
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        narrow(nn.DataParallel(model), PLAN)

    replaced = make_net()
    replaced.conv3.forward = replaced.conv3.forward
    with pytest.raises(ValueError, match="the forward method of 'conv3' has been replaced"):
        narrow(replaced, PLAN)
    assert type(replaced.conv2) is nn.Conv2d

    with pytest.raises(ValueError, match=r"is sharded.*Use DDP instead of FSDP"):
        narrow(FullyShardedDataParallel(model), PLAN)


def test_fully_shard_is_refused(make_net, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make_net()
        fully_shard(model.conv2, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"sharded.*\(see 'conv2'\). Use DDP instead of FSDP"):
            narrow(model, PLAN)
    finally:
        torch.distributed.destroy_process_group()
