"""The shape of OPT models, their public tensors, and the published sizes by name. This module needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any

from models.shape import Kept, ModelShape, Names, Normal, Size, Sizes, activation_problems, common_problems
from parallel.config.reader import Natural, Probability, Range

POSITION_OFFSET = 2  # position p has row p + 2 of the table of positions
PADDING_POSITION = -1

DECODER = "model.decoder."


@dataclass(frozen=True)
class OPTShape(ModelShape):
    """Everything in which two OPT models can differ, under Hugging Face's names and with its defaults (OPT-125m)."""

    model_type = "opt"
    architecture = "OPTForCausalLM"
    aliases = MappingProxyType({"_remove_final_layer_norm": "remove_final_layer_norm"})
    may_change = frozenset(("dropout", "attention_dropout", "layerdrop", "init_std", "bos_token_id", "eos_token_id"))
    blocks = f"{DECODER}layers"
    embedding = f"{DECODER}embed_tokens.weight"
    positions = f"{DECODER}embed_positions.weight"
    unused = rf"{DECODER}version"  # a number that the first conversion of OPT left
    first_position = PADDING_POSITION

    vocab_size: Size = 50272
    """The number of token ids. No axis needs to divide it: the embedding is padded."""

    hidden_size: Size = 768
    """The width of the activations between blocks."""

    num_hidden_layers: Annotated[int, Range(1, 1024)] = 12
    """The number of blocks, each of attention and a feed-forward."""

    num_attention_heads: Size = 12
    """The number of attention heads; it divides `hidden_size`."""

    ffn_dim: Size = 3072
    """The width inside the feed-forward."""

    max_position_embeddings: Size = 2048
    """The number of positions that the table of positions has: the longest sequence, in tokens."""

    word_embed_proj_dim: Size | None = None
    """The width of the token embedding; null: `hidden_size`. Where it is another one, as in opt-350m, a projection
    stands after the embedding and another before the head.
    """

    do_layer_norm_before: bool = True
    """True: a LayerNorm stands before attention and before the feed-forward. False, as in opt-350m: after each."""

    remove_final_layer_norm: bool = False
    """True: no LayerNorm stands before the head, as is always so where `do_layer_norm_before` is False."""

    dropout: Probability = 0.1
    """The probability with which an element of the output of attention or of the feed-forward becomes zero in training.
    0: no dropout.
    """

    attention_dropout: Probability = 0.0
    """The same for the probabilities inside attention. Above 0, attention is written out in torch instead of a fused
    kernel, which is slower.
    """

    activation_function: str = "relu"
    """The function inside the feed-forward: relu, gelu, gelu_new, gelu_pytorch_tanh, silu or tanh."""

    enable_bias: bool = True
    """True: linears have biases. The projections beside the embedding never have one."""

    layer_norm_elementwise_affine: bool = True
    """True: LayerNorms have a weight and a bias."""

    init_std: Annotated[float, Range(0)] = 0.02
    """The standard deviation of drawn weights."""

    pad_token_id: Natural | None = 1
    """The token id whose embedding gets no gradient from the lookup, as in Hugging Face's OPT; null: there is none."""

    bos_token_id: Natural | None = 2
    """The id of the token that begins a text. An export carries it; training does not use it."""

    eos_token_id: Natural | tuple[Natural, ...] | None = 2
    """The id of the token that ends a text, or of all that do. An export carries it; texts of a corpus are joined by
    the tokenizer's own.
    """

    layerdrop: Probability = 0.0
    """The probability of skipping a block in training, in Hugging Face's OPT. Only 0 is supported."""

    tie_word_embeddings: bool = True
    """True: the head has the weights of the token embedding. False: it has weights of its own."""

    @property
    def embedding_width(self) -> int:
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """True where a LayerNorm stands before the head."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    def inner_widths(self) -> Mapping[str, int]:
        return {"ffn_dim": self.ffn_dim}

    def widths(self) -> Mapping[str, int]:
        return {**super().widths(), "word_embed_proj_dim": self.embedding_width}

    def problems(self) -> list[str]:
        found = common_problems(self) + activation_problems("activation_function", self.activation_function)
        if self.layerdrop > 0:
            found.append(f"model.layerdrop: {self.layerdrop} is not available. Try 0.0.")
        return found

    # -- tensors

    def first_tensors(self) -> Sizes:
        hidden, width = self.hidden_size, self.embedding_width
        tensors: Sizes = {
            "embed_tokens.weight": (self.vocab_size, width),
            "embed_positions.weight": (self.max_position_embeddings + POSITION_OFFSET, hidden),
        }
        if width != hidden:
            tensors["project_in.weight"] = (hidden, width)
        return {f"{DECODER}{name}": size for name, size in tensors.items()}

    def block_tensors(self, layer: int) -> Sizes:
        hidden, ffn = self.hidden_size, self.ffn_dim
        matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
        tensors: Sizes = {}
        for name, (rows, columns) in {**matrices, "fc1": (ffn, hidden), "fc2": (hidden, ffn)}.items():
            tensors[f"{name}.weight"] = (rows, columns)
            if self.enable_bias:
                tensors[f"{name}.bias"] = (rows,)
        return tensors | self._norm("self_attn_layer_norm") | self._norm("final_layer_norm")

    def last_tensors(self) -> Sizes:
        hidden, width = self.hidden_size, self.embedding_width
        project_out: Sizes = {f"{DECODER}project_out.weight": (width, hidden)} if width != hidden else {}
        return (self._norm(f"{DECODER}final_layer_norm") if self.has_final_layer_norm else {}) | project_out

    def _norm(self, name: str) -> Sizes:
        if not self.layer_norm_elementwise_affine:
            return {}
        return {f"{name}.weight": (self.hidden_size,), f"{name}.bias": (self.hidden_size,)}

    def names(self) -> Names:
        return {
            "embed.table": f"{DECODER}embed_tokens",
            "embed.positions": f"{DECODER}embed_positions",
            "embed.project_in": f"{DECODER}project_in",
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.out": "self_attn.out_proj",
            "attention_norm": "self_attn_layer_norm",
            "feed_forward.up": "fc1",
            "feed_forward.down": "fc2",
            "feed_forward_norm": "final_layer_norm",
            "head.norm": f"{DECODER}final_layer_norm",
            "head.project_out": f"{DECODER}project_out",
            "head.table": "lm_head",
        }

    def initial(self, name: str) -> Normal:
        """Return Hugging Face's initialization: LayerNorm weights are one, biases zero, and matrices normal."""
        if name.endswith(".bias"):
            return Normal()
        return Normal(mean=1.0) if name.endswith("layer_norm.weight") else Normal(std=self.init_std)

    def kept(self) -> Kept:
        """Return what a block keeps for backward: relu keeps its output alone, other activations their input too."""
        hidden, is_relu = self.hidden_size, self.activation_function == "relu"
        inner = 4 * hidden + self.ffn_dim * (1 if is_relu else 2) + self.num_attention_heads
        shared = ("attention.out", "feed_forward.down") if is_relu else ("attention.out",)
        return Kept(4 * hidden, inner, statistics=4, shared=shared)

    # -- config.json

    @classmethod
    def normalized(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields under our names. An embedding as wide as the model stays so if the width is changed.

        A config.json has `_remove_final_layer_norm`; Hugging Face ignores the name without the underscore there.
        """
        is_file = "model_type" in raw
        found = super().normalized(
            {key: value for key, value in raw.items() if not (is_file and key == "remove_final_layer_norm")}
        )
        if "hidden_size" in found and found.get("word_embed_proj_dim") == found["hidden_size"]:
            found["word_embed_proj_dim"] = None
        return found

    def exported(self) -> dict[str, Any]:
        found = asdict(self) | {"word_embed_proj_dim": self.embedding_width}
        found["_remove_final_layer_norm"] = found.pop("remove_final_layer_norm")  # OPTConfig's name
        return found


def _published(layers: int, hidden: int, heads: int) -> OPTShape:
    """Return a row of table 1 of the OPT paper (Zhang et al., 2022, arXiv:2205.01068)."""
    return OPTShape(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_dim=4 * hidden)


SIZES: Mapping[str, OPTShape] = MappingProxyType(
    {
        "opt-tiny": replace(_published(4, 128, 8), vocab_size=260, dropout=0.0),
        "opt-125m": _published(12, 768, 12),
        "opt-350m": replace(_published(24, 1024, 16), word_embed_proj_dim=512, do_layer_norm_before=False),
        "opt-1.3b": _published(24, 2048, 32),
        "opt-2.7b": _published(32, 2560, 32),
        "opt-6.7b": _published(32, 4096, 32),
        "opt-13b": _published(40, 5120, 40),
        "opt-30b": _published(48, 7168, 56),
        "opt-66b": _published(64, 9216, 72),
        "opt-175b": _published(96, 12288, 96),
    }
)
"""The published sizes, and opt-tiny for tests on a CPU."""
