"""The index batches that rank 0's sampler draws, on every rank."""

import pickle
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from parallel.engine.division_by_rank import refuse_division_by_rank
from parallel.engine.generators import Generators
from parallel.errors import CheckpointError, DataError
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import broadcast_bytes
from parallel.modules.shares import Replica, Share

INDEXES_AT_ONCE = 1 << 20  # of samples that are read ahead, where a sampler has a length


class AgreedBatches(Sampler[Any]):
    """Yields what rank 0's sampler draws: of batches of indexes, this replica's part.

    Every rank iterates over its own sampler, so that epochs, counters and random generators go on in the same way; the
    draw of rank 0 is used. One that has a length is read an epoch at a time, so a rank may leave the iteration early;
    any other is read one batch at a time. All other attributes (`set_epoch`, `batch_size`, `sampler`) are those of the
    sampler.

    `replica`: None where what is drawn are not batches of indexes, but each index stands for a whole batch.
    """

    def __init__(
        self, batches: Iterable[Any], agreement: Agreement, generators: Generators, replica: Replica | None
    ) -> None:
        self.__dict__.update(_batches=batches, _agreement=agreement, _generators=generators, _replica=replica)
        self.__dict__.update(_resumed=None, latest=None)

    def __iter__(self) -> Iterator[Any]:
        reading = Reading(self._batches, self._agreement, self._generators, self._resumed)
        self.__dict__["latest"] = Parts(reading, self._replica)
        return iter(self.latest)

    def __len__(self) -> int:
        assert isinstance(self._batches, Sized)
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy that is being made has no attributes yet
            raise AttributeError(name)
        return getattr(self._batches, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._batches, name, value)

    def forget(self) -> None:
        """Forget the latest iteration."""
        self.__dict__["latest"] = None

    @contextmanager
    def resuming(self, state: Mapping[str, Any], *, skip: int) -> Iterator[None]:
        """Have iterations that begin in the block draw what was drawn when `state` was saved.

        The first `skip` batches of it are left out. (With workers, torch's iterator begins twice.)
        """
        self.__dict__["_resumed"] = dict(state) | dict(skip=skip)
        try:
            yield
        finally:
            self.__dict__["_resumed"] = None


class Reading:
    """One iteration over a sampler: what has been read of rank 0's, and the generators' states from which it was."""

    def __init__(
        self, batches: Iterable[Any], agreement: Agreement, generators: Generators, resumed: Mapping[str, Any] | None
    ) -> None:
        self._agreement, self._generators, self._resumed = agreement, generators, resumed
        self._states: dict[str, Any] = dict(at_start=resumed["at_start"] if resumed else generators.states())
        self._problem = ""
        self._source: Iterator[Any] = iter(())
        with generators.borrowed(resumed and resumed["at_start"]), self._noting_problem():
            self._source = iter(batches)
        self._most = _length(batches) + 1  # so that its end is read, too, where it has a length
        self._block: deque[Any] = deque()
        self._is_complete = False
        self._num_read = self._digest = 0

    def state(self) -> dict[str, Any]:
        """Return what another reading needs to draw the same, and to know that it is the same."""
        return self._states | dict(read=self._num_read, digest=self._digest)

    def __next__(self) -> Any:
        if "at_first" not in self._states:
            self._read_first()
        while not self._block:
            if self._is_complete:
                raise StopIteration
            self._read()
        return self._block.popleft()

    def _read_first(self) -> None:
        """Read a first block or, resumed, all that was read before."""
        resumed = self._resumed or {}
        again = resumed.get("at_first")
        self._states["at_first"] = again or self._generators.states()
        with self._generators.borrowed(again):
            self._read()
            while self._num_read < resumed.get("read", 0) and not self._is_complete:
                self._read()
        if again and (self._num_read, self._digest) != (resumed["read"], resumed["digest"]):
            raise CheckpointError(
                "dataloader: its sampler does not draw what it drew before the state was saved. Resume with the same"
                " samples, and the same batch size. A sampler that has a state of its own must follow from set_epoch"
                " and random generators."
            )
        for _ in range(resumed.get("skip", 0) if again else 0):
            self._block.popleft()

    def _read(self) -> None:
        """Read the next block on every rank, and put rank 0's at the end of what is to be used."""
        drawn: list[Any] = []
        packed = b""
        with self._noting_problem():
            wanted, count = self._most, 0
            for batch in self._source:
                drawn.append(batch)
                count += len(batch) if isinstance(batch, Sized) else 1
                if len(drawn) == wanted or count >= INDEXES_AT_ONCE:
                    break
            else:
                wanted = 0
            packed = pickle.dumps((drawn, not wanted))
        self._agreement.agree_on("the batches of a dataloader", self._problem, DataError)
        own = drawn
        drawn, self._is_complete = pickle.loads(broadcast_bytes(packed, self._agreement.axis))
        if self._is_complete and not self._num_read and self._agreement.axis.size > 1:
            refuse_division_by_rank(own, drawn, self._agreement)
        self._block.extend(drawn)
        self._num_read += len(drawn)
        for batch in drawn:
            self._digest = zlib.crc32(repr(batch).encode(), self._digest)

    @contextmanager
    def _noting_problem(self) -> Iterator[None]:
        """Keep an error of the sampler, so that every rank can raise it; a single rank raises it as it is."""
        try:
            yield
        except Exception as error:
            if self._agreement.axis.size == 1:
                raise
            self._problem = f"dataloader: its sampler raised {type(error).__name__}: {error}"


class Parts:
    """This replica's part of each batch of a reading; `shares` are those of the parts that were taken, in order."""

    def __init__(self, reading: Reading, replica: Replica | None) -> None:
        self.reading, self._replica = reading, replica
        self.shares: deque[Share] = deque()
        self.is_even = True  # whether every replica has had the same number of samples of each batch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.reading)
        if self._replica is None:
            return batch
        indexes = batch if isinstance(batch, Sequence | Tensor | np.ndarray) else list(batch)
        share = Share.of(len(indexes), self._replica)
        self.shares.append(share)
        self.is_even &= share.weight == 1.0
        return batch if self._replica.size == 1 else indexes[share.rows]


def _length(batches: Iterable[Any]) -> int:
    """Return the length of a sampler, or 0 where it has none."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, AttributeError):
        return 0
