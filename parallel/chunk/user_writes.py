"""The record of writes into a chunk's parameters by somebody other than the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.layout.layout import ParameterInfo


class UserWrites:
    """The versions of parameters, in which torch counts the writes into a tensor, except those through `.data`; and,
    of parameters that are gathered on demand, what happened to them since the engine's last own write.

    kept     a fingerprint of the whole buffer at its release, after somebody had written into it; None before
    lost     the name of a parameter that was written into while it had no values
    damaged  a flag on the device: whether a placeholder was written into; None if there has been no placeholder
    """

    def __init__(self, infos: Sequence[ParameterInfo]) -> None:
        self._infos = list(infos)
        self.note()

    def note(self) -> None:
        """Begin anew: all parameters are as the engine has written them."""
        self.kept: Tensor | None = None
        self.damaged: Tensor | None = None
        self.lost = ""
        self._note_versions()

    def names(self) -> list[str]:
        """Return the names of the parameters that have been written into, as far as their versions show it."""
        pairs = zip(self._infos, self._read_versions(), self._versions, strict=True)
        return [info.name for info, now, before in pairs if now != before]

    def lose(self, placeholder: Tensor | None) -> None:
        """Note what was written into parameters without values, which are gathered now."""
        if names := self.names():
            self.lost = self.lost or names[0]
            self._note_versions()
        if placeholder is not None:
            damaged = ~placeholder.isnan()
            self.damaged = damaged if self.damaged is None else self.damaged | damaged

    def take_lost(self) -> str:
        """Return the name of a parameter whose written values are lost, or an empty string, and forget it."""
        lost, self.lost = self.lost, ""
        return lost

    def take_damaged(self) -> bool:
        """Return whether a placeholder was written into, and forget it; the host waits for the device."""
        damaged, self.damaged = self.damaged, None
        return damaged is not None and bool(damaged)

    def keep(self, fingerprint: Tensor) -> None:
        """Note that what was written into whole parameters has been copied into each rank's slice."""
        self.kept = fingerprint
        self._note_versions()

    def is_any(self) -> bool:
        """Return whether something was written, as far as the host knows without waiting for the device."""
        return bool(self.kept is not None or self.lost or self._read_versions() != self._versions)

    def _note_versions(self) -> None:
        self._versions = self._read_versions()

    def _read_versions(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():  # which parameters without values ask for
            return [info.parameter._version for info in self._infos]
