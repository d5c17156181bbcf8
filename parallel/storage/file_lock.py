"""Locks of files between processes. A lock ends with its process, however that ends."""

import errno
import fcntl
from typing import IO, Any

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
