"""Whole parameters on every rank, for the time in which a user reads or sets them."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.mesh.collectives import all_gather, broadcast
from parallel.ops.kernels.fingerprint import fingerprints


@dataclass(frozen=True, eq=False)
class WholeChunk:
    """The parameters of a chunk in memory of their own.

    values [n]  in the precision of the master weights
    shown [n]   in the precision of the parameters, which are views of it meanwhile; the same memory if that is the same
    """

    chunk: Chunk
    values: Tensor
    shown: Tensor

    @classmethod
    def of(cls, chunk: Chunk) -> "WholeChunk":
        """All-gather the master weights of a chunk; every rank of its axis calls this."""
        spec = chunk.spec
        chunk.settle()
        own = chunk.master.to(chunk.memory.device)
        values = all_gather(own, 0, spec.shard_axis) if spec.shard_axis.size > 1 else own.clone()
        found = cls(chunk, values, values.to(spec.dtype))
        chunk.parameters.show_instead(spec.views(found.shown))
        return found

    def close(self) -> str:
        """Make the parameters views of what they were before. Return a message about `.data` that does not fit."""
        problem = ""
        for info, view in zip(self.chunk.infos, self.chunk.spec.views(self.shown), strict=True):
            given = info.parameter.detach()
            if given.data_ptr() == view.data_ptr() and given.dtype == view.dtype and given.shape == view.shape:
                continue
            if (given.shape, given.dtype, given.device) == (view.shape, view.dtype, view.device):
                view.copy_(given)
            else:
                problem = f"{info.name}: it was {list(view.shape)} in {view.dtype}, and its .data is another kind now."
        self.chunk.parameters.show_own()
        return problem

    def write(self) -> None:
        """Take over rank 0's values; every rank calls this. An element that nobody has set keeps its precision."""
        chunk, spec = self.chunk, self.chunk.spec
        for flat in (self.values,) if self.shown is self.values else (self.values, self.shown):
            broadcast(flat, spec.axes[0])
        chunk.settle()
        master = chunk.master
        values, shown = (spec.own_slice(x).to(master.device) for x in (self.values, self.shown))
        was_set = shown.view(torch.uint8) != master.to(shown.dtype).view(torch.uint8)
        is_other = (values.view(torch.uint8) != master.view(torch.uint8)).view(-1, master.itemsize).any(1)
        was_set = was_set.view(-1, shown.itemsize).any(1) & ~is_other
        master.copy_(torch.where(was_set, shown.to(master.dtype), values))
        chunk.write_back().wait()
        torch.autograd.graph.increment_version([info.parameter for info in spec.infos])


class FullParameters:
    """Every parameter in `parameters` by name, whole on every rank, in the precision of the master weights. The
    module's own parameters are whole too, in theirs, until `close`.
    """

    def __init__(self, chunks: Sequence[Chunk], parameters: Container[nn.Parameter]) -> None:
        wanted = [chunk for chunk in chunks if any(info.parameter in parameters for info in chunk.infos)]
        self._wholes = [WholeChunk.of(chunk) for chunk in wanted]
        self.named = dict(self._named(parameters))
        self._marks = self._fingerprints()

    def _named(self, parameters: Container[nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        for whole in self._wholes:
            for info, view in zip(whole.chunk.infos, whole.chunk.spec.views(whole.values), strict=True):
                if info.parameter in parameters:
                    yield info.name, view

    def was_written(self) -> bool:
        """Return whether somebody has set values on this rank."""
        return self._fingerprints() != self._marks

    def close(self) -> str:
        """Make the parameters views of the engine's buffers again, whose values are as before.

        Returns a message about the first one whose `.data` was replaced by something else than values for it.
        """
        problems = [whole.close() for whole in self._wholes]
        return next(filter(None, problems), "")

    def write(self) -> None:
        """Take over rank 0's values; every rank calls this."""
        for whole in self._wholes:
            whole.write()

    def _fingerprints(self) -> list[int]:
        found: list[int] = fingerprints([x for whole in self._wholes for x in (whole.values, whole.shown)]).tolist()
        return found


def whole_gradients(
    chunks: Sequence[Chunk], unused: Container[nn.Parameter], divisor: float
) -> dict[str, Tensor | None]:
    """Return gradient / `divisor` of each parameter by name, whole on every rank and in master precision.

    It is None for those in `unused` and for frozen ones. The gradients must be complete, as after `Gradients.finish`.
    """
    found: dict[str, Tensor | None] = {}
    for chunk in chunks:
        if chunk.is_frozen:
            found |= dict.fromkeys(info.name for info in chunk.infos)
            continue
        total = chunk.gradient.on_device()
        whole = total if len(total) == chunk.size else all_gather(total, 0, chunk.spec.shard_axis)
        views = chunk.spec.views(whole.to(chunk.spec.master_dtype) / divisor)
        for info, view in zip(chunk.infos, views, strict=True):
            found[info.name] = None if info.parameter in unused else view
    return found
