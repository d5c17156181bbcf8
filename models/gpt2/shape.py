"""The shape of GPT-2 models, their public tensors, and the published sizes by name. This module needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import Annotated

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
from parallel.layout.sources import Source, fused, joined, transposed, whole


@dataclass(frozen=True)
class GPT2Shape(ModelShape):
    """Everything in which two GPT-2 models can differ, under Hugging Face's names and with its defaults (gpt2)."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    aliases = MappingProxyType(
        {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }
    )
    only = MappingProxyType(
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
            "pruned_heads": ({}, None),
            **EVERY_FAMILY,
        }
    )
    may_change = frozenset(
        (
            *("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range"),
            *("bos_token_id", "eos_token_id", "pad_token_id"),
            *("summary_type", "summary_use_proj", "summary_activation"),
            *("summary_proj_to_labels", "summary_first_dropout"),
        )
    )
    base = "transformer."
    blocks = "transformer.h"
    embedding = "transformer.wte.weight"
    positions = "transformer.wpe.weight"
    unused = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"  # masks, which older versions of transformers saved
    padding_row = None  # of which Hugging Face's GPT-2 has none, whatever `pad_token_id` is

    vocab_size: Size = 50257
    """The number of token ids. No axis needs to divide it: the embedding is padded."""

    n_positions: Size = 1024
    """The number of positions that the position table has: the longest sequence, in tokens."""

    n_embd: Size = 768
    """The width of the activations between blocks, and of the embedding."""

    n_layer: Annotated[int, Range(1, 1024)] = 12
    """The number of blocks, each of attention and a feed-forward."""

    n_head: Size = 12
    """The number of attention heads; it divides `n_embd`."""

    n_inner: Size | None = None
    """The width inside the feed-forward; None: 4 · `n_embd`."""

    activation_function: str = "gelu_new"
    """The function inside the feed-forward: relu, gelu, gelu_new, gelu_pytorch_tanh, silu or tanh."""

    resid_pdrop: Probability = 0.1
    """The probability with which an element of the output of attention or of the feed-forward becomes zero in training.
    0: no dropout.
    """

    embd_pdrop: Probability = 0.1
    """The same for the sum of the token's and the position's embedding."""

    attn_pdrop: Probability = 0.1
    """The same for the probabilities inside attention. Above 0, attention is written out in torch instead of a fused
    kernel, which is slower.
    """

    layer_norm_epsilon: Annotated[float, Range(0)] = 1e-5
    """The number that LayerNorms add to the variance."""

    initializer_range: Annotated[float, Range(0)] = 0.02
    """The standard deviation of drawn weights; that of the two matrices of a block that lead back to the residual
    stream is 1/√(2 · `n_layer`) of it.
    """

    summary_type: str = "cls_index"
    """This and the next four describe a classifier's head. An export carries them; training does not use them."""

    summary_use_proj: bool = True
    """See `summary_type`."""

    summary_activation: str | None = None
    """See `summary_type`."""

    summary_proj_to_labels: bool = True
    """See `summary_type`."""

    summary_first_dropout: Probability = 0.1
    """See `summary_type`."""

    bos_token_id: Natural | None = 50256
    """The id of the token that begins a text. An export carries it; training does not use it."""

    eos_token_id: Natural | tuple[Natural, ...] | None = 50256
    """The id of the token that ends a text, or several ids. An export carries it; training does not use it."""

    pad_token_id: Natural | None = None
    """The id of the token that fills up texts. An export carries it; training does not use it."""

    tie_word_embeddings: bool = True
    """True: the head has the weights of the token embedding. False: it has weights of its own."""

    # -- sizes

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @property
    def inner(self) -> int:
        """The width inside the feed-forward."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def inner_widths(self) -> Mapping[str, int]:
        return {"n_inner": self.inner}

    def problems(self) -> list[str]:
        return common_problems(self) + activation_problems("activation_function", self.activation_function)

    # -- tensors

    def first_tensors(self) -> Sizes:
        return {self.embedding: (self.vocab_size, self.n_embd), self.positions: (self.n_positions, self.n_embd)}

    def block_tensors(self, layer: int) -> Sizes:
        """Return the tensors of a block. Matrices are [inputs, outputs], transposed; q, k and v stand side by side."""
        hidden, inner = self.n_embd, self.inner
        return {
            **_norm("ln_1", hidden),
            **_linear("attn.c_attn", hidden, 3 * hidden),
            **_linear("attn.c_proj", hidden, hidden),
            **_norm("ln_2", hidden),
            **_linear("mlp.c_fc", hidden, inner),
            **_linear("mlp.c_proj", inner, hidden),
        }

    def last_tensors(self) -> Sizes:
        return _norm("transformer.ln_f", self.n_embd)

    def names(self) -> Names:
        return {
            "embed.table": "transformer.wte",
            "embed.positions": "transformer.wpe",
            "attention_norm": "ln_1",
            "attention.qkv": "attn.c_attn",
            "attention.out": "attn.c_proj",
            "feed_forward_norm": "ln_2",
            "feed_forward.up": "mlp.c_fc",
            "feed_forward.down": "mlp.c_proj",
            "head.norm": "transformer.ln_f",
            "head.table": "lm_head",
        }

    def sources_of(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> tuple[Source, ...]:
        """Return the source of a parameter, or the three of q, k and v, which are parts of one public tensor."""
        (name,), (shape,) = names, shapes
        if not name.startswith(self.blocks):
            return whole(name, shape)
        rows, *columns = shape[::-1]  # of a matrix as we have it, [N, K]; a vector is [N]
        if ".c_attn." in name:
            return transposed(joined(name, fused([name] * 3, (rows // 3, *columns))))
        return transposed(whole(name, (rows, *columns)))

    def initial(self, name: str) -> Normal:
        """Return the distribution from which a public tensor is drawn: matrices are normal, biases zero, norms one."""
        if name.endswith(".bias"):
            return Normal()
        if ".ln_" in name:
            return Normal(mean=1.0)
        scale = 1 / sqrt(2 * self.n_layer) if name.endswith(".c_proj.weight") else 1.0
        return Normal(std=self.initializer_range * scale)

    # -- what it costs

    def kept(self) -> Kept:
        """Return what a block keeps for backward: of an activation other than relu the input, too."""
        is_relu = self.activation_function == "relu"
        inner = 4 * self.n_embd + (1 if is_relu else 2) * self.inner + self.n_head
        shared = ("attention.out", "feed_forward.down") if is_relu else ("attention.out",)
        return Kept(4 * self.n_embd, inner, statistics=4, shared=shared)


def _linear(name: str, inputs: int, outputs: int) -> Sizes:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def _norm(name: str, hidden: int) -> Sizes:
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}


def _size(layers: int, hidden: int, heads: int) -> GPT2Shape:
    return GPT2Shape(n_layer=layers, n_embd=hidden, n_head=heads)


SIZES: Mapping[str, GPT2Shape] = MappingProxyType(
    {
        "gpt2-tiny": GPT2Shape(
            vocab_size=260,  # the byte tokenizer's
            n_layer=4,
            n_embd=128,
            n_head=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=2,
            eos_token_id=2,
        ),
        "gpt2": _size(12, 768, 12),
        "gpt2-medium": _size(24, 1024, 16),
        "gpt2-large": _size(36, 1280, 20),
        "gpt2-xl": _size(48, 1600, 25),
    }
)
"""The sizes of the paper, and gpt2-tiny for CPUs."""
