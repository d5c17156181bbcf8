"""OPT (Zhang et al. 2022, arXiv 2205.01068) as a list of layers."""

import torch
from torch import Tensor

from models.attention import Attention, AttentionOptions
from models.layer import (
    Block,
    BlockOptions,
    Embed,
    FeedForward,
    Head,
    LayerSpec,
    LearnedPositions,
    blocks_mode_of,
    layers,
)
from models.opt.shape import POSITION_OFFSET, OPTShape
from parallel.layout.rng import seed_of
from parallel.pipeline.microbatch import Microbatch
from parallel.tensor import Mode
from parallel.tensor.norms import Norm

EPS = 1e-5  # added to the variance in every LayerNorm


def layers_of(shape: OPTShape, mode: Mode, seed: int) -> list[LayerSpec]:
    """Return all layers of the model: [embedding, block 0 ... n−1, head]."""
    blocks_mode = blocks_mode_of(shape, mode)
    positions = LearnedPositions(shape.max_position_embeddings + POSITION_OFFSET, rows_of)
    return layers(
        shape,
        embed=lambda: Embed(shape, mode, positions=positions),
        block=lambda index: block_of(shape, blocks_mode, seed_of(seed, "dropout", index)),
        head=lambda: Head(shape, mode, norm=norm_of(shape, blocks_mode) if shape.has_final_layer_norm else None),
    )


def block_of(shape: OPTShape, mode: Mode, seed: int) -> Block:
    """Return a block; `seed` is that of its dropout masks."""
    hidden, bias = shape.hidden_size, shape.enable_bias
    attention = AttentionOptions(bias=bias, out_bias=bias, dropout=shape.attention_dropout)
    return Block(
        mode,
        Attention(shape, mode, attention, seed_of(seed, "attention")),
        FeedForward(mode, hidden, shape.ffn_dim, activation=shape.activation_function, bias=bias),
        (norm_of(shape, mode), norm_of(shape, mode)),
        options=BlockOptions(shape.do_layer_norm_before, shape.dropout, seed),
    )


def norm_of(shape: OPTShape, mode: Mode) -> Norm:
    """Return a LayerNorm over the hidden dim."""
    return mode.norm("layer_norm", shape.hidden_size, eps=EPS, affine=shape.layer_norm_elementwise_affine)


def rows_of(batch: Microbatch) -> Tensor:
    """Return the rows of the table of positions, [B, S], as Hugging Face's OPT does: those of the batch's positions.

    Without them 0, 1, ... count the tokens of each document, and padding has position -1. Positions that begin anew do
    not keep tokens from attending to what is before them: `document_ids` do.
    """
    if batch.position_ids is not None:
        return batch.position_ids + POSITION_OFFSET
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    tokens = mask.cumsum(1)
    if batch.documents is not None:
        starts = torch.arange(batch.length, device=mask.device) - batch.documents.positions
        tokens = tokens - (tokens - mask).gather(1, starts)  # those before the document
    return tokens * mask - 1 + POSITION_OFFSET
