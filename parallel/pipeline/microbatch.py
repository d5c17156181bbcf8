"""Microbatches, which go through a pipeline, and the check of a batch that they are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parallel.config.sections import NO_DOCUMENTS_IN_A_RING
from parallel.errors import did_you_mean, either, nearest_multiples
from parallel.layout.labels import IGNORED
from parallel.sequence import Documents
from parallel.sequence.cache import KeyValueCache


@dataclass(frozen=True)
class Microbatch:
    """Samples that go through the pipeline together: B of them, of S tokens each.

    Every rank of a replica has all of them, and each layer takes the part that its mode gives this rank. `labels` are
    already shifted: the label of each position, −100 where there is none. `samples` are the numbers of the samples over
    the whole run, which dropout depends on. `attention_mask` is 1 where there is a token and 0 at padding; None where
    there is no padding. `position_ids` are the position of each token in its document; None where they are counted from
    the tokens. `documents` are those that attention stays within; None where each sample is one. The gradient of the
    summed loss is multiplied by `scale`: the loss scale divided by the number of labels in the whole step. `cache` is
    where the layer that is given the microbatch keeps keys and values, if texts are continued.
    """

    input_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S]
    samples: Tensor  # int64 [B]
    attention_mask: Tensor | None = None  # int64 [B, S]
    scale: float = 1.0
    position_ids: Tensor | None = None  # int64 [B, S]
    documents: Documents | None = None
    cache: KeyValueCache | None = None

    @property
    def length(self) -> int:
        """S, the length of the whole sequence."""
        return self.input_ids.shape[1]

    @property
    def columns(self) -> Tensor | None:
        """The batch's positions, else the column of each token in its document, int64 [B, S].

        None: there are neither, and each sample has the columns 0, 1, ...
        """
        if self.position_ids is not None or self.documents is None:
            return self.position_ids
        return self.documents.positions

    @property
    def _of_samples(self) -> tuple[Tensor | None, ...]:
        """The tensors whose first dim is B, or None for each that is not given; `documents` has others."""
        return self.input_ids, self.labels, self.samples, self.attention_mask, self.position_ids

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that there are."""
        documents = [] if self.documents is None else [self.documents.positions, self.documents.bounds]
        return [x for x in self._of_samples if x is not None] + documents

    @property
    def form(self) -> tuple[object, ...]:
        """All that kernels depend on besides the values of the tensors."""
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in self._of_samples)
        documents = None if self.documents is None else (self.documents.bounds.shape, self.documents.longest)
        return *shapes, self.scale, documents

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Microbatch":
        """Return the same with these in the place of `tensors`, in this order."""
        rest = iter(tensors)
        return replace(
            self,
            input_ids=next(rest),
            labels=next(rest),
            samples=next(rest),
            attention_mask=None if self.attention_mask is None else next(rest),
            position_ids=None if self.position_ids is None else next(rest),
            documents=None if self.documents is None else self.documents.apply(lambda x: next(rest)),
        )

    def split(self, size: int) -> list["Microbatch"]:
        """Return microbatches of `size` samples each, in order, as views."""
        count = len(self.input_ids) // size
        given = *self._of_samples, self.documents
        parts = zip(*([None] * count if x is None else x.split(size) for x in given), strict=True)
        return [
            Microbatch(ids, labels, samples, mask, self.scale, positions, documents=documents)
            for ids, labels, samples, mask, positions, documents in parts
        ]


@dataclass(frozen=True)
class Limits:
    """The batches that a model accepts.

    Token ids are from 0 to `vocab_size` - 1. A sequence has at most `max_sequence` tokens, and its length is a multiple
    of `sequence_parts`. Positions are from `first_position` to `max_sequence` - 1. `has_documents`: attention can be
    kept within documents.
    """

    vocab_size: int
    max_sequence: int
    sequence_parts: int = 1
    first_position: int = 0
    has_documents: bool = True


KEYS = ("input_ids", "labels", "attention_mask", "position_ids", "document_ids", "sample_ids")
"""The keys of a batch. All but the first are optional, and a value of None is the same as no key."""


def given(batch: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the batch without its keys of which the value is None."""
    return {key: x for key, x in batch.items() if x is not None}


def as_int64(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch in int64: −100 would be 156 in uint8, and torch does not compare the wider unsigned dtypes."""
    return {key: x.to(torch.int64) for key, x in batch.items()}


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of a batch, [B, S], not shifted; where it has none, its tokens.

    The first token of a document is then no label, since no token that is before it is seen.
    """
    if "labels" in batch or "document_ids" not in batch:
        return batch.get("labels", batch["input_ids"])
    documents = batch["document_ids"]
    labels = batch["input_ids"].clone()
    labels[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORED
    return labels


def batch_problem(batch: object, micro_batch_size: int, limits: Limits) -> str | None:
    """Return what is wrong with a replica's batch, as the end of a message, or None.

    Its tensors are best on the host: their values are read.
    """
    if not isinstance(batch, Mapping):
        return f"wanted a dict of tensors with the key 'input_ids', got {type(batch).__name__}."
    for key in batch:
        if key not in KEYS:
            return f"{key!r} is no key of a batch. {did_you_mean(str(key), KEYS)}"
    tensors = given(batch)
    problem = _shape_problem(tensors, micro_batch_size, limits) or _value_problem(as_int64(tensors), limits)
    return f"{problem}." if problem else None


def _shape_problem(batch: Mapping[str, Any], micro_batch_size: int, limits: Limits) -> str | None:
    """Return what is wrong with the shapes and dtypes of a batch, or None."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not _is_integer(ids):
        return f"input_ids: wanted integers [samples, sequence], got {_described(ids)}"
    samples, sequence = ids.shape
    if not samples or samples % micro_batch_size:
        return f"input_ids: {samples} samples are not a multiple of train.micro_batch_size {micro_batch_size}"
    if not 2 <= sequence <= limits.max_sequence:
        return f"input_ids: a sequence of {sequence} is not in 2 … model.max_position_embeddings {limits.max_sequence}"
    if sequence % limits.sequence_parts:
        return (
            f"input_ids: a sequence of {sequence} is not a multiple of {limits.sequence_parts}, the parts that the"
            f" layout splits it into: try {either(nearest_multiples(sequence, limits.sequence_parts))}"
        )
    for name, x in batch.items():
        shape = ids.shape[:1] if name == "sample_ids" else ids.shape
        if not isinstance(x, Tensor) or x.shape != shape or not _is_integer(x):
            return f"{name}: wanted integers {list(shape)}, got {_described(x)}"
    return None


def _value_problem(batch: Mapping[str, Tensor], limits: Limits) -> str | None:
    """Return which value of a batch is outside of the model's limits, or None."""
    ids = batch["input_ids"]
    if (token := _outside(ids, 0, limits.vocab_size)) is not None:
        return _token_problem("input_ids", token, limits)
    if (labels := batch.get("labels")) is not None:
        labels = torch.where(labels == IGNORED, 0, labels)
        if (token := _outside(labels, 0, limits.vocab_size)) is not None:
            return _token_problem("labels", token, limits)
    if "attention_mask" in batch and (value := _outside(batch["attention_mask"], 0, 2)) is not None:
        hint = ". The numbers of packed documents are document_ids" if value > 1 else ""
        return f"attention_mask: {value} is neither 1, a token, nor 0, padding{hint}"
    if "position_ids" in batch:
        position = _outside(batch["position_ids"], limits.first_position, limits.max_sequence)
        if position is not None:
            valid = f"{limits.first_position} … {limits.max_sequence - 1}"
            return f"position_ids: {position} is outside {valid} (model.max_position_embeddings)"
    return _document_problem(batch["document_ids"], limits) if "document_ids" in batch else None


def _outside(values: Tensor, first: int, stop: int) -> int | None:
    """Return the first value that is not in first … stop − 1, or None: one pass over the values says so."""
    smallest, largest = torch.aminmax(values)
    if first <= int(smallest) and int(largest) < stop:
        return None
    return int(values[(values < first) | (values >= stop)][0])


def _token_problem(name: str, token: int, limits: Limits) -> str:
    return f"{name}: token {token} is outside 0 … {limits.vocab_size - 1} (model.vocab_size {limits.vocab_size})"


def _document_problem(documents: Tensor, limits: Limits) -> str | None:
    """Return why attention cannot be kept within these documents, or None."""
    if not limits.has_documents:
        return f"document_ids: {NO_DOCUMENTS_IN_A_RING}"
    before, after = documents[:, :-1], documents[:, 1:]
    if len(falls := (after < before).nonzero()):
        sample, column = falls[0].tolist()
        return (
            f"document_ids: {int(after[sample, column])} comes after {int(before[sample, column])} in sample {sample}."
            " The numbers of a sample's documents never fall, such as 0, 0, 1, 1, 2"
        )
    return None


def _is_integer(x: Tensor) -> bool:
    """Return True for a dense tensor of integers, whose values can be read."""
    return not (x.is_floating_point() or x.is_complex() or x.is_meta) and x.layout == torch.strided


def _described(x: object) -> str:
    if isinstance(x, Tensor):
        where = " without values" if x.is_meta else "" if x.layout == torch.strided else f" in {x.layout}"
        return f"{x.dtype} {list(x.shape)}{where}"
    return "nothing" if x is None else type(x).__name__
