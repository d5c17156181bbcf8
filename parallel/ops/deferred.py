"""Work that nobody waits for."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


class Deferred:
    """Calls, each made at once or, if it comes while they are being put off, by the next `catch_up`."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._puts_off = False

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        if self._puts_off:
            self._waiting.append(partial(function, *arguments))
        else:
            function(*arguments)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        self._puts_off = True
        try:
            yield
        finally:
            self._puts_off = False

    def catch_up(self) -> None:
        """In the order in which they came; what each held is free as soon as it has been made."""
        while self._waiting:
            self._waiting.popleft()()

    def forget(self) -> None:
        self._waiting.clear()
