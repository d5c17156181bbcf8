"""The gradient of a chunk after its sum over ranks, stored where the update reads it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.chunk.accumulator import Accumulator
from parallel.chunk.memory import ChunkMemory
from parallel.chunk.precision import gradient_dtype
from parallel.chunk.spec import ChunkSpec
from parallel.ops.kernels.sums import sums_of_squares
from parallel.storage.transfer import CopyEvent, Tier


class Gradient:
    """The gradient of a chunk in one step. `accumulator` adds up a round on this rank; its sum over ranks is added to
    `total`.

    total [n] or [n_shard]  the sum over ranks of all rounds so far, None before the first. It is on the device if the
                            optimizer states are, and otherwise on the host: in a buffer that is kept from step to step,
                            or in the memory of the parameters
    """

    def __init__(self, spec: ChunkSpec, memory: ChunkMemory) -> None:
        self.spec, self.memory, self.tier = spec, memory, Tier.DEVICE
        self.accumulator = Accumulator(spec, memory.device)
        self.total: Tensor | None = None
        self.is_in_parameters = False  # `total` is in the memory of this rank's slice, until the update
        self.written = CopyEvent()  # the last copy of a total to the host
        self.num_bytes = 0  # bytes of the last total that was copied to the host
        self.host_buffer: Tensor | None = None  # kept from step to step
        self._is_single = False  # whether the step has one microbatch: then gradients are added only over ranks
        self._squares: Tensor | None = None  # the sum of squares of a total that has left the device
        self.counted: Tensor | None = None  # what `squares_of` has returned last

    def begin(self, num_microbatches: int) -> None:
        """Begin a step of this number of microbatches, which decides the dtype of the buffer."""
        self._is_single = num_microbatches == 1
        self.accumulator.begin(gradient_dtype(self.spec.dtype, self.spec.axes, num_microbatches))
        self._squares = None

    def store(self, total: Tensor, *, reusable: Tensor | None = None) -> None:
        """Take the sum of all rounds so far, which is on the device, and store it where the update reads it. The sum of
        squares is computed before it leaves the device.

        `reusable` is memory on the host that is free until the update. The gradient of a single microbatch is stored
        there, if shape and dtype are the same.
        """
        if self.tier is Tier.DEVICE:
            self.hold(total)
            return
        self.num_bytes = total.nbytes
        self._squares = sums_of_squares([self.spec.counted_slice(total)])[0]
        if self._is_single and reusable is not None and (total.dtype, total.shape) == (reusable.dtype, reusable.shape):
            out, self.host_buffer, self.is_in_parameters = reusable, None, True
        else:
            if self.host_buffer is None or self.host_buffer.dtype != total.dtype:
                self.host_buffer = self.memory.empty(Tier.HOST, total)
            out = self.host_buffer
        self.written = self.memory.copies.download(total, out)
        self.hold(out)

    def hold(self, total: Tensor) -> None:
        """Take a total that is where the update reads it already."""
        self.total = total

    def on_device(self) -> Tensor:
        """Return the total on the device: itself, or a copy of it."""
        assert self.total is not None
        if self.tier is Tier.DEVICE:
            return self.total
        found = self.memory.empty(Tier.DEVICE, self.total)
        self.memory.copies.upload(self.total, found, after=self.written).wait()
        return found

    def counted_slice(self) -> Tensor:
        """Return the part of the total that this rank counts in the norm."""
        assert self.total is not None
        return self.spec.counted_slice(self.total)

    def squares_of_what_has_left(self) -> Tensor | None:
        """Return the sum of squares, an fp64 scalar, of a total that is on the host; None for one on the device."""
        return self._squares

    def drop(self) -> None:
        """Drop the total after an update has used it. The update overwrites parameters in whose memory it was."""
        self.total, self.is_in_parameters = None, False

    def move_to(self, states: Tier) -> None:
        """Store totals on the device from now on if the optimizer states are there, otherwise on the host."""
        self.tier = Tier.DEVICE if states is Tier.DEVICE else Tier.HOST
        if self.tier is Tier.DEVICE:
            self.host_buffer = None


def squares_of(gradients: Sequence[Gradient]) -> Tensor:
    """Return the sum of squares of each gradient, fp64 [len(gradients)]: of this rank's part of the norm."""
    on_device = []
    for gradient in gradients:
        gradient.counted = gradient.squares_of_what_has_left()
        if gradient.counted is None:
            on_device.append(gradient)
    if on_device:
        found = sums_of_squares([gradient.counted_slice() for gradient in on_device])
        for gradient, squares in zip(on_device, found.unbind(), strict=True):
            gradient.counted = squares
    return torch.stack([gradient.counted for gradient in gradients if gradient.counted is not None])
