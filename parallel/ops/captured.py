"""Work of a GPU that is the same each time, captured in a CUDA graph: the host launches it with one call."""

from collections.abc import Callable

import torch

CALLS_BEFORE = 3
"""The calls that run as usual: libraries allocate their workspaces in them, and code is compiled."""


class Captured:
    """Calls a function, which after a few calls is captured in a CUDA graph that is replayed from then on.

    The function reads and writes tensors that stay, takes and returns nothing, and never waits for the device. Each
    call, whether captured or not, does its work once. With `captures` False it is always called as usual.
    """

    def __init__(self, function: Callable[[], None], *, captures: bool) -> None:
        self.function, self.captures = function, captures
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.captures or self.calls < CALLS_BEFORE:
            self.calls += 1
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # it records and computes nothing
                self.function()
        self.graph.replay()
