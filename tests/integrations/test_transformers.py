"""The callbacks for the Trainer of transformers: what a training with them does, saves and leaves."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import regrow
from cycles import same_models
from pages import running
from regrow.integrations.transformers import Bridgeout, RePr
from resnets import X, Y, resnet

SETTINGS = {"fraction": 0.4, "full": 2, "sub": 2, "cycles": 1}
PICTURES = [{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def trainer(folder, *callbacks, model=None, epochs=5, kind=Trainer, **more) -> Trainer:
    """A Trainer of 3 steps an epoch, whose pictures come in another order in each epoch."""
    arguments = {
        "per_device_train_batch_size": 4, "learning_rate": 0.02, "lr_scheduler_type": "constant",
        "use_cpu": True, "dataloader_pin_memory": False, "report_to": [], "disable_tqdm": True,
        "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no",
    }  # fmt: skip
    return kind(
        resnet() if model is None else model,
        TrainingArguments(str(folder), num_train_epochs=epochs, **arguments | more),
        train_dataset=PICTURES, eval_dataset=PICTURES, callbacks=list(callbacks),
    )  # fmt: skip


def trained(folder, *callbacks, resume=None, **more) -> nn.Module:
    ours = trainer(folder, *callbacks, **more)
    ours.train(resume_from_checkpoint=resume)
    return ours.model


def silent(weights: dict[str, torch.Tensor]) -> int:
    return sum(int((each.flatten(1) == 0).all(1).sum()) for each in weights.values() if each.dim() == 4)


def is_plain(model: nn.Module) -> bool:
    classes = [type(module) for module in resnet().modules()]
    marked = any("regrow" in key or "bridgeout" in key for m in model.modules() for key in vars(m))
    return [type(module) for module in model.modules()] == classes and not marked


def both() -> list[TrainerCallback]:
    return [RePr(X[:1], **SETTINGS), Bridgeout(p=0.2)]


def own_loop(noise: bool) -> nn.Module:
    """The same training in a loop of one's own."""
    model = resnet()
    if noise:
        regrow.add_bridgeout(model, p=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    cycle = regrow.RePr(model, optimizer, example_inputs=X[:1], **SETTINGS)
    for _ in range(5):
        for start in range(0, 12, 4):
            optimizer.zero_grad()
            part = slice(start, start + 4)
            model(pixel_values=X[part], labels=Y[part]).loss.backward()
            optimizer.step()
        cycle.step()
    return model


@pytest.mark.parametrize("order", [1, -1])
def test_a_training_does_what_a_loop_of_ones_own_does(tmp_path, order):
    plainly = {"train_sampling_strategy": "sequential", "max_grad_norm": 0, "optim": "sgd"}
    callback = RePr(X[:1], **SETTINGS)
    model = trained(tmp_path, callback, **plainly)
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]
    assert same_models(model, own_loop(noise=False))
    assert is_plain(model)
    model = trained(tmp_path, *both()[::order], **plainly)
    assert same_models(model, own_loop(noise=True))
    assert is_plain(model)


@pytest.mark.parametrize(
    ("per", "step"), [("epoch", 6), ("epoch", 7), ("epoch", 9), ("epoch", 12), ("step", 7)]
)
def test_a_training_goes_on_in_the_middle_of_a_cycle(tmp_path, per, step):
    """At the last step of an epoch the checkpoint is written ahead of the end of that epoch."""
    length = {"epoch": 1, "step": 3}[per]

    def callbacks():
        return RePr(X[:1], per=per, **{**SETTINGS, "full": 2 * length, "sub": 2 * length}), Bridgeout(p=0.2)

    whole = trained(tmp_path, *callbacks(), epochs=4, save_strategy="steps", save_steps=1)
    again = trained(tmp_path / "again", *callbacks(), epochs=4, resume=str(tmp_path / f"checkpoint-{step}"))
    assert same_models(whole, again)
    assert is_plain(again)


@pytest.mark.parametrize("more", [{}, {"bf16": True, "gradient_accumulation_steps": 2}])
def test_the_last_checkpoint_is_found_where_it_was_written_and_where_it_was_moved_to(tmp_path, more):
    def saved(folder, **resume):
        return trained(folder, *both(), save_strategy="epoch", **resume, **more)

    whole = saved(tmp_path / "one")
    for later in checkpoints(tmp_path / "one")[3:]:
        shutil.rmtree(later)
    moved = shutil.copytree(checkpoints(tmp_path / "one")[-1], tmp_path / "elsewhere")
    assert same_models(whole, saved(tmp_path / "one", resume=True))
    assert same_models(whole, saved(tmp_path / "two", resume=moved))


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def test_a_checkpoint_in_the_sub_phase_is_one_of_a_plain_model(tmp_path):
    trained(tmp_path, *both(), save_strategy="epoch")
    third = checkpoints(tmp_path)[2]
    stored = load_file(third / "model.safetensors")
    assert stored.keys() == resnet().state_dict().keys()
    assert silent(stored) > 0
    config = json.loads((third / "config.json").read_text())
    assert config["architectures"] == ["ResNetForImageClassification"]
    loaded = type(resnet()).from_pretrained(third)
    assert is_plain(loaded)
    torch.load(third / "regrow_repr.pt", weights_only=True)
    json.loads((third / "regrow_bridgeout.json").read_text())


def test_without_the_argument_a_training_starts_anew(tmp_path):
    callback = RePr(X[:1], **SETTINGS)
    ours = trainer(tmp_path, callback, save_strategy="epoch")
    for _ in range(2):
        ours.train()
        assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]


def test_a_checkpoint_from_before_the_callbacks_is_one_to_begin_with(tmp_path):
    trained(tmp_path, epochs=1, save_strategy="epoch")
    callback = RePr(X[:1], **SETTINGS)
    model = trained(tmp_path, callback, Bridgeout(), resume=True)
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]
    assert is_plain(model)


def test_steps_are_counted_in_steps_of_the_optimizer(tmp_path):
    callback = RePr(X[:1], per="step", **SETTINGS)
    trained(tmp_path, callback, epochs=3, gradient_accumulation_steps=2)  # 2 steps an epoch
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]


class Fails(TrainerCallback):
    """Raises ``error`` once, in the fourth epoch."""

    def __init__(self, error) -> None:
        self.error = error

    def on_step_end(self, _, state, *__, **___):
        error = self.error
        if state.global_step == 10 and error is not None:
            self.error = None
            raise error


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("error", [OverflowError, KeyboardInterrupt])
def test_after_an_error_the_block_gives_a_plain_model(tmp_path, order, error):
    one, two = both()[::order]
    ours = trainer(tmp_path, one, two, Fails(error()))
    with pytest.raises(error), one, two:
        ours.train()
    assert is_plain(ours.model)
    assert silent(ours.model.state_dict()) > 0


@pytest.mark.parametrize("order", [1, -1])
def test_after_an_error_the_next_training_of_the_same_callbacks_goes_on(tmp_path, order):
    whole = trained(tmp_path / "whole", *both())
    ours = trainer(tmp_path, *both()[::order], Fails(OverflowError()), save_strategy="epoch")
    with pytest.raises(OverflowError):
        ours.train()
    assert not is_plain(ours.model)
    ours.train(resume_from_checkpoint=True)
    assert same_models(whole, ours.model)
    assert is_plain(ours.model)


def test_a_batch_that_is_too_large_begins_the_training_again(tmp_path):
    error = RuntimeError("CUDA out of memory.")  # as the Trainer knows it
    callbacks = both()
    ours = trainer(tmp_path, *callbacks, Fails(error), auto_find_batch_size=True)
    ours.train()
    assert [event.kind for event in callbacks[0].events] == ["drop", "restore"]
    assert is_plain(ours.model)


def test_a_training_that_ends_among_dropped_filters_says_so(tmp_path):
    with pytest.warns(UserWarning, match="the training ended while filters were dropped"):
        model = trained(tmp_path, RePr(X[:1], **SETTINGS), epochs=3)
    assert is_plain(model)
    assert silent(model.state_dict()) > 0


class Scores(Trainer):
    """A Trainer that finds the model of one epoch best."""

    best = 0

    def evaluate(self, *_, **__):
        metrics = {"eval_score": float(self.state.epoch == self.best)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def best_of(folder, epoch: int, epochs: int) -> nn.Module:
    return trained(
        folder, *both(), kind=type("Scores", (Scores,), {"best": epoch}), epochs=epochs,
        save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip


def test_a_best_model_of_the_sub_phase_says_so(tmp_path):
    with pytest.warns(UserWarning, match="the best model, which was loaded, was saved while filters"):
        model = best_of(tmp_path, 3, 5)
    assert is_plain(model)
    assert silent(model.state_dict()) > 0


def test_a_best_model_of_the_full_phase_is_whole_also_where_the_training_ends_in_a_sub_phase(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = best_of(tmp_path, 1, 3)
    stored = load_file(checkpoints(tmp_path)[0] / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert is_plain(model)


def test_an_epoch_that_is_cut_short_is_not_counted_and_a_longer_training_goes_on(tmp_path):
    whole = trained(tmp_path / "whole", *both())
    with pytest.warns(UserWarning, match="while filters were dropped"):
        trained(tmp_path, *both(), max_steps=10, save_strategy="epoch")
    assert same_models(whole, trained(tmp_path, *both(), resume=True))


def test_a_checkpoint_with_other_settings_is_refused_before_a_step_is_made(tmp_path):
    trained(tmp_path, *both(), epochs=1, save_strategy="epoch")
    one, two = RePr(X[:1], **{**SETTINGS, "sub": 3}), Bridgeout(p=0.2)
    ours = trainer(tmp_path, one, two)
    with pytest.raises(ValueError, match="other settings"), one, two:
        ours.train(resume_from_checkpoint=True)
    assert is_plain(ours.model)
    ours = trainer(tmp_path, Bridgeout(p=0.3))
    with pytest.raises(ValueError, match="other settings"):
        ours.train(resume_from_checkpoint=True)


def test_what_is_wrong_is_said_when_the_callback_is_made():
    with pytest.raises(ValueError, match="per must be"):
        RePr(X[:1], per="batch")
    with pytest.raises(TypeError, match="fractoin"):
        RePr(X[:1], fractoin=0.3)
    with pytest.raises(TypeError, match="strength"):
        Bridgeout(strength=0.3)


def test_norms_are_measured_again_without_noise(tmp_path):
    model = trained(tmp_path, Bridgeout(p=0.5, calibration=[X]), epochs=1)
    other = trained(tmp_path, Bridgeout(p=0.5), epochs=1)
    assert not same_models(model, other)
    regrow.reestimate_norms(other, [X])
    assert same_models(model, other)


def test_the_snippet_of_the_page_runs_as_printed(tmp_path, monkeypatch):
    code = running("transformers.md")[0]

    def short(model, arguments, *, train_dataset, callbacks):
        assert train_dataset is PICTURES
        given = {"epochs": arguments.num_train_epochs, "save_strategy": arguments.save_strategy}
        return trainer(tmp_path, *callbacks, model=model, **given)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers, "Trainer", short)
    scope = {"model": resnet(), "x": X, "dataset": PICTURES}
    exec(code, scope)
    assert [event.step for event in scope["cycle"].events] == [4, 6, 10, 12]
    assert is_plain(scope["model"])
