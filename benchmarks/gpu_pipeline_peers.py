"""Hugging Face's models with the schedules of `torch.distributed.pipelining`, as `benchmarks.gpu_peers` trains them.

torch leaves it to its user to sum the gradients of tied weights, and the norm over all stages. Layers are split into
stages as ours are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from benchmarks import peers
from benchmarks.gpu_work import Masters, Work, loss_of, model_of
from benchmarks.workload import Step
from models.costs import layer_costs
from parallel.config import PipelineConfig
from parallel.pipeline.partition import partition


def pipelining(work: Work) -> Step:
    """Train with one forward and one backward in turn."""
    return _train(work, "1f1b", lambda stages, *more, **options: Schedule1F1B(stages[0], *more, **options))


def pipelining_gpipe(work: Work) -> Step:
    """Train with all forwards, then all backwards."""
    return _train(work, "gpipe", lambda stages, *more, **options: ScheduleGPipe(stages[0], *more, **options))


def pipelining_interleaved(work: Work) -> Step:
    """Train with two stages on every rank, far apart, and one forward and one backward in turn."""
    return _train(work, "interleaved", ScheduleInterleaved1F1B)


def pipelining_zero_bubble(work: Work) -> Step:
    """Train with gradients of weights in the bubbles, on one stage a rank (ZB-H1)."""
    return _train(work, "zero_bubble", ScheduleInterleavedZeroBubble)


def pipelining_v(work: Work) -> Step:
    """Train with gradients of weights in the bubbles, on two stages a rank in the form of a V (ZB-V)."""
    return _train(work, "zero_bubble_v", ScheduleZBVZeroBubble)


class _Whole(peers.Part):
    """A part whose output is no view, as OPT's block returns it: torch detaches a stage's output in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clone()


class _StageOfV(PipelineStage):
    """torch's stage without the messages that connect neighbours: in a V one goes from a rank to itself.

    All ranks are connected when NCCL's process group is made for a device.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []


def _train(work: Work, name: str, schedule: Callable[..., Any]) -> Step:
    """Return the training step of a pipeline with this schedule of torch, and the stages of ours of this name.

    Losses are divided by the number of microbatches here: torch would divide a gradient once for each of a rank's
    stages that has it.
    """
    rank, world, count = dist.get_rank(), dist.get_world_size(), work.batch // work.micro
    pipe = PipelineConfig(size=world, schedule=name)
    stages, last = pipe.stages_of(rank), pipe.num_stages - 1
    model = model_of(work, torch.bfloat16)
    costs = layer_costs(work.shape, work.sequence, work.device.type)
    split = partition(costs, pipe.num_stages, pipe.num_chunks)  # the embedding, the blocks and the head
    parts = [_part(model, index, pipe.num_stages, split[index], work) for index in stages]
    is_end = 0 in stages or last in stages
    tied = model.lm_head.weight if work.shape.tie_word_embeddings and is_end else None
    del model
    kind = _StageOfV if name == "zero_bubble_v" else PipelineStage
    given = [kind(part, index, pipe.num_stages, work.device) for index, part in zip(stages, parts, strict=True)]
    run = schedule(given, count, loss_fn=lambda x, ids: loss_of(x, ids) / count, scale_grads=False)
    parameters = list(dict.fromkeys(p for part in parts for p in part.parameters()))
    masters = Masters(parameters, counted=[not (p is tied and 0 not in stages) for p in parameters])
    ends = sorted({r for r in range(world) for index in pipe.stages_of(r) if index in (0, last)})
    group = dist.new_group(ends)

    def step(ids: Tensor) -> float:
        ids = ids.to(work.device)
        losses: list[Tensor] = []
        run.step(*([ids] if 0 in stages else []), target=ids if last in stages else None, losses=losses)
        if tied is not None and len(ends) > 1:
            dist.all_reduce(tied.grad, group=group)
        _, own = masters.squares()
        sums = torch.stack([own, torch.stack(losses).sum().float() if losses else torch.zeros_like(own)])
        dist.all_reduce(sums)
        masters.update(sums[0].sqrt())
        return sums[1].item()

    return step


def _part(model: Any, index: int, num_stages: int, items: range, work: Work) -> _Whole:
    """Return the stage that has these items, of which the first is the embedding and the last one the head."""
    blocks = range(max(0, items.start - 1), min(items.stop - 1, work.shape.num_hidden_layers))
    return _Whole(model, index, num_stages, blocks)


BUILDS: tuple[Callable[[Work], Step], ...] = (
    *(pipelining, pipelining_gpipe, pipelining_interleaved, pipelining_zero_bubble, pipelining_v),
)
