import copy
import functools

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from cycles import sgd
from nets import Drawn, Residual, away_from_zero, conv, head
from regrow.filters import convolutions, unit_rows
from regrow.repr.subphase import SubPhase, check_memory
from regrow.structure.read import read_structure
from regrow.surgery.plan import CutPlan
from regrow.surgery.planning import plan_cut

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def begin(model, optimizer, dropped, consumers="keep", x=X, memory=None):
    return SubPhase(model, optimizer, read_structure(model, x[:1]), dropped, consumers, memory)


# --- a dropped filter is dead, and stays so -------------------------------------------------------------

OPTIMIZERS = {
    "sgd-momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, weight_decay=0.1),
}


@pytest.mark.devices
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_revives_a_dropped_filter(make_net, train, name, foreach):
    model = make_net((4, 6, 6))
    optimizer = OPTIMIZERS[name](model.parameters(), foreach=foreach)
    train(model, optimizer, 3, X)  # momentum and running averages point away from zero
    phase = begin(model, optimizer, {"conv2": [1, 4], "conv3": [0]})
    for _ in range(20):
        train(model, optimizer, 1, X)
        for layer, norm, dead in ((model.conv2, model.norm2, [1, 4]), (model.conv3, model.norm3, [0])):
            for tensor in (layer.weight, layer.bias, norm.weight, norm.bias):
                assert not tensor[dead].any()
    assert model.conv2.weight[0].any()
    phase.release()


@pytest.mark.devices
@pytest.mark.parametrize("name", ["lbfgs", "adam-fused", "sgd-fused", "adam-capturable"])
def test_nor_do_optimizers_that_step_in_their_own_way(make_net, name):
    model = make_net((4, 6))
    optimizer = {
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        "adam-fused": lambda p: torch.optim.Adam(p, fused=True, weight_decay=0.1),
        "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        "adam-capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    }[name](model.parameters())

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(model(X), torch.arange(8) % 4)
        value.backward()
        return value

    optimizer.step(loss)
    begin(model, optimizer, {"conv2": [1, 4]})
    for _ in range(5):
        optimizer.step(loss)
        assert not model.conv2.weight[[1, 4]].any()
        assert not model.norm2.bias[[1, 4]].any()


@pytest.mark.devices
def test_the_optimizer_forgets_dropped_filters_at_once(make_net, train):
    model = make_net((4, 6))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2, X)
    phase = begin(model, optimizer, {"conv2": [1, 4]})
    for parameter in (model.conv2.weight, model.conv2.bias, model.norm2.weight, model.norm2.bias):
        assert not optimizer.state[parameter]["exp_avg"][[1, 4]].any()
        assert optimizer.state[parameter]["exp_avg"][0].any()
    phase.release()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # with no gradient and nothing to hold them, they stay where they are
    assert not model.conv2.weight[[1, 4]].any()


@pytest.mark.devices
def test_clipping_sees_the_gradients_of_the_sub_network_alone(make_net):
    model = away_from_zero(make_net((4, 6)))
    dropped = {"conv1": [2], "conv2": [0, 3]}
    begin(model, sgd(model), dropped)
    F.cross_entropy(model(X), torch.arange(8) % 4).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)

    small = shrunk(model, dropped)
    F.cross_entropy(small(X), torch.arange(8) % 4).backward()
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(small.parameters(), 1e9))


@pytest.mark.devices
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("kind", ["batch", "group", "instance", "instance-tracked", "batch-plain"])
def test_a_dropped_channel_emits_exactly_zero_behind_its_norm(make_net, train, dim, kind):
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dim - 1]
    norm = {
        "batch": batch,
        "batch-plain": lambda c: batch(c, affine=False),
        "group": lambda c: nn.GroupNorm(2, c),
        "instance": lambda c: instance(c, affine=True),
        "instance-tracked": lambda c: instance(c, affine=True, track_running_stats=True),
    }[kind]
    model = away_from_zero(make_net((4, 6), dim=dim, norm=norm))
    x = torch.randn(4, 3, *[5] * dim)
    optimizer = sgd(model)
    train(model, optimizer, 2, x)
    begin(model, optimizer, {"conv1": [0, 3], "conv2": [5]}, x=x)
    emitted = {}
    for name in ("norm1", "norm2"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: emitted.update({name: output})
        )
    for step in range(6):
        model.train(step % 3 != 2)
        train(model, optimizer, 1, x)
        model.eval()
        for _ in ("eval", "train"):
            model(x)
            assert not emitted["norm1"][:, [0, 3]].any()
            assert not emitted["norm2"][:, [5]].any()
            assert emitted["norm2"][:, 0].any()
            model.train()


# --- networks of every shape: what is dropped has no part in the output --------------------------------


def dense():
    return Drawn(
        lambda s, x: s.head(F.relu(s.n3(torch.cat([(z := s.stem(x)), s.a(F.relu(s.n1(z))), s.b(F.relu(s.n2(
            torch.cat([z, s.a(F.relu(s.n1(z)))], 1))))], 1)))),
        stem=conv(3, 4), n1=nn.BatchNorm2d(4), a=conv(4, 4), n2=nn.BatchNorm2d(8), b=conv(8, 4),
        n3=nn.BatchNorm2d(12), head=head(12),
    )  # fmt: skip


def flat():
    return nn.Sequential(conv(3, 4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 4))


def separable():
    return nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU6(), conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.ReLU6(),
        conv(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4, groups=2), head(4),
    )  # fmt: skip


def siamese():
    tower = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6), nn.BatchNorm2d(6), nn.ReLU())
    return Drawn(
        lambda s, x: s.head(torch.cat([s.one(x), s.two(x.flip(3))], 1)), one=tower, two=tower, head=head(12)
    )


NETS = {
    "dense": (dense, {"stem": [1], "a": [0, 2], "b": [3]}),
    "residual": (lambda: Residual(4, 6), {"stem": [2], "a": [0, 5], "b": [1, 2]}),
    "flat": (flat, {"0": [1, 3]}),
    "separable": (separable, {"0": [2], "6": [0, 4]}),
    "siamese": (siamese, {"one.0": [1], "one.3": [0, 5]}),
}


@pytest.mark.devices
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_dropped_channels_are_zero_and_their_rows_dead_in_nets_of_every_shape(train, net, training):
    build, dropped = NETS[net]
    model = away_from_zero(build()).train(training)
    optimizer = sgd(model)
    train(model, optimizer, 2, X)
    readers = read_structure(model, X[:1])
    SubPhase(model, optimizer, readers, dropped, "keep")
    seen = []

    def watch(indices):
        return lambda _module, _inputs, output: seen.append(output[:, indices].abs().max().item())

    for name, indices in dropped.items():
        model.get_submodule(name).register_forward_hook(watch(indices))
        for norm, reads in readers[name].norms.items():
            model.get_submodule(norm).register_forward_hook(watch(reads.of(indices)))
    train(model, optimizer, 5, X)
    model.train(not training)
    model(X)
    assert len(seen) >= 6 * len(dropped)
    assert set(seen) == {0.0}


# --- the masked network is the smaller network -----------------------------------------------------------


def shrunk(model, dropped):
    """A net born at the size of the sub-network, with the kept rows and columns copied into it."""
    layers = dict(model.named_children())
    alive = None
    small = nn.Sequential()
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            rows = [i for i in range(layer.out_channels) if i not in dropped.get(name, [])]
            columns = alive if alive is not None else list(range(layer.in_channels))
            born = nn.Conv2d(len(columns), len(rows), 3, padding=1)
            born.weight.data.copy_(layer.weight.data[rows][:, columns])
            born.bias.data.copy_(layer.bias.data[rows])
            alive = rows
        elif isinstance(layer, nn.BatchNorm2d):
            born = nn.BatchNorm2d(len(alive))
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(born, key).data.copy_(getattr(layer, key).data[alive])
        elif isinstance(layer, nn.Linear):
            born = nn.Linear(len(alive), layer.out_features)
            born.weight.data.copy_(layer.weight.data[:, alive])
            born.bias.data.copy_(layer.bias.data)
        else:
            born = copy.deepcopy(layer)
        small.add_module(name, born)
    return small.train(model.training)


@pytest.mark.devices
def test_the_masked_net_computes_and_trains_as_a_net_born_at_that_size(make_net, train):
    model = away_from_zero(make_net((6, 8, 8)))
    dropped = {"conv1": [0, 4], "conv2": [1, 2, 7], "conv3": [5]}
    optimizer = sgd(model)
    begin(model, optimizer, dropped)
    small = shrunk(model, dropped)
    small_optimizer = sgd(small)
    for training in (False, True):
        model.train(training)
        small.train(training)
        torch.testing.assert_close(model(X), small(X), atol=1e-5, rtol=0)

    train(model, optimizer, 10, X)
    train(small, small_optimizer, 10, X)
    moved = (small.conv2.weight - shrunk(model, dropped).conv2.weight).abs().max()
    for (name, ours), theirs in zip(
        shrunk(model, dropped).state_dict().items(), small.state_dict().values(), strict=True
    ):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=f"{name}: {moved}")
    for training in (False, True):
        model.train(training)
        small.train(training)
        torch.testing.assert_close(model(X), small(X), atol=1e-4, rtol=0)


# --- restore -------------------------------------------------------------------------------------------

DROPPED = {"conv1": [1], "conv2": [0, 3, 6]}


def cycle_once(model, optimizer, train, consumers, x=X):
    """Train, drop ``DROPPED``, train. Returns the sub phase and the model's state before the drop."""
    train(model, optimizer, 2, x)
    before = copy.deepcopy(model.state_dict())
    phase = begin(model, optimizer, DROPPED, consumers, x=x)
    train(model, optimizer, 3, x)
    return phase, before


def cosines(new, others):
    return (unit_rows(new.flatten(1).double()) @ unit_rows(others.flatten(1).double()).T).abs().max()


@pytest.mark.devices
@pytest.mark.parametrize("consumers", ["keep", "zero", "init"])
def test_new_rows_are_orthogonal_to_kept_rows_as_they_are_now_and_to_old_dropped_rows(
    make_net, train, consumers
):
    model = make_net()
    optimizer = sgd(model)
    phase, before = cycle_once(model, optimizer, train, consumers)
    least_covered, notes = phase.restore(generator())
    assert least_covered == notes == []
    for name, dead in DROPPED.items():
        weight = model.get_submodule(name).weight.detach()
        alive = [i for i in range(len(weight)) if i not in dead]
        assert cosines(weight[dead], weight[alive]) < 1e-5
        assert cosines(weight[dead], before[f"{name}.weight"][dead]) < 1e-5
        mean = weight[alive].flatten(1).norm(dim=1).mean()
        torch.testing.assert_close(weight[dead].flatten(1).norm(dim=1), mean.expand(len(dead)))


@pytest.mark.devices
def test_norms_wake_fresh_and_biases_at_zero(make_net, train):
    model = away_from_zero(make_net())
    phase, _ = cycle_once(model, sgd(model), train, "keep")
    phase.restore(generator())
    for name, dead in DROPPED.items():
        norm = model.get_submodule(name.replace("conv", "norm"))
        assert not model.get_submodule(name).bias[dead].any()
        assert norm.weight[dead].tolist() == [1] * len(dead)
        assert norm.bias[dead].tolist() == [0] * len(dead)
        assert norm.running_mean[dead].tolist() == [0] * len(dead)
        assert norm.running_var[dead].tolist() == [1] * len(dead)


@pytest.mark.devices
@pytest.mark.parametrize("consumers", ["keep", "zero", "init"])
def test_nothing_else_moves_at_the_restore(make_net, train, consumers):
    model = make_net()
    optimizer = sgd(model)
    phase, _ = cycle_once(model, optimizer, train, consumers)
    before = copy.deepcopy(model.state_dict())
    phase.restore(generator())
    touched = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in before.items()}
    for name, dead in DROPPED.items():
        for entry in ("weight", "bias"):
            touched[f"{name}.{entry}"][dead] = True
        for entry in ("weight", "bias", "running_mean", "running_var"):
            touched[f"{name.replace('conv', 'norm')}.{entry}"][dead] = True
    touched["conv2.weight"][:, DROPPED["conv1"]] = True
    touched["conv3.weight"][:, DROPPED["conv2"]] = True
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[~touched[name]], before[name][~touched[name]]), name


@pytest.mark.devices
def test_keep_gives_the_columns_back_as_they_were_at_the_drop(make_net, train):
    model = make_net()
    phase, before = cycle_once(model, sgd(model), train, "keep")
    phase.restore(generator())
    alive = [i for i in range(8) if i not in DROPPED["conv2"]]
    assert torch.equal(model.conv3.weight[:, DROPPED["conv2"]], before["conv3.weight"][:, DROPPED["conv2"]])
    assert torch.equal(model.conv2.weight[alive][:, [1]], before["conv2.weight"][alive][:, [1]])


@pytest.mark.devices
def test_zero_columns(make_net, train):
    model = make_net()
    phase, _ = cycle_once(model, sgd(model), train, "zero")
    phase.restore(generator())
    alive = [i for i in range(8) if i not in DROPPED["conv2"]]
    assert not model.conv3.weight[:, DROPPED["conv2"]].any()
    assert not model.conv2.weight[alive][:, [1]].any()
    assert model.conv2.weight[DROPPED["conv2"]][:, [1]].any()  # wholly new rows have new columns


def test_init_columns_are_drawn_as_pytorch_draws_them(make_net, train):
    model = make_net((16, 32, 32))
    optimizer = sgd(model)
    train(model, optimizer, 1, X)
    dead = list(range(0, 32, 2))
    phase = begin(model, optimizer, {"conv2": dead}, "init")
    before = model.conv3.weight.detach()[:, dead].clone()
    phase.restore(generator())
    drawn = model.conv3.weight.detach()[:, dead]
    bound = (32 * 9) ** -0.5  # fan-in of conv3
    assert (drawn != before).all()
    assert 0.99 * bound < drawn.abs().max() <= bound
    assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.05)  # uniform


@pytest.mark.devices
@pytest.mark.parametrize("build", ["sgd", "adam"])
def test_the_optimizer_forgets_what_it_knew_of_new_entries(make_net, train, build):
    model = make_net()
    optimizer = sgd(model) if build == "sgd" else torch.optim.Adam(model.parameters(), lr=0.01)
    phase, _ = cycle_once(model, optimizer, train, "keep")
    before = copy.deepcopy({name: optimizer.state[p] for name, p in model.named_parameters()})
    phase.restore(generator())
    fresh = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    fresh[DROPPED["conv2"]] = True
    fresh[:, DROPPED["conv1"]] = True
    state, old = optimizer.state[model.conv2.weight], before["conv2.weight"]
    signed = "momentum_buffer" if build == "sgd" else "exp_avg"
    assert not state[signed][fresh].any()
    assert torch.equal(state[signed][~fresh], old[signed][~fresh])
    for parameter in (model.conv2.bias, model.norm2.weight, model.norm2.bias):
        assert not optimizer.state[parameter][signed][DROPPED["conv2"]].any()
    if build == "adam":
        mean = old["exp_avg_sq"][~fresh].mean()
        torch.testing.assert_close(state["exp_avg_sq"][fresh], mean.expand(int(fresh.sum())))
        bias = optimizer.state[model.norm2.bias]["exp_avg_sq"]
        torch.testing.assert_close(bias[0], bias[[1, 2, 4, 5, 7]].mean())


@pytest.mark.devices
def test_restored_filters_train_again(make_net, train):
    model = make_net()
    optimizer = sgd(model)
    phase, _ = cycle_once(model, optimizer, train, "keep")
    phase.restore(generator())
    restored = model.conv2.weight.detach()[DROPPED["conv2"]].clone()
    train(model, optimizer, 1, X)
    assert (model.conv2.weight[DROPPED["conv2"]] != restored).flatten(1).any(1).all()
    assert not optimizer._optimizer_step_post_hooks
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_layers_too_small_for_orthogonal_rows_are_named(make_net, train):
    model = make_net((6, 8, 8), kernel=1)  # 1×1: conv2 has rows of 6 weights, and 8 of them
    optimizer = sgd(model)
    phase, _ = cycle_once(model, optimizer, train, "keep")
    least_covered, _ = phase.restore(generator())
    assert least_covered == ["conv1", "conv2"]
    assert model.conv2.weight[DROPPED["conv2"]].flatten(1).norm(dim=1).all()


@pytest.mark.devices
def test_the_generator_decides_the_new_weights(make_net, train):
    def run(seed):
        torch.manual_seed(0)
        model = make_net()
        phase, _ = cycle_once(model, sgd(model), train, "init")
        phase.restore(generator(seed))
        return model.state_dict()

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv2.weight"], other["conv2.weight"])
    assert not torch.equal(first["conv3.weight"], other["conv3.weight"])


def moved_by_restore(model, optimizer, dropped, train, x):
    """How far the output moves at a restore, against its size, in train or eval mode; and the notes."""
    train(model, optimizer, 1, x)
    phase = begin(model, optimizer, dropped, "zero", x=x)
    train(model, optimizer, 1, x)
    with torch.no_grad():
        before = outputs(model, x)
        _, notes = phase.restore(generator())
        after = outputs(model, x)
    return max(
        (a - b).abs().max().item() / b.abs().max().item() for a, b in zip(after, before, strict=True)
    ), notes


def outputs(model, x):
    model = copy.deepcopy(model)  # train mode moves the running statistics
    return [model.eval()(x), model.train()(x)]


@pytest.mark.devices
@pytest.mark.parametrize("net", NETS)
def test_zero_does_not_move_the_output(train, net):
    build, dropped = NETS[net]
    model = away_from_zero(build())
    moved, notes = moved_by_restore(model, sgd(model), dropped, train, X)
    assert moved < 1e-5
    assert notes == []


@pytest.mark.parametrize("name", ["resnet18", "densenet"])
def test_zero_does_not_move_the_output_of_a_real_net(train, name):
    if name == "resnet18":
        model = torchvision.models.resnet18(num_classes=4)
    else:
        model = torchvision.models.DenseNet(
            growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=4
        )
    dropped = {n: [0, c.out_channels // 2] for n, c in convolutions(model).items()}
    x = torch.randn(2, 3, 64, 64)
    moved, notes = moved_by_restore(model, sgd(model), dropped, train, x)
    assert moved < 1e-5
    assert notes == []


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(2, c), lambda c: nn.GroupNorm(1, c)])
def test_where_zero_cannot_keep_the_output_a_note_says_so(make_net, train, norm):
    model = make_net((4, 8), norm=norm)
    moved, notes = moved_by_restore(model, sgd(model), {"conv2": [1]}, train, X)
    assert moved > 1e-3
    assert notes == [
        "conv2: the output moves at this restore, because 'norm2' normalises several channels together."
    ]


def test_a_sum_without_a_norm_in_front_is_noted(train):
    model = Residual(4, 6)
    model.norm_b = nn.Identity()
    optimizer = sgd(model)
    _, notes = moved_by_restore(model, optimizer, {"b": [1]}, train, X)
    assert notes == ["b: the output moves at this restore, because it is added to other channels."]


def test_init_notes_the_channels_whose_consumers_are_not_theirs_alone():
    model = Residual(4, 6)
    optimizer = sgd(model)
    phase = begin(model, optimizer, {"a": [1], "b": [1]}, "init")
    head_weight = model.head[2].weight.detach().clone()
    _, notes = phase.restore(generator())
    assert notes == ["b: its consumers keep their weights, because it is added to other channels."]
    assert torch.equal(model.head[2].weight, head_weight)


def test_a_convolution_that_reads_itself_is_restored_like_any_other(train):
    model = Drawn(
        lambda s, x: s.head(F.relu(s.b(F.relu(s.b(F.relu(s.a(x))))))),
        a=conv(3, 6),
        b=conv(6, 6),
        head=head(6),
    )
    optimizer = sgd(model)
    phase = begin(model, optimizer, {"b": [1, 4]})
    train(model, optimizer, 2, X)
    phase.restore(generator())
    weight = model.b.weight.detach()
    assert cosines(weight[[1, 4]], weight[[0, 2, 3, 5]]) < 1e-5


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.devices
def test_a_state_brings_back_the_same_restore_in_another_model(make_net, train):
    model = make_net()
    optimizer = sgd(model)
    phase, _ = cycle_once(model, optimizer, train, "keep")
    twin = copy.deepcopy(model)
    twin_optimizer = sgd(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = phase.state()
    other = begin(twin, twin_optimizer, state["dropped"], "keep", memory=state)
    train(model, optimizer, 2, X)
    train(twin, twin_optimizer, 2, X)
    phase.restore(generator())
    other.restore(generator())
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_a_state_is_a_copy(make_net):
    model = make_net()
    phase = begin(model, sgd(model), DROPPED)
    state = phase.state()
    state["dropped"]["conv1"].append(0)
    state["old_rows"]["conv1"].zero_()
    assert phase.state()["dropped"] == DROPPED
    assert phase.state()["old_rows"]["conv1"].any()


def test_a_state_that_does_not_fit_is_refused(make_net):
    model = make_net()
    readers = read_structure(model, X[:1])
    state = SubPhase(model, sgd(model), readers, DROPPED, "keep").state()
    check_memory(model, readers, "keep", state)
    rows = {**state["old_rows"], "conv2": state["old_rows"]["conv2"][:2]}
    columns = {**state["old_columns"], "conv3": state["old_columns"]["conv3"][:5]}
    for changed, message in (
        ({"dropped": {"conv9": [0]}}, "names 'conv9'"),
        ({"dropped": {"conv1": [99]}}, "does not fit 'conv1'"),
        ({"old_rows": rows}, r"does not fit 'conv2' of shape \[8, 6, 3, 3\]"),
        ({"old_rows": {}}, "does not fit 'conv1'"),
        ({"old_columns": columns}, "other channels were read by 'conv3'"),
        ({"old_columns": {}}, "other channels were read by 'conv2'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_memory(model, readers, "keep", {**state, **changed})


def test_rows_dropped_together_with_a_channel_they_read_are_wholly_new():
    model = nn.Sequential(conv(3, 4), conv(4, 4), head(4))
    phase = begin(model, sgd(model), {"0": [1], "1": [2]}, "zero")
    phase.restore(generator())
    assert not model[1].weight[[0, 1, 3], 1].any()
    assert model[1].weight[2, 1].all()


# --- computing without them --------------------------------------------------------------------------------


def planned(model, dropped, x=X):
    keep = {
        name: torch.tensor([i not in indices for i in range(model.get_submodule(name).out_channels)])
        for name, indices in dropped.items()
    }
    readers = read_structure(model, x[:1])
    return readers, plan_cut(model, keep, x[:1], readers=readers, followers=False)


@pytest.mark.devices
@pytest.mark.parametrize("net", NETS)
def test_with_a_plan_the_same_network_trains(train, net):
    build, dropped = NETS[net]
    masked = away_from_zero(build()).double()
    narrowed = copy.deepcopy(masked)
    readers, plan = planned(masked, dropped, X.double())
    for model, given in ((masked, None), (narrowed, plan)):
        optimizer = sgd(model)
        train(model, optimizer, 2, X.double())
        phase = SubPhase(model, optimizer, readers, dropped, "keep", plan=given)
        assert phase.state()["plan"] == (None if given is None else plan.to_dict())
        train(model, optimizer, 5, X.double())
        phase.restore(generator())
        train(model, optimizer, 2, X.double())
    for (name, ours), theirs in zip(narrowed.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.devices
def test_release_and_restore_end_the_narrowing(make_net):
    model = make_net()
    readers, plan = planned(model, DROPPED)
    for end in (SubPhase.release, lambda phase: phase.restore(generator())):
        phase = SubPhase(model, sgd(model), readers, DROPPED, "keep", plan=plan)
        assert type(model.conv2) is not nn.Conv2d
        end(phase)
        assert type(model.conv2) is nn.Conv2d
        assert model.norm2(model.conv2(torch.zeros(1, 6, 4, 4))).shape == (1, 8, 4, 4)


def test_a_plan_that_does_not_fit_changes_nothing(make_net):
    model = make_net()
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    readers = read_structure(model, X[:1])
    with pytest.raises(ValueError, match="does not fit 'conv2'"):
        SubPhase(model, optimizer, readers, DROPPED, "keep", plan=CutPlan(rows={"conv2": [8]}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks
    assert type(model.conv2) is nn.Conv2d
