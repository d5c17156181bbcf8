"""DataLoaders of global batches, of which each replica takes its part."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from parallel.engine.agreed_batches import AgreedBatches
from parallel.engine.batch_parts import PartOfBatch, PartOfItems
from parallel.engine.division import Division
from parallel.engine.same_dataset import described
from parallel.errors import ConfigError, ModelError
from parallel.mesh.agreement import Agreement
from parallel.mesh.mesh import Axis
from parallel.modules.shares import Replica, Shares

DIVIDED = (("num_replicas", "rank"), ("num_processes", "process_index"))
"""The attributes of samplers that divide samples over replicas themselves: torch's, and Accelerate's."""


class ReplicaLoader(DataLoader[Any]):
    """A DataLoader of this replica's part of the batches of another, whose attributes it has.

    Where the other one is of a class of its own, an object of a class that is derived from both is made. So what that
    class does with its batches is done here, too.
    """

    division: Division
    undivided: Any

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self.division.iterate(super().__iter__)

    def _get_iterator(self) -> Any:
        return self.division.parts(super()._get_iterator)

    def set_epoch(self, epoch: int) -> None:
        """Pass the number of an epoch on to the sampler, the batch sampler and the dataset, where they have set_epoch.

        Those of `loader.sampler` and `loader.batch_sampler` can be called as well.
        """
        self.division.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the loader has handed out its batches, as values for JSON; not every rank need call this."""
        return self.division.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on with the batch after the last one that was handed out when `state` was saved.

        The number of replicas may be another one. On rank 0 the global generators of torch, numpy and Python are set
        to what they were on the rank that saved: the order of later epochs follows from them. Every rank calls this.
        Raises CheckpointError for what is no state of a loader.
        """
        self.division.load(state)


class ReplicaBatches:
    """This replica's part of the batches of any iterable of global batches, whose other attributes it has."""

    def __init__(self, batches: Iterable[Any], division: Division, replica: Replica) -> None:
        self.undivided, self.division = batches, division
        self._part = PartOfBatch(_unchanged, replica)

    def __iter__(self) -> Iterator[Any]:
        return self.division.iterate(lambda: self.division.parts(lambda: map(self._part, iter(self.undivided))))

    def __len__(self) -> int:
        return len(self.undivided)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy that is being made has no attributes yet
            raise AttributeError(name)
        return getattr(self.undivided, name)

    set_epoch, state_dict = ReplicaLoader.set_epoch, ReplicaLoader.state_dict
    load_state_dict = ReplicaLoader.load_state_dict


def _unchanged(batch: Any) -> Any:
    return batch


def divide_loader(loader: Any, replicas: Axis, agreement: Agreement, shares: Shares) -> Any:
    """Return a loader of this replica's part of each of the loader's batches: together they are those of one process.

    A replica has a share of ⌊n / R⌋ or ⌈n / R⌉ of n samples, in their order; `shares` are told which. Every rank of
    `agreement` draws what rank 0 draws. Where the dataset is an IterableDataset, or the loader no DataLoader, every
    rank reads all samples, and keeps its own. A loader whose sampler divides samples over replicas (DistributedSampler)
    is returned as it is. Every rank calls this. Raises ConfigError, on every rank, where batches would not be the same
    on all ranks, or are divided for other replicas.
    """
    loader = getattr(loader, "undivided", loader)
    _agree_on(loader, _problem(loader, replicas), agreement)
    if loader is None or _dividing_sampler(loader) is not None:
        if agreement.axis.rank == 0 and (padding := _padding(loader)):
            _warn(f"its DistributedSampler repeats {padding}, so that every replica has as many.")
        return loader
    replica = Replica.of(replicas)
    reads_all = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
    if reads_all and agreement.axis.rank == 0 and replicas.size > 1:
        _warn("each replica reads all samples of it, and keeps its own of each batch.", loader)
    division = Division(loader, replica, agreement, shares, reads_all=reads_all)
    if not isinstance(loader, DataLoader):
        return ReplicaBatches(loader, division, replica)
    attributes: dict[str, Any] = dict(_iterator=None, undivided=loader, division=division)
    is_batched = loader.batch_sampler is not None
    if not reads_all:
        name = "batch_sampler" if is_batched else "sampler"
        division.sampler = AgreedBatches(
            getattr(loader, name), agreement, division.generators, replica if is_batched else None
        )
        attributes[name] = division.sampler
    if reads_all or not is_batched:
        attributes["collate_fn"] = (PartOfItems if is_batched else PartOfBatch)(loader.collate_fn, replica)
    kind = type(loader)
    divided: ReplicaLoader = object.__new__(
        ReplicaLoader if kind is DataLoader else type(kind.__name__, (ReplicaLoader, kind), {})
    )
    divided.__dict__.update(loader.__dict__ | attributes)
    return divided


def _agree_on(loader: Any, problem: str, agreement: Agreement) -> None:
    """Raise ConfigError, on every rank, where there is a problem, or where ranks have other samples."""
    try:
        agreement.agree_on(f"the division of {described(loader)}", problem, ConfigError)
    except ModelError as error:
        raise ConfigError(
            f"dataloader: every rank must have the same samples, of which it is given its part, but {error} Do not"
            " divide a dataset by rank, since initialize divides the batches, and make one of random numbers by the"
            " same seed on every rank."
        ) from None


def _dividing_sampler(loader: Any) -> tuple[int, int] | None:
    """Return the number of replicas, and this rank's, for which the loader's sampler divides samples, if it does."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (batch_sampler, getattr(batch_sampler, "sampler", None), getattr(loader, "sampler", None)):
        for size, rank in DIVIDED:
            if hasattr(sampler, size) and hasattr(sampler, rank):
                return getattr(sampler, size), getattr(sampler, rank)
    return None


def _problem(loader: Any, replicas: Axis) -> str:
    """Return why a loader cannot be divided, or an empty string."""
    if loader is None:
        return ""
    if not hasattr(loader, "__iter__"):
        return f"dataloader: a {type(loader).__name__} cannot be iterated over. Give a DataLoader of global batches."
    if (found := _dividing_sampler(loader)) is not None and found != (replicas.size, replicas.rank):
        return (
            f"dataloader: its sampler divides samples for replica {found[1]} of {found[0]}, this is {replicas.rank} of"
            f" {replicas.size}. Leave the sampler out (initialize divides the batches), or give it"
            " num_replicas=engine.data.size and rank=engine.data.rank."
        )
    if replicas.size > 1 and isinstance(loader, DataLoader) and loader.num_workers and not loader.in_order:
        return (
            "dataloader: with in_order=False replicas would have parts of different batches at a time. Set"
            " in_order=True, or num_workers=0."
        )
    return ""


def _padding(loader: Any) -> str:
    """Return how many samples a DistributedSampler of the loader repeats, in words; an empty string if none."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return ""
    count = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
    return f"{count} {'sample' if count == 1 else 'samples'}" if count > 0 else ""


def _warn(text: str, loader: object = None) -> None:
    kind = "" if loader is None else f"{type(getattr(loader, 'dataset', loader)).__name__}: "
    warnings.warn(f"dataloader: {kind}{text}", stacklevel=4)
