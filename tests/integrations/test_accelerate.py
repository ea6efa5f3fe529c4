"""RePr and Bridgeout in a loop with Accelerate: prepared on either side, accumulated, saved and loaded."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import regrow
from cycles import same_models
from pages import running
from regrow.integrations.accelerate import BridgeoutState
from resnets import X, Y, resnet

SETTINGS = {"fraction": 0.4, "full": 2, "sub": 2, "cycles": 1}


@pytest.fixture(autouse=True)
def _fresh():
    """Accelerate keeps the precision of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Training:
    """A loop whose RePr is made ahead of ``prepare`` or behind it."""

    def __init__(self, *, behind=True, precision="no", accumulated=1, noise=True) -> None:
        self.accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated
        )
        self.plain = model = resnet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        if noise:
            regrow.add_bridgeout(model, p=0.2)
        if not behind:
            cycle = regrow.RePr(model, optimizer, example_inputs=X[:1], **SETTINGS)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if behind:
            cycle = regrow.RePr(self.model, self.optimizer, example_inputs=X[:1], **SETTINGS)
        self.cycle, self.events, self.steps = cycle, [], 0
        self.accelerator.register_for_checkpointing(cycle, *([BridgeoutState(self.model)] if noise else []))

    def epochs(self, number: int) -> nn.Module:
        for _ in range(number):
            for start in range(0, 12, 4):
                part = slice(start, start + 4)
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(pixel_values=X[part], labels=Y[part]).loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.steps += self.accelerator.sync_gradients
            self.events.append(self.cycle.step())
        return self.plain


def test_built_on_either_side_of_prepare_it_is_the_same():
    assert same_models(Training(behind=True).epochs(5), Training(behind=False).epochs(5))


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_saved_state_goes_on_bit_for_bit(tmp_path, behind, epoch):
    settings = {"behind": behind, "precision": "bf16", "accumulated": 3}
    first = Training(**settings)
    first.epochs(epoch)
    first.accelerator.save_state(tmp_path)
    whole = first.epochs(5 - epoch)
    assert [event and event.kind for event in first.events] == [None, "drop", None, "restore", None]
    assert first.steps == 5
    for number in range(2):
        torch.load(tmp_path / f"custom_checkpoint_{number}.pkl", weights_only=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = Training(**settings)
    again.accelerator.load_state(tmp_path)
    assert same_models(whole, again.epochs(5 - epoch))


def test_accelerates_wrapper_hides_no_step():
    training = Training(noise=False)
    training.epochs(3)
    dropped = {name: ~mask for name, mask in training.cycle.keep.items()}
    assert sum(int(mask.sum()) for mask in dropped.values()) > 0
    for name, mask in dropped.items():
        assert not training.plain.get_submodule(name).weight[mask].any()
    training.cycle.remove()
    assert type(training.plain) is type(resnet())


def test_the_state_of_noise_wants_a_model_with_noise():
    with pytest.raises(ValueError, match="no Bridgeout"):
        BridgeoutState(resnet())


def test_the_snippet_of_the_page_runs_as_printed(tmp_path, monkeypatch):
    code = running("accelerate.md")[0]
    monkeypatch.chdir(tmp_path)
    model = resnet()
    scope = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.02),
        "loader": torch.utils.data.DataLoader([*zip(X, Y, strict=True)], batch_size=6),
        "x": X,
        "epochs": 7,
        "loss": lambda outputs, labels: nn.functional.cross_entropy(outputs.logits, labels),
    }
    exec(code, scope)
    assert {*(tmp_path / "state").glob("custom_checkpoint_*.pkl")}
    assert not any("regrow" in key or "bridgeout" in key for m in model.modules() for key in vars(m))
