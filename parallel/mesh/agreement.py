"""Agreement between ranks on what they do next, for programs in which ranks may do different things by mistake."""

import hashlib

import torch

from parallel.errors import ColonnadeError, ModelError
from parallel.mesh.collectives import MAX, all_reduce, gather_objects
from parallel.mesh.mesh import Axis
from parallel.mesh.notices import Notices


class Agreement:
    """Every rank tells the others what it is about to do, and none does it unless all do the same.

    Otherwise a rank whose program takes another way would wait for a collective that the others never join, or, worse,
    join another one. Here all ranks raise the same ModelError instead. `axis` is that of the world, or of replicas
    that are the world: its process group on the host is used, so that a device is not waited for. Each agreement also
    brings `notices` up to date.
    """

    def __init__(self, axis: Axis, notices: Notices | None = None) -> None:
        self.axis, self.notices = axis.on_host or axis, notices or Notices()

    def agree_on(self, action: str, problem: str = "", error: type[ColonnadeError] = ModelError) -> None:
        """Return when every rank of the axis has called this for the same action, without a problem.

        A `problem` that any rank has is raised on every rank, as this `error`. Raises ModelError on every rank where
        the actions differ; LostRankError where a rank that is waited for has ended.
        """
        self.axis.watch.begin(action.partition(" with ")[0])  # "a train step", without its learning rate
        if self.axis.size == 1:
            self.notices.take(self.notices.own())
            if problem:
                raise error(problem)
            return
        message = f"!{problem}" if problem else action
        if self._is_everyones(message):
            if problem:
                raise error(problem)
            return
        messages: list[str] = gather_objects(message, self.axis)
        if problems := [f"rank {rank}: {text[1:]}" for rank, text in enumerate(messages) if text.startswith("!")]:
            all_problems = "\n".join(problems)
            raise error(all_problems)
        ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(messages))
        raise ModelError(
            f"the ranks do different things: {ranks}. Every rank must run the same layers, forwards and steps in"
            " the same order."
        )

    def _is_everyones(self, message: str) -> bool:
        """Return whether every rank has this message, from the largest and the smallest digest of all.

        An all-reduce of a few numbers takes a fifth of the time of an all-gather of the messages, on 8 ranks of a host.
        """
        own = int.from_bytes(hashlib.blake2b(message.encode(errors="backslashreplace"), digest_size=7).digest())
        sent = torch.cat([torch.tensor([own, -own]), self.notices.own()])
        found = all_reduce(sent, self.axis, MAX, in_place=True)
        self.notices.take(found[2:])
        return bool(found[0] == -found[1])
