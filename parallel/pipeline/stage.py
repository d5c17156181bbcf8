"""A rank's part of a model: some of its layers, in order, and what the outside must know about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.layout import ParameterInfo


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
    attention_mask: Tensor | None  # int64 [B, S]
    scale: float

    def __len__(self) -> int:
        return len(self.input_ids)

    def split(self, size: int) -> list["Microbatch"]:
        """Microbatches of `size` samples each, in order."""
        masks = [None] * len(self) if self.attention_mask is None else self.attention_mask.split(size)
        tensors = zip(
            self.input_ids.split(size), self.labels.split(size), self.samples.split(size), masks, strict=False
        )
        return [Microbatch(*parts, self.scale) for parts in tensors]


class Stage(nn.Module):
    """One pipeline stage of a model.

    forward(x, microbatch): x is None on the first stage, elsewhere the previous stage's output; the last returns the
    loss summed over this rank's tokens, the others activations of `boundary(B, S)`'s shape.

    `infos` are the parameters of this rank, each once. `speaks`: whether this rank, among those that compute the same
    loss, is the one that counts.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        infos: Sequence[ParameterInfo],
        *,
        boundary: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
        speaks: bool,
    ) -> None:
        super().__init__()
        self.layers, self.infos = nn.ModuleList(layers), list(infos)
        self.boundary, self.dtype, self.speaks = boundary, dtype, speaks

    def forward(self, x: Tensor | None, microbatch: Microbatch) -> Tensor:
        for layer in self.layers:
            x = layer(x, microbatch)
        assert x is not None
        return x
