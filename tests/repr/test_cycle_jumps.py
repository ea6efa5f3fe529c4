"""What reads a restored filter by default, and the warning of a restore that the output shows."""

import warnings

import pytest
import torch
from torch import nn

from cycles import X, build, fit, repr_on, run, sgd
from nets import Residual, chain

GROWN = r"the restore made the largest output on example_inputs .* times as large"


def plain(seed=0):
    """A net without norms."""
    torch.manual_seed(seed)
    return chain(norm=nn.Identity)


def restored(model, factor, *, consumers="keep", compact=True, caught=GROWN):
    """Run a cycle; at its drop, the weights that read the filters are ``factor`` times as large."""
    with torch.no_grad():
        model.head.weight.mul_(factor)
    cycle = repr_on(model, full=1, sub=1, cycles=1, consumers=consumers, compact=compact)
    dropped = cycle.step().filters["conv3"]
    # The columns of the kept filters are as they would be without the factor.
    with torch.no_grad():
        model.head.weight.div_(factor)
    if caught is None:
        with warnings.catch_warnings(action="error"):
            cycle.step()
        return None
    with pytest.warns(UserWarning, match=caught) as records:
        cycle.step()
    assert records[0].filename == __file__
    assert dropped
    return str(records[0].message)


@pytest.mark.devices
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e38])
def test_a_restore_that_makes_the_output_large_is_told(factor, compact) -> None:
    message = restored(plain(), factor, compact=compact)
    assert "build RePr with a smaller fraction or consumers='zero', or train at a lower rate" in message


def test_an_output_that_is_not_finite_is_told() -> None:
    model = plain()
    cycle = repr_on(model, full=1, sub=1, cycles=1, consumers="keep", example_inputs=1e4 * X[:1])
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    cycle.step()
    with torch.no_grad():
        model.head.weight.clamp_(max=0.1)
    with pytest.warns(UserWarning, match="inf times as large|nan times as large"):
        cycle.step()


@pytest.mark.parametrize("consumers", ["zero", "init"])
def test_other_readers_do_not_bring_old_weights_back(consumers) -> None:
    restored(plain(), 1e6, consumers=consumers, caught=None)


def test_an_ordinary_restore_is_not_told() -> None:
    for consumers in ("keep", "zero", "init"):
        for model in (plain(), build(), Residual(8, 6)):
            optimizer = sgd(model, lr=0.01)
            cycle = repr_on(model, optimizer, full=2, sub=2, cycles=2, consumers=consumers)
            with warnings.catch_warnings(action="error"):
                run(model, optimizer, cycle, 8)


@pytest.mark.devices
def test_by_default_the_output_does_not_move_at_a_restore() -> None:
    model = plain()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=1, sub=1, cycles=1)
    cycle.step()
    fit(model, optimizer)
    before = model.eval()(X).detach()
    assert any(cycle.step().filters.values())
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)


def test_the_choice_is_in_the_state_and_an_old_state_says_what_to_write() -> None:
    old = repr_on(build(), consumers="keep").state_dict()
    cycle = repr_on(build())
    assert cycle.state_dict()["settings"]["consumers"] == "zero"
    with pytest.raises(ValueError, match=r"consumers='keep' \(here 'zero'\).*Build RePr with the same"):
        cycle.load_state_dict(old)
    repr_on(build(), consumers="keep").load_state_dict(old)


def test_the_hooks_of_the_user_see_no_pass_of_a_restore() -> None:
    model, seen = build(), []
    model.conv2.register_forward_hook(lambda *_: seen.append(1))
    cycle = repr_on(model, full=1, sub=1, cycles=1)
    cycle.step()
    seen.clear()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    cycle.step()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers() if name.startswith("norm1"))
    assert model.training


@pytest.mark.gives_up
def test_a_model_that_fails_by_then_is_restored_all_the_same() -> None:
    model = plain()
    cycle = repr_on(model, full=1, sub=1, cycles=1)
    cycle.step()

    def fails(_x):
        raise RuntimeError("later")

    model.pool.forward = fails  # the user's own pass tells the user
    with warnings.catch_warnings(action="error"):
        assert cycle.step().kind == "restore"
