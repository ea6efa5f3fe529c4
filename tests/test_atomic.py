import errno
import fcntl
import os
import subprocess
import sys

import pytest

from regrow import atomic
from regrow.atomic import replacing, sweep


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fail():
        with replacing(str(path)) as temporary:
            temporary.write_text("half")
            (temporary.parent / "beside").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"), replacing(tmp_path / "no" / "kept.txt"):
        raise AssertionError("never reached")


def test_permissions_are_those_of_any_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with replacing(tmp_path / "kept") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "kept").stat().st_mode == plain.stat().st_mode


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    seen = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_sync(descriptor)

    def replace(old, new):
        seen.append("rename")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic.write_bytes(tmp_path / "a", b"new")
    assert seen == ["file", "rename", "folder"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_bytes_that_cannot_be_written_leave_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def leave_one(place, name="curve.json"):
    """A temporary folder in ``place``, left by a process that was killed."""
    code = (
        "import os, pathlib, signal, sys\nfrom regrow.atomic import temporary_folder\n"
        "with temporary_folder(pathlib.Path(sys.argv[1]), sys.argv[2]) as folder:\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, place, name], check=False)


@pytest.mark.parametrize(
    "write", [lambda path: atomic.write_bytes(path, b""), lambda path: sweep(path.parent)]
)
def test_what_killed_processes_left_is_swept_whatever_its_name(tmp_path, write):
    leave_one(tmp_path)
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".curve.json.")
    write(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] in (["other"], [])


def test_what_is_not_ours_or_still_in_use_is_left_alone(tmp_path):
    foreign = [".a.regrow.tmp.txt", "a.regrow.tmp", ".a.12345678.tmp", ".a.12.tmp"]
    for name in foreign:
        (tmp_path / name).mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").touch()
    (tmp_path / ".a.12345678.regrow.tmp").symlink_to(target)
    (tmp_path / ".b.12345678.regrow.tmp").touch()
    with atomic.temporary_folder(tmp_path, "busy") as busy:
        (busy / "half").touch()
        sweep(tmp_path)
        code = "import sys\nfrom regrow.atomic import sweep\nsweep(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
        assert (busy / "half").exists()
    assert not busy.exists()
    assert (target / "kept").exists()
    assert len(list(tmp_path.iterdir())) == len(foreign) + 3


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    real, made = atomic._lock, []

    def lock(folder):
        made.append(folder)
        if len(made) == 1:
            os.rmdir(folder)
            return None
        return real(folder)

    monkeypatch.setattr(atomic, "_lock", lock)
    with atomic.temporary_folder(tmp_path, "a") as folder:
        assert folder == made[1]
    assert list(tmp_path.iterdir()) == []


def test_where_folders_cannot_be_locked_nothing_is_swept(tmp_path, monkeypatch):
    leave_one(tmp_path)

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    atomic.write_bytes(tmp_path / "a", b"new")
    assert len(list(tmp_path.iterdir())) == 2
