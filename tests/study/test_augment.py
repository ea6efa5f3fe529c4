import torch

from regrow.study.augment import flip, padding, shift


def test_padding() -> None:
    assert [padding((side, side)) for side in (4, 8, 28, 32, 64)] == [1, 1, 3, 4, 8]
    assert padding((32, 16)) == 2


def test_shift_by_hand() -> None:
    picture = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    pictures = picture.expand(4, 1, 2, 2)
    rows, columns = torch.tensor([1, 0, 1, 2]), torch.tensor([1, 1, 0, 2])
    shifted = shift(pictures, rows, columns, pad=1)
    assert shifted[0, 0].tolist() == [[1, 2], [3, 4]]
    assert shifted[1, 0].tolist() == [[0, 0], [1, 2]]
    assert shifted[2, 0].tolist() == [[0, 1], [0, 3]]
    assert shifted[3, 0].tolist() == [[4, 0], [0, 0]]


def test_shift_agrees_with_cropping_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (20, 3, 6, 9), dtype=torch.uint8, generator=generator)
    rows, columns = torch.randint(5, (2, 20), generator=generator)
    shifted = shift(pictures, rows, columns, pad=2)
    for picture, row, column, result in zip(pictures, rows, columns, shifted, strict=True):
        padded = torch.zeros(3, 10, 13, dtype=torch.uint8)
        padded[:, 2:8, 2:11] = picture
        assert torch.equal(result, padded[:, row : row + 6, column : column + 9])


def test_flip_mirrors_the_chosen_ones() -> None:
    pictures = torch.tensor([[[[1, 2, 3]]], [[[4, 5, 6]]]])
    flipped = flip(pictures, torch.tensor([False, True]))
    assert flipped.tolist() == [[[[1, 2, 3]]], [[[6, 5, 4]]]]
    assert pictures[1].flatten().tolist() == [4, 5, 6]
