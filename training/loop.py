"""The training loop: steps, evaluation, and checkpoints when they are due. Callbacks are told of each."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from models.data import Loader
from parallel.config import Config
from parallel.engine.base import StepResult
from parallel.engine.engine import Engine
from parallel.errors import NonFiniteError
from training.best_loss import BestLoss
from training.callbacks import Callbacks
from training.history import History
from training.metrics import Meter, MetricsLine


def fit(
    engine: Engine,
    loader: Loader,
    *,
    callbacks: Callbacks,
    save: Callable[[int], object],
    history: History,
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Train from the engine's last step to `train.steps`, or until early stopping ends the run before.

    Every rank does the same, in the same order. `save` saves the checkpoint of a step, or begins to. The `history`
    takes in the numbers of each step, and the loss of the validation samples, if there are any, which is computed every
    `eval_every` steps and after the last step. Each step, counted from 1, runs inside the context that `around_step`
    returns.

    The seconds of a step are those of its data, forwards, backwards and update, without evaluation, checkpoints and
    callbacks. Raises NonFiniteError, on every rank, after a step or an evaluation whose numbers are not finite; the
    callbacks have been told of the step then.
    """
    config, corpus = engine.config, loader.corpus
    best = history.best
    meter = Meter(config, engine.mesh.world.size, engine.mesh.device, corpus.num_training)
    while engine.num_steps < config.train.steps and not ends_early(config, best):
        with around_step(engine.num_steps + 1):
            started = time.perf_counter()
            engine.stopwatch.mark("data")
            try:
                result = engine.train_step(loader.training(engine.num_samples))
            except NonFiniteError as error:
                seconds, failed = time.perf_counter() - started, of_failed(error, engine)
                callbacks.on_step(meter.line(engine.num_steps, failed, seconds, samples=engine.num_samples))
                raise
            seconds = time.perf_counter() - started
        step, is_best = engine.num_steps, False
        line = meter.line(step, result, seconds, samples=engine.num_samples)
        history.outliers.take(line)
        if corpus.num_validation and (step == config.train.steps or is_due(step, config.output.eval_every)):
            evaluate_into(line, engine, loader, callbacks)
        callbacks.on_step(line)
        if "validation_loss" in line:
            is_best = best.take(step, line["validation_loss"])
            callbacks.on_evaluate(step, line["validation_loss"])
        if is_due(step, config.output.checkpoint_every) or (is_best and config.output.keep_best):
            save(step)


def ends_early(config: Config, best: BestLoss) -> bool:
    """Return whether `train.early_stopping` ends the run: too many evaluations in a row were not the lowest."""
    stopping = config.train.early_stopping
    return stopping is not None and best.evaluations_since >= stopping.patience


def evaluate_into(line: MetricsLine, engine: Engine, loader: Loader, callbacks: Callbacks) -> None:
    """Add the validation loss to the line of a step. Raises NonFiniteError, with the line told, where it is none."""
    try:
        line["validation_loss"] = engine.evaluate(loader.validation())
    except NonFiniteError:
        callbacks.on_step(line)
        raise


def of_failed(error: NonFiniteError, engine: Engine) -> StepResult:
    """Return the result of a step that has ended by this error."""
    loss = math.nan if error.loss is None else error.loss
    count = engine.left_out.total
    return StepResult(loss, error.grad_norm, engine.lr, tokens=0, skipped=True, nonfinite_steps=count)


def is_due(step: int, every: int) -> bool:
    """Return whether something that is done every `every` steps is done after this step; 0 is never."""
    return every > 0 and step % every == 0
