"""Pipeline stages that sleep instead of computing: a schedule's time without the machine's cores deciding it.

A layer sleeps in its forward, sleeps where it would compute the gradient of its input, and defers a third sleep as a
linear defers the product that is the gradient of its weight. Plan, runner, transfers and process groups are the real
ones; a message is one number.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.config import parse
from parallel.config.parallel import PipelineConfig
from parallel.engine.context import Place, make_context
from parallel.ops.deferred import DeferredCalls
from parallel.pipeline.microbatch import Limits, Microbatch
from parallel.pipeline.p2p import Pipe
from parallel.pipeline.part import ModelPart, StageInterface
from parallel.pipeline.runner import Runner
from parallel.pipeline.schedule import plan_of
from parallel.plan.timeline import Costs, simulate

Row: TypeAlias = list[tuple[float, float]]
"""The start and the end of each of a rank's computes, in seconds."""


@dataclass(frozen=True)
class Step:
    """The time of a step: until the last rank has ended, and the computes of each rank."""

    seconds: float
    rows: tuple[Row, ...]

    @property
    def bubble(self) -> float:
        """The idle fraction of the ranks' time from the first compute to the last one, of the rank with most of it.

        Qi et al. 2023, arXiv 2401.10241, section 4.1.
        """
        spans = [(row[-1][1] - row[0][0], sum(end - start for start, end in row)) for row in self.rows]
        return max((span - busy) / span for span, busy in spans)


class Sleeper(nn.Module):
    """A layer that sleeps `seconds` in each of F, I and W, and notes when it did."""

    def __init__(self, seconds: float, deferred: DeferredCalls, row: Row) -> None:
        super().__init__()
        self.seconds, self.deferred, self.row = seconds, deferred, row

    def sleep(self) -> None:
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.row.append((start, time.perf_counter()))

    def forward(self, x: Tensor | None, microbatch: Microbatch) -> Tensor:
        x = torch.zeros((), requires_grad=True) if x is None else x
        y: Tensor = _Sleep.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Sleeper) -> Tensor:
        ctx.layer = layer
        layer.sleep()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.layer.sleep()
        ctx.layer.deferred.call(ctx.layer.sleep)
        return gradients[0], None


INTERFACE = StageInterface(lambda samples, length: (), torch.float32, is_counted=True, limits=Limits(1, 1))


@dataclass(frozen=True)
class Work:
    """The work of a step: each of a rank's F, I and W of a microbatch sleeps `seconds`, divided among its stages."""

    num_microbatches: int
    seconds: float


def measure(
    rank: int, world_size: int, pipelines: Mapping[str, PipelineConfig], work: Work, rounds: int
) -> dict[str, list[Step]]:
    """Return the steps of each schedule, which take turns; called on every rank."""
    sleepers = {name: Sleepers(Place(rank, world_size), pipeline, work) for name, pipeline in pipelines.items()}
    found: dict[str, list[Step]] = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, each in sleepers.items():
            found[name].append(each.step())
    return found


class Sleepers:
    """One rank's part of a model that sleeps, in a pipeline of all ranks."""

    def __init__(self, place: Place, pipeline: PipelineConfig, work: Work) -> None:
        parallel = dict(pipeline=dict(size=pipeline.size, schedule=pipeline.schedule, chunks=pipeline.chunks))
        config = parse(dict(parallel=parallel, train=dict(device="cpu")), world_size=place.world_size)
        mesh = make_context(config, place).mesh
        self.row, self.deferred, self.pipe = Row(), DeferredCalls(), Pipe(mesh.axis("pipe"), mesh.links)
        layer = Sleeper(work.seconds / pipeline.num_chunks, self.deferred, self.row)
        self.part = ModelPart({x: [layer] for x in pipeline.stages_of(place.rank)}, [], interface=INTERFACE, units={})
        ids = torch.zeros(work.num_microbatches, 1, dtype=torch.int64)
        self.microbatches = Microbatch(ids, ids, ids[:, 0]).split(1)
        self.plan = plan_of(pipeline, work.num_microbatches, recomputes=False)
        self.pipe.connect(mesh.device)

    def step(self) -> Step:
        """Take a step with all ranks, and return its times on all of them."""
        self.row.clear()
        runner = Runner(self.part, self.pipe, self.microbatches, weight_gradients=self.deferred)
        dist.barrier()
        start = time.perf_counter()
        runner.run(self.plan)
        dist.barrier()
        seconds = time.perf_counter() - start
        rows: list[Row] = [Row() for _ in range(self.pipe.size)]
        dist.all_gather_object(rows, self.row)
        return Step(seconds, tuple(rows))


def simulated(pipeline: PipelineConfig, work: Work) -> Step:
    """Return the step of the simulation with the same costs, and transfers that take no time."""
    each = work.seconds / pipeline.num_chunks
    timeline = simulate(plan_of(pipeline, work.num_microbatches, recomputes=False), Costs(each, each, each))
    rows = tuple([(span.start, span.end) for span in row if not span.action.op.is_transfer] for row in timeline.rows)
    return Step(timeline.makespan, rows)
