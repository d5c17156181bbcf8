"""The sizes of a model, and what follows from them in every family. This module needs no torch.

A family's own dataclass has the fields of its Hugging Face config, with the same names and defaults. What the rest of
the code asks of a model has one name in all families, the properties and methods of `ModelShape`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, TypeAlias

from parallel.config.reader import Range
from parallel.errors import ModelError, did_you_mean, divisors, either, nearest, shown
from parallel.layout.sources import Source, fused, grouped, whole

Size = Annotated[int, Range(1, 2**28)]
"""A dimension of a tensor: with two of them torch can still count a tensor's bytes."""

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "tanh")
"""Hugging Face's names of the functions that a feed-forward may have."""

Names: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""The public name of each of our modules, or the names of those that are fused into one parameter."""

Sizes: TypeAlias = dict[str, tuple[int, ...]]
"""The shapes of tensors by their public names, in order."""


EVERY_FAMILY: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "is_causal": (True,),
        "per_layer_config": ({}, None),
        "transformers_weights": (None, "model.safetensors"),
    }
)
"""Fields that Hugging Face reads in the config of any family, with the values that are supported: attention that sees
later tokens, blocks with sizes of their own, and the name of the file of the weights.
"""


@dataclass(frozen=True)
class Normal:
    """The distribution from which a tensor is drawn; with std 0 all of its elements are `mean`."""

    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class Kept:
    """The elements that a block keeps for backward, for each token: O, I and N of docs/notation.md."""

    outer: int
    """Elements of tensors between blocks, [B, S, H_hidden]: the inputs of norms and of linears into the block."""

    inner: int
    """Elements of tensors inside the block, split as heads and the feed-forward are."""

    statistics: int
    """Statistics of norms over the hidden dim: a LayerNorm has two, an RMSNorm one."""

    shared: tuple[str, ...] = ("attention.out",)
    """Our names of the linears whose input something else keeps too, as it is: in 8 bits a linear keeps a copy."""


@dataclass(frozen=True)
class ModelShape(ABC):
    """The sizes of a model. A family's frozen dataclass derives from this.

    Hugging Face's names are used: where a family's config calls a size otherwise (GPT-2's n_embd), the family has a
    property of the common name.
    """

    model_type: ClassVar[str]
    """Hugging Face's name of the family."""

    architecture: ClassVar[str]
    """Hugging Face's class of the model with its head."""

    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Other spellings of fields that a config may have, by the spelling."""

    only: ClassVar[Mapping[str, tuple[Any, ...]]] = EVERY_FAMILY
    """Fields of the family's Hugging Face config of which only some values are supported; other values are refused."""

    may_change: ClassVar[frozenset[str]]
    """The fields that may differ between a checkpoint and the run that resumes it: the weights fit both."""

    base: ClassVar[str] = "model."
    """The prefix of public names, which files lack that a model without its head has written."""

    blocks: ClassVar[str] = "model.layers"
    """The public name of the list of blocks; block 3's tensors begin with model.layers.3."""

    head: ClassVar[str] = "lm_head.weight"
    """The public name of the head's table where it is not tied."""

    unused: ClassVar[str] = r"(?!)"
    """A pattern of the public tensors that files may have and the model does not use."""

    # -- sizes

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """The width of the activations between blocks."""

    @property
    @abstractmethod
    def num_hidden_layers(self) -> int:
        """The number of blocks."""

    @property
    @abstractmethod
    def num_attention_heads(self) -> int:
        """The number of q heads."""

    @property
    @abstractmethod
    def max_position_embeddings(self) -> int:
        """The longest sequence that the model was made for."""

    @property
    @abstractmethod
    def tie_word_embeddings(self) -> bool:
        """True where the head has the weights of the token embedding."""

    @property
    @abstractmethod
    def pad_token_id(self) -> int | None:
        """The token that fills up texts."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""

    @property
    @abstractmethod
    def eos_token_id(self) -> int | tuple[int, ...] | None:
        """The token that ends a text, or all tokens that do."""

    @property
    def padding_row(self) -> int | None:
        """The token of which the embedding begins as zero and gets no gradient from the lookup; None: there is none."""
        return self.pad_token_id

    @property
    def num_kv_heads(self) -> int:
        """The number of k, v heads, each of which serves equally many q heads."""
        return self.num_attention_heads

    @property
    def head_size(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """The width of the token embedding. Where it is not the hidden size, a projection stands after it."""
        return self.hidden_size

    @property
    def max_positions(self) -> int:
        """The longest sequence that a run may have."""
        return self.max_position_embeddings

    @property
    def first_position(self) -> int:
        """The smallest position id that a batch may have."""
        return 0

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        ends = self.eos_token_id
        return ends if isinstance(ends, tuple) else () if ends is None else (ends,)

    @classmethod
    def field(cls, common: str) -> str:
        """Return this family's own name of a size that has a common name."""
        return cls.aliases.get(common, common)

    def with_fields(self, **changes: Any) -> Self:
        """Return the shape with other values of fields of its family."""
        return replace(self, **changes)

    def change_problems(self, changes: Mapping[str, Any]) -> list[str]:
        """Return why fields that the section `model` sets over these are unclear, a line each."""
        return []

    # -- how a layout may split it

    def heads(self) -> Mapping[str, int]:
        """Return the counts of heads that the axes of heads must divide, by the field that a message names.

        Where q heads share k, v heads a rank has whole groups.
        """
        if self.num_kv_heads == self.num_attention_heads:
            return {self.field("num_attention_heads"): self.num_attention_heads}
        return {self.field("num_key_value_heads"): self.num_kv_heads}

    @abstractmethod
    def inner_widths(self) -> Mapping[str, int]:
        """Return the widths inside a block, besides the heads: all that mode 1d splits."""

    def widths(self) -> Mapping[str, int]:
        """Return all widths that the grid's and the cube's axes must divide."""
        return {self.field("hidden_size"): self.hidden_size, **self.inner_widths()}

    @abstractmethod
    def problems(self) -> list[str]:
        """Return what is wrong with the model in every layout, a line each."""

    # -- tensors

    @abstractmethod
    def first_tensors(self) -> Sizes:
        """Return the public tensors before the blocks: the embeddings."""

    @abstractmethod
    def block_tensors(self, layer: int) -> Sizes:
        """Return the public tensors of a block, without the prefix that numbers it."""

    @abstractmethod
    def last_tensors(self) -> Sizes:
        """Return the public tensors after the blocks, besides the head's table."""

    def public_tensors(self) -> Sizes:
        """Return every public tensor of the model; a tied table is there once, as the embedding."""
        found = self.first_tensors()
        for layer in range(self.num_hidden_layers):
            found |= self.tensors_of(f"layers.{layer}")
        return found | self._after_blocks()

    @abstractmethod
    def names(self) -> Names:
        """Return the public name of each module that has parameters, by our name; a block's modules without its prefix.

        Several names are fused into one parameter. A tied head is not asked for.
        """

    def tensors_of(self, layer: str) -> Sizes:
        """Return the public tensors of a layer: embed, layers.3 or head. A tied head has the embedding, too."""
        if layer == "embed":
            return self.first_tensors()
        if layer == "head":
            is_shared = {self.embedding: self.tie_word_embeddings}
            tied = {name: size for name, size in self.first_tensors().items() if is_shared.get(name)}
            return tied | self._after_blocks()
        index = int(layer.removeprefix("layers."))
        return {f"{self.blocks}.{index}.{name}": size for name, size in self.block_tensors(index).items()}

    def sources(self, name: str) -> tuple[Source, ...]:
        """Return the public tensors that our parameter `name` holds, such as layers.3.attention.qkv.weight.

        Raises ModelError where the shape has no names of them, or names of tensors that it does not have.
        """
        module, _, leaf = name.rpartition(".")
        layer, prefix = module.partition(".")[0], ""
        if layer == "layers":
            _, index, module = module.split(".", 2)
            layer, prefix = f"layers.{index}", f"{self.blocks}.{index}."
        elif module == "head.table" and self.tie_word_embeddings:
            module = "embed.table"
        found, sizes = self.names().get(module, ()), self.tensors_of(layer)
        names = [f"{prefix}{public}.{leaf}" for public in ((found,) if isinstance(found, str) else found)]
        kind = type(self).__name__
        if not names:
            raise ModelError(f"{name}: {kind}.names() has no {module!r}, which is a module with parameters.")
        if missing := [public for public in names if public not in sizes]:
            raise ModelError(
                f"{name}: {kind}.names() makes of it {missing[0]}, which is no tensor of the shape."
                f" {did_you_mean(missing[0], sizes)}"
            )
        return self.sources_of(names, [sizes[public] for public in names])

    def sources_of(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> tuple[Source, ...]:
        """Return the sources of a parameter that holds these tensors: one, several of one shape, or q, k and v."""
        if len(names) == 1:
            return whole(names[0], shapes[0])
        return fused(names, shapes[0]) if len(set(shapes)) == 1 else grouped(names, shapes, self.num_kv_heads)

    def _after_blocks(self) -> Sizes:
        head = {} if self.tie_word_embeddings else {self.head: (self.vocab_size, self.embedding_width)}
        return self.last_tensors() | head

    @property
    @abstractmethod
    def embedding(self) -> str:
        """The public name of the token embedding."""

    @property
    def positions(self) -> str | None:
        """The public name of the table of positions, where there is one."""
        return None

    @abstractmethod
    def initial(self, name: str) -> Normal:
        """Return the distribution from which a public tensor is drawn."""

    # -- what it costs

    @abstractmethod
    def kept(self) -> Kept:
        """Return what a block keeps for backward, without dropout."""

    def spans(self, sequence_length: int) -> list[int]:
        """Return, for each block, how many keys of a sequence are counted for a query; causality is not counted."""
        return [sequence_length] * self.num_hidden_layers

    # -- config.json

    @classmethod
    def normalized(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a config.json, or of a config's section `model`, under the names of this dataclass."""
        return {cls.aliases.get(key, key): value for key, value in raw.items()}

    def exported(self) -> dict[str, Any]:
        """Return the fields of the config.json that Hugging Face reads, besides the model's type and class."""
        return asdict(self)


def common_problems(shape: ModelShape, *, derives_head_size: bool = True) -> list[str]:
    """Return what is wrong with heads and token ids, in every layout.

    `derives_head_size`: a head is as wide as the heads' share of the hidden size.
    """
    found = []
    heads, groups, hidden = shape.num_attention_heads, shape.num_kv_heads, shape.hidden_size
    key = shape.field("num_attention_heads")
    if derives_head_size and hidden % heads:
        tries = either(nearest(heads, divisors(hidden)))
        found.append(f"model.{key}: {heads} does not divide model.{shape.field('hidden_size')} {hidden}. Try {tries}.")
    if heads % groups:
        tries = either(nearest(groups, divisors(heads)))
        found.append(
            f"model.{shape.field('num_key_value_heads')}: {groups} does not divide model.{key} {heads}. Try {tries}."
        )
    if shape.padding_row is not None and shape.padding_row >= shape.vocab_size:
        found.append(
            f"model.pad_token_id: {shape.padding_row} is outside model.vocab_size {shape.vocab_size}."
            f" Try {shape.vocab_size - 1}."
        )
    return found


def activation_problems(key: str, name: str) -> list[str]:
    """Return what is wrong with the name of an activation function."""
    if name in ACTIVATIONS:
        return []
    return [f"model.{key}: {shown(name)} is not available. {did_you_mean(name, ACTIVATIONS)}"]
