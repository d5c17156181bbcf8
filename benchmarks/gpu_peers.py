"""Hugging Face's models under torch's own parallel APIs on several GPUs, in bf16 with fp32 master weights.

These are the peers of `benchmarks.peers` on GPUs. Every function takes the work and returns a training step: the global
batch ids[G, S] on the host -> its mean loss on every rank, after one update.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.utils import clip_grad_norm_

from benchmarks import gpu_pipeline_peers, gpu_tensor_peers, peers
from benchmarks.gpu_work import LR, Work, accumulate, compile_layers, mesh_of, model_of
from benchmarks.peers import UnavailableError
from benchmarks.workload import CLIP, Step


def fsdp2(work: Work) -> Step:
    """Train with FSDP2, weights resharded after forward, as in ZeRO 3."""
    return _fsdp2(work, reshard_after_forward=True)


def fsdp2_kept(work: Work) -> Step:
    """Train with FSDP2, weights kept gathered from forward to backward, as in ZeRO 2."""
    return _fsdp2(work, reshard_after_forward=False)


def fsdp2_compiled(work: Work) -> Step:
    """Train with FSDP2 as in ZeRO 3, each layer compiled by `torch.compile`."""
    return _fsdp2(work, reshard_after_forward=True, compiled=True)


def fsdp2_kept_compiled(work: Work) -> Step:
    """Train with FSDP2 as in ZeRO 2, each layer compiled by `torch.compile`."""
    return _fsdp2(work, reshard_after_forward=False, compiled=True)


def torchao(work: Work) -> Step:
    """Train with torchao's linears in 8 bits under FSDP2 as in ZeRO 3, compiled: weights are gathered in 8 bits."""
    return _fsdp2(work, reshard_after_forward=True, compiled=True, float8=_Float8(work))


def torchao_kept(work: Work) -> Step:
    """Train with torchao's linears in 8 bits under FSDP2 as in ZeRO 2, compiled: weights are gathered in 8 bits."""
    return _fsdp2(work, reshard_after_forward=False, compiled=True, float8=_Float8(work))


class _Float8:
    """torchao's linears in 8 bits, with scales of each tensor as it is; the head stays in bf16."""

    def __init__(self, work: Work) -> None:
        if find_spec("torchao") is None:
            raise UnavailableError("torchao is not installed.")
        on_gpu = work.device.type == "cuda"
        if on_gpu and torch.cuda.get_device_capability() < (8, 9):
            raise UnavailableError("products of 8 bits need a GPU of compute capability 8.9 or newer.")
        self._float8 = import_module("torchao.float8")
        self._config = self._float8.Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=not on_gpu)

    def convert(self, model: Any) -> None:
        """Replace the linears of the layers; called before they are sharded."""
        self._float8.convert_to_float8_training(
            model, config=self._config, module_filter_fn=lambda module, name: "lm_head" not in name
        )

    def after_update(self, model: Any) -> None:
        """Compute the scales of all weights at once, as torchao's documentation advises after each update."""
        self._float8.precompute_float8_dynamic_scale_for_fsdp(model)


def _fsdp2(work: Work, *, reshard_after_forward: bool, compiled: bool = False, float8: _Float8 | None = None) -> Step:
    model, world = model_of(work, torch.float32), dist.get_world_size()
    if float8 is not None:
        float8.convert(model)
    if compiled and work.device.type == "cuda":
        compile_layers(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    peers.shard(model, mesh_of(work), mp_policy=policy, reshard_after_forward=reshard_after_forward)
    optimizer = peers.adamw(model.parameters(), lr=LR)

    def step(ids: Tensor) -> float:
        loss = accumulate(model, ids.chunk(world)[dist.get_rank()], work)
        clip_grad_norm_(model.parameters(), CLIP)
        peers.update(optimizer)
        if float8 is not None:
            float8.after_update(model)
        loss /= world
        dist.all_reduce(loss)
        return loss.item()

    return step


def context(work: Work) -> Step:
    """Train with torch's own context parallelism, under FSDP2 over the same ranks, weights kept gathered."""
    model, mesh, world = model_of(work, torch.float32), mesh_of(work), dist.get_world_size()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    peers.shard(model, mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = peers.adamw(model.parameters(), lr=LR)

    def step(ids: Tensor) -> float:
        ids = ids.to(work.device)
        total = torch.zeros((), device=work.device)
        for part in ids.split(work.micro):
            labels = torch.cat([part[:, 1:], torch.full_like(part[:, :1], -100)], 1)
            positions = torch.arange(part.shape[1], device=part.device).expand_as(part).contiguous()
            split = [part.clone(), labels, positions]
            with context_parallel(mesh, buffers=split, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(split)):
                logits = model(split[0], position_ids=split[2], use_cache=False).logits.float()
                loss = F.cross_entropy(logits.flatten(0, 1), split[1].flatten(), reduction="sum")
                loss = loss * world / (len(ids) * (ids.shape[1] - 1))  # FSDP averages gradients over ranks
                loss.backward()
            total += loss.detach() / world
        clip_grad_norm_(model.parameters(), CLIP)
        peers.update(optimizer)
        dist.all_reduce(total)
        return total.item()

    return step


_BUILDS: tuple[Callable[[Work], Step], ...] = (
    *(fsdp2, fsdp2_kept, fsdp2_compiled, fsdp2_kept_compiled, torchao, torchao_kept, context),
    *gpu_tensor_peers.BUILDS,
    *gpu_pipeline_peers.BUILDS,
)
PEERS: dict[str, Callable[[Work], Step]] = {build.__name__: build for build in _BUILDS}
ON_GPUS_ALONE = {"context"}  # which torch does not have for a CPU
PACKAGES = {"torchao": "torchao", "torchao_kept": "torchao"}  # that a peer needs beside torch and transformers
