"""Weights joined into one vector, and parted again."""

import torch

from regrow.memory import in_memory
from regrow.noise.vectors import joined, parted, rejoined, runs


def test_runs_by_hand():
    # 70 weights take 128 positions.
    assert runs((70, 64, 3), (0, 128, 192), 1000) == ((0, 1, 2),)
    assert runs((70, 64, 3), (0, 128, 192), 192) == ((0, 1), (2,))
    assert runs((3, 64, 70), (192, 128, 0), 1000) == ((2, 1, 0),)  # by position
    assert runs((70, 3), (0, 192), 1000) == ((0,), (1,))  # a gap: another parameter lies there
    assert runs((64, 64), (0, 0), 1000) == ((0,), (1,))  # two weights in one place
    assert runs((2000, 64, 64), (0, 2048, 2112), 1000) == ((0,), (1, 2))


def some():
    return [
        torch.randn(5, 3, 3, 3),
        torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(6, 7).T,
        torch.randn(64),
    ]


def test_parted_is_the_way_back_from_joined():
    tensors = some()
    vector = joined([in_memory(tensor, tensor.stride()) for tensor in tensors])
    assert len(vector) == 192 + 320 + 64 + 64
    again = parted(vector, tensors)
    for tensor, twin in zip(tensors, again, strict=True):
        assert torch.equal(tensor, twin)
        assert tensor.stride() == twin.stride()
        assert twin.data_ptr() % 256 == vector.data_ptr() % 256
        assert not twin._is_view()
    before = again[1]._version
    again[0].zero_()
    assert again[1]._version == before  # autograd takes no tensor for changed when another one is
    assert not vector[:135].any()
    assert rejoined(again).data_ptr() == vector.data_ptr()
    assert len(rejoined(again)) == len(vector)
    assert rejoined(again[1:3]).data_ptr() == again[1].data_ptr()


def test_what_lies_elsewhere_is_copied_together():
    tensors = parted(joined([in_memory(tensor, tensor.stride()) for tensor in some()]), some())
    for mixed in (some(), [*tensors[:2], some()[2]], [tensors[1], tensors[0]], [tensors[0], tensors[2]]):
        vector = rejoined(mixed)
        start = 0
        for tensor in mixed:
            assert torch.equal(vector[start : start + tensor.numel()], in_memory(tensor, tensor.stride()))
            start += -(-tensor.numel() // 64) * 64
