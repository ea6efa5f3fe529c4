import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

import nets
import regrow
from regrow.analysis.gradients import GradientWatch, row_gradients

pytestmark = pytest.mark.devices
RESTORE = {"kind": "restore", "step": 3, "cycle": 1, "filters": {"conv1": [1], "conv2": []}}


def net():
    torch.manual_seed(0)
    return nets.chain((3, 4))


def with_gradients(model):
    """Gradients of conv1 whose rows have lengths 3, 4 and 5."""
    model.conv1.weight.grad = torch.zeros_like(model.conv1.weight)
    for row, length in enumerate((3.0, 4.0, 5.0)):
        model.conv1.weight.grad[row, 1, 2, 0] = -length
    return model


def test_lengths_by_hand():
    assert row_gradients(with_gradients(net()), {"conv1": [1], "conv2": [0]}) == {"conv1": (4.0, 4.0)}
    assert row_gradients(with_gradients(net()), {"conv1": [0, 1]}) == {"conv1": (3.5, 5.0)}


def test_a_layer_that_is_regrown_whole_has_no_kept_rows():
    regrown, kept = row_gradients(with_gradients(net()), {"conv1": [0, 1, 2]})["conv1"]
    assert regrown == 4
    assert math.isnan(kept)


def test_a_transposed_convolution_has_its_filters_second():
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 1))
    model[0].weight.grad = torch.tensor([[3.0, 0, 1], [4, 2, 1]]).view(2, 3, 1, 1)
    assert row_gradients(model, {"0": [0]})["0"] == pytest.approx((5.0, (2 + math.sqrt(2)) / 2))


def test_a_record_by_hand():
    model = with_gradients(net())
    watch = GradientWatch(model)
    watch.step()  # nothing is watched before a restore
    assert watch.records == []
    watch.note(None)
    watch.note({**RESTORE, "filters": {"conv1": [0, 1], "conv2": [0]}})
    model.conv2.weight.grad = torch.zeros_like(model.conv2.weight)
    model.conv2.weight.grad[0, 0, 0, 0] = 1.0
    model.conv2.weight.grad[1, 0, 0, 0] = 6.0
    watch.step()
    (record,) = watch.records
    assert record["event"] == {"kind": "restore", "step": 3, "cycle": 1}
    assert record["steps"] == [1]
    # Regrown: 3 and 4 in conv1, 1 in conv2. Kept: 5 in conv1; 6, 0, 0 in conv2.
    assert record["regrown"] == pytest.approx([8 / 3])
    assert record["kept"] == pytest.approx([11 / 4])
    assert record["layers"]["conv1"] == {"rows": [2, 1], "regrown": [3.5], "kept": [5.0]}
    assert record["layers"]["conv2"] == {"rows": [1, 3], "regrown": [1.0], "kept": [2.0]}
    assert json.loads(json.dumps(record)) == record


def test_looks_become_rarer():
    watch = GradientWatch(with_gradients(net()))
    watch.note(RESTORE)
    for _ in range(1000):
        watch.step()
    steps = watch.records[0]["steps"]
    assert steps[:10] == list(range(1, 11))
    assert len(steps) < 65
    assert all(later <= math.ceil(1.1 * step) for step, later in itertools.pairwise(steps[10:]))
    assert watch.records[0]["seen"] == 1000


def test_a_drop_ends_a_record_and_a_restore_begins_another():
    watch = GradientWatch(with_gradients(net()))
    watch.note(RESTORE)
    watch.step()
    watch.note({**RESTORE, "kind": "drop"})
    watch.step()
    watch.note({**RESTORE, "cycle": 2})
    watch.step()
    assert [(each["event"]["cycle"], each["seen"]) for each in watch.records] == [(1, 1), (2, 1)]


def test_gradients_that_are_not_finite_are_none():
    model = with_gradients(net())
    model.conv1.weight.grad[1] = math.inf
    watch = GradientWatch(model)
    watch.note(RESTORE)
    watch.step()
    assert watch.records[0]["regrown"] == [None]
    assert watch.records[0]["kept"] == [4.0]


def test_it_goes_on_from_its_state():
    one, other = (GradientWatch(with_gradients(net())) for _ in range(2))
    one.note(RESTORE)
    for _ in range(15):
        one.step()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(15):
        one.step()
        other.step()
    assert other.state_dict() == one.state_dict()
    assert other.records is not one.records


@pytest.mark.parametrize(("consumers", "starved"), [("zero", True), ("keep", False)])
def test_rows_whose_readers_are_zero_get_no_gradient_in_the_first_step(consumers, starved):
    torch.manual_seed(0)
    model = nets.chain((6, 8, 8))
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = regrow.RePr(
        model,
        optimizer,
        example_inputs=images[:1],
        full=1,
        sub=1,
        cycles=1,
        consumers=consumers,
        fraction=0.4,
    )
    watch = regrow.GradientWatch(model)
    before = []
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        watch.step()
        before.append(copy.deepcopy(model.state_dict()))
        watch.note(cycle.step())
    (record,) = watch.records
    assert record["steps"] == [1, 2]
    assert (record["regrown"][0] == pytest.approx(0, abs=1e-9)) is starved
    assert record["regrown"][1] > 0
    assert min(record["kept"]) > 0


def test_what_is_refused():
    watch = GradientWatch(net())
    with pytest.raises(ValueError, match=r"note takes what RePr\.step returns, and got the text"):
        watch.note("restore")
    with pytest.raises(ValueError, match="no convolution is named 'conv9'"):
        watch.note({**RESTORE, "filters": {"conv9": [0]}})
    watch.note(RESTORE)
    with pytest.raises(ValueError, match=r"after loss\.backward\(\) and before optimizer\.zero_grad"):
        watch.step()
    with pytest.raises(ValueError, match="no state of version 1"):
        watch.load_state_dict({})
    other = GradientWatch(nets.chain((5, 4)))
    with pytest.raises(ValueError, match="does not fit the model: look at layer 'conv1'"):
        other.load_state_dict(watch.state_dict())
    assert other.records == []
