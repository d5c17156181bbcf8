"""Optimizer states that are offloaded to a disk: mapped memory between updates, direct reads and writes during one."""

from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor

from parallel.storage.state_file import StateFiles
from parallel.storage.swapper import PartSwapper, States
from parallel.storage.transfer import CopyEvent


class Access(Enum):
    """The way in which the files are used. Never both at a time: neither is sure to see what the other has changed."""

    MAPPED = auto()  # as memory, through the page cache
    DIRECT = auto()  # in parts, past the page cache


class Disk:
    """The files of a rank's states, and their two ways of access.

    An update reads and writes parts of them: `begin`, then `fetch` and `store` for each part, then `end`, as in
    `PartSwapper`. Everything else uses the files' tensors, which is allowed from `settle` to the next update.
    """

    def __init__(self, folder: str, rank: int, device: torch.device) -> None:
        """Raises ConfigError where nothing can be written in the folder."""
        self.files = StateFiles(folder, rank)
        self.swapper = PartSwapper(self.files, device)
        self._access = Access.MAPPED

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the slots on the host."""
        return self.swapper.buffer_bytes

    @property
    def file_bytes(self) -> int:
        return self.files.num_bytes

    def empty(self, size: int, dtype: torch.dtype, name: str) -> Tensor:
        """Return a mapped tensor [size] of zeros on the disk, which may be used when settled. `name` says what it is.

        Raises RoomError where the disk has no room for it.
        """
        self.settle()
        return self.files.zeros(size, dtype, name)

    def begin(self, parts: Sequence[States]) -> None:
        """Begin an update of these parts, in this order. Each begins at a whole page of its files."""
        if not self.swapper.has(parts):
            self._use(Access.DIRECT)
        self.swapper.begin(parts)

    def fetch(self) -> States:
        """Return the states of the next part, on the host."""
        return self.swapper.fetch()

    def store(self, updated: CopyEvent) -> None:
        """Write back the part that was fetched longest ago, once it is `updated` on the host."""
        self.swapper.store(updated)

    def end(self) -> None:
        """End an update, all of whose parts are stored."""
        self.swapper.end()

    def settle(self) -> None:
        """Wait until the files are what the last update made of them: their tensors are too, until the next update."""
        self._use(Access.MAPPED)
        self.swapper.free_buffers()  # perhaps no states are on the disk any more

    def _use(self, access: Access) -> None:
        self.swapper.stop()
        if access is not self._access:
            self.files.drop_caches()
        self._access = access
