"""Gradients, from the backward that makes them to the sum over ranks that an update takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.ops.deferred import DeferredCalls
from parallel.optim.chunk_sum import ChunkSum

ROUNDS_IN_FLIGHT = 2  # before the eldest is waited for


class Gradients:
    """Sums each gradient over microbatches as it arrives, and each chunk over ranks as soon as it is complete.

    A chunk is complete when each of its parameters has arrived once for every microbatch: during the last backward. Its
    sum over the chunk's first axis travels while that backward goes on to earlier layers (Li et al. 2020, "PyTorch
    Distributed", section 3.2). Where the update is divided over that axis, each rank receives its slice of the sum
    alone (ZeRO stage 1; Rajbhandari et al. 2020, arXiv 1910.02054, section 5.1). `scatters_each`: microbatches are
    summed over ranks one by one, so that no rank keeps a whole gradient between them (stage 2, section 5.2).

    Buffers are made as gradients arrive: while activations pile up there are none. What is being scattered stays whole
    until it is waited for, and a host may be a whole backward ahead of its GPU: so no more than a few are on their way.
    """

    def __init__(self, chunks: Sequence[Chunk], *, scatters_each: bool = False) -> None:
        self._in_flight: list[ChunkSum] = []  # being scattered, the eldest first
        self._sums = [ChunkSum(chunk, self._completed, self._launched) for chunk in chunks]
        self._scatters_each = scatters_each
        self.deferred = DeferredCalls()  # products
        self._places = {info.parameter: (total, i) for total in self._sums for i, info in enumerate(total.chunk.infos)}

    def begin(self, num_microbatches: int) -> None:
        """Start a step: each gradient will arrive so many times, or never."""
        self._in_flight.clear()
        self.deferred.forget()
        for total in self._sums:
            is_scattered = self._scatters_each and total.chunk.spec.shard.size > 1
            total.begin(num_microbatches, arrivals=1 if is_scattered else num_microbatches)

    def receiver(self, matrix: nn.Parameter) -> Callable[[Tensor, Tensor], None]:
        """Takes two factors, [N, T] and [T, K], whose product then arrives as the gradient of matrix[N, K]: the matmul
        itself adds it to the sum, where autograd would leave a matrix to be copied.
        """
        total, i = self._places[matrix]
        return partial(self.deferred.call, total.take_product, i)

    def finish(self) -> None:
        """Wait until every chunk's `gradient` is the sum over all ranks: whole, or this rank's slice."""
        for total in self._sums:
            total.post_rest()
        for total in self._sums:
            total.wait()

    def _completed(self, total: ChunkSum) -> None:
        """Called when all that a round waits for has arrived."""
        total.post()

    def _launched(self, total: ChunkSum) -> None:
        """Called when a round's sum over ranks has started."""
        if total.chunk.spec.shard.size > 1:
            self._in_flight.append(total)
        while len(self._in_flight) > ROUNDS_IN_FLIGHT:
            self._in_flight.pop(0).collect()


class ModuleGradients(Gradients):
    """The same for a module of which nothing is known: a parameter may have no part in a backward, on some ranks or on
    all, and how many backwards a step has is the user's affair.

    So chunks set out in one order on every rank, each once for a backward: those that are complete before it ends,
    unless an earlier one is not, and at its end the rest (as DistributedDataParallel's buckets do).
    """

    def __init__(self, chunks: Sequence[Chunk], *, scatters_each: bool = False) -> None:
        super().__init__(chunks[::-1], scatters_each=scatters_each)  # about the order in which a backward meets them
        self._next = 0  # to set out
        self._unsynchronized = False
        self.begin()

    def begin(self, num_microbatches: int = 2) -> None:
        """Forget all that has arrived."""
        super().begin(num_microbatches)
        self._unsynchronized = False
        for total in self._sums:
            total.expect(0)

    @contextmanager
    def backward(self, *, synchronizes: bool) -> Iterator[None]:
        """Around a backward. Without `synchronizes` its gradients wait on this rank for a later one that does, unless
        no rank may keep a whole gradient: then each is summed over ranks.
        """
        synchronizes = synchronizes or self._scatters_each
        for total in self._sums:
            total.expect_in_this_round(1 if synchronizes else None)
        self._next, self._unsynchronized = 0, True
        yield
        if synchronizes:
            self._post_all()

    def finish(self) -> None:
        if self._unsynchronized:
            self._next = 0
            self._post_all()
        super().finish()

    def arrived(self) -> Tensor:
        """For each parameter, in the order of the chunks, whether it has had a gradient since `begin`: int64 0 or 1."""
        return torch.tensor([flag for total in reversed(self._sums) for flag in total.seen], dtype=torch.int64)

    def _completed(self, total: ChunkSum) -> None:
        while self._next < len(self._sums) and self._sums[self._next].is_complete:
            self._sums[self._next].post()
            self._next += 1

    def _post_all(self) -> None:
        for total in self._sums[self._next :]:
            total.post()
        self._next, self._unsynchronized = len(self._sums), False
