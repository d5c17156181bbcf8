"""Forward and backward of a training step as one CUDA graph, which the host launches with one call.

A step of a small model has kernels of a few microseconds, and eager code launches one in about ten: the device waits
for the host. A step of a large one begins with it, since the host has waited for the loss of the step before.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from parallel.config import Config
from parallel.engine.phases import Mark, Phase, Stopwatch
from parallel.engine.step_code import StepCode
from parallel.errors import first_line
from parallel.ops.captured import CALLS_BEFORE, Graph, graphs_of, warn_of
from parallel.optim.chunk_sum import FinishedSum
from parallel.optim.gradients import Gradients
from parallel.pipeline.staged import StagedBatch
from parallel.placement.memory_report import use_of
from parallel.storage.no_room import Memory, memory_without_room

Run: TypeAlias = Callable[..., Tensor]
"""Does forward and backward of microbatches with a function that is given each phase that begins: (microbatches, mark)
-> the loss summed over ranks.
"""

Key: TypeAlias = tuple[object, ...]

REPLAYS_THAT_PAY = 100
"""A capture may take as long as ten steps: the device has nothing to do, and memory goes back to the driver."""


@dataclass(eq=False)
class CapturedWork:
    """A graph, where it reads the batch, and where its results are.

    graph         reads parameters, the scales of 8-bit linears, and `batch`; all else is made in it
    batch         in memory that stays, where each batch is copied to
    loss          fp64 [], the loss summed over ranks
    results       of the chunks' gradients, whose memory the graph writes anew
    marks         the times at which phases begin, and at which the graph ends
    writes_more   True if it writes into an attribute of a module, such as a buffer that counts
    num_replays   of the graph so far
    """

    graph: Graph
    batch: StagedBatch
    loss: Tensor
    results: Sequence[FinishedSum]
    marks: Sequence[Mark]
    writes_more: bool
    num_replays: int = 0

    @property
    def last_phase(self) -> Phase:
        """The phase in which the graph ends."""
        phase = self.marks[-2][0]
        assert phase is not None
        return phase

    @property
    def may_be_in_vain(self) -> bool:
        """True if a replay that counts for nothing changes nothing, neither a module nor torch's generator."""
        return not (self.writes_more or self.graph.draws)

    def launch(self, batch: StagedBatch) -> None:
        """Launch the work for this batch, which is on the host."""
        batch.copy_to(self.batch)
        self.graph.replay()
        self.num_replays += 1


class CapturedStep:
    """Does forward and backward of steps: as usual at first, and once they are all alike, by replaying a graph.

    A step is captured after `CALLS_BEFORE` others with the same key, which has all that kernels are chosen by, or
    launched with, besides the values of tensors: shapes, the factor of the loss, addresses of parameters. So nothing is
    captured where the factor changes each time, as it does with padded samples, whose labels are counted. There is one
    graph at a time. A step with another key runs as usual, between replays. After each capture twice as many steps come
    before the next one, until a graph has been replayed often: else a run whose lengths change every few steps would
    mainly capture.

    **Early.** Whether a step may be replayed is known when modules, hooks and settings have been looked at, which takes
    the host milliseconds. So `start_early` launches the graph of the last step as soon as a batch is there, and the
    host looks while the device computes. Where the step turns out to be another one, nothing has happened: a replay
    writes its own memory alone, and the next one, or a step that runs as usual, begins anew. A graph that does more is
    never launched early: that of a module which counts its forwards, or draws random numbers.

    A graph that is launched before its step (`start_early` with marks) may have ended long before the step begins: what
    the host does in between, such as an evaluation, is no time of the step.

    **State.** A replay calls nothing in Python. These objects change in a step, and are afterwards what they are after
    any other:

        Gradients, its ChunkSums   `Gradients.restore`: begun anew, with the parameters that were seen
        Gradient, its Accumulator  the same; `total` is the tensor that it was when the step was captured, written anew
        Scaling                    the maxima are the graph's; copies of weights are dropped at the end of each step
        Stopwatch, the watch       `Stopwatch.take`: marks within the graph are set anew by each replay
        Gatherer, DeferredCalls    as before the step: nothing is gathered on demand, no call is left over
        parameters                 not written, and without `.grad`
        modules                    kept tables of positions are not shared with the graph (`ops.captured.is_capturing`)

    **Memory.** Activations and gradients are in memory that only the graph uses. During forward and backward that is as
    much as otherwise; but an update, an evaluation, or a step that runs as usual cannot reuse it. So a graph is kept
    only while as much memory as it has is free beside it (`make_room`), which is asked before other work, and when a
    replay has been launched, since somebody may have made a second model meanwhile. Work that needs still more, such as
    a step of longer samples, is done again without the graph (`beside`).

    `run` does forward and backward. `never`: why this engine's steps cannot be captured, or nothing.
    """

    def __init__(self, run: Run, code: StepCode, *, gradients: Gradients, stopwatch: Stopwatch, never: str) -> None:
        self.code, self.gradients, self.stopwatch, self.problem = code, gradients, stopwatch, never
        self._run, self._device = run, code.chunks[0].memory.device
        self._new_graph = graphs_of(self._device)
        self._key: Key = ()  # of the last step
        self._count = 0  # the steps in a row that had it
        self._calls_before = CALLS_BEFORE  # the next capture
        self._captured: tuple[Key, CapturedWork] | None = None
        self._was_replayed = False  # the last step
        self._early: StagedBatch | None = None  # that the graph has been launched for, before it was known to be right
        self._marks_ahead: Sequence[Mark] = ()  # before the graph, if it was launched before the step

    @property
    def may_start_early(self) -> bool:
        """True if the last step was replayed, may be replayed in vain, and nobody looks on."""
        if self._captured is None or not self._captured[1].may_be_in_vain:
            return False
        return self._was_replayed and not self._is_observed

    def start_early(self, batch: StagedBatch, *settings: object, marks: Sequence[Mark] = ()) -> None:
        """Launch the graph for the batch of the next call, where it is of the same form, and `may_start_early`; not a
        second time for a batch. `marks`: those before the graph, where the step of the batch has not begun.
        """
        form = (*settings, *batch.form)
        if self._captured is not None and self._key[: len(form)] == form and not self._is_launched(batch):
            self._captured[1].launch(batch)
            self._early, self._marks_ahead = batch, marks

    def discard_early(self) -> None:
        """Let the next call do without what has been started early: it was for another step, or for other values."""
        self._early = None

    def beside_early(self) -> AbstractContextManager[object]:
        """Return a context in which the device is given work beside what has been started early: see `Graph.beside`."""
        if self._early is None or self._captured is None:
            return nullcontext()
        return self._captured[1].graph.beside()

    def __call__(self, batch: StagedBatch, *settings: object) -> Tensor:
        """Return the loss summed over ranks of a batch on the host, and leave the gradients in chunks.

        `settings`: further numbers that launches depend on.
        """
        is_launched, self._early, self._was_replayed = self._is_launched(batch), None, False
        code = None if self._new_graph is None or self.problem or self._is_observed else self.code.key()
        if self._new_graph is None or code is None:
            return self._as_usual(batch)
        key = (*settings, *batch.form, *code)
        self._count = self._count + 1 if key == self._key else 1
        self._key = key
        if self._captured is not None and self._captured[0] == key:
            return self._replay(self._captured[1], batch, is_launched=is_launched)
        if self._count <= self._calls_before:
            return self._as_usual(batch)
        self.drop()
        if (work := self._capture(batch, self._new_graph())) is None:
            return self._as_usual(batch)
        self._captured, self._calls_before = (key, work), 2 * self._calls_before
        return self._replay(work, batch)

    def drop(self) -> None:
        """Give up the graph and its memory."""
        if self._captured is not None:
            graph = self._captured[1].graph
            self._captured, self._count = None, 0
            graph.drop()

    def beside(self, work: Callable[[], Tensor]) -> Tensor:
        """Return what work returns that is not captured. Where it has no room beside the graph, it is done again."""
        self.make_room()
        try:
            return work()
        except RuntimeError as error:
            if self._captured is None or memory_without_room(error) is not Memory.DEVICE:
                raise
        self.drop()  # now: the error had the tensors of the work
        return work()

    def make_room(self) -> None:
        """Give up the graph, unless as much memory as it has is free beside it."""
        if self._captured is not None and not _is_roomy(self._captured[1].graph, self._device):
            self.drop()

    def _is_launched(self, batch: StagedBatch) -> bool:
        """Return whether the graph has been launched for this batch: the same memory, however often it was scaled."""
        return self._early is not None and self._early.memory is batch.memory

    @property
    def _is_observed(self) -> bool:
        """True if somebody is told of each phase or gradient of a step, which a replay would not do."""
        return self.stopwatch.is_observed or self.gradients.are_watched

    def _as_usual(self, batch: StagedBatch) -> Tensor:
        return self.beside(lambda: self._run(batch.on(self._device).microbatches, self.stopwatch.mark))

    def _replay(self, work: CapturedWork, batch: StagedBatch, *, is_launched: bool = False) -> Tensor:
        if not is_launched:
            work.launch(batch)
        self._was_replayed = True
        if work.num_replays >= REPLAYS_THAT_PAY:
            self._calls_before = CALLS_BEFORE
        # The device computes already while the host does the rest.
        before = self._marks_ahead if is_launched else ()
        self.stopwatch.take([*before, *work.marks], ahead=bool(before))
        self.stopwatch.mark(work.last_phase)  # goes on
        self.gradients.restore(batch.num_microbatches, work.results)
        self.make_room()
        return work.loss

    def _capture(self, batch: StagedBatch, graph: Graph) -> CapturedWork | None:
        """Return the captured work; None where it could not be captured, or leaves too little memory: then none is."""
        static = batch.on(self._device, copied=True)
        marks: list[Mark] = []
        versions = self.code.versions()

        def mark(phase: Phase, detail: object = "") -> None:
            marks.append(self.stopwatch.mark_in_graph(phase))

        def run() -> Tensor:
            loss = self._run(static.microbatches, mark)
            marks.append(self.stopwatch.mark_in_graph(None))
            return loss

        try:
            loss = graph.capture(run)
        except RuntimeError as error:  # of CUDA: work that waits for the device, or no memory; training goes on
            self._give_up(first_line(error))
            return None
        if not _is_roomy(graph, self._device):
            size = graph.num_bytes
            self.gradients.begin(batch.num_microbatches)  # they are in the memory of the graph
            graph.drop()
            self._give_up(f"beside a graph of {size / 2**30:.1f} GiB not as much is free for other work")
            return None
        writes_more = self.code.versions() != versions
        return CapturedWork(graph, static, loss, self.gradients.finished(), marks, writes_more)

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        warn_of(problem, "steps")


def _is_roomy(graph: Graph, device: torch.device) -> bool:
    """Return whether as much memory as the graph has is free beside it."""
    use = use_of(Memory.DEVICE, device)
    kept_by_torch = max(0, use.unused - graph.num_bytes)  # of freed tensors outside of the graph
    return use.free + kept_by_torch >= graph.num_bytes


def problem_of_capture(config: Config, world_size: int, *, is_torchs: bool = False) -> str:
    """Return why steps with this config are never captured, or nothing. `is_torchs`: an optimizer was passed."""
    if is_torchs:
        return "hooks of an optimizer that was passed may keep gradients, which a replay would overwrite"
    if world_size > 1:
        return "ranks communicate within a step"
    if config.zero.stage >= 3 or config.zero.tensor_placement_policy != "cuda":
        return "parameters are gathered on demand"
    if config.train.activation_checkpointing == "offload":
        return "inputs of layers are copied to the host"
    return ""
