"""What the machine refuses, in words: no memory, no space on the disk, a folder that is gone or cannot be written."""

import errno
import re

__all__ = ["describe_machine_error", "is_disk_full"]

NO_MEMORY = re.compile(r"can't allocate memory|out of memory|could not create a (primitive|memory)")
FULL = (errno.ENOSPC, errno.EDQUOT)
ADVICE = {
    **dict.fromkeys(FULL, "make room on that disk"),
    errno.EROFS: "give another place",
    errno.EACCES: "give another place, or change who may use this one",
}


def describe_machine_error(error: BaseException) -> str:
    """What the machine has refused and what to do, in two lines; empty if the error is of another kind."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        return "out of memory\nmake data.batch_size, data.eval_batch_size, data.image_size or the model smaller"
    if not isinstance(error, OSError) or error.strerror is None:
        return ""
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{what}\n{ADVICE.get(error.errno or 0, '')}".strip()


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is the cause of an error."""
    while error is not None and not (isinstance(error, OSError) and error.errno in FULL):
        error = error.__cause__
    return error is not None
