"""Locks of files between processes. A lock ends with its process, however that ends."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO, Any

from parallel.errors import StorageError
from parallel.regular_file import check_regular

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def open_lock(file: Path) -> IO[str]:
    """Open a file to lock it, to read and to append; it is made where there is none. It is no link and no pipe.

    Raises OSError, also where it is no regular file.
    """
    try:
        if os.path.lexists(file):
            check_regular(file, StorageError)
    except StorageError as error:
        raise OSError(errno.EINVAL, str(error).removesuffix("."), str(file)) from error
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(file, flags, 0o666), "a+", encoding="utf-8")


def try_to_lock(file: IO[Any], how: int = fcntl.LOCK_EX) -> bool:
    """Lock the file unless another process has locked it. Returns True too where the file system has no locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return True


def excludes_others(file: IO[Any]) -> bool:
    """Return whether the lock of a file that `try_to_lock` has locked is one: False where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
