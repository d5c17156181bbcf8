"""Mode 1d: matrices are split along one dim (Megatron-LM; Shoeybi et al. 2019, arXiv 1909.08053, section 3)."""

from parallel.tensor.layers import Linear
from parallel.tensor.matmul import LinearCollectives
from parallel.tensor.mode import Mode


class Line(Mode):
    """Activations are whole on every rank between blocks, x[B, S, H]; inside a block they are y[B, S, H_t].

    linear_in     x[B, S, K] · W[N_t, K] -> y[B, S, N_t]      forward nothing, backward all-reduces dx
    linear_out    y[B, S, K_t] · W[N, K_t] -> x[B, S, N]      forward all-reduces x, backward nothing
    embedding     E[V_t, H]: look up, with zeros for tokens of other ranks, then all-reduce

    linear_in is Megatron-LM's ColumnParallelLinear, linear_out its RowParallelLinear.

    kept by a block   T · (O + N) + T · I / p
    """

    axes = ("t",)

    def set_splits(self) -> None:
        t = self.mesh.axis("t")
        self.inner_hidden = self.k_out = (t,)
        self.collectives_in, self.collectives_out = LinearCollectives(copy_x=t), LinearCollectives(reduce_y=t)
        self.reduce_rows = t

    def project_in(self, n: int, k: int) -> Linear:
        """Return a linear with a whole W[N, K] on every rank, since x is whole both before and after it."""
        return self._linear(LinearCollectives(), (n, ()), (k, ()), bias=False)

    project_out = project_in
