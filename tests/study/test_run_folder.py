import pytest

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.run_folder import begin, check_folder, writing

CONFIG = make_config({"method": "repr", "epochs": 6})
ENVIRONMENT = {**records.environment("cpu", 1), "processes": 1}


def test_a_new_folder_holds_settings_and_environment(tmp_path):
    assert not check_folder(CONFIG, tmp_path / "run")
    assert begin(CONFIG, tmp_path / "run", ENVIRONMENT, rerun=False) == (None, 0)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "environment.json"]
    assert records.read_run(tmp_path / "run").environment["resumed"] == 0
    assert not check_folder(CONFIG, tmp_path / "run")


def test_what_a_killed_process_left_before_the_settings_is_no_foreign_folder(tmp_path):
    for name in (".lock", ".config.yaml.123.tmp"):
        (tmp_path / name).touch()
    assert not check_folder(CONFIG, tmp_path)
    begin(CONFIG, tmp_path, ENVIRONMENT, rerun=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml", "environment.json"]
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="not empty and not a run folder"):
        check_folder(CONFIG, tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="not a run folder"):
        check_folder(CONFIG, tmp_path / "run")


def test_where_it_runs_and_what_its_method_has_no_use_for_may_differ(tmp_path):
    begin(CONFIG, tmp_path, ENVIRONMENT, rerun=False)
    same = {"method": "repr", "epochs": 6, "threads": 3, "device": "cpu", "data_dir": "elsewhere", "q": 1.0}
    assert not check_folder(make_config(same), tmp_path)
    with pytest.raises(ValueError, match=r"an unfinished run with method='repr' \(asked for: 'standard'\)"):
        check_folder(make_config({"method": "standard", "epochs": 6}), tmp_path)


def test_a_run_before_a_setting_was_there_has_its_default(tmp_path):
    begin(CONFIG, tmp_path, ENVIRONMENT, rerun=False)
    old = {key: value for key, value in records.read_config(tmp_path).items() if key != "precision"}
    records.write_yaml(records.config_path(tmp_path), {**old, "version": 1})
    assert not check_folder(CONFIG, tmp_path)


def test_a_run_of_a_newer_version_is_refused(tmp_path):
    begin(CONFIG, tmp_path, ENVIRONMENT, rerun=False)
    records.write_yaml(records.config_path(tmp_path), {**records.read_config(tmp_path), "version": 99})
    with pytest.raises(ValueError, match="upgrade regrow"):
        check_folder(CONFIG, tmp_path)


def test_errors_in_writing_say_what_they_mean(tmp_path):
    with pytest.raises(OSError, match="cannot be written to: Permission denied"), writing(tmp_path):
        raise PermissionError(13, "Permission denied", "x")
    with pytest.raises(BlockingIOError, match="held by another"), writing(tmp_path):
        raise BlockingIOError("held by another")
