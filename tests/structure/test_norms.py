import pytest
import torch
from torch import nn

from nets import Ahead, Drawn, Residual, chain, conv, head
from regrow.looking.calls import PassFailed
from regrow.structure.norms import NormFinder, own_norms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONV, NORM = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)


def watched(*calls):
    """A finder that was told of ``calls``: (name, module, what it read, what it made)."""
    finder = NormFinder()
    for name, module, read, made in calls:
        finder.note(name, module, () if read is None else (read,), made)
    return finder


def tensors(count):
    return [torch.zeros(1, 4, 2, 2) for _ in range(count)]


def test_a_norm_behind_a_layer_reads_what_that_made():
    x, y, z = tensors(3)
    finder = watched(("conv", CONV, x, y), ("norm", NORM, y, z))
    assert finder.behind() == finder.own() == {"conv": ["norm"]}


def test_a_norm_alone_is_behind_nothing():
    x, y = tensors(2)
    finder = watched(("norm", NORM, x, y))
    assert finder.behind() == finder.own() == {}


def test_a_layer_without_a_norm_is_listed_as_behind_none():
    x, y, z = tensors(3)
    # The norm reads a tensor of the same values, which another operation made.
    finder = watched(("conv", CONV, x, y), ("norm", NORM, y.clone(), z))
    assert finder.behind() == {"conv": []}
    assert finder.own() == {}


def test_a_norm_behind_two_layers_is_neither_ones_own():
    x, a, b, c, d = tensors(5)
    finder = watched(("a", CONV, x, a), ("norm", NORM, a, b), ("b", CONV, x, c), ("norm", NORM, c, d))
    assert finder.behind() == {"a": ["norm"], "b": ["norm"]}
    assert finder.own() == {}


def test_a_layer_that_two_norms_read_has_both():
    x, y, one, two = tensors(4)
    finder = watched(("conv", CONV, x, y), ("second", NORM, y, one), ("first", NORM, y, two))
    assert finder.behind() == finder.own() == {"conv": ["second", "first"]}  # as they ran


def test_one_of_two_norms_that_serves_another_layer_too_takes_both_away():
    x, y, one, two, z, three = tensors(6)
    finder = watched(
        ("conv", CONV, x, y), ("mine", NORM, y, one), ("shared", NORM, y, two),
        ("other", CONV, x, z), ("shared", NORM, z, three),
    )  # fmt: skip
    assert finder.behind() == {"conv": ["mine", "shared"], "other": ["shared"]}
    assert finder.own() == {}


def test_a_change_in_place_in_between():
    x, y, z = tensors(3)
    finder = NormFinder()
    finder.note("conv", CONV, (x,), y)
    y.add_(1)
    finder.note("norm", NORM, (y,), z)
    assert finder.behind() == {"conv": ["norm"]}
    assert finder.own() == {}


def test_a_change_in_place_behind_the_norm_changes_nothing():
    x, y, z = tensors(3)
    finder = NormFinder()
    finder.note("conv", CONV, (x,), y)
    finder.note("norm", NORM, (y,), z)
    y.add_(1)
    assert finder.own() == {"conv": ["norm"]}


def test_a_norm_called_twice():
    x, y, z, w, v = tensors(5)
    again = ("conv", CONV, x, y), ("norm", NORM, y, z), ("conv", CONV, z, w), ("norm", NORM, w, v)
    assert watched(*again).own() == {"conv": ["norm"]}
    same = ("conv", CONV, x, y), ("norm", NORM, y, z), ("norm", NORM, y, w)
    assert watched(*same).own() == {"conv": ["norm"]}
    elsewhere = ("conv", CONV, x, y), ("norm", NORM, y, z), ("norm", NORM, z, w)
    assert watched(*elsewhere).behind() == {"conv": ["norm"]}
    assert watched(*elsewhere).own() == {}


def test_a_norm_called_by_keyword_reads_who_knows_what():
    x, y, z = tensors(3)
    finder = watched(("conv", CONV, x, y), ("norm", NORM, y, z), ("norm", NORM, None, z))
    assert finder.behind() == {"conv": ["norm"]}
    assert finder.own() == {}


def test_a_tensor_that_is_gone_is_not_mistaken_for_a_new_one():
    finder, x = NormFinder(), torch.zeros(1)
    for _ in range(50):  # the memory, and the number, of what is dropped is soon used again
        finder.note("conv", CONV, (x,), torch.zeros(1))
        other = torch.zeros(1)
        finder.note("norm", NORM, (other,), x)
        del other
    assert finder.behind() == {"conv": []}


def test_the_own_norms_of_a_chain_and_of_a_block():
    assert own_norms(chain((2, 3)), X) == {"conv1": ["norm1"], "conv2": ["norm2"]}
    assert own_norms(Residual(4, 3), X) == {"stem": ["norm"], "a": ["norm_a"], "b": ["norm_b"]}
    # The norms ahead of the convolutions read the stream: the first one that of the stem alone.
    assert own_norms(Ahead(), X) == {"stem": ["norm1"]}


def test_layers_of_every_kind_have_norms_of_their_own():
    def draw(s, x):
        x = s.gn(s.up(s.inorm(s.a(x))))
        return s.ln(s.linear(x.mean((2, 3))))

    model = Drawn(
        draw, a=conv(3, 4), inorm=nn.InstanceNorm2d(4), up=nn.ConvTranspose2d(4, 4, 2),
        gn=nn.GroupNorm(2, 4), linear=nn.Linear(4, 5), ln=nn.LayerNorm(5),
    )  # fmt: skip
    assert own_norms(model, X) == {"a": ["inorm"], "up": ["gn"], "linear": ["ln"]}


@pytest.mark.parametrize(
    ("between", "own"),
    [
        (nn.Identity(), True),
        (nn.Dropout(), True),  # in eval mode it hands on what it is given
        (nn.ReLU(), False),
        (nn.ReLU(inplace=True), False),
        (nn.MaxPool2d(1), False),
    ],
)
def test_what_stands_between_a_layer_and_a_norm(between, own):
    model = nn.Sequential(conv(3, 4), between, nn.BatchNorm2d(4), head(4))
    assert own_norms(model, X) == ({"0": ["2"]} if own else {})


def test_a_layer_that_another_reader_reads_too_still_has_its_norm():
    model = Drawn(lambda s, x: s.head(s.n(y := s.a(x)) + y), a=conv(3, 4), n=nn.BatchNorm2d(4), head=head(4))
    assert own_norms(model, X) == {"a": ["n"]}


def test_looking_leaves_the_model_as_it_was():
    model = chain((2, 3)).train()
    model.norm2.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own_norms(model, X)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(PassFailed):
        own_norms(model, X[:, :2])
    assert [module.training for module in model.modules()] == modes
