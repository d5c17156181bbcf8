"""How far a divided loader has handed out its batches, and how it goes on after a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from parallel.engine.agreed_batches import AgreedBatches
from parallel.engine.generators import Generators
from parallel.engine.part_iterators import IndexedParts, StreamParts
from parallel.errors import CheckpointError
from parallel.mesh.agreement import Agreement
from parallel.modules.shares import Replica, Share, Shares

KEYS = {"epoch", "batches", "set_epoch", "generators", "source"}
"""What is in the state of a loader: how many iterations were begun before the one in progress, how many batches of that
one were handed out, the last argument of set_epoch, the states of random generators, and the state of what batches are
read from (None between two iterations)."""


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
        self.current: Epoch | None = None  # the iteration that was begun last, while it is in progress
        self.receiver: Epoch | None = None  # the iteration that is taking a batch
        self._num_epochs = 0
        self._last_set_epoch: int | None = None
        self._resumed: dict[str, Any] | None = None

    def iterate(self, make: Callable[[], Iterator[Any]]) -> "Epoch":
        """Begin an iteration over the batches of the iterator that `make` returns."""
        self._num_epochs += self.current is not None
        resumed, self._resumed = self._resumed, None
        self.current = Epoch(self)
        self.current.begin(make, resumed, skips_indexes=self._skips_indexes)
        return self.current

    def parts(self, make: Callable[[], Any]) -> Any:
        """Return an iterator of this replica's parts, by the iterator of torch's that `make` returns."""
        return StreamParts(make, self) if self.sampler is None else IndexedParts(make, self)

    def end(self, epoch: "Epoch") -> None:
        """Note that an iteration has ended."""
        if epoch is self.current:
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
    """One iteration over a divided loader, which counts what it hands out, not what is read ahead."""

    def __init__(self, division: Division) -> None:
        self._division = division
        self._handed_out = division.shares.begin(division)
        self._batches: Iterator[Any] = iter(())
        self.source_state: Callable[[], dict[str, Any] | None] = lambda: None  # set by the iterator of parts
        self.num_handed = self._num_taken = 0
        self._is_even = True
        self._last: Share | None = None

    def begin(
        self, make: Callable[[], Iterator[Any]], resumed: Mapping[str, Any] | None, *, skips_indexes: bool
    ) -> None:
        """Make the iterator, and leave out the batches that were handed out before."""
        division, source = self._division, resumed and resumed["source"]
        division.receiver = self
        if not resumed or not source:
            self._batches = iter(make())
            return
        num_before = int(resumed["batches"])
        if skips_indexes:
            assert division.sampler is not None
            division.sampler.resume(source, skip=num_before)
            self.num_handed = self._num_taken = num_before
            self._batches = iter(make())
            return
        if division.sampler is not None:
            division.sampler.resume(source, skip=0)
        with division.generators.borrowed(source["at_start"] if division.sampler is None else None):
            self._batches = iter(make())
            for _ in range(num_before):
                next(self._batches, None)
        self.num_handed = num_before
        if division.sampler is None and (again := self.source_state() or {}) | dict(at_start=0) != source | dict(
            at_start=0
        ):
            raise CheckpointError(
                f"dataloader: its dataset does not yield what it yielded before the state was saved: after"
                f" {again.get('read')} batches their digest is {again.get('digest')}, it was {source['digest']}."
                " Resume with the same samples in the same order, and the same batch size."
            )

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._division.receiver = self
        try:
            batch = next(self._batches)
        except StopIteration:
            self._handed_out.end()
            self._division.end(self)
            raise
        self.num_handed += 1
        if self._division.replica.size > 1:
            self._handed_out.hand_out(batch, self._share())
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def take(self, share: Share) -> None:
        """Note the share of a batch that torch's iterator hands out, perhaps to a loop around it."""
        self._num_taken += 1
        self._last = share
        self._is_even &= share.weight == 1.0

    def _share(self) -> Share | None:
        """Return the share of the batch that was handed out last; None where others were taken, too, and it may differ.

        A loader of a class of its own may read ahead, or make other batches of these.
        """
        sampler = self._division.sampler
        if self._is_even and (sampler is None or sampler.latest is None or sampler.latest.is_even):
            return Share(0, 1, self._division.replica.size, self._division.replica.size)
        return self._last if self._num_taken == self.num_handed else None
