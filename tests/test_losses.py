import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import regrow
from regrow.losses import distillation_loss, orthogonal_loss

pytestmark = pytest.mark.devices


def conv_of(*rows):
    """A 1×1 convolution with these filters."""
    conv = nn.Conv2d(len(rows[0]), len(rows), 1, bias=False)
    conv.weight.data.copy_(torch.tensor(rows).view_as(conv.weight))
    return conv


def plain_loop(*convs):
    """Σ over layers of Σ |Ŵ Ŵᵀ − I|, in numbers of Python."""
    total = 0.0
    for conv in convs:
        matrix = conv.weight.detach().flatten(1).double().tolist()
        for i, one in enumerate(matrix):
            for j, other in enumerate(matrix):
                dot = sum(a * b for a, b in zip(one, other, strict=True))
                lengths = math.hypot(*one) * math.hypot(*other)
                total += abs(dot / lengths) if i != j else 0
    return total


def test_the_loss_by_hand():
    # cosines: 0 between the axes, 3/5 and 4/5 to the third filter, each pair counted twice
    conv = conv_of([2.0, 0.0], [0.0, 0.5], [3.0, 4.0])
    torch.testing.assert_close(orthogonal_loss(conv), torch.tensor(2 * (0.6 + 0.8)))
    assert orthogonal_loss(conv_of([1.0, 0.0], [0.0, -3.0])) == 0


def test_layers_of_equal_and_of_other_shapes_are_added_up():
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3)]
    loss = orthogonal_loss(nn.Sequential(*convs))
    assert loss.item() == pytest.approx(plain_loop(*convs), rel=1e-5)
    without = orthogonal_loss(nn.Sequential(*convs), exclude=["1", "3"])
    assert without.item() == pytest.approx(plain_loop(convs[0], convs[2]), rel=1e-5)


def test_it_is_the_overlap_that_repr_ranks_by():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3)
    total = regrow.overlap(conv.weight).sum() * 5  # O is divided by the number of filters
    torch.testing.assert_close(orthogonal_loss(conv).detach(), total)


def test_the_gradient_is_that_of_finite_differences_and_orthogonal_to_each_filter():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2, bias=False).double()
    loss = orthogonal_loss(conv)
    assert loss.dtype == torch.float64
    loss.backward()
    step = 1e-6
    for index in [(0, 0, 0, 0), (1, 1, 0, 1), (2, 0, 1, 1)]:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                conv.weight[index] += sign * step
                ends.append(orthogonal_loss(conv).item())
                conv.weight[index] -= sign * step
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(conv.weight.grad[index]) == pytest.approx(slope, abs=1e-5)
    # The length of a filter does not matter.
    along = (conv.weight.grad * conv.weight.detach()).flatten(1).sum(1)
    assert float(along.abs().max()) < 1e-12


def test_training_by_it_makes_filters_orthogonal():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, bias=False)
    optimizer = torch.optim.SGD(conv.parameters(), 0.01)
    before = orthogonal_loss(conv).item()
    for _ in range(100):
        optimizer.zero_grad()
        orthogonal_loss(conv).backward()
        optimizer.step()
    assert orthogonal_loss(conv).item() < 0.3 * before


@given(st.floats(-20, 20), st.integers(0, 2**31))
def test_the_length_and_the_sign_of_filters_do_not_matter(exponent, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 4, 2, bias=False)
    one = orthogonal_loss(conv).detach()
    with torch.no_grad():
        conv.weight[0] *= -(10**exponent)
    torch.testing.assert_close(orthogonal_loss(conv).detach(), one, rtol=1e-4, atol=1e-5)
    assert 0 <= float(one) <= 4 * 3


def test_a_filter_of_zeros_adds_nothing_and_gets_no_nan():
    conv = conv_of([0.0, 0.0], [1.0, 0.0], [1.0, 0.0])
    loss = orthogonal_loss(conv)
    assert loss.item() == 2
    loss.backward()
    assert conv.weight.grad.isfinite().all()
    assert not conv.weight.grad[0].any()


def test_a_shared_weight_counts_once_and_others_are_left_out():
    torch.manual_seed(0)
    conv, twin = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    twin.weight = conv.weight
    frozen = nn.Conv2d(4, 4, 3).requires_grad_(False)
    others = [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 1, 3), frozen, nn.Linear(4, 4)]
    loss = orthogonal_loss(nn.Sequential(conv, twin, *others))
    assert loss.item() == pytest.approx(plain_loop(conv), rel=1e-5)


def test_transposed_convolutions_have_their_filters_in_the_second_dimension():
    torch.manual_seed(0)
    up, conv = nn.ConvTranspose2d(3, 5, 2), nn.Conv2d(3, 5, 2)
    conv.weight.data.copy_(up.weight.transpose(0, 1))
    torch.testing.assert_close(orthogonal_loss(up), orthogonal_loss(conv))


def test_autocast_and_half_precision_compute_in_float32():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3)
    expected = orthogonal_loss(conv).detach()
    with torch.autocast(conv.weight.device.type, dtype=torch.bfloat16):
        assert torch.equal(orthogonal_loss(conv).detach(), expected)
    assert orthogonal_loss(conv.bfloat16()).dtype == torch.float32


def test_bad_models():
    with pytest.raises(ValueError, match="takes a model"):
        orthogonal_loss("resnet18")
    with pytest.raises(ValueError, match="no convolution is named 'x'"):
        orthogonal_loss(nn.Conv2d(3, 4, 1), exclude=["x"])
    with pytest.raises(ValueError, match="no convolution is left"):
        orthogonal_loss(nn.Sequential(nn.Conv2d(3, 4, 1)), exclude=["0"])
    with pytest.raises(ValueError, match="no convolution is left"):
        orthogonal_loss(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="complex weights"):
        orthogonal_loss(nn.Conv2d(3, 4, 1, dtype=torch.complex64))


def test_distillation_by_hand():
    # T = 2: the teacher's softmax of (0, ln 3) is (1/4, 3/4), the student's of (0, 0) is 1/2 each.
    teacher = torch.tensor([[0.0, 2 * math.log(3)]])
    student = torch.zeros(1, 2, requires_grad=True)
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    loss = distillation_loss(student, teacher, temperature=2, weight=1)
    assert loss.item() == pytest.approx(4 * divergence)
    labels = torch.tensor([1])
    mixed = distillation_loss(student, teacher, labels, temperature=2, weight=0.25)
    assert mixed.item() == pytest.approx(0.25 * 4 * divergence + 0.75 * math.log(2))
    loss.backward()
    # T² · (softmax(s/T) − softmax(t/T)) / T
    torch.testing.assert_close(student.grad, 2 * torch.tensor([[0.25, -0.25]]))


def test_distillation_agrees_with_the_functions_of_pytorch():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 5, 3), torch.randn(6, 5, 3), torch.randint(5, (6, 3))
    mine = distillation_loss(student, teacher, labels)
    log = nn.functional.log_softmax
    terms = nn.functional.kl_div(log(student / 4, 1), log(teacher / 4, 1), log_target=True, reduction="none")
    theirs = 0.9 * 16 * terms.sum(1).mean() + 0.1 * nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(mine, theirs)
    assert distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    soft = nn.functional.one_hot(labels, 5).movedim(2, 1).float()
    torch.testing.assert_close(distillation_loss(student, teacher, soft), mine)


def test_no_gradient_flows_into_the_teacher_and_its_zeros_are_no_nan():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    sure = torch.tensor([[0.0, -math.inf]])
    loss = distillation_loss(torch.zeros(1, 2, requires_grad=True), sure, temperature=1, weight=1)
    assert loss.item() == pytest.approx(math.log(2))
    half = distillation_loss(student.half(), teacher.half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"temperature": True}, "temperature"),
        ({"weight": 1.5}, "weight must lie between 0 and 1"),
        ({"weight": float("nan")}, "weight"),
        ({"teacher_logits": torch.zeros(2, 4)}, "must have one shape"),
        ({"logits": [1, 2]}, "logits must be scores"),
        ({"teacher_logits": torch.zeros(2, 3, dtype=torch.long)}, "teacher_logits must be scores"),
    ],
)
def test_bad_arguments_of_distillation(change, message):
    given = {"logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=message):
        distillation_loss(**given)
