"""Measure what the host does between the loss of a step and the launch of the next one, while a GPU waits.

    python -m benchmarks.host_path [--model opt-125m] [--batch 32] [--sequence 1024] [--steps 50] [--as-train]

It prints the parts of that path in microseconds: for each the fastest tenth of the steps, since a host is shared. On a
GPU a step is a CUDA graph, as in a training, and the last line says how long the device has nothing to do: from the end
of an update to the begin of the graph, in the median step. On a CPU, whose time would not be the host's, forward and
backward are left out: the model has its number of layers and parameters, but narrow ones. `--as-train`: nobody but the
engine writes into parameters, and the next batch is read while the device computes, as in `colonnade train`.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import models
import parallel
from models.family import named_sizes
from models.shapes import resolve
from parallel.chunk.writes import Writes
from parallel.engine import captured_step
from parallel.engine.captured_step import CapturedStep, CapturedWork
from parallel.engine.phases import Stopwatch
from parallel.engine.replica_batches import ReplicaBatches
from parallel.engine.step_code import StepCode
from parallel.modules.parameters import OriginalParameters
from parallel.ops.captured import CALLS_BEFORE, graphs_of
from parallel.ops.clock import clock_of
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.staged import StagedBatch
from parallel.storage.transfer import HostCopy

NARROW = dict(hidden_size=16, ffn_dim=32, num_attention_heads=1, word_embed_proj_dim=16)
FEW = 8  # tokens of a sample that a CPU computes with

PARTS: dict[str, tuple[Any, str]] = {
    "whether parameters were replaced": (Writes, "take_replaced"),
    "whether modules have changed": (OriginalParameters, "change"),
    "whether parameters were written into": (parallel.Engine, "_start_check"),
    "checks and staging of the batch": (ReplicaBatches, "staged"),
    "what decides about kernels": (StepCode, "key"),
    "whether somebody looks on": (CapturedStep, "_is_observed"),
    "copy of the batch": (StagedBatch, "copy_to"),
    "times of phases": (Stopwatch, "read"),
}
"""Methods and properties that do not call each other; none of a module, since a step is not captured then."""


class EmptyGraph:
    """A graph of nothing: what it would compute is computed once."""

    num_bytes, draws = 0, False

    def capture(self, function: Callable[[], Any]) -> Any:
        return function()

    def replay(self) -> None:
        pass

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def drop(self) -> None:
        pass


class Path:
    """The times of the path in each step: from when the host has the loss to when the graph is launched."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.idle: list[float] = []  # seconds of the device
        self._clock = clock_of(device)
        self._begun: float | None = None
        self._marks: tuple[Any, Any] | None = None  # on the device: an update has ended, the graph after it has begun

    def watch(self, stack: ExitStack) -> None:
        """Measure from now on, until the stack is closed."""
        for name, (owner, attribute) in PARTS.items():
            member = vars(owner)[attribute]
            is_property = isinstance(member, property)
            timed = self._timed(name, member.fget if is_property else member)
            stack.enter_context(mock.patch.object(owner, attribute, property(timed) if is_property else timed))
        wait, launch = HostCopy.wait, CapturedWork.launch

        def arrived(copy: HostCopy) -> Tensor:
            if copy._copy.numel() != 2:  # neither loss nor norm
                return wait(copy)
            updated = self._clock.now()  # the update has been launched
            found = wait(copy)
            if self._marks is not None:  # the device is past both of them
                self.idle.append(self._clock.seconds(*self._marks))
            self._marks = updated, None
            self._begun = time.perf_counter()
            return found

        def launched(work: CapturedWork, batch: StagedBatch) -> None:
            launch(work, batch)
            if self._begun is not None:
                self.seconds["all, from loss to launch"].append(time.perf_counter() - self._begun)
            if self._marks is not None:
                self._marks = self._marks[0], work.marks[0][2]
            self._begun = None

        stack.enter_context(mock.patch.object(HostCopy, "wait", arrived))
        stack.enter_context(mock.patch.object(CapturedWork, "launch", launched))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            found = function(*args, **options)
            if self._begun is not None:
                self.seconds[name].append(time.perf_counter() - begun)
            return found

        return timed


def engine_of(arguments: argparse.Namespace, *, on_gpu: bool) -> parallel.Engine:
    """Return an engine, whose steps compute next to nothing on a CPU."""
    raw = dict(
        model=dict(name=arguments.model, dropout=0.0) | ({} if on_gpu else NARROW),
        data=dict(sequence_length=arguments.sequence),
        train=dict(global_batch_size=arguments.batch, micro_batch_size=arguments.batch, precision="bf16"),
    )
    context = parallel.launch_from_torch(raw, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    if arguments.as_train:
        engine.writes.stop()
    run = engine.captured_step._run

    def with_few_tokens(microbatches: list[Microbatch], *mark: Any) -> Tensor:
        return run(
            [one.with_tensors(x[:1, :FEW] if x.ndim > 1 else x[:1] for x in one.tensors) for one in microbatches], *mark
        )

    if not on_gpu:
        engine.captured_step._run = with_few_tokens
    return engine


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", choices=[x for x in named_sizes() if x.startswith("opt-")])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--as-train", action="store_true")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(captured_step, "graphs_of", lambda device: graphs_of(device) or EmptyGraph)
        )
        engine = engine_of(arguments, on_gpu=on_gpu)
        batch = {"input_ids": torch.randint(4, 50_000, (arguments.batch, arguments.sequence))}
        next_batch = (lambda: batch) if arguments.as_train else None
        for _ in range(CALLS_BEFORE + 3):
            engine.train_step(batch, next_batch=next_batch)
        path = Path(engine.mesh.device)
        path.watch(stack)
        for _ in range(arguments.steps):
            engine.train_step(batch, next_batch=next_batch)
    for name, seconds in path.seconds.items():
        print(f"{name:<38} {sorted(seconds)[len(seconds) // 10] * 1e6:8.0f} µs")
    if on_gpu:
        print(f"{'the device has nothing to do':<38} {median(path.idle) * 1e6:8.0f} µs")


if __name__ == "__main__":
    main()
