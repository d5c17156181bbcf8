"""The batches of one replica: checked together with those of the others, and staged for this rank's device."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
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


Tensors: TypeAlias = list[tuple[Tensor, str, int]]
"""Each tensor of a batch, its key, and its version, which counts what is written into it. The tensor itself: once it is
freed, another one may have its id.
"""


@dataclass(frozen=True, eq=False)
class OwnBatch:
    """A batch of this replica, of which the others do not know yet: what is wrong with it, or its samples."""

    problem: str | None
    staged: StagedBatch | None
    num_labels: int
    num_samples: int


@dataclass(frozen=True, eq=False)
class StagedAhead:
    """A batch that is checked and staged before its step; the samples before it, and its tensors as they were."""

    batch: Mapping[str, Tensor]
    own: OwnBatch
    num_samples: int
    tensors: Tensors

    def is_of(self, batch: Mapping[str, Tensor], num_samples: int) -> bool:
        """Return whether it is this batch, with as many samples before it, and nothing has been written in between."""
        if self.batch is not batch or self.num_samples != num_samples:
            return False
        now = _tensors_of(batch)
        if now is None or len(now) != len(self.tensors):
            return False
        return all(x is y and rest == others for (x, *rest), (y, *others) in zip(self.tensors, now, strict=True))


class ReplicaBatches:
    """Checks the batches of this replica, numbers their samples over the run, and stages them.

    `limits` are the batches that the model accepts; `steps` has the loss scale. `ahead` is the batch that has been
    staged before its step, if there is one: nothing is done twice for it, while it is what it was.
    """

    def __init__(self, context: Context, limits: Limits, steps: StepCounts) -> None:
        self.data, self.limits, self.steps = context.mesh.axis("data"), limits, steps
        self._device, self._shares = context.mesh.device, context.shares
        self._size = context.config.train.micro_batch_size
        self.ahead: StagedAhead | None = None

    def stage_ahead(self, batch: Mapping[str, Tensor] | None, num_samples: int) -> None:
        """Check and stage the batch of the next step, before which `num_samples` are taken, and say nothing of it.

        A batch that cannot be looked at raises its error in the step that takes it.
        """
        self.ahead = None
        with suppress(Exception):
            tensors = _tensors_of(batch)
            if batch is not None and tensors is not None:
                self.ahead = StagedAhead(batch, self._own(batch, num_samples), num_samples, tensors)

    def staged(self, batch: Mapping[str, Tensor], num_samples: int) -> Staged:
        """Return the batch, staged for this rank's device, and the number of counted labels of all replicas.

        That number is known before the first forward, so that sums are divided once, by the global count.
        `num_samples` were taken by the steps before, on all replicas. Raises DataError on every rank where one replica
        cannot use its batch.
        """
        ahead = self.ahead
        own = ahead.own if ahead and ahead.is_of(batch, num_samples) else self._own(batch, num_samples)
        # These are on the host, so that no GPU is waited for.
        sums = torch.tensor([own.num_labels, own.problem is not None, own.num_samples, own.num_samples**2])
        tokens, refused, total, squares = all_reduce(sums, self.data).tolist()
        if refused:
            raise DataError(f"batch: {own.problem or 'that of another replica was refused.'}")
        if total**2 != self.data.size * squares:  # equal only where all numbers of samples are
            raise DataError(
                f"batch: replicas have different numbers of samples, this one {own.num_samples}. Give each the same"
                " number."
            )
        assert own.staged is not None
        scale = self.steps.loss_scale.scale / max(1, tokens)
        return own.staged.scaled(scale), tokens

    def _own(self, batch: Mapping[str, Tensor], num_samples: int) -> OwnBatch:
        """Return the batch of this replica, staged if it can be used; `num_samples` were taken before it."""
        counts = self._shares.counts(batch)
        problem = batch_problem(batch, self._size, self.limits) or (UNKNOWN if counts is None else None)
        if problem:
            return OwnBatch(problem, None, 0, 0)
        samples = self._samples(as_int64(given(batch)), num_samples, counts=bool(counts))
        staged = StagedBatch.of(samples, self._size, self._device)
        return OwnBatch(None, staged, num_counted(staged.whole.labels), len(samples.input_ids))

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


def _tensors_of(batch: object) -> Tensors | None:
    """Return the tensors of a batch as they are now; None where it has others, or some whose writes are not counted."""
    if not isinstance(batch, Mapping):
        return None
    given = {key: x for key, x in batch.items() if x is not None}
    if not all(isinstance(x, Tensor) and not x.is_inference() for x in given.values()):
        return None
    return [(x, key, x._version) for key, x in given.items()]
