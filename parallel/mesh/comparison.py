"""The comparison of what the ranks of an axis are about to communicate, before any of them does (`debug_comm`).

Collectives do not check what they are given: ranks that call different ones wait for each other for ever, and ranks
that give different dtypes compute with garbage. Here each rank sends a line of text to the others first.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.errors import CollectiveError
from parallel.mesh.process_groups import ProcessGroup
from parallel.watch.stack import place_of

SIZE = 512
"""The bytes of a line, which is cut there, so that one message of a known size has it."""

OWN = ("parallel/mesh/comparison.py", "parallel/mesh/collectives.py", "parallel/pipeline/p2p.py")
"""The ends of the paths of files whose functions are not where a collective is called."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The lines of the ranks of an axis, exchanged by a gloo group of its own: a device is not waited for.

    A line is what a rank calls, with shape and dtype, and then where. What is called must be the same on all ranks.
    """

    axis: str
    ranks: tuple[int, ...]
    group: ProcessGroup

    def compare(self, call: str) -> None:
        """Return when all ranks of the axis are about to do the same. Raises CollectiveError, on all, where not."""
        line = _encoded(call)
        lines = [torch.empty_like(line) for _ in self.ranks]
        dist.all_gather(lines, line, group=self.group)
        calls = [_decoded(one) for one in lines]
        if len({what for what, _ in calls}) > 1:
            each = "; ".join(f"rank {rank}: {what}{at}" for rank, (what, at) in zip(self.ranks, calls, strict=True))
            raise CollectiveError(f"the ranks of the axis {self.axis} communicate differently: {each}.")

    def announce(self, call: str, to: int) -> "Announcement":
        """Start to tell the rank at coordinate `to` what is sent to it next."""
        line = _encoded(call)
        return Announcement(line, dist.isend(line, self.ranks[to], group=self.group))

    def expect(self, call: str, source: int, me: int) -> None:
        """Return when the rank at coordinate `source` has begun to send what this rank, at `me`, is to receive.

        Raises CollectiveError if it sends something else. A plan waits for no more than it does without: it is free of
        deadlocks with sends and receives that block.
        """
        line = torch.empty(SIZE, dtype=torch.uint8)
        dist.recv(line, self.ranks[source], group=self.group)
        what, at = _decoded(line)
        if what != call:
            raise CollectiveError(
                f"rank {self.ranks[source]} sends {what}{at}, and rank {self.ranks[me]} receives {call}{_place()},"
                f" along the axis {self.axis}."
            )


@dataclass(frozen=True, eq=False)
class Announcement:
    """The line before a message, in flight; it must be kept until it has arrived."""

    line: Tensor
    work: Any

    def wait(self) -> None:
        self.work.wait()


def described(x: Tensor) -> str:
    """Return the dtype and the shape of a tensor as text: 'float32 [4, 8]'."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _encoded(call: str) -> Tensor:
    text = f"{call}\n{_place()}".encode(errors="replace")[:SIZE]
    return torch.frombuffer(bytearray(text.ljust(SIZE, b"\0")), dtype=torch.uint8)


def _decoded(line: Tensor) -> tuple[str, str]:
    """Return what is called, and where."""
    what, _, at = line.numpy().tobytes().rstrip(b"\0").decode(errors="replace").partition("\n")
    return what, at


def _place() -> str:
    """Return the line that calls a collective, and the line of the user's program, where these are two."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(OWN):
        frame = frame.f_back
    return place_of(frame)
