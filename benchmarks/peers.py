"""What a user of torch would write: Hugging Face's OPT trained with torch's own parallel APIs, one function for each.

Every function returns a step: the global batch ids[G, S] -> its mean loss, the same on every rank, after one update.
All of them use the fused AdamW, decay on matrices only, and clip the norm of the whole gradient.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from benchmarks.workload import BETAS, CLIP, EPS, LR, PP_MICROBATCHES, SHAPE, WEIGHT_DECAY, Step


def one_process(folder: Path, rank: int, world_size: int) -> Step:
    model = _load(folder)
    optimizer = _adamw(_groups(model.parameters()))

    def step(ids: Tensor) -> float:
        loss = _loss(model(ids).logits, ids)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        _update(optimizer)
        return loss.item()

    return step


def ddp(folder: Path, rank: int, world_size: int) -> Step:
    model = DistributedDataParallel(_load(folder))
    return _data_parallel(model, rank, world_size)


def fsdp2(folder: Path, rank: int, world_size: int) -> Step:
    """Parameters, gradients and moments sharded: the first collective of a layer is its weights' all-gather."""
    model, mesh = _load(folder), init_device_mesh("cpu", (world_size,))
    for layer in model.model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _data_parallel(model, rank, world_size)


def _data_parallel(model: nn.Module, rank: int, world_size: int) -> Step:
    optimizer = _adamw(_groups(model.parameters()))

    def step(ids: Tensor) -> float:
        ids = ids.chunk(world_size)[rank]
        loss = _loss(model(ids).logits, ids)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        _update(optimizer)
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        return mean.item()

    return step


def tensor_parallel(folder: Path, rank: int, world_size: int) -> Step:
    """Linears as DTensors, columns then rows; embeddings, norms and the head are whole on every rank."""
    model, mesh = _load(folder), init_device_mesh("cpu", (world_size,))
    columns, rows = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"), ("self_attn.out_proj", "fc2")
    for layer in model.model.decoder.layers:
        plan: dict[str, Any] = {name: ColwiseParallel() for name in columns} | {
            name: RowwiseParallel() for name in rows
        }
        parallelize_module(layer, mesh, plan)
        layer.self_attn.num_heads //= world_size
    split = [p for p in model.parameters() if isinstance(p.data, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p.data, DTensor)]
    optimizer = _adamw([*_groups(split), *_groups(whole)])  # a fused update takes tensors of one kind

    def step(ids: Tensor) -> float:
        loss = _loss(model(ids).logits, ids)
        loss.backward()
        of_split, of_whole = (get_total_norm([p.grad for p in part if p.grad is not None]) for part in (split, whole))
        assert isinstance(of_split, DTensor)
        norm = torch.hypot(of_split.full_tensor(), of_whole)
        for part in (split, whole):
            clip_grads_with_norm_(part, CLIP, norm)
        _update(optimizer)
        return loss.item()

    return step


class _Stage(nn.Module):
    """Every `world_size`-th part of the layers, the embeddings before the first, the head after the last."""

    def __init__(self, model: Any, rank: int, world_size: int) -> None:
        super().__init__()
        decoder, count = model.model.decoder, SHAPE["num_hidden_layers"] // world_size
        first, last = rank == 0, rank == world_size - 1
        self.embed_tokens = decoder.embed_tokens if first else None
        self.embed_positions = decoder.embed_positions if first else None
        self.layers = decoder.layers[rank * count : (rank + 1) * count]
        self.final_layer_norm = decoder.final_layer_norm if last else None
        self.lm_head = model.lm_head if last else None  # its weight is the first stage's embedding

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None and self.embed_positions is not None:
            positions = torch.arange(x.shape[1]).expand_as(x)
            x = self.embed_tokens(x) + self.embed_positions(torch.ones_like(x), position_ids=positions)
        for layer in self.layers:
            x = layer(x)
        if self.final_layer_norm is not None and self.lm_head is not None:
            x = self.lm_head(self.final_layer_norm(x))
        return x


def pipeline(folder: Path, rank: int, world_size: int) -> Step:
    """1F1B. Tied weights and the norm over all stages are the user's business here."""
    part = _Stage(_load(folder), rank, world_size)
    last = world_size - 1
    stage = PipelineStage(part, rank, world_size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, PP_MICROBATCHES, loss_fn=_loss)
    parameters, optimizer = list(part.parameters()), _adamw(_groups(part.parameters()))
    ends = dist.new_group([0, last])
    end = part.embed_tokens if rank == 0 else part.lm_head
    tied = None if end is None else end.weight

    def step(ids: Tensor) -> float:
        losses: list[Tensor] = []
        schedule.step(*([ids] if rank == 0 else []), target=ids if rank == last else None, losses=losses)
        if tied is not None:
            dist.all_reduce(tied.grad, group=ends)
        counted = [p.grad for p in parameters if p.grad is not None and not (rank == last and p is tied)]
        sums = torch.stack(
            [get_total_norm(counted).square(), torch.stack(losses).mean() if losses else torch.zeros(())]
        )
        dist.all_reduce(sums)
        clip_grads_with_norm_(parameters, CLIP, sums[0].sqrt())
        _update(optimizer)
        return sums[1].item()

    return step


def _load(folder: Path) -> Any:
    from transformers import OPTForCausalLM  # takes seconds; a rank that has no peer does without
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    everything = list(parameters)
    return [
        dict(params=[p for p in everything if p.ndim >= 2], weight_decay=WEIGHT_DECAY),
        dict(params=[p for p in everything if p.ndim < 2], weight_decay=0.0),
    ]


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=LR, eps=EPS, betas=BETAS, fused=True)


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()
