"""Gradients, from the backward that computes them to the sum over ranks that an update reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.layout.layout import ParameterInfo
from parallel.ops.deferred import DeferredCalls
from parallel.ops.receiver import GradientReceiver
from parallel.optim.chunk_sum import NO_PARAMETERS, ChunkSum, FinishedSum
from parallel.tensor.compiled import handle_of

ROUNDS_IN_FLIGHT = 2  # the oldest is waited for when there are more


class Gradients:
    """Sums each gradient over microbatches as it arrives, and each chunk over ranks as soon as it is complete.

    A chunk is complete when each of its parameters has arrived for every microbatch: during the last backward. Its
    sum over the chunk's first axis is in flight while that backward continues with earlier layers, as with the buckets
    of DistributedDataParallel (Li et al. 2020, "PyTorch Distributed", section 3.2). Where the update is divided over
    that axis, the sum is a reduce-scatter: each rank receives only its slice (ZeRO stage 1; Rajbhandari et al. 2020,
    arXiv 1910.02054, section 5.1). `scatters_each`: each microbatch is summed over ranks by itself, so that no rank
    keeps a whole gradient between two of them (stage 2, section 5.2). `num_gradients`: how many gradients a parameter
    gets of one microbatch, if not one: as many as there are layers with it on this rank.

    Buffers are allocated when gradients arrive: during a forward, in which activations accumulate, there are none but
    that of the head's table, whose gradient is computed in the head's forward. A buffer that is being scattered stays
    whole until it is waited for, and the host may be a whole backward ahead of its GPU: therefore only
    `ROUNDS_IN_FLIGHT` are in flight.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        *,
        scatters_each: bool = False,
        num_gradients: Mapping[nn.Parameter, int] = NO_PARAMETERS,
    ) -> None:
        self._in_flight: list[ChunkSum] = []  # reduce-scatters, the oldest first
        self._is_in_order = True  # the forwards of the running step, and their gradients
        self._sums = [
            ChunkSum(chunk, completed=self._completed, on_launch=self._on_launch, num_gradients=num_gradients)
            for chunk in chunks
        ]
        self._scatters_each = scatters_each
        self.deferred = DeferredCalls()  # the computation of weight gradients
        self._sum_of = {info.parameter: (total, i) for total in self._sums for i, info in enumerate(total.chunk.infos)}

    def begin(self, num_microbatches: int, *, is_in_order: bool = True) -> None:
        """Begin a step: each gradient will arrive for this number of microbatches, or never.

        `is_in_order`: the first gradient to arrive is that of the first forward, for which a receiver has room.
        """
        self._is_in_order = is_in_order
        self._in_flight.clear()
        self.deferred.clear()
        for total in self._sums:
            is_scattered = self._scatters_each and total.chunk.spec.shard_axis.size > 1
            total.begin(num_microbatches, in_round=1 if is_scattered else num_microbatches)

    @contextmanager
    def watching(self, on_arrival: Callable[[ParameterInfo, Tensor], None]) -> Iterator[None]:
        """Call `on_arrival` in the block with each gradient that arrives, before it is summed over ranks."""
        for total in self._sums:
            total.on_arrival = on_arrival
        try:
            yield
        finally:
            for total in self._sums:
                total.on_arrival = None

    def receiver(self, matrix: nn.Parameter, *, in_compiled_code: bool = False) -> GradientReceiver:
        """Return the receiver of the gradients of matrix[N, K], which adds each of them to the sum.

        `in_compiled_code`: whether compiled code may compute them, all at once.
        """
        total, i = self._sum_of[matrix]
        handle = handle_of(partial(total.place_product, i), matrix.device) if in_compiled_code else None
        return GradientReceiver(
            self.deferred,
            partial(total.take_product, i),
            partial(total.take_summand, i),
            handle,
            add_rows=partial(total.take_rows, i),
            room=lambda dtypes: total.room(i, dtypes) if self._is_in_order else None,
        )

    def finish(self) -> None:
        """Wait until the gradient of every chunk is the sum over all ranks: whole, or this rank's slice."""
        for total in self._sums:
            total.launch_rest()
        for total in self._sums:
            total.wait()

    @property
    def are_watched(self) -> bool:
        """True inside `watching`."""
        return any(total.on_arrival is not None for total in self._sums)

    def finished(self) -> list[FinishedSum]:
        """Return the results of a step, after `finish`."""
        return [total.finished() for total in self._sums]

    def restore(self, num_microbatches: int, results: Sequence[FinishedSum]) -> None:
        """Be as after a step of this number of microbatches with these results, which a device has computed without
        any call of this object: in the memory that they had.
        """
        self.begin(num_microbatches)
        for total, result in zip(self._sums, results, strict=True):
            total.restore(result)

    def _completed(self, total: ChunkSum) -> None:
        """Launch the sum of a round when everything that it waits for has arrived."""
        total.launch()

    def _on_launch(self, total: ChunkSum) -> None:
        """Limit the number of reduce-scatters in flight, when one has been launched."""
        if total.chunk.spec.shard_axis.size > 1:
            self._in_flight.append(total)
        while len(self._in_flight) > ROUNDS_IN_FLIGHT:
            self._in_flight.pop(0).collect()


class ModuleGradients(Gradients):
    """The same for a module of which nothing is known: a parameter may have no part in a backward, on some ranks or on
    all, and the user decides how many backwards a step has.

    Therefore every rank launches the sums of its chunks in the same order, each once in a backward: a chunk that is
    complete before the backward ends, as soon as all before it have been launched, and the rest at the end. Buckets of
    DistributedDataParallel are launched in the same way.
    """

    def __init__(self, chunks: Sequence[Chunk], *, scatters_each: bool = False) -> None:
        super().__init__(chunks[::-1], scatters_each=scatters_each)  # about the order of a backward
        self._next = 0  # index of the next sum to launch
        self._unsynchronized = False  # whether gradients have arrived that are not summed over ranks
        self.has_any = False  # whether there has been a backward since `begin`
        self.begin()

    def begin(self, num_microbatches: int = 2, *, is_in_order: bool = True) -> None:
        """Drop everything that has arrived, and begin a step."""
        super().begin(num_microbatches, is_in_order=is_in_order)
        self._unsynchronized = self.has_any = False
        for total in self._sums:
            total.expect(0)

    @contextmanager
    def backward(self, *, synchronizes: bool) -> Iterator[None]:
        """Enter this context for a backward. With `synchronizes` its gradients are summed over ranks, together with
        those of earlier backwards that were not; without it they stay on this rank, unless no rank may keep a whole
        gradient.
        """
        synchronizes = synchronizes or self._scatters_each
        for total in self._sums:
            total.expect_in_this_round(1 if synchronizes else None)
        self._next, self._unsynchronized, self.has_any = 0, True, True
        yield
        if synchronizes:
            self._launch_all()

    def finish(self) -> None:
        """Sum over ranks what is not summed yet, and wait for everything."""
        if self._unsynchronized:
            self._next = 0
            self._launch_all()
        super().finish()

    def arrived(self) -> Tensor:
        """Return an int64 for each parameter, in the order of the chunks: 1 if it has had a gradient since `begin`."""
        return torch.tensor([flag for total in reversed(self._sums) for flag in total.seen], dtype=torch.int64)

    def _completed(self, total: ChunkSum) -> None:
        """Launch all sums that are next in the order and complete."""
        while self._next < len(self._sums) and self._sums[self._next].is_complete:
            self._sums[self._next].launch()
            self._next += 1

    def _launch_all(self) -> None:
        """Launch the sums that have not been launched in this backward."""
        for total in self._sums[self._next :]:
            total.launch()
        self._next, self._unsynchronized = len(self._sums), False
