"""The control groups of this process, and how often the system killed a process of theirs for want of memory."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def memory_groups(groups: Path = GROUPS, own: Path = OWN) -> Iterator[tuple[int, Path]]:
    """Yield the version and the folder of each control group of memory that this process is in, innermost first."""
    for line in own.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version, top = 2, groups
        elif "memory" in controllers.split(","):
            version, top = 1, groups / "memory"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container the path may be the host's: then top is its own
            if folder.is_relative_to(top) and folder.is_dir():
                yield version, folder


def oom_kills(groups: Path = GROUPS, own: Path = OWN) -> int | None:
    """Return how many processes of this process's control group the system has killed because there was no memory left;
    None where it does not tell.

    It is `oom_kill` of memory.events (version 2) or memory.oom_control (version 1), of the innermost group that has it:
    groups around it may count the processes of others.
    """
    with suppress(OSError, ValueError):
        for version, folder in memory_groups(groups, own):
            file = folder / ("memory.events" if version == 2 else "memory.oom_control")
            with suppress(OSError, ValueError):
                found = dict(line.split() for line in file.read_text().splitlines())
                if "oom_kill" in found:
                    return int(found["oom_kill"])
    return None


class OomKills:
    """Tells whether the system has killed a process for want of memory since this object was made."""

    def __init__(self) -> None:
        self._before = oom_kills()

    def explanation(self) -> str:
        """Return words for the end of a process that SIGKILL ended, or nothing where another one may have sent it."""
        now = oom_kills()
        grew = now is not None and now > (self._before or 0)
        return "killed by the system, which had no memory left on this host" if grew else ""
