"""The number of updates that each parameter has had."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkSpec
from parallel.layout.layout import ParameterInfo


@dataclass(frozen=True)
class UpdateRange:
    """Elements `start` … `stop` of a whole chunk, which have had `updates` updates, with this one."""

    start: int
    stop: int
    updates: int


class UpdateCounts:
    """Counts updates, and for each parameter those that it missed because it had no gradient. Adam's bias correction
    needs the number of updates that a parameter has had.
    """

    def __init__(self) -> None:
        self.total = 0
        self._unused: Container[nn.Parameter] = ()  # parameters that have no gradient in this update
        self._missed: dict[ParameterInfo, int] = {}  # the number of updates missed, if it is not 0
        self._before: tuple[int, dict[ParameterInfo, int]] = 0, {}  # `total` and `_missed` before the last `begin`

    def begin(self, chunks: Sequence[Chunk], unused: Container[nn.Parameter]) -> None:
        """Count an update, which the parameters in `unused` miss."""
        self._before = self.total, self._missed
        self.total += 1
        self._unused = unused
        infos = (info for chunk in chunks for info in chunk.infos if info.parameter in unused)
        self._missed = self._missed | {info: self._missed.get(info, 0) + 1 for info in infos}

    def take_back(self) -> None:
        """Count the last update no longer: it was left out."""
        self.total, self._missed = self._before

    def ranges(self, spec: ChunkSpec) -> list[UpdateRange]:
        """Return the elements of a chunk that this update changes: parameters side by side are one range, if they have
        had equally many updates.
        """
        found: list[UpdateRange] = []
        for info, (start, stop) in zip(spec.infos, spec.ranges, strict=True):
            if info.parameter in self._unused:
                continue
            updates = self.total - self._missed.get(info, 0)
            if found and (found[-1].stop, found[-1].updates) == (start, updates):
                start = found.pop().start
            found.append(UpdateRange(start, stop, updates))
        return found

    def of_those_that_missed_some(self) -> dict[str, int]:
        """Return the number of updates, by name, of each parameter that has had fewer than `total`."""
        return {info.name: self.total - missed for info, missed in self._missed.items()}

    def restore(self, total: int, chunks: Sequence[Chunk], steps: Mapping[str, float]) -> None:
        """Go on after `total` updates; `steps` has the number, by name, of each parameter that has had fewer."""
        self.total = total
        had = [(info, int(steps.get(info.name, total))) for chunk in chunks for info in chunk.infos]
        self._missed = {info: total - count for info, count in had if count < total}
