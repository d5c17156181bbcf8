"""Folders that a run will write in, checked before it starts: nothing is made or changed."""

import os
import stat
import tempfile
from pathlib import Path

from parallel.regular_file import MakeError


def standing_folder(folder: Path, error: MakeError) -> Path:
    """Return the folder, or where it is missing the nearest one around it that is there.

    Raises `error` where it could not be made: a file or a link to nothing is in the way, or a folder cannot be entered.
    """
    for path in (folder, *folder.absolute().parents):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError) as cause:
            if os.path.islink(path):
                raise error(f"{folder}: {path} is a link to {os.readlink(path)}, which does not exist.") from cause
            continue
        except OSError as cause:
            raise error(f"cannot write in {path}: {cause.strerror}.") from cause
        if not stat.S_ISDIR(mode):
            raise error(f"{folder}: {path} is not a folder.")
        return path
    raise AssertionError("the root of the file system is a folder")


def check_writable(folder: Path, error: MakeError) -> None:
    """Raise `error` where no file can be written in a folder, which may still have to be made."""
    standing = standing_folder(folder, error)
    try:
        tempfile.TemporaryFile(dir=standing).close()
    except OSError as cause:
        raise error(f"cannot write in {standing}: {cause.strerror}.") from cause
