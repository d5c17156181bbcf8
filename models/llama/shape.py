"""The shapes of Llama, Mistral, Ministral, Qwen2 and Qwen3: what each adds to `shared.py`. This module needs no torch.

The fields are those of Hugging Face's configs in transformers 5, with their names and defaults, but for the rotary
positions: `rope_theta` and `rope_scaling` have the names of transformers 4, see `rope.py`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from models.llama.shared import SharedShape
from models.shape import Size
from parallel.config.reader import Natural
from parallel.errors import did_you_mean, shown

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class AttentionBias:
    """The field of families in which all linears of attention have a bias, or none. It stands before the shape."""

    attention_bias: bool = False
    """True: the linears of attention have a bias."""

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def has_out_bias(self) -> bool:
        return self.attention_bias


@dataclass(frozen=True)
class LlamaShape(AttentionBias, SharedShape):
    """Llama 2, 3, 3.1, 3.2, and others of the same architecture, such as SmolLM2."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    bos_token_id: Natural | None = 1
    eos_token_id: Natural | tuple[Natural, ...] | None = 2

    mlp_bias: bool = False
    """True: the linears of the feed-forward have a bias."""

    pretraining_tp: Natural | None = 1
    """An export carries it; training does not use it."""

    @property
    def has_mlp_bias(self) -> bool:
        return self.mlp_bias

    @property
    def _must_divide_hidden(self) -> bool:
        return True  # Hugging Face's LlamaConfig refuses others, also where it has head_dim


@dataclass(frozen=True)
class WindowedShape(SharedShape):
    """The fields of families in which some blocks have a sliding window, and what follows from them."""

    sliding_window: Size | None = 4096
    """The number of keys that a query sees in a block with a window, its own among them. None: all before it."""

    layer_types: tuple[str, ...] | None = None
    """The kind of attention of each block, full_attention or sliding_attention. None: the other fields say it."""

    @classmethod
    @abstractmethod
    def kinds_of(cls, found: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the kind of attention of each block, of a config with these fields and no `layer_types`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each block."""
        return self.kinds_of(asdict(self)) if self.layer_types is None else self.layer_types

    def windows(self) -> list[int | None]:
        return [self.sliding_window if kind == SLIDING else None for kind in self.kinds]

    def problems(self) -> list[str]:
        return super().problems() + self._window_problems()

    def _window_problems(self) -> list[str]:
        if unknown := [kind for kind in self.kinds if kind not in (FULL, SLIDING)]:
            hint = did_you_mean(unknown[0], (FULL, SLIDING))
            return [f"model.layer_types: {shown(unknown[0])} is not available. {hint}"]
        if len(self.kinds) != self.num_hidden_layers:
            return [
                f"model.layer_types: it has {len(self.kinds)} entries, but model.num_hidden_layers is"
                f" {self.num_hidden_layers}. Try None."
            ]
        if SLIDING in self.kinds and self.sliding_window is None:
            return [f"model.sliding_window: None is no window, but some blocks have {SLIDING}. Try 4096."]
        return []

    @classmethod
    def normalized(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields under the names of this dataclass.

        The files of transformers 5 write `layer_types` out. Where they are those that other fields give anyway, they
        are left out, so that a run may change `num_hidden_layers` alone.
        """
        found = super().normalized(raw)
        types = found.get("layer_types")
        if "model_type" in raw and isinstance(types, list | tuple):
            known = {key.name: key.default for key in fields(cls)} | found
            try:
                if known["num_hidden_layers"] == len(types) and tuple(types) == cls.kinds_of(known):
                    del found["layer_types"]
            except TypeError:  # of fields that the reader will refuse
                return found
        return found

    def exported(self) -> dict[str, Any]:
        return super().exported() | {"layer_types": list(self.kinds)}


@dataclass(frozen=True)
class MistralShape(WindowedShape):
    """Mistral: Llama with fewer k, v heads and a sliding window (Jiang et al. 2023, arXiv 2310.06825).

    With `layer_types` its blocks differ. Hugging Face's `AutoModel` reads such a config as a Ministral's, and an export
    says that it is one.
    """

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    intermediate_size: Size = 14336
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 4096 * 32
    bos_token_id: Natural | None = 1
    eos_token_id: Natural | tuple[Natural, ...] | None = 2

    @classmethod
    def kinds_of(cls, found: Mapping[str, Any]) -> tuple[str, ...]:
        kind = FULL if found["sliding_window"] is None else SLIDING
        return tuple(kind for _ in range(found["num_hidden_layers"]))

    def exported(self) -> dict[str, Any]:
        """Return a Ministral's fields where there are `layer_types`, and a Mistral's where no block has a window.

        Hugging Face's Ministral does not run without a `sliding_window`.
        """
        found = super().exported()
        types = found.pop("layer_types")
        is_ministral = self.layer_types is not None or self.model_type == MinistralShape.model_type
        if not is_ministral or self.sliding_window is None:
            return found | {"model_type": MistralShape.model_type, "architectures": [MistralShape.architecture]}
        kind = MinistralShape
        return found | {"layer_types": types, "model_type": kind.model_type, "architectures": [kind.architecture]}


@dataclass(frozen=True)
class MinistralShape(MistralShape):
    """Ministral: a Mistral in which some blocks may have a window and others not."""

    model_type = "ministral"
    architecture = "MinistralForCausalLM"


@dataclass(frozen=True)
class QwenShape(WindowedShape):
    """The fields that Qwen2 and Qwen3 have in common, and the windows of their blocks."""

    vocab_size: Size = 151936
    intermediate_size: Size = 22016
    num_key_value_heads: Size | None = 32
    max_position_embeddings: Size = 32768

    use_sliding_window: bool = False
    """True: some blocks have a sliding window. `sliding_window` is used then only."""

    max_window_layers: Natural = 28
    """The number of blocks at the beginning that have no window. Used where `layer_types` is None."""

    @classmethod
    def kinds_of(cls, found: Mapping[str, Any]) -> tuple[str, ...]:
        count, first = found["num_hidden_layers"], found["max_window_layers"]
        has_windows = found["use_sliding_window"]
        return tuple(SLIDING if has_windows and layer >= first else FULL for layer in range(count))

    def _window_problems(self) -> list[str]:
        if SLIDING in self.kinds and not self.use_sliding_window:
            return [
                f"model.layer_types: it has {SLIDING}, but model.use_sliding_window is False. Try"
                " model.use_sliding_window=True."
            ]
        if self.use_sliding_window and self.sliding_window is None:
            return ["model.sliding_window: None is no window, but model.use_sliding_window is True. Try 4096."]
        return super()._window_problems()


@dataclass(frozen=True)
class Qwen2Shape(QwenShape):
    """Qwen2 and Qwen2.5: Llama with biases of q, k and v (Yang et al. 2024, arXiv 2407.10671).

    Hugging Face's config has no `head_dim`, but its model uses one that a file has.
    """

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    @property
    def has_qkv_bias(self) -> bool:
        return True


@dataclass(frozen=True)
class Qwen3Shape(AttentionBias, QwenShape):
    """Qwen3: norms of q and k in each head, and a head size of its own (Yang et al. 2025, arXiv 2505.09388)."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"

    head_dim: Size | None = 128

    @property
    def has_head_norms(self) -> bool:
        return True
