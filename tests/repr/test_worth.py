import pytest
import torch
from torch import nn

from cycles import X, repr_on, sgd, widths
from nets import chain
from regrow.looking.calls import PassFailed
from regrow.repr.worth import judge
from regrow.surgery.plan import CutPlan

GPU = torch.device("cuda")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


def test_on_paper(monkeypatch):
    # Two of eight filters go: 64 pixels × 3·3·3 weights each, and two of the eight columns of four filters
    # of 1×1. A pass of one picture saves 64 · (2·27 + 2·4) multiply-accumulates.
    plan = CutPlan(rows={"0": [0, 1, 2, 3, 4, 5]}, columns={"2": [0, 1, 2, 3, 4, 5]})
    saved = 64 * (2 * 27 + 2 * 4)
    worth = judge(net(), plan, torch.ones(1, 3, 8, 8))
    monkeypatch.setattr("regrow.repr.worth.LEAST_SAVED", 5 * saved)
    batches = {count: ((torch.ones(count, 3, 8, 8),), {}) for count in (4, 5, 6)}
    assert [worth(arguments) for arguments in batches.values()] == [False, True, True]
    assert worth(((), {"labels": torch.ones(9, dtype=torch.int64), "x": torch.ones(5, 3, 8, 8)}))
    assert not worth(((), {}))


def test_the_model_stays_as_it_was():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judge(model, CutPlan(rows={"0": [0]}, columns={"2": [0]}), torch.ones(1, 3, 8, 8))
    assert type(model) is nn.Sequential
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def dropped(monkeypatch, least, compact=None, device=GPU):
    torch.manual_seed(0)
    model = chain()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=1, compact=compact)
    monkeypatch.setattr("regrow.repr.worth.LEAST_SAVED", least)
    # The processor is called another device where the choice is made, and where it is not used.
    worth = cycle._worth
    monkeypatch.setattr(
        "regrow.repr.cycle.RePr._worth",
        lambda _, plan: _on(monkeypatch, device, worth, plan),
    )
    cycle.step()
    return model, cycle


def _on(monkeypatch, device, worth, plan):
    with monkeypatch.context() as patch:
        patch.setattr("regrow.repr.cycle.device_of", lambda _: device)
        patch.setattr("regrow.repr.cycle.RePr._inputs", lambda _: X[:1])
        return worth(plan)


@pytest.mark.parametrize(
    ("least", "compact", "device", "narrowed"),
    [
        (0, None, GPU, True), (float("inf"), None, GPU, False), (float("inf"), True, GPU, True),
        (0, False, GPU, False), (float("inf"), None, torch.device("cpu"), True),
    ],
)  # fmt: skip
def test_the_first_pass_in_train_mode_decides(least, compact, device, narrowed, monkeypatch):
    model, cycle = dropped(monkeypatch, least, compact, device)
    whole = {"conv1": 6, "conv2": 8, "conv3": 8}
    assert (widths(model) != whole) == (compact is not False)  # in eval mode nothing is decided
    model.train()(X).sum().backward()
    assert (widths(model) != whole) == narrowed
    assert (cycle.state_dict()["sub_phase"]["plan"] is not None) == narrowed
    for name, mask in cycle.keep.items():
        gradient = model.get_submodule(name).weight.grad
        assert not gradient[~mask].any()
        assert gradient[mask].any()
    cycle.remove()
    assert type(model) is nn.Sequential
    assert widths(model) == whole


@pytest.mark.gives_up
def test_a_model_that_cannot_be_judged_stays_narrow(monkeypatch, caplog):
    def fail(*_):
        raise PassFailed("it is a test")

    monkeypatch.setattr("regrow.repr.cycle.judge", fail)
    model, _ = dropped(monkeypatch, float("inf"))
    model(X)
    assert widths(model) != {"conv1": 6, "conv2": 8, "conv3": 8}
    assert "judging whether" in caplog.text
