"""The named sizes of Llama, SmolLM2, Mistral, Qwen2.5 and Qwen3: the values of the config.json of each base model.

Two are ours, for tests on a CPU: llama-tiny and qwen3-tiny. This module needs no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from models.llama.rope import RopeScaling
from models.llama.shape import LlamaShape, MistralShape, Qwen2Shape, Qwen3Shape


def _llama_2(layers: int, hidden: int, inner: int, heads: int, groups: int) -> LlamaShape:
    """Return a size of Llama 2 (Touvron et al. 2023, arXiv 2307.09288)."""
    return LlamaShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llama_3(layers: int, hidden: int, inner: int, heads: int) -> LlamaShape:
    """Return a size of Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783, table 3)."""
    return replace(
        _llama_2(layers, hidden, inner, heads, 8),
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def _llama_3_1(shape: LlamaShape, factor: float = 8.0) -> LlamaShape:
    """Return a size of Llama 3 for sequences of 131,072 tokens; `factor` is 32 in Llama 3.2."""
    scaling = RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return replace(shape, max_position_embeddings=131072, rope_scaling=scaling)


def _llama_3_2(layers: int, hidden: int, heads: int, head_dim: int) -> LlamaShape:
    """Return a size of Llama 3.2, whose head is tied."""
    shape = replace(_llama_3(layers, hidden, 8192, heads), head_dim=head_dim, tie_word_embeddings=True)
    return _llama_3_1(shape, factor=32.0)


def _smollm2(layers: int, hidden: int, inner: int, heads: int, groups: int) -> LlamaShape:
    """Return a size of SmolLM2 (Allal et al. 2025, arXiv 2502.02737)."""
    return replace(
        _llama_2(layers, hidden, inner, heads, groups),
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )


def _qwen2_5(layers: int, hidden: int, inner: int, heads: int, groups: int) -> Qwen2Shape:
    """Return a size of Qwen2.5 (Yang et al. 2024, arXiv 2412.15115) of at most 3 billion parameters."""
    return Qwen2Shape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rope_theta=1000000.0,
        sliding_window=32768,
        max_window_layers=layers,
        bos_token_id=151643,
        eos_token_id=151643,
        tie_word_embeddings=True,
    )


def _for_131072(shape: Qwen2Shape) -> Qwen2Shape:
    """Return a size of Qwen2.5 for sequences of 131,072 tokens."""
    return replace(shape, max_position_embeddings=131072, sliding_window=131072)


def _large(shape: Qwen2Shape, *, eps: float) -> Qwen2Shape:
    """Return a size of Qwen2.5 of at least 7 billion parameters: the head is not tied, and tables have more rows."""
    return replace(_for_131072(shape), vocab_size=152064, tie_word_embeddings=False, rms_norm_eps=eps)


def _qwen3(layers: int, hidden: int, inner: int, heads: int, *, tied: bool = False) -> Qwen3Shape:
    """Return a size of Qwen3 (Yang et al. 2025, arXiv 2505.09388, table 1)."""
    return Qwen3Shape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        sliding_window=None,
        max_window_layers=layers,
        bos_token_id=151643,
        eos_token_id=151645,
        tie_word_embeddings=tied,
    )


LLAMA: Mapping[str, LlamaShape] = MappingProxyType(
    {
        "llama-tiny": replace(_llama_2(4, 128, 512, 8, 4), vocab_size=260, max_position_embeddings=2048),
        "llama-2-7b": _llama_2(32, 4096, 11008, 32, 32),
        "llama-2-13b": _llama_2(40, 5120, 13824, 40, 40),
        "llama-2-70b": _llama_2(80, 8192, 28672, 64, 8),
        "llama-3-8b": _llama_3(32, 4096, 14336, 32),
        "llama-3-70b": _llama_3(80, 8192, 28672, 64),
        "llama-3.1-8b": _llama_3_1(_llama_3(32, 4096, 14336, 32)),
        "llama-3.1-70b": _llama_3_1(_llama_3(80, 8192, 28672, 64)),
        "llama-3.1-405b": _llama_3_1(_llama_3(126, 16384, 53248, 128)),
        "llama-3.2-1b": _llama_3_2(16, 2048, 32, 64),
        "llama-3.2-3b": _llama_3_2(28, 3072, 24, 128),
        "smollm2-135m": replace(_smollm2(30, 576, 1536, 9, 3), initializer_range=1 / 24),
        "smollm2-360m": _smollm2(32, 960, 2560, 15, 5),
        "smollm2-1.7b": replace(_smollm2(24, 2048, 8192, 32, 32), rope_theta=130000.0),
    }
)
"""The sizes of Llama, by name."""

MISTRAL: Mapping[str, MistralShape] = MappingProxyType(
    {"mistral-7b": MistralShape(max_position_embeddings=32768, rms_norm_eps=1e-5)}
)
"""The sizes of Mistral, by name. mistral-7b is version 0.1, the one with windows of 4,096 tokens."""

QWEN2: Mapping[str, Qwen2Shape] = MappingProxyType(
    {
        "qwen2.5-0.5b": _qwen2_5(24, 896, 4864, 14, 2),
        "qwen2.5-1.5b": _for_131072(_qwen2_5(28, 1536, 8960, 12, 2)),
        "qwen2.5-3b": _qwen2_5(36, 2048, 11008, 16, 2),
        "qwen2.5-7b": _large(_qwen2_5(28, 3584, 18944, 28, 4), eps=1e-6),
        "qwen2.5-14b": _large(_qwen2_5(48, 5120, 13824, 40, 8), eps=1e-5),
        "qwen2.5-32b": _large(_qwen2_5(64, 5120, 27648, 40, 8), eps=1e-5),
        "qwen2.5-72b": _large(_qwen2_5(80, 8192, 29568, 64, 8), eps=1e-5),
    }
)
"""The sizes of Qwen2.5, by name."""

QWEN3: Mapping[str, Qwen3Shape] = MappingProxyType(
    {
        "qwen3-tiny": replace(
            _qwen3(4, 128, 448, 8, tied=True),
            vocab_size=260,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
        "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
        "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
        "qwen3-8b": _qwen3(36, 4096, 12288, 32),
        "qwen3-14b": _qwen3(40, 5120, 17408, 40),
        "qwen3-32b": _qwen3(64, 5120, 25600, 64),
    }
)
"""The sizes of Qwen3, by name."""
