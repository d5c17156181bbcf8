"""The sum of one chunk's gradient over microbatches and ranks."""

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.errors import ModelError
from parallel.layout.layout import ParameterInfo
from parallel.mesh.collectives import Pending, all_reduce, start_all_reduce, start_reduce_scatter
from parallel.ops.products import Factor

NO_PARAMETERS: Mapping[nn.Parameter, int] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class FinishedSum:
    """The gradient of a chunk after a step's backwards: the sum over ranks, and for each parameter 1 if it got one."""

    total: Tensor
    seen: tuple[int, ...]


class ChunkSum:
    """Counts the gradients of one chunk as they arrive, and sums them over ranks in rounds.

    A round is what one collective sums: as many gradients as all microbatches of a step bring, or a single one of them.
    (Where the backwards of two microbatches overlap, a round may have gradients of both. The sum of all is the same,
    but for rounding: in ZeRO stages 2 and 3 plans with W in other places may differ in last bits.)

    `num_gradients`: how many gradients of one microbatch each parameter gets, by default one. `completed` is called
    when everything that a round waits for has arrived, and `on_launch` when its collective has been launched.
    `on_arrival`, if it is set, is called with each parameter whose gradient has arrived, and with the sum of the round
    so far.
    """

    def __init__(
        self,
        chunk: Chunk,
        *,
        completed: Callable[["ChunkSum"], None],
        on_launch: Callable[["ChunkSum"], None],
        num_gradients: Mapping[nn.Parameter, int] = NO_PARAMETERS,
    ) -> None:
        self.chunk, self.completed, self.on_launch = chunk, completed, on_launch
        self.num_gradients = sum(num_gradients.get(info.parameter, 1) for info in chunk.infos)  # of one microbatch
        self.seen = [0] * len(chunk.infos)  # for each parameter, 1 if a gradient has arrived since `begin`
        self.pending: Pending | None = None  # the collective of the last round, in flight
        self.was_launched = False  # in this step
        self.on_arrival: Callable[[ParameterInfo, Tensor], None] | None = None
        self.expect(0)
        for i, info in enumerate(chunk.infos):
            info.parameter.register_post_accumulate_grad_hook(partial(_arrive, weakref.ref(self), i))

    def begin(self, num_microbatches: int, in_round: int) -> None:
        """Drop everything that has arrived, and begin a step, in whose rounds are this number of microbatches."""
        self.expect(in_round)
        self.pending, self.was_launched = None, False
        self.seen = [0] * len(self.chunk.infos)
        self.chunk.drop_gradient()
        self.chunk.gradient.begin(num_microbatches)

    def expect(self, num_microbatches: int) -> None:
        """Set the number of microbatches of a round; with 0 nothing may arrive."""
        self.waits_for = num_microbatches * self.num_gradients
        self.missing: int | None = self.waits_for  # gradients of this round; None: any number may arrive

    def expect_in_this_round(self, num_microbatches: int | None) -> None:
        """Set the same for the current round alone; None: any number may arrive, and it is never complete."""
        self.missing = None if num_microbatches is None else num_microbatches * self.num_gradients

    @property
    def is_complete(self) -> bool:
        """True if everything has arrived that the current round waits for."""
        return self.missing == 0

    def take_product(self, i: int, a: Factor, b: Factor) -> None:
        """Take the gradient a[N, T] · b[T, K] of parameter i, a matrix [N, K]."""
        self.chunk.gradient.accumulator.add_factors(i, a, b)
        self._count(i)

    def take_summand(self, i: int, gradient: Tensor) -> None:
        """Take the gradient [N, K] of parameter i, a matrix [N, K] or several of them."""
        accumulator = self.chunk.gradient.accumulator
        accumulator.add(i, gradient.view_as(accumulator.views()[i]))
        self._count(i)

    def take_rows(self, i: int, keys: Tensor, dy: Tensor) -> None:
        """Take the gradient of parameter i, a table [R, H], as the summands dy[..., H] of rows keys[T]."""
        self.chunk.gradient.accumulator.add_rows(i, keys, dy)
        self._count(i)

    def room(self, i: int, dtypes: Collection[torch.dtype]) -> Tensor | None:
        """Return the place of parameter i for the first gradient of a step, which is about to arrive; None for others,
        and where the sum has none of these dtypes.

        A place in a later round is not given: gradients of microbatches before may still be about to arrive there.
        """
        return None if self.was_launched else self.chunk.gradient.accumulator.room(i, dtypes)

    def place_product(self, i: int, a: Tensor, b: Tensor) -> Tensor:
        """Return the product a[N, T] · b[T, K], a gradient of parameter i that is about to arrive, in its place."""
        return self.chunk.gradient.accumulator.place(i, a, b)

    def take(self, i: int, parameter: Tensor) -> None:
        """Take the gradient of parameter i out of `.grad`, where a backward has put it."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:  # a receiver takes it instead
            return
        if self.missing == 0:
            raise ModelError(
                f"{self.chunk.infos[i].name}: a gradient arrived that no engine.backward(loss) was waiting for. Call"
                " that, not loss.backward(), once for each forward; and if activations are recomputed, do it with"
                " use_reentrant=False. In a backward of another engine freeze this one's parameters, as with"
                " discriminator.requires_grad_(False), or train both models as parts of one module."
            )
        self.chunk.gradient.accumulator.add(i, gradient)
        self._count(i)

    def _count(self, i: int) -> None:
        self.seen[i] = 1
        if self.on_arrival is not None:
            self.on_arrival(self.chunk.infos[i], self.chunk.gradient.accumulator.views()[i])
        if self.missing is None:
            return
        self.missing -= 1
        if not self.missing:
            self.completed(self)

    def launch(self) -> None:
        """Launch the sum of a round over ranks."""
        spec, accumulator = self.chunk.spec, self.chunk.gradient.accumulator
        accumulator.fill_missing_with_zeros()
        self.collect()
        self.was_launched = True
        if spec.shard_axis.size > 1:
            self.pending = start_reduce_scatter(accumulator.take(), 0, spec.shard_axis, in_place=True)
        else:
            self.pending = start_all_reduce(accumulator.take(), spec.axes[0], in_place=True)
        self.missing = self.waits_for
        if spec.axes[0].size == 1:
            self.collect()  # nothing to wait for: an offloaded gradient is copied to the host at once
        self.on_launch(self)

    def collect(self) -> None:
        """Wait for the round in flight, and add it to those before it."""
        if self.pending is not None:
            arrived, self.pending = self.pending.wait(), None
            gradient = self.chunk.gradient
            self.chunk.store_gradient(arrived if gradient.total is None else gradient.on_device().add_(arrived))

    def launch_rest(self) -> None:
        """Launch the sum of a round that has begun; or of zeros, if no gradient has arrived in this step."""
        if self.chunk.gradient.accumulator.buffer is not None or not self.was_launched:
            self.launch()

    def wait(self) -> None:
        """Wait until the chunk's gradient is the sum over all axes: [n], or this rank's slice [n_shard].

        The collective that was launched sums over the first axis. Where the chunk has a second one (the tied embedding
        is summed over the two ends of the pipeline), the sum over it is an all-reduce in this call.
        """
        self.collect()
        if further := self.chunk.spec.axes[1:]:
            whole = self.chunk.gradient.on_device()
            for axis in further:
                all_reduce(whole, axis, in_place=True)
            self.chunk.store_gradient(whole)

    def finished(self) -> FinishedSum:
        """Return the result, after `wait`."""
        total = self.chunk.gradient.total
        assert total is not None
        return FinishedSum(total, tuple(self.seen))

    def restore(self, result: FinishedSum) -> None:
        """Be, after `begin`, as after everything that has led to this result, whose total has been computed anew."""
        self.seen, self.was_launched = list(result.seen), True
        self.chunk.store_gradient(result.total)


def _arrive(total: "weakref.ref[ChunkSum]", i: int, parameter: Tensor) -> None:
    """Call `take`. This is a hook, which the garbage collector cannot see: what it referred to would never be freed."""
    if (found := total()) is not None:
        found.take(i, parameter)
