"""The table of the library page that says what is done with a user's loader: every row of it is so."""

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

import parallel
from parallel.engine.context import current
from parallel.engine.loaders import divide_loader
from tests.harness import run
from tests.tables import rows
from tests.test_loaders import (
    NUM,
    Buckets,
    ByEpoch,
    Doubling,
    Own,
    Private,
    Stream,
    divided_by,
    engine_on,
    tokens,
    unequal,
    values_of,
)


class DividedByRank(IterableDataset[Tensor]):
    """A dataset of which each rank has other samples."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(4) + 10 * current().place.rank


def refused(act: Callable[[], Any]) -> str:
    """Return the message of the error, or an empty string."""
    try:
        act()
    except parallel.errors.ColonnadeError as error:
        return str(error)
    return ""


def given_to(engine: Any, loader: Any) -> list[list[int]]:
    counts = engine.context.shares.counts
    return [values_of(batch) if counts(batch) is not False else [] for batch in divided_by(engine, loader)]


def warnings_of(engine: Any, loader: Any) -> tuple[bool, str]:
    """Return whether a loader comes back as it is, and what is said in a warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        divided = divide_loader(loader, engine.data, engine._agreement, engine.context.shares)
    return divided is loader, " ".join(str(warning.message) for warning in said)


def two_losses(engine: Any, *, copies: bool) -> None:
    """Do a backward of a loss of uneven batches: of copies of the last, read ahead, or of the first and the last."""
    data = torch.arange(4.0).unsqueeze(1)
    batches = [x.clone() if copies else x for x in divided_by(engine, DataLoader(data, batch_size=3))]  # type: ignore[arg-type]
    engine.backward(sum(engine(x).sum() for x in (batches[1:] if copies else batches)))


def resumed_differently(engine: Any) -> None:
    loader = divided_by(engine, DataLoader(tokens(), batch_size=4, sampler=Own(lambda: list(range(NUM)))))
    next(iter(loader))
    state = loader.state_dict()
    loader = divided_by(engine, DataLoader(tokens(), batch_size=4, sampler=Own(lambda: list(range(NUM))[::-1])))
    loader.load_state_dict(state)
    next(iter(loader))


def epochs_that_reach(engine: Any) -> list[int]:
    samplers = ByEpoch(), Buckets()
    one = divided_by(engine, DataLoader(tokens(), sampler=samplers[0]))
    other = divided_by(engine, DataLoader(tokens(), batch_sampler=samplers[1]))
    one.sampler.set_epoch(5)
    other.batch_sampler.set_epoch(6)
    return [sampler.epoch for sampler in samplers]


def distributed(num_replicas: int, rank: int) -> DataLoader[Any]:
    return DataLoader(tokens(), sampler=DistributedSampler(tokens(), num_replicas, rank))


def rows_of_the_table(rank: int, world_size: int) -> dict[str, Any]:
    """Return what the rows of the table say, as this one of two replicas finds it."""
    engine, *_ = engine_on(rank, world_size, nn.Linear(1, 1))
    in_any_order = DataLoader(tokens(), num_workers=1, in_order=False)
    return {
        "a sampler or a batch_sampler of your own": given_to(engine, DataLoader(tokens(), 8, sampler=Private())),
        "`loader.sampler.set_epoch`, `loader.batch_sampler.set_epoch`": epochs_that_reach(engine),
        "a class derived from DataLoader": given_to(engine, Doubling(tokens(), batch_size=8)),
        "an IterableDataset, or no DataLoader but an iterable of batches": (
            given_to(engine, unequal()),
            warnings_of(engine, DataLoader(Stream()))[1],
        ),
        "an IterableDataset that differs by rank": refused(lambda: given_to(engine, DataLoader(DividedByRank()))),
        "`batch_size=None`": given_to(engine, DataLoader(unequal(), batch_size=None)),
        "a batch whose tensors differ in dim 0": refused(
            lambda: given_to(engine, [dict(x=torch.zeros(2), y=torch.zeros(3))])
        ),
        "a DistributedSampler of these replicas": warnings_of(engine, distributed(world_size, rank)),
        "a DistributedSampler of other replicas": refused(lambda: given_to(engine, distributed(4, rank))),
        "a sampler of your own that divides samples by rank": refused(
            lambda: given_to(engine, DataLoader(tokens(), 2, sampler=Own(lambda: list(range(rank, NUM, world_size)))))
        ),
        "a list, tensors or a Subset that differ by rank": refused(
            lambda: given_to(engine, DataLoader(Subset(tokens(), range(rank, NUM - 1, world_size)), 2))
        ),
        "workers with `in_order=False`": refused(lambda: given_to(engine, in_any_order)),
        "a loss of an uneven batch that was copied and read ahead": refused(lambda: two_losses(engine, copies=True)),
        "one loss of two uneven batches": refused(lambda: two_losses(engine, copies=False)),
        "a resumed sampler that draws something else": refused(lambda: resumed_differently(engine)),
    }


def flat(parts: tuple[list[list[int]], ...]) -> list[int]:
    return list(itertools.chain(*joined(parts)))


def joined(parts: tuple[list[list[int]], ...]) -> list[list[int]]:
    return [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]


SUPPORTED: dict[str, Callable[..., bool]] = {
    "a sampler or a batch_sampler of your own": lambda *parts: sorted(flat(parts)) == list(range(NUM)),
    "`loader.sampler.set_epoch`, `loader.batch_sampler.set_epoch`": lambda *parts: parts == ([5, 6], [5, 6]),
    "a class derived from DataLoader": lambda *parts: flat(parts) == list(range(0, 2 * NUM, 2)),
    "an IterableDataset, or no DataLoader but an iterable of batches": lambda one, other: (
        joined((one[0], other[0])) == [x.tolist() for x in unequal()] and "reads all samples" in one[1] and not other[1]
    ),
    "`batch_size=None`": lambda *parts: joined(parts) == [x.tolist() for x in unequal()],
    "a DistributedSampler of these replicas": lambda one, other: (
        one[0] and other == (True, "") and "repeats 1 sample, " in one[1]
    ),
}


def test_every_row_of_the_table_of_loaders_is_so() -> None:
    found = run(rows_of_the_table, 2)
    table = rows("docs/library.md", "Data")
    assert [row.what for row in table] == list(found[0])
    for row in table:
        if (words := re.search(r"refused: `(.*)`", row.answer)) is not None:
            assert all(words[1] in part[row.what] for part in found), (row.what, found)
        else:
            assert SUPPORTED[row.what](*(part[row.what] for part in found)), (row.what, found)
