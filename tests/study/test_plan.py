"""Where runs lie. A run is "finished" here once its folder has a config.yaml and a result.json."""

from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.config import RunConfig
from regrow.study.identity import resolved
from regrow.study.plan import Comparison, check_folder, claim, jobs_of, plan
from regrow.study.studyfile import Study, read_study

BASE = "methods: [standard, repr]\nseeds: 0-1\n"
BASE_RUNS = [f"convnet-digits/{method}-seed{seed}" for method in ("standard", "repr") for seed in (0, 1)]


def study(tmp_path: Path, text: str, name: str = "grid") -> Study:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    return read_study(path)


def pretend(config: RunConfig, folder: Path, *, finished: bool = True) -> None:
    """A run folder, as far as a plan looks at it."""
    records.write_yaml(folder / "config.yaml", {"version": 1, **resolved(config)})
    if finished:
        (folder / "result.json").write_text("{}")


def run_all(comparisons: list[Comparison]) -> None:
    for job in jobs_of(comparisons):
        if job.state != "done":
            pretend(job.config, job.folder)


def names(comparisons: list[Comparison], folder: Path) -> list[str]:
    return [job.folder.relative_to(folder).as_posix() for job in jobs_of(comparisons)]


def states(comparisons: list[Comparison]) -> dict[str, str]:
    return {f"{job.folder.parent.name}/{job.folder.name}": job.state for job in jobs_of(comparisons)}


def test_folders_are_called_after_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert names(plan(study(tmp_path, BASE), out)[0], out) == [
        "convnet-digits/standard-seed0",
        "convnet-digits/repr-seed0",
        "convnet-digits/standard-seed1",
        "convnet-digits/repr-seed1",
    ]
    text = """
methods:
  standard:
  repr: {fraction: [0.2, 0.3], criterion: [ortho, l2], skip_first: false}
seeds: 3
models: {"torchvision:resnet18": , resnet: {depth: [20, 32]}}
settings: {lr: [0.1, 0.05]}
"""
    found = names(plan(study(tmp_path, text), out)[0], out)
    assert len(found) == 6 * 5
    assert found[:2] == [
        "torchvision_resnet18-digits-lr0.1/standard-seed3",
        "torchvision_resnet18-digits-lr0.1/repr-fraction0.2-criterion-ortho-seed3",
    ]
    assert found[-1] == "resnet-digits-depth32-lr0.05/repr-fraction0.3-criterion-l2-seed3"
    assert not out.exists()


def test_what_is_done_is_found_when_seeds_methods_and_values_are_added(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_all(plan(study(tmp_path, BASE), out)[0])
    more = "methods:\n  standard:\n  repr: {fraction: [0.2, 0.3]}\n  dropout:\nseeds: 0-2\n"
    assert states(plan(study(tmp_path, more), out)[0]) == {
        **{
            f"convnet-digits/{method}-seed{seed}": "done"
            for method in ("standard", "repr")
            for seed in (0, 1)
        },
        # The fraction that was there has its name already; further seeds of it are called alike.
        **{f"convnet-digits/{method}-seed2": "new" for method in ("standard", "repr", "dropout")},
        **{f"convnet-digits/dropout-seed{seed}": "new" for seed in (0, 1)},
        **{f"convnet-digits/repr-fraction0.2-seed{seed}": "new" for seed in (0, 1, 2)},
    }


def test_what_is_done_is_found_when_an_axis_is_added_for_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_all(plan(study(tmp_path, BASE), out)[0])
    found = plan(study(tmp_path, BASE + "settings: {epochs: [30, 60]}\n"), out)[0]
    assert states(found) == {
        **{
            f"convnet-digits/{method}-seed{seed}": "done"
            for method in ("standard", "repr")
            for seed in (0, 1)
        },
        **{
            f"convnet-digits-epochs60/{method}-seed{seed}": "new"
            for method in ("standard", "repr")
            for seed in (0, 1)
        },
    }
    assert [each.title for each in found] == ["convnet on digits, epochs 30", "convnet on digits, epochs 60"]


def test_a_value_that_replaces_another_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_all(plan(study(tmp_path, BASE), out)[0])
    repr_ = "methods: {standard: , repr: {fraction: 0.5}}\nseeds: 0\n"
    assert states(plan(study(tmp_path, repr_), out)[0]) == {
        "convnet-digits/standard-seed0": "done",
        "convnet-digits/repr-fraction0.5-seed0": "new",
    }
    shorter = plan(study(tmp_path, BASE + "settings: {epochs: 10}\n"), out)[0]
    assert {each.folder.name for each in shorter} == {"convnet-digits-epochs10"}


def test_a_folder_by_any_name_is_found_by_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = plan(study(tmp_path, BASE), out)[0]
    pretend(jobs_of(wanted)[0].config, out / "moved here" / "by hand")
    found = jobs_of(plan(study(tmp_path, BASE), out)[0])
    assert (found[0].folder, found[0].state) == (out / "moved here" / "by hand", "done")
    assert [job.folder.name for job in found[1:]] == ["repr-seed0", "standard-seed1", "repr-seed1"]
    assert {job.folder.parent.name for job in found} == {"moved here"}


def test_of_two_folders_with_the_same_run_the_finished_one_counts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = jobs_of(plan(study(tmp_path, BASE), out)[0])[0].config
    pretend(config, out / "convnet-digits" / "a", finished=False)
    pretend(config, out / "convnet-digits" / "b")
    pretend(config, out / "convnet-digits" / "c", finished=False)
    found = jobs_of(plan(study(tmp_path, BASE), out)[0])[0]
    assert (found.folder.name, found.state) == ("b", "done")


def test_an_unfinished_run_is_found_whatever_does_not_matter_to_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = jobs_of(plan(study(tmp_path, BASE), out)[0])[0].config
    begun = config.model_copy(update={"fraction": 0.7, "threads": 1})
    pretend(begun, out / "convnet-digits" / "standard-seed0", finished=False)
    job = jobs_of(plan(study(tmp_path, BASE + "settings: {threads: 2}\n"), out)[0])[0]
    assert job.state == "unfinished"
    assert job.config.threads == 2


def test_names_that_are_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "convnet-digits" / "standard-seed0").mkdir(parents=True)
    (out / "convnet-digits" / "standard-seed0" / "config.yaml").write_text("[")
    (out / "vgg-digits").write_text("a file")
    found, unreadable = plan(study(tmp_path, BASE + "models: [convnet, vgg]\n"), out)
    assert unreadable == [out / "convnet-digits" / "standard-seed0"]
    assert sorted({each.folder.name for each in found}) == ["convnet-digits-2", "vgg-digits-2"]


def test_what_was_killed_before_it_began_takes_no_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "convnet-digits" / "repr-seed0").mkdir(parents=True)
    (out / "convnet-digits" / "repr-seed0" / ".lock").touch()
    (out / "convnet-digits" / "logs").mkdir()
    found = plan(study(tmp_path, BASE), out)[0]
    assert sorted(states(found)) == sorted(BASE_RUNS)
    assert set(states(found).values()) == {"new"}


def test_names_are_safe_and_not_too_long(tmp_path: Path) -> None:
    layers = [f"features.{number}" for number in range(40)]
    text = f"methods: {{repr: {{exclude: [{layers}, {layers[:39]}, ['../x y/é']]}}}}\nseeds: 0\n"
    found = [job.folder.name for job in jobs_of(plan(study(tmp_path, text), tmp_path / "out")[0])]
    assert len(set(found)) == 3
    assert all(len(name) < 140 for name in found)
    assert found[2] == "repr-exclude-.._x_y_-seed0"


def test_variants_and_baseline(tmp_path: Path) -> None:
    text = "methods: {repr: {fraction: [0.2, 0.3]}, standard: }\nseeds: 0-1\n"
    (found,) = plan(study(tmp_path, text), tmp_path / "out")[0]
    assert list(found.variants.values())[:3] == ["RePr, fraction 0.2", "RePr, fraction 0.3", "standard"]
    assert found.baseline == "RePr, fraction 0.2"
    assert found.title == "convnet on digits"


def test_two_comparisons_may_share_a_run(tmp_path: Path) -> None:
    text = (
        "methods: {standard: {weight_decay: 0.01}, dropout: }\nseeds: 0\n"
        "settings: {weight_decay: [0.001, 0.0001]}\n"
    )
    found = plan(study(tmp_path, text), tmp_path / "out")[0]
    assert len(jobs_of(found)) == 3
    assert found[0].jobs[0].folder == found[1].jobs[0].folder


def test_the_folder_of_a_study_is_known_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = study(tmp_path, BASE)
    check_folder(one, out)
    claim(one, out, plan(one, out)[0])
    assert (out / "study.yaml").read_bytes() == one.text
    check_folder(study(tmp_path, BASE + "settings: {epochs: [30, 60]}\n"), out)
    with pytest.raises(ValueError, match="another study: no run of it is in this one"):
        check_folder(study(tmp_path, BASE + "settings: {epochs: 60}\n"), out)
    with pytest.raises(ValueError, match=r"another study, 'grid', not 'other'.*write 'name: grid'"):
        check_folder(study(tmp_path, BASE, "other"), out)
    check_folder(study(tmp_path, "name: grid\n" + BASE, "other"), out)


def test_a_folder_that_is_no_studys(tmp_path: Path) -> None:
    one, out = study(tmp_path, BASE), tmp_path / "out"
    out.mkdir()
    check_folder(one, out)
    pretend(one.runs[0].config, out / "standard-seed0")
    with pytest.raises(ValueError, match="not empty and holds no study"):
        check_folder(one, out)
    with pytest.raises(ValueError, match="not empty and holds no study"):
        check_folder(one, out / "standard-seed0")
    with pytest.raises(ValueError, match="is a file"):
        check_folder(one, tmp_path / "grid.yaml")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": "x", "name": "grid"}'])
def test_a_damaged_record_of_a_study(tmp_path: Path, text: str) -> None:
    one, out = study(tmp_path, BASE), tmp_path / "out"
    claim(one, out, plan(one, out)[0])
    (out / "study.json").write_text(text)
    with pytest.raises(ValueError, match=r"study\.json is damaged"):
        check_folder(one, out)
    (out / "study.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="newer regrow"):
        check_folder(one, out)


def test_a_large_study_is_planned_fast_enough_to_wait_for(tmp_path: Path) -> None:
    text = "methods: [standard, repr]\nseeds: 0-499\nsettings: {epochs: [10, 20]}\n"
    out = tmp_path / "out"
    assert len(jobs_of(plan(study(tmp_path, text), out)[0])) == 2000
