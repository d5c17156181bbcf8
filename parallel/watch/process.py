"""The identity of a process on its host, by which another one there sees how it is, and its end with its parent."""

import ctypes
import os
import signal
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

ENDED = ("Z", "X")
"""The states of a process that has ended."""

PR_SET_PDEATHSIG = 1
"""The number of prctl(2) that sets the signal of a parent's death."""


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def rank_here(rank: int) -> str:
    """Return the words for a rank of this host."""
    return f"rank {rank} on {host_name()}"


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
    return _state(identity) in ENDED


def is_stopped(identity: str) -> bool:
    """Return whether the process of this identity is stopped, as by SIGSTOP. False where that cannot be told."""
    return _state(identity) == "T"


def kill(identity: str) -> None:
    """Kill the process of this identity, where it is one of this host; never another one that took over its number."""
    if _state(identity) in ("", *ENDED):
        return
    with suppress(OSError):
        descriptor = os.pidfd_open(_number(identity))  # of one process for good: only then its identity is compared
        try:
            if _state(identity) not in ENDED:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def die_with(parent: int) -> None:
    """Have the kernel end this process when its `parent` ends, however it ends, and end it now if that has happened.

    The signal is sent when the *thread* ends that started this process. If that is the parent's main thread, it ends
    with the parent, so the signal is SIGKILL: it reaches a process that is stopped, that is blocked in a collective, or
    whose interpreter is held by a long call. Else SIGCONT only wakes a stopped process, which then looks at its parent.
    """
    number = signal.SIGKILL if _is_child_of_main_thread(parent) else signal.SIGCONT
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    except (OSError, AttributeError):  # no Linux: the parent is polled
        return
    if os.getppid() != parent and number == signal.SIGKILL:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_child_of_main_thread(parent: int) -> bool:
    try:
        return str(os.getpid()) in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False


@cache
def _namespace() -> str:
    """Return what two processes of one host share if they see each other's numbers, and others do not have."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _number(identity: str) -> int:
    return int(identity.rsplit(" ", 2)[1])


def _state(identity: str) -> str:
    """Return the state of the process of this identity as /proc has it; "X" if it is gone, "" if that is unknown."""
    if not identity:
        return ""
    namespace, number, start = identity.rsplit(" ", 2)
    try:
        if namespace != _namespace():
            return ""
        state, started = _state_and_start(int(number))
    except FileNotFoundError:
        return "X"
    except (OSError, ValueError):
        return ""
    return state if started == start else "X"


def _state_and_start(number: int) -> tuple[str, str]:
    """Return the state of a process, and its start in ticks of the clock, from /proc/N/stat."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
