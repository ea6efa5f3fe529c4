from typing import Any

import pytest

from regrow.study.config import make_config
from regrow.study.regimes import described
from regrow.study.unused import check_used


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regime": "permuted-labels"}, r"there is one task: set tasks to 2 or more"),
        ({"regime": "new-pictures", "tasks": 1}, r"there is one task"),
        ({"regime": "corrected-labels", "tasks": 2}, r"label_noise is 0: set label_noise"),
        ({"regime": "new-domain", "tasks": 2}, r"set second_data to another one than 'digits'"),
        (
            {"regime": "new-domain", "tasks": 2, "second_data": "digits"},
            r"another one than 'digits' with as many classes",
        ),
        ({"regime": "permuted", "tasks": 2}, r"regime: unknown name.*permuted-labels"),
        ({"tasks": 0}, r"tasks: .*greater than or equal to 1"),
    ],
)
def test_settings_that_a_regime_cannot_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tasks": 3},  # the same data again and again, with a learning rate that begins anew
        {"regime": "permuted-labels", "tasks": 2},
        {"regime": "corrected-labels", "tasks": 2, "label_noise": 0.3},
        {"regime": "new-domain", "tasks": 2, "second_data": "fashion-mnist"},
    ],
)
def test_settings_of_regimes(settings: dict[str, Any]) -> None:
    config = make_config(settings)
    assert config.regime == settings.get("regime", "same")


def test_a_second_data_set_without_its_regime_is_refused() -> None:
    with pytest.raises(ValueError, match="'second_data' belongs to the regime new-domain"):
        check_used({"second_data": "cifar10"}, [make_config({})])


@pytest.mark.parametrize(
    ("regime", "tasks", "words"),
    [
        ("same", 1, "digits"),
        ("same", 3, "digits, 3 tasks of the same data"),
        ("permuted-labels", 4, "digits, 4 tasks of permuted labels"),
        ("new-domain", 2, "digits and fashion-mnist in turn, 2 tasks"),
    ],
)
def test_a_regime_in_words(regime: str, tasks: int, words: str) -> None:
    assert described(regime, tasks, data="digits", second_data="fashion-mnist") == words
