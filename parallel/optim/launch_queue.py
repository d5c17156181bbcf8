"""The parts of an update that streams through a device, launched in their order, and no earlier than they should be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial

import torch

from parallel.chunk.chunk import Chunk
from parallel.optim.part import Part
from parallel.storage.transfer import CopyEvent, LaterEvent

AHEAD = 8  # parts: on an H200 their copies take 20 ms, in which the host launches much more


class LaunchQueue:
    """Launches parts when somebody waits for a chunk of them, and `AHEAD` parts more.

    A GPU has one queue for copies from the host, whatever stream they are in: each waits for all that were launched
    before it. If the host launched the copies of a whole update at once, those of the next batch and of the first layer
    that is gathered would be executed after the update, and no forward could run beside it. Parts that are launched
    ahead keep the bus busy while a gather waits for the end of an update.

    So a chunk's `parameters.written` is an event that launches parts. Whoever waits for it may be in another thread,
    that of autograd, or in any mode of torch.
    """

    def __init__(
        self,
        launches: Iterator[CopyEvent],
        parts: Sequence[Part],
        on_host: Mapping[Chunk, Future[float]],
        *,
        within: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`launches` launches the next of `parts` with each item, which is the end of the part's copy back. The parts
        of a chunk follow one another; the host updates other parts of it where it is in `on_host`. `within` returns the
        context of a launch.
        """
        self._launches, self._within = launches, within
        self._num, self._num_launched, self._is_ended = len(parts), 0, False
        self._events: dict[int, LaterEvent] = {}  # by the number of parts up to the last one of a chunk
        ends = {part.chunk: i + 1 for i, part in enumerate(parts)}
        for chunk, end in ends.items():
            self._events[end] = LaterEvent(partial(self.launch, end), on_host=on_host.get(chunk))
            chunk.parameters.record_write(self._events[end])

    def launch(self, num: int) -> None:
        """Launch the first `num` parts and those ahead of them, unless they have been launched."""
        num = min(num + AHEAD, self._num)
        if self._is_ended or num <= self._num_launched < self._num:
            return
        with self._within(), torch.inference_mode(False), torch.no_grad():
            while self._num_launched < num:
                self._launch_next()
            if num == self._num:
                next(self._launches, None)  # its end: it refers to no part any more
                self._is_ended = True

    def launch_all(self) -> None:
        """Launch all parts that are left."""
        self.launch(self._num)

    def _launch_next(self) -> None:
        launched = next(self._launches, None)
        if launched is None:
            raise RuntimeError("a part of an update could not be launched: an earlier error says why.")
        self._num_launched += 1
        if self._num_launched in self._events:
            self._events.pop(self._num_launched).launched(launched)
