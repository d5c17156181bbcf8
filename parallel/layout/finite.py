"""The check of tensors for numbers that are not finite, which names the public tensor that has one."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from parallel.layout.layout import Piece


def is_finite(x: Tensor) -> Tensor:
    """Return a scalar on x's device: whether all numbers of x are finite. They are read once, and nothing is copied.

    The smallest and the largest of numbers with a NaN among them are NaN.
    """
    if not x.numel() or not x.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=x.device)
    smallest, largest = torch.aminmax(x.detach())
    return smallest.isfinite() & largest.isfinite()


def are_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Return for each tensor whether all its numbers are finite; the host waits for each device once."""
    flags = [is_finite(x) for x in tensors]
    for device in {flag.device for flag in flags if flag.device.type != "cpu"}:
        own = [i for i, flag in enumerate(flags) if flag.device == device]
        for i, flag in zip(own, torch.stack([flags[i] for i in own]).cpu().unbind(), strict=True):
            flags[i] = flag
    return [bool(flag) for flag in flags]


def not_finite(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces that have a number which is not finite, in order; the host waits for the devices."""
    found = list(pieces)
    flags = are_finite(piece.data for piece in found)
    yield from (piece for piece, flag in zip(found, flags, strict=True) if not flag)


def share_text(x: Tensor) -> str:
    """Return how many numbers of x are not finite, as text: "1 of 4,096 elements"."""
    return f"{int((~x.detach().isfinite()).sum()):,} of {x.numel():,} elements"


def problem_of(pieces: Iterable[Piece]) -> str:
    """Return the name of the first piece that is not finite, and how many of its numbers are not; else nothing."""
    bad = list(not_finite(pieces))
    if not bad:
        return ""
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{bad[0].name} is not finite ({share_text(bad[0].data)}){more}"
