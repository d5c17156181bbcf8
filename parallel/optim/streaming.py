"""States that are not at home on the device, through it in parts: up, updated and down, three parts at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parallel.optim.part import Part
from parallel.storage.transfer import CopyEvent, Tier, copies_of

PART = 2**23  # elements


class _Slot:
    """Room on the device for a part of so many elements at most."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.size = device, size
        self.room: dict[tuple[str, torch.dtype], Tensor] = {}
        self.arrived, self.left = CopyEvent(), CopyEvent()

    def view(self, name: str, like: Tensor) -> Tensor:
        key = name, like.dtype
        if key not in self.room:
            self.room[key] = torch.empty(self.size, dtype=like.dtype, device=self.device)
        return self.room[key][: len(like)]


Update = Callable[[Part], None]


def in_parts(wholes: Sequence[Part]) -> list[Part]:
    """The same in parts that fit into slots."""
    return [part for whole in wholes for part in whole.split(PART)]


class Stream:
    """Slots, as large as the largest part: while one part is updated, the next is on its way up and the one before on
    its way down. Parts whose states are at home on a disk come and go by way of slots on the host (`disk.Disk`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, copies_of(device)
        self._slots: list[_Slot] = []

    def run(self, parts: Sequence[Part], update: Update) -> None:
        """Each part's home as `update` leaves what is given to it on the device."""
        self._make_room(max(len(part.gradient) for part in parts))
        on_disk = [part for part in parts if part.is_on_disk]
        if on_disk:
            on_disk[0].disk.begin([part.states for part in on_disk])
        coming = self._bring(parts[0], self._slots[0])
        for i, part in enumerate(parts):
            slot, (home, here) = self._slots[i % 3], coming
            if i + 1 < len(parts):
                coming = self._bring(parts[i + 1], self._slots[(i + 1) % 3])
            slot.arrived.wait()
            update(here)
            self._take(here, home, slot)
            if part.is_on_disk:
                part.disk.store(slot.left)
        if on_disk:
            on_disk[0].disk.end()

    def _make_room(self, size: int) -> None:
        if not self._slots or self._slots[0].size < size:
            self._copies.synchronize()  # in the old ones there may be something on its way
            self._slots = [_Slot(self._device, size) for _ in range(3)]

    def _bring(self, home: Part, slot: _Slot) -> tuple[Part, Part]:
        """The part, with states on the host whatever their home, and on the device."""
        if home.is_on_disk:
            home = replace(home, states=home.disk.fetch())
        first, second, third = (slot.view(f"state {k}", x) for k, x in enumerate(home.states))
        here = replace(home, states=(first, second, third), gradient=slot.view("gradient", home.gradient), own=None)
        for source, room in zip(home.states, here.states, strict=True):
            self._copies.upload(source, room, after=slot.left)
        slot.arrived = self._copies.upload(home.gradient, here.gradient, after=home.arrived)
        return home, here

    def _take(self, here: Part, home: Part, slot: _Slot) -> None:
        if home.own is not None:
            if home.chunk.placement.parameters is Tier.DEVICE:
                home.own.copy_(here.states[0])
            else:
                narrow = slot.view("own", home.own)
                self._copies.download(narrow.copy_(here.states[0]), home.own)
        for room, place in zip(here.states, home.states, strict=True):
            slot.left = self._copies.download(room, place)
        home.chunk.parameters.record_write(slot.left)
