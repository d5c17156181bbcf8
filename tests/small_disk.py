"""Run something on a small disk: a file system in memory, in a mount namespace that ends with the process."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.patience import LIMIT
from tests.tables import ROOT

NEW_NAMESPACES = 0x10000000 | 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS


@cache
def can_mount() -> bool:
    """Return whether this system lets a user mount a file system in a namespace of the user's own."""
    with tempfile.TemporaryDirectory() as folder:
        mounts = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
        try:
            return subprocess.run(mounts, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this system lets no user mount a file system")


def on_small_disk(function: Callable[..., Any], folder: Path, num_bytes: int, *arguments: Any) -> Any:
    """Return `function(folder, *arguments)` from a process in which the folder is a disk of so many bytes."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.split(".")[0] in ("torch", "tests")])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, folder, num_bytes, *arguments))
    process.start()
    theirs.close()
    try:
        assert ours.poll(LIMIT), "no answer from the process on the small disk"
        result, failure = ours.recv()
    finally:
        process.kill()
        process.join()
    assert not failure, failure
    return result


def command_on_small_disk(
    folder: Path, num_bytes: int, *command: str, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a shell command where this folder is a disk of so many bytes; `$DISK` is the folder."""
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={num_bytes} none $DISK && "
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + " ".join(command)],
        env={**os.environ, "DISK": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def _serve(connection: Connection, function: Callable[..., Any], folder: Path, num_bytes: int, *rest: Any) -> None:
    try:
        _mount(folder, num_bytes)
        connection.send((function(folder, *rest), ""))
    except BaseException:
        connection.send((None, traceback.format_exc()))


def _mount(folder: Path, num_bytes: int) -> None:
    """Mount a file system in memory, in namespaces of this process, which has one thread."""
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NAMESPACES):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, f"size={num_bytes}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Fill the disk of a folder but for so many bytes, rounded down to pages, and return the file that takes them."""
    file = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize - leave
    with file.open("wb") as out:
        out.write(bytes(max(0, free)))
    return file
