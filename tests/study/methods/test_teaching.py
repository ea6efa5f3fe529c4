"""Distillation and Born-Again networks: the loss by hand, and who teaches whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow.losses import distillation_loss
from regrow.study import records
from regrow.study.building import build
from regrow.study.config import make_config
from regrow.study.data import Splits, load_data
from regrow.study.methods.teaching import BornAgain, Distillation, _Teacher
from regrow.study.parts import Parts
from regrow.study.ranks import Ranks
from regrow.study.steps import evaluate
from regrow.study.train import train
from regrow.study.trained import network_of_run

SMALL: dict[str, Any] = {
    "data": "digits", "width": 4, "train_size": 100, "batch_size": 50, "epochs": 3, "threads": 1,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_data("digits", train_size=100)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of the seeds 0 and 1, of another width than the students."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        train(make_config({**SMALL, "epochs": 1, "width": 6, "seed": seed}), folder / f"standard-seed{seed}")
    return folder


def parts(splits: Splits, **settings: Any) -> Parts:
    return Parts(make_config({**SMALL, **settings}), splits, torch.device("cpu"), Ranks())


def batch(run: Parts) -> tuple[Tensor, Tensor]:
    return next(iter(run.train.epoch(1)))


def test_the_loss_of_a_step_is_that_of_the_teacher_of_the_seed(splits: Splits, teachers: Path) -> None:
    for seed in (0, 1):
        own = {"temperature": 2.0, "distillation_weight": 0.7, "seed": seed}
        run = parts(splits, method="distillation", teacher=str(teachers), **own)
        images, labels = batch(run)
        run.model.train()
        found = []
        for other in (0, 1):
            teacher, _, _ = network_of_run(teachers / f"standard-seed{other}")
            with torch.no_grad():
                scores = teacher.eval()(images)
                logits = run.model(images)
            found.append(float(distillation_loss(logits, scores, labels, temperature=2.0, weight=0.7)))
        loss, _ = run.step(images, labels, 1.0)
        assert float(loss) == pytest.approx(found[seed], rel=1e-5)
        assert float(loss) != pytest.approx(found[1 - seed], rel=1e-3)


def test_the_teacher_stays_as_it_is(splits: Splits, teachers: Path) -> None:
    run = parts(splits, method="distillation", teacher=str(teachers))
    part = run.method.parts["distillation"]
    assert isinstance(part, Distillation)
    before = {name: each.clone() for name, each in part._teacher.state_dict().items()}
    for images, labels in run.train.epoch(1):
        run.step(images, labels, 1.0)
    assert not part._teacher.training
    assert all(torch.equal(before[name], each) for name, each in part._teacher.state_dict().items())
    ours = {id(each) for group in run.optimizer.param_groups for each in group["params"]}
    assert not ours & {id(each) for each in part._teacher.parameters()}


def test_without_weight_the_teacher_does_not_count(teachers: Path, tmp_path: Path) -> None:
    own = {"teacher": str(teachers), "distillation_weight": 0.0, "method": "distillation"}
    for name, settings in (("standard", {}), ("taught", own)):
        train(make_config({**SMALL, **settings}), tmp_path / name)
    one, two = (records.read_run(tmp_path / name) for name in ("standard", "taught"))
    for line, other in zip(one.epochs, two.epochs, strict=True):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-4)
        # The FLOPs of the teacher, which is 6 filters wide, are counted all the same.
        convolutions = 2 * (9 * 6 * 64 + 54 * 6 * 16 + 54 * 6 * 4) + 2 * 6 * 10
        assert other["flops"] - line["flops"] == 100 * convolutions


def test_pictures_are_normalised_for_the_teacher(splits: Splits, teachers: Path) -> None:
    teacher = _Teacher(teachers / "standard-seed0", None)
    raw = splits.test.pixels[:20].float() / 255
    with torch.no_grad():
        expected = teacher.network((raw - splits.mean[0]) / splits.std[0])
        teacher.take_pictures_of((0.3,), (0.7,))
        torch.testing.assert_close(teacher((raw - 0.3) / 0.7), expected)
        torch.testing.assert_close(teacher(((raw - 0.3) / 0.7).expand(-1, 3, -1, -1)), expected)
        teacher.take_pictures_of(splits.mean, splits.std)
        images = (raw - splits.mean[0]) / splits.std[0]
        assert torch.equal(teacher(images), expected)
    with pytest.raises(ValueError, match="its pictures have 1 channels, and those of this run have 3"):
        teacher.take_pictures_of((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


def test_a_teacher_of_other_classes_is_refused(
    splits: Splits, teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), 7)

    monkeypatch.setattr(_Teacher, "forward", Narrow().forward)
    with pytest.raises(ValueError, match="tells 7 classes apart, and the pictures of this run have 10"):
        parts(splits, method="distillation", teacher=str(teachers))


def test_a_state_of_another_teacher_is_refused(splits: Splits, teachers: Path) -> None:
    one, other = (
        parts(splits, method="distillation", teacher=str(teachers / f"standard-seed{seed}")).method
        for seed in (0, 1)
    )
    one.check_state_dict(one.state_dict(), 1)
    with pytest.raises(ValueError, match="trained by another teacher"):
        other.check_state_dict(one.state_dict(), 1)


def test_each_generation_is_new_and_learns_from_the_last(splits: Splits) -> None:
    run = parts(splits, method="ban", generations=3)
    part = run.method.parts["ban"]
    assert isinstance(part, BornAgain)
    images, labels = batch(run)
    logits = run.model(images)
    assert part.loss(logits, images, labels) is None
    for number in (1, 2):
        run.step(images, labels, 1.0)
        before = {name: each.clone() for name, each in run.model.state_dict().items()}
        (event,) = run.switch()
        assert (event["kind"], event["cycle"]) == ("fresh", number)
        fresh = run._fresh(number).state_dict()
        assert all(torch.equal(fresh[name], each) for name, each in run.model.state_dict().items())
        assert part._teacher is not None
        assert all(torch.equal(before[name], each) for name, each in part._teacher.state_dict().items())
        for state in run.optimizer.state.values():
            assert not state["momentum_buffer"].any()
        with torch.no_grad():
            scores, logits = part._teacher(images), run.model(images)
        loss = part.loss(logits, images, labels)
        assert loss is not None
        torch.testing.assert_close(loss, distillation_loss(logits, scores, labels))


def test_the_first_generation_of_a_task_has_no_teacher(splits: Splits) -> None:
    run = parts(splits, method="ban", generations=2, tasks=2, epochs=4)
    part = run.method.parts["ban"]
    assert isinstance(part, BornAgain)
    taught = []
    for _ in range(3):
        run.switch()
        taught.append(part._teacher is not None)
    assert taught == [True, False, True]


def test_hostile_teachers_in_a_checkpoint(splits: Splits) -> None:
    run = parts(splits, method="ban")
    run.switch()
    good = run.method.state_dict()
    run.method.check_state_dict(good, 0)
    weights = good["ban"]["teacher"]
    for bad in (None, 3, {}, {**weights, "classifier.weight": torch.zeros(3)}, {**weights, "x": 1}):
        with pytest.raises(ValueError, match=r"."):
            run.method.check_state_dict({"ban": {"teacher": bad}}, 0)
    for state in (None, {}, {"ban": None}, {"ban": {}}, {"repr": {}}):
        with pytest.raises(ValueError, match=r"."):
            run.method.check_state_dict(state, 0)  # type: ignore[arg-type]


def test_first_weights_of_a_round_depend_on_seed_and_round_alone(splits: Splits) -> None:
    one, again, other = (parts(splits, seed=seed) for seed in (3, 3, 4))
    torch.rand(5)
    before = torch.get_rng_state()
    first = one._fresh(1).state_dict()["features.0.conv.weight"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again._fresh(1).state_dict()["features.0.conv.weight"])
    for different in (one._fresh(2), other._fresh(1)):
        assert not torch.equal(first, different.state_dict()["features.0.conv.weight"])
    torch.manual_seed(3)
    assert not torch.equal(first, build(one.config, splits).state_dict()["features.0.conv.weight"])
    assert evaluate(one._fresh(1), one.validation)["accuracy"] < 0.5
