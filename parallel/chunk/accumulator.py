"""The buffer into which a backward adds the gradients of a chunk's parameters."""

from collections.abc import Collection

import torch
from torch import Tensor

from parallel.chunk.spec import ChunkSpec
from parallel.ops.kernels.accumulate import accumulate
from parallel.ops.kernels.lookup import add_rows
from parallel.ops.products import Factor, add_product, write_product


class Accumulator:
    """Adds up the gradients of one round: of the microbatches that one collective will sum over ranks.

    buffer [n]  on the device, from the first arrival or `room` to `take`: a forward, in which activations accumulate,
                has only that of the head's table
    arrivals    for each parameter, the number of gradients that were added in this round

    A step has many more vectors than matrices, and a launch for each would take longer than the bytes do. Therefore
    gradients of vectors wait until one is needed, and are copied or added all at once.
    """

    def __init__(self, spec: ChunkSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.begin(spec.master_dtype)

    def begin(self, dtype: torch.dtype) -> None:
        """Begin a round whose buffer will have this dtype, and drop what has been added before."""
        self.dtype = dtype
        self.buffer: Tensor | None = None
        self._views: list[Tensor] = []  # of the buffer, one for each parameter
        self.arrivals = [0] * len(self.spec.infos)
        self._waiting: dict[int, Tensor] = {}  # gradients that have arrived and are not in the buffer
        self._placed: set[int] = set()  # parameters whose views `room` has given away

    def views(self) -> list[Tensor]:
        """Return each parameter's view of the buffer, with all that has arrived.

        The first call in a round allocates the buffer: its padding is zero, and the views are not filled yet.
        """
        self._add_waiting()
        return self._buffer_views()

    def _buffer_views(self) -> list[Tensor]:
        if self.buffer is None:
            self.buffer = torch.empty(self.spec.size, dtype=self.dtype, device=self.device)
            for info, (start, stop) in zip(self.spec.infos, self.spec.ranges, strict=True):
                if (end := start + info.parameter.numel()) < stop:
                    self.buffer[end:stop].zero_()
            self._views = self.spec.views(self.buffer)
        return self._views

    def add(self, i: int, gradient: Tensor) -> None:
        """Add a gradient of parameter i."""
        if not self.spec.is_matrix:
            if i in self._waiting:
                self._add_waiting()
            self._waiting[i] = gradient
            self._buffer_views()
            return
        view = self._buffer_views()[i]
        if i not in self._placed or gradient.data_ptr() != view.data_ptr():
            accumulate(gradient, view, is_first=not self.arrivals[i])
        self.arrivals[i] += 1

    def place(self, i: int, a: Tensor, b: Tensor) -> Tensor:
        """Return the product a[N, T] · b[T, K], the first gradient of parameter i, in memory where `add` need not copy
        it. Another one, or one that is narrower than the buffer, is in memory of its own.
        """
        view = self.room(i, (a.dtype,))
        return torch.mm(a, b) if view is None else torch.mm(a, b, out=view.flatten(0, -2))

    def room(self, i: int, dtypes: Collection[torch.dtype]) -> Tensor | None:
        """Return the view of parameter i for its first gradient, which `add` need not copy then; None for others, and
        where the buffer has none of these dtypes.
        """
        if self.dtype not in dtypes or self.arrivals[i] or i in self._placed:
            return None
        self._placed.add(i)
        view = self._buffer_views()[i]
        return view.view(view.shape)  # an object that nobody else has: autograd copies one that is shared

    @torch.no_grad()
    def _add_waiting(self) -> None:
        """Copy or add to the buffer the gradients of vectors that have arrived: at most three launches."""
        waiting, self._waiting = self._waiting, {}
        first, later = ([i for i in waiting if bool(self.arrivals[i]) is is_later] for is_later in (False, True))
        views = self._buffer_views() if waiting else []
        if first:
            torch._foreach_copy_([views[i] for i in first], [waiting[i] for i in first])
        if later:
            # In the buffer's dtype: torch adds tensors of two dtypes one by one.
            addends = [torch.empty_like(views[i]) for i in later]
            torch._foreach_copy_(addends, [waiting[i] for i in later])
            torch._foreach_add_([views[i] for i in later], addends)
        for i in waiting:
            self.arrivals[i] += 1

    @torch.no_grad()
    def add_factors(self, i: int, a: Factor, b: Factor) -> None:
        """Add the product a[N, T] · b[T, K] to the gradient of parameter i, a matrix [N, K]."""
        view = self._buffer_views()[i].flatten(0, -2)
        (add_product if self.arrivals[i] else write_product)(a, b, view)
        self.arrivals[i] += 1

    @torch.no_grad()
    def add_rows(self, i: int, keys: Tensor, dy: Tensor) -> None:
        """Add dy[..., H] to the rows keys[T] of the gradient of parameter i, a table [R, H]."""
        add_rows(keys, dy, self._buffer_views()[i], is_first=not self.arrivals[i])
        self.arrivals[i] += 1

    def fill_missing_with_zeros(self) -> None:
        """Fill with zeros the views of parameters for which no gradient has arrived."""
        for view, arrivals in zip(self.views(), self.arrivals, strict=True):  # `views` adds what has been waiting
            if not arrivals:
                view.zero_()

    def take(self) -> Tensor:
        """Give the buffer to the caller, and begin the next round."""
        self._add_waiting()
        assert self.buffer is not None
        taken = self.buffer
        self.begin(self.dtype)
        return taken
