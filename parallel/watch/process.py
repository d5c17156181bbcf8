"""The identity of a process on its host, by which another process there can tell that it has ended."""

import os
import socket
from functools import cache
from pathlib import Path


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def own_identity() -> str:
    """Return the identity of this process: the namespace of its number, its number, and when it was started.

    It is empty where the system does not tell.
    """
    try:
        return f"{_namespace()} {os.getpid()} {_state_and_start(os.getpid())[1]}"
    except (OSError, ValueError):
        return ""


def has_ended(identity: str) -> bool:
    """Return whether the process of this identity has ended. False where that cannot be told from here."""
    if not identity:
        return False
    namespace, number, start = identity.rsplit(" ", 2)
    try:
        if namespace != _namespace():
            return False
        state, started = _state_and_start(int(number))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return state in "ZX" or started != start


@cache
def _namespace() -> str:
    """Return what two processes of one host share if they see each other's numbers, and others do not have."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _state_and_start(number: int) -> tuple[str, str]:
    """Return the state of a process, and its start in ticks of the clock, from /proc/N/stat."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
