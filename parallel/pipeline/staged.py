"""A batch in one piece of memory: a single copy brings it to a device, however many tensors and microbatches it has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.layout.labels import shift
from parallel.pipeline.microbatch import Microbatch

ALIGNMENT = 16  # bytes: a tensor begins at a multiple of it, as one in memory of its own does


@dataclass(frozen=True, eq=False)
class StagedBatch:
    """The samples of a step, whose tensors lie one behind the other in `memory`, uint8 [n], on the host or a device.

    `whole` has all samples; its tensors are views of the memory. A microbatch has `size` of them.
    """

    memory: Tensor
    whole: Microbatch
    size: int

    @classmethod
    def of(cls, whole: Microbatch, size: int, device: torch.device) -> "StagedBatch":
        """Return a copy of these samples on the host: in pinned memory if `device`, where they go next, is a GPU.

        The labels that are given are those of the tokens themselves; they are shifted here.
        """
        _, num_bytes = _places(whole.tensors)
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        staged = cls(memory, whole.with_tensors(_views(memory, whole.tensors)), size)
        for x, out in zip(whole.tensors, staged.whole.tensors, strict=True):
            if out is staged.whole.labels:
                shift(x, out)
            else:
                out.copy_(x)
        return staged

    @property
    def num_microbatches(self) -> int:
        return len(self.whole.input_ids) // self.size

    @property
    def microbatches(self) -> list[Microbatch]:
        """The microbatches, in order: views."""
        return self.whole.split(self.size)

    @property
    def form(self) -> tuple[object, ...]:
        """All that kernels depend on besides the values of the tensors."""
        return *self.whole.form, self.size

    def scaled(self, scale: float) -> "StagedBatch":
        """Return the same in the same memory, whose loss is multiplied by `scale`."""
        return replace(self, whole=replace(self.whole, scale=scale))

    def on(self, device: torch.device, *, copied: bool = False) -> "StagedBatch":
        """Return the batch on a device; `copied`: in memory of its own. The host does not wait for a copy to a GPU."""
        memory = self.memory.to(device, non_blocking=True, copy=copied)
        return StagedBatch(memory, self.whole.with_tensors(_views(memory, self.whole.tensors)), self.size)

    def copy_to(self, other: "StagedBatch") -> None:
        """Overwrite another batch of the same form. The host does not wait for a copy to a GPU."""
        other.memory.copy_(self.memory, non_blocking=True)


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return the byte at which each tensor begins, and the number of bytes of all."""
    starts, end = [], 0
    for x in tensors:
        starts.append(end)
        end += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def _views(memory: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield for each tensor a view of the memory of the same dtype and shape."""
    for x, start in zip(tensors, _places(tensors)[0], strict=True):
        yield memory[start : start + x.nbytes].view(x.dtype).view(x.shape)
