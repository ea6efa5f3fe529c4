"""``regrow.restart``: the weakest filters start anew, at once."""

import copy
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import regrow
from cycles import OPTIMIZERS, X, batch, build, fit, hooks, repr_on, run, same_weights, sgd
from nets import Residual, chain
from optimizers import MADGRAD, ScheduleFreeSGD
from regrow.criteria.select import select

pytestmark = pytest.mark.devices
WEAK = {"conv2": [1, 4], "conv3": [0, 2, 7]}  # 5 of 16 filters, which is what fraction=0.3 asks for
KEPT = {name: [i for i in range(8) if i not in those] for name, those in WEAK.items()}


def weak_net(optimizer=sgd, **made):
    """A net whose filters in ``WEAK`` are the shortest of their layers, after a few steps."""
    torch.manual_seed(0)
    model = chain((6, 8, 8), **made)
    used = optimizer(model)
    for step in range(3):
        fit(model, used, step)
    with torch.no_grad():
        for name, filters in WEAK.items():
            model.get_submodule(name).weight[filters] *= 1e-3
    return model, used


def restart(model, optimizer, **given):
    return regrow.restart(
        model, optimizer, **{"example_inputs": X[:1], "criterion": "l2", "fraction": 0.3, **given}
    )


def without_weak(model):
    """A copy of ``model`` whose filters in ``WEAK`` emit 0."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, filters in WEAK.items():
            norm = silent.get_submodule(name.replace("conv", "norm"))
            for tensor in (*silent.get_submodule(name).parameters(), *norm.parameters(), norm.running_mean):
                tensor[filters] = 0
    return silent


def outputs(model):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(X)


def test_the_record_says_what_started_anew_and_what_was_left_alone():
    model, optimizer = weak_net()
    record = restart(model, optimizer, seed=3)
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "version": 1,
        "kind": "restart",
        "settings": {
            "fraction": 0.3, "criterion": "l2", "consumers": "zero", "rows": "orthogonal", "scope": "global",
            "floor": 0.1, "exclude": [], "skip_first": True, "seed": 3,
        },
        "filters": WEAK,
        "least_covered": [],
        "left_out": {"conv1": "the first convolution (skip_first=False includes it)"},
        "notes": [],
    }  # fmt: skip
    assert hooks(model, optimizer) == 0
    assert not any(name.startswith("_regrow") for module in model.modules() for name in vars(module))


def test_new_rows_are_orthogonal_and_as_long_as_the_kept_ones_are_on_average():
    model, optimizer = weak_net()
    before = copy.deepcopy(model)
    restart(model, optimizer)
    for name, filters in WEAK.items():
        now, old = (each.get_submodule(name).weight.detach().flatten(1) for each in (model, before))
        kept, new = now[KEPT[name]], now[filters]
        assert torch.allclose(new.norm(dim=1), kept.norm(dim=1).mean(), rtol=1e-5)
        others = torch.cat([kept, old[filters] * 1e3])
        assert (new @ others.T).abs().max() < 1e-5
        cosines = new @ new.T / new.norm(dim=1)[0] ** 2
        assert torch.allclose(cosines, torch.eye(len(filters)).to(new), atol=1e-5)


def test_rows_drawn_as_for_a_new_layer_are_uniform_between_the_bounds_of_pytorch():
    torch.manual_seed(0)
    model = chain((6, 64, 64))
    restart(model, sgd(model), rows="init", fraction=0.5, scope="layer", consumers="keep")
    again = chain((6, 64, 64))  # as PyTorch draws it
    for name in ("conv2", "conv3"):
        weight = model.get_submodule(name).weight
        bound = weight[0].numel() ** -0.5
        assert again.get_submodule(name).weight.abs().max() <= bound
        assert 0.98 * bound < weight.abs().max() <= bound
        assert abs(float(weight.detach().std() / (bound / math.sqrt(3))) - 1) < 0.05


def test_all_else_about_new_filters_is_as_if_new_and_the_rest_is_not_touched():
    model, optimizer = weak_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restart(model, optimizer)
    after = model.state_dict()
    for name, filters in WEAK.items():
        norm = name.replace("conv", "norm")
        for key, value in (
            (f"{name}.bias", 0),
            (f"{norm}.weight", 1),
            (f"{norm}.bias", 0),
            (f"{norm}.running_mean", 0),
            (f"{norm}.running_var", 1),
        ):
            assert (after[key][filters] == value).all(), key
            assert torch.equal(after[key][KEPT[name]], before[key][KEPT[name]]), key
    for reader, source in (("conv3", "conv2"), ("head", "conv3")):
        mask = torch.zeros(after[f"{reader}.weight"].shape[:2], dtype=torch.bool)
        mask[:, WEAK[source]] = True
        mask[WEAK.get(reader, [])] = False  # new rows, of which all weights are new
        assert not after[f"{reader}.weight"][mask].any()
    rows = torch.tensor(KEPT["conv3"])[:, None]
    assert torch.equal(
        after["conv3.weight"][rows, KEPT["conv2"]], before["conv3.weight"][rows, KEPT["conv2"]]
    )
    assert torch.equal(after["head.weight"][:, KEPT["conv3"]], before["head.weight"][:, KEPT["conv3"]])
    for name in before:
        if name.startswith(("conv1", "norm1", "head.bias")) or "num_batches" in name:
            assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("rows", ["orthogonal", "init"])
def test_with_consumers_zero_the_net_computes_as_without_the_weak_filters(rows):
    model, optimizer = weak_net()
    expected = outputs(without_weak(model))
    restart(model, optimizer, rows=rows)
    torch.testing.assert_close(outputs(model), expected)
    model.get_submodule("head").weight.data[:, 0] = 1  # the new filters do emit something
    assert not torch.allclose(outputs(model), expected)


def test_consumers_keep_their_weights_or_get_new_ones():
    model, optimizer = weak_net()
    before = model.head.weight.detach().clone()
    other = copy.deepcopy(model)
    other_optimizer = sgd(other)
    restart(model, optimizer, consumers="keep")
    assert torch.equal(model.head.weight, before)
    restart(other, other_optimizer, consumers="init")
    assert torch.equal(other.head.weight[:, KEPT["conv3"]], before[:, KEPT["conv3"]])
    drawn = other.head.weight[:, WEAK["conv3"]]
    assert (drawn != before[:, WEAK["conv3"]]).all()
    assert drawn.abs().max() <= 8**-0.5


def fresh_entries(model):
    """{parameter: mask of the entries that a restart of ``WEAK`` with consumers="zero" writes}."""
    masks = {
        name: torch.zeros(p.shape, dtype=torch.bool, device=p.device) for name, p in model.named_parameters()
    }
    for name, filters in WEAK.items():
        for key in (f"{name}.weight", f"{name}.bias", *(f"norm{name[-1]}.{k}" for k in ("weight", "bias"))):
            masks[key][filters] = True
    masks["conv3.weight"][:, WEAK["conv2"]] = True
    masks["head.weight"][:, WEAK["conv3"]] = True
    return {dict(model.named_parameters())[name]: mask for name, mask in masks.items()}


def slots_before(optimizer):
    return {p: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for p, s in optimizer.state.items()}


def test_momentum_of_new_entries_is_0_and_that_of_all_others_stays():
    model, optimizer = weak_net()
    before = slots_before(optimizer)
    restart(model, optimizer)
    for parameter, mask in fresh_entries(model).items():
        now, then = optimizer.state[parameter]["momentum_buffer"], before[parameter]["momentum_buffer"]
        assert not now[mask].any()
        assert torch.equal(now[~mask], then[~mask])


def test_adam_forgets_first_moments_and_takes_the_mean_of_the_second_ones():
    model, optimizer = weak_net(OPTIMIZERS["adam"])
    before = slots_before(optimizer)
    restart(model, optimizer)
    for parameter, mask in fresh_entries(model).items():
        state, then = optimizer.state[parameter], before[parameter]
        assert not state["exp_avg"][mask].any()
        assert torch.allclose(state["exp_avg_sq"][mask], then["exp_avg_sq"][~mask].mean())
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][~mask], then[key][~mask])


@pytest.mark.parametrize(
    ("build_optimizer", "slot"),
    [
        (lambda model: ScheduleFreeSGD(model.parameters()), "z"),
        (lambda model: MADGRAD(model.parameters()), "x0"),
    ],
)
def test_slots_that_hold_weights_take_the_new_ones(build_optimizer, slot):
    model, optimizer = weak_net(build_optimizer)
    before = slots_before(optimizer)
    record = restart(model, optimizer)
    for parameter, mask in fresh_entries(model).items():
        now = optimizer.state[parameter][slot]
        assert torch.equal(now[mask], parameter[mask])
        assert torch.equal(now[~mask], before[parameter][slot][~mask])
    assert [note for note in record["notes"] if f".{slot} holds copies of the weights" in note]
    lengths = []
    for step in range(40):
        lengths.append(float(model.conv2.weight.detach()[WEAK["conv2"]].norm()))
        fit(model, optimizer, step)
    assert min(lengths) > 0.8 * lengths[0]  # cleared, the slot would pull them to 0


def test_gradients_accumulated_for_old_values_do_not_reach_new_ones():
    model, optimizer = weak_net()
    x, y = batch(9)
    nn.functional.cross_entropy(model(x), y).backward()
    before = {parameter: parameter.grad.clone() for parameter in model.parameters()}
    restart(model, optimizer)
    for parameter, mask in fresh_entries(model).items():
        assert not parameter.grad[mask].any()
        assert torch.equal(parameter.grad[~mask], before[parameter][~mask])


@pytest.mark.parametrize("consumers", ["zero", "keep", "init"])
@pytest.mark.parametrize("rows", ["orthogonal", "init"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_cycle_with_sub_0_writes_what_a_drop_and_a_restore_without_training_write(kind, rows, consumers):
    found = []
    for sub in (0, 1):
        model, optimizer = weak_net(OPTIMIZERS[kind])
        cycle = repr_on(
            model, optimizer, full=1, sub=sub, cycles=1, rows=rows, consumers=consumers, criterion="l2"
        )
        events = [cycle.step() for _ in range(1 + sub)]
        assert cycle.phase == "done"
        found.append((events[-1], model.state_dict(), optimizer.state_dict()["state"]))
    (restarted, weights, slots), (restored, expected, expected_slots) = found
    assert restarted.filters == restored.filters == WEAK
    assert (restarted.kind, restarted.step, restored.step) == ("restart", 1, 2)
    assert same_weights(weights, expected)
    torch.testing.assert_close(slots, expected_slots)


def test_the_output_of_a_residual_net_moves_only_where_a_note_says_so():
    model = Residual(8, 6)
    expected = outputs(model)
    record = restart(model, sgd(model), fraction=0.4, skip_first=False)
    hidden = copy.deepcopy(model)
    with torch.no_grad():
        for name, filters in record["filters"].items():
            hidden.get_submodule(name).weight[filters] = 0
    if not record["notes"]:
        torch.testing.assert_close(outputs(model), outputs(hidden))
    assert outputs(model).isfinite().all()
    assert outputs(model).shape == expected.shape


@settings(max_examples=15, deadline=None)
@given(
    fraction=st.floats(0, 0.99),
    floor=st.floats(0, 1),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_any_fraction_starts_the_filters_anew_that_select_drops(fraction, floor, scope, seed):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = regrow.score(model, "l1", exclude=["conv1"])
        keep = select(scores, fraction, scope=scope, floor=floor)
        record = regrow.restart(
            model, sgd(model), example_inputs=X[:1], criterion="l1", fraction=fraction, floor=floor,
            scope=scope, seed=seed,
        )  # fmt: skip
    expected = {name: (~mask).nonzero().flatten().tolist() for name, mask in keep.items() if not mask.all()}
    assert record["filters"] == expected
    for name in ("conv1", "conv2", "conv3"):
        changed = (model.get_submodule(name).weight != before[f"{name}.weight"]).flatten(2).any(2)
        rows = changed.all(1).nonzero().flatten().tolist()
        assert rows == expected.get(name, [])
    if not expected:
        assert same_weights(model.state_dict(), before)


def test_a_norm_in_front_of_a_frozen_reader_hides_the_new_filters():
    model, optimizer = weak_net()
    model.head.requires_grad_(False)
    expected = outputs(without_weak(model))
    assert restart(model, optimizer)["notes"] == []
    torch.testing.assert_close(outputs(model), expected)
    assert model.norm3.weight[WEAK["conv3"]].abs().max() < 1e-5


@pytest.mark.parametrize("consumers", ["zero", "init"])
def test_the_same_seed_gives_the_same_rows_and_another_one_others(consumers):
    found = []
    for seed in (1, 1, 2):
        model, optimizer = weak_net()
        restart(model, optimizer, seed=seed, consumers=consumers)
        found.append(model.state_dict())
    assert same_weights(found[0], found[1])
    assert not torch.equal(found[0]["conv2.weight"], found[2]["conv2.weight"])


def test_random_numbers_and_modes_stay_as_they_are():
    model, optimizer = weak_net()
    model.norm2.eval()
    state = torch.get_rng_state()
    restart(model, optimizer, criterion="random")
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, module in model.named_modules() if not module.training] == ["norm2"]


def test_a_frozen_reader_keeps_its_weights_and_the_record_says_so():
    model, optimizer = weak_net(norm=lambda _: nn.Identity())
    model.head.requires_grad_(False)
    before = model.head.weight.clone()
    record = restart(model, optimizer)
    assert torch.equal(model.head.weight, before)
    assert record["notes"] == [
        "conv3: the output moves at this restore, because 'head' reads it and is frozen."
    ]


def test_a_warning_says_that_outputs_have_become_much_larger():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 2, bias=False)
    )
    with torch.no_grad():
        model[2].weight[:4] *= 1e-6
        model[2].bias.zero_()
        model[4].weight[:, 64:] = 0
    with pytest.warns(
        UserWarning, match=r"the restart made the largest output .* times as large .*call restart"
    ):
        regrow.restart(
            model, sgd(model), example_inputs=X[:1], criterion="l2", fraction=0.5, consumers="keep"
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fraction": 1.0}, r"0 <= fraction < 1, got 1\.0"),
        ({"floor": -1}, "0 <= floor <= 1, got -1"),
        ({"scope": "layers"}, "unknown scope 'layers'; did you mean 'layer'"),
        ({"criterion": "orto"}, "unknown criterion 'orto'; did you mean 'ortho'"),
        ({"criterion": 3}, "criterion is a name, such as 'ortho', or a function .* got an int"),
        ({"criterion": "taylor"}, "criterion 'taylor' reads pictures: pass batches="),
        ({"batches": X}, r"batches is an iterable of batches, got a tensor .*batches=\[x\]"),
        ({"consumers": "kept"}, "unknown choice consumers='kept'; did you mean 'keep'"),
        ({"rows": "random"}, "unknown choice rows='random'"),
        ({"seed": 0.5}, r"seed must be a whole number of at most 64 bits, got 0\.5"),
        ({"exclude": ["conv22"]}, "no convolution is named 'conv22'; did you mean 'conv2'"),
        ({"exclude": ["conv2", "conv3"]}, r"no convolution is left.*skip_first=False"),
        ({"example_inputs": None}, r"example_inputs .* got None.* such as x\[:1\]"),
        ({"example_inputs": X[:, :2]}, r"forward pass fails on example_inputs.*x\[:1\]"),
        (
            {"optimizer": "sgd"},
            r"restart takes as optimizer a torch\.optim\.Optimizer, and got the text 'sgd'",
        ),
        ({"optimizer": "stranger"}, r"the optimizer does not hold 'conv2\.weight'"),
        ({"model": "resnet18"}, "restart takes a model, an nn.Module, and got the text 'resnet18'"),
        ({"loss": "mse"}, "loss is a function of outputs and labels .*got the text 'mse'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(given, message):
    model, optimizer = weak_net()
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    given = {"model": model, "optimizer": optimizer, "example_inputs": X[:1], **given}
    if given["optimizer"] == "stranger":
        given["optimizer"] = sgd(build())
    with pytest.raises(ValueError, match=message):
        regrow.restart(**given)
    assert same_weights(model.state_dict(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_nan_weights_are_refused_with_their_layer():
    model, optimizer = weak_net()
    with torch.no_grad():
        model.conv3.weight[0] = math.nan
    with pytest.raises(ValueError, match="'conv3' holds NaN or infinite weights"):
        restart(model, optimizer)


def test_under_no_grad_and_inside_of_a_cycle_in_its_full_phase():
    model, optimizer = weak_net()
    cycle = repr_on(model, optimizer, full=3)
    with torch.no_grad():
        assert restart(model, optimizer)["filters"] == WEAK
    events = run(model, optimizer, cycle, 4)
    assert [event.kind for event in events if event] == ["drop"]
    with pytest.raises(
        ValueError, match="restart was refused, because the model computes without its dropped"
    ):
        restart(model, optimizer)


def test_by_default_the_filters_that_are_used_least_start_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 3), nn.ReLU(), nn.Conv2d(10, 2, 3), nn.Flatten(1)
    )
    with torch.no_grad():
        model[2].weight[3] *= 0.1  # the shortest filter, and read as the others are
        model[4].weight[:, 6] = 0  # nothing reads this one
    pictures, other = torch.rand(4, 1, 8, 8), copy.deepcopy(model)
    given = {"example_inputs": pictures[:1], "exclude": ["4"], "seed": 1}
    by_use = regrow.restart(model, sgd(model), batches=[pictures], **given)
    assert (by_use["settings"]["criterion"], by_use["filters"]) == ("utility", {"2": [6]})
    by_length = regrow.restart(other, sgd(other), **given)
    assert (by_length["settings"]["criterion"], by_length["filters"]) == ("l2", {"2": [3]})
