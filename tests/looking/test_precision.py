import threading

import pytest
import torch
from torch import nn

from autocasts import HALVES
from regrow.looking.calls import call, undisturbed
from regrow.looking.precision import full_precision, rounds_to_tf32, without_tf32


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_inside_of_the_block_computes_in_float32(dtype) -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    with full_precision("cpu"), torch.autocast("cpu", dtype):
        assert torch.equal(layer(x), layer.weight.new_tensor((x @ layer.weight.T + layer.bias).tolist()))
        # Code that relies on autocast where two types meet goes on.
        assert layer(x.to(dtype)).dtype == torch.float32


def test_autocast_is_as_before_behind_the_block() -> None:
    before = torch.get_autocast_dtype("cpu")
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    with full_precision("cpu"):
        with torch.autocast("cpu", torch.float16):
            layer(x)
        assert torch.get_autocast_dtype("cpu") == before
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision("cpu"), torch.autocast("cpu", torch.float16):
            layer(x)
        assert layer(x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_without_autocast_nothing_is_set() -> None:
    before = torch.get_autocast_dtype("cpu")
    with full_precision("cpu"):
        torch.ones(2) + 1
    assert torch.get_autocast_dtype("cpu") == before


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_in_half_precision_stay_with_autocast_as_it_is(dtype) -> None:
    layer = nn.Linear(3, 3).to(dtype)
    with undisturbed(layer), torch.autocast("cpu", dtype):
        assert layer(torch.randn(2, 3)).dtype == dtype


def test_a_pass_does_not_compute_with_old_copies_of_weights() -> None:
    # A block of the caller's around both passes keeps autocast's copies until its end.
    layer, x = nn.Linear(3, 1, bias=False), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer.weight.fill_(1)
        assert call(layer, x) == 3
        layer.weight.zero_()
        assert call(layer, x) == 0


def test_other_threads_go_on_as_they_were_and_nothing_of_it_stays() -> None:
    enter = torch.autocast.__enter__
    layer, x, ready, done, seen = nn.Linear(3, 3), torch.randn(2, 3), threading.Event(), threading.Event(), []

    def other() -> None:
        with full_precision("cpu"), torch.autocast("cpu", torch.bfloat16):
            ready.set()
            done.wait(10)
            seen.append(layer(x).dtype)

    thread = threading.Thread(target=other)
    with full_precision("cpu"):
        thread.start()
        ready.wait(10)
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(layer(x).dtype)
    done.set()
    thread.join()
    assert seen == [torch.bfloat16, torch.float32]
    assert torch.autocast.__enter__ is enter


@pytest.fixture
def _settings_as_before():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.usefixtures("_settings_as_before")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_off_in_the_block_and_as_before_behind_the_last(precision, allowed) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = allowed
    assert rounds_to_tf32() is (allowed or precision == "high")
    with without_tf32():
        with without_tf32():
            pass
        assert not rounds_to_tf32()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.needs_torch("2.9", "fp32_precision")
@pytest.mark.usefixtures("_settings_as_before")
def test_tf32_switched_by_its_newer_names() -> None:
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    chosen = ["tf32", "ieee", "tf32"]
    for each, precision in zip(settings, chosen, strict=True):
        each.fp32_precision = precision
    with without_tf32():
        assert [each.fp32_precision for each in settings] == ["ieee"] * 3
    assert [each.fp32_precision for each in settings] == chosen
