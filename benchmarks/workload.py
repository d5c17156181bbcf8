"""The model, the batch and the optimizer settings of `benchmarks.cpu_peers`, and our engine training with them."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from models.shape import ModelShape
from tests.parity import engine_of, share_of

Step = Callable[[Tensor], float]
"""A training step: the global batch ids[G, S] -> its mean loss on every rank, after one update."""

SHAPE = dict(
    vocab_size=2048,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    ffn_dim=2048,
    word_embed_proj_dim=512,
    max_position_embeddings=256,
)
SEQUENCE, GLOBAL_BATCH, PP_MICROBATCHES = 256, 8, 8
LR, EPS, BETAS, WEIGHT_DECAY, CLIP = 6e-4, 1e-6, (0.9, 0.95), 0.1, 1.0


def save_model(folder: Path, **changes: float) -> None:
    """Save random weights as a Hugging Face directory, with dropout 0; all contenders start from it.

    `changes` replace values of `SHAPE`. The vocabulary size and the number of positions must stay as they are.
    """
    from transformers import OPTConfig, OPTForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig.from_dict(SHAPE | dict(dropout=0.0) | changes)).save_pretrained(folder)


def without_dropout(shape: ModelShape) -> dict[str, float]:
    """Return the fields of a family's shape that set the probability of a dropout, all of them 0."""
    return {field.name: 0.0 for field in fields(cast(Any, shape)) if "drop" in field.name}


def tokens_of(step: int) -> Tensor:
    """Return the tokens ids[G, S] of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(4, SHAPE["vocab_size"], (GLOBAL_BATCH, SEQUENCE), generator=generator)


def ours(folder: Path, rank: int, world_size: int, sections: dict[str, Any]) -> Step:
    """Return our training step in the layout that these sections of a config describe.

    Only a pipeline splits a replica's batch into microbatches.
    """
    layout = sections.get("parallel", {})
    replicas = world_size // (layout.get("pipeline", {}).get("size", 1) * layout.get("tensor", {}).get("size", 1))
    micro = GLOBAL_BATCH // (PP_MICROBATCHES if "pipeline" in layout else replicas)
    config = dict(
        model=dict(path=str(folder)),
        data=dict(sequence_length=SEQUENCE),
        train=dict(global_batch_size=GLOBAL_BATCH, micro_batch_size=micro, clip_grad_norm=CLIP, device="cpu"),
        optimizer=dict(lr=LR, eps=EPS, betas=BETAS, weight_decay=WEIGHT_DECAY),
        lr_scheduler=dict(kind="constant", warmup_steps=0),
    )
    engine = engine_of(rank, world_size, config | sections)
    return lambda ids: engine.train_step(share_of(dict(input_ids=ids), engine)).loss


def graph_bytes(device: torch.device) -> int:
    """Return the bytes that CUDA graphs keep for tensors of their replays, which torch does not count as allocated."""
    if device.type != "cuda":
        return 0
    kept = [x for x in torch.cuda.memory_snapshot() if tuple(x.get("segment_pool_id", ())) not in ((), (0, 0))]
    return sum(x["total_size"] - x["allocated_size"] for x in kept)
