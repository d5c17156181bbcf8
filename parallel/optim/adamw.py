"""Master weights and their update."""

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from parallel.chunk.chunk import Chunk
from parallel.chunk.precision import moment_dtype, state_size
from parallel.config import OptimizerConfig
from parallel.layout.layout import ParameterInfo, Piece
from parallel.optim.rounding import Rounding
from parallel.optim.shared_update import HOST_PART, SharedUpdate, update_in_place
from parallel.optim.streaming import PART, Part, Update
from parallel.storage.transfer import HostCopy, Placement, Tier

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
                published.append(chunk.write_back())
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
            chunk.write_back().wait()

    def move(self, chunk: Chunk, placement: Placement) -> None:
        """Give a chunk another home, and its moments."""
        was = chunk.placement.states
        chunk.move_to(placement)
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
            like = torch.empty(chunk.master.shape, dtype=dtype, device="meta")
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
