import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import forking

SHOWN = "−0.3 ± 1 × 2 … → ≤ ≥ ² “a” — ─━│╭┼ größe 图 \udcff"
ASCII = '-0.3 +/- 1 x 2 ... -> <= >= ^2 "a" - --|++ gr\\xf6\\xdfe \\u56fe \\udcff'
SAY = f"from regrow import terminal\nterminal.take_over()\nprint({SHOWN!a})\n"


def said(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=env)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, ASCII),
        ({"PYTHONIOENCODING": "ascii:strict"}, ASCII),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}, ASCII),
        (
            {"PYTHONIOENCODING": "latin-1"},
            ASCII.replace("+/-", "±").replace("x 2", "× 2").replace("^2", "²").replace("\\xf6\\xdf", "öß"),
        ),
        ({"PYTHONIOENCODING": "utf-8"}, SHOWN.replace("\udcff", "\\udcff")),
    ],
)
def test_letters_that_cannot_be_encoded_are_spelled(environment: dict[str, str], expected: str) -> None:
    done = said(SAY, **environment)
    assert done.returncode == 0, done.stderr
    encoding = environment["PYTHONIOENCODING"].partition(":")[0] or "ascii"
    assert done.stdout.decode(encoding) == expected + "\n"


@pytest.mark.parametrize(
    "encoding", ["cp1252", "cp437", "koi8-r", "shift_jis", "gb18030", "utf-16", "iso8859-15"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_any_encoding_takes_all(encoding: str, unbuffered: str) -> None:
    code = SAY + "import sys; print(chr(0x1F600), file=sys.stderr)"
    done = said(code, PYTHONIOENCODING=encoding, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 0, done.stderr
    assert "0.3" in done.stdout.decode(encoding)


LOSE = (
    "import sys\n"
    "from regrow import terminal\n"
    "terminal.take_over()\n"
    "print('x' * 100_000); print('y', file=sys.stderr); sys.stdout.flush()\n"
    "lost = terminal.lost_output()\n"
    "open(sys.argv[1], 'w').write(repr(lost))"
)


@pytest.mark.parametrize(
    ("redirected", "lost"),
    [
        (">/dev/full", os.strerror(errno.ENOSPC)),
        (">/dev/full 2>/dev/full", os.strerror(errno.ENOSPC)),
        (">&-", None),
        (">&- 2>&- <&-", None),
        ("2>&-", None),
        ("| true", None),
        ("2>&1 | head -c 1", None),
        (">/dev/null", None),
    ],
)
def test_output_that_is_lost_ends_nothing(tmp_path: Path, redirected: str, lost: str | None) -> None:
    command = f'set -o pipefail; "{sys.executable}" -c "$0" "$1" {redirected}'
    done = subprocess.run(["bash", "-c", command, LOSE, tmp_path / "a"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_text() == repr(lost)


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom regrow import terminal\nterminal.take_over()\n"
        "file = open(sys.argv[1], 'w')\nos.write(1, b'from a library')\nassert file.fileno() > 2"
    )
    command = f'"{sys.executable}" -c "$0" "$1" >&- 2>&- <&-'
    assert subprocess.run(["bash", "-c", command, code, tmp_path / "a"], check=False).returncode == 0
    assert (tmp_path / "a").read_text() == ""


def test_commands_print_their_tables_in_any_encoding(tmp_path: Path) -> None:
    small = ["--width", 4, "--train-size", 60, "--epochs", 1, "--threads", 1]
    out = tmp_path / "Läufe" / "größe−1"
    done = forking.regrow("train", *small, "--out", out, folder=tmp_path, encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test accuracy ")
    for encoding, *command in (
        ("ascii", "prune", out, "--fraction", 0.5, "--no-compensate", "--out", tmp_path / "−"),
        ("latin-1", "curve", out, "--fractions", "0,50", "--readings", "zeroed"),
        ("cp1252", "report", tmp_path / "Läufe"),
        ("ascii", "--help"),
        ("cp437", "train", "--modell", "−"),
    ):
        done = forking.regrow(*command, folder=tmp_path, encoding=encoding)
        assert done.returncode == (2 if "--modell" in command else 0), done.stderr
        assert "codec" not in done.stderr
    (tmp_path / "−" / "prune.json").read_text(encoding="utf-8")
    (tmp_path / "Läufe" / "report.html").read_text(encoding="utf-8")


def test_the_status_tells_that_the_disk_was_full() -> None:
    command = f'"{sys.executable}" -m regrow --version'
    full, closed, cut = (
        subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} {to}"], capture_output=True, text=True, check=False
        )
        for to in (">/dev/full", ">&-", "| true")
    )
    assert full.returncode == 1
    assert full.stderr == f"regrow: standard output cannot be written: {os.strerror(errno.ENOSPC)}\n"
    assert (closed.returncode, closed.stderr) == (0, "")
    assert (cut.returncode, cut.stderr) == (0, "")
