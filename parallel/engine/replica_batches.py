"""The batches of one replica: checked together with those of the others, and staged for this rank's device."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from parallel.engine.context import Context
from parallel.errors import DataError
from parallel.layout.labels import IGNORED, num_counted
from parallel.mesh.collectives import all_reduce
from parallel.modules.shares import UNKNOWN
from parallel.optim.step_counts import StepCounts
from parallel.pipeline.microbatch import Limits, Microbatch, as_int64, batch_problem, given, labels_of
from parallel.pipeline.staged import StagedBatch
from parallel.sequence import Documents

Staged: TypeAlias = tuple[StagedBatch, int]
"""A batch on the host, and the number of counted labels of all replicas."""


class ReplicaBatches:
    """Checks the batches of this replica, numbers their samples over the run, and stages them.

    `limits` are the batches that the model accepts; `steps` has the loss scale.
    """

    def __init__(self, context: Context, limits: Limits, steps: StepCounts) -> None:
        self.data, self.limits, self.steps = context.mesh.axis("data"), limits, steps
        self._device, self._shares = context.mesh.device, context.shares
        self._size = context.config.train.micro_batch_size

    def staged(self, batch: Mapping[str, Tensor], num_samples: int) -> Staged:
        """Return the batch, staged for this rank's device, and the number of counted labels of all replicas.

        That number is known before the first forward, so that sums are divided once, by the global count.
        `num_samples` were taken by the steps before, on all replicas. Raises DataError on every rank where one replica
        cannot use its batch.
        """
        counts = self._shares.counts(batch)
        problem = batch_problem(batch, self._size, self.limits) or (UNKNOWN if counts is None else None)
        batch = {} if problem else as_int64(given(batch))
        samples = None if problem else self._samples(batch, num_samples, counts=bool(counts))
        staged = None if samples is None else StagedBatch.of(samples, self._size, self._device)
        labels = torch.empty(0) if staged is None else staged.whole.labels
        own = 0 if problem else len(batch["input_ids"])
        # These are on the host, so that no GPU is waited for.
        sums = torch.tensor([num_counted(labels), problem is not None, own, own**2])
        tokens, refused, total, squares = all_reduce(sums, self.data).tolist()
        if refused:
            raise DataError(f"batch: {problem or 'that of another replica was refused.'}")
        if total**2 != self.data.size * squares:  # equal only where all numbers of samples are
            raise DataError(
                f"batch: replicas have different numbers of samples, this one {own}. Give each the same number."
            )
        assert staged is not None
        scale = self.steps.loss_scale.scale / max(1, tokens)
        return staged.scaled(scale), tokens

    def _samples(self, batch: Mapping[str, Tensor], num_samples: int, *, counts: bool) -> Microbatch:
        """Return all samples of a batch that can be used, on the host, with labels that are not shifted."""
        ids, labels = batch["input_ids"], labels_of(batch)
        labels = labels if counts else torch.full_like(labels, IGNORED)  # a sample that an empty replica repeats
        first = num_samples + self.data.rank * len(ids)
        samples = batch.get("sample_ids", torch.arange(first, first + len(ids)))
        mask = batch.get("attention_mask")
        if mask is not None and bool(mask.all()):  # it masks nothing, and kernels without a mask are faster
            mask = None
        documents = Documents.of(batch["document_ids"]) if "document_ids" in batch else None
        if documents is not None and documents.is_one_per_sample:  # they hide nothing
            documents = None
        return Microbatch(ids, labels, samples, mask, position_ids=batch.get("position_ids"), documents=documents)
