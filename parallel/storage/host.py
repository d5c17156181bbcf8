"""The memory of the host that is available to this process."""

from collections.abc import Iterator
from pathlib import Path

from parallel.watch.control_groups import memory_groups

SHARE = 0.9  # of what is available: the rest is for batches, activations and other programs


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
    for version, folder in memory_groups():
        if version == 2:
            names = "memory.max", "memory.current", "inactive_file"
        else:
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        if (folder / names[0]).is_file():
            yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, usage: str, unused: str) -> Iterator[int]:
    most = (folder / limit).read_text().strip()
    if most != "max":
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, int(most) - int((folder / usage).read_text()) + int(stat.get(unused, 0)))
