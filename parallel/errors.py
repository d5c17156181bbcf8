"""The errors that a user can cause or meet, and parts of their messages: the key, the value, and what would work."""

import difflib
import math
import re
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of a rank, and of a launcher of ranks; docs/faults.md explains them."""

    DONE = 0
    FAILED = 1  # an error of ours, or of a user's code
    REFUSED = 2  # config, data, checkpoint, or no room before the first step
    NOT_FINITE = 4  # a loss, gradient or weight is not a finite number
    LOST = 5  # a rank was lost or silent
    NO_ROOM = 6  # a memory or a disk has no room in the middle of a run
    INTERRUPTED = 130  # Ctrl-C
    REQUEUED = 138  # SIGUSR1, by which a scheduler says that the time is nearly over
    TERMINATED = 143  # SIGTERM


SIGNALLED = 128
"""A process that a signal has ended has this and the signal's number as its exit code."""


class ColonnadeError(ValueError):
    """The base of all errors in what the user gave; it is printed without a traceback.

    `str()` has at most 200 characters of a path or another long word. `code` is the exit code of a process that ends
    by it. `phase` is what the ranks did when it began, where they do something else when they end by it.
    """

    code: int = ExitCode.REFUSED
    phase: str = ""

    def __str__(self) -> str:
        return with_short_words(super().__str__())


class ConfigError(ColonnadeError):
    """All the problems of a config at once; `str()` has one on each line."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return with_short_words("\n".join(self.problems))


class RoomError(ConfigError):
    """The error of a memory or a disk that has too little room for a config, perhaps on one rank only."""


class DataError(ColonnadeError):
    """The error of data that cannot be read, that are too short for the run, or that cannot be trained on."""


class CheckpointError(ColonnadeError):
    """The error of a checkpoint or an export: it is missing, damaged, of another model, or cannot be written."""


class StorageError(ColonnadeError):
    """The error of a disk that fails during a run, usually on one rank only."""

    code = ExitCode.FAILED


class UnreadableError(CheckpointError):
    """The error of a checkpoint that may be whole: a disk failed, ranks saw different files, or it has no checksums."""


class NoRoomError(ColonnadeError):
    """The error of a memory or a disk that has no room in the middle of a run, perhaps on one rank only."""

    code = ExitCode.NO_ROOM


class DiskFullError(NoRoomError):
    """The error of a file of the run that a full disk has no room for; every rank raises it."""


class ModelError(ColonnadeError):
    """The error of a module that cannot be trained as it is, or is used or changed in a way that training forbids."""


class LostRankError(ColonnadeError):
    """The error of a rank that waited for one which has ended or is silent; it takes the exit code of that one."""

    def __init__(self, text: str, code: int = ExitCode.LOST) -> None:
        super().__init__(text)
        self.code = code


class CollectiveError(ColonnadeError):
    """The error of ranks that call different collectives at the same time, which `debug_comm` compares."""

    code = ExitCode.FAILED


class NonFiniteError(ColonnadeError):
    """The error of a run whose loss, gradient or weight is not a finite number; every rank raises it.

    Where a step has ended by it, `loss` and `grad_norm` are the numbers of that step.
    """

    code = ExitCode.NOT_FINITE

    def __init__(self, text: str, *, loss: float | None = None, grad_norm: float | None = None) -> None:
        super().__init__(text)
        self.loss, self.grad_norm = loss, grad_norm


class SignalError(ColonnadeError):
    """The end of a run that a signal has asked for, after its state was saved."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def either(choices: Iterable[object]) -> str:
    """Join the choices: (2, 4, 8) -> '2, 4 or 8'."""
    *rest, last = map(str, choices)
    return f"{', '.join(rest)} or {last}" if rest else last


def names_text(names: Iterable[str], at_most: int = 8) -> str:
    """Join names, and count those after the first few: 'a, b and 3 more'."""
    ordered = list(names)
    rest = len(ordered) - at_most
    return ", ".join(ordered[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def size_text(count: int) -> str:
    """Return a number of bytes in MiB or GiB, as text: 3 * 2**29 -> '1.50 GiB'."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


SHOWN = 200  # characters of a value that a message repeats


def shown(value: object) -> str:
    """Return a value as Python writes it, but at most 200 characters of it; never raises, whatever the value is."""
    try:
        text = repr(value[: 2 * SHOWN] if isinstance(value, str) else value)
    except Exception:  # numbers of more digits than Python prints, circles and depths, a __repr__ of the user's
        return f"a value of type {type(value).__name__} that cannot be shown"
    return shortened(text)


def shortened(text: str) -> str:
    """Return a text, or its first and last characters if it is longer than a message may repeat."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 50]}…{text[-40:]}"


def with_short_words(text: str) -> str:
    """Return a text in which words, such as paths, have at most the characters of a value that a message may repeat."""
    return re.sub(rf"\S{{{SHOWN + 1},}}", lambda word: shortened(word[0]), text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop; where it has no text, the name of its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def closest(word: str, words: Iterable[str]) -> str | None:
    """Return the one of `words` that is most similar to `word`, or None where none is similar."""
    known = {one.casefold(): one for one in words}
    matches = difflib.get_close_matches(word[:SHOWN].casefold(), known, n=1)
    return known[matches[0]] if matches else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the most similar known one, or all of them."""
    known = list(words)
    match = closest(word, known)
    return f"Did you mean {match!r}?" if match else f"Known: {', '.join(known)}."


def divisors(value: int) -> list[int]:
    """Return the divisors of a positive number, in order. The time is that of its square root."""
    small = [n for n in range(1, math.isqrt(value) + 1) if value % n == 0]
    return small + [value // n for n in reversed(small) if n * n != value]


def nearest_multiples(value: int, base: int) -> list[int]:
    """Return the multiples of `base` next below and above a `value` that is no multiple; zero is left out."""
    below = value - value % base
    return [multiple for multiple in (below, below + base) if multiple]


def times(**factors: int) -> str:
    """Write out a product: (a=2, b=4) -> 'a 2 × b 4 = 8'."""
    product = " × ".join(f"{name} {factor}" for name, factor in factors.items())
    return f"{product} = {math.prod(factors.values())}" if len(factors) > 1 else product


def nearest(value: int, choices: list[int]) -> list[int]:
    """Return the three choices nearest to `value`, in order; 1 is among them only if there is no other."""
    larger = [choice for choice in choices if choice > 1] or choices
    return sorted(sorted(larger, key=lambda choice: abs(choice - value))[:3])
