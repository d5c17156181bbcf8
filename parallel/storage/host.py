"""The memory of the host that is available to this process."""

from collections.abc import Iterator
from pathlib import Path

SHARE = 0.9  # of what is available: the rest is for batches, activations and other programs
GROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Return the bytes of host memory that this process may still take: what the kernel has, or a control group
    allows, whichever is less.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 2**62  # not Linux
    found = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(SHARE * min([int(found["MemAvailable"].split()[0]) * 1024, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield what each control group of this process may still take. Unused pages of files count as free: the kernel
    gives them back.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            names = "memory.max", "memory.current", "inactive_file"
            top = GROUPS
        elif "memory" in controllers.split(","):  # version 1
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            top = GROUPS / "memory"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container the path may be the host's: then top is its own
            if folder.is_relative_to(top) and (folder / names[0]).is_file():
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, usage: str, unused: str) -> Iterator[int]:
    most = (folder / limit).read_text().strip()
    if most != "max":
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, int(most) - int((folder / usage).read_text()) + int(stat.get(unused, 0)))
