from pathlib import Path

import pytest

from regrow.study.identity import run_key
from regrow.study.studyfile import Study, read_study


def study(folder: Path, text: str) -> Study:
    path = folder / "grid.yaml"
    path.write_text(text)
    return read_study(path)


def seen(found: Study, *keys: str) -> list[tuple]:
    return [tuple(getattr(run.config, key) for key in keys) for run in found.runs]


def test_the_smallest_study(tmp_path: Path) -> None:
    found = study(tmp_path, "methods: [standard, repr]\nseeds: 0-1\n")
    assert found.name == "grid"
    assert seen(found, "method", "seed", "model", "data") == [
        ("standard", 0, "convnet", "digits"),
        ("repr", 0, "convnet", "digits"),
        ("standard", 1, "convnet", "digits"),
        ("repr", 1, "convnet", "digits"),
    ]
    assert len({run_key(run.comparison) for run in found.runs}) == 1


def test_every_kind_of_axis(tmp_path: Path) -> None:
    found = study(
        tmp_path,
        """
name: all-kinds
methods:
  standard:
  repr: {fraction: [0.2, 0.3]}
seeds: [3, 5-6]
models: {convnet: {width: [4, 8]}, vgg: }
data: {digits: {epochs: 20}, fashion-mnist: {train_size: [500, 1000]}}
settings: {batch_size: 64, epochs: 10, exclude: [features.1]}
""",
    )
    assert found.name == "all-kinds"
    # 3 variants × 3 seeds × (convnet twice, vgg) × (digits, Fashion-MNIST twice)
    assert len(found.runs) == 3 * 3 * 3 * 3
    assert len({run_key(run.comparison) for run in found.runs}) == 9
    assert {run.config.epochs for run in found.runs if run.config.data == "digits"} == {20}
    assert {run.config.epochs for run in found.runs if run.config.data != "digits"} == {10}
    assert {
        (run.config.batch_size, run.config.exclude) for run in found.runs if run.config.method == "repr"
    } == {(64, ("features.1",))}
    assert seen(found, "method", "fraction", "seed")[:4] == [
        ("standard", 0.3, 3),
        ("repr", 0.2, 3),
        ("repr", 0.3, 3),
        ("standard", 0.3, 5),
    ]


def test_a_setting_of_one_method_makes_no_second_run_of_another(tmp_path: Path) -> None:
    found = study(tmp_path, "methods: [standard, repr]\nseeds: 0\nsettings: {fraction: [0.2, 0.4]}\n")
    assert seen(found, "method", "fraction") == [("standard", 0.3), ("repr", 0.2), ("repr", 0.4)]
    assert len({run_key(run.comparison) for run in found.runs}) == 1


def test_a_strength_of_ones_own(tmp_path: Path) -> None:
    found = study(
        tmp_path,
        "methods: {backprop: {weight_decay: 0.01}, bridgeout: {p: 0.1}}\nseeds: 0\nsettings: {lr: 1e-2}\n",
    )
    assert seen(found, "method", "weight_decay", "p", "lr") == [
        ("standard", 0.01, 0.3, 0.01),
        ("bridgeout", 5e-4, 0.1, 0.01),
    ]
    assert len({run_key(run.comparison) for run in found.runs}) == 1


def test_exclude_is_a_list_and_a_list_of_lists_an_axis(tmp_path: Path) -> None:
    found = study(tmp_path, "methods: repr\nseeds: 0\nsettings: {exclude: [[], [a, b]]}\n")
    assert seen(found, "exclude") == [((),), (("a", "b"),)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "a study is a mapping"),
        ("methods: [standard]", "there is no 'seeds'"),
        ("seeds: 0", "there is no 'methods'"),
        ("methods: standard\nseeds: 0\nmodel: vgg", "unknown key 'model'; did you mean 'models'"),
        ("methods: standard\nseed: 0", "unknown key 'seed'; did you mean 'seeds'"),
        (
            "methods: standard\nseeds: 0\nepochs: 3",
            "'epochs' is a setting of the runs: write it",
        ),
        (
            "methods: standard\nseeds: 0\nsettings: {epoch: 3}",
            "setting 'epoch'; did you mean 'epochs'",
        ),
        ("methods: standard\nseeds: 0\nsettings: {model: vgg}", "at the top of the file, as 'models'"),
        ("methods: [rper]\nseeds: 0", "methods: unknown 'rper'; did you mean 'repr'"),
        ("methods: standard\nseeds: 0\ndata: digit", "data: unknown 'digit'; did you mean 'digits'"),
        ("methods: standard\nseeds: 0\nseeds: 1", "line 3 has 'seeds' for the second time"),
        ("methods: standard\nseeds: [0-2, 1]", "seeds names 1 twice"),
        ("methods: standard\nseeds: 0,0", "seeds names 0 twice"),
        ("methods: standard\nseeds: []", "seeds is an empty list"),
        ("methods: standard\nseeds: 1.5", "numbers such as 0-4"),
        ("methods: standard\nseeds: yes", "numbers such as 0-4"),
        ("methods: standard\nseeds: 0-99999999999", "more than 10,000 seeds"),
        ("methods: [standard, standard]\nseeds: 0", "methods names standard twice"),
        ("methods: [standard, backprop]\nseeds: 0", "backprop is another name"),
        ("methods: []\nseeds: 0", "methods is empty"),
        ("methods: [{repr: 3}]\nseeds: 0", "methods takes names"),
        ("methods: {repr: 3}\nseeds: 0", "methods: repr takes settings"),
        ("methods: {repr: {lr: 0.1}}\nseeds: 0", "'lr' must be the same for all methods"),
        ("methods: {repr: {p: 0.1}}\nseeds: 0", "for itself: compact, consumers, criterion"),
        (
            "methods: {standard: {fraction: 0.1}}\nseeds: 0",
            "standard: 'fraction' belongs to repr, dsd, restart, and standard",
        ),
        ("methods: {repr: {cycles: 1}}\nseeds: 0", "'cycles' must be the same for all methods"),
        (
            "methods: [standard, dropout]\nseeds: 0\nsettings: {fraction: 0.3}",
            "settings: 'fraction' belongs to the methods repr, dsd and restart, and would be ignored",
        ),
        (
            "methods: bridgeout\nseeds: 0\nsettings: {cycles: 2}",
            "settings: 'cycles' belongs to the method repr",
        ),
        (
            "methods: standard\nseeds: 0\nsettings: {optimizer: [adam, adamw], momentum: 0.9}",
            "'momentum' belongs to the optimizer sgd, and would be ignored with adam and adamw",
        ),
        (
            "methods: repr\nseeds: 0\nmodels: {vgg: {p: 0.1}, convnet: }",
            "models: vgg: 'p' belongs to the methods bridgeout, targeted-bridgeout, dropout",
        ),
        (
            "methods: repr\nseeds: 0\ndata: {digits: {target_fraction: 0.1}}",
            "data: digits: 'target_fraction' belongs to the methods targeted-bridgeout",
        ),
        ("methods: {repr: {fraction: []}}\nseeds: 0", "fraction is an empty list"),
        ("methods: {repr: {fraction: [0.2, 0.2]}}\nseeds: 0", "fraction has 0.2 twice"),
        ("methods: {repr: {fraction: 1.2}}\nseeds: 0", "fraction: input should be less than 1"),
        (
            "methods: standard\nseeds: 0\nsettings: {threads: [1, 2]}",
            "threads only says where a run is trained",
        ),
        (
            "methods: standard\nseeds: 0\nsettings: {epochs: [1, many]}",
            "input should be a valid integer",
        ),
        ("methods: standard\nseeds: 0\nsettings: 3", "settings takes settings"),
        ("methods: standard\nseeds: 0\nname: a/b", "name must be a folder name"),
        (
            "methods: standard\nseeds: 0\nmodels: {vgg: {epochs: 3}}\ndata: {digits: {epochs: 4}}",
            "'epochs' is set under data: digits and under models: vgg: say it once",
        ),
        (
            "methods: standard\nseeds: 0-999\nsettings: {epochs: [1,2,3,4,5,6,7,8,9,10,11]}",
            "11,000 runs",
        ),
        ("methods: repr\nseeds: 0\nsettings: {epochs: 5, full: 9, sub: 9}", "cycles of 9 full and 9 sub"),
        ("methods: [standard", "is not YAML"),
        ("methods: &a [standard]\nseeds: *a", "line 1 has the anchor &a"),
        ("methods: standard\nseeds: 0\nsettings:\n  <<: {epochs: 3}", "line 4 has the merge key <<"),
        ("methods: standard\nseeds: !!int '3'", "line 2 has the tag"),
        ("methods: standard\nseeds: " + "9" * 5000, "line 2 has a number of more than 1,000 characters"),
        ("methods: standard\nseeds: '" + "9" * 5000 + "'", "seeds takes numbers"),
        ("methods: standard\nseeds: 18446744073709551616", "seed: .*got 18446744073709551616"),
        ("methods: standard\nseeds: 0\nsettings: {width: 1e12}", "width: "),
        ("methods: standard\nseeds: 0\nsettings: {epochs: [3, 1000000000000]}", "epochs: .*1000000000000"),
        ("methods: standard\nseeds: 0\nsettings: {threads: 1000000}", "threads: .*1000000"),
        (
            f"methods: standard\nseeds: 0\nsettings: {{epochs: {list(range(1, 10_002))}}}",
            "epochs has 10,001 values",
        ),
        (f"methods: standard\nseeds: 0\nsettings: {{epochs: {[3] * 40_000}}}", "epochs has 40,000 values"),
        (f"methods: {['a'] * 40_000}\nseeds: 0", "methods names a twice"),
        (f"methods: [{'a' * 9000}]\nseeds: 0", "methods: unknown 'aaa"),
        (f"{'k' * 900}: 1\nmethods: standard\nseeds: 0", "unknown key 'kkk"),
        (f"name: {'n' * 101}\nmethods: standard\nseeds: 0", "name must be a folder name of at most 100"),
        ("methods: standard\nseeds: 0\nsettings: {exclude: " + "[" * 30 + "]" * 30 + "}", "nested deeper"),
    ],
)
def test_bad_studies(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as refused:
        study(tmp_path, text)
    assert str(refused.value).startswith(str(tmp_path / "grid.yaml"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ValueError, match="there is no study file"):
            read_study(path)
