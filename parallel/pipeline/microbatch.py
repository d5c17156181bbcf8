"""What goes through a pipeline: microbatches, and what is wrong with a batch that cannot become some."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from parallel.errors import either, nearest_multiples
from parallel.layout.labels import IGNORED


@dataclass(frozen=True)
class Microbatch:
    """Samples that go through the pipeline together, whole on every rank of a replica; each layer takes its split.

    `labels` are already shifted: the label of each position, −100 where there is none. `samples` number them over the
    whole run: what dropout follows. `attention_mask` is 1 where there is a token, None where all are. The gradient of
    the summed loss is multiplied by `scale`: 1 / the number of labels in the whole step.
    """

    input_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S]
    samples: Tensor  # int64 [B]
    attention_mask: Tensor | None = None  # int64 [B, S]
    scale: float = 1.0

    @property
    def length(self) -> int:
        """S, of the whole sequence."""
        return self.input_ids.shape[1]

    def split(self, size: int) -> list["Microbatch"]:
        """Microbatches of `size` samples each, in order."""
        count = len(self.input_ids) // size
        masks = [None] * count if self.attention_mask is None else self.attention_mask.split(size)
        parts = zip(self.input_ids.split(size), self.labels.split(size), self.samples.split(size), masks, strict=True)
        return [Microbatch(*tensors, self.scale) for tensors in parts]


@dataclass(frozen=True)
class Limits:
    """What a model can be given."""

    vocab_size: int
    max_sequence: int
    sequence_parts: int = 1


def batch_problem(batch: Mapping[str, Tensor], micro_batch_size: int, limits: Limits) -> str | None:
    """What is wrong with a replica's batch: its tensors by name, host tensors for choice. None where nothing is."""
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2 or not _counts(ids):
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
        if name in batch and (batch[name].shape != shape or not _counts(batch[name])):
            return f"{name}: wanted integers {list(shape)}, got {_described(batch[name])}"
    labels = batch.get("labels", ids)
    for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
        outside = values[(values < 0) | (values >= limits.vocab_size)]
        if len(outside):
            return f"{name}: token {int(outside[0])} is outside model.vocab_size {limits.vocab_size}"
    return None


def _counts(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _described(x: Tensor | None) -> str:
    return "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
