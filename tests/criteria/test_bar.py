"""The progress bar shows itself on a terminal, after two seconds, and nowhere else."""

import sys
from contextlib import suppress

import pytest

from regrow.criteria import bar


def run(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, after: float, shown: bool = True) -> None:
    monkeypatch.setattr(bar, "_AFTER", after)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with bar.progress_bar("scoring filters", 3, shown=shown) as advance:
        for _ in range(3):
            advance(1)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, terminal=True, after=-1.0)
    captured = capsys.readouterr()
    assert "scoring filters" in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("terminal", "after", "shown"), [(False, -1.0, True), (True, 60.0, True), (True, -1.0, False)]
)
def test_no_bar_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    after: float,
    shown: bool,
) -> None:
    run(monkeypatch, terminal=terminal, after=after, shown=shown)
    captured = capsys.readouterr()
    assert not captured.err + captured.out


def test_it_ends_where_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar, "_AFTER", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with suppress(KeyError), bar.progress_bar("scoring", 3) as advance:
        advance(1)
        raise KeyError
    with bar.progress_bar("another", 1) as advance:
        advance(1)
