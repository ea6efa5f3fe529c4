import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from regrow import interrupts
from regrow.interrupts import Interrupted, uninterrupted

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The handlers of the command, in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(interrupts, "_came", [])
    interrupts.take_over()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@BOTH
@pytest.mark.usefixtures("taken_over")
def test_a_signal_raises_and_sets_the_status(number: int) -> None:
    assert interrupts.exit_status() is None
    with pytest.raises(KeyboardInterrupt) as caught:
        send(number)
    assert isinstance(caught.value, Interrupted)
    assert interrupts.exit_status() == 128 + number


@BOTH
@pytest.mark.usefixtures("taken_over")
def test_in_a_block_it_waits_for_the_end(number: int) -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            send(number)
            done.append(1)
            with uninterrupted():
                done.append(2)
            done.append(3)

    with pytest.raises(Interrupted) as caught:
        work()
    assert done == [1, 2, 3]
    assert caught.value.number == number


def test_in_a_users_own_program_it_is_the_interrupt_that_waits() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            send(signal.SIGINT)
            send(signal.SIGINT)
            done.append(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [1]


@pytest.mark.usefixtures("taken_over")
def test_an_error_in_the_block_is_not_lost() -> None:
    def work() -> None:
        with uninterrupted():
            send(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(Interrupted) as caught:
        work()
    assert isinstance(caught.value.__context__, ZeroDivisionError)


@pytest.mark.usefixtures("taken_over")
def test_what_swallows_the_exception_does_not_go_on_to_write() -> None:
    with contextlib.suppress(BaseException):
        send(signal.SIGTERM)
    done = []
    with pytest.raises(Interrupted), uninterrupted():
        done.append(1)
    assert done == []
    assert interrupts.exit_status() == 143


def test_a_thread_holds_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def status(code: str, **how: object) -> int:
    code = f"import os, signal, time\nfrom regrow import interrupts\ninterrupts.take_over()\n{code}"
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=60, **how).returncode


def ignoring() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def listening() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_what_was_to_be_ignored_stays_ignored() -> None:
    assert status("os.kill(os.getpid(), signal.SIGINT)", preexec_fn=ignoring) == 0


def test_a_second_signal_ends_what_hangs_but_not_at_once() -> None:
    twice = (
        "me = os.getpid()\n"
        "try: os.kill(me, signal.SIGINT)\n"
        "except KeyboardInterrupt: pass\n"
        "os.kill(me, signal.SIGINT)\n"  # what started the command passes the first one on
        "time.sleep(interrupts._TWICE + 0.1)\n"
        "os.kill(me, signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    assert status(twice, preexec_fn=listening) == 143


def test_at_the_end_nothing_changes_the_status() -> None:
    end = "interrupts.leave()\nos.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGTERM)"
    assert status(end, preexec_fn=listening) == 0
