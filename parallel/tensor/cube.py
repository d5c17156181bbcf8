"""3d: matrices and activations split over three directions (Bian et al. 2021, arXiv 2105.14450, section 3)."""

from typing import Self

import torch
from torch import Tensor

from parallel.conjugate import gather, scatter
from parallel.mesh import Axis, Mesh
from parallel.tensor.layers import Vocabulary
from parallel.tensor.mode import Mode


class Cube(Mode):
    """Activations are x[B_wi, S, H_o] between blocks and y[B_wo, S, H_i] inside one: linear_in swaps i and o,
    linear_out back.

    linear_in     x[B_wi, S, K_o] · W[N_i, K_ow] -> y[B_wo, S, N_i]  gather x over i, W over w; scatter y over o
    linear_out    the same with i and o swapped
    embedding     E[V_i, H_ow]: look all of B_w up in the gathered E[V_i, H_o], then scatter the batch over i
    """

    axes = ("i", "w", "o")
    token_axes = ("i", "w", "o")
    merged = (("w", "i"), ("w", "o"))

    def __init__(self, mesh: Mesh, dtype: torch.dtype, *, swapped: bool = False) -> None:
        super().__init__(mesh, dtype)
        self.w = mesh.axis("w")
        self.i, self.o = (mesh.axis("o"), mesh.axis("i")) if swapped else (mesh.axis("i"), mesh.axis("o"))
        self.batch, self.inner_batch = (self.w, self.i), (self.w, self.o)
        self.hidden, self.inner_hidden = (self.o,), (self.i,)
        self.k_in, self.k_out = (self.o, self.w), (self.i, self.w)
        self.swapped = swapped

    def matmul_in(self, x: Tensor, w: Tensor) -> Tensor:
        return self._matmul(x, w, self.i, self.o)

    def matmul_out(self, x: Tensor, w: Tensor) -> Tensor:
        return self._matmul(x, w, self.o, self.i)

    def _matmul(self, x: Tensor, w: Tensor, i: Axis, o: Axis) -> Tensor:
        """x[B_wi, S, K_o] · w[N_i, K_ow] -> [B_wo, S, N_i]"""
        return scatter(gather(x, 0, i) @ gather(w, -1, self.w).T, 0, o)

    def lookup(self, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
        table = gather(vocabulary.weight, -1, self.w)
        return scatter(vocabulary.rows(self.local(tokens, (self.w,)), table), 0, self.i)

    def trunk(self) -> Self:
        """i and o swapped, as `project_in` leaves them and `project_out` wants them."""
        return type(self)(self.mesh, self.dtype, swapped=not self.swapped)
