"""The `model` section of a config: which OPT, and what is different about it."""

from dataclasses import dataclass
from typing import Annotated

from parallel.config.reader import Natural, PathText, Probability, Range

Size = Annotated[int, Range(1, 2**28)]
"""A dimension of a tensor: with two of them torch can still count a tensor's bytes."""


@dataclass(frozen=True)
class ModelConfig:
    """The section `model`: a named size of OPT or a Hugging Face directory, and what to change in it.

    The fields after `path` have Hugging Face's names (OPTConfig). None, their default, takes the value of the named
    model or of the directory. Hugging Face's spelling `_remove_final_layer_norm` is read too.
    """

    name: str = "opt-tiny"
    """opt-tiny (1.1 million parameters, for tests on a CPU), or a size of the OPT paper (Zhang et al. 2022, arXiv
    2205.01068, table 1): opt-125m, -350m, -1.3b, -2.7b, -6.7b, -13b, -30b, -66b, -175b. Not used if `path` is given.
    """

    path: PathText | None = None
    """A directory in Hugging Face's format: its config.json gives the shape, and its safetensors, if there are any, the
    weights. None: the shape of `name`, with weights drawn from `train.seed`.
    """

    vocab_size: Size | None = None
    """The number of token ids. No axis needs to divide it: the embedding is padded."""

    hidden_size: Size | None = None
    """The width of the activations between blocks."""

    num_hidden_layers: Annotated[int, Range(1, 1024)] | None = None
    """The number of blocks, each of attention and a feed-forward."""

    num_attention_heads: Size | None = None
    """The number of attention heads; it divides `hidden_size`."""

    ffn_dim: Size | None = None
    """The width inside the feed-forward."""

    max_position_embeddings: Size | None = None
    """The number of positions that the position table has: the longest sequence, in tokens."""

    word_embed_proj_dim: Size | None = None
    """The width of the token embedding. Where it is not `hidden_size`, as in opt-350m, a projection stands after the
    embedding and another before the head.
    """

    do_layer_norm_before: bool | None = None
    """True: a LayerNorm stands before attention and before the feed-forward. False, as in opt-350m: after each."""

    remove_final_layer_norm: bool | None = None
    """True: no LayerNorm stands before the head, as is always so where `do_layer_norm_before` is False."""

    dropout: Probability | None = None
    """The probability with which an element of the output of attention or of the feed-forward becomes zero in training.
    0: no dropout.
    """

    attention_dropout: Probability | None = None
    """The same for the probabilities inside attention. Above 0, attention is written out in torch instead of a fused
    kernel, which is slower.
    """

    activation_function: str | None = None
    """The function inside the feed-forward: relu, gelu, gelu_new, silu or tanh."""

    enable_bias: bool | None = None
    """True: linears have biases. The projections beside the embedding never have one."""

    layer_norm_elementwise_affine: bool | None = None
    """True: LayerNorms have a weight and a bias."""

    init_std: Annotated[float, Range(0)] | None = None
    """The standard deviation of drawn weights."""

    pad_token_id: Natural | None = None
    """The token id whose embedding gets no gradient from the lookup, as in Hugging Face's OPT."""

    bos_token_id: Natural | None = None
    """The id of the token that begins a text. An export carries it; training does not use it."""

    eos_token_id: Natural | None = None
    """The id of the token that ends a text. An export carries it; training does not use it."""

    layerdrop: Probability | None = None
    """The probability of skipping a block in training, in Hugging Face's OPT. Only 0 is supported."""

    tie_word_embeddings: bool | None = None
    """True: the head has the weights of the token embedding. False: it has weights of its own."""
