"""Iterators of this replica's parts of batches, around those of torch's DataLoader."""

import pickle
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from parallel.engine.agreed_batches import AgreedBatches
from parallel.engine.batch_parts import Part
from parallel.engine.generators import Generators, States
from parallel.errors import DataError, ModelError
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import broadcast_bytes
from parallel.modules.shares import Replica, Share


class Receiver(Protocol):
    """An iteration over a loader, to which each part is handed on."""

    source_state: Callable[[], dict[str, Any] | None]

    def take(self, share: Share) -> None:
        """Note the share of the next batch."""


class Divided(Protocol):
    """The division of a loader, as these iterators need it."""

    replica: Replica
    agreement: Agreement
    generators: Generators
    sampler: AgreedBatches | None

    @property
    def receiver(self) -> Receiver | None:
        """The iteration that is taking a batch."""


class PartIterator:
    """Hands on the parts that torch's iterator yields, each with its share; has all other attributes of that one."""

    def __init__(self, make: Callable[[], Any], division: Divided) -> None:
        self._division = division
        self._iterator: Any = None
        self._begin(make)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch, share = self._next()
        assert self._division.receiver is not None
        self._division.receiver.take(share)
        return batch

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_iterator"], name)

    def _reset(self, loader: Any) -> None:
        """Begin once more with the same workers, as torch's iterator does."""

        def again() -> Any:
            self._iterator._reset(loader)
            return self._iterator

        self._begin(again)

    def _begin(self, make: Callable[[], Any]) -> None:
        raise NotImplementedError

    def _next(self) -> tuple[Any, Share]:
        raise NotImplementedError

    def _unpacked(self, part: Part) -> tuple[Any, Share]:
        return part.batch, Share.of(part.total, self._division.replica)


class IndexedParts(PartIterator):
    """The parts of batches whose samples are read by index: each replica reads its own."""

    def _begin(self, make: Callable[[], Any]) -> None:
        self._iterator = make()
        division = self._division
        assert division.sampler is not None
        assert division.receiver is not None
        self._taken = division.sampler.latest
        division.receiver.source_state = self._taken.reading.state

    def _next(self) -> tuple[Any, Share]:
        batch = next(self._iterator)
        if not isinstance(batch, Part):
            return batch, self._taken.shares.popleft()
        if batch.problem:  # every rank has read the same item
            raise DataError(batch.problem)
        return self._unpacked(batch)


class StreamRead:
    """The number and the digest of the batches that were read of a stream, since it was begun in these states."""

    def __init__(self, at_start: States) -> None:
        self._at_start, self.count, self._digest = at_start, 0, 0

    def add(self, digest: int) -> None:
        """Note that another batch was read."""
        self.count, self._digest = self.count + 1, zlib.crc32(digest.to_bytes(4, "big"), self._digest)

    def state(self) -> States:
        """Return what another reading needs to be the same, and to know that it is the same."""
        return dict(at_start=self._at_start, read=self.count, digest=self._digest)


class StreamParts(PartIterator):
    """The parts of batches of which every replica reads all samples.

    Ranks compare what they have read: where it differs, samples would come twice or never. A dataset that shuffles when
    it is begun draws from rank 0's generators.
    """

    def _begin(self, make: Callable[[], Any]) -> None:
        generators, agreement = self._division.generators, self._division.agreement
        agreement.agree_on("the start of a dataset")
        states: States = pickle.loads(broadcast_bytes(pickle.dumps(generators.states()), agreement.axis))
        self._borrowed = None if states == generators.states() else states
        with generators.borrowed(self._borrowed):
            self._iterator = make()
            self._borrowed = self._borrowed and generators.states()
        self._read = StreamRead(states)
        assert self._division.receiver is not None
        self._division.receiver.source_state = self._read.state

    def _next(self) -> tuple[Any, Share]:
        part, problem = None, ""
        try:
            with self._division.generators.borrowed(self._borrowed):
                part = next(self._iterator, None)
        except Exception as error:
            if self._division.agreement.axis.size == 1:
                raise
            problem = f"dataloader: its dataset raised {type(error).__name__}: {error}"
        self._borrowed = None
        if part is None:
            self._agree("the end of a dataset", problem)
            raise StopIteration
        self._agree(f"batch {self._read.count} ({part.total} samples, digest {part.digest:08x})", part.problem)
        self._read.add(part.digest)
        return self._unpacked(part)

    def _agree(self, action: str, problem: str) -> None:
        try:
            self._division.agreement.agree_on(action, problem, DataError)
        except ModelError as error:
            raise DataError(
                "dataloader: every rank must read the same samples in the same order, of which it keeps its own, but"
                f" {error} Have the dataset yield the same on every rank: the same seed, and no division by rank. A"
                " loader that divides its samples itself is not passed to initialize."
            ) from error
