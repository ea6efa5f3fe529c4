import re

import pytest

from regrow.study.config import RunConfig, make_config
from regrow.study.unused import USED_WITH, check_used


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("standard", "fraction", 0.2),
        ("standard", "p", 0.1),
        ("standard", "compact", False),
        ("repr", "p", 0.1),
        ("repr", "reestimate", True),
        ("bridgeout", "cycles", 2),
        ("bridgeout", "target_fraction", 0.5),
        ("dropout", "q", 1.2),
        ("dropout", "exclude", ["features.1"]),
        ("targeted-dropout", "skip_first", True),
    ],
)
def test_a_setting_of_another_method_is_refused_by_name_even_at_its_default(
    method: str, key: str, value: object
) -> None:
    config = make_config({"method": method})
    for each in (value, RunConfig.model_fields[key].default):
        if each is None:
            continue
        with pytest.raises(ValueError, match=rf"'{key}' belongs to the methods? .* ignored with {method}:"):
            check_used({key: each}, [config])


@pytest.mark.parametrize("method", ["standard", "repr", "bridgeout", "targeted-bridgeout", "dropout"])
def test_what_changes_the_run_is_taken(method: str) -> None:
    config = make_config({"method": method})
    given = {
        key: 1
        for key in RunConfig.model_fields
        if key not in USED_WITH or getattr(config, USED_WITH[key][0]) in USED_WITH[key][1]
    }
    check_used(given, [config])
    assert {"epochs", "lr", "weight_decay", "momentum", "width"} <= given.keys()


def test_of_several_runs_one_has_to_use_it() -> None:
    standard, bridgeout = (make_config({"method": method}) for method in ("standard", "bridgeout"))
    check_used({"p": 0.2}, [standard, bridgeout])
    message = (
        "--fraction belongs to the methods repr, dsd and restart, and would be ignored with standard and "
        "bridgeout: "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_used({"fraction": 0.2}, [standard, bridgeout, bridgeout], lambda key: f"--{key}")


def test_momentum_belongs_to_sgd() -> None:
    for optimizer in ("adam", "adamw"):
        with pytest.raises(ValueError, match=f"belongs to the optimizer sgd, and .* with {optimizer}"):
            check_used({"momentum": 0.9}, [make_config({"optimizer": optimizer})])
    check_used({"momentum": 0.5}, [make_config({})])


def test_what_is_not_set_does_not_count() -> None:
    check_used({"cycles": None, "full": None}, [make_config({})])


def test_every_setting_that_only_some_use_is_one() -> None:
    assert USED_WITH.keys() <= RunConfig.model_fields.keys()
    assert USED_WITH["target_fraction"] == ("method", ("targeted-bridgeout", "targeted-dropout"))
