import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regrow
from regrow.analysis.canonical import TooFewSamples, canonical_correlation

pytestmark = pytest.mark.devices


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_columns_by_hand():
    # One unit each: the canonical correlation is |Pearson|. Centred, a = (−1, 0, 1, 0) b = (−1, 1, 1, −1):
    # a·b = 2, |a| = √2, |b| = 2, so that it is 2 / (2√2) = √½. The sign does not matter.
    a, b = torch.tensor([[1.0], [2], [3], [2]]), -torch.tensor([[5.0], [7], [7], [5]])
    found = canonical_correlation(a, b)
    assert found.coefficients.tolist() == pytest.approx([math.sqrt(0.5)])
    assert found.mean == found.weighted == pytest.approx(math.sqrt(0.5))


def test_one_shared_direction_of_two_by_hand():
    # Orthogonal columns of mean 0 and length √8: a spans e1 and e2, b spans e1 and e3.
    e1 = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    e2 = torch.tensor([1.0, 1, -1, -1, 1, 1, -1, -1])
    e3 = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])
    # a has e1 three times as strongly: PWCCA weighs its two directions 3 : 1, in favour of the shared one.
    found = canonical_correlation(torch.stack([3 * e1, e2], 1), torch.stack([e1 + e3, e1 - e3], 1))
    assert found.coefficients.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert found.mean == pytest.approx(0.5)
    assert found.weighted == pytest.approx(0.75)
    # 90 % of the variance of a is in e1, which leaves one direction of a.
    cut = canonical_correlation(
        torch.stack([3 * e1, e2], 1), torch.stack([e1 + e3, e1 - e3], 1), variance=0.9
    )
    assert cut.coefficients.tolist() == pytest.approx([1])


def test_equal_activations_correlate_fully():
    a = draws(0, 200, 12)
    assert canonical_correlation(a, a).mean == pytest.approx(1)
    assert regrow.canonical_correlation(a, a.flip(1) * 3 + 1).weighted == pytest.approx(1)


def test_independent_noise_correlates_little():
    assert canonical_correlation(draws(1, 4000, 5), draws(2, 4000, 5)).mean < 0.05


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    units=st.integers(1, 6),
    others=st.integers(1, 6),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
)
def test_invertible_maps_change_nothing(seed, units, others, scale):
    a, b = draws(seed, 60, units), draws(seed + 1, 60, others)
    b[:, 0] += a[:, 0]
    turn = torch.linalg.qr(draws(seed + 2, units, units))[0] @ torch.diag(
        torch.linspace(0.1, 2, units).double()
    )
    plain = canonical_correlation(a, b, variance=1)
    mapped = canonical_correlation(scale * (a @ turn) + 4 * scale, b, variance=1)
    torch.testing.assert_close(mapped.coefficients, plain.coefficients, atol=1e-6, rtol=0)
    swapped = canonical_correlation(b, a, variance=1)
    torch.testing.assert_close(swapped.coefficients, plain.coefficients, atol=1e-9, rtol=0)
    assert ((plain.coefficients >= 0) & (plain.coefficients <= 1)).all()


def test_the_coefficients_are_those_of_the_eigenvalue_problem():
    # Hotelling: the squares are the eigenvalues of Saa⁻¹ Sab Sbb⁻¹ Sba.
    a, b = draws(3, 300, 4), draws(4, 300, 3)
    b += a[:, :3] * torch.tensor([1, 0.5, 0.1])
    a, b = a - a.mean(0), b - b.mean(0)
    product = torch.linalg.solve(a.T @ a, a.T @ b) @ torch.linalg.solve(b.T @ b, b.T @ a)
    squares = torch.linalg.eigvals(product).real.sort(descending=True).values[:3]
    torch.testing.assert_close(
        canonical_correlation(a, b, variance=1).coefficients.cpu(), squares.sqrt().cpu()
    )


def test_units_that_repeat_others_add_no_direction():
    a = draws(5, 50, 2)
    assert len(canonical_correlation(torch.cat([a, a], 1), a, variance=1).coefficients) == 2


@pytest.mark.parametrize(
    ("a", "b", "settings", "message"),
    [
        (torch.zeros(5, 2), torch.randn(5, 2), {}, r"activations in a are the same on all samples"),
        (torch.randn(5, 2), torch.randn(6, 2), {}, "5 and 6 rows"),
        (torch.randn(5), torch.randn(5, 1), {}, r"a must be a matrix \[samples, units\]"),
        (torch.randn(5, 1), torch.full((5, 1), math.nan), {}, "b holds NaN"),
        (torch.randn(5, 1), torch.randn(5, 1), {"variance": 0}, r"0 < variance <= 1, got 0"),
        (torch.randn(5, 1), torch.randn(5, 1), {"variance": 1.5}, "got 1.5"),
        (torch.randn(5, 1), None, {}, "b must be a tensor"),
    ],
)
def test_what_is_refused(a, b, settings, message):
    with pytest.raises(ValueError, match=message):
        canonical_correlation(a, b, **settings)


def test_too_few_samples_are_refused():
    with pytest.raises(TooFewSamples, match="pass more than 8 samples"):
        canonical_correlation(draws(6, 8, 4), draws(7, 8, 4), variance=1)
