"""Hugging Face's OPT under DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), on a CPU.

Communication goes over gloo, the optimizer is torch's own AdamW, and all else is DeepSpeed's default.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import adamw, load, loss_of
from benchmarks.workload import CLIP, GLOBAL_BATCH, Step

IS_INSTALLED = find_spec("deepspeed") is not None


def deepspeed1(folder: Path, rank: int, world_size: int) -> Step:
    """Train with ZeRO stage 1: moments and the update are sharded."""
    return _deepspeed(folder, rank, world_size, stage=1)


def deepspeed2(folder: Path, rank: int, world_size: int) -> Step:
    """Train with ZeRO stage 2: gradients are sharded too."""
    return _deepspeed(folder, rank, world_size, stage=2)


def deepspeed3(folder: Path, rank: int, world_size: int) -> Step:
    """Train with ZeRO stage 3: parameters are sharded too."""
    return _deepspeed(folder, rank, world_size, stage=3)


def _deepspeed(folder: Path, rank: int, world_size: int, *, stage: int) -> Step:
    model = load(folder)
    config = dict(
        train_micro_batch_size_per_gpu=GLOBAL_BATCH // world_size,
        gradient_accumulation_steps=1,
        gradient_clipping=CLIP,
        zero_optimization=dict(stage=stage, overlap_comm=False),  # there is no second stream on a CPU
        zero_allow_untested_optimizer=True,  # torch's fused AdamW, as for all contenders; its own would be compiled
        zero_force_ds_cpu_optimizer=False,
    )
    deepspeed, linear = _import(rank), F.linear
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(model.parameters()), config=config, dist_init_required=False
    )
    # Stage 3 replaces torch's linear in the whole process: restore it for the contenders that take turns with this one.
    its_linear, F.linear = F.linear, linear

    def step(ids: Tensor) -> float:
        ids = ids.chunk(world_size)[rank]
        with patch.object(F, "linear", its_linear):
            loss = loss_of(engine(ids).logits, ids)
            engine.backward(loss)
            engine.step()
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        return mean.item()

    return step


def _import(rank: int) -> Any:
    """Import the package, and make it use the process group that exists already."""
    os.environ |= dict(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))  # as DeepSpeed's launcher does
    ops = import_module("deepspeed.ops")
    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # this is for inference, and would be compiled now
    package: Any = import_module("deepspeed")
    package.init_distributed("gloo")
    return package
