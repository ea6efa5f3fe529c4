"""The callbacks for Lightning: what a fit with them does, saves, continues and leaves behind."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

import regrow
from cycles import same_models
from pages import running
from regrow.integrations.fitting import averaged_copies, network_name
from regrow.integrations.lightning import Bridgeout, RePr

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
X = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3
SETTINGS = {"fraction": 0.4, "full": 2, "sub": 2, "cycles": 1}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


class Fits(pl.LightningModule):
    """A module whose training step calls a part of it, and never the module itself."""

    def __init__(self, fails_in: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.fails_in, self.passes_seen = net(), fails_in, 0
        self.example_input_array = X[:1]

    def training_step(self, batch, _):
        if self.current_epoch == self.fails_in:
            raise OverflowError("the user's own")
        self.passes_seen += 1
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)


class Validates(Fits):
    def validation_step(self, batch, _):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def val_dataloader(self):
        return self.train_dataloader()


def trainer(*callbacks, epochs: int = 5, saves: bool = False, **more) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=saves, enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip


def fitted(*callbacks, module: type = Fits, **more) -> pl.LightningModule:
    fit = module()
    trainer(*callbacks, **more).fit(fit)
    return fit


def own_loop(epochs: int = 5, noise: bool = False) -> nn.Module:
    """The same training in a loop of one's own."""
    fit = Fits()
    if noise:
        regrow.add_bridgeout(fit.net, p=0.2)
    optimizer = fit.configure_optimizers()
    cycle = regrow.RePr(fit.net, optimizer, example_inputs=X[:1], **SETTINGS)
    for _ in range(epochs):
        for batch in fit.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(fit.net(batch[0]), batch[1]).backward()
            optimizer.step()
        cycle.step()
    return fit.net


def silent(model: nn.Module) -> int:
    return int((model.get_submodule("3").weight.flatten(1) == 0).all(1).sum())


def is_plain(fit: Fits) -> bool:
    classes = [type(module) for module in net().modules()]
    marked = any("regrow" in key or "bridgeout" in key for m in fit.modules() for key in vars(m))
    return [type(module) for module in fit.net.modules()] == classes and not marked


def test_a_fit_does_what_a_loop_of_ones_own_does():
    callback = RePr(**SETTINGS)
    fit = fitted(callback)
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]
    assert same_models(fit.net, own_loop())
    assert is_plain(fit)


def test_with_noise_a_fit_does_what_a_loop_of_ones_own_does():
    for callbacks in [(RePr(**SETTINGS), Bridgeout(p=0.2)), (Bridgeout(p=0.2), RePr(**SETTINGS))]:
        fit = fitted(*callbacks)
        noisy = own_loop(noise=True)
        assert same_models(fit.net, noisy)
        assert is_plain(fit)


def test_steps_are_counted_in_steps_of_the_optimizer():
    callback = RePr(per="step", **SETTINGS)
    fitted(callback, epochs=3, accumulate_grad_batches=2)  # 2 steps an epoch
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]


class StepsByHand(Fits):
    """Two optimizers: that of the head steps in each batch, that of the net once an epoch, past Lightning."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.raw, self.head = False, raw, nn.Linear(3, 3)

    def training_step(self, batch, number):
        for_net, for_head = self.optimizers(use_pl_optimizer=not self.raw)
        self.manual_backward(nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1]))
        for_head.step()
        if number == 2:
            for_net.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.net, self.head)]


@pytest.mark.parametrize("per", ["epoch", "step"])
@pytest.mark.parametrize("raw", [False, True])
def test_only_steps_of_the_nets_optimizer_count_also_those_that_lightning_does_not_see(per, raw):
    callback, fit = RePr(per=per, **SETTINGS), StepsByHand(raw)
    trainer(callback).fit(fit)
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]
    assert callback.state_dict()["cycle"]["step"] == 5
    optimizer = fit.optimizers(use_pl_optimizer=False)[0]
    assert not optimizer._optimizer_step_post_hooks


class StepsTwice(StepsByHand):
    def training_step(self, batch, _):
        super().training_step(batch, 2)
        super().training_step(batch, 2)


def test_several_steps_in_a_batch_all_count():
    callback = RePr(per="step", **{**SETTINGS, "full": 6, "sub": 6})
    trainer(callback, epochs=3).fit(StepsTwice(False))  # 6 steps an epoch
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 6), ("restore", 12)]
    assert callback.state_dict()["cycle"]["step"] == 18


@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
@pytest.mark.parametrize("module", [Fits, Validates], ids=["at the epoch's end", "after the validation"])
def test_a_fit_goes_on_where_the_checkpoint_was_written(tmp_path, module, epochs):
    def callbacks():
        return RePr(**SETTINGS), Bridgeout(p=0.2)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fitted(*callbacks(), saving, module=module, saves=True)
    again = module()
    path = tmp_path / f"epoch={epochs - 1}.ckpt"
    trainer(*callbacks()).fit(again, ckpt_path=path, weights_only=True)
    assert same_models(whole.net, again.net)
    assert is_plain(again)


@pytest.mark.parametrize("step", [3, 6, 9, 12])
@pytest.mark.parametrize("per", ["epoch", "step"])
def test_a_fit_goes_on_from_the_last_step_of_an_epoch(tmp_path, per, step):
    """Lightning saves ahead of the hook at the end of the epoch then, and goes on with the next epoch."""

    def callback():
        length = {"epoch": 1, "step": 3}[per]
        return RePr(per=per, **{**SETTINGS, "full": 2 * length, "sub": 2 * length})

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fitted(callback(), saving, saves=True)
    again = Fits()
    trainer(callback()).fit(again, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert same_models(whole.net, again.net)


@pytest.mark.parametrize("order", [1, -1])
def test_an_aborted_fit_leaves_a_plain_model_and_a_checkpoint_that_goes_on(tmp_path, order):
    fit = Fits(fails_in=3)
    callbacks = [RePr(**SETTINGS), Bridgeout(p=0.2)][::order]
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(OverflowError, match="own"):
        trainer(*callbacks, saving, saves=True).fit(fit)
    assert is_plain(fit)
    assert silent(fit.net) > 0
    again = RePr(**SETTINGS)
    whole = Fits()
    trainer(again, Bridgeout(p=0.2)).fit(whole, ckpt_path=saving.ckpt_path)
    assert [event.kind for event in again.events] == ["restore"]
    assert silent(whole.net) == 0


def test_a_fit_that_ends_among_dropped_filters_says_so():
    with pytest.warns(UserWarning, match="while filters were dropped"):
        fit = fitted(RePr(**SETTINGS), epochs=3)
    assert is_plain(fit)
    assert silent(fit.net) > 0


def test_a_second_fit_starts_anew():
    callback = RePr(**SETTINGS)
    first, second = fitted(callback), fitted(callback)
    assert same_models(first.net, second.net)


class Watches(pl.Callback):
    """The filters of zeros in the averaged copy and in the model after each epoch."""

    def __init__(self) -> None:
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        (average,) = averaged_copies(trainer.callbacks, "net")
        self.found.append((silent(pl_module.net), silent(average)))


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
def test_averaged_weights_follow(averaging):
    callback, watches = RePr(**SETTINGS), Watches()
    fit = fitted(callback, averaging(), watches, module=Validates)
    dropped = len(callback.events[0].filters["3"])
    assert watches.found == [(0, 0), (dropped, dropped), (dropped, dropped), (0, 0), (0, 0)]
    assert silent(fit.net) == 0
    assert is_plain(fit)


def test_averaged_weights_follow_after_a_resume(tmp_path):
    def callbacks():
        return RePr(**SETTINGS), EMAWeightAveraging(decay=0.9)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fitted(*callbacks(), saving, saves=True)
    again = Fits()
    trainer(*callbacks()).fit(again, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert same_models(whole.net, again.net)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)


def test_the_averages_of_swa_follow():
    callback, watches = RePr(**SETTINGS), Watches()
    fit = fitted(callback, swa(), watches)
    dropped = len(callback.events[0].filters["3"])
    assert watches.found[1:4] == [(dropped, dropped), (dropped, dropped), (0, 0)]
    assert [event.step for event in callback.events] == [2, 4]
    assert silent(fit.net) == 0
    assert is_plain(fit)


class WeightsWhenMeasured(pl.Callback):
    """The model's values at the first pass that measures: Lightning steps the optimizer once after it."""

    def on_train_batch_start(self, _, pl_module, __, index):
        if index == 0:
            self.found = {name: value.clone() for name, value in pl_module.net.state_dict().items()}


@pytest.mark.parametrize("order", [1, -1])
def test_the_statistics_that_swa_measures_are_those_without_noise(order):
    fit, before = Fits(), WeightsWhenMeasured()
    trainer(*[swa(), Bridgeout(p=0.5)][::order], before, epochs=3).fit(fit)
    measured = net()
    measured.load_state_dict(before.found)
    torch.optim.swa_utils.update_bn(fit.train_dataloader(), measured)
    for norm in ("1", "4"):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(
                getattr(fit.net.get_submodule(norm), name), getattr(measured.get_submodule(norm), name)
            )
    assert torch.is_grad_enabled()
    assert is_plain(fit)


def test_the_epoch_in_which_swa_measures_is_not_counted():
    callback = RePr(fraction=0.4, full=3, sub=3, cycles=1)
    with pytest.warns(UserWarning, match="while filters were dropped"):
        fitted(callback, swa(), epochs=5)
    assert [event.kind for event in callback.events] == ["drop"]


class Inner(Fits):
    def __init__(self) -> None:
        super().__init__()
        regrow.add_bridgeout(self)


def test_noise_on_the_module_whose_step_calls_a_part_of_it_is_refused_and_on_the_part_is_not():
    with pytest.raises(ValueError, match="outside a call of the model"):
        fitted(module=Inner)
    with pytest.raises(ValueError, match="outside a call of the model"):
        fitted(Bridgeout(module=""))
    assert is_plain(fitted(Bridgeout()))


class Called(Fits):
    """A module whose training step calls the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net = self.net[:3], self.net[3:]

    def forward(self, x):
        return self.net(self.first(x))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_a_module_that_calls_itself_is_worked_on_as_a_whole():
    assert network_name(Fits()) == "net"
    assert network_name(Called()) == ""
    callback = RePr(**SETTINGS)
    fitted(callback, Bridgeout(p=0.2), module=Called)
    assert [event.kind for event in callback.events] == ["drop", "restore"]
    assert list(callback.events[0].filters) == ["net.3"]


def test_two_parts_each_have_their_own_state(tmp_path):
    def callbacks():
        return Bridgeout(0.2, module="first", seed=1), Bridgeout(0.3, module="net", seed=2)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fitted(*callbacks(), saving, module=Called, epochs=3, saves=True)
    again = Called()
    trainer(*callbacks(), epochs=3).fit(again, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same_models(whole, again)


def test_what_is_wrong_is_said_before_training():
    with pytest.raises(ValueError, match="per must be"):
        RePr(per="batch")
    with pytest.raises(TypeError, match="fractoin"):
        RePr(fractoin=0.3)
    with pytest.raises(TypeError, match="strength"):
        Bridgeout(strength=0.3)
    with pytest.raises(ValueError, match="no part of Fits, which has 'net'"):
        fitted(RePr(module="backbone"))


def test_a_checkpoint_from_before_the_callbacks_is_one_to_begin_with(tmp_path):
    fitted(ModelCheckpoint(tmp_path, filename="plain"), saves=True, epochs=1)
    callback, fit = RePr(**SETTINGS), Fits()
    trainer(callback, Bridgeout(p=0.2), epochs=6).fit(
        fit, ckpt_path=tmp_path / "plain.ckpt", weights_only=True
    )
    assert [(event.kind, event.step) for event in callback.events] == [("drop", 2), ("restore", 4)]
    assert callback.state_dict()["cycle"]["step"] == 5
    assert is_plain(fit)


def test_a_checkpoint_with_other_settings_is_refused_and_the_model_is_plain(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}")
    fitted(RePr(**SETTINGS), saving, epochs=1, saves=True)
    fit = Fits()
    again = trainer(RePr(**{**SETTINGS, "sub": 3}), Bridgeout())
    with pytest.raises(ValueError, match="other settings"):
        again.fit(fit, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert is_plain(fit)


def test_norms_are_measured_again_without_noise():
    fit = fitted(Bridgeout(p=0.5, calibration=[X]), epochs=1)
    other = fitted(Bridgeout(p=0.5), epochs=1)
    assert not torch.equal(fit.net[1].running_mean, other.net[1].running_mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrow.reestimate_norms(other.net, [X])
    assert torch.equal(fit.net[1].running_mean, other.net[1].running_mean)


def test_the_snippet_of_the_page_runs_as_printed():
    code = running("lightning.md")[0]
    scope = {"lightning": Short, "x": X, "module": Fits()}
    exec(code, scope)
    assert [event.step for event in scope["callbacks"][0].events] == [4, 6, 10, 12, 16, 18]


class Short:
    """Lightning, but silent and on the CPU."""

    @staticmethod
    def Trainer(*, max_epochs, callbacks):
        return trainer(*callbacks, epochs=max_epochs)
