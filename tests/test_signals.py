"""Ctrl-C and its like, wherever they meet a command."""

import signal

import pytest

from mnist_lit.errors import Stopped
from mnist_lit.signals import defer_signals, raise_if_stopped, raise_on_signals


class Dying:
    """Gets a signal while it is destroyed, where Python drops what is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_signal_that_comes_in_a_destructor_is_not_lost() -> None:
    with raise_on_signals():
        raise_if_stopped()
        Dying()
        with pytest.raises(Stopped) as stop:
            raise_if_stopped()
    assert stop.value.exit_code == 130
    raise_if_stopped()  # no more: the search is over


def test_only_the_first_signal_counts_that_is_not_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    with raise_on_signals():
        Dying()
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().err == ""


def test_what_a_library_makes_of_a_signal_does_not_matter() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), raise_on_signals():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise LookupError from None


def test_signal_waits_for_the_end_of_an_uninterrupted_block() -> None:
    done = []

    def work() -> None:
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            done.append("all")

    with raise_on_signals(), pytest.raises(Stopped):
        work()
    assert done == ["all"]
    raise_if_stopped()
