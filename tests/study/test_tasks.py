from itertools import chain, pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.study.config import Regime, RunConfig, make_config
from regrow.study.data import Splits, load_data
from regrow.study.images import Images
from regrow.study.splits import channel_statistics, noisy_labels
from regrow.study.tasks import (
    check_tasks,
    class_group,
    label_permutation,
    pixel_permutation,
    task_splits,
    with_second,
)

REGIMES = get_args(Regime)


def images(count: int, classes: int, start: int = 0, *, side: int = 2, channels: int = 1) -> Images:
    """Pictures of one grey value each, ``start`` and up, which says which picture it is."""
    values = (torch.arange(start, start + count) % 256).to(torch.uint8)
    pixels = values.view(-1, 1, 1, 1).expand(-1, channels, side, side).contiguous()
    return Images(pixels, torch.arange(count) % classes)


def made(
    train: int = 12, classes: int = 4, *, second: Splits | None = None, start: int = 0, **look: Any
) -> Splits:
    parts = [
        images(train, classes, start, **look),
        images(8, classes, 100, **look),
        images(8, classes, 150, **look),
    ]
    names = tuple(f"class {number}" for number in range(classes))
    return Splits(*parts, names, *channel_statistics(parts[0].pixels), second=second)


def config(regime: str, tasks: int, **settings: Any) -> RunConfig:
    needed: dict[str, dict[str, Any]] = {
        "corrected-labels": {"label_noise": 0.5},
        "new-domain": {"second_data": "fashion-mnist"},
    }
    return make_config(
        {"regime": regime, "tasks": tasks, "epochs": 4 * tasks, **needed.get(regime, {}), **settings}
    )


def values(part: Images) -> list[int]:
    """Which pictures are in ``part``."""
    return part.pixels[:, 0, 0, 0].tolist()


def same(one: Images, other: Images) -> bool:
    return torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)


def test_every_task_of_the_same_data_is_the_data() -> None:
    splits = made()
    for task in (1, 2, 3):
        found = task_splits(splits, config("same", 3), task)
        assert found == splits


def test_permuted_labels_are_renamed_alike_in_all_parts() -> None:
    splits, settings = made(), config("permuted-labels", 3, seed=5)
    first, second = (task_splits(splits, settings, task) for task in (1, 2))
    assert same(first.train, splits.train)
    new = label_permutation(4, seed=5, task=2)
    for before, after in (
        (splits.train, second.train),
        (splits.validation, second.validation),
        (splits.test, second.test),
    ):
        assert torch.equal(before.pixels, after.pixels)
        assert after.labels.tolist() == [int(new[label]) for label in before.labels.tolist()]
    assert (second.mean, second.std) == (splits.mean, splits.std)
    assert splits.train.labels.tolist() == [0, 1, 2, 3] * 3  # the input is as it was


def test_permuted_pixels_move_alike_in_all_pictures_and_channels() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(256, (6, 2, 3, 3), dtype=torch.uint8)
    whole = Images(pixels, torch.arange(6) % 2)
    splits = Splits(whole, whole, whole, ("a", "b"), (0.5, 0.5), (0.2, 0.2))
    settings = config("permuted-pixels", 3, seed=5)
    first, second, third = (task_splits(splits, settings, task) for task in (1, 2, 3))
    assert same(first.train, whole)
    order = pixel_permutation(9, seed=5, task=2)
    assert sorted(order.tolist()) == list(range(9))
    for part in (second.train, second.validation, second.test):
        assert torch.equal(part.labels, whole.labels)
        for place, old in enumerate(order.tolist()):
            assert torch.equal(part.pixels.flatten(2)[:, :, place], pixels.flatten(2)[:, :, old])
    assert not torch.equal(second.train.pixels, third.train.pixels)
    assert not torch.equal(pixel_permutation(9, seed=6, task=2), order)


@given(st.integers(2, 12), st.integers(0, 2**40), st.integers(2, 9))
def test_a_label_permutation_is_one_and_changes_at_each_switch(classes: int, seed: int, task: int) -> None:
    new = label_permutation(classes, seed, task)
    assert sorted(new.tolist()) == list(range(classes))
    assert not torch.equal(new, label_permutation(classes, seed, task - 1))
    assert torch.equal(new, label_permutation(classes, seed, task))
    assert label_permutation(classes, seed, 1).tolist() == list(range(classes))


def test_permutations_differ_from_seed_to_seed() -> None:
    assert len({tuple(label_permutation(10, seed, 2).tolist()) for seed in range(20)}) == 20


def test_two_classes_swap_at_every_switch() -> None:
    assert [label_permutation(2, 0, task).tolist() for task in (1, 2, 3, 4)] == [[0, 1], [1, 0]] * 2


def test_growing_data_by_hand() -> None:
    splits, settings = made(train=10, classes=2), config("growing-data", 3)
    found = [task_splits(splits, settings, task) for task in (1, 2, 3)]
    assert [values(each.train) for each in found] == [list(range(3)), list(range(6)), list(range(10))]
    assert all(same(each.test, splits.test) and same(each.validation, splits.validation) for each in found)
    # The statistics are those of the first three pictures, 0, 1 and 2, in every task.
    assert [each.mean[0] for each in found] == pytest.approx([1 / 255] * 3)


@given(st.integers(4, 80), st.integers(2, 4))
def test_growing_parts_contain_each_other_and_end_with_everything(train: int, tasks: int) -> None:
    splits, settings = made(train, 2), config("growing-data", tasks)
    parts = [values(task_splits(splits, settings, task).train) for task in range(1, tasks + 1)]
    for smaller, larger in pairwise(parts):
        assert larger[: len(smaller)] == smaller
        assert len(larger) > len(smaller)
    assert parts[-1] == values(splits.train)


def test_wrong_labels_are_corrected_after_half_of_the_tasks() -> None:
    splits = made(train=40)
    wrong = noisy_labels(splits.train.labels, 0.5, 4, seed=7)
    for tasks, noisy in ((2, 1), (3, 1), (4, 2)):
        settings = config("corrected-labels", tasks, split_seed=7)
        for task in range(1, tasks + 1):
            found = task_splits(splits, settings, task)
            expected = wrong if task <= noisy else splits.train.labels
            assert torch.equal(found.train.labels, expected)
            assert same(found.test, splits.test)
            assert same(found.validation, splits.validation)


def test_new_classes_by_hand() -> None:
    splits, settings = made(train=12, classes=4), config("new-classes", 2, seed=1)
    for task in (1, 2):
        group = class_group(4, seed=1, task=task, tasks=2).tolist()
        found = task_splits(splits, settings, task)
        for before, after in (
            (splits.train, found.train),
            (splits.validation, found.validation),
            (splits.test, found.test),
        ):
            assert after.labels.tolist() == [label for label in before.labels.tolist() if label in group]
            assert len(after) == len(before) // 2
        assert found.classes == splits.classes


@given(st.integers(0, 2**40), st.sampled_from([(10, 2), (10, 5), (4, 4), (6, 3)]))
def test_class_groups_are_equal_and_disjoint_and_complete(seed: int, shape: tuple[int, int]) -> None:
    classes, tasks = shape
    groups = [class_group(classes, seed, task, tasks).tolist() for task in range(1, tasks + 1)]
    assert {len(group) for group in groups} == {classes // tasks}
    assert sorted(chain(*groups)) == list(range(classes))


def test_the_order_of_new_classes_differs_from_seed_to_seed() -> None:
    assert len({tuple(class_group(10, seed, 1, 2).tolist()) for seed in range(20)}) > 15


@given(st.integers(8, 80), st.integers(2, 4))
def test_new_pictures_are_disjoint_equal_parts(train: int, tasks: int) -> None:
    splits, settings = made(train, 2), config("new-pictures", tasks)
    parts = [values(task_splits(splits, settings, task).train) for task in range(1, tasks + 1)]
    assert {len(part) for part in parts} == {train // tasks}
    assert len({value for part in parts for value in part}) == tasks * (train // tasks)


@pytest.mark.parametrize("regime", ["growing-data", "new-pictures"])
def test_parts_of_real_data_are_stratified(regime: str) -> None:
    splits, settings = load_data("digits"), config(regime, 4)
    everything = splits.train.labels.bincount()
    for task in (1, 2, 3, 4):
        part = task_splits(splits, settings, task).train
        share = everything * len(part) / len(splits.train)
        assert (part.labels.bincount() - share).abs().max() <= 1.5


def test_new_domains_alternate_with_the_statistics_of_the_first() -> None:
    splits = with_second(made(start=0), made(start=60))
    found = [task_splits(splits, config("new-domain", 3), task) for task in (1, 2, 3)]
    assert [values(each.train)[0] for each in found] == [0, 60, 0]
    assert {each.mean for each in found} == {splits.mean}
    assert {each.std for each in found} == {splits.std}
    assert [each.second for each in found] == [None] * 3


def test_two_data_sets_are_brought_to_one_size_and_number_of_channels() -> None:
    small, large = made(start=0, side=2), made(start=60, side=4, channels=3)
    for one, other in ((small, large), (large, small)):
        splits = with_second(one, other)
        assert splits.second is not None
        assert splits.size == splits.second.size == (2, 2)
        assert splits.channels == splits.second.channels == 3
        assert values(splits.train) == values(one.train)
        assert splits.mean == pytest.approx(channel_statistics(splits.train.pixels)[0])
        assert splits.second.std == pytest.approx(channel_statistics(splits.second.train.pixels)[1])


def test_pictures_that_shrink_are_means_over_areas() -> None:
    pixels = torch.tensor([[10, 20, 0, 0], [30, 40, 0, 0], [0, 0, 8, 8], [0, 0, 8, 8]], dtype=torch.uint8)
    one = Images(pixels.view(1, 1, 4, 4), torch.tensor([0]))
    large = Splits(one, one, one, ("a", "b"), (0.5,), (0.5,))
    second = with_second(made(classes=2), large).second
    assert second is not None
    assert second.train.pixels.tolist() == [[[[25, 0], [0, 8]]]]


def test_data_sets_with_other_numbers_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="data has 4, and second_data has 2"):
        with_second(made(classes=4), made(classes=2))


@pytest.mark.parametrize("regime", REGIMES)
def test_tasks_are_a_function_of_the_settings(regime: str) -> None:
    splits = made(train=40, second=made(start=60))
    for task in (1, 2):
        one, other = (task_splits(splits, config(regime, 2, seed=3), task) for _ in range(2))
        for a, b in ((one.train, other.train), (one.validation, other.validation), (one.test, other.test)):
            assert same(a, b)
        assert (one.mean, one.std) == (other.mean, other.std)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_statistics_are_those_of_the_first_task(regime: str) -> None:
    splits = made(train=40, second=made(start=60))
    found = [task_splits(splits, config(regime, 4), task) for task in (1, 2, 3, 4)]
    mean, std = channel_statistics(found[0].train.pixels)
    for each in found:
        assert each.mean == pytest.approx(mean)
        assert each.std == pytest.approx(std)


@pytest.mark.parametrize("task", [0, 3, -1])
def test_there_is_no_such_task(task: int) -> None:
    with pytest.raises(ValueError, match=f"counted from 1 to 2: there is no task {task}"):
        task_splits(made(), config("same", 2), task)


def test_data_that_does_not_suit_a_regime_is_refused() -> None:
    with pytest.raises(ValueError, match="4 classes do not make 3 equal groups: set tasks to 2 or 4"):
        task_splits(made(classes=4), config("new-classes", 3), 1)
    with pytest.raises(ValueError, match="two classes or more, not 1"):
        task_splits(made(classes=1), config("permuted-labels", 2), 2)
    with pytest.raises(ValueError, match="needs the second data set"):
        task_splits(made(), config("new-domain", 2), 1)


@pytest.mark.parametrize(
    ("splits", "regime", "tasks", "message"),
    [
        (
            made(train=12),
            "growing-data",
            4,
            r"task 1 of 4 \(regime 'growing-data'\) has 3 training pictures, ",
        ),
        (made(train=7), "new-pictures", 2, r"has 3 training pictures, and needs 4: choose fewer tasks"),
        (made(train=40, classes=9), "new-classes", 9, r"task \d of 9 .* has 0 validation pictures"),
        (made(train=40, classes=9), "new-classes", 2, r"9 classes do not make 2 equal groups"),
        (made(classes=1), "permuted-labels", 2, r"two classes or more"),
        (made(), "new-domain", 2, r"needs the second data set"),
    ],
)
def test_tasks_with_too_few_pictures_are_refused(
    splits: Splits, regime: str, tasks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_tasks(splits, config(regime, tasks))


def test_tasks_with_enough_pictures_are_not() -> None:
    check_tasks(made(train=16), config("growing-data", 4))
    check_tasks(made(train=8), config("new-classes", 4))
    check_tasks(made(train=1), make_config({}))  # one task is not a sequence
