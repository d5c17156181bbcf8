"""Writes of others than the engine into parameters: they are noticed, compared between ranks, and counted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.errors import ModelError
from parallel.mesh.collectives import all_gather, all_reduce, gather_objects
from parallel.mesh.mesh import Axis
from parallel.ops.kernels.fingerprint import fingerprint, fingerprints

LOST = (
    "it was written into while this rank does not have its values (zero.stage=3, or parameters on the host). Write in"
    " `with engine.full_parameters(writable=True)`."
)


class Writes:
    """Watches the parameters of chunks between the engine's own writes.

    Versions, which torch counts, show at once what was written with `copy_`, `load_state_dict` and the like.
    Fingerprints of the buffers also show what was written through `.data`, and are compared once a step. What was
    written counts: it is taken over into the master weights. All ranks must have written the same.

    Parameters that are gathered on demand have no values between two uses, so what is written there is refused.
    """

    def __init__(self, chunks: Sequence[Chunk], world: Axis) -> None:
        self._chunks, self._world, self._device = list(chunks), world, chunks[0].memory.device
        self.is_on = True
        self._noted: tuple[list[Chunk], Tensor]  # chunks whose parameters stay whole, and their fingerprints
        self.note()

    def note(self) -> None:
        """Note that all parameters are now as the engine has written them."""
        whole = [chunk for chunk in self._chunks if _stays_whole(chunk)]
        self._noted = whole, _fingerprints(whole)
        for chunk in self._chunks:
            chunk.parameters.writes.note()

    def note_moved(self) -> None:
        """Note the same where chunks have been moved since `note`, and their parameters stay whole from now on."""
        noted = set(self._noted[0])
        if any(_stays_whole(chunk) and chunk not in noted for chunk in self._chunks):
            self.note()

    def stop(self) -> None:
        """Watch no longer, in a program in which nobody but the engine reads or writes parameters between two steps: it
        takes no time then, and a forward may begin before an update of offloaded states ends.
        """
        for chunk in self._chunks:
            chunk.is_private = True
        self._chunks, self._noted, self.is_on = [], ([], self._noted[1]), False

    def seen(self) -> list[str]:
        """Return the names of parameters into which somebody has written, as far as their versions show it."""
        self.take_replaced()
        return [name for chunk in self._chunks if _stays_whole(chunk) for name in chunk.parameters.writes.names()]

    def problem(self) -> str:
        """Return a message about a parameter that was written into while it had no values, once; or an empty string."""
        problem = ""
        for chunk in self._chunks:
            if not _stays_whole(chunk):
                if not chunk.parameters.is_whole and chunk.parameters.writes.names():
                    chunk.parameters.note_lost_writes()
                if lost := chunk.parameters.writes.take_lost():
                    problem = problem or f"{lost}: {LOST}"
        return problem

    def changed(self) -> Tensor:
        """Return an fp64 scalar on the device that is 0 if nothing was written on this rank; the host does not wait.

        Values that came by `p.data = ...` count once `take_replaced` has taken them.
        """
        flags = self._compared()
        num_seen = 0
        for chunk in self._chunks:
            writes = chunk.parameters.writes
            if not _stays_whole(chunk):
                chunk.parameters.note_lost_writes()
                flags += [] if writes.damaged is None else [writes.damaged]
            num_seen += writes.is_any()
        if num_seen or not flags:
            flags.append(torch.full((), num_seen > 0, device=self._device))
        return flags[0].double() if len(flags) == 1 else torch.stack(flags).sum(dtype=torch.float64)

    def _compared(self) -> list[Tensor]:
        """Return a flag on the device: whether a fingerprint is not the one that was noted; or none without any."""
        chunks, before = self._noted
        if not all(map(_stays_whole, chunks)):  # a chunk has been moved since
            still = [(chunk, x) for chunk, x in zip(chunks, before, strict=True) if _stays_whole(chunk)]
            chunks, before = [chunk for chunk, _ in still], torch.cat([before[:0], *(x.view(1) for _, x in still)])
        return [(_fingerprints(chunks) != before).any()] if chunks else []

    def take_if_any(self) -> None:
        """Take over what was written; every rank calls this. Raises ModelError as `take` does."""
        self.take_replaced()
        if all_reduce(self.changed(), self._world).item():
            self.take()

    def take(self) -> None:
        """Take over what was written on any rank; every rank calls this.

        Raises ModelError, on every rank, where ranks have written different values, or where values are lost.
        """
        problems = [self.problem(), *(self._problem_of(chunk) for chunk in self._chunks)]
        if all_problems := dict.fromkeys(x for found in gather_objects(problems, self._world) for x in found if x):
            raise ModelError("\n".join(all_problems))
        for chunk in self._chunks:
            chunk.take_written()
        self.note()

    def take_replaced(self) -> bool:
        """Take values that came by `p.data = ...` where parameters stay whole.

        Returns True if each parameter stays whole and has been where it belongs, so that there was nothing to take.
        """
        are_shown = [_stays_whole(chunk) and chunk.parameters.take_replaced() for chunk in self._chunks]
        return all(are_shown)

    def _problem_of(self, chunk: Chunk) -> str:
        """Return a message where ranks that have the same parameters have written different values into them."""
        parameters, info = chunk.parameters, chunk.infos[0]
        writes = parameters.writes
        mine = fingerprint(parameters.whole) if _stays_whole(chunk) else writes.kept
        mine = torch.zeros((), dtype=torch.int64, device=chunk.memory.device) if mine is None else mine
        names = [self._first_that_differs(chunk, mine, axis) for axis in (*chunk.spec.axes, *info.layout.copies)]
        if writes.take_damaged():
            return f"{info.name}, or another parameter of its layer: {LOST}"
        if chunk.gradient.is_in_parameters and writes.kept is not None:
            return f"{info.name}: {LOST}"
        if any(names):
            return (
                f"{next(filter(None, names))}: ranks have written different values into it. Write the same on every"
                " rank, or rank 0's in `with engine.full_parameters(writable=True)`."
            )
        return ""

    def _first_that_differs(self, chunk: Chunk, mine: Tensor, axis: Axis) -> str:
        """Return the name of the first parameter whose values differ between the ranks of an axis, or an empty string.

        `mine` is the fingerprint of all of them.
        """
        if bool((all_gather(mine[None], 0, axis) == mine).all()):  # on all ranks of the axis, or on none
            return ""
        if not _stays_whole(chunk):
            return f"{chunk.infos[0].name}, or another parameter of its layer"
        whole = chunk.parameters.whole
        each = fingerprints([whole[start:stop] for start, stop in chunk.spec.ranges])
        marks = all_gather(each, 0, axis).view(axis.size, -1)
        differs = (marks != marks[0]).any(0).tolist()
        return next(info.name for info, is_other in zip(chunk.infos, differs, strict=True) if is_other)


def _fingerprints(chunks: Sequence[Chunk]) -> Tensor:
    """Return the fingerprint of each chunk's parameters, int64 [len(chunks)]."""
    return fingerprints([chunk.parameters.whole for chunk in chunks])


def _stays_whole(chunk: Chunk) -> bool:
    return not chunk.is_gathered_on_demand
