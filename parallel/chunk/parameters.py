"""The parameters of a chunk in one flat buffer, of which the module's own parameters are views."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from parallel.chunk.eight_bits import EightBitWeights
from parallel.chunk.memory import ChunkMemory
from parallel.chunk.spec import ChunkSpec
from parallel.chunk.user_writes import UserWrites
from parallel.mesh.collectives import Pending, start_all_gather
from parallel.ops.kernels.fingerprint import fingerprint
from parallel.ops.placeholder import placeholder
from parallel.storage.transfer import CopyEvent, Tier

Shown: TypeAlias = Callable[[bool], None]
"""A function that is told whether the module's parameters have values from now on, when that changes."""


class ParameterBuffer:
    """The parameters of one chunk: what FSDP calls a flat parameter.

    whole [n]      on the device, in the model's dtype; empty between `release` and `gather`
    own [n_shard]  this rank's slice: a view of `whole`, or memory of its own on `tier` where parameters are gathered on
                   demand

    writes         what is known of writes into the module's parameters by somebody other than the engine
    eight_bits     what is gathered instead while linears multiply in 8 bits, if all of the parameters are their weights

    Each `gather` allocates new memory. So a tensor that was made of the parameters, and that somebody has kept, keeps
    the values it had; only its memory is not freed by `release`. While `whole` is empty, and until it has arrived, each
    of the module's parameters has its shape, but no values: see `placeholder`. `on_show` is told of both changes.
    """

    def __init__(self, spec: ChunkSpec, memory: ChunkMemory, *, whole: Tensor, own: Tensor) -> None:
        self.spec, self.memory = spec, memory
        self.whole, self.own, self.tier = whole, own, Tier.DEVICE
        self.written = CopyEvent()  # the last update of states and of `own`, where one of them is on the host
        self._placeholder: Tensor | None = None  # what the module's parameters show while they have no values
        places = zip(spec.starts, spec.shapes, strict=True)
        self._places = {info.parameter: place for info, place in zip(spec.infos, places, strict=True)}
        self.on_show: Shown = lambda is_whole: None
        self._show_whole()
        self.writes = UserWrites(spec.infos)
        self.eight_bits: EightBitWeights | None = None

    @property
    def is_whole(self) -> bool:
        """True if the whole buffer has memory now."""
        return bool(len(self.whole))

    @property
    def is_in_8_bits(self) -> bool:
        """True if the weights are whole now in 8 bits alone, which only linears may read."""
        return self.eight_bits is not None and self.eight_bits.whole is not None

    @property
    def in_8_bits(self) -> list[Tensor]:
        """The buffers of weights in 8 bits that there are now."""
        weights = self.eight_bits
        return [] if weights is None else [x for x in (weights.own, weights.whole) if x is not None]

    def gather(self) -> Pending:
        """Start to make the parameters whole (FSDP's unshard). The module's parameters have values when the result has
        been waited for; in 8 bits they have none, and their linears alone may use them.
        """
        spec, copies = self.spec, self.memory.copies
        self.note_lost_writes()
        if self.eight_bits is not None and self.eight_bits.is_on and self.tier is Tier.DEVICE:
            return self._gather_in_8_bits(self.eight_bits)
        self._allocate()
        if self.tier is Tier.DEVICE:
            return self._showing(start_all_gather(self.own, 0, spec.shard_axis, out=self.whole))
        part = spec.own_slice(self.whole)
        arrival = copies.upload(self.own, part, after=self.written)
        if spec.shard_axis.size == 1:
            return self._showing(Pending(self.whole, arrival))
        with copies.on_upload_stream():  # behind the copy, so that computation waits for neither
            return self._showing(start_all_gather(part, 0, spec.shard_axis, out=self.whole))

    def release(self) -> None:
        """Give up the whole buffer (FSDP's reshard); `own` stays. Its memory is freed unless somebody has kept a view
        of it.
        """
        self._keep_what_was_written()
        self.on_show(False)
        if self.eight_bits is not None:
            self.eight_bits.release()
        with torch.inference_mode(False):
            self.whole = self.whole.new_empty(0)
            shared = placeholder((), self.whole.dtype, self.whole.device)
        self._placeholder = shared
        self._show([shared.expand(shape) for shape in self.spec.shapes])

    def write(self, master: Tensor, tier: Tier) -> None:
        """Copy master weights [n_shard], which are on `tier`, into `own`, rounded to its dtype."""
        copies = self.memory.copies
        if self.tier is tier or Tier.DEVICE not in (self.tier, tier):
            self.own.copy_(master)
        elif self.tier is Tier.HOST:  # rounded before the copy, which is smaller then
            self.written = copies.download(master.to(self.own.dtype), self.own)
        else:
            wide = self.memory.empty(Tier.DEVICE, master)
            copies.upload(master, wide).wait()
            self.own.copy_(wide)

    def record_write(self, written: CopyEvent) -> None:
        """Make the next `gather` wait for an update of `own` that an optimizer has launched."""
        self.written = written

    def all_gather(self) -> Pending:
        """Start to all-gather the updated slices, where `own` is a view of the whole buffer."""
        return start_all_gather(self.own, 0, self.spec.shard_axis, out=self.whole)

    def move_apart(self, tier: Tier, *, is_apart: bool) -> None:
        """Give `own` memory of its own on a tier, while `whole` keeps its memory.

        `is_apart`: `own` has memory of its own already.
        """
        if not is_apart or tier is not self.tier:
            self.own = self.memory.copy(self.own, tier)
        self.tier = tier

    def move_into_whole(self) -> None:
        """Make the parameters whole until they are moved again: `own`, which has memory of its own, becomes a view."""
        self._allocate()
        apart, self.own, self.tier = self.own, self.spec.own_slice(self.whole), Tier.DEVICE
        self.own.copy_(apart)
        self.all_gather().wait()
        self._show_whole()

    def shows(self, parameter: nn.Parameter) -> bool:
        """Return True if one of the module's parameters still is its own view of this buffer, or has a placeholder."""
        if self.has_placeholder(parameter):
            return True
        start, shape = self._places[parameter]
        with torch._C.DisableTorchFunctionSubclass():
            if parameter.shape != shape or not parameter.is_contiguous():
                return False
            address = self.whole.data_ptr() + start * self.whole.element_size()
            return not parameter.numel() or parameter.data_ptr() == address

    @property
    def shows_all(self) -> bool:
        """True if each of the module's parameters is its own view of this buffer. It takes less time than `shows`."""
        with torch._C.DisableTorchFunctionSubclass():
            return [(x.data_ptr(), x.shape, x.is_contiguous()) for x in self._places] == self._views

    def has_placeholder(self, parameter: nn.Parameter) -> bool:
        """Return True if one of the module's parameters has a placeholder in the place of its values."""
        shared = self._placeholder
        with torch._C.DisableTorchFunctionSubclass():
            found = parameter.untyped_storage().data_ptr()
        return shared is not None and found == shared.untyped_storage().data_ptr()

    def show_instead(self, views: Sequence[Tensor]) -> None:
        """Have the module's parameters show values in memory of somebody else, until `show_own`."""
        self._show(views)
        self.on_show(True)

    def show_own(self) -> None:
        """Have the module's parameters show again what they showed before `show_instead`."""
        shared = self._placeholder
        if shared is None:
            self._show_whole()
            return
        self.on_show(False)
        self._show([shared.expand(shape) for shape in self.spec.shapes])

    def take_replaced(self) -> bool:
        """Copy the values of parameters whose `.data` somebody has replaced, and make them views of this buffer again.

        A parameter that has become one of another shape, dtype or device stays as it is. Returns True if each was its
        own view of this buffer.
        """
        if self.shows_all:
            return True
        for info, start in zip(self.spec.infos, self.spec.starts, strict=True):
            parameter = info.parameter
            if self.shows(parameter) or tuple(parameter.shape) != tuple(info.layout.local_shape):
                continue
            if (parameter.dtype, parameter.device) == (self.whole.dtype, self.whole.device):
                view = self.whole[start : start + parameter.numel()].view(parameter.shape)
                view.copy_(parameter.detach().clone())  # it may be another view of the same memory
                parameter.data = view
                torch.autograd.graph.increment_version(parameter)
        return False

    def note_lost_writes(self) -> None:
        """Note what somebody has written into parameters that have no values now."""
        if not self.is_whole:
            self.writes.lose(self._placeholder)

    def _keep_what_was_written(self) -> None:
        """Copy what somebody has written into whole parameters, since they were gathered, into this rank's slice."""
        if not self.is_whole or self.is_in_8_bits or not self.writes.names():
            return
        self.writes.keep(fingerprint(self.whole))
        part = self.spec.own_slice(self.whole)
        if self.tier is Tier.DEVICE:
            self.own.copy_(part)
        else:
            self.written = self.memory.copies.download(part, self.own)

    def _gather_in_8_bits(self, weights: EightBitWeights) -> Pending:
        """Start to gather the weights in 8 bits. `whole` and the module's parameters are then NaN in the memory of one
        element, so that autograd can save their places. Anything but a linear that reads them is refused.
        """
        with torch.inference_mode(False):
            shared = placeholder((), self.whole.dtype, self.whole.device)
        self.whole = shared.expand(self.spec.size)
        pending = weights.gather(self.own)

        def finish(buffer: Tensor) -> Tensor:
            self._placeholder = shared
            self._show([shared.expand(shape) for shape in self.spec.shapes])
            self.on_show(True)
            return pending.finish(buffer)

        return Pending(pending.buffer, pending.work, finish, pending.watch)

    def _allocate(self) -> None:
        with torch.inference_mode(False):  # a tensor that is made in inference mode can never be trained
            self.whole = self.whole.new_empty(self.spec.size)

    def _showing(self, pending: Pending) -> Pending:
        """Return the same, which shows the parameters when it has been waited for."""

        def finish(buffer: Tensor) -> Tensor:
            self._show_whole()
            return pending.finish(buffer)

        return Pending(pending.buffer, pending.work, finish)

    def _show_whole(self) -> None:
        """Give the module's parameters their values, as views of the whole buffer."""
        self._placeholder = None
        views = self.spec.views(self.whole)
        self._views = [(x.data_ptr(), x.shape, True) for x in views]
        self._show(views)
        self.on_show(True)

    def _show(self, views: Sequence[Tensor]) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # a parameter without values refuses most functions
            for info, view in zip(self.spec.infos, views, strict=True):
                info.parameter.data = view
