"""A tiny model of every family, under the field names of its Hugging Face config: what the tests of all families share.

The sizes are divided by every layout of `tests.test_parity`. Heads are split by 1, 2, 3 or 4 there: 12 q heads are
divided by all of these, 6 k, v heads by all but 4, for which `fitting` takes 4 k, v heads.
"""

from pathlib import Path
from typing import Any

from tests.parity import PROJECTED, SHAPE, save_model

Fields = dict[str, Any]

BY_FOUR = ("1d4", "a2a2-2d4", "a2a2-2.5d4-depth2")
"""The layouts that split heads by four."""

# Two wavelengths, 6.3 and 63 positions: one is between the limits of 2 and 8 positions, the other is above both.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
# Four frequencies, of which one is kept, one is between, and two are divided. Scores are scaled, too.
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=64)

COMMON: Fields = dict(
    vocab_size=37,  # a prime, which no axis divides
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=12,
    num_key_value_heads=6,
    max_position_embeddings=16,
    # Wavelengths of a few positions: a bias of k, which rotary positions turn, then has a gradient above rounding.
    rope_parameters=dict(rope_type="default", rope_theta=100.0),
)
GPT2: Fields = dict(
    vocab_size=37,
    n_embd=24,
    n_layer=3,
    n_head=12,
    n_positions=16,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)
# q, k and v of 12 heads of 4 elements. The windows end within the six positions of a sample.
LLAMA = COMMON | dict(hidden_size=48, rope_parameters=LLAMA3)
MISTRAL = COMMON | dict(head_dim=8, sliding_window=3)
QWEN2 = COMMON | dict(
    hidden_size=48, use_sliding_window=True, sliding_window=2, max_window_layers=1, tie_word_embeddings=True
)
QWEN3 = COMMON | dict(head_dim=6, tie_word_embeddings=True)

SHAPES: dict[str, Fields] = {
    "opt": SHAPE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gpt2": GPT2,
    # What else a family can be, each under a name that begins with the family's.
    "opt-projected": PROJECTED,
    "llama-yarn": LLAMA
    | dict(
        head_dim=8,
        max_position_embeddings=128,
        rope_parameters=YARN,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "llama-few": LLAMA | dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama-whole": LLAMA | dict(num_key_value_heads=12),
    "mistral-full": MISTRAL | dict(num_key_value_heads=2, sliding_window=None),
    "ministral": MISTRAL | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "qwen2-types": QWEN2
    | dict(
        num_key_value_heads=2,
        head_dim=8,  # a field that Qwen2's config does not have and its model uses
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    ),
    "qwen3-few": QWEN3
    | dict(
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gpt2-untied": GPT2 | dict(n_inner=36, activation_function="relu", tie_word_embeddings=False),
}
FAMILIES = ("opt", "llama", "mistral", "qwen2", "qwen3", "gpt2")
VARIANTS = tuple(name for name in SHAPES if name not in FAMILIES and name != "opt-projected")


def family_of(name: str) -> str:
    """Return the family of one of the `SHAPES`: the model_type of Hugging Face."""
    return name.partition("-")[0]


def fitting(name: str, layout: str) -> Fields:
    """Return the shape for a layout: where it splits heads by four, with four k, v heads in place of six."""
    shape = SHAPES[name]
    return shape | dict(num_key_value_heads=4) if layout in BY_FOUR and shape.get("num_key_value_heads") == 6 else shape


def saved(folder: Path, name: str, layout: str = "single") -> Path:
    """Save the model that fits a layout, once, in a folder of its own in `folder`, and return that."""
    shape = fitting(name, layout)
    path = folder / (name if shape == SHAPES[name] else f"{name}-by-four")
    return path if path.exists() else save_model(path, family_of(name), **shape)
