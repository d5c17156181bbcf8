"""Mode 3d: matrices and activations are split over the three axes of a cube (Bian et al. 2021, arXiv 2105.14450)."""

from copy import copy
from typing import Self

from parallel.tensor.matmul import LinearCollectives
from parallel.tensor.mode import Mode


class Cube(Mode):
    """Activations are x[B_wi, S, H_o] between blocks and y[B_wo, S, H_i] inside a block (section 3 of the paper).

    linear_in     x[B_wi, S, K_o] · W[N_i, K_ow] -> y[B_wo, S, N_i]   gather x over i, W over w; scatter y over o
    linear_out    y[B_wo, S, K_i] · W[N_o, K_iw] -> x[B_wi, S, N_o]   the same with i and o swapped
    embedding     E[V_i, H_ow]: gather E over its width, look up the tokens of B_w, then scatter the batch over i

    kept by a block   T · (O + I + N · q) / p
    """

    axes = ("i", "w", "o")
    token_axes = ("i", "w", "o")
    merged = (("w", "i"), ("w", "o"))

    swapped = False

    def set_splits(self) -> None:
        i, w, o = (self.mesh.axis(name) for name in self.axes)
        i, o = (o, i) if self.swapped else (i, o)
        self.batch, self.inner_batch, self.lookup_batch = (w, i), (w, o), (w,)
        self.hidden, self.inner_hidden = (o,), (i,)
        self.k_in, self.k_out = (o, w), (i, w)
        self.collectives_in = LinearCollectives(gather_x=(0, i), gather_w=w, scatter_y=(0, o))
        self.collectives_out = LinearCollectives(gather_x=(0, o), gather_w=w, scatter_y=(0, i))
        self.scatter_rows = (0, i)

    def blocks_mode(self) -> Self:
        """Return the mode with i and o swapped: `project_in` leaves x so, and `project_out` swaps them back."""
        other = copy(self)
        other.swapped = not self.swapped
        other.set_splits()
        return other
