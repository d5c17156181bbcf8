"""Master weights and their update."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from parallel.chunk import Chunk
from parallel.config import Config, OptimizerConfig
from parallel.errors import ConfigError, ModelError, either
from parallel.layout import ParameterInfo, Piece
from parallel.rounding import NARROW, Rounding
from parallel.shared_update import HOST_PART, SharedUpdate, update_in_place
from parallel.streaming import PART, Part, Update
from parallel.transfer import HostCopy, Placement, Tier

Scale: TypeAlias = Callable[[Tensor, Tensor, torch.dtype], Tensor]

ROUNDED_AT_ONCE = {Tier.DEVICE: PART, Tier.HOST: HOST_PART}  # elements, by where an update runs


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), by torch's fused kernel, on the
    masters of chunks, one after another; decay on matrices only.

    A chunk's gradient is given up with its update. So a narrow one, which is widened on the way, never exists whole in
    master precision. Where states are not at home on the device, they stream through it in parts or, on the host, are
    updated there: `host_share` of them. `Rounding` is between moments and masters that are wider.

    A parameter without a gradient in a step is left alone, moments and all, as torch has it.
    """

    def __init__(self, chunks: Sequence[Chunk], config: OptimizerConfig, *, compiles: bool = False) -> None:
        self.chunks, self.config = [chunk for chunk in chunks if not chunk.is_frozen], config
        # Dynamic: chunks differ in size.
        self._scaled = torch.compile(_scaled_in_one_pass, dynamic=True) if compiles else scaled
        self.updates = 0
        self.unused: Container[nn.Parameter] = ()  # those that got no gradient
        self._missed: dict[ParameterInfo, int] = {}  # updates, of those that missed any
        self.moments: dict[Chunk, tuple[Tensor, Tensor]] = {}  # the first and the second, from the first update on
        self._shared = SharedUpdate(chunks[0].parameters.device)
        self._rounding: dict[Tier, Rounding] = {}  # by where an update runs, from the first one there on
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DISK:
                self._moments_of(chunk)  # so that there is room for them, or the run does not begin

    def step(self, factor: Tensor, lr: float) -> None:
        """Update every weight, but those of `unused` parameters, by its gradient times `factor`, a scalar."""
        self.updates += 1
        infos = (info for chunk in self.chunks for info in chunk.infos if info.parameter in self.unused)
        self._missed |= {info: self._missed.get(info, 0) + 1 for info in infos}
        published = []
        parts = {chunk: self._parts_of(chunk) for chunk in self.chunks}
        on_device = partial(self._update, factor=factor, lr=lr, scale=self._scaled, tier=Tier.DEVICE)
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DEVICE:
                for part in parts[chunk]:
                    on_device(part)
                chunk.gradient = None
                published.append(chunk.publish())
        streamed = [chunk for chunk in self.chunks if chunk.placement.states is not Tier.DEVICE]
        if streamed:
            self._update_elsewhere({chunk: parts[chunk] for chunk in streamed}, on_device, HostCopy(factor), lr)
        for chunk in streamed:
            chunk.forget_gradient(is_spent=True)
            published.append(chunk.spread())
        for pending in published:
            pending.wait()

    def _update_elsewhere(
        self, parts: Mapping[Chunk, list[Part]], on_device: Update, factor: HostCopy, lr: float
    ) -> None:
        """Than on the device: of states at home on the host or on a disk."""

        def on_host(part: Part) -> None:
            self._update(part, factor=factor.wait(), lr=lr, scale=scaled, tier=Tier.HOST)

        # The disk's first: while the host's are updated, what was changed is written, and read for the next time.
        found: list[Part] = []
        for chunk in sorted(parts, key=lambda chunk: chunk.placement.states is Tier.HOST):
            is_whole = sum(len(part.gradient) for part in parts[chunk]) == len(chunk.master) and len(parts[chunk]) == 1
            if chunk.placement.states is Tier.DISK and not is_whole:  # it would not begin and end with whole pages
                chunk.settle()
                update_in_place(parts[chunk], on_host)
            else:
                found += parts[chunk]
        if found:
            self._shared.run(found, on_device, on_host)

    def pieces(self) -> dict[str, list[Piece]]:
        """The masters and both moments, as pieces of public tensors: views, to be saved or filled."""
        found: dict[str, list[Piece]] = {"master": [], "exp_avg": [], "exp_avg_sq": []}
        for chunk in self.chunks:
            chunk.settle()
            for kind, flat in zip(found, (chunk.master, *self._moments_of(chunk)), strict=True):
                found[kind] += chunk.pieces(flat)
        return found

    def counters(self) -> dict[str, Any]:
        """What `restore` takes: how many updates each parameter that missed some has had."""
        return dict(steps={info.name: self.updates - missed for info, missed in self._missed.items()})

    def restore(self, updates: int, *, steps: Mapping[str, float] | None = None, **_: Any) -> None:
        """Take the masters and moments as they are now, filled through `pieces`, as those after `updates` updates;
        `steps`: of the parameters that have had fewer.
        """
        self.updates = updates
        had = [(info, int((steps or {}).get(info.name, updates))) for chunk in self.chunks for info in chunk.infos]
        self._missed = {info: updates - count for info, count in had if count < updates}
        for chunk in self.chunks:
            chunk.publish().wait()

    def place(self, chunk: Chunk, placement: Placement) -> None:
        """Give a chunk another home, and its moments."""
        was = chunk.placement.states
        chunk.place(placement)
        if was is not placement.states and chunk in self.moments:
            first, second = (chunk.empty(placement.states, x, "moments").copy_(x) for x in self.moments[chunk])
            self.moments[chunk] = first, second

    def state_bytes(self, chunk: Chunk) -> int:
        """Of a chunk's masters and moments."""
        if chunk.is_frozen:
            return 0
        return len(chunk.master) * state_size(chunk.master.dtype, self.config)

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

    def gain(self, share: float) -> float:
        """The seconds that the last update would have been shorter by with this share."""
        return self._shared.gain(share)

    def _moments_of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        if chunk not in self.moments:
            tier, dtype = chunk.placement.states, moment_dtype(chunk.master.dtype, self.config)
            like = torch.empty_like(chunk.master, dtype=dtype, device="meta")
            first, second = (chunk.empty(tier, like, "moments") for _ in range(2))
            for x in (first, second) if tier is not Tier.DISK else ():  # a new file is zero
                x.zero_()
            self.moments[chunk] = first, second
        return self.moments[chunk]

    def _parts_of(self, chunk: Chunk) -> list[Part]:
        """What of a chunk is to be updated: neighbours that have had as many updates together."""
        assert chunk.gradient is not None
        states = chunk.master, *self._moments_of(chunk)
        own = chunk.own if chunk.is_rounded else None
        runs: list[tuple[int, int, int]] = []  # start and stop in the whole, updates
        for info, (start, stop) in zip(chunk.infos, chunk.ranges, strict=True):
            if info.parameter in self.unused:
                continue
            updates = self.updates - self._missed.get(info, 0)
            if runs and runs[-1][1:] == (start, updates):
                start = runs.pop()[0]
            runs.append((start, stop, updates))
        found = []
        for start, stop, updates in runs:
            begin, end = (min(max(x - chunk.first, 0), len(chunk.master)) for x in (start, stop))
            if begin < end:
                found.append(Part(chunk, states, chunk.gradient, own, chunk.first, updates).cut(begin, end))
        return found

    def _update(self, part: Part, *, factor: Tensor, lr: float, scale: Scale, tier: Tier) -> None:
        """Elements of a chunk, where they are."""
        master, *moments = part.states
        if moments[0].dtype == master.dtype:
            self._adamw(part, moments, scale(part.gradient, factor, master.dtype), lr)
            return
        rounding = self._rounding_on(tier, master)
        for piece in part.split(rounding.size):
            with rounding.widened(piece, self.updates) as wide:
                self._adamw(piece, wide, scale(piece.gradient, factor, master.dtype), lr)

    def _rounding_on(self, tier: Tier, like: Tensor) -> Rounding:
        if tier not in self._rounding:
            size = min(ROUNDED_AT_ONCE[tier], max(len(chunk.master) for chunk in self.chunks))
            self._rounding[tier] = Rounding(size, like.dtype, like.device)
        return self._rounding[tier]

    def _adamw(self, part: Part, moments: list[Tensor], gradient: Tensor, lr: float) -> None:
        master, _, _ = part.states
        first, second = moments
        adamw(
            [master],
            [gradient],
            [first],
            [second],
            [],
            [torch.full((), part.updates - 1.0, device=master.device)],
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


Optimizer: TypeAlias = AdamW | TorchOptimizer


def optimizer_of(chunks: Sequence[Chunk], config: Config, passed: torch.optim.Optimizer | None) -> Optimizer:
    """The one that was passed, divided, or else the config's. Raises ConfigError or ModelError for what cannot be."""
    if passed is None:
        return AdamW(chunks, config.optimizer, compiles=config.train.compile)
    if config.optimizer.state_dtype != "fp32":
        raise ConfigError(
            f"optimizer.state_dtype: {config.optimizer.state_dtype!r} is for the config's own AdamW; one that is passed"
            " keeps what it keeps. Try 'fp32', or pass no optimizer."
        )
    return TorchOptimizer(chunks, passed)


def moment_dtype(master: torch.dtype, config: OptimizerConfig) -> torch.dtype:
    """That of both moments, the masters' own unless the config has it narrower."""
    return NARROW if config.state_dtype == "bf16" else master


def state_size(master: torch.dtype, config: OptimizerConfig) -> int:
    """Bytes of a parameter's master and moments."""
    return master.itemsize + 2 * moment_dtype(master, config).itemsize


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
