"""The history of a launch: what its ranks leave in the store for the launcher, and for torchrun's later attempts."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass

from parallel.watch.store import Store

PREFIX = "history"
"""The beginning of the keys, which is that of every attempt."""


@dataclass(frozen=True)
class RunStart:
    """The start of a run by the first attempt that made its folder.

    `folder` is the run's folder, `resumed_from` the checkpoint from which it went on, or empty. `has_saved`: it has
    saved a checkpoint of its own since.
    """

    folder: str
    resumed_from: str = ""
    has_saved: bool = False


@dataclass(frozen=True)
class Decision:
    """The end of a run by its own decision, as an earlier attempt has left it: its exit code, and why."""

    code: int
    text: str


class LaunchHistory:
    """The keys of the store that all attempts of a launch share; without a store, nothing is known or left.

    torchrun starts ranks again after a failure, and then `attempt` is a larger number; after a change of the number of
    hosts it is not. The main thread uses it. Where the store has ended, nothing is left.
    """

    def __init__(self, store: Store | None = None, attempt: str = "0") -> None:
        self._store, self._attempt = store, attempt

    @property
    def is_shared(self) -> bool:
        """True if ranks share it in a store."""
        return self._store is not None

    def begin(self, start: RunStart) -> None:
        """Leave how the run began; rank 0 calls this when it has made the folder, and after each checkpoint."""
        self._set("start", json.dumps(asdict(start)))

    def start(self) -> RunStart | None:
        """Return how this run began in an earlier attempt, if one has made its folder."""
        text = self._get("start")
        return None if text is None else RunStart(**json.loads(text))

    def decide(self, code: int, text: str) -> None:
        """Leave that the run has ended by its own decision, unless it has been left before."""
        self._first("decision", json.dumps([code, text, self._attempt]))

    def decision(self) -> Decision | None:
        """Return the decision by which an earlier attempt ended, if it did.

        One of this attempt is none for a rank that starts late: it comes to its own. Nor is a signal that torchrun
        sends when the number of hosts changes: it starts the ranks again, with the same number of the attempt.
        """
        if (found := self._get("decision")) is None:
            return None
        code, text, attempt = json.loads(found)
        return None if attempt == self._attempt else Decision(code, text)

    def is_first(self, what: str, who: str) -> bool:
        """Return whether `who` is the first in this attempt that does what only one rank does; True without a store."""
        return self._first(f"{self._attempt}/{what}", who) == who

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(key, value)

    def _get(self, key: str) -> str | None:
        if self._store is not None:
            with suppress(RuntimeError):
                return self._store.get(key).decode() if self._store.check([key]) else None
        return None

    def _first(self, key: str, value: str) -> str:
        """Set a key that is not set, and return the value that it has then."""
        if self._store is not None:
            with suppress(RuntimeError):
                return self._store.compare_set(key, "", value).decode()
        return value
