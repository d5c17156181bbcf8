"""Hugging Face's models trained with torch's own parallel APIs, one function for each, as a user of torch would do it.

Every function returns a training step: the global batch ids[G, S] -> its mean loss, the same on every rank, after one
update. All of them use the fused AdamW, apply weight decay to matrices only, and clip the norm of the whole gradient.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from benchmarks.workload import BETAS, CLIP, EPS, LR, WEIGHT_DECAY, Step


class UnavailableError(Exception):
    """A contender cannot run here, and the message says why."""


def one_process(folder: Path, rank: int, world_size: int) -> Step:
    """Train in a single process, with no parallelism."""
    model = load(folder)
    optimizer = adamw(model.parameters())

    def step(ids: Tensor) -> float:
        loss = loss_of(model(ids).logits, ids)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        update(optimizer)
        return loss.item()

    return step


def ddp(folder: Path, rank: int, world_size: int) -> Step:
    """Train with DistributedDataParallel."""
    model = DistributedDataParallel(load(folder))
    return _data_parallel(model, rank, world_size)


def fsdp2(folder: Path, rank: int, world_size: int) -> Step:
    """Train with FSDP2: parameters, gradients and moments are sharded, and a layer begins with an all-gather."""
    return _fsdp2(folder, rank, world_size, reshard_after_forward=None)


def fsdp2_kept(folder: Path, rank: int, world_size: int) -> Step:
    """Train with FSDP2, weights kept gathered from forward to backward as in ZeRO 2: one all-gather a step, not two."""
    return _fsdp2(folder, rank, world_size, reshard_after_forward=False)


def _fsdp2(folder: Path, rank: int, world_size: int, *, reshard_after_forward: bool | None) -> Step:
    model = load(folder)
    shard(model, init_device_mesh("cpu", (world_size,)), reshard_after_forward=reshard_after_forward)
    return _data_parallel(model, rank, world_size)


def shard(model: Any, mesh: DeviceMesh, **how: Any) -> None:
    """Apply `fully_shard` to every layer, and then to the rest of the model; `how` is passed on to it."""
    for layer in blocks_of(model):
        fully_shard(layer, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)


def _data_parallel(model: nn.Module, rank: int, world_size: int) -> Step:
    optimizer = adamw(model.parameters())

    def step(ids: Tensor) -> float:
        ids = ids.chunk(world_size)[rank]
        loss = loss_of(model(ids).logits, ids)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        update(optimizer)
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        return mean.item()

    return step


def tensor_parallel(folder: Path, rank: int, world_size: int) -> Step:
    """Train with linears as DTensors, split by columns, then by rows.

    Embeddings, norms and the head are whole on every rank.
    """
    model = load(folder)
    split_linears(model, init_device_mesh("cpu", (world_size,)))
    split = [p for p in model.parameters() if isinstance(p.data, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p.data, DTensor)]
    optimizer = adamw(split, whole)

    def step(ids: Tensor) -> float:
        loss = loss_of(model(ids).logits, ids)
        loss.backward()
        of_split, of_whole = (get_total_norm([p.grad for p in part if p.grad is not None]) for part in (split, whole))
        assert isinstance(of_split, DTensor)
        norm = torch.hypot(of_split.full_tensor(), of_whole)
        for part in (split, whole):
            clip_grads_with_norm_(part, CLIP, norm)
        update(optimizer)
        return loss.item()

    return step


def split_linears(model: Any, mesh: DeviceMesh) -> None:
    """Split the linears of each layer, and its attention heads, over the mesh.

    Hugging Face's models name the linears from heads or the inner width back to the hidden one as `ROWS` says.
    """
    for layer in blocks_of(model):
        linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        plan: dict[str, Any] = {
            name: RowwiseParallel() if name.rpartition(".")[2] in ROWS else ColwiseParallel() for name in linears
        }
        parallelize_module(layer, mesh, plan)
        if hasattr(layer.self_attn, "num_heads"):  # other families than OPT count their heads by the width of a head
            layer.self_attn.num_heads //= mesh.size()


ROWS = ("out_proj", "o_proj", "fc2", "down_proj")


class Part(nn.Module):
    """One of `count` pipeline stages: the blocks of the range `blocks`, or an equal share of them.

    The first stage has the embeddings too, and the last one the head. The model is an OPT, or has rotary positions as
    Llama's family does. Attention is causal and has no window.
    """

    def __init__(self, model: Any, index: int, count: int, blocks: range | None = None) -> None:
        super().__init__()
        decoder = model.get_decoder()
        size = len(decoder.layers) // count
        blocks = range(index * size, (index + 1) * size) if blocks is None else blocks
        first, last = index == 0, index == count - 1
        self.embed_tokens = decoder.embed_tokens if first else None
        self.embed_positions = getattr(decoder, "embed_positions", None) if first else None
        self.rotary = getattr(decoder, "rotary_emb", None)
        self.layers = decoder.layers[blocks.start : blocks.stop]
        norm = decoder.final_layer_norm if hasattr(decoder, "final_layer_norm") else decoder.norm
        self.norm = norm if last else None
        self.lm_head = model.lm_head if last else None  # its weight is the first stage's embedding

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        ids = x
        if self.embed_tokens is not None:
            x = self.embed_tokens(ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(torch.ones_like(ids), position_ids=positions)
        turned = {} if self.rotary is None else dict(position_embeddings=self.rotary(x, positions))
        for layer in self.layers:
            x = layer(x, **turned)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x


def load(folder: Path) -> Any:
    """Load the Hugging Face model of a directory, of any family, in fp32 and in training mode."""
    from transformers import AutoModelForCausalLM  # this takes seconds, and only ranks with a peer need it
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()


def blocks_of(model: nn.Module) -> list[Any]:
    """Return the transformer blocks of a Hugging Face model of any family: its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adamw(*parts: Iterable[Tensor], lr: float = LR) -> torch.optim.AdamW:
    """Make a fused AdamW with weight decay on matrices only.

    A fused update takes tensors of one kind, so that DTensors are a part of their own.
    """
    groups: list[dict[str, Any]] = []
    for part in map(list, parts):
        groups.append(dict(params=[p for p in part if p.ndim >= 2], weight_decay=WEIGHT_DECAY))
        groups.append(dict(params=[p for p in part if p.ndim < 2], weight_decay=0.0))
    return torch.optim.AdamW(groups, lr=lr, eps=EPS, betas=BETAS, fused=True)


def update(optimizer: torch.optim.Optimizer) -> None:
    """Update the weights, and drop the gradients."""
    optimizer.step()
    optimizer.zero_grad()
