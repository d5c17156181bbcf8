"""The store through which ranks know of each other, as far as the watch needs it."""

from typing import Protocol


class Store(Protocol):
    """The part of torch's key-value store that the watch uses. None of these calls waits for another rank.

    `get` and `multi_get` would wait for a key that is not there: `check` tells whether all of some keys are.
    """

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected: str, value: str) -> bytes: ...
