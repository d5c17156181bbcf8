"""Chunks, and parts of them to update, for tests that need no engine."""

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkSpec
from parallel.layout import sources
from parallel.layout.layout import Layout, ParameterInfo
from parallel.mesh.mesh import ALONE, Axis
from parallel.optim.part import Part


def chunk_of(*shapes: tuple[int, ...], rank: int = 0, ranks: int = 1, device: str = "cpu") -> Chunk:
    """Return a chunk of parameters of these shapes, of one rank of a data-parallel axis in ZeRO stage 1."""
    found = (sources.whole(f"a.{i}", shape) for i, shape in enumerate(shapes))
    return chunk_of_sources(*found, rank=rank, ranks=ranks, device=device)


def chunk_of_sources(*found: tuple[sources.Source, ...], rank: int = 0, ranks: int = 1, device: str = "cpu") -> Chunk:
    """Return a chunk of parameters with these sources, of which the last box ends where the parameter does."""
    axis = Axis("data", rank, ranks, tuple(range(ranks)), None, ALONE.traffic)
    infos = []
    for i, of in enumerate(found):
        shape = tuple(stop for _, stop in of[-1].box)
        layout = Layout(shape, ((),) * len(shape), sync=(axis,))
        infos.append(ParameterInfo(f"a.{i}", "a", nn.Parameter(torch.zeros(shape, device=device)), layout, of))
    return Chunk(ChunkSpec(infos, torch.float32, zero=1))


def part_of(chunk: Chunk, moments: tuple[Tensor, Tensor] | None = None) -> Part:
    """Return the whole of a rank's slice as a part, with zeros as its gradient and, by default, moments in bf16."""
    like = chunk.master
    first, second = moments or tuple(torch.zeros_like(like, dtype=torch.bfloat16) for _ in range(2))
    states, gradient = (like, first, second), torch.zeros_like(like)
    return Part(chunk, states, gradient=gradient, own=None, first=chunk.spec.first, updates=1)
