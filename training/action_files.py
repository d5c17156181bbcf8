"""The files of a run that say when each rank computed what in its traced steps; `measured` reads them."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel.engine.action_times import ActionTimes
from parallel.engine.engine import Engine
from parallel.mesh.clocks import ClockOffset, measure_clock
from parallel.pipeline.timeline import Span
from parallel.storage.no_room import disk_problem, naming
from parallel.storage.replaced_file import replacing

log = logging.getLogger(__name__)

FORMAT = 1


class ActionFile:
    """Writes `file`: the actions of this rank in `steps`, counted from 1, with their times.

    The clocks of the ranks are compared before the first of these steps, and the file is written after the last. `say`
    prints why it could not be written: the run goes on without it. Other steps take no more time than without it.
    """

    def __init__(self, steps: range, file: Path, engine: Engine, *, say: Callable[[str], None]) -> None:
        self.steps, self.file, self.engine, self.say = steps, file, engine, say
        self._offset: ClockOffset | None = None
        self._found: list[dict[str, Any]] = []

    @contextmanager
    def around_step(self, step: int) -> Iterator[None]:
        """Record a training step, the body of the `with` statement, if it is one of those asked for."""
        if step not in self.steps:
            yield
            return
        if self._offset is None:
            self._offset = measure_clock(self.engine.mesh.world)
        times = ActionTimes(self.engine.stopwatch, self.engine.mesh.device, self._offset)
        yield
        self._found.append({"step": step, "actions": [_row_of(span) for span in times.end()]})
        if step == self.steps[-1]:
            try:
                self._write(self._offset)
            except OSError as error:
                log.warning("no times of actions: %s", disk_problem(error))
                self.say(f"no times of actions: {disk_problem(error)}")

    def _write(self, offset: ClockOffset) -> None:
        mesh = self.engine.mesh
        content = {
            "format": FORMAT,
            "rank": mesh.rank,
            "world_size": mesh.world.size,
            "mesh": mesh.topology.shape,
            "clock_error_seconds": offset.error,
            "steps": self._found,
        }
        with naming(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.file), replacing(self.file) as temporary:
            temporary.write_text(json.dumps(content) + "\n")


def _row_of(span: Span) -> list[Any]:
    """Return an action as the file has it: op, stage, microbatch, and its start and end in seconds."""
    action = span.action
    return [action.op.value, action.stage, action.microbatch, round(span.start, 7), round(span.end, 7)]
