"""The training loop: steps, evaluation, and checkpoints when they are due. What is done with them is a listener's."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite

from models.data import Loader
from parallel.engine.base import StepResult
from parallel.engine.engine import Engine
from parallel.errors import NonFiniteError
from training.metrics import Meter, MetricsLine


@dataclass(frozen=True)
class Listeners:
    """The functions that a training loop calls.

    `on_step`: with the metrics of each step. `on_checkpoint`: with the number of the step after which a checkpoint is
    due. `around_step`: with the number of the step that begins; the step runs inside the context that it returns.
    """

    on_step: Callable[[MetricsLine], None]
    on_checkpoint: Callable[[int], None]
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext


def fit(engine: Engine, loader: Loader, listeners: Listeners, *, validates: bool) -> None:
    """Train from the engine's last step to `train.steps`. Every rank does the same, in the same order.

    `validates`: whether there are validation samples. Their loss is computed every `eval_every` steps and after the
    last step. The seconds of a step are those of its data, forwards, backwards and update, without evaluation and
    checkpoints. Raises NonFiniteError, on every rank, after a step whose loss or norm is not finite.
    """
    steps, output = engine.config.train.steps, engine.config.output
    meter = Meter(engine.config, engine.mesh.world.size, engine.mesh.device)
    while engine.num_steps < steps:
        with listeners.around_step(engine.num_steps + 1):
            started = time.perf_counter()
            engine.stopwatch.mark("data")
            result = engine.train_step(loader.training(engine.num_samples))
            seconds = time.perf_counter() - started
        step = engine.num_steps
        line = meter.line(step, result, seconds, samples=engine.num_samples)
        if problem := not_finite(result):
            listeners.on_step(line)
            raise NonFiniteError(f"step {step}: {problem}. No checkpoint of it is kept. Try a smaller optimizer.lr.")
        if validates and (step == steps or is_due(step, output.eval_every)):
            line["validation_loss"] = engine.evaluate(loader.validation())
        listeners.on_step(line)
        if is_due(step, output.checkpoint_every):
            listeners.on_checkpoint(step)


def not_finite(result: StepResult) -> str:
    """Return which number of a step is not finite, or an empty string. A skipped step of fp16 has no norm."""
    numbers = {"the loss": result.loss, "the gradient's norm": result.grad_norm}
    return " and ".join(f"{name} is {x}" for name, x in numbers.items() if x is not None and not isfinite(x))


def is_due(step: int, every: int) -> bool:
    """Return whether something that is done every `every` steps is done after this step; 0 is never."""
    return every > 0 and step % every == 0
