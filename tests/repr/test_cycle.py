import copy
import gc
import json
import math
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regrow.criteria.score import score
from regrow.criteria.select import select
from regrow.repr.cycle import Event, RePr
from regrow.surgery.plan import CutPlan
from regrow.surgery.planning import Planned
from regrow.surgery.removal import Removal

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SHORT = {"full": 2, "sub": 2, "cycles": 2}


def build(seed=0, filters=(6, 8, 8)):
    """conv1, norm1, conv2, norm2, conv3, norm3, head."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    channels = 3
    for i, width in enumerate(filters, 1):
        model.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=1))
        model.add_module(f"norm{i}", nn.BatchNorm2d(width))
        model.add_module(f"relu{i}", nn.ReLU())
        channels = width
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(channels, 4))
    return model


def sgd(model, **settings):
    return torch.optim.SGD(
        model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **settings}
    )


def repr_on(model, optimizer=None, **settings):
    return RePr(
        model, optimizer or sgd(model), **{"example_inputs": X[:1], "fraction": 0.3, **SHORT, **settings}
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def fit(model, optimizer, step=0):
    x, y = batch(step)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def run(model, optimizer, cycle, steps, start=0):
    events = []
    for step in range(start, start + steps):
        fit(model, optimizer, step)
        events.append(cycle.step())
    return events


def is_dead(model, cycle):
    return all(not model.get_submodule(name).weight[~mask].any() for name, mask in cycle.keep.items())


# --- the schedule --------------------------------------------------------------------------------------


def test_the_schedule_by_hand():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=3, sub=2, cycles=2)
    seen, phases = [], [cycle.phase]
    for event in (run(model, optimizer, cycle, 1)[0] for _ in range(12)):
        seen.append(event and (event.kind, event.step, event.cycle))
        phases.append(cycle.phase)
    assert seen == [
        None, None, ("drop", 3, 1), None, ("restore", 5, 1),
        None, None, ("drop", 8, 2), None, ("restore", 10, 2), None, None,
    ]  # fmt: skip
    assert phases == ["full"] * 3 + ["sub"] * 2 + ["full"] * 3 + ["sub"] * 2 + ["done"] * 3


def test_lengths_of_one_step():
    model = build()
    optimizer = sgd(model)
    events = run(model, optimizer, repr_on(model, optimizer, full=1, sub=1, cycles=1), 3)
    assert [event and event.kind for event in events] == ["drop", "restore", None]


def test_steps_count_alike_without_any_training_between():
    cycle = repr_on(build())
    assert [bool(cycle.step()) for _ in range(9)] == [False, True, False, True] * 2 + [False]


def test_events_say_what_was_dropped_and_survive_json():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    fit(model, optimizer)
    cycle.step()
    fit(model, optimizer)
    expected = select(score(model, "ortho", exclude=["conv1"]), 0.3)
    drop = cycle.step()
    assert drop.filters == {n: (~m).nonzero().flatten().tolist() for n, m in expected.items() if not m.all()}
    assert sum(map(len, drop.filters.values())) == 5  # 30 % of the 16 behind the first convolution
    assert all(torch.equal(cycle.keep[name], expected[name]) for name in expected)
    assert set(cycle.keep) == {"conv2", "conv3"}
    cycle.step()
    restore = cycle.step()
    assert restore.filters == drop.filters
    assert all(mask.all() for mask in cycle.keep.values())
    for event in (drop, restore):
        assert Event(**json.loads(json.dumps(event.to_dict()))) == event


def test_restore_says_which_layers_had_no_room():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    cycle = repr_on(model)
    events = [cycle.step() for _ in range(4)]
    assert events[3].least_covered == ["1"]


def test_a_fraction_of_zero_drops_nothing():
    model = build()
    cycle = repr_on(model, fraction=0)
    before = copy.deepcopy(model.state_dict())
    events = [cycle.step() for _ in range(8)]
    assert [event and event.filters for event in events] == [None, {}] * 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("criterion", ["ortho", "ortho-corrected", "l1", "l2", "random"])
def test_every_criterion_runs_and_its_drops_follow_from_the_seed(criterion):
    def drops(seed):
        model = build()
        optimizer = sgd(model)
        events = run(model, optimizer, repr_on(model, optimizer, criterion=criterion, seed=seed), 8)
        return [event.filters for event in events if event and event.kind == "drop"]

    assert drops(3) == drops(3)
    if criterion == "random":
        assert drops(3) != drops(4)
        assert drops(3)[0] != drops(3)[1]


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator_does():
    def weights(seed, noise):
        model = build()
        cycle = repr_on(model, consumers="init", seed=seed)
        for _ in range(8):
            torch.randn(noise)
            cycle.step()
        return model.state_dict()

    one, same, other = weights(1, 1), weights(1, 5), weights(2, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv2.weight"], other["conv2.weight"])


# --- which layers ----------------------------------------------------------------------------------------


def test_scope_layer_and_floor():
    cycle = repr_on(build(), fraction=0.25, scope="layer")
    cycle.step()
    assert {name: len(indices) for name, indices in cycle.step().filters.items()} == {"conv2": 2, "conv3": 2}
    cycle = repr_on(build(), fraction=0.9, floor=0.5)
    cycle.step()
    with pytest.warns(UserWarning, match=r"floor=0\.5 leaves 8 of the 14"):
        event = cycle.step()
    assert {name: len(indices) for name, indices in event.filters.items()} == {"conv2": 4, "conv3": 4}
    assert event.notes[0].startswith("floor=0.5 leaves 8 of the 14")


def test_exclude_by_name_and_by_container():
    assert set(repr_on(build(), exclude=["conv2"]).keep) == {"conv3"}
    assert set(repr_on(build(), exclude="conv2").keep) == {"conv3"}
    nested = nn.Sequential(
        build()[:3], build(filters=(8,))[:0], nn.Conv2d(6, 4, 1), build()[-3:-1], nn.Linear(4, 4)
    )
    cycle = repr_on(nested, exclude=["0"], skip_first=False)
    assert set(cycle.keep) == {"2"}
    assert cycle.left_out["0.conv1"] == "excluded by name"


def test_the_first_convolution_is_the_first_to_run_and_not_the_first_registered():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.last, self.middle, self.stem = nn.Conv2d(5, 6, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.head(self.last(self.middle(self.stem(x))).mean((2, 3)))

    cycle = repr_on(Backwards())
    assert set(cycle.keep) == {"middle", "last"}
    assert cycle.left_out == {"stem": "the first convolution (skip_first=False takes it in)"}
    assert set(repr_on(Backwards(), skip_first=False).keep) == {"stem", "middle", "last"}


def test_left_out_says_why():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.frozen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1).requires_grad_(False)
            self.depthwise, self.a, self.norm = (
                nn.Conv2d(4, 4, 1, groups=4),
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
            )
            self.b, self.group = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4, affine=False)
            self.free, self.out, self.unused = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 4, 1)
            self.norm.requires_grad_(False)

        def forward(self, x):
            x = self.norm(self.a(self.depthwise(self.frozen(self.stem(x)))))
            return self.out(self.free(self.group(self.b(x)))).mean((2, 3))

    cycle = repr_on(Odd())
    assert set(cycle.keep) == {"free"}
    reasons = {name: reason for name, reason in cycle.left_out.items() if name != "stem"}
    words = {
        "frozen": "its weight is frozen",
        "depthwise": "grouped",
        "a": "the norm behind it, 'norm', is frozen",
        "b": "'group' behind it cannot be silenced for its channels alone",
        "out": "its filters are the network's output",
        "unused": "example_inputs do not reach it",
    }
    assert set(reasons) == set(words)
    for name, reason in reasons.items():
        assert words[name] in reason


def test_a_frozen_consumer_is_never_written():
    model = build()
    model.conv3.requires_grad_(False)
    before = model.conv3.weight.clone()
    cycle = repr_on(model, sgd(model), consumers="zero", scope="layer")
    events = [cycle.step() for _ in range(4)]
    assert list(events[3].filters) == ["conv2"]
    assert torch.equal(model.conv3.weight, before)
    assert events[3].notes == []  # the norm in front hides the channels
    assert not model.norm2.weight[events[3].filters["conv2"]].any()


# --- what it leaves alone --------------------------------------------------------------------------------


def hooks(model, optimizer):
    return (
        len(optimizer._optimizer_step_post_hooks)
        + len(optimizer._optimizer_step_pre_hooks)
        + sum(len(p._backward_hooks or ()) for p in model.parameters())
        + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    )


def test_state_dict_keys_parameters_and_modes_of_the_model_never_change():
    model = build().eval()
    optimizer = sgd(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    cycle = repr_on(model, optimizer)
    for step in range(10):
        fit(model, optimizer, step)
        cycle.step()
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert not model.training
    assert hooks(model, optimizer) == 0


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_remove_leaves_a_plain_model_and_optimizer(steps):
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, steps)
    dead = cycle.keep
    cycle.remove()
    assert hooks(model, optimizer) == 0
    assert type(model.conv2) is nn.Conv2d
    assert all(mask.all() for mask in cycle.keep.values())
    with torch.no_grad():
        for name, mask in dead.items():
            model.get_submodule(name).weight[~mask] = 1
    fit(model, optimizer, 9)
    assert all(model.get_submodule(name).weight.flatten(1).any(1).all() for name in dead)
    for call in (cycle.step, lambda: cycle.load_state_dict(cycle.state_dict())):
        with pytest.raises(ValueError, match="has been removed"):
            call()
    assert hooks(model, optimizer) == 0


def test_a_copy_made_in_the_sub_phase_is_a_model_like_any_other():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, 3)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(X), model(X))
    twin_optimizer = sgd(twin)
    fit(twin, twin_optimizer, 4)
    assert hooks(twin, twin_optimizer) == 0
    assert is_dead(model, cycle)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.eval()(X), model.eval()(X))


# --- exact resume ----------------------------------------------------------------------------------------

STEPS = 10
OPTIMIZERS = {
    "sgd": sgd,
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
}


def start(kind, seed=0, **settings):
    model = build(seed)
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, repr_on(model, optimizer, **settings)


def save(path, model, optimizer, cycle):
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cycle": cycle.state_dict()}
    torch.save(states, path)


def load(path, model, optimizer, cycle, order):
    states = torch.load(path, weights_only=True)
    for name in order.split("-"):
        {"model": model, "optimizer": optimizer, "cycle": cycle}[name].load_state_dict(states[name])


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("consumers", ["keep", "init"])
@pytest.mark.parametrize("order", ["model-optimizer-cycle", "cycle-model-optimizer", "optimizer-cycle-model"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_stopped_anywhere_ends_at_the_same_bits(tmp_path, kind, order, consumers):
    model, optimizer, cycle = start(kind, consumers=consumers)
    for stop in range(STEPS):
        save(tmp_path / f"{stop}.pt", model, optimizer, cycle)
        run(model, optimizer, cycle, 1, start=stop)
    expected = model.state_dict()

    for stop in range(STEPS):
        again, optimizer, cycle = start(kind, seed=99, consumers=consumers)
        load(tmp_path / f"{stop}.pt", again, optimizer, cycle, order)
        run(again, optimizer, cycle, STEPS - stop, start=stop)
        assert same_weights(again.state_dict(), expected), stop
        assert hooks(again, optimizer) == 0


def test_a_run_goes_on_in_a_new_process(tmp_path):
    model, optimizer, cycle = start("adam")
    run(model, optimizer, cycle, 3)
    assert cycle.phase == "sub"
    save(tmp_path / "checkpoint.pt", model, optimizer, cycle)
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True)
    run(model, optimizer, cycle, STEPS - 3, start=3)
    assert same_weights(torch.load(tmp_path / "end.pt", weights_only=True), model.state_dict())


def go_on(folder):
    torch.set_num_threads(1)
    model, optimizer, cycle = start("adam", seed=99)
    load(f"{folder}/checkpoint.pt", model, optimizer, cycle, "cycle-model-optimizer")
    run(model, optimizer, cycle, STEPS - 3, start=3)
    torch.save(model.state_dict(), f"{folder}/end.pt")


def test_loading_over_a_running_sub_phase_replaces_it():
    model, optimizer, cycle = start("sgd")
    early = copy.deepcopy(cycle.state_dict()), copy.deepcopy(model.state_dict())
    run(model, optimizer, cycle, 3)
    late = copy.deepcopy(cycle.state_dict()), copy.deepcopy(model.state_dict())
    for _ in range(2):
        cycle.load_state_dict(early[0])
        model.load_state_dict(early[1])
        assert cycle.phase == "full"
        assert hooks(model, optimizer) == 0
        cycle.load_state_dict(late[0])
        model.load_state_dict(late[1])
        assert cycle.phase == "sub"
        assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_state_is_a_copy():
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 2)
    state = cycle.state_dict()
    before = copy.deepcopy(state)
    run(model, optimizer, cycle, 3, start=2)
    assert state["step"] == before["step"] == 2
    assert all(
        torch.equal(t, before["sub_phase"]["old_rows"][n]) for n, t in state["sub_phase"]["old_rows"].items()
    )


def test_states_that_do_not_fit_are_refused_and_nothing_changes():
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 3)
    state = cycle.state_dict()
    wide, wide_optimizer = build(filters=(6, 10, 8)), None
    wide_optimizer = sgd(wide)
    other = start("sgd")
    for (target, target_optimizer, repr_), changed, message in (
        (other, {"version": 2}, "reads RePr states of version 1, got 2"),
        (other, {"settings": {**state["settings"], "fraction": 0.5}}, r"fraction=0\.5 \(here 0\.3\)"),
        (other, {"settings": {}}, r"other settings: fraction=None \(here 0\.3\)"),
        ((wide, wide_optimizer, repr_on(wide, wide_optimizer)), {}, "does not fit 'conv"),
    ):
        before = copy.deepcopy((target.state_dict(), repr_.state_dict()))
        with pytest.raises(ValueError, match=message):
            repr_.load_state_dict({**state, **changed})
        assert same_weights(target.state_dict(), before[0])
        assert repr_.state_dict() == before[1]
        assert hooks(target, target_optimizer) == 0
    with pytest.raises(ValueError, match="not a state of RePr: sub_phase, version missing"):
        other[2].load_state_dict({k: v for k, v in state.items() if k not in ("version", "sub_phase")})


# --- the learning rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "warns"), [(0.1, False), (0.01, False), (0.0099, True), (0.0, True)])
def test_a_restore_at_a_rate_too_low_to_heal_warns(rate, warns):
    model = build()
    optimizer = sgd(model, lr=0.1)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, 3)
    optimizer.param_groups[0]["lr"] = rate
    if warns:
        with pytest.warns(
            UserWarning, match=r"filters are restored at a learning rate of .*highest so far \(0\.1\)"
        ):
            assert cycle.step().kind == "restore"
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cycle.step().kind == "restore"


def test_a_warning_turned_into_an_error_changes_nothing():
    model = build()
    optimizer = sgd(model, lr=0.1)
    cycle = repr_on(model, optimizer)
    cycle.step()
    optimizer.param_groups[0]["lr"] = 0.001
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="filters are dropped at a learning rate"):
            cycle.step()
    assert same_weights(model.state_dict(), before)
    assert hooks(model, optimizer) == 0
    optimizer.param_groups[0]["lr"] = 0.1
    assert cycle.step().step == 2


def test_the_highest_rate_is_that_of_any_group_and_outlives_a_resume():
    model = build()
    groups = [{"params": list(model[:6].parameters()), "lr": 0.001}, {"params": list(model[6:].parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    cycle = repr_on(model, optimizer)
    cycle.step()
    state = cycle.state_dict()
    optimizer.param_groups[1]["lr"] = 0.001
    resumed = repr_on(model, optimizer)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"rate of 0\.001, far below the highest so far \(0\.1\)"):
        resumed.step()


def test_a_scheduler_on_the_optimizer_is_no_obstacle():
    model = build()
    optimizer = sgd(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.05, 0.1, step_size_up=2)
    cycle = repr_on(model, optimizer)
    for step in range(8):
        fit(model, optimizer, step)
        scheduler.step()
        cycle.step()
        assert is_dead(model, cycle)


# --- bad input ---------------------------------------------------------------------------------------------


def stranger(_model):
    return {"optimizer": sgd(build())}


def partial(model):
    return {"optimizer": torch.optim.SGD([p for p in model.parameters() if p.dim() == 4], lr=0.1)}


def wrapped(model):
    class Wrapper(torch.optim.Optimizer):  # as Accelerate's: no hooks of its own
        def __init__(self, optimizer):
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    return {"optimizer": Wrapper(sgd(model))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": -0.1}, r"0 <= fraction < 1, got -0\.1\. For 30 % write fraction=0\.3"),
        ({"fraction": 1.0}, r"0 <= fraction < 1, got 1\.0"),
        ({"fraction": math.nan}, "0 <= fraction < 1, got nan"),
        ({"fraction": "0.3"}, r"0 <= fraction < 1, got '0\.3'"),
        ({"full": 0}, "full must be a whole number of at least 1, got 0"),
        ({"sub": 0}, "sub must be a whole number of at least 1, got 0"),
        ({"cycles": 0}, "cycles must be a whole number of at least 1, got 0"),
        ({"full": True}, "full must be a whole number of at least 1, got True"),
        ({"sub": 1.5}, r"sub must be a whole number of at least 1, got 1\.5"),
        ({"floor": -1}, "0 <= floor <= 1, got -1"),
        ({"scope": "layers"}, "unknown scope 'layers'; did you mean 'layer'"),
        ({"criterion": "orto"}, "unknown criterion 'orto'; did you mean 'ortho'"),
        ({"consumers": "kept"}, "unknown choice consumers='kept'; did you mean 'keep'"),
        ({"compact": 1}, "compact must be True or False, got 1"),
        ({"seed": 0.5}, r"seed must be a whole number, got 0\.5"),
        ({"exclude": ["conv22"]}, "no convolution is named 'conv22'; did you mean 'conv2'"),
        ({"exclude": ["conv2", "conv3"]}, r"no convolution is left.*skip_first=False"),
        ({"exclude": ["conv1", "conv2", "conv3"]}, r"the model has 3, 3 are excluded\. Exclude fewer"),
        ({"example_inputs": None}, r"example_inputs is needed .* such as x\[:1\]"),
        ({"example_inputs": X[:, :2]}, r"forward pass fails on example_inputs.*x\[:1\]"),
        ({"optimizer": "sgd"}, r"optimizer must be a torch\.optim\.Optimizer, got str"),
        (stranger, r"the optimizer does not hold 'conv2\.weight', 'conv2\.bias', 'norm2\.weight' and 5 more"),
        (partial, r"the optimizer does not hold 'conv2\.bias', 'norm2\.weight', 'norm2\.bias' and 3 more"),
        (wrapped, r"Wrapper wraps an optimizer .* such as optimizer\.optimizer"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(settings, message):
    model = build()
    optimizer = sgd(model)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    given = settings(model) if callable(settings) else settings
    with pytest.raises(ValueError, match=message):
        repr_on(
            model, given.get("optimizer", optimizer), **{k: v for k, v in given.items() if k != "optimizer"}
        )
    assert same_weights(model.state_dict(), before)
    assert hooks(model, optimizer) == 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)


def test_models_there_is_nothing_to_do_on():
    class FullyShardedDataParallel(nn.Sequential):
        pass

    grouped = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.LazyLinear(4)
    )
    grouped(X)
    for model, message in (
        (grouped, "the model has 2, 0 are excluded, and these cannot be used: 0: grouped"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "the model has 0"),
        (build().requires_grad_(False), "its weight is frozen"),
        (FullyShardedDataParallel(build()), "use DDP instead of FSDP"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "its filters are the network's output"),
    ):
        optimizer = sgd(model)
        with pytest.raises(ValueError, match=message):
            repr_on(model, optimizer)
        assert hooks(model, optimizer) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_weights_are_refused_at_construction_drop_and_restore_and_the_step_is_not_counted(bad):
    model = build()
    optimizer = sgd(model)

    def refused(call):
        good = model.conv2.weight.detach().clone()
        model.conv2.weight.data[0, 0, 0, 0] = bad
        before, held = copy.deepcopy(model.state_dict()), hooks(model, optimizer)
        with pytest.raises(ValueError, match=r"'conv2' holds NaN or infinite weights.*last good state"):
            call()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
        assert hooks(model, optimizer) == held
        model.conv2.weight.data.copy_(good)

    refused(lambda: repr_on(model, optimizer))
    cycle = repr_on(model, optimizer, scope="layer")
    assert cycle.step() is None
    refused(cycle.step)
    assert (cycle.state_dict()["step"], cycle.phase) == (1, "full")
    assert cycle.step().step == 2
    assert cycle.step() is None
    refused(cycle.step)
    assert (cycle.state_dict()["step"], cycle.phase) == (3, "sub")
    assert is_dead(model, cycle)
    event = cycle.step()
    assert (event.kind, event.step) == ("restore", 4)


# --- what users do ------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["ddp", "compiled", "ddp-compiled", "compiled-ddp"])
def test_wrapped_models_train_alike_and_their_states_fit_plain_ones(order):
    plain, plain_optimizer, plain_cycle = start("sgd")
    run(plain, plain_optimizer, plain_cycle, STEPS)

    inner, optimizer, _ = start("sgd")
    model = inner
    for wrapper in order.split("-"):
        if wrapper == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            model = torch.compile(model, backend="eager")
    cycle = repr_on(model, optimizer)
    assert set(cycle.keep) == {"conv2", "conv3"}
    run(model, optimizer, cycle, 3)
    assert is_dead(inner, cycle)
    states = copy.deepcopy((inner.state_dict(), optimizer.state_dict(), cycle.state_dict()))
    run(model, optimizer, cycle, STEPS - 3, start=3)
    assert same_weights(inner.state_dict(), plain.state_dict())

    unwrapped, optimizer, cycle = start("sgd", seed=99)
    for part, state in zip((unwrapped, optimizer, cycle), states, strict=True):
        part.load_state_dict(state)
    run(unwrapped, optimizer, cycle, STEPS - 3, start=3)
    assert same_weights(unwrapped.state_dict(), plain.state_dict())


def test_gradient_accumulation_with_a_drop_in_the_middle():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=3, sub=3)
    for step in range(12):  # one optimizer step for every two batches
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
        cycle.step()
        assert is_dead(model, cycle)
        for name, mask in cycle.keep.items():
            grad = model.get_submodule(name).weight.grad
            assert grad is None or not grad[~mask].any()


def test_scaled_gradients_and_skipped_steps():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=100)
    skipped = 0
    for step in range(8):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        cycle.step()
        assert is_dead(model, cycle)
    assert skipped > 0
    assert cycle.phase == "done"


def test_bfloat16():
    model = build().bfloat16()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, example_inputs=X[:1].bfloat16())
    for _ in range(8):
        optimizer.zero_grad()
        model(X.bfloat16()).float().square().mean().backward()
        optimizer.step()
        event = cycle.step()
        assert is_dead(model, cycle)
        if event and event.kind == "restore":
            for name, indices in event.filters.items():
                weight = model.get_submodule(name).weight.detach().float().flatten(1)
                unit = F.normalize(weight)
                cosines = (unit @ unit.T).fill_diagonal_(0)[indices].abs()
                assert cosines.max() < 0.01  # what eight bits of mantissa leave
    assert cycle.phase == "done"


def test_a_model_that_changes_its_type_in_the_sub_phase():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, 3)
    model.double()
    optimizer.zero_grad()
    model(X.double()).square().mean().backward()
    optimizer.step()
    assert is_dead(model, cycle)
    assert cycle.step().kind == "restore"
    assert model.conv2.weight.dtype == torch.float64


def test_two_optimizers_are_refused_and_frozen_norms_are_not():
    model = build()
    convs = [p for name, p in model.named_parameters() if "conv" in name]
    with pytest.raises(ValueError, match=r"does not hold 'norm2\.weight'"):
        repr_on(model, sgd(model).__class__(convs, lr=0.1))
    for norm in (model.norm1, model.norm2):
        norm.requires_grad_(False)
    assert set(repr_on(model, sgd(model)).keep) == {"conv3"}


def test_weight_norm_layers_are_left_alone_and_what_they_read_is_not_touched():
    model = build()
    nn.utils.parametrizations.weight_norm(model.conv2)
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, skip_first=False, consumers="zero", scope="layer")
    assert set(cycle.keep) == {"conv1", "conv3"}
    before = model.conv2.weight.detach().clone()
    events = [cycle.step() for _ in range(4)]
    assert set(events[3].filters) == {"conv1", "conv3"}
    assert torch.equal(model.conv2.weight, before)


def test_a_model_used_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, x):
            x = checkpoint(self.net[:6], x, use_reentrant=False)
            return self.net[6:](x)

    model = Checkpointed()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    for step in range(8):
        fit(model, optimizer, step)
        cycle.step()
        assert is_dead(model, cycle)
    assert cycle.phase == "done"


# --- computing without what is dropped ---------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))
        return self.head(x.mean((2, 3)))


def separable():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def start_on(net, kind, **settings):
    torch.manual_seed(0)
    model = net()
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, repr_on(model, optimizer, full=2, sub=4, skip_first=False, **settings)


def widths(model, x=X):
    """How many channels each convolution emits."""
    seen = {}

    def note(name):
        return lambda _module, _inputs, output: seen.update({name: output.shape[1]})

    handles = [
        layer.register_forward_hook(note(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        copy_of_mode = model.training
        model.eval()(x)
        model.train(copy_of_mode)
    for handle in handles:
        handle.remove()
    return seen


def losses(model, optimizer, cycle, steps):
    seen, events = [], []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
        events.append(cycle.step())
    return seen, [event for event in events if event]


@pytest.mark.parametrize("net", [build, Residual, separable])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_compact_and_masked_are_the_same_run(kind, net):
    ours, events = losses(*start_on(net, kind), steps=12)
    theirs, expected = losses(*start_on(net, kind, compact=False), steps=12)
    assert [event.filters for event in events] == [event.filters for event in expected]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_compact_computes_the_kept_filters_alone():
    model, optimizer, cycle = start_on(build, "sgd")
    whole = widths(model)
    assert whole == {"conv1": 6, "conv2": 8, "conv3": 8}
    _, (drop,) = losses(model, optimizer, cycle, 2)
    assert widths(model) == {name: whole[name] - len(drop.filters.get(name, ())) for name in whole}
    assert sum(widths(model).values()) == 22 - 7
    losses(model, optimizer, cycle, 4)
    assert cycle.phase == "full"
    assert widths(model) == whole

    masked, *rest = start_on(build, "sgd", compact=False)
    losses(masked, *rest, steps=3)
    assert widths(masked) == whole

    model, *rest = start_on(Residual, "sgd")
    _, (drop,) = losses(model, *rest, steps=3)
    assert drop.filters.keys() & {"stem", "b"}  # into the residual stream
    assert widths(model) == {name: 8 - len(drop.filters.get(name, ())) for name in ("stem", "a", "b")}


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Identity])
def test_data_parallel_is_masked_and_the_event_says_so(wrap):
    model = build()
    optimizer = sgd(model)
    wrapped = nn.DataParallel(model) if wrap is nn.DataParallel else model
    cycle = repr_on(wrapped, optimizer)
    notes = [note for event in run(model, optimizer, cycle, 3) if event for note in event.notes]
    assert any("use DistributedDataParallel" in note for note in notes) == (wrap is nn.DataParallel)
    assert (widths(model) == {"conv1": 6, "conv2": 8, "conv3": 8}) == (wrap is nn.DataParallel)
    assert is_dead(model, cycle)


def test_what_cannot_be_planned_is_masked_and_the_event_says_so():
    class Remembers(nn.Sequential):
        def forward(self, x):
            self.seen = super().forward(x)  # a tensor with a graph cannot be copied
            return self.seen

    model = Remembers(OrderedDict(build().named_children()))
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    fit(model, optimizer)
    cycle.step()
    fit(model, optimizer)
    (note,) = cycle.step().notes
    assert note.startswith(
        "all dropped filters are computed and held at 0, for no plan could be made: Only T"
    )
    fit(model, optimizer)
    assert is_dead(model, cycle)
    assert widths(model) == {"conv1": 6, "conv2": 8, "conv3": 8}


def test_depthwise_rows_go_on_behind_a_dropped_channel():
    model, *rest = start_on(separable, "sgd", scope="layer")
    _, (drop,) = losses(model, *rest, steps=2)
    assert drop.notes == []
    assert widths(model) == {"0": 6, "3": 8, "6": 6}  # the norm behind 0 places six among eight


def test_a_layer_that_goes_on_computing_its_dropped_filters_is_named(monkeypatch):
    def plan_nothing(*_arguments, **_settings):
        return Planned(Removal({}, {}, {}), CutPlan(masked={"conv2": "it is a test"}))

    monkeypatch.setattr("regrow.repr.cycle.plan_removal_and_cut", plan_nothing)
    model, *rest = start_on(build, "sgd")
    _, (drop,) = losses(model, *rest, steps=2)
    assert drop.notes == ["conv2: its dropped filters are computed and held at 0, because it is a test."]


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True), (None, True)])
def test_a_state_goes_on_compact_or_masked_as_the_one_that_loads_it(tmp_path, saved, loaded):
    model, optimizer, cycle = start("sgd", compact=saved is not False)
    run(model, optimizer, cycle, 3)
    save(tmp_path / "state.pt", model, optimizer, cycle)
    if saved is None:  # a state from before there were plans, and silent norms
        states = torch.load(tmp_path / "state.pt", weights_only=True)
        for key in ("plan", "silenced", "old_norms"):
            del states["cycle"]["sub_phase"][key]
        torch.save(states, tmp_path / "state.pt")
    again, again_optimizer, again_cycle = start("sgd", seed=99, compact=loaded)
    load(tmp_path / "state.pt", again, again_optimizer, again_cycle, "cycle-model-optimizer")
    torch.testing.assert_close(again.eval()(X), model.eval()(X))
    assert (widths(again) == {"conv1": 6, "conv2": 8, "conv3": 8}) == (not loaded)
    for each in (model, again):
        each.train()
    run(model, optimizer, cycle, 5, start=3)
    run(again, again_optimizer, again_cycle, 5, start=3)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_plan_that_does_not_fit_is_refused_and_the_running_phase_goes_on():
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 3)
    state, before = copy.deepcopy(cycle.state_dict()), widths(model)
    state["sub_phase"]["plan"]["rows"]["conv2"] = [0, 99]
    with pytest.raises(ValueError, match="does not fit 'conv2'"):
        cycle.load_state_dict(state)
    assert widths(model) == before
    run(model, optimizer, cycle, 1, start=3)
    assert cycle.phase == "full"


def test_the_user_may_hold_the_last_loss_and_averages_across_every_change():
    model, optimizer, cycle = start_on(build, "sgd", cycles=2)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    held, late = [], None
    for step in range(12):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        optimizer.step()
        averaged.update_parameters(model)
        if step == 3:
            late = copy.deepcopy(model)
        held.append(loss)
        cycle.step()
    assert cycle.phase == "done"
    assert averaged.eval()(X).shape == late(X).shape == (8, 4)
    assert widths(averaged.module) == widths(late) == widths(model) == {"conv1": 6, "conv2": 8, "conv3": 8}
    assert all(loss.grad_fn is not None for loss in held)


def test_a_restore_leaves_what_was_kept_bit_for_bit_as_training_made_it():
    model, optimizer, cycle = start_on(build, "adam", cycles=1)
    losses(model, optimizer, cycle, 5)
    keep, made = cycle.keep, copy.deepcopy(model.state_dict())
    event = cycle.step()
    assert event.kind == "restore"
    for i in (1, 2, 3):
        rows, read = keep[f"conv{i}"], keep.get(f"conv{i - 1}", torch.ones(3, dtype=torch.bool))
        weight, old = model.get_submodule(f"conv{i}").weight, made[f"conv{i}.weight"]
        assert torch.equal(weight[rows][:, read], old[rows][:, read])
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(
                getattr(model.get_submodule(f"norm{i}"), key)[rows], made[f"norm{i}.{key}"][rows]
            )
    assert torch.equal(model.head.weight[:, keep["conv3"]], made["head.weight"][:, keep["conv3"]])


def test_two_processes_stay_together(tmp_path):
    commands = [[sys.executable, __file__, str(tmp_path), str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["widths"] == two["widths"]
    assert sum(one["widths"].values()) == 22 - 7
    assert one["events"] == two["events"]
    assert [event["kind"] for event in one["events"] if event] == ["drop", "restore"]
    for name, tensor in one["model"].items():
        assert "running" in name or torch.equal(tensor, two["model"][name]), name
    for kind in ("drop", "restore"):
        one, two = (torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)


def run_as_one_of_two(folder, rank):
    # Imported once a group is there, its default arguments would hold the group for good: DDP imports it.
    import torch.distributed.nn

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    train_as_one_of_two(folder, rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()
    # A thread of gloo's that still runs when the interpreter ends would now and then abort the process.
    left = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in left if "gloo" in name], left


def train_as_one_of_two(folder, rank):
    model = build()
    optimizer = sgd(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    cycle = RePr(
        wrapped, optimizer, example_inputs=X[:1], full=2, sub=4, cycles=1, skip_first=False, consumers="init"
    )
    seen, events = {}, []
    for step in range(8):
        if cycle.phase == "sub":
            seen = widths(model)
        fit(wrapped, optimizer, 2 * step + rank)
        if rank == 1 and step in (1, 5):
            # As if this process had rounded otherwise, so that it would choose and regrow differently.
            with torch.no_grad():
                model.conv2.weight.copy_(model.conv2.weight.flip(0))
        events.append(cycle.step())
        if events[-1] is not None:
            torch.save(model.state_dict(), f"{folder}/{events[-1].kind}{rank}.pt")
    events = [event and event.to_dict() for event in events]
    check_that_errors_reach_both(model, optimizer, wrapped, rank)
    torch.save({"model": model.state_dict(), "widths": seen, "events": events}, f"{folder}/{rank}.pt")


def check_that_errors_reach_both(model, optimizer, wrapped, rank):
    again = RePr(wrapped, optimizer, example_inputs=X[:1], full=1, sub=1, cycles=1)
    good = model.conv2.weight.detach().clone()
    if rank == 0:
        model.conv2.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="conv2"):
        again.step()
    model.conv2.weight.data.copy_(good)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run_as_one_of_two(sys.argv[1], int(sys.argv[2]))
    else:
        go_on(sys.argv[1])


class Ahead(nn.Module):
    """A stream with norms ahead of the convolutions, the shortcut of the last block behind its norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv1(self.norm1(x).relu())
        y = self.norm2(x).relu()
        return self.head(self.norm3(y + self.conv2(y)).relu().mean((2, 3)))


def ahead(seed=0):
    """The filters 1 of its three convolutions point where filter 0 does: one of each two is dropped."""
    torch.manual_seed(seed)
    model = Ahead()
    with torch.no_grad():
        for conv in (model.stem, model.conv1, model.conv2):
            for i, row in enumerate(torch.eye(conv.weight[0].numel())[:4]):
                conv.weight[i] = row.view_as(conv.weight[i])
            conv.weight[1] = 0.9 * conv.weight[2] + 0.1 * conv.weight[0]
        for norm in (model.norm1, model.norm2, model.norm3):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.2, 0.5)
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def norms_of(model, channel, keys=("weight", "bias", "running_mean", "running_var")):
    return [[getattr(norm, key)[channel].item() for key in keys] for norm in (model.norm2, model.norm3)]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_channel_that_nothing_writes_to_leaves_the_norms_behind_the_sum_for_the_sub_phase(kind, compact):
    model = ahead()
    make = {"sgd": sgd, "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1)}
    optimizer = make[kind](model)
    cycle = repr_on(model, optimizer, fraction=0.25, scope="layer", skip_first=False, compact=compact)
    fit(model, optimizer, 0)
    assert cycle.step() is None
    fit(model, optimizer, 1)
    before = norms_of(model, 1)
    dropped = cycle.step().filters
    assert dropped == {"stem": [1], "conv1": [1], "conv2": [1]}
    assert norms_of(model, 1, ("weight", "bias", "running_mean")) == [[0, 0, 0]] * 2
    others = norms_of(model, 0)
    for step in (2, 3):
        fit(model, optimizer, step)
        assert norms_of(model, 1, ("weight", "bias")) == [[0, 0]] * 2
        model.zero_grad()
        nn.functional.cross_entropy(model(batch(9)[0]), batch(9)[1]).backward()
        assert all(float(p.grad[1]) == 0 for n in (model.norm2, model.norm3) for p in n.parameters())
        event = cycle.step()
    assert event.kind == "restore"
    assert norms_of(model, 1) == before
    assert norms_of(model, 0) != others


def test_a_channel_that_something_still_writes_to_keeps_its_norm():
    model = ahead()
    with torch.no_grad():
        model.conv1.weight[1] = torch.eye(model.conv1.weight[0].numel())[20].view_as(model.conv1.weight[1])
        model.conv1.weight[3] = 0.9 * model.conv1.weight[2]
    cycle = repr_on(model, fraction=0.25, scope="layer", skip_first=False, full=1, sub=1)
    before = norms_of(model, 1)
    dropped = cycle.step().filters
    assert dropped["stem"] == dropped["conv2"] == [1]
    assert dropped["conv1"] != [1]
    assert norms_of(model, 1) == before


def test_the_sub_phase_of_such_a_net_goes_on_from_a_state(tmp_path):
    def begin(seed):
        model = ahead(seed)
        optimizer = sgd(model)
        return model, optimizer, repr_on(model, optimizer, fraction=0.25, scope="layer", skip_first=False)

    model, optimizer, cycle = begin(0)
    for step in range(3):
        fit(model, optimizer, step)
        cycle.step()
    assert cycle.state_dict()["sub_phase"]["silenced"] == {"norm2": [1], "norm3": [1]}
    save(tmp_path / "state.pt", model, optimizer, cycle)
    again, again_optimizer, again_cycle = begin(5)
    load(tmp_path / "state.pt", again, again_optimizer, again_cycle, "cycle-model-optimizer")
    for step in range(3, 6):
        for net, own, repr_ in ((model, optimizer, cycle), (again, again_optimizer, again_cycle)):
            fit(net, own, step)
            repr_.step()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    state = torch.load(tmp_path / "state.pt", weights_only=True)["cycle"]
    state["sub_phase"]["silenced"]["norm2"] = [7]
    with pytest.raises(ValueError, match="'norm2', a norm whose channels it names"):
        again_cycle.load_state_dict(state)


def test_such_a_net_trains_alike_compact_and_masked():
    found = []
    for compact in (True, False):
        model = ahead()
        optimizer = sgd(model)
        cycle = repr_on(model, optimizer, fraction=0.25, scope="layer", skip_first=False, compact=compact)
        for step in range(6):
            fit(model, optimizer, step)
            cycle.step()
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-5)
