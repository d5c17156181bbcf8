"""The meeting of the ranks before they share anything: each tells by what it was started, and all compare."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parallel.errors import ConfigError, LostRankError
from parallel.watch.beat import Observer
from parallel.watch.board import Board

SECONDS_BETWEEN_LOOKS = 0.05
SHOWN = 8
"""The differences that a message shows; it counts the others."""


def meet(board: Board, facts: Mapping[str, Any], timeout: float, check: Callable[[], object] = lambda: None) -> None:
    """Return when every rank has brought equal facts; rank 0 compares them. `check` is called again and again.

    Raises ConfigError on every rank where facts differ, or where one rank refuses to start; LostRankError where one has
    ended, or does not come within `timeout` seconds although it runs no more.
    """
    board.bring(facts)
    absent, last = _Absent(board), time.monotonic()
    while (problem := board.answered()) is None:
        check()
        if (refusal := board.refusal()) is not None:
            raise ConfigError(f"rank {refusal[0]} refuses to start: {refusal[1]}")
        if board.rank == 0 and (brought := board.facts()) is not None:
            board.answer("\n".join(differences(brought)))
        elif (now := time.monotonic()) - last >= 1.0:
            if lost := absent.problem(now - last, timeout):
                raise LostRankError(lost)
            last = now
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if problem:
        raise ConfigError(*problem.splitlines())


class _Absent:
    """The ranks that this one waits for until all have met: rank 0 for all, and all for rank 0."""

    def __init__(self, board: Board) -> None:
        self._board, self._observer = board, Observer()
        self._ranks = range(1, board.size) if board.rank == 0 else range(1)
        self._without_beat = 0.0

    def problem(self, elapsed: float, timeout: float) -> str:
        """Return which rank will not come, or an empty string. A rank whose process runs may take its time."""
        seen = self._observer.observe(self._board.beats(self._ranks), elapsed)
        for one in seen:
            if one.beat.ended is not None and not self._board.has_brought(one.beat.rank):
                return f"{one.beat.name} ended before the ranks met{f': {one.beat.ended}' if one.beat.ended else ''}"
            if one.quiet >= timeout:
                return f"{one.beat.name} is silent before the ranks met: its process has not answered for {timeout:g} s"
        self._without_beat += elapsed if len(seen) < len(self._ranks) else 0.0
        if self._without_beat < timeout:
            return ""
        here = {one.beat.rank for one in seen}
        missing = [rank for rank in self._ranks if rank not in here]
        return f"{rank_list(missing)} did not come within {timeout:g} s (train.timeout_seconds)"


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each fact that is not the same on all ranks: its key, and each value with its ranks.

    >>> differences([{"optimizer.lr": 0.1}, {"optimizer.lr": 0.5}])
    ['optimizer.lr: the ranks were started with different values: 0.1 on rank 0, 0.5 on rank 1.']
    """
    found = []
    for key in dict.fromkeys(key for own in facts for key in own):
        ranks: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(repr(own[key]) if key in own else "nothing", []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(f"{value} on {rank_list(some)}" for value, some in ranks.items())
            found.append(f"{key}: the ranks were started with different values: {values}.")
    more = len(found) - SHOWN
    return [*found[:SHOWN], *([f"and {more} more keys differ."] if more > 0 else [])]


def rank_list(ranks: Sequence[int]) -> str:
    """Return ranks as text: [1] -> 'rank 1', [1, 2, 5] -> 'ranks 1, 2, 5'; of many only the first are named."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"ranks {', '.join(map(str, ranks[:SHOWN]))}{more}"
