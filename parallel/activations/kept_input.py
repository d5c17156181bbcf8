"""One input of a recomputed layer: on the device or on the host, from the layer's forward to its backward."""

from collections.abc import Callable
from enum import Enum, auto

import torch
from torch import Tensor

from parallel.activations.host_pool import HostPool
from parallel.errors import ModelError
from parallel.storage.transfer import CopyEvent


class InputState(Enum):
    ON_DEVICE = auto()  # as it was given
    OFFLOADED = auto()  # on the host
    UPLOADING = auto()  # on its way back


TRANSITIONS = {
    (InputState.ON_DEVICE, InputState.OFFLOADED),
    (InputState.OFFLOADED, InputState.UPLOADING),
    (InputState.UPLOADING, InputState.OFFLOADED),  # taken, and on the host for another time
}


class KeptInput:
    """An input that is kept as long as a backward may need it, perhaps more than once. `previous` returns the input
    kept before it.
    """

    def __init__(self, x: Tensor, pool: HostPool, previous: "Callable[[], KeptInput | None]") -> None:
        self.state, self.previous = InputState.ON_DEVICE, previous
        self._pool, self._x = pool, x
        self._version = x._version
        self._like = x.shape, torch.empty_like(x, device="meta").stride(), x.dtype
        self._buffer: Tensor | None = None  # of the pool
        self._copied = CopyEvent()  # the end of its last copy

    def offload(self) -> None:
        """Start the copy to the host, unless it is there already, and give up the memory on the device."""
        if self.state is not InputState.ON_DEVICE:
            return
        x = self._unchanged()
        self._buffer = self._pool.acquire(x.numel() * x.element_size())
        self._copied = self._pool.copies.download(x, self._on_host())
        self._give_up()

    def prefetch(self) -> None:
        """Start the copy back to the device, if it is on the host."""
        if self.state is not InputState.OFFLOADED:
            return
        self._move_to(InputState.UPLOADING)
        shape, stride, dtype = self._like
        self._x = torch.empty_strided(shape, stride, dtype=dtype, device=self._pool.device)
        self._copied = self._pool.copies.upload(self._on_host(), self._x, after=self._copied)

    def take(self) -> Tensor:
        """Return the input, for work that is launched from now on. It stays on the host for another time."""
        if self.state is InputState.ON_DEVICE:
            return self._unchanged()
        self.prefetch()
        self._copied.wait()
        x = self._x
        self._give_up()
        return x

    def __del__(self) -> None:
        if self._buffer is not None:
            if self.state is InputState.UPLOADING:  # nobody took it
                self._copied.wait()  # before its memory on the device is used for something else
            self._pool.release(self._buffer)

    def _unchanged(self) -> Tensor:
        if self._x._version != self._version:
            raise ModelError(
                "train.activation_checkpointing: a layer's input was changed in place after the layer had begun, so"
                " that it cannot be computed again. Try 'none', or change a copy."
            )
        return self._x

    def _give_up(self) -> None:
        """Drop the tensor on the device."""
        self._move_to(InputState.OFFLOADED)
        del self._x

    def _on_host(self) -> Tensor:
        """Return the part of the buffer that holds the input, in the input's shape and strides."""
        shape, stride, dtype = self._like
        assert self._buffer is not None
        return self._buffer[: shape.numel() * dtype.itemsize].view(dtype).as_strided(shape, stride)

    def _move_to(self, state: InputState) -> None:
        assert (self.state, state) in TRANSITIONS, f"an input cannot go from {self.state.name} to {state.name}"
        self.state = state
