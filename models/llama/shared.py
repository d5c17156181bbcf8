"""The fields and tensors that Llama, Mistral, Ministral, Qwen2 and Qwen3 share. This module needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Annotated, Any

from models.llama.rope import RopeScaling, normalized_rope
from models.shape import (
    EVERY_FAMILY,
    Kept,
    ModelShape,
    Names,
    Normal,
    Size,
    Sizes,
    activation_problems,
    common_problems,
)
from parallel.config.reader import Natural, Probability, Range

NO_SCALING = RopeScaling()


@dataclass(frozen=True)
class SharedShape(ModelShape):
    """The fields that all of these families have, with Llama's defaults, and what follows from them in the same way."""

    only = MappingProxyType({"partial_rotary_factor": (1.0,), **EVERY_FAMILY})
    may_change = frozenset(
        ("attention_dropout", "initializer_range", "bos_token_id", "eos_token_id", "use_cache", "pretraining_tp")
    )
    embedding = "model.embed_tokens.weight"
    unused = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # what older versions of transformers saved

    vocab_size: Size = 32000
    """The number of token ids. No axis needs to divide it: the embedding is padded."""

    hidden_size: Size = 4096
    """The width of the activations between blocks."""

    intermediate_size: Size = 11008
    """The width inside the feed-forward."""

    num_hidden_layers: Annotated[int, Range(1, 1024)] = 32
    """The number of blocks, each of attention and a feed-forward."""

    num_attention_heads: Size = 32
    """The number of q heads."""

    num_key_value_heads: Size | None = None
    """The number of k, v heads; it divides that of the q heads. None: as many."""

    head_dim: Size | None = None
    """The width of a head. None: `hidden_size` / `num_attention_heads`."""

    hidden_act: str = "silu"
    """The function of the feed-forward's gate: silu, gelu, gelu_new, gelu_pytorch_tanh, relu or tanh."""

    max_position_embeddings: Size = 2048
    """The longest sequence, in tokens, if `rope_scaling` allows no longer one."""

    initializer_range: Annotated[float, Range(0)] = 0.02
    """The standard deviation of drawn weights."""

    rms_norm_eps: Annotated[float, Range(0)] = 1e-6
    """The number that is added to the mean square in every RMSNorm."""

    use_cache: bool = True
    """An export carries it; training does not use it."""

    pad_token_id: Natural | None = None
    """The token of which the embedding begins as zero and gets no gradient from the lookup. None: there is none."""

    bos_token_id: Natural | None = None
    """The id of the token that begins a text. An export carries it; training does not use it."""

    eos_token_id: Natural | tuple[Natural, ...] | None = None
    """The id of the token that ends a text, or of all that do. An export carries it; training does not use it."""

    tie_word_embeddings: bool = False
    """True: the head has the weights of the token embedding. False: it has weights of its own."""

    rope_theta: Annotated[float, Range(1)] = 10000.0
    """The base of the wave lengths of the rotary positions."""

    rope_scaling: RopeScaling | None = None
    """The change of their angles for long sequences: dict(rope_type=..., factor=..., ...). None: there is none."""

    attention_dropout: Probability = 0.0
    """The probability with which an attention probability becomes zero in training. Above 0, attention is written out
    in torch instead of a fused kernel, which is slower.
    """

    # -- in what the families differ

    @property
    def has_qkv_bias(self) -> bool:
        """True if the linears of q, k and v have a bias."""
        return False

    @property
    def has_out_bias(self) -> bool:
        """True if the linear after attention has a bias."""
        return False

    @property
    def has_mlp_bias(self) -> bool:
        """True if the linears of the feed-forward have a bias."""
        return False

    @property
    def has_head_norms(self) -> bool:
        """True if q and k of each head go through an RMSNorm before they are turned."""
        return False

    def windows(self) -> list[int | None]:
        """Return, for each block, how many keys a query sees, itself included; None: all earlier ones."""
        return [None] * self.num_hidden_layers

    # -- sizes

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """The width of the q heads together. It may differ from the hidden size."""
        return self.num_attention_heads * self.head_size

    @property
    def scaling(self) -> RopeScaling:
        """The change of the rotary positions; of the kind default where there is none."""
        return self.rope_scaling or NO_SCALING

    @property
    def max_positions(self) -> int:
        return self.scaling.max_positions(self.max_position_embeddings)

    def inner_widths(self) -> Mapping[str, int]:
        return {"intermediate_size": self.intermediate_size}

    def widths(self) -> Mapping[str, int]:
        width = self.attention_width
        other = {} if width == self.hidden_size else {"num_attention_heads × head_dim": width}
        return {**super().widths(), **other}

    def problems(self) -> list[str]:
        found = common_problems(self, derives_head_size=self._must_divide_hidden)
        if not found and self.head_size % 2:
            found.append(
                f"model.head_dim: rotary positions turn pairs, but a head has {self.head_size} elements."
                f" Try {self.head_size + 1}."
            )
        if self.head_size == 2 and self.scaling.rope_type == "dynamic":  # its exponent is D / (D − 2)
            found.append("model.rope_scaling.rope_type: 'dynamic' needs heads of at least 4 elements. Try 'linear'.")
        if self.rope_theta == 1 and self.scaling.rope_type == "yarn":  # all pairs turn alike, and none is between
            found.append("model.rope_theta: rope_type 'yarn' needs more than 1. Try 10000.0.")
        return found + activation_problems("hidden_act", self.hidden_act) + self.scaling.problems()

    @property
    def _must_divide_hidden(self) -> bool:
        return self.head_dim is None

    def change_problems(self, changes: Mapping[str, Any]) -> list[str]:
        """Return a line for rotary parameters without a kind: they replace all of the model's, its kind too."""
        kind = self.scaling.rope_type
        return [
            f"model.{key}: it has no rope_type, and the model's own is {kind!r}. Write rope_type={kind!r} with all of"
            " its parameters, or rope_type='default' for no scaling."
            for key in ("rope_parameters", "rope_scaling")
            if kind != "default" and isinstance(given := changes.get(key), Mapping) and given
            if not {"rope_type", "type"} & given.keys()
        ]

    # -- tensors

    def first_tensors(self) -> Sizes:
        return {self.embedding: (self.vocab_size, self.hidden_size)}

    def block_tensors(self, layer: int) -> Sizes:
        hidden, inner = self.hidden_size, self.intermediate_size
        width, kv_width = self.attention_width, self.num_kv_heads * self.head_size
        head_norms = ("self_attn.q_norm.weight", "self_attn.k_norm.weight") if self.has_head_norms else ()
        return {
            **_linear("self_attn.q_proj", width, hidden, bias=self.has_qkv_bias),
            **_linear("self_attn.k_proj", kv_width, hidden, bias=self.has_qkv_bias),
            **_linear("self_attn.v_proj", kv_width, hidden, bias=self.has_qkv_bias),
            **_linear("self_attn.o_proj", hidden, width, bias=self.has_out_bias),
            **dict.fromkeys(head_norms, (self.head_size,)),
            **_linear("mlp.gate_proj", inner, hidden, bias=self.has_mlp_bias),
            **_linear("mlp.up_proj", inner, hidden, bias=self.has_mlp_bias),
            **_linear("mlp.down_proj", hidden, inner, bias=self.has_mlp_bias),
            **dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,)),
        }

    def last_tensors(self) -> Sizes:
        return {"model.norm.weight": (self.hidden_size,)}

    def names(self) -> Names:
        return {
            "embed.table": "model.embed_tokens",
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.out": "self_attn.o_proj",
            "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm",
            "attention_norm": "input_layernorm",
            "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
            "feed_forward.down": "mlp.down_proj",
            "feed_forward_norm": "post_attention_layernorm",
            "head.norm": "model.norm",
            "head.table": "lm_head",
        }

    def initial(self, name: str) -> Normal:
        if name.endswith("norm.weight"):
            return Normal(mean=1.0)
        return Normal() if name.endswith(".bias") else Normal(std=self.initializer_range)

    # -- costs

    def kept(self) -> Kept:
        """Return what a block keeps for backward.

        Between blocks these are the inputs of both norms and of the linears after them. Inside there are q and k,
        turned, v and the output of attention, and a logsumexp for each head; gate, up and their product. Norms of q and
        k keep their inputs and a statistic for each head.
        """
        heads, groups, size = self.num_attention_heads, self.num_kv_heads, self.head_size
        inner = (2 * heads + 2 * groups) * size + heads + 3 * self.intermediate_size
        if self.has_head_norms:
            inner += (heads + groups) * (size + 1)
        return Kept(4 * self.hidden_size, inner, statistics=2)

    def spans(self, sequence_length: int) -> list[int]:
        return [min(sequence_length, window or sequence_length) for window in self.windows()]

    # -- config.json

    @classmethod
    def normalized(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields under the names of this dataclass. Raises ConfigError, see `rope.normalized_rope`."""
        return normalized_rope(super().normalized(raw))

    def exported(self) -> dict[str, Any]:
        ends = self.eos_token_id
        return asdict(self) | {
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
            "rope_scaling": self.scaling.exported(self.max_position_embeddings),
        }


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Sizes:
    weight: Sizes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight
