"""DataLoaders of global batches, of which each replica takes its part."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from copy import copy
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from parallel.errors import ConfigError, either, nearest_multiples
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis


class ReplicaBatches(Sampler[list[int]]):
    """Yields one replica's part of every batch of indices: a contiguous part, of the same size on every replica.

    Of a batch whose size the number of replicas does not divide, the remaining samples at its end are left out. It is
    the counterpart of DistributedSampler, for whole batches.
    """

    def __init__(self, batches: Iterable[list[int]], axis: Axis) -> None:
        self.batches, self.axis = batches, axis

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            size = len(batch) // self.axis.size
            if size:
                yield batch[self.axis.rank * size :][:size]

    def __len__(self) -> int:
        assert isinstance(self.batches, Sized)
        count = len(self.batches)
        if isinstance(batches := self.batches, BatchSampler) and not batches.drop_last:
            left = len(batches.sampler) % batches.batch_size  # type: ignore[arg-type]
            count -= 0 < left < self.axis.size  # too few samples for every replica to have one
        return count


def divide_loader(loader: Any, axis: Axis) -> Any:
    """Return a loader of this replica's part of the loader's batches: together they are those of one process.

    A random sampler draws what rank 0's would. Every rank of the axis calls this. Anything but a DataLoader, a loader
    whose batches are not drawn by index, and one with a DistributedSampler, which divides them already, are returned as
    they are. Raises ConfigError where the number of replicas does not divide the batch size.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    batches = loader.batch_sampler
    if batches is None or isinstance(getattr(batches, "sampler", None), DistributedSampler):
        return loader
    if loader.batch_size is not None and loader.batch_size % axis.size:
        raise ConfigError(
            f"dataloader: a batch of {loader.batch_size} does not divide over {axis.size} replicas. Try"
            f" {either(nearest_multiples(loader.batch_size, axis.size))}."
        )
    if isinstance(batches, BatchSampler):
        batches = copy(batches)
        batches.sampler = _with_common_seed(batches.sampler, axis)
    return DataLoader(
        loader.dataset,
        batch_sampler=ReplicaBatches(batches, axis),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _with_common_seed(sampler: Any, axis: Axis) -> Any:
    """Return the sampler or, of a random one, a copy that draws the same on every replica, by a seed of rank 0's."""
    if not isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return sampler
    generator: torch.Generator | None = sampler.generator
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    seeds: Sequence[int] = gather_objects(seed, axis)
    sampler = copy(sampler)
    sampler.generator = torch.Generator().manual_seed(seeds[0])
    return sampler
