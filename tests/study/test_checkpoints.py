import hashlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrow.study import checkpoints
from regrow.study.checkpoints import (
    find_checkpoints,
    from_bytes,
    read_checkpoint,
    remove_checkpoints,
    to_bytes,
    write_checkpoint,
)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    LEAVES,
    lambda part: (
        st.lists(part)
        | st.lists(part).map(tuple)
        | st.dictionaries(st.text(), part)
        | st.dictionaries(st.integers(), part)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$pairs"]), TREES))
def test_plain_data_comes_back_as_it_was(state):
    back = from_bytes(to_bytes(state))
    assert back == state
    assert repr(back) == repr(state)  # tuples stay tuples, 1.0 stays 1.0, and the order is kept


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.arange(6.0).view(2, 3),
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
        torch.randn(3, 4).t(),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.randn(5).to(torch.bfloat16),
        torch.randn(5, requires_grad=True),
    ],
    ids=lambda tensor: f"{list(tensor.shape)}-{tensor.dtype}",
)
def test_tensors_come_back_with_their_bits_and_strides(tensor):
    back = from_bytes(to_bytes({"a": [tensor], 3: (tensor,)}))
    for each in (back["a"][0], back[3][0]):
        assert each.dtype == tensor.dtype
        assert each.stride() == tensor.stride()
        assert not each.requires_grad
        assert to_bytes({"a": each}) == to_bytes({"a": tensor})


def test_what_it_cannot_hold_is_refused_by_name():
    with pytest.raises(ValueError, match="cannot hold a object"):
        to_bytes({"a": object()})


def test_the_last_two_are_kept(tmp_path):
    for number in (1, 2, 3, 10):
        path = write_checkpoint(tmp_path, number, {"number": number})
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in path.name
    assert [path.name[:17] for path in find_checkpoints(tmp_path)] == [
        "checkpoint-00010-",
        "checkpoint-00003-",
    ]
    assert from_bytes(read_checkpoint(tmp_path)) == {"number": 10}
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert read_checkpoint(tmp_path) is None


def test_what_is_written_after_a_damaged_one_takes_its_place(tmp_path):
    first, second = (write_checkpoint(tmp_path, number, {"number": number}) for number in (1, 2))
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged .*bytes are not those.*trying the one before it"):
        assert from_bytes(read_checkpoint(tmp_path)) == {"number": 1}
    again = write_checkpoint(tmp_path, 2, {"number": 2, "again": True})
    assert find_checkpoints(tmp_path) == [again, first]


STATE = {"weight": torch.arange(12.0).view(3, 4), "epoch": 3}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_no_flipped_bit_or_missing_end_goes_unseen(tmp_path_factory, where, bit, cut):
    folder = tmp_path_factory.mktemp("damaged")
    path = write_checkpoint(folder, 1, STATE)
    data = bytearray(path.read_bytes())
    at = int(where * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="starting from the beginning"):
        assert read_checkpoint(folder) is None


@pytest.mark.parametrize("data", [b"", b"\xff" * 200, to_bytes({})[:20], b"\x02" + b"\0" * 7 + b"{}"])
def test_bytes_that_are_no_checkpoint(data):
    with pytest.raises(ValueError, match="it is not a checkpoint"):
        from_bytes(data)


def test_another_version_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "VERSION", 2)
    write_checkpoint(tmp_path, 1, STATE)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="of version 2, and this regrow reads version 1"):
        assert read_checkpoint(tmp_path) is None


def test_files_of_other_names_are_left_alone(tmp_path):
    names = ["checkpoint-best.safetensors", "checkpoint-00001-mine.safetensors", "weights.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    write_checkpoint(tmp_path, 1, STATE)
    remove_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
