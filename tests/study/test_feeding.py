import random

import pytest
import torch
from torch import Tensor

from regrow.study import feeding
from regrow.study.feeding import Batches, batch_count, calibration_batches
from regrow.study.images import Images


def numbered(count: int, channels: int = 1, side: int = 8) -> Images:
    """Random pictures; each has its place as its label."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count))


def make(images: Images, batch_size: int = 4, **options: object) -> Batches:
    channels = images.pixels.shape[1]
    return Batches(images, batch_size=batch_size, mean=[0.5] * channels, std=[0.25] * channels, **options)


def order(batches: Batches, epoch: int) -> list[int]:
    return [label for _, labels in batches.epoch(epoch) for label in labels.tolist()]


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_normalised_by_hand() -> None:
    pixels = torch.tensor([[[[0, 255]], [[0, 51]]]], dtype=torch.uint8)
    batches = Batches(
        Images(pixels, torch.tensor([3])), batch_size=1, mean=(0.5, 0.2), std=(0.5, 0.1), shuffle=False
    )
    ((pictures, labels),) = batches.epoch(0)
    assert pictures.dtype == torch.float32
    assert pictures.flatten().tolist() == pytest.approx([-1, 1, -2, 0], abs=1e-6)
    assert labels.tolist() == [3]


def test_evaluation_keeps_the_order_and_every_picture() -> None:
    images = numbered(9)
    batches = make(images, shuffle=False)
    assert len(batches) == 3
    assert [len(labels) for _, labels in batches.epoch(0)] == [4, 4, 1]
    assert order(batches, 0) == list(range(9))
    pictures = torch.cat([pictures for pictures, _ in batches.epoch(0)])
    torch.testing.assert_close(pictures, (images.pixels / 255 - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 4, [3]), (1, 4, [1]), (3, 1, [1, 1, 1])],
)
def test_last_training_batch(count: int, batch_size: int, sizes: list[int]) -> None:
    batches = make(numbered(count), batch_size)
    assert [len(labels) for _, labels in batches.epoch(0)] == sizes
    assert len(batches) == len(sizes)


def test_an_epoch_has_every_picture_once() -> None:
    batches = make(numbered(50))
    assert sorted(order(batches, 0)) == list(range(50))
    assert order(batches, 0) != order(batches, 1)
    assert order(batches, 0) != order(make(numbered(50), seed=1), 0)


@pytest.mark.parametrize("augmentation", ["none", "shift", "flip", "shift-flip"])
def test_an_epoch_is_a_function_of_seed_and_number(augmentation: str) -> None:
    images = numbered(30)
    through = make(images, augmentation=augmentation, seed=5)
    epochs = [list(through.epoch(number)) for number in range(4)]
    torch.manual_seed(123)
    resumed = make(images, augmentation=augmentation, seed=5)
    assert equal(list(resumed.epoch(3)), epochs[3])
    assert equal(list(through.epoch(0)), epochs[0])
    assert not equal(epochs[0], epochs[1])


def test_large_seeds_differ() -> None:
    images = numbered(50)
    assert order(make(images, seed=2**32), 0) != order(make(images, seed=0), 0)


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), random.getstate()
    list(make(numbered(20), augmentation="shift-flip").epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_order_does_not_depend_on_the_augmentation() -> None:
    images = numbered(30)
    orders = [order(make(images, augmentation=name), 2) for name in feeding.AUGMENTATIONS]
    assert orders[1:] == orders[:1] * 3


@pytest.mark.parametrize("augmentation", ["none", "shift-flip"])
def test_how_many_batches_are_made_at_once_changes_nothing(
    augmentation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make(numbered(31), augmentation=augmentation)
    together = list(batches.epoch(1))
    for pixels in (1, 2 * 4 * 64, 3 * 4 * 64):
        monkeypatch.setattr(feeding, "_PIXELS_AT_ONCE", pixels)
        assert equal(list(batches.epoch(1)), together)


def test_batches_are_what_one_picture_after_another_gives() -> None:
    """The same draws, and each picture shifted, mirrored and normalised by itself."""
    images = numbered(23, channels=3, side=9)
    seen = 0
    for pictures, labels in make(images, augmentation="shift-flip", seed=4).epoch(3):
        for picture, label in zip(pictures, labels.tolist(), strict=True):
            seen += 1
            padded = torch.nn.functional.pad(images.pixels[label], (1, 1, 1, 1))
            possible = [
                (crop.flip(-1) if mirrored else crop).float()
                for row in range(3)
                for column in range(3)
                for crop in [padded[:, row : row + 9, column : column + 9]]
                for mirrored in (False, True)
            ]
            normalised = [each.sub(127.5).mul(1 / 63.75) for each in possible]
            assert sum(torch.equal(picture, each) for each in normalised) == 1
    assert seen == 23


@pytest.mark.parametrize(
    ("device", "size", "home"),
    [("cpu", 10**15, "cpu"), ("cuda", 1000, "cuda"), ("cuda", 1001, "cpu"), ("meta", 10**15, "meta")],
)
def test_pictures_lie_on_a_gpu_if_they_take_a_quarter_of_its_free_memory_at_most(
    monkeypatch: pytest.MonkeyPatch, device: str, size: int, home: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4000, 5000))
    assert feeding._home(torch.device(device), size) == torch.device(home)


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"rank": 1, "ranks": 2}])
def test_pictures_that_lie_elsewhere_are_moved_a_few_batches_at_a_time(
    monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """The meta device, which holds no values, stands in for a GPU: PyTorch refuses to mix it with the CPU."""
    monkeypatch.setattr(feeding, "_home", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(feeding, "_PIXELS_AT_ONCE", 2 * 4 * 64)
    batches = make(numbered(23), augmentation="shift-flip", device="meta", **options)
    assert batches.pixels.device.type == "cpu"
    found = list(batches.epoch(0))
    assert [len(labels) for _, labels in found] == [
        len(labels) for _, labels in make(numbered(23), **options).epoch(0)
    ]
    for pictures, labels in found:
        assert pictures.device.type == labels.device.type == "meta"
        assert pictures.shape == (len(labels), 1, 8, 8)


def test_padding_is_black_before_normalisation() -> None:
    white = Images(torch.full((64, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    ((pictures, _),) = make(white, batch_size=64, augmentation="shift").epoch(0)
    assert pictures.unique().tolist() == pytest.approx([-2, 2])
    # Shifted by one row, one column, or both: 8 or 15 black pixels. All nine offsets are met.
    black = (pictures < 0).sum((1, 2, 3))
    assert sorted(black.unique().tolist()) == [0, 8, 15]


def test_flip_takes_about_half() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(4000, 1, 1, 2)
    images = Images(pixels, torch.zeros(4000, dtype=torch.int64))
    ((pictures, _),) = make(images, batch_size=4000, augmentation="flip").epoch(0)
    flipped = (pictures[:, 0, 0, 0] > 0).sum().item()
    assert abs(flipped - 2000) < 160  # five standard deviations of 31.6


def test_augmented_pictures_keep_their_labels() -> None:
    shade = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1) + 1
    images = Images(shade.expand(40, 1, 8, 8).contiguous(), torch.arange(40))
    for pictures, labels in make(images, augmentation="shift-flip").epoch(0):
        brightest = (pictures.amax((1, 2, 3)) * 0.25 + 0.5) * 255
        torch.testing.assert_close(brightest, labels + 1.0, atol=1e-3, rtol=0)


def test_grey_pictures_are_repeated() -> None:
    images = numbered(8)
    grey = list(make(images, augmentation="shift").epoch(0))
    colour = list(make(images, augmentation="shift", channels=3).epoch(0))
    for (one, _), (three, _) in zip(grey, colour, strict=True):
        assert three.shape == (4, 3, 8, 8)
        assert three.is_contiguous()
        assert (three == one).all()
    assert next(make(numbered(4, channels=3), channels=3).epoch(0))[0].shape == (4, 3, 8, 8)


def test_pictures_in_memory_stay_as_they_are() -> None:
    images = numbered(8)
    before = images.pixels.clone()
    for pictures, _ in make(images, augmentation="shift-flip").epoch(0):
        pictures.zero_()
    assert torch.equal(images.pixels, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"augmentation": "shfit"}, "did you mean 'shift'"),
        ({"augmentation": "blur"}, "choose from 'none', 'shift', 'flip', 'shift-flip'"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"mean": [0.5, 0.5]}, "one number for each of the 1 channels"),
        ({"std": [0.0]}, "std above 0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(numbered(4), **{"batch_size": 4, "mean": [0.5], "std": [0.5], **options})


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        make(numbered(0))
    with pytest.raises(ValueError, match="only grey pictures can be repeated to 1 channels; these have 3"):
        make(numbered(4, channels=3), channels=1)
    with pytest.raises(ValueError, match="no epoch -1"):
        make(numbered(4)).epoch(-1)


@pytest.mark.parametrize(
    ("pictures", "sizes"), [(3, [3]), (129, [129]), (257, [129, 128]), (1000, [128, 128, 128, 128])]
)
def test_calibration_is_of_the_first_pictures_in_no_small_batch(pictures: int, sizes: list[int]) -> None:
    images = numbered(pictures)
    batches = calibration_batches(images, mean=(0.5,), std=(0.25,))
    assert [len(batch) for batch in batches] == sizes
    expected = (images.pixels[: sum(sizes)].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.cat(batches), expected)


@pytest.mark.parametrize(("count", "ranks"), [(22, 2), (23, 3), (24, 4), (21, 2)])
def test_processes_share_the_batches_of_one(count: int, ranks: int) -> None:
    images = numbered(count)
    options = {"batch_size": 8, "augmentation": "shift-flip", "seed": 3}
    parts = [list(make(images, rank=rank, ranks=ranks, **options).epoch(2)) for rank in range(ranks)]
    whole = list(make(images, **options).epoch(2))
    left = count % 8
    steps = count // 8 + (left >= 2 * ranks)
    for rank in range(ranks):
        batches = make(images, rank=rank, ranks=ranks, **options)
        assert len(batches) == len(parts[rank]) == steps
        assert [batches.size_of(step) for step in range(steps)] == [
            min(8, count - 8 * step) for step in range(steps)
        ]
    for step in range(steps):
        sizes = [len(part[step][1]) for part in parts]
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 1
        for of_one, of_all in zip(
            whole[step], zip(*(part[step] for part in parts), strict=True), strict=True
        ):
            assert torch.equal(of_one, torch.cat(of_all))


def test_processes_share_what_is_measured_to_the_last_picture() -> None:
    images = numbered(9)
    parts = [list(make(images, shuffle=False, rank=rank, ranks=2).epoch(0)) for rank in (0, 1)]
    assert [[labels.tolist() for _, labels in part] for part in parts] == [
        [[0, 1], [4, 5], []], [[2, 3], [6, 7], [8]],
    ]  # fmt: skip


def test_too_little_for_every_process_is_refused() -> None:
    with pytest.raises(ValueError, match="4 processes need two pictures each in a batch, 8 in all"):
        make(numbered(50), batch_size=7, ranks=4)
    with pytest.raises(ValueError, match="there are 7 pictures"):
        make(numbered(7), batch_size=8, ranks=4)
    with pytest.raises(ValueError, match="rank must be from 0 to 1, not 2"):
        make(numbered(50), rank=2, ranks=2)


@pytest.mark.parametrize(
    ("pictures", "size", "ranks"), [(10, 4, 1), (9, 4, 1), (8, 4, 1), (3, 4, 1), (9, 4, 2), (11, 4, 2)]
)
def test_batches_are_counted_without_the_pictures(pictures: int, size: int, ranks: int) -> None:
    batches = make(numbered(pictures), size, ranks=ranks)
    assert batch_count(pictures, size, ranks) == len(batches) == len(list(batches.epoch(0)))
