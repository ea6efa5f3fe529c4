from regrow.study.config import make_config
from regrow.study.identity import describe, differing, normalised, resolved, run_key, shown, unresolved


def key(**settings: object) -> str:
    return run_key(make_config(settings))


def test_the_same_run() -> None:
    assert key(epochs=30) == key() == key(method="backprop")
    assert key(lr=0.1) == key(), "the default said out loud"
    assert key(epochs=91, full=20, sub=10, cycles=2) == key(epochs=91, full=20, sub=10)
    assert key(device="cpu", threads=3, data_dir="x") == key(), "where, not what"
    assert key(fraction=0.5, p=0.1) == key(), "settings of other methods"


def test_another_run() -> None:
    others = [{"seed": 1}, {"epochs": 31}, {"lr": 0.2}, {"method": "repr"}, {"weight_decay": 0}, {"width": 3}]
    keys = {key(**settings) for settings in others}
    assert len(keys | {key()}) == len(others) + 1
    assert key(method="repr", fraction=0.5) != key(method="repr")


def test_normalised_keeps_what_the_method_uses() -> None:
    config = make_config({"method": "bridgeout", "p": 0.1, "target_fraction": 0.5, "fraction": 0.2})
    kept = normalised(config)
    assert (kept.p, kept.target_fraction, kept.fraction) == (0.1, 0.75, 0.3)


def test_what_follows_from_epochs_does_not_differ_by_itself() -> None:
    short, long = (unresolved(make_config({"epochs": epochs})) for epochs in (30, 90))
    assert differing([short, long]) == ["epochs"]
    by_hand = unresolved(make_config({"epochs": 30, "cycles": 1, "lr": 0.05}))
    assert set(differing([short, by_hand])) == {"lr", "cycles", "full", "sub"}


def test_values_in_few_letters() -> None:
    values = [None, True, False, 0.2, 4.0, 1e-4, 1000000.0, 7, (), ("a", "b"), "ortho"]
    assert [shown(value) for value in values] == [
        "default", "yes", "no", "0.2", "4", "0.0001", "1000000", "7", "none", "a+b", "ortho",
    ]  # fmt: skip
    assert describe({"skip_first": False, "p": 0.25}, ["p", "skip_first"]) == "p 0.25, skip first no"


def test_default_generations_said_out_loud_are_the_same_run() -> None:
    assert key(method="ban", generations=3) == key(method="ban") != key(method="ban", generations=2)
    assert key(method="standard", generations=3) == key()
    assert unresolved(make_config({"method": "ban", "generations": 3}))["generations"] is None
    assert unresolved(make_config({"method": "ban", "generations": 2}))["generations"] == 2


def test_methods_of_any_generations_can_be_compared() -> None:
    """The lengths of the cycle, which all methods share, do not depend on them."""
    settings = [resolved(make_config({"method": method, "epochs": 30})) for method in ("standard", "ban")]
    assert set(differing(settings)) == {"method", "generations"}
