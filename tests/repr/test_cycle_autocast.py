"""RePr on networks whose own forward method opens autocast."""

import pytest
import torch

from autocasts import FORMS, Inside
from cycles import X, build, fit, is_dead, repr_on, sgd, widths
from nets import Residual


@pytest.mark.parametrize("form", FORMS)
def test_a_cycle_is_that_of_the_net_without_autocast(form) -> None:
    make, prefix = FORMS[form]
    plain, model = build(), make(build())
    expected, cycle = repr_on(plain, full=1), repr_on(model, full=1)
    assert cycle.left_out == {prefix + name: reason for name, reason in expected.left_out.items()}
    event, theirs = cycle.step(), expected.step()
    assert event.filters == {prefix + name: indices for name, indices in theirs.filters.items()}
    assert event.notes == []
    assert list(widths(model).values()) == list(widths(plain).values())


@pytest.mark.parametrize("form", FORMS)
def test_dropped_filters_stay_dead_and_come_back(form) -> None:
    make, _ = FORMS[form]
    model = make(build())
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=1, sub=2, cycles=1)
    cycle.step()
    for step in range(2):
        fit(model, optimizer, step)
        assert is_dead(model, cycle)
        cycle.step()
    assert cycle.phase == "done"
    assert all(mask.all() for mask in cycle.keep.values())
    fit(model, optimizer, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [True, False])
def test_a_narrowed_net_computes_what_the_masked_one_does(form, train) -> None:
    make, _ = FORMS[form]
    outputs = []
    for compact in (True, False):
        model = make(build())
        repr_on(model, full=1, compact=compact).step()
        outputs.append(model.train(train)(X).detach().float())
    # bfloat16 has eight binary digits.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.05, atol=0.02 * float(outputs[1].abs().max()))


def test_built_in_a_block_of_the_callers() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cycle = repr_on(Inside(build()), full=1)
        assert set(cycle.left_out) == {"net.conv1"}
        assert cycle.step().notes == []


def test_a_stream_with_a_shortcut() -> None:
    torch.manual_seed(0)
    cycle = repr_on(Inside(Residual(8, 6)))
    assert set(cycle.left_out) == {"net.stem"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_in_half_precision_themselves(dtype) -> None:
    model = Inside(build().to(dtype), dtype)
    cycle = repr_on(model, full=1, example_inputs=X[:1].to(dtype))
    assert set(cycle.left_out) == {"net.conv1"}
    assert sum(len(indices) for indices in cycle.step().filters.values()) > 0
