"""The training loop: steps, evaluation, and checkpoints when they are due. Callbacks are told of each."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from signal import Signals

from models.data import Batch, Loader
from parallel.config import Config
from parallel.engine.engine import Engine
from parallel.engine.results import StepResult
from parallel.engine.stop_signals import code_of
from parallel.errors import NonFiniteError, SignalError
from training.batch_ahead import BatchAhead
from training.best_loss import BestLoss
from training.callbacks import Callbacks
from training.loss_history import LossHistory
from training.metrics import Meter, MetricsLine


def fit(
    engine: Engine,
    loader: Loader,
    *,
    callbacks: Callbacks,
    save: Callable[[int], Path],
    history: LossHistory,
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Train from the engine's last step to `train.steps`, or until early stopping ends the run before.

    Every rank does the same, in the same order. `save` saves the checkpoint of a step, or begins to. The `history`
    takes in the numbers of each step, and the loss of the validation samples, if there are any, which is computed every
    `eval_every` steps and after the last step. Each step, counted from 1, runs inside the context that `around_step`
    returns.

    The seconds of a step are those of its data, forwards, backwards and update, without evaluation, checkpoints and
    callbacks. Raises NonFiniteError, on every rank, after a step or an evaluation whose numbers are not finite, of
    which the callbacks have been told; SignalError, on every rank, after a step in which a signal has asked for the
    end.
    """
    config = engine.config
    batches = BatchAhead(loader)
    meter = Meter(config, engine.mesh.world.size, engine.mesh.device, loader.corpus.num_training)
    end_if_asked(engine)
    if history.best.unevaluated is not None:
        line = dict(history.best.unevaluated)
        finish_step(engine, loader, line=line, callbacks=callbacks, save=save, best=history.best)
    while engine.num_steps < config.train.steps and not ends_early(config, history.best):
        with around_step(engine.num_steps + 1):
            started = time.perf_counter()
            engine.stopwatch.mark("data")
            engine.mesh.watch.begin("reading a batch")
            batch = batches.take(engine.num_samples)
            try:
                result = engine.train_step(batch, next_batch=partial(read_ahead, engine, batches))
            except NonFiniteError as error:
                seconds, failed = time.perf_counter() - started, of_failed(error, engine)
                callbacks.on_step(meter.line(engine.num_steps, failed, seconds, samples=engine.num_samples))
                raise
            seconds = time.perf_counter() - started
        line = meter.line(engine.num_steps, result, seconds, samples=engine.num_samples)
        history.outliers.take(line)
        finish_step(engine, loader, line=line, callbacks=callbacks, save=save, best=history.best)


def read_ahead(engine: Engine, batches: BatchAhead) -> Batch | None:
    """Read the batch of the next step, if there is one, while the device computes the step that is not counted yet."""
    return batches.read(engine.num_samples) if engine.num_steps + 1 < engine.config.train.steps else None


def of_failed(error: NonFiniteError, engine: Engine) -> StepResult:
    """Return the result of a step that has ended by this error."""
    loss = math.nan if error.loss is None else error.loss
    count = engine.steps.num_left_out
    return StepResult(loss, error.grad_norm, engine.lr, tokens=0, skipped=True, nonfinite_steps=count)


def end_if_asked(engine: Engine) -> None:
    """Raise SignalError, on every rank, if a signal has come before the first step of this run."""
    engine.agree_on("the first step of a run")
    if (number := engine.stop_signal) is not None:
        raise stopped(number)


def finish_step(
    engine: Engine,
    loader: Loader,
    *,
    line: MetricsLine,
    callbacks: Callbacks,
    save: Callable[[int], Path],
    best: BestLoss,
) -> None:
    """Evaluate after a step, report it and save it, each if it is due.

    Raises SignalError, on every rank, if a signal asks for the end; the step is saved then. A signal also ends an
    evaluation: the run that goes on from this checkpoint evaluates first, and reports the step then.
    """
    output, step, saved, is_best = engine.config.output, engine.num_steps, None, False
    if is_evaluated(engine, loader, best) and not evaluate(engine, loader, line, callbacks):
        best.unevaluated = line
    else:
        best.unevaluated = None
        callbacks.on_step(line)
        if "validation_loss" in line:
            is_best = best.take(step, line["validation_loss"])
            callbacks.on_evaluate(step, line["validation_loss"])
    number = engine.stop_signal
    if is_due(step, output.checkpoint_every) or (is_best and output.keep_best) or number is not None:
        saved = save(step)
    if number is not None:
        raise stopped(number, saved=saved, step=step)


def is_evaluated(engine: Engine, loader: Loader, best: BestLoss) -> bool:
    """Return whether the validation samples are evaluated after this step, or were to be when a signal came."""
    step, config = engine.num_steps, engine.config
    is_now = step == config.train.steps or is_due(step, config.output.eval_every) or best.unevaluated is not None
    return bool(loader.corpus.num_validation) and is_now


def evaluate(engine: Engine, loader: Loader, line: MetricsLine, callbacks: Callbacks) -> bool:
    """Add `validation_loss` to the line of a step; return False, without it, if a signal has asked for the end.

    Raises NonFiniteError, and has told the callbacks of the step then, where the loss is not finite.
    """
    batches = BatchesUntilSignal(engine, loader.validation())
    try:
        loss = engine.evaluate(batches)
    except NonFiniteError:
        callbacks.on_step(line)
        raise
    if batches.are_cut:
        return False
    line["validation_loss"] = loss
    return True


class BatchesUntilSignal:
    """Batches of an evaluation, until ranks have agreed that a signal asks for the end: then `are_cut` is True.

    Every rank stops at the same batch, since each batch begins with an agreement of all ranks.
    """

    def __init__(self, engine: Engine, batches: Iterable[Batch]) -> None:
        self._engine, self._batches = engine, batches
        self.are_cut = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if self._engine.stop_signal is not None:
                self.are_cut = True
                return
            yield batch


def stopped(number: int, *, saved: Path | None = None, step: int = 0) -> SignalError:
    """Return the end of a run by this signal: after a step whose checkpoint is `saved`, or before its first step."""
    name = Signals(number).name
    if saved is None:
        return SignalError(f"{name}: ended before the first step of this run; nothing is lost", code_of(number))
    return SignalError(f"{name}: saved {saved} after step {step}; --resume auto goes on", code_of(number))


def ends_early(config: Config, best: BestLoss) -> bool:
    """Return whether `train.early_stopping` ends the run: too many evaluations in a row were not the lowest."""
    stopping = config.train.early_stopping
    return stopping is not None and best.evaluations_since >= stopping.patience


def is_due(step: int, every: int) -> bool:
    """Return whether something that is done every `every` steps is done after this step; 0 is never."""
    return every > 0 and step % every == 0
