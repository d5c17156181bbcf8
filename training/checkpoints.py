"""The checkpoints that a run saves while it trains, and what it says of them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.checkpoint import checkpoint
from parallel.checkpoint.shared_failure import fail_together
from parallel.engine.engine import Engine
from parallel.errors import ColonnadeError, LostRankError, SignalError
from parallel.mesh.collectives import gather_objects
from parallel.placement.save_room import SaveRoom, tightest
from training.loss_history import LossHistory
from training.preflight import Job
from training.preview import saves_in_background
from training.resume import metadata_of

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves what an engine needs to go on, after the steps that it is told, and tells `on_saved` of each checkpoint
    when it is complete on every rank: by then a later step may have been taken.

    Every rank calls each method, after the same step.
    """

    def __init__(self, engine: Engine, job: Job, history: LossHistory, on_saved: Callable[[int, Path], None]) -> None:
        self.engine, self.job, self.history, self._on_saved = engine, job, history, on_saved

    def save(self, step: int) -> Path:
        """Save the state after this step, and return the folder that the checkpoint will have.

        It is complete then where a signal asks for the end of the run. Raises NonFiniteError, before anything is
        written, where a weight or a state of the optimizer is not finite.
        """
        engine = self.engine
        output, target = engine.config.output, checkpoint.step_folder(self.job.folder.path, step)
        waits = not output.checkpoint_async or engine.stop_signal is not None
        self.finish()
        engine.check_finite("It is not saved, and earlier checkpoints stay.", states=True)
        values, pieces = engine.encoded_scales()
        metadata = metadata_of(engine.config, engine.counters(), self.job.corpus, self.history)
        engine.save(
            [*pieces, *engine.state_pieces(owned=True)],
            checkpoint.Target(target, output.keep_checkpoints, self._best_folder()),
            {**metadata, "values": values} if values else metadata,
            wait=waits,
        )
        if waits:
            self._on_saved(step, target)
        return target

    def settle(self) -> None:
        """Do what a kill may have kept the last save from, where the run goes on from the newest of its checkpoints.

        If no step is left, no other save would do it: `best` would name an older one, and too many would be kept. Where
        newer ones were passed over, all stays as it is until the next save.
        """
        inputs, output = self.job.inputs, self.engine.config.output
        found = inputs.found
        if found is None or found.passed_over or inputs.request.resume != "auto":
            return
        folder, is_rank_0 = found.index.folder, self.engine.mesh.world.rank == 0
        if checkpoint.has_its_name(folder) and (output.checkpoint_every or output.keep_best):
            best = self._best_folder() or checkpoint.best_checkpoint(self.job.folder.path)
            with fail_together(self.engine.mesh.world):
                if is_rank_0:
                    checkpoint.settle(checkpoint.Target(folder, output.keep_checkpoints, best))

    def look(self) -> None:
        """Tell of the checkpoint that was written in the background, where every rank has written it."""
        self._tell(self.engine.saver.finished())

    def finish(self) -> None:
        """Wait for the checkpoint that is written in the background, and tell of it; raise its error on every rank."""
        self._tell(self.engine.saver.finish())

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Finish what is being saved at the end of the block: also where an error ends it, unless a rank is lost.

        A signal ends it only if the save succeeds.
        """
        try:
            yield
        except SignalError:
            self.finish()
            raise
        except LostRankError:
            raise
        except BaseException:
            try:
                self.engine.saver.finish()
            except ColonnadeError as error:  # the error of the block is the one to raise
                log.warning("%s", error)
            raise
        self.finish()

    def prepare(self) -> str:
        """Return how checkpoints are saved, and start to allocate the memory for it; nothing where none is."""
        if not saves_in_background(self.engine.config):
            return ""
        engine, own = self.engine, self.engine.placement_manager.initial.save_room
        rooms: list[SaveRoom] = gather_objects(own, engine.mesh.world)
        engine.mesh.background()
        engine.reserve_for_saving()
        return tightest(rooms).describe()

    def _best_folder(self) -> Path | None:
        """Return the folder of the checkpoint that is kept as the best one, or None."""
        if not self.engine.config.output.keep_best or not self.history.best.step:
            return None
        return checkpoint.step_folder(self.job.folder.path, self.history.best.step)

    def _tell(self, folder: Path | None) -> None:
        if folder is not None:
            self._on_saved(checkpoint.step_of(folder), folder)
