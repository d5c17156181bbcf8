"""1d: matrices split along one direction (Megatron-LM; Shoeybi et al. 2019, section 3)."""

from parallel.tensor.layers import Linear
from parallel.tensor.matmul import LinearCollectives
from parallel.tensor.mode import Mode


class Line(Mode):
    """Activations between blocks are whole on every rank, x[B, S, H]; inside a block the hidden dim is split over t.

    linear_in     x[B, S, K] · W[N_t, K] -> y[B, S, N_t]      nothing forward, all-reduce of dx backward
    linear_out    x[B, S, K_t] · W[N, K_t] -> y[B, S, N]      all-reduce of y forward, nothing backward
    embedding     E[V_t, H]: all-reduce of the rows found

    kept by a block   T · (4 · H + 4) + T · (4 · H + F + A) / p
    """

    axes = ("t",)

    def arrange(self) -> None:
        t = self.mesh.axis("t")
        self.inner_hidden = self.k_out = (t,)
        self.collectives_in, self.collectives_out = LinearCollectives(copy_x=t), LinearCollectives(reduce_y=t)
        self.reduce_rows = t

    def project_in(self, n: int, k: int) -> Linear:
        """Whole on every rank, W[N, K]: both its ends lie between blocks, where nothing is split."""
        return self._linear((n, ()), (k, ()), LinearCollectives(), bias=False)

    project_out = project_in
