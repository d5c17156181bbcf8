"""Locks of files between processes. A lock ends with its process, however that ends."""

import errno
import fcntl
from typing import IO, Any


def try_to_lock(file: IO[Any], how: int = fcntl.LOCK_EX) -> bool:
    """Lock the file unless another process has locked it. Returns True too where the file system has no locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
