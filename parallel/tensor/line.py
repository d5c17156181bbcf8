"""1d: matrices split along one direction (Megatron-LM; Shoeybi et al. 2019, section 3)."""

import torch
from torch import Tensor

from parallel.conjugate import copy, reduce
from parallel.mesh import Mesh
from parallel.tensor.layers import Linear, Vocabulary
from parallel.tensor.mode import Mode


class Line(Mode):
    """Activations between blocks are whole on every rank, x[B, S, H]; inside a block the hidden dim is split over t.

    linear_in     x[B, S, K] · W[N_t, K] -> y[B, S, N_t]      nothing forward, all-reduce of dx backward
    linear_out    x[B, S, K_t] · W[N, K_t] -> y[B, S, N]      all-reduce of y forward, nothing backward
    embedding     E[V_t, H]: all-reduce of the rows found
    """

    axes = ("t",)

    def __init__(self, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__(mesh, dtype)
        self.t = mesh.axis("t")
        self.inner_hidden = self.k_out = (self.t,)

    def matmul_in(self, x: Tensor, w: Tensor) -> Tensor:
        return copy(x, self.t) @ w.T

    def matmul_out(self, x: Tensor, w: Tensor) -> Tensor:
        return reduce(x @ w.T, self.t)

    def lookup(self, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
        return reduce(vocabulary.rows(tokens, vocabulary.weight), self.t)

    def project_in(self, n: int, k: int) -> Linear:
        """Whole on every rank, W[N, K]: both its ends lie between blocks, where nothing is split."""
        return self._linear(lambda x, w: x @ w.T, (n, ()), (k, ()), bias=False)

    project_out = project_in
