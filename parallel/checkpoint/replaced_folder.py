"""Folders, and groups of files, that all ranks write together and that get their names when they are complete.

Every folder is on a file system that all ranks can see.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.synced_file import sync_folder
from parallel.mesh.mesh import Axis


@contextmanager
def replace_folder(folder: Path, axis: Axis, *, at_last: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Provide a temporary folder into which every rank may write, and which replaces `folder` after all have done so.

    The first rank calls `at_last` just before it replaces an earlier one. If a rank fails, the temporary folder is
    removed, `folder` stays as it was, and every rank raises a CheckpointError.
    """
    temporary = folder.with_name(f".{folder.name}.incomplete")
    with _temporary_folder(temporary, axis, finish=lambda: _rename(temporary, folder, at_last)):
        yield temporary


@contextmanager
def replace_files(folder: Path, pattern: re.Pattern[str], axis: Axis) -> Iterator[Path]:
    """Provide a temporary folder inside `folder` into which every rank may write.

    After all have done so its files are moved into `folder`. They replace the files there that have their names or
    match `pattern`; all others stay. It fails as `replace_folder` does.
    """
    folder = folder.resolve()
    temporary = folder / ".incomplete"
    with _temporary_folder(temporary, axis, finish=lambda: _move_into(folder, temporary, pattern)):
        yield temporary


@contextmanager
def _temporary_folder(temporary: Path, axis: Axis, *, finish: Callable[[], None]) -> Iterator[None]:
    """Make a folder on the first rank; call `finish` there after all ranks have written into it; remove the folder."""
    try:
        with fail_together(axis):
            if axis.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                _make_folder(temporary)
        with fail_together(axis):
            yield
        with fail_together(axis):
            if axis.rank == 0:
                finish()
    finally:
        if axis.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into(folder: Path, temporary: Path, pattern: re.Pattern[str]) -> None:
    """Move the new files into a folder, then delete old ones: if it is interrupted, no file is missing."""
    new = sorted(file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file())
    for name in new:
        (folder / name).parent.mkdir(exist_ok=True)
        (temporary / name).replace(folder / name)
    for changed in {(folder / name).parent for name in new}:
        sync_folder(changed)
    there = (path for path in (*folder.glob("*"), *folder.glob("*/*")) if not path.is_dir())
    for old in {path.relative_to(folder) for path in there} - {*new}:
        if pattern.fullmatch(str(old)):
            (folder / old).unlink()


def _rename(temporary: Path, folder: Path, at_last: Callable[[], None]) -> None:
    """Replace a folder. That takes two steps; the old one is renamed first, so that no folder is ever incomplete.

    Between the two steps the old one is whole under another name. What has that name is deleted only while `folder`
    itself is whole: a process that was killed between the two steps has left nothing else.
    """
    old = folder.with_name(f".{folder.name}.replaced")
    sync_folder(temporary)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        at_last()
        folder.rename(old)
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    """Make a folder that does not exist, and its parents where they do not, and sync the names of all of them."""
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent.parent)
    folder.mkdir()
    sync_folder(folder.parent)
