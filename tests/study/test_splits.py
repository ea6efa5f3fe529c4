import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.study.splits import channel_statistics, noisy_labels, stratified_order, stratified_split


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 2**40))
def test_any_first_part_of_the_order_is_stratified(classes: list[int], seed: int) -> None:
    labels = torch.tensor(classes)
    order = stratified_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(classes)))
    counts = labels.bincount(minlength=5)
    for cut in range(1, len(classes) + 1):
        part = labels[order[:cut]].bincount(minlength=5)
        # Each class is within 1/2 of its share of some cut; with four others to blame, within 4 · 1/2.
        assert (part - cut * counts / len(classes)).abs().max() < 2.001


def test_equal_classes_come_in_rounds() -> None:
    labels = torch.arange(30) % 3
    rounds = labels[stratified_order(labels, 0)].view(10, 3)
    assert (rounds.sort().values == torch.arange(3)).all()


def test_order_is_a_function_of_the_seed() -> None:
    labels = torch.arange(40) % 4
    assert torch.equal(stratified_order(labels, 7), stratified_order(labels, 7))
    assert not torch.equal(stratified_order(labels, 7), stratified_order(labels, 8))


def test_split_parts_are_disjoint_and_complete() -> None:
    labels = torch.tensor([0] * 60 + [1] * 40)
    test, validation, rest = stratified_split(labels, [20, 10], seed=3)
    assert sorted(torch.cat([test, validation, rest]).tolist()) == list(range(100))
    assert labels[test].bincount().tolist() == [12, 8]
    assert labels[validation].bincount().tolist() == [6, 4]
    assert labels[rest].bincount().tolist() == [42, 28]


def test_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="2 pictures are too few: they must be more than 2"):
        stratified_split(torch.tensor([0, 1]), [1, 1], seed=0)


def test_noise_replaces_exactly_that_share_by_other_classes() -> None:
    labels = torch.arange(1000) % 10
    noisy = noisy_labels(labels, 0.3, classes=10, seed=0)
    assert (noisy != labels).sum() == 300
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert labels.tolist() == [i % 10 for i in range(1000)]


def test_noise_is_uniform_over_the_other_classes() -> None:
    labels = torch.zeros(40000, dtype=torch.int64)
    counts = noisy_labels(labels, 0.75, classes=4, seed=1).bincount()
    # 10,000 expected each; the standard deviation is sqrt(30000 · 1/3 · 2/3) ≈ 82.
    assert (counts - 10000).abs().max() < 400


def test_more_noise_contains_less_noise() -> None:
    labels = torch.arange(200) % 5
    little, much = (noisy_labels(labels, share, 5, seed=2) != labels for share in (0.1, 0.4))
    assert (little & ~much).sum() == 0


def test_no_noise_changes_nothing() -> None:
    labels = torch.arange(10)
    assert torch.equal(noisy_labels(labels, 0.0, 10, seed=0), labels)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_bad_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="below 1"):
        noisy_labels(torch.arange(4), share, 4, seed=0)


def test_noise_without_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        noisy_labels(torch.zeros(4, dtype=torch.int64), 0.5, 1, seed=0)


def test_statistics_by_hand() -> None:
    pixels = torch.tensor([[[[0, 255]], [[51, 51]]], [[[0, 255]], [[51, 51]]]], dtype=torch.uint8)
    mean, std = channel_statistics(pixels)
    assert mean == pytest.approx((0.5, 0.2))
    assert std == pytest.approx((0.5, 1.0))  # the second channel does not vary


def test_statistics_agree_with_torch() -> None:
    pixels = torch.randint(256, (20, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(pixels)
    values = pixels.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist())
