"""Tensor modes: a table of how tensors are split, and of the collectives around a matmul.

Weights are [N, K], as in nn.Linear. Notation: in x[B_dr, S, H_c] the batch dim is split over the axis d and then over
r, and the hidden dim over c. A model is written once, with the layers that follow from the table:

    between blocks    x[B_batch, S_length, H_hidden]
    linear_in         x[B_batch, S_length, K_hidden] · W[N_inner_hidden, K_k_in] -> y[B_inner_batch, S, N_inner_hidden]
    linear_out        y[B_inner_batch, S, K_inner_hidden] · W[N_hidden, K_k_out] -> x[B_batch, S_length, N_hidden]
    embedding, head   E[V_inner_hidden, H_k_in]: the head is a linear_in; logits are [B_inner_batch, S, V_inner_hidden]

S are the positions of this rank inside a block: all of them or, in context parallelism, its share. Only `SequenceLine`
has axes in `length`; what is said of x[B_batch, S, H_hidden] elsewhere holds for each position of S_length.

linear_in leads into a block (q k v, fc1) and is Megatron-LM's ColumnParallelLinear in mode 1d; linear_out leads out of
it (out_proj, fc2) and is its RowParallelLinear.
"""

from math import prod
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.layout.layout import Layout
from parallel.mesh.collectives import all_gather, local_slice
from parallel.mesh.conjugate import reduce, scatter
from parallel.mesh.mesh import ALONE, Axis, Mesh
from parallel.sequence import UNSPLIT, SequenceSplit
from parallel.tensor.layers import Embedding, Linear, Vocabulary
from parallel.tensor.loss import HeadLayout, sum_cross_entropy
from parallel.tensor.matmul import LinearCollectives, matmul
from parallel.tensor.norms import NORMS, Norm
from parallel.tensor.sliced import in_slices

Split = tuple[Axis, ...]
"""The axes that split a dim, outermost first."""


class Mode:
    """One way to split a transformer over ranks. This base class: none, every rank computes all of it.

    kept by a block   T · (O + I + N)

    These are the elements that each rank keeps for backward: for a token O of tensors between blocks, I of tensors
    inside a block, and N numbers of the norms. docs/notation.md says what O, I and N are for each family.
    """

    axes: ClassVar[tuple[str, ...]] = ()
    """The mode's axes of the mesh, outermost first."""

    token_axes: ClassVar[tuple[str, ...]] = ()
    """The axes among them that split tokens, between or inside blocks."""

    merged: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """The combinations of axes over which some gradient is summed, together with data and context."""

    batch: Split = ()
    """The axes that split the batch between blocks."""

    length: Split = ()
    """The axes that split between blocks the positions that a rank has inside a block."""

    hidden: Split = ()
    """The axes that split the hidden dim between blocks."""

    inner_batch: Split = ()
    """The axes that split the batch inside a block."""

    inner_hidden: Split = ()
    """The axes that split the hidden dim inside a block, and the rows of the embedding."""

    k_in: Split = ()
    """The axes that split the input dim of linear_in's weight, and the width of the embedding."""

    k_out: Split = ()
    """The axes that split the input dim of linear_out's weight."""

    collectives_in: LinearCollectives = LinearCollectives()
    """The collectives around linear_in."""

    collectives_out: LinearCollectives = LinearCollectives()
    """The collectives around linear_out."""

    lookup_batch: Split = ()
    """The axes that split the tokens which a rank looks up. The rows found are partial sums over inner_hidden."""

    scatter_rows: tuple[int, Axis] = (0, ALONE)
    """The dim along which the sum of these rows is scattered, and the axis."""

    reduce_rows: Axis = ALONE
    """The axis over which they are all-reduced instead."""

    def __init__(
        self,
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        sequence: SequenceSplit = UNSPLIT,
        overlaps: bool = False,
    ) -> None:
        self.mesh, self.dtype, self.sequence, self.overlaps = mesh, dtype, sequence, overlaps
        self.set_splits()

    def set_splits(self) -> None:
        """Set the fields of the table from the axes of the mesh."""

    @classmethod
    def merged_axes(cls) -> tuple[tuple[str, ...], ...]:
        """Return the combinations of axes for which a mesh must have process groups in this mode."""
        return (("data", "context"), *(("data", "context", *names) for names in cls.merged))

    def local(self, x: Tensor, split: Split, *, dim: int = 0) -> Tensor:
        """Return this rank's part of what every rank has, by default its samples: x[B, ...] -> x[B_split, ...]."""
        for axis in split:
            x = local_slice(x, dim, axis)
        return x

    def tokens(self, x: Tensor, batch: Split) -> Tensor:
        """Return this rank's tokens inside a block of what every rank has: x[B, S] -> x[B_batch, S_context]."""
        return self.sequence.local_part(self.local(x, batch))

    def tokens_between(self, x: Tensor) -> Tensor:
        """Return this rank's tokens between blocks of what every rank has: x[B, S] -> x[B_batch, S_context,length]."""
        return self.local(self.tokens(x, self.batch), self.length, dim=1)

    def positions_between(self, local: int, device: torch.device) -> Tensor:
        """Return the position in the whole sequence of each of this rank's positions between blocks, int64 [local]."""
        inside = local * prod([axis.size for axis in self.length])  # torch's compiler takes no generator
        return self.local(self.sequence.positions(inside, device), self.length)

    def gathered(self, x: Tensor, dim: int, split: Split) -> Tensor:
        """Return a tensor whole along a dim that these axes split, on every rank. It has no backward."""
        for axis in reversed(split):
            x = all_gather(x, dim, axis)
        return x

    def activation_shape(self, batch: int, sequence: int, hidden: int) -> tuple[int, int, int]:
        """Return the shape of x[B_batch, S_context,length, H_hidden] on a rank, for B samples of S tokens."""
        splits = self.batch, (self.sequence.axis, *self.length), self.hidden
        parts = (prod(axis.size for axis in axes) for axes in splits)
        batch, sequence, hidden = (size // n for size, n in zip((batch, sequence, hidden), parts, strict=True))
        return batch, sequence, hidden

    def counts_for(self, batch: Split) -> bool:
        """Return whether this rank counts, among those that have the same part of a tensor that only `batch` splits.

        Exactly one of them does: a loss that all of them compute is added once.
        """
        return all(self.mesh.axis(name).rank == 0 for name in self.axes if name not in {axis.name for axis in batch})

    def layout(self, shape: tuple[int, ...], *dims: Split, tied: bool = False, by_heads: bool = False) -> Layout:
        """Return a parameter's layout: its global shape, the axes that split each dim, and the gradient rule.

        The rule: **a gradient is summed over every axis that splits what the parameter is applied to, tokens or heads,
        and does not split the parameter.** A rank computes a gradient from its own tokens and heads. Along an axis that
        splits both, the collectives around the matmul have already brought in what the other ranks contribute; along
        one that splits neither, all ranks compute the same gradient.

        `tied`: the parameter has a copy on the last pipeline stage, whose gradient is added too. `by_heads`: it is
        applied to each head, as the weight of a head norm is. Then the sum over the axes that split heads follows the
        sum over those that split tokens. So both need only process groups that the mesh has in any case, and ZeRO
        divides the update over tokens' axes, as that of all other parameters.
        """
        own = {axis.name for axes in dims for axis in axes}
        heads = [axis for axis in self.inner_hidden if by_heads and axis.name not in own]
        done = own | {axis.name for axis in heads}
        sync = [self.mesh.axis(*(name for name in ("data", "context", *self.token_axes) if name not in done)), *heads]
        if tied:
            sync.append(self.mesh.ends)
        copies = (self.mesh.axis(name) for name in self.axes if name not in (*done, *self.token_axes))
        return Layout(shape, dims, tuple(sync), tuple(copies))

    # -- layers

    def linear_in(self, n: int, k: int, *, bias: bool = True, fused: int = 1) -> Linear:
        """Return the linear into a block, x[B_batch, S, K_hidden] -> y[B_inner_batch, S, N_inner_hidden].

        In mode 1d it is Megatron-LM's ColumnParallelLinear. `fused` weights of one shape are one parameter
        [fused, N, K], and y has fused · N features.
        """
        count = () if fused == 1 else ((fused, ()),)
        return self._linear(self.collectives_in, *count, (n, self.inner_hidden), (k, self.k_in), bias=bias)

    def linear_in_groups(self, groups: int, rows: int, k: int, *, bias: bool = True) -> Linear:
        """Return the linear into a block of which each group has the same rows, and ranks have whole groups.

        x[B_batch, S, K_hidden] · W[groups_inner_hidden, rows, K_k_in] -> y[B_inner_batch, S, groups' · rows]

        q, k and v of grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) are one such parameter. A group is
        a k, v head and the q heads that use it. So a block sends what it sends with as many k, v heads as q heads.
        """
        parts = prod(axis.size for axis in self.inner_hidden)
        assert groups % parts == 0, f"{groups} groups are not divisible by {parts}"
        return self._linear(self.collectives_in, (groups, self.inner_hidden), (rows, ()), (k, self.k_in), bias=bias)

    def linear_out(self, n: int, k: int, *, bias: bool = True) -> Linear:
        """Return the linear out of a block, y[B_inner_batch, S, K_inner_hidden] -> x[B_batch, S, N_hidden].

        In mode 1d it is Megatron-LM's RowParallelLinear.
        """
        return self._linear(self.collectives_out, (n, self.hidden), (k, self.k_out), bias=bias)

    def project_in(self, n: int, k: int) -> Linear:
        """Return the linear from the embedding's width to the blocks', without a bias.

        x[B_batch, S, K_hidden] as the embedding leaves it -> the same split of `blocks_mode()`.
        """
        return self.linear_in(n, k, bias=False)

    def project_out(self, n: int, k: int) -> Linear:
        """Return the linear from the blocks' width to the head's, without a bias: the reverse of `project_in`."""
        return self.linear_out(n, k, bias=False)

    def blocks_mode(self) -> Self:
        """Return the mode of the blocks between `project_in` and `project_out`, which may split x in another way."""
        return self

    def norm(self, kind: str, hidden: int, *, eps: float, affine: bool = True) -> Norm:
        """Return a norm of x[B_batch, S, H_hidden] over H: a kind of `NORMS`, whose parameters are [H_hidden]."""
        layout = self.layout((hidden,), self.hidden) if affine else None
        return NORMS[kind](hidden, self.hidden, layout=layout, eps=eps, like=self._empty())

    def head_norm(self, kind: str, head_size: int, *, eps: float) -> Norm:
        """Return a norm of each head, q[B_inner_batch, heads_inner_hidden, S, D] over D: a kind of `NORMS`.

        Its parameters are [D]: all heads have the same. Heads are whole on a rank, so nothing is sent in forward.
        """
        return NORMS[kind](
            head_size, (), layout=self.layout((head_size,), (), by_heads=True), eps=eps, like=self._empty()
        )

    def positions(self, count: int, hidden: int) -> Embedding:
        """Return the position table P[count, H_hidden]: indices[B_batch, S_length] -> [B_batch, S_length, H_hidden]."""
        return Embedding(self.layout((count, hidden), (), self.hidden), self._empty())

    def vocabulary(self, size: int, hidden: int, *, padding_idx: int | None, tied: bool = True) -> Vocabulary:
        """Return the token embedding E[V_inner_hidden, H_k_in], which the head shares, or a table of one of the two.

        `tied`: the first and the last layer have the same values. The table is padded where its axes do not divide the
        vocabulary.
        """
        layout = self.layout((size, hidden), self.inner_hidden, self.k_in, tied=tied)
        return Vocabulary(layout, padding_idx, self._empty())

    def lookup(self, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Look tokens[B, S] of every rank up in E[V_inner_hidden, H_k_in] -> x[B_batch, S_length, H_hidden]."""
        split = (*self.inner_hidden, *self.lookup_batch, self.collectives_in.gather_w, self.sequence.axis)
        if torch.compiler.is_compiling() and all(axis.size == 1 for axis in split):
            return F.embedding(tokens, vocabulary.weight)  # which a compiler can fuse with what follows
        rows = vocabulary.rows(self.tokens(tokens, self.lookup_batch), self.collectives_in.gather_w)
        return reduce(scatter(rows, *self.scatter_rows), self.reduce_rows)

    def logits(self, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return the logits, x[B_batch, S_length, H_hidden] -> [B_inner_batch, S, V_inner_hidden], with padding."""
        return matmul(x, vocabulary.weight, self.collectives_in)

    def lm_loss(self, x: Tensor, vocabulary: Vocabulary, labels: Tensor, scale: float = 1.0) -> Tensor:
        """Return the cross entropy of x[B_batch, S_length, H_hidden], summed over this rank's labels.

        labels[B, S] are whole on every rank and already shifted; a rank's are [B_inner_batch, S_context]. Ranks that
        differ only along `inner_hidden` get the same sum. The gradient is multiplied by `scale`.
        """
        head = HeadLayout(self.collectives_in, self.inner_hidden, vocabulary.layout)
        labels = self.tokens(labels, self.inner_batch)
        return sum_cross_entropy(x, vocabulary.weight, labels, head, scale=scale, receiver=vocabulary.receiver)

    def _linear(self, collectives: LinearCollectives, *dims: tuple[int, Split], bias: bool = True) -> Linear:
        """Return a linear whose weight has these dims, each split over these axes. A bias has all but the last."""
        sizes, splits = zip(*dims, strict=True)
        weight = self.layout(sizes, *splits)
        around = in_slices(collectives) if self.overlaps else collectives
        return Linear(around, weight, self.layout(sizes[:-1], *splits[:-1]) if bias else None, self._empty())

    def _empty(self) -> Tensor:
        """Return a tensor without elements, with the dtype and the device of parameters."""
        return torch.empty(0, dtype=self.dtype, device=self.mesh.device)
