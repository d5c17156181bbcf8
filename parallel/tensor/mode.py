"""What a tensor mode is: a table that says how tensors are split and which collectives stand around a matmul.

Weights are [N, K], as in nn.Linear. Notation: x[B_dr, S, H_c] has its batch dim split over the axes d then r, and its
hidden dim over c. A model is written once, in the layers that follow from the table:

    between blocks    x[B_batch, S, H_hidden]
    linear_in         x[B_batch, S, K_hidden] · W[N_inner_hidden, K_k_in]  ->  y[B_inner_batch, S, N_inner_hidden]
    linear_out        y[B_inner_batch, S, K_inner_hidden] · W[N_hidden, K_k_out]  ->  x[B_batch, S, N_hidden]
    embedding, head   E[V_inner_hidden, H_k_in]: the head is a linear_in; logits are [B_inner_batch, S, V_inner_hidden]
"""

from math import prod
from typing import ClassVar, Self

import torch
from torch import Tensor

from parallel.layout.layout import Layout
from parallel.mesh.collectives import local_slice
from parallel.mesh.conjugate import gather, reduce, scatter
from parallel.mesh.mesh import ALONE, Axis, Mesh
from parallel.sequence import WHOLE, SequenceSplit
from parallel.tensor.layers import Embedding, LayerNorm, Linear, Vocabulary
from parallel.tensor.loss import HeadLayout, sum_cross_entropy
from parallel.tensor.matmul import LinearCollectives, matmul

Split = tuple[Axis, ...]


class Mode:
    """One way to split a transformer over ranks; as it stands here, none: every rank computes the whole.

    kept by a block   T · (8 · H + F + A + 4)

    That is in elements, for backward, on each rank; what they are, `models.opt.Block` says; letters are those of
    docs/notation.md.

    On the class, for the mesh and the gradient rule: `axes` are the mode's own directions, outermost first,
    `token_axes` those that split tokens anywhere, `merged` the combinations over which some gradient is summed.
    """

    axes: ClassVar[tuple[str, ...]] = ()
    token_axes: ClassVar[tuple[str, ...]] = ()
    merged: ClassVar[tuple[tuple[str, ...], ...]] = ()

    # The axes that split each dim, outermost first.
    batch: Split = ()
    hidden: Split = ()
    inner_batch: Split = ()
    inner_hidden: Split = ()
    k_in: Split = ()
    k_out: Split = ()

    # The collectives around a linear, into a block and out of it.
    collectives_in: LinearCollectives = LinearCollectives()
    collectives_out: LinearCollectives = LinearCollectives()

    # A lookup takes the tokens split over lookup_batch, and finds partial sums over inner_hidden.
    lookup_batch: Split = ()
    scatter_rows: tuple[int, Axis] = (0, ALONE)
    reduce_rows: Axis = ALONE

    def __init__(
        self, mesh: Mesh, dtype: torch.dtype, *, sequence: SequenceSplit = WHOLE, compiles: bool = False
    ) -> None:
        self.mesh, self.dtype, self.sequence, self.compiles = mesh, dtype, sequence, compiles
        self.arrange()

    def arrange(self) -> None:
        """Fill in the table, from the axes of the mesh."""

    @classmethod
    def merged_axes(cls) -> tuple[tuple[str, ...], ...]:
        """The combinations of axes that a mesh must build for this mode."""
        return (("data", "context"), *(("data", "context", *names) for names in cls.merged))

    def local(self, x: Tensor, batch: Split) -> Tensor:
        """x[B, ...], whole on every rank -> x[B_batch, ...]: the samples that this rank sees of it."""
        for axis in batch:
            x = local_slice(x, 0, axis)
        return x

    def tokens(self, x: Tensor, batch: Split) -> Tensor:
        """x[B, S], whole on every rank -> x[B_batch, S_context]: the tokens that this rank sees of it."""
        return self.sequence.cut(self.local(x, batch))

    def activation_shape(self, batch: int, sequence: int, hidden: int) -> tuple[int, int, int]:
        """The shape on a rank of x[B_batch, S_context, H_hidden], of B samples of S tokens."""
        batch, hidden = (
            size // prod(a.size for a in axes) for size, axes in ((batch, self.batch), (hidden, self.hidden))
        )
        return batch, sequence // self.sequence.axis.size, hidden

    def counts_for(self, batch: Split) -> bool:
        """Whether this rank is the one that counts, among those that hold the same of what only `batch` splits."""
        return all(self.mesh.axis(name).rank == 0 for name in self.axes if name not in {axis.name for axis in batch})

    def layout(self, shape: tuple[int, ...], *dims: Split, tied: bool = False) -> Layout:
        """A parameter's layout, with the one gradient rule: **its gradient is summed over every axis that splits tokens
        and does not split the parameter**. `tied`: a copy on the last pipeline stage is the same parameter.
        """
        own = {axis.name for axes in dims for axis in axes}
        sync = [self.mesh.axis(*(name for name in ("data", "context", *self.token_axes) if name not in own))]
        if tied:
            sync.append(self.mesh.ends)
        copies = (self.mesh.axis(name) for name in self.axes if name not in (*own, *self.token_axes))
        return Layout(shape, dims, tuple(sync), tuple(copies))

    # -- layers

    def linear_in(self, n: int, k: int, *, bias: bool = True, fused: int = 1) -> Linear:
        """Into a block. `fused` weights of one shape are one parameter [fused, N, K] and give fused · N features."""
        return self._linear((n, self.inner_hidden), (k, self.k_in), self.collectives_in, bias=bias, fused=fused)

    def linear_out(self, n: int, k: int, *, bias: bool = True) -> Linear:
        """Out of a block."""
        return self._linear((n, self.hidden), (k, self.k_out), self.collectives_out, bias=bias)

    def project_in(self, n: int, k: int) -> Linear:
        """From between blocks, as the embedding leaves x, to between blocks, as `blocks_mode()` wants it. No bias."""
        return self.linear_in(n, k, bias=False)

    def project_out(self, n: int, k: int) -> Linear:
        """From between blocks of `blocks_mode()` to between blocks, as the head wants x. No bias."""
        return self.linear_out(n, k, bias=False)

    def blocks_mode(self) -> Self:
        """The mode of the blocks between `project_in` and `project_out`."""
        return self

    def layer_norm(self, hidden: int, *, affine: bool = True) -> LayerNorm:
        """LayerNorm of x[B_batch, S, H_hidden] over H, with weight[H_hidden] and bias[H_hidden]."""
        layout = self.layout((hidden,), self.hidden) if affine else None
        return LayerNorm(hidden, self.hidden, layout, self._empty())

    def positions(self, count: int, hidden: int) -> Embedding:
        """A table P[count, H_hidden]: indices[B_batch, S] -> [B_batch, S, H_hidden]"""
        return Embedding(self.layout((count, hidden), (), self.hidden), self._empty())

    def vocabulary(self, size: int, hidden: int, *, padding_idx: int | None) -> Vocabulary:
        """The token embedding that the head shares, padded where its axes do not divide the vocabulary."""
        layout = self.layout((size, hidden), self.inner_hidden, self.k_in, tied=True)
        return Vocabulary(layout, padding_idx, self._empty())

    def lookup(self, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
        """tokens[B, S], whole on every rank, in E[V_inner_hidden, H_k_in] -> x[B_batch, S, H_hidden]"""
        table = gather(vocabulary.weight, -1, self.collectives_in.gather_w)
        rows = vocabulary.rows(self.tokens(tokens, self.lookup_batch), table)
        return reduce(scatter(rows, *self.scatter_rows), self.reduce_rows)

    def logits(self, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        """x[B_batch, S, H_hidden] -> [B_inner_batch, S, V_inner_hidden], padding included"""
        return matmul(x, vocabulary.weight, self.collectives_in)

    def lm_loss(self, x: Tensor, vocabulary: Vocabulary, labels: Tensor, scale: float = 1.0) -> Tensor:
        """x[B_batch, S, H_hidden], labels[B, S], whole and already shifted -> the cross entropy summed over this rank's
        labels, which are split as inside a block; ranks that differ in `inner_hidden` alone get the same sum. Its
        gradient is multiplied by `scale`.
        """
        head = HeadLayout(self.collectives_in, self.inner_hidden, vocabulary.layout, compiles=self.compiles)
        return sum_cross_entropy(x, vocabulary.weight, self.tokens(labels, self.inner_batch), head, scale)

    def _linear(
        self,
        n: tuple[int, Split],
        k: tuple[int, Split],
        collectives: LinearCollectives,
        *,
        bias: bool = True,
        fused: int = 1,
    ) -> Linear:
        (n_size, n_split), (k_size, k_split) = n, k
        count, unsplit = ((), ()) if fused == 1 else ((fused,), ((),))
        weight = self.layout((*count, n_size, k_size), *unsplit, n_split, k_split)
        return Linear(
            collectives, weight, self.layout((*count, n_size), *unsplit, n_split) if bias else None, self._empty()
        )

    def _empty(self) -> Tensor:
        """No elements; parameters are made like it."""
        return torch.empty(0, dtype=self.dtype, device=self.mesh.device)
