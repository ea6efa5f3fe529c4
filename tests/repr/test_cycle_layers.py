"""Which layers take part in the cycles, and why the others are left out."""

import pytest
import torch
from torch import nn

from cycles import build, repr_on, sgd


@pytest.mark.devices
def test_scope_layer_and_floor():
    cycle = repr_on(build(), fraction=0.25, scope="layer")
    cycle.step()
    assert {name: len(indices) for name, indices in cycle.step().filters.items()} == {"conv2": 2, "conv3": 2}
    cycle = repr_on(build(), fraction=0.9, floor=0.5)
    cycle.step()
    with pytest.warns(UserWarning, match=r"floor=0\.5 leaves 8 of the 14"):
        event = cycle.step()
    assert {name: len(indices) for name, indices in event.filters.items()} == {"conv2": 4, "conv3": 4}
    assert event.notes[0].startswith("floor=0.5 leaves 8 of the 14")


def test_exclude_by_name_and_by_container():
    assert set(repr_on(build(), exclude=["conv2"]).keep) == {"conv3"}
    assert set(repr_on(build(), exclude="conv2").keep) == {"conv3"}
    nested = nn.Sequential(
        build()[:3], build(filters=(8,))[:0], nn.Conv2d(6, 4, 1), build()[-3:-1], nn.Linear(4, 4)
    )
    cycle = repr_on(nested, exclude=["0"], skip_first=False)
    assert set(cycle.keep) == {"2"}
    assert cycle.left_out["0.conv1"] == "excluded by name"


def test_the_first_convolution_is_the_first_to_run_and_not_the_first_registered():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.last, self.middle, self.stem = nn.Conv2d(5, 6, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.head(self.last(self.middle(self.stem(x))).mean((2, 3)))

    cycle = repr_on(Backwards())
    assert set(cycle.keep) == {"middle", "last"}
    assert cycle.left_out == {"stem": "the first convolution (skip_first=False includes it)"}
    assert set(repr_on(Backwards(), skip_first=False).keep) == {"stem", "middle", "last"}


def test_left_out_says_why():
    class OneReasonEach(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.frozen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1).requires_grad_(False)
            self.depthwise, self.a, self.norm = (
                nn.Conv2d(4, 4, 1, groups=4),
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
            )
            self.b, self.group = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4, affine=False)
            self.free, self.out, self.unused = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 4, 1)
            self.norm.requires_grad_(False)

        def forward(self, x):
            x = self.norm(self.a(self.depthwise(self.frozen(self.stem(x)))))
            return self.out(self.free(self.group(self.b(x)))).mean((2, 3))

    cycle = repr_on(OneReasonEach())
    assert set(cycle.keep) == {"free"}
    reasons = {name: reason for name, reason in cycle.left_out.items() if name != "stem"}
    words = {
        "frozen": "its weight is frozen",
        "depthwise": "grouped",
        "a": "the norm behind it, 'norm', is frozen",
        "b": "'group' behind it cannot be silenced for its channels alone",
        "out": "its filters are the network's output",
        "unused": "example_inputs do not reach it",
    }
    assert set(reasons) == set(words)
    for name, reason in reasons.items():
        assert words[name] in reason


@pytest.mark.devices
def test_a_frozen_consumer_is_never_written():
    model = build()
    model.conv3.requires_grad_(False)
    before = model.conv3.weight.clone()
    cycle = repr_on(model, sgd(model), consumers="zero", scope="layer")
    events = [cycle.step() for _ in range(4)]
    assert list(events[3].filters) == ["conv2"]
    assert torch.equal(model.conv3.weight, before)
    assert events[3].notes == []  # the norm in front hides the channels
    assert model.norm2.weight[events[3].filters["conv2"]].abs().max() < 1e-5
