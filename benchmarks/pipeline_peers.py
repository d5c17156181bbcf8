"""Hugging Face's models trained with the schedules of torch.distributed.pipelining, one function for each schedule.

Every function returns a training step, as those of `benchmarks.peers` do. A replica's batch is `PP_MICROBATCHES`
microbatches. The blocks are divided evenly: with two stages on each rank, a stage has half as many.
"""

from collections.abc import Sequence
from pathlib import Path
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
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.peers import Part, adamw, load, loss_of, update
from benchmarks.workload import CLIP, PP_MICROBATCHES, Step


def gpipe(folder: Path, rank: int, world_size: int) -> Step:
    """Train with all forwards, then all backwards."""
    return _one_stage(ScheduleGPipe, folder, rank, world_size)


def one_f_one_b(folder: Path, rank: int, world_size: int) -> Step:
    """Train with one forward and one backward in turn."""
    return _one_stage(Schedule1F1B, folder, rank, world_size)


def interleaved(folder: Path, rank: int, world_size: int) -> Step:
    """Train with two stages on every rank, far apart, and one forward and one backward in turn."""
    return _train(ScheduleInterleaved1F1B, folder, 2 * world_size, [rank, rank + world_size])


def zero_bubble(folder: Path, rank: int, world_size: int) -> Step:
    """Train with gradients of weights in the bubbles, on one stage a rank (ZB-H1)."""
    return _train(ScheduleInterleavedZeroBubble, folder, world_size, [rank])


def zero_bubble_v(folder: Path, rank: int, world_size: int) -> Step:
    """Train with gradients of weights in the bubbles, on two stages a rank in the form of a V (ZB-V)."""
    return _train(ScheduleZBVZeroBubble, folder, 2 * world_size, [rank, 2 * world_size - 1 - rank])


class _Whole(Part):
    """A part whose output is no view, as OPT's block returns it: torch detaches a stage's output in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clone()


class _Stage(PipelineStage):
    """torch's stage without the messages that connect neighbours in NCCL.

    In a V torch 2.11 sends one from a rank to itself, which gloo cannot.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []


def _one_stage(schedule: Any, folder: Path, rank: int, world_size: int) -> Step:
    return _train(lambda stages, *more, **options: schedule(stages[0], *more, **options), folder, world_size, [rank])


def _train(schedule: Any, folder: Path, num_stages: int, indices: Sequence[int]) -> Step:
    """Return the training step of a pipeline, on the rank that holds these stages.

    torch leaves it to its user to sum the gradients of tied weights, and the norm over all stages. Losses are divided
    by the number of microbatches here: torch would divide a gradient once for each of a rank's stages that has it.
    """
    model = load(folder)
    parts = [_Whole(model, index, num_stages) for index in indices]
    stages = [_Stage(part, index, num_stages, torch.device("cpu")) for index, part in zip(indices, parts, strict=True)]
    run = schedule(stages, PP_MICROBATCHES, loss_fn=lambda x, ids: loss_of(x, ids) / PP_MICROBATCHES, scale_grads=False)
    parameters = list(dict.fromkeys(p for part in parts for p in part.parameters()))
    optimizer = adamw(parameters)
    first, last = 0 in indices, num_stages - 1 in indices
    ends = _ranks_where(first or last)
    group = dist.new_group(ends)
    tied = model.lm_head.weight if first or last else None

    def step(ids: Tensor) -> float:
        losses: list[Tensor] = []
        run.step(*([ids] if first else []), target=ids if last else None, losses=losses)
        if tied is not None and len(ends) > 1:
            dist.all_reduce(tied.grad, group=group)
        counted = [p.grad for p in parameters if p.grad is not None and (first or p is not tied)]
        loss = torch.stack(losses).sum().detach() if losses else torch.zeros(())
        sums = torch.stack([get_total_norm(counted).square(), loss])
        dist.all_reduce(sums)
        clip_grads_with_norm_(parameters, CLIP, sums[0].sqrt())
        update(optimizer)
        return sums[1].item()

    return step


def _ranks_where(is_one: bool) -> list[int]:
    """Return the ranks that have called this with True; every rank calls it."""
    flags = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    flags[dist.get_rank()] = int(is_one)
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()
