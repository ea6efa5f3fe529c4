import os
import platform
import subprocess
import sys

import pytest

from regrow.study.lock import NAME, locked

HOLD = """
import sys, time
from pathlib import Path
from regrow.study.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_folder_is_made_and_left_without_the_lock(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [NAME]
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_who_holds_it_is_named_and_nothing_is_changed(tmp_path):
    with locked(tmp_path):
        for _ in range(2):
            with pytest.raises(BlockingIOError, match="choose another --out") as caught, locked(tmp_path):
                pass
            assert f"process {os.getpid()} on {platform.node()}" in str(caught.value)
        assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        pass


def test_it_goes_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_the_system_lets_go_when_the_process_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=f"process {process.pid} on"), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / NAME).read_text()


def test_a_lock_that_its_holder_removes_meanwhile_is_not_taken(tmp_path, monkeypatch):
    import fcntl

    real, calls = fcntl.flock, []

    def flock(descriptor, how):
        real(descriptor, how)
        if not calls:  # as if the last holder had removed its file just before
            (tmp_path / NAME).unlink()
        calls.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / NAME).read_text().startswith("process")
