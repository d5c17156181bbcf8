"""The layers that families share, written once for every tensor mode: embedding, transformer block and head.

Between two layers the activations are x[B_batch, S, H_hidden]; the mode says over which axes they are split. A family
chooses what its layers are made of: see models/opt/layers.py, which is short. Attention is in models/attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.activation import ACTIVATIONS
from models.shape import ModelShape
from parallel.layout.layout import global_range
from parallel.layout.rng import Dropout, dropout, seed_of
from parallel.ops.compiling import not_compiled
from parallel.ops.kernels.activation import FUNCTIONS, gated, rectified
from parallel.ops.kernels.cast import EightBits
from parallel.pipeline.microbatch import Microbatch
from parallel.tensor import Mode
from parallel.tensor.activation import activated_for, gated_for
from parallel.tensor.fp8_matmul import CastInput
from parallel.tensor.norms import Norm
from parallel.tensor.residual import Addend, output_of, residual_add


@dataclass(frozen=True)
class LayerSpec:
    """A layer that is not built yet."""

    name: str
    build: Callable[[], nn.Module]
    is_block: bool = False  # a transformer block: compiled, recomputed and gathered on demand as a unit


def layers(
    shape: ModelShape,
    *,
    embed: Callable[[], nn.Module],
    block: Callable[[int], nn.Module],
    head: Callable[[], nn.Module],
) -> list[LayerSpec]:
    """Return all layers of a model, [embedding, block 0 ... n−1, head], each with the function that builds it."""
    blocks = [LayerSpec(f"layers.{i}", partial(block, i), is_block=True) for i in range(shape.num_hidden_layers)]
    return [LayerSpec("embed", embed), *blocks, LayerSpec("head", head)]


def blocks_mode_of(shape: ModelShape, mode: Mode) -> Mode:
    """Return the mode of the blocks: another one than the embedding's if there are projections between the two.

    OPT-350m has such projections, because its embedding is narrower than its blocks.
    """
    return mode.blocks_mode() if shape.embedding_width != shape.hidden_size else mode


# -- embedding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedPositions:
    """A table of learned positions with `num_rows` rows; `rows_of` returns a batch's rows of it, int64 [B, S]."""

    num_rows: int
    rows_of: Callable[[Microbatch], Tensor]


class Embed(nn.Module):
    """The embeddings of tokens and, in some families, positions: None -> x[B_batch, S, H_hidden].

    With `dropout_p` the dropout of the embeddings draws its masks from `seed`.
    """

    def __init__(
        self,
        shape: ModelShape,
        mode: Mode,
        *,
        positions: LearnedPositions | None = None,
        dropout_p: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.mode, self.blocks_mode, self.learned = mode, blocks_mode_of(shape, mode), positions
        hidden, width, tied = shape.hidden_size, shape.embedding_width, shape.tie_word_embeddings
        self.table = mode.vocabulary(shape.vocab_size, width, padding_idx=shape.padding_row, tied=tied)
        self.positions = None if positions is None else self.blocks_mode.positions(positions.num_rows, hidden)
        self.project_in = mode.project_in(hidden, width) if width != hidden else None
        self.dropout, self.dropout_key = dropout_p, dropout_key(mode, seed)

    def forward(self, x: None, batch: Microbatch) -> Tensor:
        found = self.mode.lookup(batch.input_ids, self.table)
        if self.project_in is not None:
            found = self.project_in(found)
        if self.positions is not None and self.learned is not None:
            rows = self.blocks_mode.tokens_between(self.learned.rows_of(batch))
            found = found + self.positions(rows)
        if self.training and self.dropout > 0:
            found = dropout(found, self.dropout, self.dropout_key, *coordinates(found, batch, self.blocks_mode))
        return found


# -- block -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockOptions:
    """The options in which the blocks of families differ.

    `norm_first`: a norm stands before each half of the block, not after it. `dropout`: the probability with which an
    element of a half's output becomes zero in training, by masks drawn from `seed`.
    """

    norm_first: bool = True
    dropout: float = 0.0
    seed: int = 0


class Half(nn.Module):
    """A half of a block: x[B_batch, S, H_hidden] -> the same shape. `addend` returns it as what is added to x."""

    addend: Callable[..., Addend]

    @property
    def input_form(self) -> EightBits | None:
        """The form in which the norm before may write the input in 8 bits; None if it must not."""
        return None

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.addend(x, *inputs).value()


class Block(nn.Module):
    """A transformer block: x[B_batch, S, H_hidden] -> the same shape.

    A norm comes before each of the two halves (attention and feed-forward) or after each. Each rank keeps for backward
    its own part of these, and nothing that was gathered:

        [B, S, H] between blocks   the inputs of the two norms, of q k v, and of the feed-forward's first matrix
        [B, S, A · D], [B, S, G · D] inside   q, k, v and the output of attention, for A heads and G k, v heads; with
                                   norms of q and k over each head also q and k before them
        [B, S, F] inside           the second matrix's input; also that of the activation, unless it is relu; where it
                                   is gated, the gate and what it multiplies
        [B, S, A], [B, S, 1]       attention's logsumexp, statistics of norms over each head; those of other norms

    With dropout a CPU also keeps a mask of bytes for each half. `ModelShape.kept` counts these, and the line `kept by a
    block` in a mode's docstring says how they are split.
    """

    def __init__(
        self,
        mode: Mode,
        attention: Half,
        feed_forward: Half,
        norms: tuple[Norm, Norm],
        *,
        options: BlockOptions,
    ) -> None:
        super().__init__()
        self.mode, self.norm_first, self.dropout = mode, options.norm_first, options.dropout
        self.dropout_keys = [dropout_key(mode, options.seed, half) for half in range(2)]
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.feed_forward_norm = norms

    def forward(self, x: Tensor, batch: Microbatch) -> Tensor:
        first, second = self._dropouts(x, batch)
        if self.norm_first:
            x, h = self.attention_norm.residual_for(self.attention.input_form, x)
            added = self.attention.addend(h, batch)
            x, h = self.feed_forward_norm.residual_for(self.feed_forward.input_form, x, added, first)
            return residual_add(x, self.feed_forward.addend(h), second)
        _, x = self.attention_norm.residual(x, self.attention.addend(x, batch), first)
        _, x = self.feed_forward_norm.residual(x, self.feed_forward.addend(x), second)
        return x

    def _dropouts(self, x: Tensor, batch: Microbatch) -> tuple[Dropout | None, Dropout | None]:
        """Return the dropouts of the two halves' outputs."""
        if not self.training or self.dropout == 0:
            return None, None
        where = coordinates(x, batch, self.mode)
        first, second = (Dropout(self.dropout, key, *where) for key in self.dropout_keys)
        return first, second


class FeedForward(Half):
    """Two linears with an activation between them: x[B_batch, S, H_hidden] -> the same shape.

    `gated`: the first linear has two outputs, and the activation of the one multiplies the other (SwiGLU; Shazeer 2020,
    arXiv 2002.05202). Both are one parameter [2, F, H].
    """

    def __init__(
        self, mode: Mode, hidden: int, width: int, *, activation: str, bias: bool, gated: bool = False
    ) -> None:
        super().__init__()
        self.activation, self.is_gated = ACTIVATIONS[activation], gated
        self.up = mode.linear_in(width, hidden, bias=bias, fused=2 if gated else 1)
        self.down = mode.linear_out(hidden, width, bias=bias)

    @property
    def input_form(self) -> EightBits | None:
        return self.up.input_form

    def addend(self, x: Tensor | CastInput) -> Addend:
        """Return the output before its bias is added, and the bias, where a kernel adds it to x."""
        inner = self._inner_with_kernels if self.up.is_followed_by("activation", x) else self._inner
        return output_of(self.down, inner(x))

    def _inner(self, x: Tensor | CastInput) -> Tensor:
        """Return what the second linear multiplies, [B_inner_batch, S, F_inner_hidden]."""
        inner = self.up(x)
        return gated(inner, self.activation) if self.is_gated else FUNCTIONS[self.activation](inner)

    @not_compiled
    def _inner_with_kernels(self, x: Tensor | CastInput) -> Tensor | CastInput:
        """Return the same; the bias's gradient is summed with the activation's, and relu is written by the product."""
        up, bias = self.up, self.up.flat_bias
        if self.is_gated:
            return gated_for(self.down, up(x), self.activation)
        if self.activation == "relu" and up.can_be_rectified:
            return rectified(up.with_constant_bias(x, rectified=True), bias)
        return activated_for(self.down, up.product(x), self.activation, bias)


# -- head --------------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """The last norm, the projection, and the logits: x -> the summed loss of this rank.

    The logits are products with the token embedding, or with a table of the head's own where the two are not tied.
    """

    def __init__(self, shape: ModelShape, mode: Mode, *, norm: nn.Module | None) -> None:
        super().__init__()
        self.mode, self.norm, self.is_tied = mode, norm, shape.tie_word_embeddings
        hidden, width = shape.hidden_size, shape.embedding_width
        self.project_out = mode.project_out(width, hidden) if width != hidden else None
        padding_idx = shape.padding_row if self.is_tied else None
        self.table = mode.vocabulary(shape.vocab_size, width, padding_idx=padding_idx, tied=self.is_tied)

    def features(self, x: Tensor) -> Tensor:
        """Return what the table multiplies: x[B_batch, S, H_hidden] of the last block -> [B_batch, S, E_hidden]."""
        if self.norm is not None:
            x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, x: Tensor, at: Tensor) -> Tensor:
        """Return the logits of one position of each sample: x[B_batch, S, H_hidden], at[B] -> [B, V], on every rank."""
        features = self.features(x)
        at = self.mode.local(at, self.mode.batch)
        chosen = features[torch.arange(len(at), device=at.device), at].unsqueeze(1)
        logits = self.mode.gathered(self.mode.logits(chosen, self.table).squeeze(1), 1, self.mode.inner_hidden)
        return self.mode.gathered(logits, 0, self.mode.inner_batch)[:, : self.table.layout.shape[0]]

    def forward(self, x: Tensor, batch: Microbatch) -> Tensor:
        return self.mode.lm_loss(self.features(x), self.table, batch.labels, batch.scale)


def dropout_key(mode: Mode, *parts: object) -> Tensor:
    """Return the key of a dropout. It is a tensor, since code would be compiled anew for each key that is a number."""
    return torch.tensor(seed_of(*parts), device=mode.mesh.device)


def coordinates(y: Tensor, batch: Microbatch, mode: Mode) -> tuple[Tensor, Tensor]:
    """Return the global rows [B_batch, S] and columns [H_hidden] of the elements of y[B_batch, S, H_hidden]."""
    sequence, hidden = y.shape[1:]
    samples = mode.local(batch.samples, mode.batch)
    rows = samples.unsqueeze(1) * batch.length + mode.positions_between(sequence, y.device)
    return rows, global_range(mode.hidden, hidden, y.device)
