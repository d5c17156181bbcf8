"""Modes 2d and 2.5d: matrices are split over the rows and columns of a grid, activations also over its depth.

2d is Optimus (Xu et al. 2021, arXiv 2104.05343, section 3), 2.5d is Tesseract (Wang et al. 2021, arXiv 2105.14500,
section 3); 2d is 2.5d of depth 1. Both papers multiply by SUMMA, which broadcasts one block after another. Here one
all-gather brings a whole row or column, on any number of rows and columns.
"""

from parallel.tensor.matmul import LinearCollectives
from parallel.tensor.mode import Mode


class Grid(Mode):
    """Activations are x[B_dr, S, H_c] both between and inside blocks, so linear_in and linear_out have one form.

    linear        x[B_dr, S, K_c] · W[N_c, K_r] -> y[B_dr, S, N_c]   gather x over c, W over r; backward scatters both
    embedding     E[V_c, H_r]: gather E over its width, look up the tokens of B_dr, then scatter the hidden dim over c

    kept by a block   T · (O + I + N · c) / p

    All depths d have the same W. Its gradient is summed over them once a step, together with the data-parallel sum.
    """

    axes = ("depth", "row", "col")
    token_axes = ("depth", "row")
    merged = (("depth",), ("depth", "row"))

    def set_splits(self) -> None:
        depth, row, col = (self.mesh.axis(name) for name in self.axes)
        self.batch = self.inner_batch = self.lookup_batch = (depth, row)
        self.hidden = self.inner_hidden = (col,)
        self.k_in = self.k_out = (row,)
        self.collectives_in = self.collectives_out = LinearCollectives(gather_x=(-1, col), gather_w=row)
        self.scatter_rows = (-1, col)
