"""The limits of how long tests wait, which matter only when something hangs.

A limit allows for a machine that is ten times slower than a laptop. COLONNADE_TEST_PATIENCE multiplies every limit, of
a wait, of `harness.run` and of a whole test: 10 on a machine that is slower still, 0.1 where hangs are expected.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path


def patient(seconds: float) -> float:
    """Return so many seconds, times COLONNADE_TEST_PATIENCE."""
    return seconds * float(os.environ.get("COLONNADE_TEST_PATIENCE", "1"))


LIMIT = patient(600.0)
"""The seconds that a test waits for an event that is certain to come."""


def wait_until(is_true: Callable[[], object], seconds: float = LIMIT) -> bool:
    """Wait until a condition holds; return whether it came to hold within so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def session(leader: int) -> list[int]:
    """Return the processes of a session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found
