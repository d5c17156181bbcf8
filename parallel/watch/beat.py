"""The beats by which a rank tells of itself every second, and the observations of another rank."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

INTERVAL = 1.0
"""The seconds from one beat of a rank to the next."""


KILLED = "its process was killed, or ended without a word"
"""The end of a rank that could not tell of it itself: its beat is then up to an interval old."""


@dataclass(frozen=True)
class Beat:
    """A rank tells of itself: of its process by `tick`, its main thread by all else.

    A thread of its own sends the beats, so that `tick` grows as long as the process runs, whatever the main thread
    does. `calls` grows with everything that the main thread does with other ranks. `ended` is None while the program
    runs, "" after it ended without an error, and else says why it ended; `code` is the exit code that the others take.
    """

    rank: int
    host: str
    process: str = ""  # identifies it among those of its host
    tick: int = 0
    calls: int = 0
    step: int = 0  # the steps that were taken
    action: str = ""  # what the main thread began last: "a forward"
    part: str = ""  # that of a step, which it is in: "backward"
    phase: str = ""  # that of a long work which is no silence: "saving"
    place: str = ""  # the line of the user's program that the main thread is in
    waits: bool = False  # whether the main thread waits for other ranks
    is_cut_off: bool = False  # whether a collective failed because the connection to another rank broke
    ended: str | None = None
    code: int = 5

    @property
    def name(self) -> str:
        """Return the rank and its host, as messages name it."""
        return f"rank {self.rank} on {self.host}"

    @property
    def position(self) -> str:
        """Return how far the main thread has come: 'after step 3 (last call: a forward; at train.py:31 in main)'."""
        labels = {"phase: ": self.phase or self.part, "last call: ": self.action, "at ": self.place}
        known = [f"{label}{value}" for label, value in labels.items() if value]
        text = f"after step {self.step}" if self.step else "before its first step"
        return f"{text} ({'; '.join(known)})" if known else text

    @property
    def end(self) -> str:
        """Return that and why this rank has ended, and how far it had come."""
        if self.ended == KILLED:
            return f"{self.name} ended: {KILLED}, and it was last seen {self.position}"
        return f"{self.name} ended {self.position}: {self.ended}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "Beat":
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Observation:
    """The last beat of a rank, and for how many seconds of the observer's clock nothing has changed.

    `quiet`: since there was a new beat. `still`: since the main thread did something else. `waiting`: since it began
    the wait that it is in, 0 where it is in none.
    """

    beat: Beat
    quiet: float = 0.0
    still: float = 0.0


class Observer:
    """Turns the beats that a rank reads every second into observations, by its own clock alone.

    The clocks of hosts differ. A pause of the observer itself, whose host was suspended, is not counted as one of the
    others: at most two intervals are added at a time.
    """

    def __init__(self) -> None:
        self._last: dict[int, Observation] = {}

    def observe(self, beats: Iterable[Beat], elapsed: float) -> list[Observation]:
        """Return the observations after `elapsed` seconds since the beats were read before."""
        elapsed = min(elapsed, 2 * INTERVAL)
        self._last = {beat.rank: self._observation(beat, elapsed) for beat in beats}
        return list(self._last.values())

    def _observation(self, beat: Beat, elapsed: float) -> Observation:
        last = self._last.get(beat.rank)
        if last is None:
            return Observation(beat)
        quiet = last.quiet + elapsed if beat.tick == last.beat.tick else 0.0
        is_still = _activity(beat) == _activity(last.beat)
        return Observation(beat, quiet, last.still + elapsed if is_still else 0.0)


def _activity(beat: Beat) -> tuple[object, ...]:
    """Return what changes whenever the main thread makes progress."""
    return beat.calls, beat.step, beat.action, beat.phase, beat.waits, beat.ended
