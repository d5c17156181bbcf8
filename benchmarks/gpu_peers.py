"""Hugging Face's models under torch's own parallel APIs on several GPUs, in bf16 with fp32 master weights.

These are the peers of `benchmarks.peers` on GPUs. Every function takes the work and returns a training step: the global
batch ids[G, S] on the host -> its mean loss on every rank, after one update.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from benchmarks import peers
from benchmarks.workload import CLIP, Step
from models.costs import layer_costs
from models.shape import ModelShape
from parallel.pipeline.partition import partition

LR = 1e-4  # constant, without a warm-up, from random weights


@dataclass(frozen=True)
class Work:
    """The work of a contender: train a model of this shape on `batch` samples a step.

    `model`: the section of a config that gives the shape. `micro`: the samples of a replica's microbatch. `recompute`:
    whether a layer keeps only its input for backward.
    """

    model: dict[str, Any]
    shape: ModelShape
    device: torch.device
    sequence: int
    batch: int
    micro: int
    recompute: bool


def fsdp2(work: Work) -> Step:
    """Train with FSDP2, weights resharded after forward, as in ZeRO 3."""
    return _fsdp2(work, reshard_after_forward=True)


def fsdp2_kept(work: Work) -> Step:
    """Train with FSDP2, weights kept gathered from forward to backward, as in ZeRO 2."""
    return _fsdp2(work, reshard_after_forward=False)


def _fsdp2(work: Work, *, reshard_after_forward: bool) -> Step:
    model, world = _model(work, torch.float32), dist.get_world_size()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    peers.shard(model, _mesh(work), mp_policy=policy, reshard_after_forward=reshard_after_forward)
    optimizer = peers.adamw(model.parameters(), lr=LR)

    def step(ids: Tensor) -> float:
        loss = _accumulate(model, ids.chunk(world)[dist.get_rank()], work)
        clip_grad_norm_(model.parameters(), CLIP)
        peers.update(optimizer)
        loss /= world
        dist.all_reduce(loss)
        return loss.item()

    return step


def dtensor(work: Work) -> Step:
    """Train with linears as DTensors, split by columns, then by rows.

    Embeddings, norms and the head are whole on every rank.
    """
    model = _model(work, torch.bfloat16)
    peers.split_linears(model, _mesh(work))
    masters = _Masters(model.parameters())

    def step(ids: Tensor) -> float:
        loss = _accumulate(model, ids, work)
        split, whole = masters.squares()
        dist.all_reduce(split)
        masters.update((split + whole).sqrt())
        return loss.item()

    return step


def pipelining(work: Work) -> Step:
    """Train with `torch.distributed.pipelining` and its 1F1B schedule, the layers split into stages as ours are.

    torch leaves it to its user to sum the gradients of tied weights, and the norm over all stages.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    last = world - 1
    model = _model(work, torch.bfloat16)
    costs = layer_costs(work.shape, work.sequence, work.device.type)
    own = partition(costs, world)[rank]  # of the embedding, the blocks and the head
    part = peers.Part(model, rank, world, range(max(0, own.start - 1), min(own.stop - 1, work.shape.num_hidden_layers)))
    tied = model.lm_head.weight if work.shape.tie_word_embeddings and rank in (0, last) else None
    del model
    stage = PipelineStage(part, rank, world, work.device)
    schedule = Schedule1F1B(stage, work.batch // work.micro, loss_fn=_loss_of)
    parameters = list(part.parameters())
    masters = _Masters(parameters, counted=[not (rank == last and p is tied) for p in parameters])
    ends = dist.new_group([0, last])

    def step(ids: Tensor) -> float:
        ids = ids.to(work.device)
        losses: list[Tensor] = []
        schedule.step(*([ids] if rank == 0 else []), target=ids if rank == last else None, losses=losses)
        if tied is not None:
            dist.all_reduce(tied.grad, group=ends)
        _, own = masters.squares()
        sums = torch.stack([own, torch.stack(losses).mean().float() if losses else torch.zeros_like(own)])
        dist.all_reduce(sums)
        masters.update(sums[0].sqrt())
        return sums[1].item()

    return step


def context(work: Work) -> Step:
    """Train with torch's own context parallelism, under FSDP2 over the same ranks, weights kept gathered."""
    model, mesh, world = _model(work, torch.float32), _mesh(work), dist.get_world_size()
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


PEERS: dict[str, Callable[[Work], Step]] = {
    build.__name__: build for build in (fsdp2, fsdp2_kept, dtensor, pipelining, context)
}


ON_GPUS_ALONE = {"context"}  # which torch does not have for a CPU


class _Masters:
    """The fp32 master weights of this rank's part of bf16 parameters, kept apart and copied with `_foreach` calls.

    `counted`: whether each parameter's gradient is counted in the norm on this rank.
    """

    def __init__(self, parameters: Iterable[Tensor], counted: list[bool] | None = None) -> None:
        self.parameters = list(parameters)
        self.counted = counted or [True] * len(self.parameters)
        self.roundings = [_local(p.detach()) for p in self.parameters]
        self.masters = [x.float() for x in self.roundings]
        self.optimizer = peers.adamw(self.masters, lr=LR)

    def squares(self) -> tuple[Tensor, Tensor]:
        """Take over the gradients; return the sums of their squares, of DTensors' local parts and of all others."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = _local(parameter.grad).float(), None
        triples = zip(self.masters, self.parameters, self.counted, strict=True)
        found = [(m.grad, isinstance(p.data, DTensor)) for m, p, counts in triples if counts and m.grad is not None]
        split, whole = (get_total_norm([g for g, is_split in found if is_split is s]).square() for s in (True, False))
        device = self.masters[0].device
        return split.to(device), whole.to(device)

    def update(self, norm: Tensor) -> None:
        """Clip the gradients by their norm, update the master weights, and round them into the parameters."""
        gradients = [master.grad for master in self.masters if master.grad is not None]
        torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        peers.update(self.optimizer)
        torch._foreach_copy_(self.roundings, self.masters)


def _local(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor; another tensor is returned as it is."""
    local: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return local


def _accumulate(model: Any, ids: Tensor, work: Work) -> Tensor:
    """Run forward and backward of a replica's samples, one microbatch after another; return their mean loss."""
    parts = ids.to(work.device).split(work.micro)
    total = torch.zeros((), device=work.device)
    for part in parts:
        loss = _loss_of(model(part, use_cache=False).logits, part) / len(parts)
        loss.backward()
        total += loss.detach()
    return total


def _loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token, computed in fp32 as Hugging Face's own is."""
    return peers.loss_of(logits.float(), ids)


def _mesh(work: Work) -> DeviceMesh:
    return init_device_mesh(work.device.type, (dist.get_world_size(),))


def _model(work: Work, dtype: torch.dtype) -> Any:
    """Make the model with random weights, which are drawn on the device and are the same on every rank."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[work.shape.model_type].from_dict(work.shape.exported())
    torch.manual_seed(0)
    with torch.device(work.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.to(dtype).train()
    if work.recompute:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    return model
