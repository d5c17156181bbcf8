"""Ranks that run a program nobody has checked, before they wait for each other."""

import torch

from parallel.errors import ColonnadeError, ModelError
from parallel.mesh.collectives import all_gather
from parallel.mesh.mesh import Axis

MESSAGE_BYTES = 256


class Agreement:
    """Every rank says what it is about to do, and none does it unless all do.

    Otherwise a rank whose program took another way would wait for a collective that the others never join, or worse
    join another one: all ranks raise the same ModelError instead. `axis` has a group of its own on the host, so what a
    device does is not waited for.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def check(self, doing: str, problem: str = "", error: type[ColonnadeError] = ModelError) -> None:
        """Go on together. A `problem` that one rank has is every rank's, and raised as this `error`."""
        if self._axis.size == 1:
            if problem:
                raise error(problem)
            return
        said = _messages(all_gather(_bytes(f"!{problem}" if problem else doing), 0, self._axis))
        if problem and len(set(said)) == 1:
            raise error(problem)
        if problems := [f"rank {rank}: {text[1:]}" for rank, text in enumerate(said) if text.startswith("!")]:
            told = "\n".join(problems)
            raise error(told)
        if len(set(said)) > 1:
            ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said))
            raise ModelError(
                f"the ranks part here: {ranks}. Every rank must run the same layers, forwards and steps in the same"
                " order."
            )


def _bytes(text: str) -> torch.Tensor:
    encoded = text.encode()[:MESSAGE_BYTES]
    return torch.frombuffer(bytearray(encoded.ljust(MESSAGE_BYTES)), dtype=torch.uint8)


def _messages(gathered: torch.Tensor) -> list[str]:
    return [bytes(part.tolist()).decode(errors="replace").rstrip() for part in gathered.view(-1, MESSAGE_BYTES)]
