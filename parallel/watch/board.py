"""The board on which the ranks of a run leave what the others should know: keys of the store, read and written."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from parallel.watch.beat import Beat
from parallel.watch.judge import Verdict
from parallel.watch.store import Store

SECONDS_FOR_A_CALL = 5.0
NO_RANK = -1
"""The rank of a process that reads the board and is no rank: the launcher."""


def prefix_of(attempt: str) -> str:
    """Return the beginning of all keys of an attempt: torchrun starts ranks again, with the same store."""
    return f"watch/{attempt}"


class Board:
    """The keys of the store that a rank writes and reads.

    Two threads of a process use it, one at a time. A store whose host has ended raises RuntimeError.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store, self._lock = store, threading.Lock()
        self._has_ended, self._meeting = False, 0

    @contextmanager
    def _calls(self) -> Iterator[Store]:
        if not self._lock.acquire(timeout=SECONDS_FOR_A_CALL):
            raise RuntimeError("the store does not answer")
        try:
            yield self._store
        finally:
            self._lock.release()

    def post(self, beat: Beat) -> None:
        """Leave a beat in place of the last one of its rank. After that with which it ends, there is none."""
        with self._calls() as store:
            if beat.rank == self.rank:
                if self._has_ended:
                    return
                self._has_ended = beat.ended is not None
            store.set(f"beat/{beat.rank}", beat.to_json())

    def beats(self, ranks: Sequence[int]) -> list[Beat]:
        """Return the last beats of these ranks, without those that have left none."""
        keys = [f"beat/{rank}" for rank in ranks]
        with self._calls() as store:
            found = keys if store.check(keys) else [key for key in keys if store.check([key])]
            return [Beat.from_json(text) for text in store.multi_get(found)] if found else []

    def advance_clock(self, ticks: int) -> int:
        """Add to the clock of the rank that judges, and return what it shows."""
        with self._calls() as store:
            return store.add("clock", ticks)

    def rule(self, verdict: Verdict) -> None:
        """Leave a verdict, unless there is one already."""
        with self._calls() as store:
            store.compare_set("verdict", "", verdict.to_json())

    def verdict(self) -> Verdict | None:
        """Return the verdict, if there is one."""
        text = self._text("verdict")
        return None if text is None else Verdict.from_json(text)

    def refuse(self, problem: str) -> None:
        """Leave why this rank refuses to start, unless another one refuses already."""
        with self._calls() as store:
            store.compare_set("refusal", "", json.dumps([self.rank, problem]))

    def refusal(self) -> tuple[int, str] | None:
        """Return the rank that refuses to start and why, if one does."""
        text = self._text("refusal")
        return None if text is None else tuple(json.loads(text))

    def bring(self, facts: Mapping[str, Any]) -> None:
        """Begin another meeting: leave this rank's facts, which are to be those of every rank."""
        self._meeting += 1
        with self._calls() as store:
            store.set(self._facts_of(self.rank), json.dumps(facts))

    def facts(self) -> list[dict[str, Any]] | None:
        """Return the facts of all ranks, in order, or None while one has not brought its own."""
        keys = [self._facts_of(rank) for rank in range(self.size)]
        with self._calls() as store:
            return [json.loads(text) for text in store.multi_get(keys)] if store.check(keys) else None

    def has_brought(self, rank: int) -> bool:
        """Return whether a rank has brought its facts."""
        with self._calls() as store:
            return store.check([self._facts_of(rank)])

    def answer(self, problem: str) -> None:
        """Leave the answer to the facts of all ranks: what is wrong with them, or nothing."""
        with self._calls() as store:
            store.set(f"answer/{self._meeting}", f"!{problem}")

    def answered(self) -> str | None:
        """Return the answer, if there is one."""
        text = self._text(f"answer/{self._meeting}")
        return None if text is None else text.decode()[1:]

    def _facts_of(self, rank: int) -> str:
        return f"facts/{self._meeting}/{rank}"

    def _text(self, key: str) -> bytes | None:
        with self._calls() as store:
            return store.get(key) if store.check([key]) else None
