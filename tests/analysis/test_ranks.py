import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from regrow.analysis.ranks import pearson, ranks, spearman

pytestmark = pytest.mark.devices


def test_ranks_by_hand():
    assert ranks(torch.tensor([10.0, -1, 10, 3])).tolist() == [3.5, 1, 3.5, 2]


def test_spearman_by_hand():
    # Ranks (1, 2, 3, 4) and (2, 1, 4, 3): 1 − 6 · Σd² / (n(n² − 1)) = 1 − 6 · 4 / 60 = 0.6.
    x, y = torch.tensor([1.0, 2, 3, 100]), torch.tensor([-1.0, -5, 70, 6])
    assert spearman(x, y) == pytest.approx(0.6)


def test_pearson_by_hand():
    # Centred: (−1, 0, 1) and (−1, 1, 0): 1 / (√2 · √2).
    assert pearson(torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 2, 1])) == pytest.approx(0.5)


def test_what_never_varies_has_no_correlation():
    same, other = torch.full((4,), 0.1), torch.arange(4.0)
    assert pearson(same, other) is spearman(other, same) is None
    assert pearson(torch.empty(0), torch.empty(0)) is None
    assert pearson(torch.ones(1), torch.ones(1)) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20))
def test_as_scipy(pairs):
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    if len(set(x.tolist())) > 1 and len(set(y.tolist())) > 1:
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x.cpu(), y.cpu())[0], abs=1e-9)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x.cpu(), y.cpu())[0], abs=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_numbers_far_from_one(scale):
    x = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    assert pearson(scale * x, x.flip(0) / scale) == pytest.approx(-1)
