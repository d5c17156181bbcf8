"""What goes wrong by the user's hand, and the words to say so: the key, the value, and what would work."""

import difflib
import math
from collections.abc import Iterable


class ColonnadeError(ValueError):
    """A mistake in what the user gave; printed without a traceback."""


class ConfigError(ColonnadeError):
    """All the problems of a config at once; `str()` gives one a line."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class RoomError(ConfigError):
    """A memory or a disk that turns out to have too little room for a config: on one rank alone, perhaps."""


class DataError(ColonnadeError):
    """Data that cannot be read, or that is too short for the run."""


class CheckpointError(ColonnadeError):
    """A checkpoint that is missing, damaged, or of another model."""


class StorageError(ColonnadeError):
    """A disk that fails in the middle of a run: on one rank alone, as a rule."""


class ModelError(ColonnadeError):
    """A module that cannot be trained as it is, or that was changed while it was being trained."""


def either(choices: Iterable[object]) -> str:
    """(2, 4, 8) -> '2, 4 or 8'"""
    *rest, last = map(str, choices)
    return f"{', '.join(rest)} or {last}" if rest else last


def size_text(count: int) -> str:
    """Of so many bytes, as a user reads it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def closest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` most looks like, or None where nothing comes near."""
    known = {one.casefold(): one for one in words}
    matches = difflib.get_close_matches(word.casefold(), known, n=1)
    return known[matches[0]] if matches else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    known = list(words)
    match = closest(word, known)
    return f"Did you mean {match!r}?" if match else f"Known: {', '.join(known)}."


def nearest_multiples(value: int, base: int) -> list[int]:
    """The multiples of `base` on both sides of a `value` that is none; zero does not count."""
    below = value - value % base
    return [multiple for multiple in (below, below + base) if multiple]


def times(**factors: int) -> str:
    """(a=2, b=4) -> 'a 2 × b 4 = 8'"""
    product = " × ".join(f"{name} {factor}" for name, factor in factors.items())
    return f"{product} = {math.prod(factors.values())}" if len(factors) > 1 else product
