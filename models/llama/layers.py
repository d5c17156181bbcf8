"""Llama, Mistral, Ministral, Qwen2 and Qwen3 as a list of layers: see the papers in `shape.py`."""

from models.attention import Attention, AttentionOptions
from models.layer import Block, BlockOptions, Embed, FeedForward, Head, LayerSpec, layers
from models.llama.shared import SharedShape
from models.rotary import Rotary, RotarySettings
from parallel.layout.rng import seed_of
from parallel.tensor import Mode
from parallel.tensor.norms import Norm


def layers_of(shape: SharedShape, mode: Mode, seed: int) -> list[LayerSpec]:
    """Return all layers of the model: [embedding, block 0 ... n−1, head]."""
    rotary, windows = rotary_of(shape, mode), shape.windows()
    return layers(
        shape,
        embed=lambda: Embed(shape, mode),
        block=lambda index: block_of(shape, mode, rotary, windows[index], seed=seed_of(seed, "dropout", index)),
        head=lambda: Head(shape, mode, norm=norm_of(shape, mode)),
    )


def block_of(shape: SharedShape, mode: Mode, rotary: Rotary, window: int | None, *, seed: int) -> Block:
    """Return a block; `seed` is that of its dropout masks."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    attention = AttentionOptions(
        bias=shape.has_qkv_bias,
        out_bias=shape.has_out_bias,
        dropout=shape.attention_dropout,
        rotary=rotary,
        head_norm=("rms_norm", shape.rms_norm_eps) if shape.has_head_norms else None,
        window=window,
    )
    return Block(
        mode,
        Attention(shape, mode, attention, seed_of(seed, "attention")),
        FeedForward(mode, hidden, inner, activation=shape.hidden_act, bias=shape.has_mlp_bias, gated=True),
        (norm_of(shape, mode), norm_of(shape, mode)),
        options=BlockOptions(),
    )


def norm_of(shape: SharedShape, mode: Mode) -> Norm:
    """Return an RMSNorm over the hidden dim (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return mode.norm("rms_norm", shape.hidden_size, eps=shape.rms_norm_eps)


def rotary_of(shape: SharedShape, mode: Mode) -> Rotary:
    """Return the rotary positions, which all blocks share."""
    settings = RotarySettings(shape.head_size, shape.rope_theta, shape.scaling, shape.max_position_embeddings)
    return Rotary(settings, mode.mesh.device)
