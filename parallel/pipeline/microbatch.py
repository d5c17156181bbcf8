"""Microbatches, which go through a pipeline, and the check of a batch that they are made of."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from parallel.errors import either, nearest_multiples
from parallel.layout.labels import IGNORED


@dataclass(frozen=True)
class Microbatch:
    """Samples that go through the pipeline together: B of them, of S tokens each.

    Every rank of a replica has all of them, and each layer takes the part that its mode gives this rank. `labels` are
    already shifted: the label of each position, −100 where there is none. `samples` are the numbers of the samples over
    the whole run, which dropout depends on. `attention_mask` is 1 where there is a token and 0 at padding; None where
    there is no padding. The gradient of the summed loss is multiplied by `scale`: the loss scale divided by the number
    of labels in the whole step.
    """

    input_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S]
    samples: Tensor  # int64 [B]
    attention_mask: Tensor | None = None  # int64 [B, S]
    scale: float = 1.0

    @property
    def length(self) -> int:
        """S, the length of the whole sequence."""
        return self.input_ids.shape[1]

    def split(self, size: int) -> list["Microbatch"]:
        """Return microbatches of `size` samples each, in order, as views."""
        count = len(self.input_ids) // size
        masks = [None] * count if self.attention_mask is None else self.attention_mask.split(size)
        parts = zip(self.input_ids.split(size), self.labels.split(size), self.samples.split(size), masks, strict=True)
        return [Microbatch(*tensors, self.scale) for tensors in parts]


@dataclass(frozen=True)
class Limits:
    """The batches that a model accepts.

    Token ids are from 0 to `vocab_size` - 1. A sequence has at most `max_sequence` tokens, and its length is a multiple
    of `sequence_parts`.
    """

    vocab_size: int
    max_sequence: int
    sequence_parts: int = 1


def batch_problem(batch: Mapping[str, Tensor], micro_batch_size: int, limits: Limits) -> str | None:
    """Return what is wrong with a replica's batch, or None. Its tensors are best on the host: their values are read."""
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2 or not _is_integer(ids):
        return f"input_ids: wanted integers [samples, sequence], got {_described(ids)}"
    samples, sequence = ids.shape
    if not samples or samples % micro_batch_size:
        return f"input_ids: {samples} samples are not a multiple of train.micro_batch_size {micro_batch_size}"
    if not 2 <= sequence <= limits.max_sequence:
        return f"input_ids: a sequence of {sequence} is not in 2 … model.max_position_embeddings {limits.max_sequence}"
    if sequence % limits.sequence_parts:
        return (
            f"input_ids: a sequence of {sequence} is not a multiple of {limits.sequence_parts}, the parts that"
            f" parallel.context splits it into: try {either(nearest_multiples(sequence, limits.sequence_parts))}"
        )
    for name, shape in (("labels", ids.shape), ("attention_mask", ids.shape), ("sample_ids", ids.shape[:1])):
        if name in batch and (batch[name].shape != shape or not _is_integer(batch[name])):
            return f"{name}: wanted integers {list(shape)}, got {_described(batch[name])}"
    labels = batch.get("labels", ids)
    for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
        outside = values[(values < 0) | (values >= limits.vocab_size)]
        if len(outside):
            valid = f"0 … {limits.vocab_size - 1} (model.vocab_size {limits.vocab_size})"
            return f"{name}: token {int(outside[0])} is outside {valid}"
    return None


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _described(x: Tensor | None) -> str:
    return "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
