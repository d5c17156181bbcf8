"""Work of a GPU that is the same each time, captured in a CUDA graph: the host launches it with one call."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Protocol, TypeVar

import torch

from parallel.errors import first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

CALLS_BEFORE = 3
"""The calls that run as usual: libraries allocate their workspaces in them, and code is compiled."""


class Graph(Protocol):
    """The work that a function gives a device is recorded once, and launched any number of times.

    A graph has the addresses of tensors and the numbers that kernels were launched with, and nothing else. Whatever it
    reads or writes must stay where it is, or be made in it. `num_bytes` is the memory that the graph keeps for tensors
    that are made in it; no other work uses that memory until `drop`. `draws`: the last replay has drawn random numbers
    from torch's generator, whose state has moved on.
    """

    num_bytes: int
    draws: bool

    def capture(self, function: Callable[[], T]) -> T:
        """Call the function, whose work the device records and does not do, and return what it returns.

        The function never waits for the device, and copies nothing to it. An error leaves the device as it was: that of
        the function, or a RuntimeError of the device.
        """

    def replay(self) -> None:
        """Launch the work, behind all that the device's current stream has been given."""

    def beside(self) -> AbstractContextManager[object]:
        """Return a context in which the device is given work that it does beside the last replay, behind what came
        before that. Work that it is given after the context comes behind both.
        """

    def drop(self) -> None:
        """Give up the graph, when its last replay has ended, and its memory where no tensor in it is used."""


class CudaGraph:
    """A CUDA graph of a device."""

    def __init__(self, device: torch.device) -> None:
        self._graph, self._device, self.num_bytes, self.draws = torch.cuda.CUDAGraph(), device, 0, False
        self._before, self._stream = torch.cuda.Event(), torch.cuda.Stream(device)

    def capture(self, function: Callable[[], T]) -> T:
        """Return what the function returns; see `Graph`."""
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # of the calls before, whose memory the graph needs now
            before = torch.cuda.memory_reserved()
            # Other threads copy batches and write checkpoints meanwhile, which is not recorded.
            capture = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local")
            # Where a capture fails, torch leaves the stream of the capture current, and the memory reserved.
            with torch.cuda.stream(torch.cuda.current_stream()), _between_collections():
                try:
                    with raising_the_first_error(capture):
                        found = function()
                except BaseException:
                    _release(pool)
                    raise
            self.num_bytes = torch.cuda.memory_reserved() - before
        return found

    def replay(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        generator = torch.cuda.default_generators[stream.device_index]
        self._before.record(stream)
        before = generator.get_offset()
        self._graph.replay()
        self.draws = generator.get_offset() != before

    @contextmanager
    def beside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_event(self._before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # what the block has read may be written or freed from here on, also after an error
            current.wait_stream(self._stream)

    def drop(self) -> None:
        torch.cuda.synchronize(self._device)
        self._graph.reset()
        self.num_bytes = 0


@contextmanager
def raising_the_first_error(inner: AbstractContextManager[object]) -> Iterator[None]:
    """Enter a context whose end raises an error of its own after an error of the block: the latter is raised.

    The end of a capture fails where an operation in it has failed, which says why, and may after a KeyboardInterrupt.
    """
    first: BaseException | None = None
    try:
        with inner:
            try:
                yield
            except BaseException as error:
                first = error
                raise
    except BaseException:
        if first is None:
            raise
    if first is not None:  # only now: else each of the two errors would keep the other, and the tensors of the capture
        raise first


@contextmanager
def _between_collections() -> Iterator[None]:
    """Let Python collect its garbage before and after the block, and none within it.

    In a capture an object may not be freed that gives pinned memory back to the driver. And a graph of autograd that
    has outlived its step would take the stream on which its parameters' gradients are added into the capture, or out
    of it.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        gc.collect()


def _release(pool: tuple[int, int]) -> None:
    """Give up what a capture holds that could not even end. Where it has ended, torch does it with the graph."""
    device = torch.cuda.current_device()
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)  # raises where the capture has ended
        torch._C._cuda_releasePool(device, pool)
        random = torch.cuda.default_generators[device]
        random.graphsafe_set_state(random.clone_state())  # the same numbers, and no longer those of a capture


def graphs_of(device: torch.device) -> Callable[[], Graph] | None:
    """Return what makes a new graph for work of a device, or None where there are none."""
    return partial(CudaGraph, device) if device.type == "cuda" else None


def is_capturing(device: torch.device) -> bool:
    """Return whether the work that is given to a device now is recorded in a graph.

    What is computed then exists in the memory of the graph, and only while it is replayed: nobody may keep it for work
    outside. And the graph may read nothing that is kept outside and replaced there.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def warn_of(problem: str, what: str) -> None:
    """Log why work cannot be captured: it is done all the same."""
    log.warning("%s are not captured in a CUDA graph, and run as usual: %s", what, problem)


class Captured:
    """Calls a function, which after a few calls is captured in a graph that is replayed from then on.

    The function reads and writes tensors that stay, takes and returns nothing, and never waits for the device. Each
    call, whether captured or not, does its work once. Without `new_graph`, or where the function cannot be captured, it
    is always called as usual; `what` says in the plural what the calls do.
    """

    def __init__(self, function: Callable[[], None], new_graph: Callable[[], Graph] | None, *, what: str) -> None:
        self.function, self.new_graph, self.what = function, new_graph, what
        self.calls = 0
        self.graph: Graph | None = None

    def __call__(self) -> None:
        if self.graph is None and self.new_graph is not None and self.calls == CALLS_BEFORE:
            self._capture(self.new_graph())
        if self.graph is not None:
            self.graph.replay()
            return
        self.calls += 1
        self.function()

    def _capture(self, graph: Graph) -> None:
        try:
            graph.capture(self.function)
        except RuntimeError as error:
            warn_of(first_line(error), self.what)
        else:
            self.graph = graph
