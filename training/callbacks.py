"""Callbacks: what a run calls while it trains. Its own files and screen are callbacks, and so is what a user adds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from traceback import extract_tb
from typing import Any

from parallel.config import Config
from parallel.errors import ColonnadeError, ExitCode
from parallel.mesh.agreement import Agreement
from parallel.mesh.mesh import Axis
from training.metrics import MetricsLine

logger = getLogger(__name__)


class CallbackError(ColonnadeError):
    """The error of a callback that raised an exception, on whatever rank: it ends the run on every rank."""

    code = ExitCode.FAILED


@dataclass(frozen=True)
class Run:
    """The run that a callback is told of when it starts.

    `folder` is the run's folder, which exists; `num_steps` the number of steps that were taken before, by the run that
    this one resumes, without the last one where a signal came before its evaluation: this run evaluates and reports it;
    `log` prints a line on the screen, above the progress bar.
    """

    config: Config
    folder: Path
    rank: int
    num_steps: int
    log: Callable[[str], None]


class Callback:
    """The base of loggers and of all else that is told how a run goes; each method does nothing until it is overridden.

    Rank 0 alone makes a callback and calls it; every rank does where the class sets `on_every_rank`. The other ranks
    wait meanwhile. A method must call no collective, unless it is called on every rank. An exception that it raises
    ends the run on every rank.
    """

    on_every_rank = False

    def on_start(self, run: Run) -> None:
        """Begin: the model is made or loaded, and the first step follows."""

    def on_step(self, line: MetricsLine) -> None:
        """Take in the metrics of a step, a line of metrics.jsonl; it has `validation_loss` after an evaluation."""

    def on_evaluate(self, step: int, loss: float) -> None:
        """Take in the validation loss after this step; `on_step` was called before."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Take in that the checkpoint of this step is complete, in this folder."""

    def on_end(self, error: BaseException | None) -> None:
        """End, once the model is exported, or at once by the `error` that ends the run. Called if `on_start` was."""


class Callbacks:
    """The callbacks of a run, called in order, on the ranks where they are wanted.

    Every rank makes this and calls each of its methods. `made` are callbacks; `kinds` are classes, of which this rank
    makes those that it needs. Every method raises CallbackError, on every rank, where a callback raises an exception on
    one.
    """

    def __init__(self, made: Sequence[Callback], kinds: Sequence[type[Callback]], world: Axis) -> None:
        self._world, self._agreement = world, Agreement(world)
        self._callbacks = [callback for callback in made if self._runs_here(callback)]
        self._started: list[Callback] = []
        with self._together("the callbacks' constructors"):
            for kind in filter(self._runs_here, kinds):
                with _named(kind, "the constructor"):
                    self._callbacks.append(kind())

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Call `on_start` before the block, and `on_end` after it, with the exception that ended it if one did."""
        try:
            with self._together("on_start of the callbacks"):
                for callback in self._callbacks:
                    self._started.append(callback)
                    with _named(type(callback), "on_start"):
                        callback.on_start(run)
            yield
        except BaseException as error:
            for failure in self._end(error):  # the error that ended the run is the one to raise
                logger.warning("%s", failure)
            raise
        with self._together("on_end of the callbacks"):
            for failure in self._end(None):
                raise failure

    def on_step(self, line: MetricsLine) -> None:
        self._call("on_step", line)

    def on_evaluate(self, step: int, loss: float) -> None:
        self._call("on_evaluate", step, loss)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._call("on_checkpoint", step, folder)

    def _call(self, event: str, *arguments: Any) -> None:
        with self._together(f"{event} of the callbacks"):
            for callback in self._callbacks:
                with _named(type(callback), event):
                    getattr(callback, event)(*deepcopy(arguments))  # what it changes, no other one and no rank sees

    def _end(self, error: BaseException | None) -> list[CallbackError]:
        """Call `on_end` of every callback that was started, whatever another one raises; return what they raised."""
        failures, started, self._started = [], self._started, []
        for callback in started:
            try:
                with _named(type(callback), "on_end"):
                    callback.on_end(error)
            except CallbackError as failure:
                failures.append(failure)
        return failures

    def _runs_here(self, callback: Callback | type[Callback]) -> bool:
        return self._world.rank == 0 or callback.on_every_rank

    @contextmanager
    def _together(self, action: str) -> Iterator[None]:
        """Have every rank raise the CallbackError that one raises in the block: the others would wait for it."""
        own: CallbackError | None = None
        try:
            with self._world.watch.phase(action):
                yield
        except CallbackError as error:
            own = error
        try:
            self._agreement.agree_on(action, str(own or ""), CallbackError)
        except CallbackError as error:
            raise error from (own and own.__cause__)


@contextmanager
def _named(kind: type[Callback], event: str) -> Iterator[None]:
    """Raise an exception of a callback as a CallbackError that names the callback, and the line where it happened."""
    try:
        yield
    except Exception as error:
        frame = extract_tb(error.__traceback__)[-1]
        raise CallbackError(
            f"the callback {kind.__module__}:{kind.__qualname__} failed in {event}: {type(error).__name__}: {error}"
            f" ({frame.filename}:{frame.lineno}). The log has its traceback."
        ) from error
