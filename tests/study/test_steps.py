"""One epoch of training and one evaluation, of nets with two weights, against sums done by hand."""

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from regrow.study.feeding import Batches
from regrow.study.images import Images
from regrow.study.progress import Progress
from regrow.study.ranks import Ranks
from regrow.study.steps import BadLoss, Step, evaluate, state_of_weights, train_epoch

WHITE, BLACK = 255, 0
DISABLED = torch.amp.GradScaler("cpu", enabled=False)


def batches(pixels: list[int], labels: list[int], size: int, **options: object) -> Batches:
    """Pictures of one pixel, 1.0 where it is white and 0.0 where it is black."""
    images = Images(torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))
    return Batches(images, batch_size=size, **{"mean": [0.0], "std": [1.0], "shuffle": False, **options})


def net(weight: float, bias: float = 0.0) -> nn.Sequential:
    """Logits 0 and ``weight`` · pixel + ``bias``."""
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0], [weight]]))
        linear.bias.copy_(torch.tensor([0.0, bias]))
    linear.bias.requires_grad_(False)
    return nn.Sequential(nn.Flatten(), linear)


def margin(model: nn.Sequential) -> float:
    """By how much the logit of class 1 is above that of class 0 for a white pixel."""
    logits = model.eval()(torch.ones(1, 1, 1, 1)).detach()
    return float(logits[0, 1] - logits[0, 0])


class Shown(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.told: list[tuple[int, float]] = []

    def advance(self, steps: int, loss: float) -> None:
        self.told.append((steps, loss))


def train(
    model: nn.Module,
    pictures: Batches,
    rates: list[float],
    *,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    scaler: torch.amp.GradScaler = DISABLED,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """One epoch of plain SGD, with one rate a step; the last one stays."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])
    ranks = ranks or Ranks()
    step = Step(model, optimizer, scaler, dtype, ranks.count)
    return train_epoch(step, pictures, 1, scheduler, ranks, progress or Shown())


def test_loss_and_accuracy_are_means_over_the_pictures_not_over_the_batches() -> None:
    # For white pixels P(1) is 3/4, for black ones P(0) is. Three of four are right; the batches hold 3 and 1.
    model = net(2 * math.log(3), -math.log(3)).train()
    found = evaluate(model, batches([WHITE, BLACK, WHITE, BLACK], [1, 0, 0, 0], 3))
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4, rel=1e-6)


def test_evaluation_leaves_dropout_and_batch_norm_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.9), *net(2 * math.log(3), -math.log(3))).train()
    before = state_of_weights(model)
    found = evaluate(model, batches([WHITE, BLACK], [1, 0], 2))
    assert not model.training
    assert found["accuracy"] == 1
    assert found["loss"] == pytest.approx(math.log(4 / 3), rel=1e-4)  # the norm divides by √(1 + 1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_processes_that_measure_together_share_the_pictures() -> None:
    model = net(2 * math.log(3), -math.log(3))
    pixels, labels = [WHITE, BLACK, WHITE], [1, 0, 0]
    sums = []

    class Both(Ranks):
        count = 2

        def __init__(self, others: Tensor) -> None:
            self.others = others

        def add(self, tensor: Tensor) -> Tensor:
            sums.append(tensor.clone())
            return tensor + self.others

    whole = evaluate(model, batches(pixels, labels, 2))
    # Of the last batch, of one picture, the first process gets nothing.
    first = batches(pixels, labels, 2, rank=0, ranks=2)
    evaluate(model, first, Both(torch.zeros(3, dtype=torch.float64)))
    assert evaluate(model, batches(pixels, labels, 2, rank=1, ranks=2), Both(sums[0])) == pytest.approx(whole)
    assert [float(part[2]) for part in sums] == [1, 2]


def test_two_steps_by_hand() -> None:
    # White pixels of class 0, at first taken for class 1 with P = 3/4: margin log 3. The gradient moves each
    # of the two weights by rate · P, so the margin falls by 2 · rate · P.
    model = net(math.log(3)).eval()
    progress = Shown()
    loss, accuracy = train(model, batches([WHITE] * 5, [0] * 5, 3), [1.0, 0.5], progress=progress)
    second = math.log(3) - 2 * 0.75
    losses = math.log(4), math.log(1 + math.exp(second))
    assert model.training
    assert loss == pytest.approx((3 * losses[0] + 2 * losses[1]) / 5, rel=1e-5)
    assert accuracy == 2 / 5  # the margin is below 0 from the second step on
    assert margin(model) == pytest.approx(second - 1 / (1 + math.exp(-second)), rel=1e-5)
    assert progress.told == [(2, pytest.approx(sum(losses) / 2, rel=1e-5))]


def test_progress_is_told_every_sixteen_steps_and_at_the_end() -> None:
    progress = Shown()
    model = net(math.log(3))
    train(model, batches([WHITE] * 20, [0] * 10 + [1] * 10, 1), [0.0], progress=progress)
    # At a rate of 0 the losses stay log 4 (class 0) and log 4/3 (class 1).
    first = (10 * math.log(4) + 6 * math.log(4 / 3)) / 16
    assert progress.told == [(16, pytest.approx(first)), (4, pytest.approx(math.log(4 / 3)))]


class Poisoned(nn.Module):
    """A net whose logits are damaged in one step, from 1."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__()
        self.inner, self.at, self.value, self.steps = net(0.0), step, value, 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        logits = self.inner(x)
        return logits + torch.tensor([0.0, self.value]) if self.steps == self.at else logits


@pytest.mark.parametrize(("step", "seen_at"), [(2, 16), (16, 16), (17, 20), (20, 20)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_step_and_rate(
    step: int, seen_at: int, value: float
) -> None:
    model, rates = Poisoned(step, value), [1 / place for place in range(1, 22)]
    with pytest.raises(BadLoss) as raised:
        train(model, batches([WHITE] * 20, [1] * 20, 1), rates)
    assert (raised.value.step, raised.value.rate) == (step, pytest.approx(1 / step))
    assert not math.isfinite(raised.value.loss)
    assert model.steps == seen_at


def test_parts_of_a_batch_add_up_to_its_step() -> None:
    """What DDP does, without it: the mean of two processes' gradients is that of the whole batch."""
    pixels, labels = [WHITE, WHITE, BLACK, WHITE, WHITE], [0, 1, 1, 0, 0]

    class Two(Ranks):
        def __init__(self) -> None:
            super().__init__()
            self.count = 2

    whole, start = net(math.log(3)), net(math.log(3))
    expected = train(whole, batches(pixels, labels, 5), [1.0, 0.0])
    halves, results = [], []
    for rank in (0, 1):
        half = copy.deepcopy(start)
        part = batches(pixels, labels, 5, rank=rank, ranks=2)  # of 2 and 3 pictures
        results.append(train(half, part, [1.0, 0.0], ranks=Two()))
        halves.append(half[1].weight)
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole[1].weight)
    assert [sum(parts) for parts in zip(*results, strict=True)] == pytest.approx(expected, rel=1e-5)


def test_a_step_that_overflows_is_skipped_without_a_warning_and_the_scheduler_goes_on() -> None:
    # The gradient of 7.5 times the scale of 3e38 is infinite in float32.
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    model, seen = net(math.log(3) / 10), []
    model.register_forward_hook(lambda *_: seen.append(model[1].weight.detach().clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, batches([WHITE] * 2, [0] * 2, 1, std=[0.1]), [1.0, 0.5], scaler=scaler)
    assert torch.equal(seen[0], seen[1])
    assert scaler.get_scale() < 3e38


def test_autocast_computes_in_the_precision_that_is_asked_for() -> None:
    model, seen = net(math.log(3)), []
    model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    loss, _ = train(model, batches([WHITE] * 2, [0] * 2, 2), [1.0], dtype=torch.bfloat16)
    train(model, batches([WHITE] * 2, [0] * 2, 2), [1.0])
    assert seen == [torch.bfloat16, torch.float32]
    assert model[1].weight.dtype == torch.float32
    assert loss == pytest.approx(math.log(4), rel=0.01)


def test_the_saved_weights_are_contiguous_copies_of_everything() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    state = state_of_weights(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_mean.fill_(7)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert all(each.is_contiguous() and not each.requires_grad for each in state.values())
