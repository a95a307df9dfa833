"""Ctrl-C and its like end a search, but never between two notes about a trial that belong together."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from mnist_lit.errors import Stopped

__all__ = ["signals_raise", "uninterrupted"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP raise `Stopped`; more of them change nothing, the end is near."""
    with _handled(_stop):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal that comes now take effect when the block is done."""
    received: list[int] = []
    with _handled(lambda signum, _frame: received.append(signum)):
        yield
    for signum in received[:1]:
        signal.raise_signal(signum)


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
    raise Stopped(signum)
