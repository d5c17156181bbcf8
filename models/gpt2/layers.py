"""GPT-2 (Radford et al. 2019) as a list of layers."""

import torch
from torch import Tensor

from models.attention import Attention, AttentionOptions
from models.gpt2.shape import GPT2Shape
from models.layer import (
    Block,
    BlockOptions,
    Embed,
    FeedForward,
    Head,
    LayerSpec,
    LearnedPositions,
    layers,
)
from parallel.layout.rng import seed_of
from parallel.pipeline.microbatch import Microbatch
from parallel.tensor import Mode
from parallel.tensor.norms import Norm


def layers_of(shape: GPT2Shape, mode: Mode, seed: int) -> list[LayerSpec]:
    """Return all layers of the model: [embedding, block 0 ... n−1, head]."""
    positions = LearnedPositions(shape.n_positions, rows_of)
    seed_of_embeddings = seed_of(seed, "dropout", "embeddings")
    return layers(
        shape,
        embed=lambda: Embed(shape, mode, positions=positions, dropout_p=shape.embd_pdrop, seed=seed_of_embeddings),
        block=lambda index: block_of(shape, mode, seed_of(seed, "dropout", index)),
        head=lambda: Head(shape, mode, norm=norm_of(shape, mode)),
    )


def block_of(shape: GPT2Shape, mode: Mode, seed: int) -> Block:
    """Return a block; `seed` is that of its dropout masks."""
    attention = AttentionOptions(bias=True, out_bias=True, dropout=shape.attn_pdrop)
    return Block(
        mode,
        Attention(shape, mode, attention, seed_of(seed, "attention")),
        FeedForward(mode, shape.n_embd, shape.inner, activation=shape.activation_function, bias=True),
        (norm_of(shape, mode), norm_of(shape, mode)),
        options=BlockOptions(dropout=shape.resid_pdrop, seed=seed),
    )


def norm_of(shape: GPT2Shape, mode: Mode) -> Norm:
    """Return a LayerNorm over the hidden dim."""
    return mode.norm("layer_norm", shape.n_embd, eps=shape.layer_norm_epsilon)


def rows_of(batch: Microbatch) -> Tensor:
    """Return the rows of the table of positions, [B, S]: the batch's positions, else 0, 1, ... of each document.

    They count padding, too, as in Hugging Face's GPT-2.
    """
    if batch.columns is not None:
        return batch.columns
    return torch.arange(batch.length, device=batch.input_ids.device).expand_as(batch.input_ids)
