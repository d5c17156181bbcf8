"""Describe the work of a contender of `benchmarks.multi_gpu`, and do what torch's APIs leave to their user."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import get_total_norm

from benchmarks import peers
from benchmarks.workload import CLIP
from models.shape import ModelShape

LR = 1e-4  # constant, without a warm-up, from random weights


@dataclass(frozen=True)
class Work:
    """The work of a contender: train a model of this shape on `batch` samples a step.

    `model`: the section of a config that gives the shape. `micro`: the samples of a replica's microbatch. `recompute`:
    whether a layer keeps only its input for backward. `layers`: how many the model of this name has, where the shape
    may have fewer.
    """

    model: dict[str, Any]
    shape: ModelShape
    device: torch.device
    sequence: int
    batch: int
    micro: int
    recompute: bool
    precision: str = "bf16"
    layers: int = 0


class Masters:
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
        """Take over the gradients; return the sums of their squares, of split DTensors' parts and of all others."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = _local_gradient(parameter).float(), None
        triples = zip(self.masters, self.parameters, self.counted, strict=True)
        found = [(m.grad, _is_split(p.data)) for m, p, counts in triples if counts and m.grad is not None]
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


def _local_gradient(parameter: Tensor) -> Tensor:
    """Return this rank's part of the gradient, summed over ranks where each has only a term of it."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return _local(gradient)


def _is_split(x: Tensor) -> bool:
    return isinstance(x, DTensor) and any(isinstance(placement, Shard) for placement in x.placements)


def accumulate(model: Any, ids: Tensor, work: Work) -> Tensor:
    """Run forward and backward of a replica's samples, one microbatch after another; return their mean loss."""
    parts = ids.to(work.device).split(work.micro)
    total = torch.zeros((), device=work.device)
    for part in parts:
        loss = loss_of(model(part, use_cache=False).logits, part) / len(parts)
        loss.backward()
        total += loss.detach()
    return total


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token, computed in fp32 as Hugging Face's own is."""
    return peers.loss_of(logits.float(), ids)


def compile_layers(model: Any) -> None:
    """Compile each layer by `torch.compile`. One that is left uncompiled, since others were compiled too often, is an
    error: its time would be that of another contender.
    """
    import torch._dynamo.config

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in peers.blocks_of(model):
        layer.compile()


def mesh_of(work: Work) -> DeviceMesh:
    return init_device_mesh(work.device.type, (dist.get_world_size(),))


def model_of(work: Work, dtype: torch.dtype) -> Any:
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
