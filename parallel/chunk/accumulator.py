"""The buffer into which a backward adds the gradients of a chunk's parameters."""

import torch
from torch import Tensor

from parallel.chunk.spec import ChunkSpec
from parallel.ops.products import Factor, add_product, write_product


class Accumulator:
    """Adds up the gradients of one round: of the microbatches that one collective will sum over ranks.

    buffer [n]  on the device, from the first arrival to `take`; a forward, in which activations accumulate, has none
    arrivals    for each parameter, the number of gradients that were added in this round
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

    def views(self) -> list[Tensor]:
        """Return each parameter's view of the buffer.

        The first call in a round allocates the buffer: its padding is zero, and the views are not filled yet.
        """
        if self.buffer is None:
            self.buffer = torch.empty(self.spec.size, dtype=self.dtype, device=self.device)
            for info, (start, stop) in zip(self.spec.infos, self.spec.ranges, strict=True):
                self.buffer[start + info.parameter.numel() : stop].zero_()
            self._views = self.spec.views(self.buffer)
        return self._views

    def add(self, i: int, gradient: Tensor) -> None:
        """Add a gradient of parameter i."""
        view = self.views()[i]
        if self.arrivals[i]:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        self.arrivals[i] += 1

    @torch.no_grad()
    def add_factors(self, i: int, a: Factor, b: Factor) -> None:
        """Add the product a[N, T] · b[T, K] to the gradient of parameter i, a matrix [N, K]."""
        view = self.views()[i].flatten(0, -2)
        (add_product if self.arrivals[i] else write_product)(a, b, view)
        self.arrivals[i] += 1

    def fill_missing_with_zeros(self) -> None:
        """Fill with zeros the views of parameters for which no gradient has arrived."""
        for view, arrivals in zip(self.views(), self.arrivals, strict=True):
            if not arrivals:
                view.zero_()

    def take(self) -> Tensor:
        """Give the buffer to the caller, and begin the next round."""
        assert self.buffer is not None
        taken = self.buffer
        self.begin(self.dtype)
        return taken
