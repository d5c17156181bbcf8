"""Master weights and their update."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from parallel.chunk import Chunk
from parallel.config import OptimizerConfig
from parallel.errors import ModelError, either
from parallel.layout import Piece
from parallel.shared_update import SharedUpdate
from parallel.streaming import Part
from parallel.transfer import HostCopy, Placement, Tier

Scale: TypeAlias = Callable[[Tensor, Tensor, torch.dtype], Tensor]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), by torch's fused kernel, on the
    masters of chunks, one after another; decay on matrices only.

    A chunk's gradient is given up with its update. So a narrow one, which is widened on the way, never exists whole in
    master precision. Where states are not at home on the device, they stream through it in parts or, on the host, are
    updated there: `host_share` of them.
    """

    def __init__(self, chunks: Sequence[Chunk], config: OptimizerConfig, *, compiles: bool = False) -> None:
        self.chunks, self.config = chunks, config
        # Dynamic: chunks differ in size.
        self._scaled = torch.compile(_scaled_in_one_pass, dynamic=True) if compiles else scaled
        self.updates = 0
        self.moments: dict[Chunk, tuple[Tensor, Tensor]] = {}  # the first and the second, from the first update on
        self._shared = SharedUpdate(chunks[0].parameters.device)
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DISK:
                self._moments_of(chunk)  # so that there is room for them, or the run does not begin

    def step(self, factor: Tensor, lr: float) -> None:
        """Update every weight by its gradient times `factor`, a scalar."""
        self.updates += 1
        published = []
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DEVICE:
                self._update(self._part_of(chunk), factor, lr, self._scaled)
                chunk.gradient = None
                published.append(chunk.publish())
        streamed = [chunk for chunk in self.chunks if chunk.placement.states is not Tier.DEVICE]
        if streamed:
            here = HostCopy(factor)
            # The disk's first: while the host's are updated, what was changed is written, and read for the next time.
            self._shared.run(
                [self._part_of(chunk) for chunk in sorted(streamed, key=lambda c: c.placement.states is Tier.HOST)],
                lambda part: self._update(part, factor, lr, self._scaled),
                lambda part: self._update(part, here.wait(), lr, scaled),
            )
        for chunk in streamed:
            chunk.forget_gradient(is_spent=True)
            published.append(chunk.spread())
        for pending in published:
            pending.wait()

    def pieces(self) -> dict[str, list[Piece]]:
        """The masters and both moments, as pieces of public tensors: views, to be saved or filled."""
        found: dict[str, list[Piece]] = {"master": [], "exp_avg": [], "exp_avg_sq": []}
        for chunk in self.chunks:
            chunk.settle()
            for kind, flat in zip(found, (chunk.master, *self._moments_of(chunk)), strict=True):
                found[kind] += chunk.pieces(flat)
        return found

    def restore(self, steps: int) -> None:
        """Take the masters and moments as they are now, filled through `pieces`, as those after `steps` updates."""
        self.updates = steps
        for chunk in self.chunks:
            chunk.publish().wait()

    def place(self, chunk: Chunk, placement: Placement) -> None:
        """Give a chunk another home, and its moments."""
        was = chunk.placement.states
        chunk.place(placement)
        if was is not placement.states and chunk in self.moments:
            first, second = (chunk.empty(placement.states, x, "moments").copy_(x) for x in self.moments[chunk])
            self.moments[chunk] = first, second

    def held(self) -> list[tuple[Tier, Tensor]]:
        """The moments, and where they are."""
        return [(chunk.placement.states, x) for chunk, moments in self.moments.items() for x in moments]

    @property
    def host_share(self) -> float:
        """Of the elements whose states are at home on the host, those that are updated there."""
        return self._shared.share

    @host_share.setter
    def host_share(self, share: float) -> None:
        self._shared.share = share

    def balance(self) -> float:
        """The share with which neither side would have waited for the other in the last update."""
        return self._shared.balance()

    def _moments_of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        if chunk not in self.moments:
            tier, like = chunk.placement.states, chunk.master
            first, second = (chunk.empty(tier, like, "moments") for _ in range(2))
            for x in (first, second) if tier is not Tier.DISK else ():  # a new file is zero
                x.zero_()
            self.moments[chunk] = first, second
        return self.moments[chunk]

    def _part_of(self, chunk: Chunk) -> Part:
        assert chunk.gradient is not None
        states = chunk.master, *self._moments_of(chunk)
        return Part(chunk, states, chunk.gradient, chunk.own if chunk.is_rounded else None)

    def _update(self, part: Part, factor: Tensor, lr: float, scale: Scale) -> None:
        """A chunk or a part of it, where it is."""
        master, first, second = part.states
        adamw(
            [master],
            [scale(part.gradient, factor, master.dtype)],
            [first],
            [second],
            [],
            [torch.full((), self.updates - 1.0, device=master.device)],
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=lr,
            weight_decay=self.config.weight_decay if part.chunk.is_matrix else 0.0,
            eps=self.config.eps,
            maximize=False,
        )


class TorchOptimizer:
    """A torch optimizer that updates every element by itself, on this rank's segments of masters in place of the
    parameters it was made for.

    Its groups stay its own, so that its hyperparameters, and whoever schedules them, go on as they were. A parameter
    without a gradient in a step is left alone, moments and all, as torch has it. Raises ModelError for an optimizer
    that cannot be divided so.
    """

    ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    host_share = 1.0  # it updates masters where they are

    def __init__(self, chunks: Sequence[Chunk], inner: torch.optim.Optimizer, *, is_users: bool = True) -> None:
        self.chunks, self.inner, self.is_users = [c for c in chunks if not c.is_frozen], inner, is_users
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
        """Update every weight, but those of `unused` parameters, by its gradient times `factor`, a scalar."""
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
        if not self.is_users:
            for group in self.inner.param_groups:
                group["lr"] = lr
        with self._stepping():
            self.inner.step()
        self.inner.zero_grad()
        for pending in [chunk.publish() for chunk in self.chunks]:
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

    def steps(self) -> dict[str, float]:
        """How many updates each parameter that has a segment here has had: as many as it had gradients."""
        self._start_states()
        states = [(segment.info.name, self.inner.state[leaf]) for segment, leaf in self._segments]
        return {name: float(state["step"]) for name, state in states if "step" in state}

    def restore(self, updates: int, steps: Mapping[str, float] | None = None) -> None:
        """Take the masters and states as they are now, filled through `pieces`, as those after `updates` updates;
        `steps`: of the parameters that have had others.
        """
        for segment, leaf in self._segments:
            if "step" in self.inner.state[leaf]:
                self.inner.state[leaf]["step"].fill_((steps or {}).get(segment.info.name, updates))
        for chunk in self.chunks:
            chunk.publish().wait()

    def place(self, chunk: Chunk, placement: Placement) -> None:
        """Give a chunk another home, and what is kept for it."""
        was = chunk.placement.states
        chunk.place(placement)
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

    def balance(self) -> float:
        return self.host_share

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


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient[n] · factor[], in `dtype`; in place where the gradient has that already."""
    wide = [gradient]
    if gradient.dtype != dtype:
        wide = [torch.empty_like(gradient, dtype=dtype)]
        torch._foreach_copy_(wide, [gradient])  # faster than `to`
    torch._foreach_mul_(wide, factor.to(dtype))
    return wide[0]


def _scaled_in_one_pass(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled`, for a compiler."""
    return gradient.to(dtype) * factor.to(dtype)
