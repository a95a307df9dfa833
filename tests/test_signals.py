"""Signals while a library runs: none is lost, and one that must wait does."""

import signal

import pytest

from mnist_lit.errors import Stopped
from mnist_lit.signals import defer_signals, raise_if_stopped, raise_on_signals


class Dying:
    """Gets a signal while it is destroyed, where Python drops what is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_in_a_destructor_is_not_lost() -> None:
    with raise_on_signals():
        raise_if_stopped()
        Dying()
        with pytest.raises(Stopped) as stop:
            raise_if_stopped()
    assert stop.value.exit_code == 130
    raise_if_stopped()  # nothing is left for the next command


def test_signal_while_another_one_is_handled_is_ignored() -> None:
    done = []

    def clean_up() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("all")

    with raise_on_signals(), pytest.raises(Stopped) as stop:
        clean_up()
    assert (done, stop.value.exit_code) == (["all"], 143)


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_that_a_library_turns_into_its_own_error_stops_nevertheless(signum: int, exit_code: int) -> None:
    with pytest.raises(Stopped) as stop, raise_on_signals():  # noqa: PT012
        try:
            signal.raise_signal(signum)
        except BaseException:
            raise LookupError from None
    assert stop.value.exit_code == exit_code


def test_deferred_signal_waits_for_the_end_of_its_block() -> None:
    done = []

    def work() -> None:
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            done.append("all")

    with raise_on_signals(), pytest.raises(Stopped):
        work()
    assert done == ["all"]
    raise_if_stopped()
