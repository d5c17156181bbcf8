"""Updates of offloaded states on the device: they stream through it in parts, three parts at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parallel.optim.part import Part
from parallel.storage.transfer import Copies, CopyEvent

PART = 2**23  # elements


class _Slot:
    """Memory on the device for one part of at most `size` elements."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.size = device, size
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.uploaded, self.downloaded = CopyEvent(), CopyEvent()

    def view(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor of the size and dtype of `like`, in a buffer for tensors of this name."""
        key = name, like.dtype
        if key not in self.buffers:
            self.buffers[key] = torch.empty(self.size, dtype=like.dtype, device=self.device)
        return self.buffers[key][: len(like)]


Update = Callable[[Sequence[Part]], None]
"""An update of parts where they are, which writes their states and, where a part has some, its parameters."""


def in_parts(wholes: Sequence[Part]) -> list[Part]:
    """Return the same elements in parts that fit into slots."""
    return [part for whole in wholes for part in whole.split(PART)]


class Stream:
    """Three slots of the size of the largest part: one part is updated while the next is copied to the device and the
    one before is copied back. Parts whose states are on a disk pass through slots on the host too (`disk.Disk`).

    The copies have streams of their own: a forward, which may begin before the update ends, waits only for the parts of
    its parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, Copies(device)
        self._slots: list[_Slot] = []

    def run(self, parts: Sequence[Part], update: Update) -> Iterator[CopyEvent]:
        """Call `update` with a copy of each part on the device, and copy the result back to where the part is. Yield
        the end of its last copy: the next part is launched when the next item is asked for. The iterator must have
        ended before another run.

        An update writes parameters that are on the device where they are.
        """
        self._make_slots(max(len(part.gradient) for part in parts))
        on_disk = [part for part in parts if part.is_on_disk]
        if on_disk:
            on_disk[0].disk.begin([part.states for part in on_disk])
        upcoming = self._upload(parts[0], self._slots[0])
        for i, part in enumerate(parts):
            slot, (on_host, on_device) = self._slots[i % 3], upcoming
            if i + 1 < len(parts):
                upcoming = self._upload(parts[i + 1], self._slots[(i + 1) % 3])
            slot.uploaded.wait()
            if on_device.own is not None and not on_device.own_is_on_device:
                on_device.own.copy_(on_device.states[0])  # a step that is left out writes nothing
            update([on_device])
            self._download(on_device, on_host, slot)
            if part.is_on_disk:
                part.disk.store(slot.downloaded)
            yield slot.downloaded
        if on_disk:
            on_disk[0].disk.end()

    def _make_slots(self, size: int) -> None:
        if not self._slots or self._slots[0].size < size:
            self._copies.synchronize()  # the old ones may still be copied from
            self._slots = [_Slot(self._device, size) for _ in range(3)]

    def _upload(self, part: Part, slot: _Slot) -> tuple[Part, Part]:
        """Start to copy a part into a slot. Return the part with its states on the host, read from the disk if they are
        there, and the part in the slot.
        """
        if part.is_on_disk:
            part = replace(part, states=part.disk.fetch())
        first, second, third = (slot.view(f"state {k}", x) for k, x in enumerate(part.states))
        gradient = slot.view("gradient", part.gradient)
        own = None if part.own is None else part.own if part.own_is_on_device else slot.view("own", part.own)
        copy = replace(part, states=(first, second, third), gradient=gradient, own=own)
        for source, out in zip(part.states, copy.states, strict=True):
            self._copies.upload(source, out, after=slot.downloaded)
        slot.uploaded = self._copies.upload(part.gradient, copy.gradient, after=part.gradient_written)
        return part, copy

    def _download(self, on_device: Part, on_host: Part, slot: _Slot) -> None:
        """Start to copy a part back that has been updated in a slot."""
        if on_device.own is not None and on_host.own is not None and not on_host.own_is_on_device:
            self._copies.download(on_device.own, on_host.own)
        for source, out in zip(on_device.states, on_host.states, strict=True):
            slot.downloaded = self._copies.download(source, out)
