"""The length of a run: its steps, the samples that they take, and the passes over the data that these are."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from models.data import Corpus
from parallel.checkpoint.newest import FoundCheckpoint
from parallel.config import Config
from training.same_data import samples_taken
from training.text import epochs_text, plural


@dataclass(frozen=True)
class RunPosition:
    """The steps and the samples that a run has taken before it starts, or goes on."""

    steps: int = 0
    samples: int = 0

    @classmethod
    def before(cls, found: FoundCheckpoint | None) -> "RunPosition":
        """Return those of the checkpoint that a run goes on from; none without one."""
        if found is None:
            return cls()
        metadata = found.index.metadata
        return cls(int(metadata["counters"]["step"]), samples_taken(metadata))


def with_steps(config: Config, corpus: Corpus, taken: RunPosition) -> Config:
    """Return the config with the number of steps that its epochs are, or as it is where steps are given.

    A run takes ⌈epochs × training samples⌉ samples. A resumed one takes those that are left, whatever its batches were
    before: steps = steps taken + ⌈samples left ÷ batch size⌉.
    """
    train = config.train
    if train.epochs is None:
        return config
    total = math.ceil(Fraction(repr(train.epochs)) * corpus.num_training)  # of the decimal number that was written
    left = -(-(total - taken.samples) // train.global_batch_size)
    return replace(config, train=replace(train, steps=max(1, taken.steps + max(0, left))))


def length_messages(config: Config, corpus: Corpus, taken: RunPosition) -> Iterator[str]:
    """Yield what the data are, how many samples there are, and how many a run of this length takes."""
    train, length = config.train, corpus.sequence_length
    steps = max(0, train.steps - taken.steps)
    samples = taken.samples + steps * train.global_batch_size
    total = f"{epochs_text(samples / corpus.num_training)}, {samples * length:,} tokens"
    coming = f"{plural(steps, 'step')} of {train.global_batch_size:,}"
    run = f"{coming} are {total}" if not taken.steps else f"{coming} follow the {taken.steps:,} taken: {total}"
    other = config.data.validation_path
    yield f"data: {config.data.path}" + ("" if other is None else f", validation: {other}")
    yield f"training: {plural(corpus.num_training, 'sample')} of {length:,} tokens; {run}"
    if corpus.num_validation:
        every = f"every {plural(config.output.eval_every, 'step')} and " if config.output.eval_every else ""
        yield f"validation: {plural(corpus.num_validation, 'sample')} of {length:,} tokens, {every}after the last step"
