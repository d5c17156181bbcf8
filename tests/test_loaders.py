"""A user's loader: what replicas are given together is what one process would be given, in its order."""

import itertools
import multiprocessing
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    get_worker_info,
)

import parallel
from parallel.config import parse
from parallel.engine.batch_parts import digest, num_samples, rows_of
from parallel.engine.context import Place, current, make_context, use
from parallel.engine.loaders import divide_loader
from parallel.modules.shares import Replica, Share
from tests.harness import run

NUM = 11  # samples: no number of replicas and no batch size divides it

# -- the pure part -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(total=st.integers(0, 40), size=st.integers(1, 9))
def test_shares_are_the_whole_batch_in_order_and_their_weights_have_a_mean_of_one(total: int, size: int) -> None:
    shares = [Share.of(total, Replica(rank, size)) for rank in range(size)]
    want = [len(part) for part in torch.arange(total).tensor_split(size)]
    assert [share.own for share in shares] == want
    samples = list(range(total))
    assert [i for share in shares if share.own for i in samples[share.rows]] == samples
    assert all(samples[share.rows] == samples[:1] for share in shares if not share.own)
    if total:
        assert sum(share.weight for share in shares) == pytest.approx(size, rel=1e-15)
        assert all(share.weight == 1.0 for share in shares) == (total % size == 0)


def trees(rows: int) -> st.SearchStrategy[Any]:
    """Return batches of this number of rows: tensors, arrays, lists of values, and containers of these."""
    leaves = st.sampled_from(
        [
            torch.arange(rows * 2.0).view(rows, 2),
            torch.arange(rows).to(torch.bfloat16),
            np.arange(rows * 3).reshape(rows, 3),
            [f"text {i}" for i in range(rows)],
        ]
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
            | st.lists(inner, min_size=1, max_size=2).map(tuple)
        ),
        max_leaves=4,
    )


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 4))
def test_the_parts_of_a_collated_batch_are_its_rows_in_order(data: Any, rows: int, size: int) -> None:
    batch = data.draw(trees(rows))
    assert num_samples(batch) == (rows, "")
    parts = [rows_of(batch, Share.of(rows, Replica(r, size)).rows) for r in range(min(rows, size))]
    assert all(type(part) is type(batch) for part in parts)
    again = batch_of([item for part in parts for item in items_of(part, num_samples(part)[0])], batch)
    assert digest(again) == digest(batch)


def items_of(batch: Any, rows: int) -> list[Any]:
    """Return the samples of a batch one by one, each as a batch of one row."""
    return [rows_of(batch, slice(i, i + 1)) for i in range(rows)]


def batch_of(items: list[Any], like: Any) -> Any:
    """Return the batch of these samples: an independent inverse of `items_of`, by the structure of `like`."""
    if isinstance(like, dict):
        return {key: batch_of([item[key] for item in items], like[key]) for key in like}
    if isinstance(like, tuple):
        return tuple(batch_of([item[i] for item in items], x) for i, x in enumerate(like))
    if isinstance(like, Tensor):
        return torch.cat(items)
    return np.concatenate(items) if isinstance(like, np.ndarray) else [x for item in items for x in item]


def test_a_batch_that_cannot_be_cut_is_described_by_name() -> None:
    ragged = dict(input_ids=torch.zeros(4, 3), length=torch.zeros(()), more=[torch.zeros(2)])
    count, problem = num_samples(ragged)
    assert count == 0
    assert "but it has input_ids 4, length no dim, more[0] 2." in problem
    assert "no tensor" in num_samples({})[1]


# -- the order of a user's loaders -------------------------------------------------------------------------------------


class Own(Sampler[int]):
    """A sampler that draws from a global generator when an epoch begins."""

    def __init__(self, draw: Callable[[], list[int]]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return NUM

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw())


class Endless(Sampler[int]):
    """A sampler without a length and without an end, which draws one index at a time."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(torch.randint(NUM, ()))


class Private(Sampler[int]):
    """A sampler with a generator of its own, which every rank has seeded differently."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(int(torch.initial_seed()))

    def __len__(self) -> int:
        return NUM

    def __iter__(self) -> Iterator[int]:
        yield from self.rng.permutation(NUM).tolist()


class ByEpoch(Sampler[int]):
    """A sampler whose order follows from set_epoch, as DistributedSampler's does."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return NUM

    def __iter__(self) -> Iterator[int]:
        yield from np.random.RandomState(self.epoch).permutation(NUM).tolist()


class Buckets(Sampler[list[int]]):
    """A batch sampler of batches of 1, 2, 3 and 4 samples, in an order that it draws."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.permutation(NUM - 1).tolist()
        sizes = random.sample([1, 2, 3, 4], 4)
        for size in sizes:
            yield [order.pop() + self.epoch * 0 for _ in range(size)]


class Doubling(DataLoader[Any]):
    """A loader of a class of its own, which changes its batches."""

    factor = 2

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield self.factor * batch


class Fetching(DataLoader[Any]):
    """A loader that reads its dataset itself."""

    def __iter__(self) -> Any:
        for indexes in self.batch_sampler:  # type: ignore[union-attr]
            yield self.collate_fn([self.dataset[i] for i in indexes])


class Stream(IterableDataset[Tensor]):
    """A dataset that shuffles when it is begun, and gives each worker process its own samples."""

    def __init__(self, *, shuffles: bool = True) -> None:
        self.shuffles = shuffles

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        order = torch.randperm(NUM) if self.shuffles and worker is None else torch.arange(NUM)
        yield from order[worker.id :: worker.num_workers] if worker is not None else order


class Wholes(IterableDataset[Tensor]):
    """A dataset that yields whole batches."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(NUM).split(4)


def tokens() -> Any:
    return list(torch.arange(NUM))


def rows() -> Any:
    return [dict(ids=torch.tensor([i, i]), text=f"row {i}") for i in range(NUM)]


def unequal() -> Any:
    return [torch.arange(4), torch.arange(4, 9), torch.arange(9, 11)]


FORK: Any = dict(multiprocessing_context="fork")
LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(tokens(), batch_size=4),
    "a last batch left out": lambda: DataLoader(tokens(), batch_size=4, drop_last=True),
    "batches of one": lambda: DataLoader(tokens()),
    "shuffled": lambda: DataLoader(tokens(), batch_size=4, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(
        tokens(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(torch.initial_seed())
    ),
    "drawn with replacement": lambda: DataLoader(
        tokens(), batch_size=4, sampler=RandomSampler(tokens(), replacement=True, num_samples=9)
    ),
    "drawn by weight": lambda: DataLoader(
        tokens(), batch_size=5, sampler=WeightedRandomSampler([1.0] * NUM, NUM, replacement=False)
    ),
    "read by workers": lambda: DataLoader(tokens(), batch_size=4, shuffle=True, num_workers=2, **FORK),
    "read by workers that stay": lambda: DataLoader(
        tokens(), batch_size=3, shuffle=True, num_workers=1, persistent_workers=True, **FORK
    ),
    "a sampler that draws from torch": lambda: DataLoader(
        tokens(), batch_size=4, sampler=Own(lambda: torch.randperm(NUM).tolist())
    ),
    "a sampler that draws from numpy": lambda: DataLoader(
        tokens(), batch_size=4, sampler=Own(lambda: np.random.permutation(NUM).tolist())
    ),
    "a sampler that draws from random": lambda: DataLoader(
        tokens(), batch_size=4, sampler=Own(lambda: random.sample(range(NUM), NUM))
    ),
    "a sampler without an end": lambda: DataLoader(tokens(), batch_size=4, sampler=Endless()),
    "a sampler with a generator of its own": lambda: DataLoader(tokens(), batch_size=4, sampler=Private()),
    "a sampler with set_epoch": lambda: DataLoader(tokens(), batch_size=4, sampler=ByEpoch()),
    "a list of indexes": lambda: DataLoader(tokens(), batch_size=4, sampler=[3, 1, 4, 1, 5]),
    "a batch_sampler of odd batches": lambda: DataLoader(tokens(), batch_sampler=BatchSampler(range(6), 3, False)),
    "a batch_sampler of unequal batches": lambda: DataLoader(tokens(), batch_sampler=Buckets()),
    "rows of dicts": lambda: DataLoader(rows(), batch_size=4, shuffle=True),
    "a loader of a class of its own": lambda: Doubling(tokens(), batch_size=4, shuffle=True),
    "a loader that reads by itself": lambda: Fetching(tokens(), batch_size=4, shuffle=True),
    "a dataset that is iterated over": lambda: DataLoader(Stream(), batch_size=4),
    "a dataset that workers divide": lambda: DataLoader(Stream(), batch_size=2, num_workers=2, **FORK),
    "batch_size=None": lambda: DataLoader(unequal(), batch_size=None, shuffle=True),
    "batch_size=None of a stream": lambda: DataLoader(Wholes(), batch_size=None),
    "a list of batches": unequal,
}
BATCHES = 5  # of an epoch at most: one sampler has no end


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def values_of(batch: Any) -> list[int]:
    """Return the samples of a batch; each comes with the number in its text, where it has one."""
    if isinstance(batch, dict):
        ids = batch["ids"][:, 0].tolist()
        assert batch["text"] == [f"row {i}" for i in ids]
        return ids  # type: ignore[no-any-return]
    return batch.tolist()  # type: ignore[no-any-return]


def epochs_of(loader: Any, counts: Callable[[Any], bool]) -> list[list[list[int]]]:
    """Return the samples of each batch of two epochs, the first of which is number 3."""
    found = []
    for epoch in (3, 4):
        for part in (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
            if (function := getattr(part, "set_epoch", None)) is not None:
                function(epoch)
        batches = itertools.islice(loader, BATCHES)
        found.append([values_of(batch) if counts(batch) else [] for batch in batches])
    return found


def engine_on(rank: int, world_size: int, model: nn.Module, raw: Any = (), **given: Any) -> tuple[Any, ...]:
    use(make_context(parse(dict(raw), world_size=world_size, batches=False), Place(rank, world_size, rank, world_size)))
    return parallel.initialize(model, **given)


def divided_by(engine: Any, loader: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return divide_loader(loader, engine.data, engine._agreement, engine.context.shares)


def may_have_children() -> None:
    """Let this rank start workers of a DataLoader: a daemonic process, which a rank of the harness is, may not.

    What the workers share is in files: for descriptors they would need the temporary folder of the fork server.
    """
    torch.multiprocessing.set_sharing_strategy("file_system")
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def orders(rank: int, world_size: int) -> dict[str, Any]:
    """Return what this replica is given of every loader; each rank has seeds of its own."""
    may_have_children()
    engine, *_ = engine_on(rank, world_size, nn.Linear(1, 1))
    shares = current().shares
    found: dict[str, Any] = {}
    for kind, make in LOADERS.items():
        seed_all(100 + rank)
        loader = make()
        divided = divided_by(engine, loader)
        seed_all(100 + rank)
        found[kind] = epochs_of(divided, lambda batch: shares.counts(batch) is not False)
        found[kind].append([torch.initial_seed(), int(torch.randint(1000, ())), random.random(), np.random.rand()])
        assert not isinstance(loader, DataLoader) or isinstance(divided, type(loader))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_replicas_are_given_what_one_process_is_given_in_its_order(ranks: int) -> None:
    """The reference is torch's DataLoader alone, with rank 0's seeds. Its generators end in the same states."""
    parts = run(orders, ranks)
    for kind, make in LOADERS.items():
        seed_all(100)
        loader = make()
        seed_all(100)
        want = epochs_of(loader, lambda batch: True)
        drawn = [torch.initial_seed(), int(torch.randint(1000, ())), random.random(), np.random.rand()]
        for epoch in range(2):
            got = [list(itertools.chain(*batch)) for batch in zip(*(p[kind][epoch] for p in parts), strict=True)]
            assert got == want[epoch], kind
            sizes = [[len(part) for part in batch] for batch in zip(*(p[kind][epoch] for p in parts), strict=True)]
            assert all(max(size) - min(size) <= 1 for size in sizes), kind
        if ranks == 1 or kind not in ("a dataset that is iterated over",):
            assert parts[0][kind][2] == drawn, kind
