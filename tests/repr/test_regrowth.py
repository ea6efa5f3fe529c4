import pytest
import torch

from regrow.filters import unit_rows
from regrow.repr.regrowth import orthogonal_rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def largest_cosine(a, b):
    return (unit_rows(a.double()) @ unit_rows(b.double()).T).abs().max()


def largest_cosine_inside(matrix):
    unit = unit_rows(matrix.double())
    return ((unit @ unit.T).abs() - torch.eye(len(unit))).max()


# Much room, and room to the last dimension.
@pytest.mark.devices
@pytest.mark.parametrize(
    ("kept", "dropped", "dimension"), [(10, 4, 288), (22, 10, 42), (1, 1, 3), (5, 3, 11)]
)
def test_new_rows_are_orthogonal_to_everything_there_was_and_to_each_other(kept, dropped, dimension):
    alive, old = torch.randn(kept, dimension), torch.randn(dropped, dimension)
    new, fallback = orthogonal_rows(alive, old, generator=generator())
    assert not fallback
    assert new.shape == old.shape
    assert largest_cosine(new, alive) < 1e-5
    assert largest_cosine(new, old) < 1e-5
    assert dropped == 1 or largest_cosine_inside(new) < 1e-5


@pytest.mark.devices
def test_length_is_the_mean_of_the_kept_rows():
    alive = torch.zeros(2, 8)
    alive[0, 0], alive[1, 1] = 1.0, 5.0
    new, _ = orthogonal_rows(alive, torch.randn(3, 8) * 100, generator=generator())
    torch.testing.assert_close(new.norm(dim=1), torch.full((3,), 3.0))


def test_without_kept_length_the_dropped_rows_give_it():
    new, _ = orthogonal_rows(torch.zeros(2, 8), torch.full((1, 8), 2.0), generator=generator())
    torch.testing.assert_close(new.norm(dim=1), torch.tensor([32.0]).sqrt())
    assert largest_cosine(new, torch.ones(1, 8)) < 1e-5


def test_in_two_dimensions_the_least_covered_direction_by_hand():
    # Kept (1, 0) twice and (1, 1)/√2, dropped (0, 1). The sum of the outer products is
    # [[2.5, 0.5], [0.5, 1.5]]: eigenvalues 2 ± √0.5, and the smaller one's vector (1, -1 - √2).
    alive = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 3.0]])
    new, fallback = orthogonal_rows(alive, torch.tensor([[0.0, 4.0]]), generator=generator())
    assert fallback
    least = torch.tensor([[1.0, -1 - 2**0.5]])
    assert largest_cosine(new, least) == pytest.approx(1, abs=1e-6)
    assert new.norm() == pytest.approx((1 + 2 + 18**0.5) / 3)


def test_two_rows_in_two_dimensions_come_least_covered_first():
    alive = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    new, fallback = orthogonal_rows(alive, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), generator=generator())
    assert fallback
    torch.testing.assert_close(new.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


@pytest.mark.devices
def test_more_rows_than_dimensions():
    new, fallback = orthogonal_rows(torch.randn(4, 3), torch.randn(5, 3), generator=generator())
    assert fallback
    assert new.shape == (5, 3)
    assert largest_cosine_inside(new[:3]) < 1e-5
    lengths = new.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(5))


def test_rows_that_repeat_leave_a_null_space():
    # Ten rows in eight dimensions, but of rank three: five dimensions are free.
    basis = torch.randn(3, 8)
    alive, old = torch.cat([basis, -basis, basis[:2] * 3]), basis[1:] * 0.5
    new, fallback = orthogonal_rows(alive, old, generator=generator())
    assert not fallback
    assert largest_cosine(new, basis) < 1e-5
    assert largest_cosine_inside(new) < 1e-5


@pytest.mark.parametrize("dimension", [3, 8])
def test_zero_rows_block_nothing(dimension):
    alive = torch.zeros(3, dimension)
    alive[0, 0] = 2.0
    new, fallback = orthogonal_rows(alive, torch.zeros(2, dimension), generator=generator())
    assert not fallback
    torch.testing.assert_close(new[:, 0], torch.zeros(2))
    torch.testing.assert_close(new.norm(dim=1), torch.full((2,), 2 / 3))
    assert largest_cosine_inside(new) < 1e-5


def test_a_layer_of_zeros_gives_no_nan():
    new, fallback = orthogonal_rows(torch.zeros(3, 4), torch.zeros(2, 4), generator=generator())
    assert not fallback
    assert new.isfinite().all()


@pytest.mark.parametrize("dimension", [40, 10])
def test_very_short_and_very_long_rows_block_their_direction_like_any_other(dimension):
    alive = torch.randn(4, dimension) * torch.tensor([[1e-30], [1.0], [1e15], [1e30]])
    new, fallback = orthogonal_rows(alive, torch.randn(3, dimension) * 1e-30, generator=generator())
    assert not fallback
    assert largest_cosine(new, alive) < 1e-5


@pytest.mark.parametrize("power", [-200, 200])
def test_new_rows_have_the_mean_length_at_any_scale(power):
    alive, old = torch.randn(4, 32).double(), torch.randn(2, 32).double()
    plain, _ = orthogonal_rows(alive, old, generator=generator())
    scaled, _ = orthogonal_rows(alive * 10.0**power, old, generator=generator())
    torch.testing.assert_close(scaled / 10.0**power, plain)


@pytest.mark.devices
@pytest.mark.parametrize("dimension", [64, 6])
def test_the_generator_alone_decides(dimension):
    alive, old = torch.randn(5, dimension), torch.randn(3, dimension)
    state = torch.get_rng_state()
    first, _ = orthogonal_rows(alive, old, generator=generator(7))
    again, _ = orthogonal_rows(alive, old, generator=generator(7))
    other, _ = orthogonal_rows(alive, old, generator=generator(8))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, other) == (dimension == 6)  # covered in full, there is nothing to draw


def test_type_of_the_kept_rows():
    alive = torch.randn(4, 32).bfloat16()
    new, _ = orthogonal_rows(alive, torch.randn(2, 32), generator=generator())
    assert new.dtype == torch.bfloat16
