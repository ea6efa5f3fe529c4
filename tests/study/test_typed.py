import pytest

from regrow.study.typed import Mistyped, typed


def test_errors_of_values_become_errors_of_typing_and_others_pass():
    with pytest.raises(Mistyped, match=r"^no such name$"), typed():
        raise ValueError("no such name")
    with pytest.raises(OSError, match="disk"), typed():
        raise OSError("disk")
