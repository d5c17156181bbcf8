"""The training loop: steps, evaluation, and checkpoints when they are due. Callbacks are told of each."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import isfinite

from models.data import Loader
from parallel.config import Config
from parallel.engine.base import StepResult
from parallel.engine.engine import Engine
from parallel.errors import NonFiniteError
from training.best_loss import BestLoss
from training.callbacks import Callbacks
from training.metrics import Meter


def fit(
    engine: Engine,
    loader: Loader,
    *,
    callbacks: Callbacks,
    save: Callable[[int], object],
    best: BestLoss,
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Train from the engine's last step to `train.steps`, or until early stopping ends the run before.

    Every rank does the same, in the same order. `save` saves the checkpoint of a step, or begins to. `best` takes in
    the loss of the validation samples, if there are any, which is computed every `eval_every` steps and after the last
    step. Each step, counted from 1, runs inside the context that `around_step` returns.

    The seconds of a step are those of its data, forwards, backwards and update, without evaluation, checkpoints and
    callbacks. Raises NonFiniteError, on every rank, after a step whose loss or norm is not finite.
    """
    config, corpus = engine.config, loader.corpus
    meter = Meter(config, engine.mesh.world.size, engine.mesh.device, corpus.num_training)
    while engine.num_steps < config.train.steps and not ends_early(config, best):
        with around_step(engine.num_steps + 1):
            started = time.perf_counter()
            engine.stopwatch.mark("data")
            result = engine.train_step(loader.training(engine.num_samples))
            seconds = time.perf_counter() - started
        step, is_best = engine.num_steps, False
        line = meter.line(step, result, seconds, samples=engine.num_samples)
        if problem := not_finite(result):
            callbacks.on_step(line)
            raise NonFiniteError(f"step {step}: {problem}. No checkpoint of it is kept. Try a smaller optimizer.lr.")
        if corpus.num_validation and (step == config.train.steps or is_due(step, config.output.eval_every)):
            line["validation_loss"] = engine.evaluate(loader.validation())
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


def not_finite(result: StepResult) -> str:
    """Return which number of a step is not finite, or an empty string. A skipped step of fp16 has no norm."""
    numbers = {"the loss": result.loss, "the gradient's norm": result.grad_norm}
    return " and ".join(f"{name} is {x}" for name, x in numbers.items() if x is not None and not isfinite(x))


def is_due(step: int, every: int) -> bool:
    """Return whether something that is done every `every` steps is done after this step; 0 is never."""
    return every > 0 and step % every == 0
