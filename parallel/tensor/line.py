"""Mode 1d: matrices are split along one dim (Megatron-LM; Shoeybi et al. 2019, arXiv 1909.08053, section 3).

With sequence parallelism activations between blocks are split, too (Korthikanti et al. 2022, arXiv 2205.05198, section
4.2.2).
"""

from parallel.mesh.mesh import ALONE
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
        """Return a linear with a whole W[N, K] on every rank, since x has its whole hidden dim before and after it."""
        return self._linear(LinearCollectives(), (n, ()), (k, ()), bias=False)

    project_out = project_in


class SequenceLine(Line):
    """Activations are x[B, S_t, H] between blocks, split along the sequence; inside a block they are y[B, S, H_t].

    linear_in     x[B, S_t, K] · W[N_t, K] -> y[B, S, N_t]    gather x over t; backward scatters dx, gathers x for dW
    linear_out    y[B, S, K_t] · W[N, K_t] -> x[B, S_t, N]    scatter x over t; backward gathers dx
    embedding     E[V_t, H]: look up all tokens, with zeros for those of other ranks, then scatter them along S over t

    kept by a block   T · (O + I + N) / p

    Norms, residuals, dropout and biases of linears out of a block have a rank's own positions alone, so the gradients
    of their parameters and of positions are summed over t. In context parallelism t splits the positions of a rank of
    the context axis into consecutive ones, in the order in which that rank has them.
    """

    token_axes = ("t",)
    merged = (("t",),)

    def set_splits(self) -> None:
        super().set_splits()
        t = self.mesh.axis("t")
        self.length = (t,)
        self.collectives_in, self.collectives_out = (
            LinearCollectives(gather_x=(1, t)),
            LinearCollectives(scatter_y=(1, t)),
        )
        self.scatter_rows, self.reduce_rows = (1, t), ALONE
