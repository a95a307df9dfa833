"""Errors that a person can mend: the message says what is wrong and what to do."""

import signal

__all__ = ["MNISTLitError", "Stopped", "UsageError"]


class MNISTLitError(Exception):
    """Something went wrong while a command was running; the command ends with exit code 1."""

    exit_code = 1


class UsageError(MNISTLitError):
    """What the user typed cannot work; the command ends with exit code 2 before anything is built."""

    exit_code = 2


class Stopped(BaseException):
    """The run was asked to stop and did, with all its work saved; the exit code is the shell's for the signal.

    It is no `Exception`, as `KeyboardInterrupt` is none: libraries catch those and go on.

    Args:
        signum: The signal: 2 for Ctrl-C, 15 for SIGTERM.
        advice: What to do next.
    """

    def __init__(self, signum: int, advice: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}\n{advice}".strip())
        self.signum = signum
        self.exit_code = 128 + signum
