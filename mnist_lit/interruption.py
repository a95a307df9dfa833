"""Ctrl-C and its like end a command, but never between two notes about a trial that belong together."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from mnist_lit.errors import Stopped

__all__ = ["deaf_to_interrupts", "raise_if_stopped", "signals_raise", "uninterrupted"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RECEIVED: list[int] = []


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP raise `Stopped`; more of them change nothing, the end is near."""
    report_lost = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, Stopped) else report_lost(lost)
    try:
        with _handled(_stop):
            yield
    finally:
        sys.unraisablehook = report_lost
        RECEIVED.clear()


def raise_if_stopped() -> None:
    """Raise `Stopped` again, or at last.

    Python drops what is raised in a destructor, should the signal have come during one: what cannot be undone is done
    after a look here. So does what waits for long in an `uninterrupted` block.
    """
    if RECEIVED:
        raise Stopped(RECEIVED[0])


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal that comes now take effect when the block is done."""
    num_before = len(RECEIVED)
    with _handled(lambda signum, _frame: RECEIVED.append(signum)):
        yield
    received = RECEIVED[num_before:]
    del RECEIVED[num_before:]
    for signum in received[:1]:
        signal.raise_signal(signum)


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Let a process that is started now ignore Ctrl-C, which it would answer with a traceback while it imports."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so: nohup means it.
    before = {
        signum: former for signum in SIGNALS if (former := signal.getsignal(signum)) not in (None, signal.SIG_IGN)
    }
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    RECEIVED.append(signum)
    raise Stopped(signum)
