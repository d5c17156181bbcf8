"""The progress of the main thread of a rank, which it notes as it goes and its heartbeat reads."""

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """The calls, the steps and the phase of the main thread.

    `calls` counts what it did with other ranks, `step` the steps that were taken. `action` is what it began last,
    `part` the part of a step that it is in, such as "backward", and `is_cut_off` says that a collective failed because
    a connection broke. `uses_gpu`: the thread may wait for kernels, which wait for other ranks. `apart` are the threads
    in whose waits the main thread has no part.
    """

    def __init__(self) -> None:
        self.calls = self.step = 0
        self.action = self.part = ""
        self.is_cut_off = self.uses_gpu = False
        self.apart: set[int] = set()
        self._phases: list[str] = []

    @property
    def phase(self) -> str:
        """The innermost phase that the main thread is in, or nothing."""
        return self._phases[-1] if self._phases else ""

    def begin(self, action: str) -> None:
        """Note that the main thread begins something that all ranks do."""
        self.action = action
        self.calls += 1

    def enter(self, part: str) -> None:
        """Note that a part of a step begins; an empty name: it has ended, and none begins."""
        self.part = part

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Note that the block may take long on this rank, and is no silence."""
        self._phases.append(phase)
        try:
            yield
        finally:
            self._phases.pop()
            self.calls += 1
