"""The ranks of one host, of which each sees at once that the process of another has ended, and ends a stopped one."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from parallel.watch.beat import KILLED, Beat
from parallel.watch.board import Board
from parallel.watch.control_groups import OomKills
from parallel.watch.process import has_ended, is_stopped, kill


class HostMates:
    """The other ranks of this host. A process that was killed cannot tell so itself: one of these does."""

    def __init__(self, board: Board, ranks: Sequence[int]) -> None:
        self._board = board
        self._ranks = [rank for rank in ranks if rank != board.rank]
        self._processes: dict[int, str] = {}
        self._oom_kills = OomKills()

    def tick(self) -> None:
        """Leave the last beat of every rank whose process has ended and that did not leave one itself."""
        if len(self._processes) < len(self._ranks):
            self._processes = {beat.rank: beat.process for beat in self._board.beats(self._ranks)}
        ended = [rank for rank, process in self._processes.items() if has_ended(process)]
        for beat in self._board.beats(ended) if ended else ():
            if beat.ended is None:
                self._board.post(self._last(beat))

    def kill_stopped(self, silent: Collection[int]) -> None:
        """Kill the ranks of this host that are among the `silent` ones or stopped; called when the run has to end.

        A process that is stopped takes no other signal, and its launcher would wait for it.
        """
        for rank, process in self._processes.items():
            if rank in silent or is_stopped(process):
                kill(process)

    def _last(self, beat: Beat) -> Beat:
        return replace(beat, tick=beat.tick + 1, ended=self._oom_kills.explanation() or KILLED)
