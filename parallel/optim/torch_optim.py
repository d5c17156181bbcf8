"""A user's own torch optimizer, on masters that are divided and may be anywhere."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.errors import ModelError, either
from parallel.layout.layout import Piece
from parallel.optim.adamw import scaled
from parallel.storage.transfer import Placement, Tier


class TorchOptimizer:
    """A torch optimizer that updates every element by itself, on this rank's segments of masters in place of the
    parameters it was made for.

    Its groups stay its own, so that its hyperparameters, and whoever schedules them, go on as they were. A parameter
    without a gradient in a step is left alone, moments and all, as torch has it. Raises ModelError for an optimizer
    that cannot be divided so.
    """

    ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    host_share = 1.0  # it updates masters where they are

    def __init__(self, chunks: Sequence[Chunk], inner: torch.optim.Optimizer) -> None:
        self.chunks, self.inner = [c for c in chunks if not c.is_frozen], inner
        if type(inner) not in self.ELEMENTWISE:
            known = either(cls.__name__ for cls in self.ELEMENTWISE)
            raise ModelError(
                f"optimizer: {type(inner).__name__} is not known to update every element by itself. Use {known}."
            )
        if inner.state:
            raise ModelError(
                "optimizer: it has taken steps already. Pass a new one: engine.load_checkpoint restores a state."
            )
        parameters = {info.parameter for chunk in chunks for info in chunk.infos}
        strangers = sum(p not in parameters for group in inner.param_groups for p in group["params"])
        if strangers:
            raise ModelError(f"optimizer: {strangers} of its parameters are not the model's. Make it after the model.")
        self.unused: Container[nn.Parameter] = ()  # those that got no gradient
        self._is_stepping = False
        inner.register_step_pre_hook(lambda *_: self._refuse_strangers())
        self._segments = [(s, _leaf(s.data)) for chunk in self.chunks for s in chunk.segments(chunk.master)]
        of_parameters = {segment.info.parameter: leaf for segment, leaf in self._segments}
        for group in inner.param_groups:
            group["params"] = [of_parameters[p] for p in group["params"] if p in of_parameters]
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DISK:
                self._start_on_disk(chunk)

    @property
    def lr(self) -> float:
        """The first group's."""
        return float(self.inner.param_groups[0]["lr"])

    def step(self, factor: Tensor, lr: float) -> None:
        """Update every weight, but those of `unused` parameters, by its gradient times `factor`, a scalar. The groups'
        learning rates hold, whatever `lr` is.
        """
        leaves = iter(self._segments)
        is_streamed = any(chunk.placement.states is not Tier.DEVICE for chunk in self.chunks)
        on_host = factor.cpu() if is_streamed else factor
        for chunk in self.chunks:
            assert chunk.gradient is not None
            chunk.settle()
            scale = factor if chunk.placement.states is Tier.DEVICE else on_host
            gradient = scaled(chunk.gradient, scale, chunk.master.dtype)
            chunk.forget_gradient(is_spent=True)
            for segment in chunk.segments(gradient):
                _, leaf = next(leaves)
                leaf.grad = None if segment.info.parameter in self.unused else segment.data
        with self._stepping():
            self.inner.step()
        self.inner.zero_grad()
        for pending in [chunk.write_back() for chunk in self.chunks]:
            pending.wait()

    def pieces(self) -> dict[str, list[Piece]]:
        """The masters and what the optimizer keeps for each of their elements: views, to be saved or filled."""
        for chunk in self.chunks:
            chunk.settle()
        self._start_states()
        found = {"master": [piece for chunk in self.chunks for piece in chunk.pieces(chunk.master)]}
        for segment, leaf in self._segments:
            for kind, value in self._elementwise(leaf):
                found.setdefault(kind, []).extend(segment.pieces(value))
        return found

    def counters(self) -> dict[str, Any]:
        """What `restore` takes: how many updates each parameter that has a segment here has had, as many as it had
        gradients; and the groups' learning rates.
        """
        self._start_states()
        states = [(segment.info.name, self.inner.state[leaf]) for segment, leaf in self._segments]
        steps = {name: float(state["step"]) for name, state in states if "step" in state}
        return dict(steps=steps, rates=[group["lr"] for group in self.inner.param_groups])

    def restore(
        self, updates: int, *, steps: Mapping[str, float] | None = None, rates: Sequence[float] | None = None
    ) -> None:
        """Take the masters and states as they are now, filled through `pieces`, as those after `updates` updates;
        `steps`: of the parameters that have had others.
        """
        for group, rate in zip(self.inner.param_groups, rates or (), strict=rates is not None):
            group["lr"] = rate
        for segment, leaf in self._segments:
            if "step" in self.inner.state[leaf]:
                self.inner.state[leaf]["step"].fill_((steps or {}).get(segment.info.name, updates))
        for chunk in self.chunks:
            chunk.write_back().wait()

    def move(self, chunk: Chunk, placement: Placement) -> None:
        """Give a chunk another home, and what is kept for it."""
        was = chunk.placement.states
        chunk.move_to(placement)
        renewed = {segment.info: segment for segment in chunk.segments(chunk.master)}  # masters may lie elsewhere now
        for i, (segment, leaf) in enumerate(self._segments):
            if segment.info not in renewed:
                continue
            self._segments[i] = renewed[segment.info], leaf
            leaf.data = renewed[segment.info].data
        if was is not placement.states and not chunk.is_frozen:
            self._move_states(chunk)

    def held(self) -> list[tuple[Tier, Tensor]]:
        """What is kept for every element, and where."""
        found = []
        for chunk in self.chunks:
            for leaf in self._leaves_of(chunk):
                found += [(chunk.placement.states, x) for _, x in self._elementwise(leaf)]
        return found

    def _leaves_of(self, chunk: Chunk) -> list[Tensor]:
        infos = set(chunk.infos)
        return [leaf for segment, leaf in self._segments if segment.info in infos]

    def _elementwise(self, leaf: Tensor) -> list[tuple[str, Tensor]]:
        """What is kept for each element of a leaf."""
        state = self.inner.state.get(leaf, {})
        return [(k, x) for k, x in state.items() if isinstance(x, Tensor) and x.shape == leaf.shape and k != "step"]

    def _move_states(self, chunk: Chunk) -> None:
        """To where the chunk's masters are: of each kind one memory."""
        rooms: dict[str, Tensor] = {}
        for segment, leaf in zip(chunk.segments(chunk.master), self._leaves_of(chunk), strict=True):
            start = segment.data.storage_offset() - chunk.master.storage_offset()
            for kind, x in self._elementwise(leaf):
                if kind not in rooms:
                    rooms[kind] = chunk.empty(chunk.placement.states, chunk.master, kind)
                self.inner.state[leaf][kind] = rooms[kind][start : start + len(x)].copy_(x)

    def _start_on_disk(self, chunk: Chunk) -> None:
        """Its states from zero, in files, before the first update: so that there is room, or the run does not begin,
        and the host never has those of more than a chunk. Raises ModelError where zero is not what torch starts from.
        """
        if any(group.get("momentum") and group.get("dampening") for group in self.inner.param_groups):
            raise ModelError(
                "optimizer: SGD's first step is not dampened, so its states cannot start in zero.nvme_dir. Use"
                " dampening=0, or leave zero.nvme_dir out."
            )
        self._start_states(self._leaves_of(chunk))
        self._move_states(chunk)

    def state_bytes(self, chunk: Chunk) -> int:
        """Of a chunk's masters and of what is kept for them, from the first update on."""
        if chunk.is_frozen:
            return 0
        kept = [x for s, leaf in self._segments if s.info in chunk.infos for x in self.inner.state[leaf].values()]
        return chunk.master.nbytes + sum(x.nbytes for x in kept if isinstance(x, Tensor) and x.dim())

    def balance(self) -> float:
        return self.host_share

    def gain(self, share: float) -> float:
        return 0.0

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False

    def _refuse_strangers(self) -> None:
        if not self._is_stepping:
            raise ModelError("optimizer.step(): the gradients are with the engine. Call engine.step() instead.")

    def _start_states(self, leaves: Sequence[Tensor] | None = None) -> None:
        """What torch makes at a first step: a step of nothing, where there was none. All zero: torch's own would have
        a decay in them that is part of the gradient.
        """
        leaves = [leaf for _, leaf in self._segments] if leaves is None else leaves
        new = [leaf for leaf in leaves if not self.inner.state[leaf]]
        rates = [group["lr"] for group in self.inner.param_groups]
        for leaf in new:
            leaf.grad = torch.zeros_like(leaf)
        for group in self.inner.param_groups:
            group["lr"] = 0.0
        with self._stepping():
            type(self.inner).step(self.inner)  # not through a scheduler's count of steps
        for group, rate in zip(self.inner.param_groups, rates, strict=True):
            group["lr"] = rate
        self.inner.zero_grad()
        for leaf in new:
            for value in self.inner.state[leaf].values():
                if isinstance(value, Tensor):
                    value.zero_()


def _leaf(master: Tensor) -> Tensor:
    """A view of a master that an optimizer takes for a parameter."""
    return master.detach().requires_grad_()
