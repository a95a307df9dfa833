"""Errors that the user can mend, and advice for those that the machine raises."""

import difflib
import errno
import os
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ADVICE = {
    **dict.fromkeys(DISK_FULL, "make room on that disk"),
    errno.EROFS: "give another path",
    errno.EACCES: "give another path, or change its permissions",
}
# torch raises plain RuntimeErrors for both.
OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|could not create a (primitive|memory)")
PEER_FAILURE = re.compile(r"gloo/|caused pair closure|NCCL|ProcessGroup|TCPStore|Connection (closed|reset) by peer")


class MNISTLitError(Exception):
    """Ends a command with exit code 1: something went wrong while it was running."""

    exit_code = 1


class UsageError(MNISTLitError):
    """Ends a command with exit code 2: what was typed cannot work."""

    exit_code = 2


class Stopped(BaseException):
    """Ends a command after a signal, with the exit code that shells use for it.

    It is no `Exception`, as `KeyboardInterrupt` is none: libraries catch those and continue.

    Args:
        signum: The signal: 2 for Ctrl-C, 15 for SIGTERM, 1 for SIGHUP.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Suggest the names nearest to `word` in one line; empty if none is near."""
    nearest = difflib.get_close_matches(word, list(names), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(nearest)}?" if nearest else ""


def describe_machine_error(error: BaseException) -> str:
    """Describe an error of memory, disk, locale or another process in two lines; empty for other errors."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return "out of memory\nmake data.batch_size, data.eval_batch_size, data.image_size or the model smaller"
    if isinstance(error, RuntimeError) and PEER_FAILURE.search(str(error)):
        return f"another process of this run has failed or is gone: {str(error).splitlines()[0][:200]}"
    if isinstance(error, UnicodeError) and sys.getfilesystemencoding() != "utf-8":
        return f"{error}\nthis locale is not UTF-8: set PYTHONUTF8=1"
    if not isinstance(error, OSError) or error.strerror is None:
        return ""
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{what}\n{ADVICE.get(error.errno or 0, '')}".strip()


def format_own_frames(error: BaseException) -> str:
    """Format the frames of a traceback that are neither this package's nor an installed one's."""
    folders = (f"{Path(__file__).parent}{os.sep}", sysconfig.get_path("stdlib"), "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(folders) and "-packages" not in frame.filename]
    return "".join(traceback.format_list(own))


def is_disk_full(error: BaseException | None) -> bool:
    """Check whether a full disk is the cause of an error."""
    while error is not None and not (isinstance(error, OSError) and error.errno in DISK_FULL):
        error = error.__cause__
    return error is not None
