"""Gradients, from the backward that makes them to the sum over ranks that an update takes."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.precision import gradient_dtype
from parallel.errors import ModelError
from parallel.mesh.collectives import Pending, all_reduce, start_all_reduce, start_reduce_scatter
from parallel.ops.deferred import DeferredCalls
from parallel.ops.products import add_product, write_product
from parallel.optim.grad_norm import sum_of_squares
from parallel.storage.transfer import Tier

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
        self._travelling: list[_Sum] = []  # being scattered, the eldest first
        self._sums = [_Sum(chunk, self._completed, self._set_out) for chunk in chunks]
        self._scatters_each = scatters_each
        self.deferred = DeferredCalls()  # products
        self._places = {info.parameter: (total, i) for total in self._sums for i, info in enumerate(total.chunk.infos)}

    def begin(self, num_microbatches: int) -> None:
        """Start a step: each gradient will arrive so many times, or never."""
        self._travelling.clear()
        self.deferred.forget()
        for total in self._sums:
            total.begin(1 if self._scatters_each and total.chunk.shard.size > 1 else num_microbatches)
            total.is_narrow = num_microbatches == 1

    def receiver(self, matrix: nn.Parameter) -> Callable[[Tensor, Tensor], None]:
        """Takes two factors, [N, T] and [T, K], whose product then arrives as the gradient of matrix[N, K]: the matmul
        itself adds it to the sum, where autograd would leave a matrix to be copied.
        """
        total, i = self._places[matrix]
        return partial(self.deferred.call, total.take_product, i)

    def finish(self) -> None:
        """Wait until every chunk's `gradient` is the sum over all ranks: whole, or this rank's slice."""
        for total in self._sums:
            if total.views or not total.posted:  # what never arrived is zero
                total.post()
        for total in self._sums:
            total.wait()

    def _completed(self, total: "_Sum") -> None:
        """Called when all that a round waits for has arrived."""
        total.post()

    def _set_out(self, total: "_Sum") -> None:
        """Called when a round's sum over ranks has started."""
        if total.chunk.shard.size > 1:
            self._travelling.append(total)
        while len(self._travelling) > ROUNDS_IN_FLIGHT:
            self._travelling.pop(0).collect()


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
            total.missing = len(total.chunk.infos) if synchronizes else None
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

    def _completed(self, total: "_Sum") -> None:
        while self._next < len(self._sums) and self._sums[self._next].missing == 0:
            self._sums[self._next].post()
            self._next += 1

    def _post_all(self) -> None:
        for total in self._sums[self._next :]:
            total.post()
        for total in self._sums:
            total.missing = 0
        self._next, self._unsynchronized = len(self._sums), False


class _Sum:
    """The gradient of one chunk on its way, round by round: what is summed over ranks at once is one round."""

    def __init__(self, chunk: Chunk, completed: Callable[["_Sum"], None], set_out: Callable[["_Sum"], None]) -> None:
        self.chunk, self.completed, self.set_out = chunk, completed, set_out
        self.is_narrow = False  # nothing is added to a gradient, unless by other ranks
        self.begin(0)
        for i, info in enumerate(chunk.infos):
            info.parameter.register_post_accumulate_grad_hook(partial(_arrive, weakref.ref(self), i))

    def begin(self, arrivals: int) -> None:
        """Forget everything, and expect so many arrivals."""
        self.expect(arrivals)
        self.pending: Pending | None = None  # the last round's sum over ranks
        self.posted = False
        self.total: Tensor | None = None  # of the rounds before
        self.chunk.forget_gradient()
        self.seen = [0] * len(self.chunk.infos)  # since then
        self.chunk.squares = None
        self._begin_round()

    def expect(self, arrivals: int) -> None:
        """A round is complete when each parameter has arrived so many times; after 0, nothing may arrive."""
        self.waits_for = arrivals * len(self.chunk.infos)
        self.missing: int | None = self.waits_for  # gradients, of this round; None: however many come, more may

    def wait(self) -> None:
        self.collect()
        assert self.total is not None
        if further := self.chunk.axes[1:]:
            whole = self._on_device(self.total)
            for axis in further:
                all_reduce(whole, axis, in_place=True)
            self.total = self._at_home(whole)
        self.chunk.gradient, self.total = self.total, None

    @torch.no_grad()
    def take_product(self, i: int, a: Tensor, b: Tensor) -> None:
        self._make_buffer()
        (add_product if self.arrivals[i] else write_product)(a, b, self.views[i].flatten(0, -2))
        self._count(i)

    def take(self, i: int, parameter: Tensor) -> None:
        """Called by autograd when a backward has put parameter i's gradient into `.grad`."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:  # its product came already
            return
        if self.missing == 0:
            raise ModelError(
                f"{self.chunk.infos[i].name}: a gradient arrived that no engine.backward(loss) was waiting for. Call"
                " that, not loss.backward(), once for each forward; and if activations are recomputed, do it with"
                " use_reentrant=False."
            )
        self._make_buffer()
        if self.arrivals[i]:
            self.views[i].add_(gradient)
        else:
            self.views[i].copy_(gradient)
        self._count(i)

    def _count(self, i: int) -> None:
        self.arrivals[i] += 1
        self.seen[i] = 1
        if self.missing is None:
            return
        self.missing -= 1
        if not self.missing:
            self.completed(self)

    def _begin_round(self) -> None:
        self.arrivals = [0] * len(self.chunk.infos)
        self.missing = self.waits_for
        self.views: list[Tensor] = []  # of the chunk's gradient, by parameter

    def _make_buffer(self) -> None:
        """In master precision, or narrower where nothing is added: one microbatch, and no other rank."""
        if not self.views:
            dtype = gradient_dtype(self.chunk.parameters.dtype, self.chunk.axes, 1 if self.is_narrow else 2)
            self.views = self.chunk.make_gradient(dtype)

    def post(self) -> None:
        """Start a round's sum over ranks."""
        self._make_buffer()
        for view, arrivals in zip(self.views, self.arrivals, strict=True):
            if not arrivals:
                view.zero_()
        self.collect()
        assert self.chunk.gradient is not None
        self.posted = True
        if self.chunk.shard.size > 1:
            self.pending = start_reduce_scatter(self.chunk.gradient, 0, self.chunk.shard, in_place=True)
        else:
            self.pending = start_all_reduce(self.chunk.gradient, self.chunk.axes[0], in_place=True)
        self.chunk.gradient = None
        self._begin_round()
        if self.chunk.axes[0].size == 1:
            self.collect()  # nobody to wait for: where masters are on the host, it goes there at once
        self.set_out(self)

    def collect(self) -> None:
        """Add the round that is travelling to those before it."""
        if self.pending is not None:
            arrived, self.pending = self.pending.wait(), None
            self.total = self._at_home(arrived if self.total is None else self._on_device(self.total).add_(arrived))

    def _on_device(self, total: Tensor) -> Tensor:
        chunk = self.chunk
        if chunk.placement.states is Tier.DEVICE:
            return total
        found = chunk.empty(Tier.DEVICE, total)
        chunk.copies.upload(total, found, after=chunk.gradient_written).wait()
        return found

    def _at_home(self, total: Tensor) -> Tensor:
        """Where the update looks for it; its norm is taken before it leaves the device."""
        chunk = self.chunk
        if chunk.placement.states is Tier.DEVICE:
            return total
        chunk.gradient_bytes = total.nbytes
        chunk.squares = sum_of_squares(chunk.own_slice(total), chunk.master.dtype)
        lent = chunk.lend(total) if self.is_narrow else None
        if lent is not None:
            chunk.gradient_home = None
        elif chunk.gradient_home is None or chunk.gradient_home.dtype != total.dtype:
            chunk.gradient_home = chunk.empty(Tier.HOST, total)
        home = chunk.gradient_home if lent is None else lent
        assert home is not None
        chunk.gradient_written = chunk.copies.download(total, home)
        return home


def _arrive(total: "weakref.ref[_Sum]", i: int, parameter: Tensor) -> None:
    """A hook, which autograd keeps out of the collector's sight: what it held would never be freed."""
    if (found := total()) is not None:
        found.take(i, parameter)
