"""OPT (Zhang et al. 2022, arXiv 2205.01068) as a list of layers, written once for every tensor mode.

Between two layers the activations are x[B_batch, S, H_hidden]; the mode says over which axes they are split. Submodules
have Hugging Face's names, so that `hf.sources` is short.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.shapes import OPTShape
from parallel.layout.layout import global_range
from parallel.layout.rng import dropout, seed_of
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence import AttentionDropout, Masking
from parallel.tensor import Mode
from parallel.tensor.layers import Vocabulary

POSITION_OFFSET = 2  # position p has row p + 2 of the table
PADDING_POSITION = -1

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class LayerSpec:
    """A layer that is not built yet."""

    name: str
    build: Callable[[], nn.Module]
    is_block: bool = False  # a transformer block: compiled, recomputed and gathered on demand as a unit


def layers_of(shape: OPTShape, mode: Mode, seed: int) -> list[LayerSpec]:
    """Return all layers of the model: [embedding, block 0 … n−1, head]."""
    blocks_mode = blocks_mode_of(shape, mode)
    blocks = [
        LayerSpec(f"layers.{i}", partial(Block, shape, blocks_mode, seed_of(seed, "dropout", i)), is_block=True)
        for i in range(shape.num_hidden_layers)
    ]
    return [
        LayerSpec("embed", partial(Embed, shape, mode, blocks_mode)),
        *blocks,
        LayerSpec("head", partial(Head, shape, mode, blocks_mode)),
    ]


def blocks_mode_of(shape: OPTShape, mode: Mode) -> Mode:
    """Return the mode of the blocks: another one than the embedding's if there are projections between the two.

    OPT-350m has such projections, because its embedding is narrower than its blocks.
    """
    return mode.blocks_mode() if shape.word_embed_proj_dim != shape.hidden_size else mode


class Embed(nn.Module):
    """Token and position embeddings: None -> x[B_batch, S, H_hidden], the input of the first block."""

    def __init__(self, shape: OPTShape, mode: Mode, blocks_mode: Mode) -> None:
        super().__init__()
        self.mode, self.blocks_mode = mode, blocks_mode
        hidden, width = shape.hidden_size, shape.word_embed_proj_dim
        tied = shape.tie_word_embeddings
        self.embed_tokens = mode.vocabulary(shape.vocab_size, width, padding_idx=shape.pad_token_id, tied=tied)
        self.embed_positions = blocks_mode.positions(shape.max_position_embeddings + POSITION_OFFSET, hidden)
        self.project_in = mode.project_in(hidden, width) if width != hidden else None

    def forward(self, x: None, batch: Microbatch) -> Tensor:
        found = self.mode.lookup(batch.input_ids, self.embed_tokens)
        if self.project_in is not None:
            found = self.project_in(found)
        positions: Tensor = self.embed_positions(self.blocks_mode.tokens(position_ids(batch), self.blocks_mode.batch))
        return found + positions


class Block(nn.Module):
    """A transformer block: x[B_batch, S, H_hidden] -> the same shape.

    A LayerNorm comes before each of the two halves (attention and feed-forward) or, in OPT-350m, after each. Each rank
    keeps for backward its own part of these, and nothing that was gathered:

        [B, S, H] between blocks   the inputs of the two LayerNorms, of q k v, and of fc1
        [B, S, H] inside           q, k, v and the output of attention
        [B, S, F]                  the output of the activation, which is fc2's input; also its input, unless it is relu
        [B, S, heads], [B, S, 1]   attention's logsumexp; the mean and the standard deviation of each LayerNorm

    With dropout there is also a mask of bytes for each half. The line `kept by a block` in a mode's docstring is the
    sum of these.
    """

    def __init__(self, shape: OPTShape, mode: Mode, seed: int) -> None:
        super().__init__()
        self.mode, self.norm_first, self.dropout = mode, shape.do_layer_norm_before, shape.dropout
        self.keys = [key_of(mode, seed, half) for half in range(2)]
        self.activation = ACTIVATIONS[shape.activation_function]
        hidden, ffn, affine = shape.hidden_size, shape.ffn_dim, shape.layer_norm_elementwise_affine
        self.self_attn = Attention(shape, mode, seed_of(seed, "attention"))
        self.self_attn_layer_norm = mode.layer_norm(hidden, affine=affine)
        self.fc1 = mode.linear_in(ffn, hidden, bias=shape.enable_bias)
        self.fc2 = mode.linear_out(hidden, ffn, bias=shape.enable_bias)
        self.final_layer_norm = mode.layer_norm(hidden, affine=affine)

    def forward(self, x: Tensor, batch: Microbatch) -> Tensor:
        x = self._residual(x, self.self_attn_layer_norm, lambda h: self.self_attn(h, batch), batch, half=0)
        return self._residual(x, self.final_layer_norm, self._feed_forward, batch, half=1)

    def _feed_forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(h)))
        return out

    def _residual(
        self, x: Tensor, norm: nn.Module, function: Callable[[Tensor], Tensor], batch: Microbatch, *, half: int
    ) -> Tensor:
        """Return x + dropout(function(norm(x))), or norm(x + dropout(function(x))) where the LayerNorm comes after."""
        y = function(norm(x) if self.norm_first else x)
        if self.training and self.dropout > 0:
            y = dropout(y, self.dropout, self.keys[half], *self._coordinates(y, batch))
        y = x + y
        return y if self.norm_first else norm(y)

    def _coordinates(self, y: Tensor, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """Return the global rows [B_batch, S] and columns [H_hidden] of the elements of y[B_batch, S, H_hidden]."""
        sequence, hidden = y.shape[1:]
        samples = self.mode.local(batch.samples, self.mode.batch)
        rows = samples.unsqueeze(1) * batch.length + self.mode.sequence.positions(sequence, y.device)
        return rows, global_range(self.mode.hidden, hidden, y.device)


class Attention(nn.Module):
    """Causal self-attention: x[B_batch, S, H_hidden] -> the same shape.

    Heads are split over the axes `mode.inner_hidden`, so attention needs communication only where sequences are split
    (context parallelism). q, k and v are one parameter [3, H, H] and one matmul.
    """

    def __init__(self, shape: OPTShape, mode: Mode, seed: int) -> None:
        super().__init__()
        self.mode, self.dropout, self.key = mode, shape.attention_dropout, key_of(mode, seed)
        self.all_heads = shape.num_attention_heads
        self.heads = self.all_heads // prod(axis.size for axis in mode.inner_hidden)
        hidden = shape.hidden_size
        self.qkv = mode.linear_in(hidden, hidden, bias=shape.enable_bias, fused=3)
        self.out_proj = mode.linear_out(hidden, hidden, bias=shape.enable_bias)

    def forward(self, x: Tensor, batch: Microbatch) -> Tensor:
        y = self.mode.sequence.attend(*heads_of(self.qkv(x), self.heads), self._masking(batch))
        out: Tensor = self.out_proj(y)
        return out

    def _masking(self, batch: Microbatch) -> Masking:
        tokens = dropout = None
        if batch.attention_mask is not None:
            tokens = self.mode.local(batch.attention_mask, self.mode.inner_batch).bool()
        if self.training and self.dropout > 0:
            samples = self.mode.local(batch.samples, self.mode.inner_batch)
            heads = global_range(self.mode.inner_hidden, self.heads, samples.device)
            dropout = AttentionDropout(self.dropout, self.key, samples.unsqueeze(1) * self.all_heads + heads)
        return Masking(tokens, dropout)


class Head(nn.Module):
    """The last LayerNorm, the projection, and the logits: x -> the summed loss of this rank.

    The logits are products with the token embedding, or with a table of the head's own where the two are not tied.
    """

    def __init__(self, shape: OPTShape, mode: Mode, blocks_mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        hidden, width, affine = shape.hidden_size, shape.word_embed_proj_dim, shape.layer_norm_elementwise_affine
        self.final_layer_norm = blocks_mode.layer_norm(hidden, affine=affine) if shape.has_final_layer_norm else None
        self.project_out = mode.project_out(width, hidden) if width != hidden else None
        if shape.tie_word_embeddings:
            self.embed_tokens = mode.vocabulary(shape.vocab_size, width, padding_idx=shape.pad_token_id)
        else:
            self.lm_head = mode.vocabulary(shape.vocab_size, width, padding_idx=None, tied=False)
        self.is_tied = shape.tie_word_embeddings

    @property
    def table(self) -> Vocabulary:
        """The table E[V, E] with which features are multiplied."""
        return self.embed_tokens if self.is_tied else self.lm_head

    def features(self, x: Tensor) -> Tensor:
        """Return what the table multiplies: x[B_batch, S, H_hidden] of the last block -> [B_batch, S, E_hidden]."""
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)

    def forward(self, x: Tensor, batch: Microbatch) -> Tensor:
        return self.mode.lm_loss(self.features(x), self.table, batch.labels, batch.scale)


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v: qkv[B, S, 3 · heads · D] -> three of [B, heads, S, D].

    qkv is cut along its last dim, so that in backward their gradients are joined by one fast copy.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return q, k, v


def key_of(mode: Mode, *parts: object) -> Tensor:
    """Return the key of a dropout. It is a tensor, since code would be compiled anew for each key that is a number."""
    return torch.tensor(seed_of(*parts), device=mode.mesh.device)


def position_ids(batch: Microbatch) -> Tensor:
    """Return the rows of the position table, [B, S], as Hugging Face's OPT does: those of the batch's own positions.

    Without them 0, 1, … count the tokens of each sample, and padding has position -1. Positions that begin anew do not
    keep tokens from attending to what is before them.
    """
    if batch.position_ids is not None:
        return batch.position_ids + POSITION_OFFSET
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return mask.cumsum(1) * mask - 1 + POSITION_OFFSET
