"""Calls that can be made later, while other ranks are waited for: a pipeline's gradients of weights."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


class DeferredCalls:
    """Calls that are made at once or, inside `deferring`, by the next `run_deferred`."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_deferring = False

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call the function with these arguments, now or later."""
        if self._is_deferring:
            self._waiting.append(partial(function, *arguments))
        else:
            function(*arguments)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """A block in which calls are kept for later."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False

    def run_deferred(self) -> None:
        """Make the calls that were kept, in their order. Each frees its arguments as soon as it has been made."""
        while self._waiting:
            self._waiting.popleft()()

    def clear(self) -> None:
        """Give up the calls that were kept."""
        self._waiting.clear()
