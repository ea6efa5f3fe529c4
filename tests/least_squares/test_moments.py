"""New weights from moments: in the span of few rows, beside large means, under autocast, in groups."""

from __future__ import annotations

import pytest
import torch

from regrow.least_squares.moments import Moments, Ridge, fit, in_span


def rows(groups: int, count: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that hang together, and what is lacking, a function of them."""
    torch.manual_seed(0)
    x = torch.randn(groups, count, 8) @ torch.randn(8, columns) + 0.3 * torch.randn(groups, count, columns)
    x[..., 0], x[..., 1] = 0, 3
    return x, x @ (0.1 * torch.randn(groups, columns, 5)) + 1


def halves(x: torch.Tensor, r: torch.Tensor, basis: torch.Tensor | None = None) -> list[Moments]:
    return [Moments.of(x[:, half::2], r[:, half::2], basis) for half in (0, 1)]


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_in_the_span_of_few_rows_the_weights_are_the_same(groups: int, shifts: bool) -> None:
    x, r = (each.double() for each in rows(groups, 30, 60))
    plain, record = fit(halves(x, r), shifts=shifts)
    short, basis = in_span(x)
    assert short.shape == (groups, 30, 30)
    spanned, again = fit(halves(short, r, basis), shifts=shifts)
    assert record["how"] == again["how"] == "least squares"
    assert record["penalty"] == again["penalty"]
    torch.testing.assert_close(spanned.weights, plain.weights)
    torch.testing.assert_close(spanned.shift, plain.shift)


def test_large_means_hide_nothing() -> None:
    x, r = rows(1, 400, 20)
    plain = fit(halves(x, r), shifts=True)[0]
    moved = fit(halves(x + 2.0**14, r), shifts=True)[0]
    torch.testing.assert_close(moved.weights, plain.weights, rtol=0.02, atol=1e-3)


def test_autocast_leaves_the_moments_in_full_precision() -> None:
    x, r = rows(1, 50, 20)
    plain = Moments.of(x, r)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Moments.of(x, r).xx, plain.xx)


def test_groups_are_solved_as_if_each_were_alone() -> None:
    x, r = rows(3, 200, 12)
    x[1, :, 4:7] = 0.5  # columns that do not vary in one group alone
    x[2] = 0.0
    together = Ridge(Moments.of(x, r), shifts=True).change(1e-2)
    for group in range(3):
        alone = Ridge(Moments.of(x[group][None], r[group][None]), shifts=True).change(1e-2)
        torch.testing.assert_close(together.weights[group], alone.weights[0])
        torch.testing.assert_close(together.shift[group], alone.shift[0])
    assert not together.weights[1, 4:7].any()
    assert not together.weights[2].any()
