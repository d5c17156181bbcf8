"""Samplers that give each rank other samples, as those do that read the rank from torch.distributed."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from parallel.errors import DataError
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import MAX, all_reduce


def refuse_division_by_rank(own: Sequence[Any], first: Sequence[Any], agreement: Agreement) -> None:
    """Refuse a sampler whose draws of an epoch are parts of the data, a part for each rank.

    `own`: what this rank's sampler drew; `first`: what rank 0's did, whose draw alone would be used: the other samples
    would be lost. Samplers that shuffle differently on each rank draw the same samples. Those that draw some of them at
    random are not refused, unless together they draw each about once. Raises DataError on every rank.
    """
    ranks, indexes, others = agreement.axis.size, _indexes(own), _indexes(first)
    is_other = agreement.axis.rank > 0 and len(indexes & others) > 1  # one may be repeated, to make parts even
    drawn, repeated = all_reduce(torch.tensor([len(indexes), is_other]), agreement.axis).tolist()
    num_samples = int(all_reduce(torch.tensor(max(indexes, default=-1) + 1), agreement.axis, MAX))
    is_divided = not repeated and num_samples > 2 * ranks and abs(drawn - num_samples) < ranks
    problem = (
        f"dataloader: its sampler draws other samples on each of {ranks} ranks, which together are the {num_samples} of"
        " the dataset, as if it divided them by rank. Have it draw all samples on every rank, since initialize divides"
        " the batches; or do not pass the loader to initialize."
    )
    agreement.agree_on("the samples of a sampler", problem if is_divided else "", DataError)


def _indexes(drawn: Iterable[Any]) -> set[int]:
    """Return the indexes in what a sampler drew: batches of indexes, or indexes."""
    found: set[int] = set()
    for batch in drawn:
        try:
            found.update(int(index) for index in (batch if isinstance(batch, Iterable) else [batch]))
        except (TypeError, ValueError):  # keys of another kind
            return set()
    return found
