"""Whether a forward runs for the second time, to fill in what was not kept of the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_RUNS = ContextVar("recomputation", default=False)


@contextmanager
def recomputation() -> Iterator[None]:
    before = _RUNS.set(True)
    try:
        yield
    finally:
        _RUNS.reset(before)


def is_recomputation() -> bool:
    return _RUNS.get()
