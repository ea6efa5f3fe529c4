"""Bridgeout's state by its public names."""

import io
import json

import pytest
import torch
from safetensors.torch import load, save

import regrow
from cycles import batch, build, fit, repr_on, same_weights, sgd
from pages import running

SETTINGS = {"p": 0.2, "q": 2.0, "target_fraction": 0.5, "linear": True, "exclude": ["conv1"], "seed": 7}


def noisy(**settings):
    model = build()
    regrow.add_bridgeout(model, **{**SETTINGS, **settings})
    return model, sgd(model)


def by_json(state):
    return json.loads(json.dumps(state))


def by_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_safetensors(state):
    text = json.dumps(state).encode()
    return json.loads(
        bytes(load(save({"state": torch.frombuffer(bytearray(text), dtype=torch.uint8)}))["state"].tolist())
    )


@pytest.mark.devices
@pytest.mark.parametrize("way", [by_json, by_torch, by_safetensors])
@pytest.mark.parametrize("passes", [0, 3])
def test_a_run_goes_on_with_the_same_noise(way, passes) -> None:
    model, optimizer = noisy()
    for step in range(passes):
        fit(model, optimizer, step)
    weights, state = by_torch(model.state_dict()), way(regrow.bridgeout_state(model))
    momentum = by_torch(optimizer.state_dict())
    again, other = noisy()
    fit(again, other, 9)  # a state replaces what the noise has come to
    again.load_state_dict(weights)
    other.load_state_dict(momentum)
    regrow.load_bridgeout_state(again, state)
    for step in range(passes, passes + 3):
        fit(model, optimizer, step)
        fit(again, other, step)
    assert same_weights(model.state_dict(), again.state_dict())
    assert regrow.bridgeout_state(again) == regrow.bridgeout_state(model)


@pytest.mark.devices
def test_passes_without_noise_do_not_count() -> None:
    model, optimizer = noisy()
    fit(model, optimizer)
    model.eval()(batch(0)[0])
    assert regrow.bridgeout_state(model)["passes"] == 1


def test_the_state_is_that_of_the_model_inside_a_wrapper() -> None:
    model, optimizer = noisy()
    fit(model, optimizer)
    assert regrow.bridgeout_state(torch.nn.DataParallel(model)) == regrow.bridgeout_state(model)


def test_a_change_to_a_state_does_not_reach_the_model() -> None:
    model, _ = noisy()
    state = regrow.bridgeout_state(model)
    state["settings"]["exclude"].append("conv2")
    state["settings"]["p"] = 0.9
    assert regrow.bridgeout_state(model)["settings"]["exclude"] == ["conv1"]
    assert regrow.bridgeout_state(model)["settings"]["p"] == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, "not a state of Bridgeout: None"),
        (lambda _: [], r"not a state of Bridgeout: \[\]"),
        (lambda _: {}, r"not a state of Bridgeout: \{\}\. Give what bridgeout_state\(model\) returned"),
        (lambda s: {k: v for k, v in s.items() if k != "passes"}, "not a state of Bridgeout"),
        (lambda s: s | {"version": 2}, "version 3, got 2"),
        (lambda s: s | {"version": "x" * 1000}, "version 3, got 'xxx"),
        (lambda s: s | {"passes": -1}, "a number of forward passes, got -1"),
        (lambda s: s | {"passes": 2**63}, "a number of forward passes, got 9223372036854775808"),
        (lambda s: s | {"passes": 1.5}, r"a number of forward passes, got 1\.5"),
        (lambda s: s | {"passes": True}, "a number of forward passes, got True"),
        (lambda s: s | {"passes": "3"}, "a number of forward passes, got '3'"),
        (lambda s: s | {"passes": torch.zeros(10**5)}, "a number of forward passes, got tensor"),
        (lambda s: s | {"settings": s["settings"] | {"p": 0.5}}, r"'p': 0\.5 \(here 0\.2\).*same settings"),
        (lambda s: s | {"settings": s["settings"] | {"seed": 8}}, r"'seed': 8 \(here 7\)"),
        (lambda s: s | {"settings": s["settings"] | {"more": 1}}, r"'more': 1 \(here None\)"),
        (lambda s: s | {"settings": {}}, r"'p': None \(here 0\.2\)"),
        (lambda s: s | {"settings": "p" * 10**6}, r"'p': None \(here 0\.2\)"),
    ],
)
def test_another_state_is_refused_and_changes_nothing(change, message) -> None:
    model, optimizer = noisy()
    fit(model, optimizer)
    state = regrow.bridgeout_state(model)
    with pytest.raises(ValueError, match=message) as error:
        regrow.load_bridgeout_state(model, change(by_json(state)))
    assert len(str(error.value)) < 500
    assert regrow.bridgeout_state(model) == state


@pytest.mark.parametrize("removed", [False, True])
def test_a_model_without_bridgeout_is_refused(removed) -> None:
    model, _ = noisy()
    state = regrow.bridgeout_state(model)
    if removed:
        regrow.remove_bridgeout(model)
    else:
        model = build()
    for act in (lambda: regrow.bridgeout_state(model), lambda: regrow.load_bridgeout_state(model, state)):
        with pytest.raises(ValueError, match="no Bridgeout: pass the one that was given to add_bridgeout"):
            act()


def test_the_names_are_public() -> None:
    assert {"bridgeout_state", "load_bridgeout_state"} <= set(regrow.__all__)


def test_what_the_docs_show_goes_on_bit_for_bit(tmp_path) -> None:
    code = running("resume.md")[0]

    def start():
        model, optimizer = noisy()
        cycle = repr_on(model, optimizer)
        parts = {"model": model, "optimizer": optimizer, "cycle": cycle, "regrow": regrow, "torch": torch}
        exec(code, parts)
        return parts

    def train(parts, steps):
        for step in steps:
            fit(parts["model"], parts["optimizer"], int(torch.randint(100, ())) + step)
            parts["cycle"].step()

    first = start()
    train(first, range(3))  # in the sub phase
    first["save"](tmp_path / "run.pt")
    train(first, range(3, 8))
    again = start()
    torch.manual_seed(5)
    again["load"](tmp_path / "run.pt")
    train(again, range(3, 8))
    assert same_weights(first["model"].state_dict(), again["model"].state_dict())
