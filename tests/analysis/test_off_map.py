import numpy as np
import pytest

import regrow
from regrow.analysis.off_map import off_map

DROP = {"kind": "drop", "step": 2, "filters": {"b": [0, 2]}}
RESTORE = {"kind": "restore", "step": 3, "filters": {"b": [0, 2]}}


def test_a_map_by_hand():
    # Dropped after step 2 and restored after step 3: off in step 3, the third column.
    found = off_map([DROP, None, RESTORE], {"a": 1, "b": 3}, 4)
    assert found.dtype == np.bool_
    assert found.astype(int).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_what_is_not_restored_is_off_to_the_end():
    assert off_map([DROP], {"b": 3}, 4)[0].tolist() == [False, False, True, True]


def test_layers_that_are_not_asked_for_are_passed_over():
    assert not off_map([DROP], {"a": 2}, 4).any()


def test_events_of_a_cycle():
    event = regrow.Event("drop", 1, 1, {"conv": [1]})
    assert regrow.off_map([event], {"conv": 2}, 2).tolist() == [[False, False], [False, True]]


def test_what_is_refused():
    with pytest.raises(ValueError, match="filter 2 of 'b', which has 2"):
        off_map([DROP], {"b": 2}, 4)
    with pytest.raises(ValueError, match="steps is the number of calls"):
        off_map([], {"b": 2}, -1)
