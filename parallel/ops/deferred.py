"""Calls that can be made later, while other ranks are waited for: a pipeline's gradients of weights."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial


class DeferredCalls:
    """Calls that are made at once or, inside `deferring(key)`, by `run_deferred(key)`."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[Callable[[], None]]] = defaultdict(deque)
        self._key: Hashable | None = None

    @property
    def is_deferring(self) -> bool:
        """True inside `deferring`, where calls are kept for later."""
        return self._key is not None

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call the function with these arguments, now or later."""
        if self._key is None:
            function(*arguments)
        else:
            self._waiting[self._key].append(partial(function, *arguments))

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        """A block in which calls are kept for later, under a key that is not None."""
        self._key = key
        try:
            yield
        finally:
            self._key = None

    def run_deferred(self, key: Hashable) -> None:
        """Make the calls that were kept under a key, in their order. Each frees its arguments once it has been made."""
        waiting = self._waiting.pop(key, deque())
        while waiting:
            waiting.popleft()()

    def clear(self) -> None:
        """Give up the calls that were kept."""
        self._waiting.clear()
