"""The progress of a divided loader: what it has handed out, and where it goes on after a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch.utils.data import DataLoader

from parallel.engine.agreed_batches import AgreedBatches
from parallel.engine.generators import Generators, States
from parallel.engine.part_iterators import IndexedParts, StreamParts
from parallel.errors import CheckpointError
from parallel.mesh.agreement import Agreement
from parallel.modules.shares import Replica, Share, Shares

KEYS = {"epoch", "batches", "set_epoch", "generators", "source"}
"""The keys of a loader's state: how many iterations were begun before the one in progress, how many batches of that
one were handed out, the last argument of set_epoch, the states of random generators, and the state of what batches are
read from (None between two iterations)."""


class Progress:
    """The progress of an iteration over a loader: what torch's iterator has yielded, and what the user was handed."""

    def __init__(self) -> None:
        self.num_taken = self.num_handed = 0
        self.source_state: Callable[[], States | None] = lambda: None  # set by the iterator of parts
        self._last: Share | None = None
        self._is_even = True

    def take(self, share: Share) -> None:
        """Note the share of a batch that torch's iterator hands out, perhaps to a loop around it."""
        self.num_taken += 1
        self._last = share
        self._is_even &= share.weight == 1.0

    def share(self, replica: Replica, *, is_even: bool) -> Share | None:
        """Return the share of the batch that was handed out last; None where others were taken, too, and it may differ.

        A loader of a class of its own may read ahead, or make other batches of these. `is_even`: whether all batches
        were even of which indexes have been drawn.
        """
        if self._is_even and is_even:
            return Share(0, 1, replica.size, replica.size)
        return self._last if self.num_taken == self.num_handed else None


class Division:
    """The division of one loader's batches over replicas. `reads_all`: every replica reads all samples of all batches.

    `sampler` is what the loader's indexes are drawn by; None where every replica reads all samples.
    """

    def __init__(
        self, loader: Any, replica: Replica, agreement: Agreement, shares: Shares, *, reads_all: bool = False
    ) -> None:
        self.replica, self.agreement, self.shares = replica, agreement, shares
        found = [getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        nested = [getattr(found[0], "sampler", None)]
        self._owners = list({id(x): x for x in (*found, *nested, loader) if x is not None}.values())
        self.generators = Generators([loader, *([getattr(loader, "dataset", None)] if reads_all else [])])
        self.sampler: AgreedBatches | None = None
        # Only where nothing comes between the indexes and the batches, the former can be left out when resumed.
        self._skips_indexes = not reads_all and type(loader).__iter__ is DataLoader.__iter__
        self.current: Progress | None = None  # of the iteration that was begun last, until it ends
        self.receiver: Progress | None = None  # of the iteration that is taking a batch
        self._num_epochs = 0
        self._last_set_epoch: int | None = None
        self._resumed: dict[str, Any] | None = None

    def iterate(self, make: Callable[[], Iterator[Any]]) -> "Epoch":
        """Begin an iteration over the batches of the iterator that `make` returns."""
        self._num_epochs += self.current is not None
        resumed, self._resumed = self._resumed, None
        self.current = self.receiver = Progress()
        if self.sampler is not None:
            self.sampler.forget()
        if resumed is None or resumed["source"] is None:
            return Epoch(self, self.current, iter(make()))
        return Epoch(self, self.current, self._resume(make, int(resumed["batches"]), resumed["source"]))

    def _resume(self, make: Callable[[], Iterator[Any]], before: int, source: States) -> Iterator[Any]:
        """Return an iterator of the batches that come after the first `before`."""
        assert self.current is not None
        skip = before if self._skips_indexes else 0
        self.current.num_handed = self.current.num_taken = skip
        # What is drawn here was drawn before the state was saved: afterwards the generators go on from there.
        states = source["at_start"] if self.sampler is None else self.generators.states()
        resuming = nullcontext() if self.sampler is None else self.sampler.resuming(source, skip=skip)
        with self.generators.borrowed(states), resuming:
            batches = iter(make())
            for _ in range(before - skip):
                next(batches, None)
        self.current.num_handed = before
        again = self.current.source_state() or {}
        if self.sampler is None and any(again.get(key) != source[key] for key in ("read", "digest")):
            raise CheckpointError(
                f"dataloader: its dataset does not yield what it yielded before the state was saved: after"
                f" {again.get('read')} batches their digest is {again.get('digest')}, it was {source['digest']} after"
                f" {source['read']}. Resume with the same samples in the same order, and the same batch size."
            )
        return batches

    def parts(self, make: Callable[[], Any]) -> Any:
        """Return an iterator of this replica's parts, by the iterator of torch's that `make` returns."""
        return StreamParts(make, self) if self.sampler is None else IndexedParts(make, self)

    def end(self, progress: Progress) -> None:
        """Note that an iteration has ended."""
        if progress is self.current:
            self._num_epochs, self.current = self._num_epochs + 1, None

    def set_epoch(self, epoch: int) -> None:
        """Do what `ReplicaLoader.set_epoch` says."""
        self._last_set_epoch = epoch
        for owner in self._owners:
            if (function := getattr(owner, "set_epoch", None)) is not None:
                function(epoch)

    def state(self) -> dict[str, Any]:
        """Do what `ReplicaLoader.state_dict` says."""
        if self._resumed is not None:
            return dict(self._resumed)
        current = self.current
        source = current.source_state() if current is not None else None
        if source is None and current is not None and self.sampler is not None and self.sampler.latest is not None:
            source = self.sampler.latest.reading.state()  # the loader reads its dataset without torch's iterator
        return dict(
            epoch=self._num_epochs,
            batches=current.num_handed if current is not None and source is not None else 0,
            set_epoch=self._last_set_epoch,
            generators=self.generators.states(),
            source=source,
        )

    def load(self, state: Any) -> None:
        """Do what `ReplicaLoader.load_state_dict` says."""
        keys = set(state) if isinstance(state, Mapping) else set()
        has = ", ".join(sorted(map(str, keys))) or type(state).__name__
        problem = "" if keys >= KEYS else f"dataloader: this is no state_dict of one, but {has}."
        self.agreement.agree_on("load_state_dict of a dataloader", problem, CheckpointError)
        self._resumed, self.current, self._num_epochs = dict(state), None, int(state["epoch"])
        if state["set_epoch"] is not None:
            self.set_epoch(int(state["set_epoch"]))
        self.generators.set_states(state["generators"], own_only=self.agreement.axis.rank > 0)


class Epoch:
    """One iteration over a divided loader. It holds torch's iterator, whose workers end when a loop leaves it."""

    def __init__(self, division: Division, progress: Progress, batches: Iterator[Any]) -> None:
        self._division, self._progress, self._batches = division, progress, batches
        self._handed_out = division.shares.begin(division)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        division, progress = self._division, self._progress
        division.receiver = progress
        try:
            batch = next(self._batches)
        except StopIteration:
            self._batches = iter(())
            self._handed_out.end()
            division.end(progress)
            raise
        progress.num_handed += 1
        if division.replica.size > 1:
            sampler = division.sampler
            is_even = sampler is None or sampler.latest is None or sampler.latest.is_even
            self._handed_out.hand_out(batch, progress.share(division.replica, is_even=is_even))
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]
