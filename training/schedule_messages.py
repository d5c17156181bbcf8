"""Messages about a run whose length does not fit what else the config asks for."""

from collections.abc import Iterator

from models.data import Corpus
from parallel.config import Config
from parallel.optim.lr_schedule import learning_rate


def schedule_messages(config: Config, corpus: Corpus) -> list[str]:
    """Return a message for each key that does something else than its value suggests, in a run of this length."""
    return [*_learning_rate(config), *_samples(config, corpus), *_evaluations(config), *_what_is_kept(config)]


def _learning_rate(config: Config) -> Iterator[str]:
    schedule, lr, steps = config.lr_scheduler, config.optimizer.lr, config.train.steps
    if lr == 0:
        yield "optimizer.lr is 0: no step changes the weights"
    elif schedule.warmup_steps > steps:
        last = learning_rate(schedule, lr, steps - 1, steps)
        yield (
            f"lr_scheduler.warmup_steps: {schedule.warmup_steps} is more than train.steps {steps}: the learning rate"
            f" only rises, to {last:.3g} of optimizer.lr {lr:.3g}"
        )


def _samples(config: Config, corpus: Corpus) -> Iterator[str]:
    data, batch = config.data, config.train.global_batch_size
    if not corpus.num_validation and (config.output.eval_every or data.validation_fraction):
        wants = "output.eval_every is set, but " if config.output.eval_every else ""
        yield (
            f"no validation: {wants}data.validation_fraction {data.validation_fraction} of {corpus.num_training}"
            " samples leaves no sample for it"
        )
    if batch > corpus.num_training:
        yield (
            f"train.global_batch_size: {batch} is more than the {corpus.num_training} training samples: a step takes"
            " some of them more than once"
        )


def _evaluations(config: Config) -> Iterator[str]:
    every, steps, stopping = config.output.eval_every, config.train.steps, config.train.early_stopping
    if stopping is not None and (num_evaluations := -(-steps // every)) <= stopping.patience + 1:
        yield (
            f"train.early_stopping: the {num_evaluations} evaluations of a run of {steps} steps are too few for"
            f" patience {stopping.patience}: it cannot end early"
        )


def _what_is_kept(config: Config) -> Iterator[str]:
    output, steps = config.output, config.train.steps
    saves = 0 < output.checkpoint_every <= steps or output.keep_best
    if output.checkpoint_every > steps:
        yield f"output.checkpoint_every: {output.checkpoint_every} is more than train.steps {steps}: no checkpoint"
    if not saves and not output.export:
        yield "nothing of the training is kept: there is no checkpoint, and output.export is False"
