"""The same number of microbatches on every replica, so that all of them run the same layers as often."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from parallel.errors import DataError
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import MAX, all_reduce
from parallel.modules.loss import LabelledMicrobatch
from parallel.modules.shares import UNKNOWN


def as_many_on_every_replica(
    microbatches: Iterable[LabelledMicrobatch], counts: bool | None, agreement: Agreement
) -> list[LabelledMicrobatch]:
    """Return the microbatches, the last one repeated until this replica has as many as any; repeats count nothing.

    `counts`: whether the samples count at all, which those do not that an empty replica repeats; None where that is not
    known. Raises DataError, on every rank, where one does not know it, or has no sample.
    """
    own = list(microbatches)
    problem = UNKNOWN if counts is None else "" if own else "batch: it has no sample. Give each replica one at least."
    agreement.agree_on("microbatches", problem, DataError)
    most = int(all_reduce(torch.tensor(len(own)), agreement.axis, MAX))
    if not counts:
        own = [replace(microbatch, is_counted=False) for microbatch in own]
    return own + [replace(own[-1], is_counted=False)] * (most - len(own))
