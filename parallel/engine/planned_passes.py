"""Forwards and backwards of this rank's part of a model, in the order of a plan."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from parallel.engine.context import Context
from parallel.mesh.collectives import all_reduce
from parallel.optim.gradients import Gradients
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.p2p import Pipe
from parallel.pipeline.part import ModelPart
from parallel.pipeline.runner import Runner
from parallel.pipeline.schedule import evaluation_plan_of, plan_of
from parallel.pipeline.staged import StagedBatch
from parallel.plan.plan import Plan
from parallel.plan.validate import validate
from parallel.tensor.scaling import Scaling
from parallel.zero.gatherer import Gatherer


class PlannedPasses:
    """Computes the loss of microbatches and, in a training step, their gradients. Every rank calls each method.

    Parameters are gathered by `gatherer`; gradients are added up in `gradients`. `scaling` is that of linears that
    multiply in 8 bits, or None.
    """

    def __init__(
        self,
        part: ModelPart,
        context: Context,
        *,
        pipe: Pipe,
        gatherer: Gatherer,
        gradients: Gradients,
        scaling: Scaling | None,
    ) -> None:
        self.part, self.context, self.pipe = part, context, pipe
        self.gatherer, self.gradients, self.scaling = gatherer, gradients, scaling
        self.plans: dict[tuple[bool, int], Plan] = {}  # by: whether it trains, and the number of microbatches

    def plan(self, num_microbatches: int, *, trains: bool) -> Plan:
        """Return the plan of a training step, or of an evaluation. Each is made and validated once.

        Raises ConfigError where the file of a schedule has another number of microbatches.
        """
        key = trains, num_microbatches
        if key not in self.plans:
            config = self.context.config
            pipeline, recomputes = config.parallel.pipeline, config.train.activation_checkpointing != "none"
            if trains:
                plan = plan_of(pipeline, num_microbatches, recomputes=recomputes)
            else:
                plan = evaluation_plan_of(pipeline, num_microbatches)
            validate(plan)
            self.plans[key] = plan
        return self.plans[key]

    def forwards_and_backwards(
        self, microbatches: Sequence[Microbatch], mark: Callable[..., None], *, records: bool = False
    ) -> Tensor:
        """Return the loss summed over ranks, and leave the gradients of all microbatches, summed over ranks, in chunks.

        `mark` is called with each phase that begins. `records`: the scales of later steps depend on this one.
        """
        plan = self.plan(len(microbatches), trains=True)
        self.gradients.begin(len(microbatches), is_in_order=plan.begins_in_order)
        self.gatherer.begin()
        runner = Runner(self.part, self.pipe, microbatches, weight_gradients=self.gradients.deferred, mark=mark)
        with self.casting(records=records):
            total = runner.run(plan)
        mark("reduce")
        total = self._sum(total)
        self.gatherer.end()
        self.gradients.finish()
        return total

    def forwards(self, batch: StagedBatch) -> Tensor:
        """Return the loss summed over ranks of a batch of an evaluation, within `casting` and the gatherer's begin."""
        microbatches = batch.on(self.context.mesh.device).microbatches
        runner = Runner(self.part, self.pipe, microbatches, weight_gradients=self.gradients.deferred)
        return self._sum(runner.run(self.plan(len(microbatches), trains=False)))

    def casting(self, *, records: bool) -> AbstractContextManager[None]:
        """Return a context in which weights are cast to 8 bits once, and `records` maxima, where linears do so."""
        return nullcontext() if self.scaling is None else self.scaling.casting(records=records)

    def _sum(self, total: Tensor) -> Tensor:
        """Return the loss summed over every rank whose part of it is counted, the same on all ranks."""
        is_counted = self.part.interface.is_counted
        return all_reduce(total if is_counted else torch.zeros_like(total), self.context.mesh.world)
