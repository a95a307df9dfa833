"""Signals that end a command: Ctrl-C, SIGTERM and SIGHUP."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from mnist_lit.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RECEIVED: list[int] = []


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Stopped` at a signal, but not while another one is handled.

    Where a library turns that exception into one of its own, the block ends with `Stopped` nevertheless.
    """

    def stop(signum: int, _frame: FrameType | None) -> None:
        RECEIVED.append(signum)
        handled = sys.exception()
        while handled is not None and not isinstance(handled, Stopped):
            handled = handled.__context__
        if handled is None:
            raise Stopped(RECEIVED[0])

    try:
        with handle_signals(stop):
            yield
    except Exception:
        raise_if_stopped()
        raise
    finally:
        RECEIVED.clear()


def raise_if_stopped() -> None:
    """Raise `Stopped` if a signal has arrived: before what cannot be undone."""
    if RECEIVED:
        raise Stopped(RECEIVED[0])


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer signals until the block exits or calls `raise_if_stopped`."""
    received: list[int] = []

    def defer(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        RECEIVED.append(signum)

    with handle_signals(defer):
        yield
    if received:
        signal.raise_signal(received[0])


def ignore_sigint() -> contextlib.AbstractContextManager[None]:
    """Ignore Ctrl-C, also in processes that are started meanwhile."""
    return handle_signals(signal.SIG_IGN, (signal.SIGINT,))


@contextlib.contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers, signals: Sequence[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Handle signals that are not ignored; do nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that is ignored stays ignored, as under nohup; Python does not know a handler of C.
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    before = {signum: former for signum, former in handlers.items() if former not in (None, signal.SIG_IGN)}
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)
