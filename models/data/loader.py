"""The order of a run's samples, and the batches of a replica.

The samples of a step follow from the seed and the number of samples taken before it. So their order is the same in
every layout and for every batch size, and a resumed run need not replay the steps before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch

from models.data.corpus import Corpus
from models.data.samples import Indexes, Sample
from parallel.layout.labels import IGNORED

Batch: TypeAlias = dict[str, torch.Tensor]


class SampleOrder:
    """The order in which a run takes the training samples: as they come, or in a new permutation for each epoch."""

    def __init__(self, num_samples: int, *, shuffle: bool, seed: int) -> None:
        self.num_samples = num_samples
        self._shuffle = shuffle
        self._seed = seed
        # Two are kept, because a step may begin in one epoch and end in the next.
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def take(self, first: int, count: int) -> Indexes:
        """Return the indexes of the `count` samples that a run takes after its first `first` ones."""
        epochs, offsets = np.divmod(np.arange(first, first + count), self.num_samples)
        if not self._shuffle:
            return offsets
        return np.concatenate([self._permutation(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _draw_permutation(self, epoch: int) -> Indexes:
        # The raw bits are the same in every version of numpy; the result of `Generator.permutation` may change.
        bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
        return np.argsort(bits.random_raw(self.num_samples), kind="stable")


class Loader:
    """The batches of data-parallel replica d of D: rows [d*G/D, (d+1)*G/D) of each global batch of G samples."""

    def __init__(
        self, corpus: Corpus, order: SampleOrder, *, global_batch: int, replica: int = 0, num_replicas: int = 1
    ) -> None:
        assert global_batch % num_replicas == 0, f"{global_batch} samples over {num_replicas} replicas"
        self.corpus = corpus
        self._order = order
        self._global_batch = global_batch
        rows = global_batch // num_replicas
        self._block = slice(replica * rows, (replica + 1) * rows)

    def training(self, first: int) -> Batch:
        """Return the training batch after the first `first` samples of the run, and its sample_ids[G/D].

        The sample ids number the samples of the whole run, and dropout masks follow from them.
        """
        numbers = self._order.take(first, self._global_batch)[self._block]
        samples = [self.corpus.training.sample(int(number)) for number in numbers]
        return {**_stacked(samples), "sample_ids": self._sample_ids(first)}

    def validation(self) -> Iterator[Batch]:
        """Yield all validation samples once, in order, with labels[G/D, S] and sample_ids[G/D].

        Every global batch has G samples, so that any layout divides it: the last one is filled up with rows that have
        no labels.
        """
        validation = self.corpus.validation
        for step in range(math.ceil(validation.num_samples / self._global_batch)):
            sample_ids = self._sample_ids(step * self._global_batch)
            samples = [
                _labelled(validation.sample(min(index, validation.num_samples - 1))) for index in sample_ids.tolist()
            ]
            batch = _stacked(samples)
            batch["labels"][sample_ids >= validation.num_samples] = IGNORED
            yield {**batch, "sample_ids": sample_ids}

    def _sample_ids(self, first: int) -> torch.Tensor:
        """Return first + j for each row j of this replica in a global batch."""
        return torch.arange(first + self._block.start, first + self._block.stop)


def _labelled(sample: Sample) -> Sample:
    """Return the sample with labels: where it has none, all of its tokens are learned."""
    return sample if "labels" in sample else {**sample, "labels": sample["input_ids"].copy()}


def _stacked(samples: Sequence[Sample]) -> Batch:
    """Return samples of the same keys as a batch: x[S] of each -> x[B, S]."""
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
