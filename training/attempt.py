"""An attempt at a run: what the run has from its process and from the launcher, which may start it again."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from parallel.checkpoint.checkpoint import CHECKPOINTS, candidates
from parallel.config import Config
from parallel.engine.stop_signals import StopSignals
from parallel.regular_file import without_links
from parallel.watch.launch_history import LaunchHistory, RunStart
from training.callbacks import Callback
from training.ended import EndRecord
from training.preflight import Job


@dataclass(frozen=True)
class Attempt:
    """The signals of the process, the history of the launch, and the record of the end.

    An attempt that nothing is known of, the default, has neither a launcher nor handlers of signals.
    """

    stop: StopSignals = field(default_factory=StopSignals)
    history: LaunchHistory = field(default_factory=LaunchHistory)
    record: EndRecord = field(default_factory=EndRecord)

    def begin(self, job: Job) -> None:
        """Take in that the run's folder has been made; every rank calls this."""
        is_first = job.place.rank == 0
        self.record.begin(job.folder.path, removes=is_first)
        if is_first and self.history.start() is None:
            self.history.begin(_start_of(job))


def _start_of(job: Job) -> RunStart:
    origin = "" if job.resume_from is None else str(without_links(job.resume_from))
    return RunStart(str(without_links(job.folder.path)), origin)


class SavedNote(Callback):
    """Notes in the history that the run has a checkpoint of its own, from which a later attempt goes on."""

    def __init__(self, history: LaunchHistory) -> None:
        self._history, self._has_saved = history, False

    def on_checkpoint(self, step: int, folder: Path) -> None:
        start = self._history.start()
        if start is not None and not self._has_saved:
            self._history.begin(replace(start, has_saved=True))
        self._has_saved = True


def resume_of(start: RunStart | None, config: Config, resume: str | None) -> str | None:
    """Return from what a run begins, as `--resume` says it, where an earlier attempt may have made its folder.

    The run's own checkpoints come first. Where it has none yet, this attempt begins as the first one did.
    """
    if start is None or not _is_of(start, config):
        return resume
    return "auto" if start.has_saved or _has_own_checkpoint(start) else start.resumed_from or None


def _has_own_checkpoint(start: RunStart) -> bool:
    """Return whether the run's folder has a checkpoint that must be its own, since the run has made the folder anew.

    A rank that is killed between its first checkpoint and the note of it leaves no note.
    """
    folder = Path(start.folder)
    goes_on_in_it = bool(start.resumed_from) and Path(start.resumed_from).is_relative_to(folder)
    return not goes_on_in_it and bool(candidates(folder / CHECKPOINTS))


def in_own_folder(job: Job, start: RunStart | None) -> Job:
    """Return the job in the folder that an earlier attempt has made, if one has: it is not renamed."""
    return replace(job, is_again=start is not None and _is_of(start, job.config))


def _is_of(start: RunStart, config: Config) -> bool:
    return start.folder == str(without_links(config.output.dir))
