import copy
import gc
import io

import pytest
import torch
from torch import nn

from nets import Drawn
from regrow.marks import states_of
from regrow.restarts.continual import ContinualBackprop
from relatives import OPTIMIZERS, X, net, tensors, train

pytestmark = pytest.mark.devices


def small():
    """Three hidden units and a reader, for inputs of one number."""
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [1], [4]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, -3, 0.25], [1, 3, 0.25]]))
    return model


def sgd(model, rate=0.0):
    return torch.optim.SGD(model.parameters(), rate)


ONE = torch.ones(4, 1)


def test_utilities_ages_and_counts_by_hand():
    model = small()
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE, rate=0.2, maturity=2, decay=0.5)
    model(ONE)
    assert method.step() == {}
    layer = method.state_dict()["layers"]["0"]
    # mean |h| = 2, 1, 4 and Σ |w| = 2, 6, ½: 4, 6, 2, of which a half is new
    assert layer["utility"].tolist() == [2, 3, 1]
    assert layer["age"].tolist() == [1, 1, 1]
    assert layer["count"] == 0  # none is mature
    model(2 * ONE)
    assert method.step() == {}
    layer = method.state_dict()["layers"]["0"]
    assert layer["utility"].tolist() == [2 * 0.5 + 8 * 0.5, 3 * 0.5 + 12 * 0.5, 1 * 0.5 + 4 * 0.5]
    assert method.step() == {}  # age 3: three are mature, 0.6
    assert method.state_dict()["layers"]["0"]["count"] == pytest.approx(0.6)
    before = tensors(model)
    assert method.step() == {"0": [2]}  # 1.2
    layer = method.state_dict()["layers"]["0"]
    assert layer["count"] == pytest.approx(0.2)
    assert layer["age"].tolist() == [4, 4, 0]
    assert layer["utility"][2] == 0
    assert model[2].weight[:, 2].tolist() == [0, 0]
    assert model[0].bias[2] == 0
    assert model[0].weight[2] != before["0.weight"][2]
    assert torch.equal(model[0].weight[:2], before["0.weight"][:2])
    assert torch.equal(model[2].weight[:, :2], before["2.weight"][:, :2])
    # now two are mature: 0.2 + 0.4, 1.0
    assert method.step() == {}
    assert method.step() == {"0": [0]}  # the least of the mature ones, not the new one


def test_a_young_unit_is_not_judged_by_a_running_mean_that_has_just_begun():
    model = small()
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE, rate=1 / 3, maturity=0, decay=0.9)
    model(ONE)
    state = method.state_dict()
    # long ago unit 0 had 4 per step, unit 1 has 6 from now on: 0.6 in the first step, corrected to 6
    state["layers"]["0"]["utility"] = torch.tensor([4.0, 0, 2])
    state["layers"]["0"]["age"] = torch.tensor([1000, 0, 1000])
    method.load_state_dict(state)
    assert method.step() == {"0": [2]}


def plain_loop(model, steps, rate, maturity, decay):
    """The algorithm as the paper writes it, one layer after the other, with hooks on the readers."""
    seen, log = {}, []
    pairs = {"0": "3", "3": "7", "7": "10"}
    for reader in pairs.values():
        module = model.get_submodule(reader)
        module.register_forward_pre_hook(lambda _, inputs, reader=reader: seen.update({reader: inputs[0]}))
    utility = {name: torch.zeros(len(model.get_submodule(name).weight)) for name in pairs}
    age = {name: [0] * len(utility[name]) for name in pairs}
    count = dict.fromkeys(pairs, 0.0)
    optimizer = sgd(model)
    for step in range(steps):
        train(model, optimizer, 1, X + step)
        due = {}
        for name, reader in pairs.items():
            h, weight = seen[reader].detach().abs(), model.get_submodule(reader).weight.detach().abs()
            for unit in range(len(utility[name])):
                if h.dim() == 4:
                    now = h[:, unit].mean() * weight[:, unit].sum()
                else:
                    places = h.shape[1] // len(utility[name])
                    at = range(unit * places, (unit + 1) * places)
                    now = sum(h[:, i].mean() * weight[:, i].sum() for i in at)
                utility[name][unit] = decay * utility[name][unit] + (1 - decay) * now
                age[name][unit] += 1
            mature = [unit for unit, old in enumerate(age[name]) if old > maturity]
            count[name] += rate * len(mature)
            while count[name] >= 1 - 1e-9:
                count[name] -= 1
                corrected = {u: float(utility[name][u]) / (1 - decay ** age[name][u]) for u in mature}
                worst = min(corrected, key=corrected.get)
                mature.remove(worst)
                due.setdefault(name, []).append(worst)
        for name, units in due.items():
            for unit in units:
                utility[name][unit], age[name][unit] = 0, 0
        log.append({name: sorted(units) for name, units in due.items()})
    return log


def test_a_plain_loop_chooses_the_same_units():
    """Until the first units are drawn anew, which happens in two layers at once."""
    settings = {"rate": 0.2, "maturity": 5, "decay": 0.8}
    model = net()
    expected = plain_loop(copy.deepcopy(model), 6, **settings)
    optimizer = sgd(model)
    method = ContinualBackprop(model, optimizer, example_inputs=X[:1], **settings)
    got = []
    for step in range(6):
        train(model, optimizer, 1, X + step)
        got.append(method.step())
    assert got[:5] == expected[:5] == [{}] * 5
    assert got[5] == expected[5]
    assert set(got[5]) == {"3", "7"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_forgets_new_units_alone(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    method = ContinualBackprop(model, optimizer, example_inputs=X[:1], rate=0.2, maturity=2)
    for _ in range(3):
        train(model, optimizer, 1)
        memory = copy.deepcopy(optimizer.state_dict()["state"])
        chosen = method.step()
    assert set(chosen) == {"3", "7"}
    (unit,) = chosen["7"]
    slot = "momentum_buffer" if name == "momentum" else "exp_avg"
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    for parameter, index in (
        (model[7].weight, (unit,)), (model[7].bias, (unit,)), (model[8].weight, (unit,)),
        (model[8].bias, (unit,)), (model[10].weight, (slice(None), unit)),
    ):  # fmt: skip
        assert memory[places[id(parameter)]][slot][index].any()
        assert not optimizer.state[parameter][slot][index].any()
        assert parameter.grad[index].count_nonzero() == 0
    others = [each for each in range(5) if each != unit]
    rows, columns = optimizer.state[model[10].weight][slot], memory[places[id(model[10].weight)]][slot]
    assert torch.equal(rows[:, others], columns[:, others])
    if name != "momentum":
        squares = optimizer.state[model[8].weight]["exp_avg_sq"]
        torch.testing.assert_close(squares[unit], squares[others].mean())
    train(model, optimizer, 2)
    assert model[10].weight[:, unit].all()  # its readers learn


def test_the_output_of_the_others_does_not_move():
    model = small()
    with torch.no_grad():
        model[2].weight[:, 2] = 0
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE, rate=1 / 3, maturity=0)
    before = model(ONE)
    assert method.step() == {"0": [2]}
    torch.testing.assert_close(model(ONE), before)


def test_passes_in_eval_mode_do_not_count():
    model = small()
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE)
    model.eval()(ONE)
    with pytest.raises(ValueError, match="has seen no pass of the model in train mode"):
        method.step()
    model.train()(ONE)
    model.eval()(100 * ONE)
    method.step()
    assert method.state_dict()["layers"]["0"]["utility"].tolist() == pytest.approx([0.04, 0.06, 0.02])


def test_layers_that_did_not_run_wait():
    model = Drawn(
        lambda s, x: s.b(s.a(x).relu()) if x[0, 0] > 0 else s.d(s.c(x).relu()),
        a=nn.Linear(1, 3), b=nn.Linear(3, 1), c=nn.Linear(1, 3), d=nn.Linear(3, 1),
    )  # fmt: skip
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE)
    assert method.left_out["c"] == "example_inputs do not reach it"
    model(ONE)
    method.step()
    assert list(method.state_dict()["layers"]) == ["a"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_bit_for_bit(name):
    one, other = net(), net()
    optimizer, again = (OPTIMIZERS[name](model.parameters()) for model in (one, other))
    settings = {"example_inputs": X[:1], "rate": 0.05, "maturity": 2, "seed": 3}
    method = ContinualBackprop(one, optimizer, **settings)
    resumed = ContinualBackprop(other, again, **settings)
    for _ in range(4):
        train(one, optimizer)
        method.step()
    file = io.BytesIO()
    torch.save([one.state_dict(), optimizer.state_dict(), method.state_dict()], file)
    file.seek(0)
    model_state, optimizer_state, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    other.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    events = []
    for _ in range(6):
        for model, opt, each in ((one, optimizer, method), (other, again, resumed)):
            train(model, opt)
            events.append(each.step())
    assert events[::2] == events[1::2]
    assert any(events)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "1"}, "of version 1, got '1'"),
        ({"steps": 1.5}, "is a count, got 1.5"),
        ({"settings": {}}, "rate=None"),
        ({"layers": {}}, "of other layers than 0"),
        ({"layers": {"0": 3}}, "has utility, age and count"),
        (
            {"layers": {"0": {"utility": torch.zeros(2), "age": torch.zeros(3), "count": 0}}},
            "does not fit the 3",
        ),
        (
            {"layers": {"0": {"utility": torch.zeros(3), "age": torch.tensor([0, 0, -1]), "count": 0}}},
            "does not fit",
        ),
        (
            {"layers": {"0": {"utility": torch.zeros(3), "age": torch.tensor([0, 0, 1]), "count": -1}}},
            "does not fit",
        ),
        (
            {
                "layers": {
                    "0": {
                        "utility": torch.tensor([0, 0, float("nan")]),
                        "age": torch.tensor([0, 0, 1]),
                        "count": 0,
                    }
                }
            },
            "does not fit",
        ),
        ({"copies": []}, "copies in a state"),
    ],
)
def test_bad_states_change_nothing(change, message):
    model = small()
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE)
    model(ONE)
    method.step()
    before = method.state_dict()
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(before | change)
    after = method.state_dict()
    assert after["steps"] == 1
    assert torch.equal(after["layers"]["0"]["utility"], before["layers"]["0"]["utility"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": -1}, "rate must lie between 0 and 1"),
        ({"rate": True}, "rate"),
        ({"decay": 1}, "decay must be"),
        ({"maturity": 1.5}, "maturity must be a whole number"),
        ({"maturity": -1}, "maturity"),
        ({"seed": None}, "seed"),
        ({"example_inputs": "x"}, "example_inputs"),
        ({"optimizer": None}, "takes as optimizer"),
        ({"model": nn.Linear(1, 3)}, "no layer is left to work on"),
        ({"fresh": nn.Linear(1, 3)}, "fresh does not fit"),
    ],
)
def test_bad_arguments(change, message):
    model = small()
    given = {"model": model, "optimizer": sgd(model), "example_inputs": ONE} | change
    with pytest.raises(ValueError, match=message):
        ContinualBackprop(**given)
    assert states_of(model) == {}
    assert not model[2]._forward_pre_hooks


def test_values_that_are_not_finite_are_refused_before_anything_changes():
    model = small()
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE, rate=1.0, maturity=0)
    model(ONE * float("inf"))
    before = method.state_dict()
    with pytest.raises(ValueError, match="the units of '0' have NaN or infinite values"):
        method.step()
    assert method.state_dict()["steps"] == before["steps"] == 0
    model(ONE)
    assert method.step() == {"0": [0, 1, 2]}


def test_its_removal_leaves_a_plain_model():
    model = net()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    method = ContinualBackprop(model, sgd(model), example_inputs=X[:1])
    assert states_of(model) == {"replacing units": "0"}
    with pytest.raises(ValueError, match=r"ContinualBackprop was refused.*Call the remove\(\)"):
        ContinualBackprop(model, sgd(model), example_inputs=X[:1])
    method.remove()
    method.remove()
    assert states_of(model) == {}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_pre_hooks for module in model.modules())
    for call in (method.step, lambda: method.load_state_dict(method.state_dict())):
        with pytest.raises(ValueError, match="has been removed"):
            call()


def test_a_lost_object_leaves_no_hook_and_copies_have_none():
    model = net()
    method = ContinualBackprop(model, sgd(model), example_inputs=X[:1])
    model(X)
    watched = method._watches["3"].means.clone()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert states_of(twin) == {}
        twin(100 * X)
        assert torch.equal(method._watches["3"].means, watched)
    with pytest.raises(ValueError, match="cannot be copied or pickled"):
        copy.deepcopy(method)
    del method
    gc.collect()
    assert states_of(model) == {}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_fresh_model_gives_the_new_rows():
    model, fresh = small(), small()
    with torch.no_grad():
        fresh[0].weight.fill_(7)
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE, rate=1 / 3, maturity=0, fresh=fresh)
    model(ONE)
    assert method.step() == {"0": [2]}
    assert model[0].weight.flatten().tolist() == [2, 1, 7]


def test_a_compiled_model_counts_where_it_is_compiled_afterwards():
    model = small()
    method = ContinualBackprop(model, sgd(model), example_inputs=ONE)
    torch.compile(model, backend="eager")(ONE)
    method.step()
    assert method.state_dict()["layers"]["0"]["utility"].tolist() == pytest.approx([0.04, 0.06, 0.02])
