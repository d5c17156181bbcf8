"""Hugging Face's models with linears as DTensors, as `benchmarks.gpu_peers` trains them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _symmetric_memory
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from benchmarks import peers
from benchmarks.gpu_work import Masters, Work, accumulate, compile_layers, mesh_of, model_of
from benchmarks.workload import Step


def dtensor(work: Work) -> Step:
    """Train with linears split by columns, then by rows. Embeddings, norms and the head are whole on every rank."""
    model = model_of(work, torch.bfloat16)
    peers.split_linears(model, mesh_of(work))
    return _step(model, work)


def dtensor_sequence(work: Work) -> Step:
    """Train with linears split so, and activations between them split along the sequence."""
    model = model_of(work, torch.bfloat16)
    split_sequences(model, mesh_of(work))
    return _step(model, work)


def dtensor_async(work: Work) -> Step:
    """Train the same, compiled: each gather and each scatter is divided into parts and overlaps with its product.

    That is torch's async tensor parallelism, which has symmetric memory; on a CPU it is `dtensor_sequence`.
    """
    model, mesh = model_of(work, torch.bfloat16), mesh_of(work)
    split_sequences(model, mesh)
    step = _step(model, work)
    if work.device.type != "cuda":
        return step
    inductor = import_module("torch._inductor.config")
    _symmetric_memory.enable_symm_mem_for_group(mesh.get_group().group_name)
    compile_layers(model)

    def in_parts(ids: Tensor) -> float:
        with inductor.patch(_micro_pipeline_tp=True):  # forward and backward are compiled in the first step
            return step(ids)

    return in_parts


def _step(model: Any, work: Work) -> Step:
    masters = Masters(model.parameters())

    def step(ids: Tensor) -> float:
        loss = accumulate(model, ids, work)
        split, whole = masters.squares()
        dist.all_reduce(split)
        masters.update((split + whole).sqrt())
        return loss.item()

    return step


def split_sequences(model: Any, mesh: DeviceMesh) -> None:
    """Split linears and heads over the mesh, and the sequence from the first layer to the norm after the last one.

    A norm computes a part of each sequence; attention and the feed-forward gather whole ones, and scatter their sums.
    OPT joins samples and tokens to one dim before the feed-forward.
    """
    layers, decoder = peers.blocks_of(model), model.get_decoder()
    norm = decoder.final_layer_norm if hasattr(decoder, "final_layer_norm") else decoder.norm
    parallelize_module(layers[0], mesh, _moved(Replicate(), Shard(1)))
    parallelize_module(norm, mesh, _moved(Shard(1), Replicate()))
    for layer in layers:
        parallelize_module(layer, mesh, _plan(layer))
        if hasattr(layer.self_attn, "num_heads"):
            layer.self_attn.num_heads //= mesh.size()


def _moved(source: Any, target: Any) -> PrepareModuleInput:
    return PrepareModuleInput(input_layouts=(source,), desired_input_layouts=(target,), use_local_output=True)


def _plan(layer: nn.Module) -> dict[str, Any]:
    """Return what is done with each module of a layer, by its name."""
    plan: dict[str, Any] = {
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts=dict(hidden_states=Shard(1)),
            desired_input_kwarg_layouts=dict(hidden_states=Replicate()),
            use_local_output=True,
        )
    }
    if hasattr(layer, "mlp"):
        plan["mlp"] = _moved(Shard(1), Replicate())
    for name, module in layer.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            dim = 0 if leaf in ("fc1", "fc2") else 1
            if leaf in peers.ROWS:
                plan[name] = RowwiseParallel(output_layouts=Shard(dim))
            else:
                plan[name] = ColwiseParallel(input_layouts=Shard(0) if leaf == "fc1" else Replicate())
        elif "norm" in leaf:
            plan[name] = SequenceParallel(sequence_dim=SPLIT_DIMS.get(leaf, 1), use_local_output=True)
    return plan


SPLIT_DIMS = {"final_layer_norm": 0, "q_norm": 2, "k_norm": 2}
"""The dim that is split in a norm's input, where it is not the second one: tokens of all samples, or heads."""

BUILDS: tuple[Callable[[Work], Step], ...] = (dtensor, dtensor_sequence, dtensor_async)
