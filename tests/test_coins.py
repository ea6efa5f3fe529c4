import math

import pytest
import torch

from regrow.coins import COLUMNS, factors, limit, toss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tables(count, size, probability, seed=0):
    """[count, rows, COLUMNS] ones and zeros."""
    rows, columns = factors(count, size, torch.device("cpu"), generator(seed))
    below = limit(probability, 0.5)
    return torch.stack(
        [
            toss(row, column, below, torch.empty(len(row), COLUMNS, dtype=torch.int32))
            for row, column in zip(rows, columns, strict=True)
        ]
    )


def test_limits_by_hand():
    assert limit(0.5, 0.9) == 0
    assert limit(0.25, 0.0) == -(2**30)
    assert limit(0.0, 0.9) == -(2**31)  # no number is below
    assert limit(1.0, 0.0) == 2**31 - 1  # one of 2^31 odd numbers is not
    # Half a level above: the level below in half of the cases, and the one above in the other half.
    assert [limit(2.5 / 2**31, dither) + 2**31 for dither in (0.0, 0.4, 0.5, 0.9)] == [4, 4, 6, 6]


def test_tosses_by_hand():
    row = torch.tensor([[3], [-1]], dtype=torch.int32)
    column = torch.tensor([[5, 2**30 + 1, -7]], dtype=torch.int32)
    # 3 · (2^30 + 1) is 3 · 2^30 + 3, which is -2^30 + 3 modulo 2^32.
    out = torch.empty(2, 3, dtype=torch.int32)
    assert toss(row, column, -20, out) is out
    assert out.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert toss(row, column, 8, out).tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("size", [1, COLUMNS, COLUMNS + 1, 10_000])
def test_shapes(size):
    rows, columns = factors(3, size, torch.device("cpu"), generator())
    assert [row.shape for row in rows] == 3 * [(math.ceil(size / COLUMNS), 1)]
    assert [column.shape for column in columns] == 3 * [(1, COLUMNS)]
    assert all((factor % 2 == 1).all() for factor in (*rows, *columns))
    assert torch.cat([row.flatten() for row in rows]).unique().numel() == 3 * math.ceil(size / COLUMNS)


@pytest.mark.parametrize("probability", [0.03, 0.5, 0.7])
def test_the_mean_is_the_probability(probability):
    ones = tables(20, 256 * COLUMNS, probability).double()
    # In a table the numbers of rows and of columns are few, but any two tosses are independent.
    error = math.sqrt(probability * (1 - probability) / ones.numel())
    assert abs(ones.mean() - probability) < 5 * error


@pytest.mark.parametrize("probability", [0.3, 0.5, 0.9])
def test_no_toss_follows_others(probability):
    count = 40_000
    block = tables(count, 2 * COLUMNS, probability)[:, :2, :4].double()
    centred = (block - probability) / math.sqrt(probability * (1 - probability))
    # Neighbours in a row, in a column and over the corner, three of a rectangle's corners, and all four,
    # which the factors do tie: a product of independent ones has mean 0 and variance 1.
    a, b, c, d = centred[:, 0, 0], centred[:, 0, 1], centred[:, 1, 0], centred[:, 1, 1]
    for product in (a * b, a * c, a * d, b * c, a * b * c, b * c * d, a * b * c * d):
        assert abs(product.mean()) < 5 / math.sqrt(count)
    flat = centred.flatten(1)
    assert (torch.corrcoef(flat.T) - torch.eye(8)).abs().max() < 5 / math.sqrt(count)


def test_rows_and_columns_of_one_table_do_not_follow_each_other():
    (ones,) = tables(1, 512 * COLUMNS, 0.5).double()
    for table in (ones, ones.T):
        follow = (torch.corrcoef(table) - torch.eye(512)).abs()
        # The largest of 130,816 independent ones is about 4.6 of these.
        assert follow.max() * math.sqrt(COLUMNS) < 6.5
        assert (follow**2).sum() / (512 * 511) == pytest.approx(1 / COLUMNS, rel=0.02)


def test_tables_differ_and_the_generator_decides_them():
    first = tables(2, 4 * COLUMNS, 0.5)
    assert torch.equal(first, tables(2, 4 * COLUMNS, 0.5))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, tables(2, 4 * COLUMNS, 0.5, seed=1))
