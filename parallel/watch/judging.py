"""The rank that judges: it reads the beats of all ranks every second, and leaves a verdict for them."""

from parallel.watch.beat import Observer
from parallel.watch.board import Board
from parallel.watch.judge import judge

SECONDS_TO_TAKE_OVER, SECONDS_BETWEEN_RANKS = 3.0, 0.5

SECONDS_TO_PREPARE = 2.0
"""The seconds before a rank takes over in which it observes the others, so that it need not begin from nothing."""


class Judging:
    """Rank 0 judges. Where it has ended or is stopped, so that its clock stands, the next rank takes over.

    So every rank sends two or three short messages a second, and one of them reads all beats: the work grows with the
    number of ranks, and not with its square.
    """

    def __init__(self, board: Board) -> None:
        self._board, self._observer = board, Observer()
        self._clock, self._stands_for = -1, 0.0
        self._takes_over_after = SECONDS_TO_TAKE_OVER + SECONDS_BETWEEN_RANKS * board.rank

    def tick(self, elapsed: float, timeout: float, *, have_met: bool) -> None:
        """Judge, where that falls to this rank, `elapsed` seconds after the last tick."""
        is_judge = self._board.rank == 0 or self._stands_for >= self._takes_over_after
        clock = self._board.advance_clock(int(is_judge))
        if not is_judge:
            self._stands_for = self._stands_for + min(elapsed, 2.0) if clock == self._clock else 0.0
            self._clock = clock
            if self._stands_for < self._takes_over_after - SECONDS_TO_PREPARE:
                self._observer = Observer()
                return
        seen = self._observer.observe(self._board.beats(range(self._board.size)), elapsed)
        verdict = judge(seen, timeout, have_met=have_met) if is_judge else None
        if verdict is not None:
            self._board.rule(verdict)
