import pytest
import torch
from torch import nn

from regrow.study.rivals import add_dropout, targeted_dropout


def test_targeted_dropout_by_hand() -> None:
    # Two samples of four activations; half of each sample are targets, and p is next to 1: all go.
    x = torch.tensor([[0.1, -3.0, 2.0, -0.2], [5.0, 1.0, -1.5, 7.0]])
    almost = 1 - 1e-9
    expected = torch.tensor([[0.0, -3.0, 2.0, 0.0], [5.0, 0.0, 0.0, 7.0]])
    assert torch.equal(targeted_dropout(x, almost, 0.5), expected)
    assert torch.equal(targeted_dropout(x, 0.9, 0.1), x)  # a tenth of four is none


def test_targets_that_stay_are_scaled_and_the_mean_is_kept() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.full((1, 50_000), 0.5), torch.full((1, 50_000), 2.0)], dim=1)
    y = targeted_dropout(x, 0.2, 0.5)
    small, large = y[:, :50_000], y[:, 50_000:]
    assert set(small.unique().tolist()) == {0.0, 0.625}
    assert torch.equal(large, x[:, 50_000:])
    assert abs(float(small.mean()) - 0.5) < 5 * 0.25 / 50_000**0.5


def test_the_gradient_is_that_of_what_stayed() -> None:
    torch.manual_seed(0)
    x = torch.tensor([[0.1, 0.2, 3.0, 4.0]], requires_grad=True)
    y = targeted_dropout(x, 0.5, 0.5)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0, 2:], torch.ones(2))
    assert torch.equal(x.grad[0, :2], torch.where(y[0, :2] == 0, 0.0, 2.0))


def test_targets_are_the_same_in_every_precision() -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    targeted = [targeted_dropout(y, 1 - 1e-9, 0.3) == 0 for y in (x, x.double())]
    assert torch.equal(targeted[0], targeted[1])
    assert targeted[0].flatten(1).sum(1).tolist() == [23] * 4  # 0.3 · 75, rounded


@pytest.mark.parametrize("target_fraction", [1.0, 0.5])
def test_dropout_is_behind_every_activation_in_train_mode_only(target_fraction: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.LeakyReLU(), nn.Flatten())
    keys = list(model.state_dict())
    x = torch.randn(2, 1, 8, 8)
    plain = model(x)
    handles = add_dropout(model, 0.5, target_fraction)
    assert len(handles) == 2
    assert list(model.state_dict()) == keys
    noisy = model.train()(x)
    assert int((noisy == 0).sum()) > noisy.numel() / 5
    assert torch.equal(model.eval()(x), plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(model.train()(x), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.0,), "0 <= p < 1"), ((-0.1,), "0 <= p < 1"), ((0.3, 0.0), "target_fraction")],
)
def test_bad_arguments(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_dropout(nn.Sequential(nn.ReLU()), *arguments)


def test_a_model_without_activation_modules_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no activation modules.*nn\.ReLU"):
        add_dropout(nn.Sequential(nn.Conv2d(1, 2, 3)), 0.3)
