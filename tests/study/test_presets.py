import subprocess
import sys

import pytest

from regrow.study.config import RunConfig, make_config
from regrow.study.identity import run_key
from regrow.study.presets import PRESETS, net_of, with_names_resolved
from regrow.study.studyfile import read_study


def test_presets_need_no_torch() -> None:
    code = "import sys, regrow.study.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["standard", "repr"])
def test_every_preset_is_settings(preset: str, method: str) -> None:
    config = make_config({"preset": preset, "method": method})
    assert set(PRESETS[preset]) <= set(RunConfig.model_fields)
    for key, value in PRESETS[preset].items():
        assert getattr(config, key) == value, key


def test_the_paper() -> None:
    config = make_config({"preset": "paper", "method": "repr"})
    assert (config.batch_norm, config.pooling, config.head, config.kernel) == (False, "none", "flatten", 3)
    assert (config.rate, config.momentum, config.weight_decay, config.batch_size) == (0.01, 0, 0, 64)
    assert (config.augmentation, config.schedule, config.fraction) == ("none", "constant", 0.3)
    assert (config.cycle.full, config.cycle.sub, config.cycle.cycles, config.epochs) == (20, 10, 3, 100)


def test_the_author_s_code() -> None:
    config = make_config({"preset": "author", "method": "repr"})
    assert (config.kernel, config.pooling, config.init, config.head) == (5, "max3", "truncated", "flatten")
    assert (config.rate, config.schedule, config.halve_every) == (0.05, "halving", 25_000)
    assert (config.fraction, config.skip_first, config.epochs) == (0.5, False, 199)
    assert (config.cycle.full, config.cycle.sub) == (20, 20)


def test_what_is_said_goes_before_the_preset() -> None:
    config = make_config({"preset": "author", "epochs": 400, "kernel": 3, "batch_norm": True})
    assert (config.epochs, config.kernel, config.batch_norm) == (400, 3, True)
    assert config.pooling == "max3"


def test_a_preset_leaves_other_nets_as_they_are() -> None:
    config = make_config({"preset": "author", "model": "resnet"})
    default = RunConfig.model_fields
    for key in ("batch_norm", "pooling", "head", "kernel", "init"):
        assert getattr(config, key) == default[key].default
    assert config.rate == 0.05


@pytest.mark.parametrize(
    ("name", "depth", "width"), [("c3", 3, 32), ("C3(32)", 3, 32), ("C18(8)", 18, 8), ("c8", 8, 32)]
)
def test_names_of_the_plain_nets(name: str, depth: int, width: int) -> None:
    config = make_config({"model": name})
    assert (config.model, config.depth, config.width) == ("convnet", depth, width)
    assert (config.batch_norm, config.pooling, config.head) == (False, "none", "flatten")
    assert net_of(name) == "convnet"


def test_a_plain_net_with_pooling_and_norms() -> None:
    config = make_config({"model": "c8", "pooling": "max", "batch_norm": True, "width": 16})
    assert (config.depth, config.width) == (8, 16)
    assert (config.batch_norm, config.pooling, config.head) == (True, "max", "flatten")


def test_the_preset_goes_before_the_name_of_the_net() -> None:
    config = make_config({"preset": "author", "model": "C8(16)"})
    assert (config.depth, config.width) == (8, 16)
    assert (config.kernel, config.pooling) == (5, "max3")


@pytest.mark.parametrize("name", ["convnet", "c", "c3x", "cc3", "C3(x)", "resnet", "c3(32", "densenet"])
def test_other_names_stay(name: str) -> None:
    assert with_names_resolved({"model": name, "epochs": 3}) == {"model": name, "epochs": 3}
    assert net_of(name) == name


def test_the_settings_given_are_not_changed() -> None:
    given = {"preset": "paper", "model": "c8"}
    with_names_resolved(given)
    assert given == {"preset": "paper", "model": "c8"}


def test_a_record_read_again_is_the_same_run() -> None:
    config = make_config({"preset": "author", "model": "c8", "method": "repr"})
    assert run_key(make_config(config.model_dump())) == run_key(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "papr"}, "preset: unknown 'papr'; did you mean 'paper'"),
        ({"preset": ["paper"]}, "preset: unknown"),
        ({"model": "c3", "depth": 5}, "c3 has a depth of 3: leave depth out"),
        ({"model": "C3(8)", "width": 16}, "C3.8. has a width of 8: leave width out"),
        ({"model": "c0"}, "depth: "),
        ({"model": "c3(0)"}, "width: "),
        ({"preset": "paper", "epochs": 50, "method": "repr"}, "train for 91 epochs or more, not 50"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(settings)


def test_a_study_takes_presets_and_names(tmp_path) -> None:
    file = tmp_path / "table.yaml"
    file.write_text(
        "methods: [standard, repr]\nseeds: 0\nmodels:\n  c3: {pooling: max}\n  C8(16):\n  resnet:\n"
        "settings: {preset: paper}\n"
    )
    runs = [each.config for each in read_study(file).runs]
    assert [(each.model, each.depth, each.method) for each in runs] == [
        ("convnet", 3, "standard"),
        ("convnet", 3, "repr"),
        ("convnet", 8, "standard"),
        ("convnet", 8, "repr"),
        ("resnet", None, "standard"),
        ("resnet", None, "repr"),
    ]
    assert [each.pooling for each in runs] == ["max", "max", "none", "none", "max", "max"]
    assert all(each.rate == 0.01 and each.epochs == 100 for each in runs)


def test_a_study_may_compare_presets(tmp_path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("methods: repr\nseeds: 0\nsettings: {preset: [paper, author]}\n")
    assert [each.config.epochs for each in read_study(file).runs] == [100, 199]
