"""Every optimizer: dropped filters are dead inside its step and behind it, and restored ones stay where they
are put."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

import optimizers
from cycles import X, build, is_dead, repr_on
from regrow.repr import slots as slots_module
from regrow.repr.slots import Copies, memory_of

optim = torch.optim


def of(kind, **settings):
    return lambda model: kind(model.parameters(), **settings)


def around(wrapper, **settings):
    return lambda model: wrapper(optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **settings))


def muon_and_adam(model):
    weights = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return optimizers.Together(optim.Muon(weights, lr=0.02), optim.AdamW(rest, lr=0.01))


OF_PYTORCH = {
    "ASGD": of(optim.ASGD, lr=0.05, t0=3),
    "Adadelta": of(optim.Adadelta, weight_decay=0.1),
    "Adafactor": of(optim.Adafactor, lr=0.01),
    "Adagrad": of(optim.Adagrad, weight_decay=0.1),
    "Adam": of(optim.Adam, lr=0.01, weight_decay=0.1),
    "AdamW": of(optim.AdamW, lr=0.01, amsgrad=True),
    "Adamax": of(optim.Adamax, lr=0.01),
    "LBFGS": of(optim.LBFGS, lr=0.1, max_iter=4),
    **({"Muon": muon_and_adam} if hasattr(optim, "Muon") else {}),
    "NAdam": of(optim.NAdam, lr=0.01),
    "RAdam": of(optim.RAdam, lr=0.01),
    "RMSprop": of(optim.RMSprop, lr=0.001, centered=True, momentum=0.9, weight_decay=0.1),
    "Rprop": of(optim.Rprop, lr=0.001),
    "SGD": of(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
}
OTHERS = {
    "lbfgs-wolfe": of(optim.LBFGS, max_iter=5, line_search_fn="strong_wolfe"),
    "schedule-free": of(optimizers.ScheduleFreeSGD, lr=0.05, weight_decay=0.01),
    "madgrad": of(optimizers.MADGRAD, lr=0.01),
    "lion": of(optimizers.Lion, lr=0.001, weight_decay=0.1),
    "adabelief": of(optimizers.AdaBelief, lr=0.01),
    "adan": of(optimizers.Adan, lr=0.01),
    "prodigy": of(optimizers.Prodigy),
    "orthogonal": of(optimizers.Orthogonal, lr=0.01, weight_decay=0.1),
    "pooled": of(optimizers.Pooled, lr=0.05),
    "sam": of(optimizers.SAM, base=optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sam in two steps": of(optimizers.SAMInTwoSteps, base=optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "lookahead": around(optimizers.Lookahead),
    "lookahead in lists": around(optimizers.LookaheadInLists),
    "lookahead inside": around(optimizers.LookaheadInside),
}
ALL = {**OF_PYTORCH, **OTHERS}


def test_no_optimizer_of_pytorch_is_left_out():
    # SparseAdam takes no dense gradients, and those of convolutions are dense.
    kinds = {name for name in dir(optim) if isinstance(getattr(optim, name), type)}
    assert kinds - {"Optimizer", "SparseAdam"} == set(OF_PYTORCH)


def train(model, optimizer, cycle, steps):
    """``steps`` of training, in which no forward pass meets a dropped filter alive."""

    def loss():
        optimizer.zero_grad()
        assert is_dead(model, cycle)
        value = F.cross_entropy(model(X), torch.arange(8) % 4)
        value.backward()
        return value

    for _ in range(steps):
        getattr(optimizer, "two_steps", optimizer.step)(loss)
        assert is_dead(model, cycle)


def to_the_drop(name, **settings):
    model = build()
    optimizer = ALL[name](model)
    cycle = repr_on(model, optimizer, **settings)
    train(model, optimizer, cycle, 4)
    cycle.step()
    train(model, optimizer, cycle, 4)
    return model, optimizer, cycle, cycle.step()


def rows_of(model, event):
    return {name: model.get_submodule(name).weight[i].detach().clone() for name, i in event.filters.items()}


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_dropped_filters_are_dead_and_restored_ones_stay_where_they_are_put(name, compact):
    model, optimizer, cycle, drop = to_the_drop(name, compact=compact)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train(model, optimizer, cycle, 4)
    assert any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cycle.step()
        train(model, optimizer, cycle, 4)
        restore = cycle.step()
    assert restore.filters == drop.filters
    new = rows_of(model, restore)
    for group in optimizer.param_groups:
        group["lr"] = 1e-9
    # ASGD takes over a new rate one step late. Rprop has step sizes of its own, which grow.
    train(model, optimizer, cycle, 1 if name == "Rprop" else 13)
    for layer, rows in rows_of(model, restore).items():
        moved = (rows - new[layer]).flatten(1).norm(dim=1) / new[layer].flatten(1).norm(dim=1)
        assert moved.max() < (0.1 if name in ("ASGD", "Rprop") else 1e-3), (layer, moved)


# --- copies of the weights -------------------------------------------------------------------------------

COPIES = {
    "ASGD": "ASGD.ax",
    "schedule-free": "ScheduleFreeSGD.z",
    "madgrad": "MADGRAD.x0",
    "prodigy": "Prodigy.p0",
    "lookahead": "Lookahead.slow",
    "lookahead in lists": "LookaheadInLists.slow_weights",
    "lookahead inside": "SGD.lookahead_slow_buff",
    "sam": "SAM.old_p",
    "sam in two steps": "SAMInTwoSteps.old_p",
}


def slots(optimizer, family):
    return memory_of(optimizer).families[family]


@pytest.mark.parametrize("consumers", ["keep", "zero", "init"])
@pytest.mark.parametrize("name", ALL)
def test_a_copy_of_the_weights_is_known_and_takes_the_new_values(name, consumers):
    model, optimizer, cycle, drop = to_the_drop(name, consumers=consumers)
    train(model, optimizer, cycle, 2)
    cycle.step()
    train(model, optimizer, cycle, 2)
    restore = cycle.step()
    for event in (drop, restore):
        said = [note.split()[0] for note in event.notes if "holds copies" in note]
        assert said == ([COPIES[name]] if name in COPIES else [])
        assert any("starts anew" in note for note in event.notes) is ("lbfgs" in name.lower())
    if name in COPIES:
        pairs = slots(optimizer, COPIES[name])
        assert len(pairs) == len(list(model.parameters()))
        for layer, indices in restore.filters.items():
            conv, norm = model.get_submodule(layer), model.get_submodule(layer.replace("conv", "norm"))
            for parameter in (conv.weight, conv.bias, norm.weight, norm.bias):
                slot = next(slot for each, slot in pairs if each is parameter)
                assert torch.equal(slot[indices], parameter[indices])
            reader = model.conv3 if layer == "conv2" else model.head
            slot = next(slot for each, slot in pairs if each is reader.weight)
            read = [i for i in range(len(slot)) if i not in restore.filters.get("conv3", [])]
            assert torch.equal(slot[read][:, indices], reader.weight[read][:, indices])


def test_without_their_copies_these_optimizers_would_drag_the_filters_back(monkeypatch):
    monkeypatch.setattr(slots_module, "are_copies", lambda _: False)
    for name in ("schedule-free", "madgrad", "lookahead"):
        model, optimizer, cycle, _ = to_the_drop(name)
        cycle.step()
        restore = cycle.step()
        new = rows_of(model, restore)
        train(model, optimizer, cycle, 20)
        for layer, rows in rows_of(model, restore).items():
            assert (rows.flatten(1).norm(dim=1) < 0.9 * new[layer].flatten(1).norm(dim=1)).all()


def test_a_copy_of_where_training_began_is_still_known_when_the_weights_are_far_away():
    model = build()
    optimizer = optimizers.MADGRAD(model.parameters(), lr=0.01)
    cycle = repr_on(model, optimizer, full=3)
    train(model, optimizer, cycle, 1)
    cycle.step()
    with torch.no_grad():
        for parameter, slot in slots(optimizer, "MADGRAD.x0"):
            optimizer.state[parameter]["s"].add_(torch.randn_like(slot), alpha=30)
    train(model, optimizer, cycle, 3)
    late = Copies(optimizer)
    late.look()
    assert late.known["MADGRAD.x0"] is False
    state = copy.deepcopy(cycle.state_dict())
    cycle.step()
    assert "MADGRAD.x0 holds copies" in cycle.step().notes[0]
    cycle.remove()
    resumed = repr_on(model, optimizer, full=3)
    resumed.load_state_dict(state)
    resumed.step()
    assert "MADGRAD.x0 holds copies" in resumed.step().notes[0]


def test_schedule_free_weights_swapped_for_an_evaluation_keep_dropped_filters_dead():
    model, optimizer, cycle, _ = to_the_drop("schedule-free")
    for _ in range(3):
        optimizer.eval()
        assert is_dead(model, cycle)
        optimizer.train()
        train(model, optimizer, cycle, 1)
    optimizer.eval()
    cycle.step()
    restore = cycle.step()
    new = rows_of(model, restore)
    optimizer.train()
    for layer, rows in rows_of(model, restore).items():
        torch.testing.assert_close(rows, new[layer])


def test_a_drop_between_the_evaluation_and_training_again():
    model = build()
    optimizer = optimizers.ScheduleFreeSGD(model.parameters(), weight_decay=0.1)
    cycle = repr_on(model, optimizer)
    for _ in range(4):
        optimizer.train()
        train(model, optimizer, cycle, 3)
        optimizer.eval()
        cycle.step()
        assert is_dead(model, cycle)


# --- who moves dropped filters is noticed ----------------------------------------------------------------


def swap(model, averaged):
    """As Lightning's weight averaging swaps."""
    for ours, theirs in zip(model.state_dict().values(), averaged.state_dict().values(), strict=True):
        held = ours.clone()
        ours.data.copy_(theirs.data)
        theirs.data.copy_(held)


def add(tensor, rows):
    with torch.no_grad():
        tensor[rows] += 1


MOVERS = {
    "one row of a weight": lambda model, dead: add(model.conv2.weight, dead["conv2"][-1:]),
    "behind autograd's back": lambda model, _: model.conv2.weight.data.add_(0.01),
    "a new tensor": lambda model, _: setattr(model.conv2.weight, "data", model.conv2.weight + 1),
    "a bias": lambda model, dead: add(model.conv2.bias, dead["conv2"]),
    "a norm": lambda model, dead: add(model.norm2.bias, dead["conv2"]),
    "nan": lambda model, _: model.conv2.weight.data.mul_(float("nan")),
}


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("mover", MOVERS)
def test_whoever_moves_dropped_filters_is_noticed_and_they_are_set_to_zero_again(mover, compact):
    model, _, cycle, drop = to_the_drop("SGD", compact=compact, sub=4)
    MOVERS[mover](model, drop.filters)
    layer = "norm2" if mover == "a norm" else "conv2"
    with pytest.warns(
        UserWarning, match=rf"dropped filters of '{layer}' held other values than 0: something"
    ):
        cycle.step()
    for tensor in (model.conv2.weight, model.conv2.bias, model.norm2.weight, model.norm2.bias):
        assert not tensor[drop.filters["conv2"]].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cycle.step()


def test_old_averages_swapped_in_are_noticed_at_the_first_evaluation_and_at_a_step():
    averaged = optim.swa_utils.AveragedModel
    model, _, cycle, _ = to_the_drop("SGD", sub=4)
    model.eval()(X)
    old = averaged(build())
    swap(model, old.module)
    model.train()(X)
    message = r"dropped filters of 'conv2'.* other values than 0 in an evaluation"
    with pytest.warns(UserWarning, match=message):
        model.eval()(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)  # it has been said
        swap(model, old.module)
        assert is_dead(model, cycle)
        model.train()(X)
        model.eval()(X)
        cycle.step()
    swap(model, old.module)
    with pytest.warns(UserWarning, match="held other values than 0"):
        cycle.step()


def test_many_layers_are_named_in_short(make_net):
    model = make_net((6, 8, 8, 8, 8))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    cycle = repr_on(model, optimizer, full=1, scope="layer")
    cycle.step()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(1)
    with pytest.warns(UserWarning, match=r"filters of 'conv2', 'norm2', 'conv3' and 5 more held"):
        cycle.step()


class Unseen(optim.Optimizer):
    """An optimizer whose steps are those of another one."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        raise AssertionError


def test_an_optimizer_whose_steps_are_never_seen_is_noticed():
    model = build()
    real = optim.SGD(model.parameters(), lr=0.1)
    cycle = repr_on(model, Unseen(model.parameters()), full=1, sub=4)
    cycle.step()
    F.cross_entropy(model(X), torch.arange(8) % 4).backward()
    real.step()
    with pytest.warns(UserWarning, match="no step of Unseen was seen since filters were dropped"):
        cycle.step()


def test_pauses_skipped_steps_accumulated_gradients_and_loaded_states_raise_no_alarm():
    model, optimizer, cycle, _ = to_the_drop("SGD", sub=6)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), cycle.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cycle.step()  # nothing is trained
        F.cross_entropy(model(X), torch.arange(8) % 4).backward()
        cycle.step()  # gradients are gathered, and no step is made
        other = build(seed=3)
        resumed_optimizer = ALL["SGD"](other)
        resumed = repr_on(other, resumed_optimizer, sub=6)
        resumed.load_state_dict(state[2])
        other.load_state_dict(state[0])
        resumed_optimizer.load_state_dict(state[1])
        resumed.step()
        assert is_dead(other, resumed)


def test_the_inner_optimizer_of_a_lookahead_is_the_wrong_one_and_the_warning_says_so():
    model = build()
    outer = optimizers.Lookahead(optim.SGD(model.parameters(), lr=0.05), k=1)
    cycle = repr_on(model, outer.optimizer, full=1, sub=2)
    train(model, outer, cycle, 1)
    cycle.step()
    F.cross_entropy(model(X), torch.arange(8) % 4).backward()
    outer.step()
    with pytest.warns(UserWarning, match="give RePr the outer one"):
        cycle.step()
