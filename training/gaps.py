"""The gaps of an output that a run goes on without while it cannot be written, and what the user is told of them."""

from collections.abc import Callable

from parallel.errors import first_line, names_text


class Gaps:
    """The numbers of the steps or messages that an output lacks, because they could not be written.

    `name` is the output's and `what` names one of its entries, such as "step". `say` prints a line: one when writing
    first fails, one when it works again, and one at the end if anything is missing.
    """

    def __init__(self, name: str, what: str, say: Callable[[str], None]) -> None:
        self.name, self.what, self.say = name, what, say
        self._missing: list[tuple[int, int]] = []  # the first and the last of each gap
        self.is_failing = False

    def fail(self, error: BaseException, number: int) -> None:
        """Note that entry `number` could not be written."""
        if not self.is_failing:
            self.say(f"{self.name} cannot be written: {reason_of(error)}; the run goes on without it")
            self._missing.append((number, number))
        self.is_failing = True
        self._missing[-1] = self._missing[-1][0], number

    def succeed(self) -> None:
        """Note that an entry was written."""
        if self.is_failing:
            self.is_failing = False
            self.say(f"{self.name} is written again; {self._text(self._missing[-1:])}")

    def end(self) -> None:
        """Say what is missing, if anything is."""
        if self._missing:
            self.say(f"{self.name} is incomplete: {self._text(self._missing)}")

    def _text(self, gaps: list[tuple[int, int]]) -> str:
        """Return which entries are missing: 'steps 3 to 7, 9 are missing'."""
        ranges = [str(first) if first == last else f"{first} to {last}" for first, last in gaps]
        is_one = len(gaps) == 1 and gaps[0][0] == gaps[0][1]
        return f"{self.what}{'' if is_one else 's'} {names_text(ranges)} {'is' if is_one else 'are'} missing"


def reason_of(error: BaseException) -> str:
    """Return what the system says of an error, or else its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
