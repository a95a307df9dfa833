"""Ctrl-C and its like end a command, but never between two notes about a trial that belong together."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from mnist_lit.errors import Stopped

__all__ = ["defer_signals", "ignore_sigint", "raise_if_stopped", "raise_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RECEIVED: list[int] = []


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP raise `Stopped`; more of them change nothing, the end is near.

    Python drops what is raised in a destructor: then the next one counts, or who asks by `raise_if_stopped`. If a
    library makes another error of it, the block ends with `Stopped` nevertheless.
    """
    is_stopping = False
    report = sys.unraisablehook

    def stop(signum: int, _frame: FrameType | None) -> None:
        nonlocal is_stopping
        RECEIVED.append(signum)
        if not is_stopping:
            is_stopping = True
            raise Stopped(RECEIVED[0])

    def note(dropped: "sys.UnraisableHookArgs") -> None:
        nonlocal is_stopping
        if isinstance(dropped.exc_value, Stopped):
            is_stopping = False
        else:
            report(dropped)

    sys.unraisablehook = note
    try:
        with _handled(stop):
            yield
    except Exception:
        raise_if_stopped()
        raise
    finally:
        sys.unraisablehook = report
        RECEIVED.clear()


def raise_if_stopped() -> None:
    """Raise `Stopped` again, or at last: before what cannot be undone, or while an `uninterrupted` block waits."""
    if RECEIVED:
        raise Stopped(RECEIVED[0])


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Let a signal that comes now take effect when the block is done."""
    num_before = len(RECEIVED)
    with _handled(lambda signum, _frame: RECEIVED.append(signum)):
        yield
    received = RECEIVED[num_before:]
    del RECEIVED[num_before:]
    for signum in received[:1]:
        signal.raise_signal(signum)


@contextlib.contextmanager
def ignore_sigint() -> Iterator[None]:
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
