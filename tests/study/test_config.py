from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from regrow.criteria import score as scoring
from regrow.criteria import select as selection
from regrow.repr import restoring
from regrow.study import compare, names
from regrow.study.config import RunConfig, make_config, read_settings


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("data", names.DATA_NAMES),
        ("augmentation", names.AUGMENTATIONS),
        ("pooling", names.POOLINGS),
        ("criterion", scoring.CRITERIA),
        ("consumers", restoring.CONSUMERS),
        ("scope", selection.SCOPES),
        ("method", (*compare.METHOD_SETTINGS, *names.METHOD_ALIASES)),
    ],
)
def test_every_choice_of_the_library_can_be_named_and_no_other(field: str, known: tuple[str, ...]) -> None:
    assert set(get_args(RunConfig.model_fields[field].annotation)) == set(known)


def test_every_setting_says_what_it_is() -> None:
    for name, field in RunConfig.model_fields.items():
        assert field.description, name


def test_backprop_is_standard_training() -> None:
    assert make_config({"method": "backprop"}) == make_config({"method": "standard"})


def test_bf16_is_bfloat16() -> None:
    assert make_config({"precision": "bf16"}) == make_config({"precision": "bfloat16"})
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        make_config({"precision": "bf61"})


def test_defaults_run_standard_training_on_digits() -> None:
    config = make_config({})
    assert (config.data, config.model, config.method, config.rate) == ("digits", "convnet", "standard", 0.1)
    assert make_config({"optimizer": "adam"}).rate == 0.002


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ({"fraction": 1.0}, "fraction: input should be less than 1, got 1.0"),
        ({"fraction": float("nan")}, "fraction"),
        ({"criterion": "orto"}, "criterion: .*'ortho'.*got 'orto'"),
        ({"epochs": 0}, "epochs"),
        ({"p": 1.0}, "p: input should be less than 1"),
        ({"q": 0}, "q: input should be greater than 0"),
        ({"target_fraction": 0}, "target_fraction"),
        ({"method": "bridgout"}, "method: .*'bridgeout'.*got 'bridgout'"),
        ({"data": "fashon"}, "data: unknown name; did you mean 'fashion-mnist'. .got 'fashon'"),
        ({"pooling": "Q"}, "pooling: unknown name; choose from 'max', 'avg', 'none' .got 'Q'"),
        ({"epochs": "many"}, "epochs: .*got 'many'"),
        (
            {"epochs": 10, "tasks": 3},
            "epochs: 10 epochs cannot be divided evenly by 3 tasks: train for 9, say",
        ),
        ({"method": "repr", "epochs": 4, "tasks": 2}, "train for 3 epochs or more, not 2"),
        ({"method": "distillation"}, "teacher: distillation learns from another network, and none is given"),
        ({"method": "repr+distillation"}, "teacher: repr.distillation learns"),
        (
            {"method": "restart"},
            "method: restart acts between tasks .* set tasks or generations to 2",
        ),
        ({"method": "ban", "generations": 1}, "method: ban acts between tasks"),
        ({"method": "ban", "epochs": 10}, "10 epochs cannot be divided evenly by 3 generations: train for 9"),
        ({"method": "dsd", "epochs": 2}, "epochs: dsd trains a third .* train for 3 epochs or more, not 2"),
        ({"method": "repr+orthogonal-loss", "epochs": 2}, "train for 3 epochs or more, not 2"),
        ({"method": "repr", "epochs": 2}, "train for 3 epochs or more, not 2"),
        ({"method": "repr", "epochs": 90, "full": 20, "sub": 10, "cycles": 3}, "train for 91 epochs"),
    ],
)
def test_bad_settings_say_what_to_write(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(settings)


def test_generations_are_those_of_the_method() -> None:
    def generations(**settings: Any) -> int:
        return make_config({"epochs": 12, **settings}).rounds.generations

    assert generations(method="ban") == generations(method="shrink-and-perturb") == 3
    assert generations(method="shrink-and-perturb", tasks=2) == 1
    assert generations(method="ban", tasks=2) == 3
    assert generations(method="restart", tasks=2) == 1
    assert generations(method="restart", generations=4) == 4
    assert generations(method="standard", generations=5) == 1, "standard training has none"


BEYOND: dict[str, list[Any]] = {
    "image_size": [3, -1, 4097, 10**12, 2**64],
    "train_size": [0, -5, 10**12, 2**64, 10**5000],
    "split_seed": [-1, 2**63, 2**64, 10**400, "1" * 5000],
    "seed": [-1, 2**63, 2**64, 10**400, 1e300],
    "depth": [0, -3, 201, 10**6, 2**64],
    "width": [0, -1, 10_001, 1e12, 2**64, float("nan"), float("inf"), -float("inf")],
    "epochs": [0, -1, 100_001, 1e12, 2**64],
    "batch_size": [1, -2, 10**7, 2**64],
    "lr": [0, -0.1, 1e31, 1e308, float("nan"), float("inf")],
    "weight_decay": [-1, 1e31, float("nan"), float("inf")],
    "momentum": [1, -0.1, float("nan")],
    "tasks": [0, 1001, 2**64],
    "cycles": [0, 10**12, 2**64],
    "full": [0, 10**12, 2**64],
    "sub": [-1, 10**12, 2**64],
    "orthogonal": [-1, 1e31],
    "teacher": ["", "a\0b", "t" * 5000],
    "temperature": [0, -1, 1e6],
    "distillation_weight": [-0.1, 1.1],
    "generations": [0, 1001],
    "last": [0, 1001],
    "shrink": [-0.1, 11],
    "perturb": [-0.1, 11],
    "replacement_rate": [-0.1, 1.1],
    "maturity": [-1, 10**12],
    "fixed": [0, 1],
    "dormant": [-1, 1e7],
    "q": [0, 1e12, float("nan"), float("inf")],
    "threads": [0, -1, 1025, 10**6, 1e12, 2**64],
    "model": ["x" * 10**6, 3],
    "device": ["cuda:" + "9" * 100, "c" * 10**6],
    "data_dir": ["a\0b", "d" * 5000],
    "exclude": [["x" * 10**6], ["a"] * 10_001, "conv1", {"a": 1}, [3]],
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_size_beyond_reason_is_refused_by_its_name(name: str) -> None:
    for value in BEYOND[name]:
        with pytest.raises(ValueError, match=f"^{name}(\\.0)?: .*, got ") as refused:
            make_config({name: value})
        assert len(str(refused.value)) < 400
        assert str(refused.value).isprintable()


def test_every_number_has_an_upper_bound() -> None:
    for name, field in RunConfig.model_fields.items():
        if field.annotation in (int, float, int | None, float | None):
            with pytest.raises(ValueError, match=f"^{name}: "):
                make_config({name: 10**31})


def test_of_many_wrong_settings_the_first_three_are_shown() -> None:
    # A name that is unknown is refused before anything else.
    names = [
        name for name, field in RunConfig.model_fields.items() if get_origin(field.annotation) is Literal
    ]
    wrong = dict.fromkeys(RunConfig.model_fields.keys() - set(names), "x" * 10**6)
    with pytest.raises(ValueError, match=r"; and [0-9]+ more settings are wrong$") as refused:
        make_config(wrong)
    assert len(str(refused.value)) < 700
    with pytest.raises(ValueError, match="unknown setting") as refused:
        make_config({"k" * 10**7: 1})
    assert len(str(refused.value)) < 700


def test_a_yaml_file_holds_settings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("version: 1\nepochs: 7\nexclude: [features.0]\n")
    config = make_config({**read_settings(tmp_path / "run.yaml"), "epochs": 8})
    assert (config.epochs, config.exclude) == (8, ("features.0",))


@pytest.mark.parametrize(
    ("text", "message"), [("- epochs", "name: value"), ("a: [", "not YAML"), (None, "no configuration file")]
)
def test_a_file_that_holds_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "run.yaml")
