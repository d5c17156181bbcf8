"""AdamW on master weights, wherever they are."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.precision import state_size
from parallel.config import OptimizerConfig
from parallel.layout.layout import Piece
from parallel.ops.kernels.adamw import can_be_fused, update_fused, update_in_torch
from parallel.ops.kernels.elements import Elements, Noise, Step
from parallel.optim.moments import Moments
from parallel.optim.part import Part
from parallel.optim.rounding import NoiseOfParts, Rounding
from parallel.optim.shared_update import FIRST_SHARE, HOST_PART, SharedUpdate, update_in_place
from parallel.optim.streaming import PART
from parallel.optim.update_counts import UpdateCounts
from parallel.storage.transfer import HostCopy, Placement, Tier


class StepOnHost:
    """The numbers of one update while they are copied to the host."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._numbers = HostCopy(torch.stack([step.factor.double(), step.found_inf.double()]))

    def wait(self) -> Step:
        """Return the numbers once they have arrived."""
        factor, found_inf = self._numbers.wait().unbind()
        return replace(self._step, factor=factor, found_inf=found_inf.float())


SMALL = 2**20  # elements of a chunk: an update takes a GPU less time than its launch takes the host
ROUNDED_AT_ONCE = {Tier.DEVICE: PART, Tier.HOST: HOST_PART}  # elements, for each tier on which an update runs


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), on the master weights of one chunk
    after the other. Only matrices decay.

    On a GPU one kernel reads the gradient in its own dtype and the states, and writes states and parameters
    (`kernels.adamw`); small chunks share one launch. Elsewhere, and in fp64, torch's fused Adam kernel takes a gradient
    that has been widened, chunk by chunk, so that the whole of it never exists in master precision; then the parameters
    are written. A chunk's gradient is freed after the chunk's update.

    States that are offloaded stream through the device in parts, and a share of those on the host, `host_share`, is
    updated on the host meanwhile, as in DeepSpeed's ZeRO-Offload (Ren et al. 2021, arXiv 2101.06840). Moments that are
    narrower than the master weights are rounded stochastically (`Rounding`).

    A parameter without a gradient in a step stays as it is, and so do its moments, as in torch. Where the device finds
    that a step is not finite, its kernels leave everything as it is, to the bit, and the host need not wait: it calls
    `take_back` later. (A moment in bf16 that has not changed is rounded to itself, since it has no bits to round.)
    """

    kind = "the config's AdamW"  # as a checkpoint names it
    first_share = FIRST_SHARE

    def __init__(self, chunks: Sequence[Chunk], config: OptimizerConfig) -> None:
        self.chunks, self.config = [chunk for chunk in chunks if not chunk.is_frozen], config
        self.unused: Container[nn.Parameter] = ()  # parameters that got no gradient
        self._counts = UpdateCounts()
        self.moments = Moments(config)
        self._shared = SharedUpdate(chunks[0].memory.device)
        self._rounding: dict[tuple[Tier, bool], Rounding] = {}  # from the first update on that needs its buffers
        self._noise = NoiseOfParts(chunks[0].memory.device)
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DISK:
                self.moments.of(chunk)  # a disk without room for them is refused before the first step

    def step(self, factor: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        """Update every weight, except those of `unused` parameters, by its gradient times `factor`, a scalar.

        `found_inf`: an fp32 scalar on the same device; where it is 1, nothing changes but the count of updates.
        """
        self._shared.finish()
        self._counts.begin(self.chunks, self.unused)
        left_out = torch.zeros((), device=factor.device) if found_inf is None else found_inf
        now = Step(factor, left_out, lr, self._counts.total)
        gathering = []
        parts = {chunk: self._parts_of(chunk) for chunk in self.chunks}
        offloaded = {chunk: of for chunk, of in parts.items() if chunk.placement.states is not Tier.DEVICE}
        if offloaded:
            self._update_offloaded(offloaded, now)
        for chunks in _launched_together(self.chunks):
            for chunk in chunks:
                chunk.guard.wait()
            self._update([part for chunk in chunks for part in parts[chunk]], now=now, tier=Tier.DEVICE)
            for chunk in chunks:
                chunk.gradient.drop()
                gathering.append(chunk.all_gather_updated())
        self._shared.wait_for_parameters_on_device()
        for chunk in offloaded:
            chunk.gradient.drop()
            gathering.append(chunk.all_gather_updated())
        for pending in gathering:
            pending.wait()

    def take_back(self) -> None:
        """Count the last update no longer: it was left out."""
        self._counts.take_back()

    def _update_offloaded(self, parts: Mapping[Chunk, list[Part]], now: Step) -> None:
        """Update chunks whose optimizer states are offloaded to the host or a disk: see `SharedUpdate` for the end."""
        there = StepOnHost(now)

        def on_host(parts: Sequence[Part]) -> None:
            self._update(parts, now=there.wait(), tier=Tier.HOST)

        def on_device(parts: Sequence[Part]) -> None:
            self._update(parts, now=now, tier=Tier.DEVICE, is_streamed=True)

        for chunk in parts:
            chunk.guard.wait()
        # Chunks on the disk come first: while those on the host are updated, the disk writes what has changed, and
        # reads the first parts of the next update.
        found: list[Part] = []
        for chunk in sorted(parts, key=lambda chunk: chunk.placement.states is Tier.HOST):
            is_whole = sum(len(part.gradient) for part in parts[chunk]) == len(chunk.master) and len(parts[chunk]) == 1
            if chunk.placement.states is Tier.DISK and not is_whole:  # its parts would not begin and end at whole pages
                chunk.settle()
                update_in_place(parts[chunk], on_host)
            else:
                found += parts[chunk]
        if found:
            self._shared.run(found, on_device, on_host, numbers=(now.factor, now.found_inf))

    def pieces(self) -> dict[str, list[Piece]]:
        """Return the master weights and both moments, as pieces of public tensors: views, to be saved or filled."""
        found: dict[str, list[Piece]] = {"master": [], "exp_avg": [], "exp_avg_sq": []}
        for chunk in self.chunks:
            chunk.settle()
            for kind, flat in zip(found, (chunk.master, *self.moments.of(chunk)), strict=True):
                found[kind] += chunk.spec.pieces(flat)
        return found

    def counters(self) -> dict[str, Any]:
        """Return what `restore` takes: the number of updates of each parameter that has missed some."""
        return dict(steps=self._counts.of_those_that_missed_some())

    def restore(self, updates: int, *, steps: Mapping[str, float] | None = None) -> None:
        """Go on after `updates` updates, with master weights and moments that were filled through `pieces`. `steps` has
        the number of updates of each parameter that has had fewer.
        """
        self._counts.restore(updates, self.chunks, steps or {})

    def move(self, chunk: Chunk, placement: Placement) -> None:
        """Move a chunk and its moments to another placement."""
        was = chunk.placement.states
        chunk.move_to(placement)
        if was is not placement.states:
            self.moments.move(chunk)

    def state_bytes(self, chunk: Chunk) -> int:
        """Return the bytes of a chunk's master weights and moments."""
        if chunk.is_frozen:
            return 0
        return len(chunk.master) * state_size(chunk.master.dtype, self.config)

    def held(self) -> list[tuple[Tier, Tensor]]:
        """Return the moments, and the tier of each."""
        return self.moments.held()

    @property
    def host_share(self) -> float:
        """The host's share of the elements that either side may update."""
        return self._shared.share

    @host_share.setter
    def host_share(self, share: float) -> None:
        self._shared.share = share

    def initial_value(self, kind: str, name: str) -> float:
        """Return the number that a kind of state of this parameter begins with: both moments begin as zeros."""
        return 0.0

    def balance(self) -> float:
        """Return the share with which neither side waits for the other where the chunks are now, at the speeds of the
        last update.
        """
        return self._shared.balance(self.chunks)

    def update_seconds(self) -> tuple[float, float]:
        """Return the seconds of the last update, and those of the next one where the chunks are now."""
        return self._shared.seconds(self.chunks)

    def _parts_of(self, chunk: Chunk) -> list[Part]:
        """Return the parts of a chunk to update: consecutive parameters with equal counts of updates are one part."""
        gradient, spec = chunk.gradient.total, chunk.spec
        assert gradient is not None
        states = chunk.master, *self.moments.of(chunk)
        own = None if chunk.sharing.masters_are_slice else chunk.parameters.own
        found = []
        for one in self._counts.ranges(spec):
            begin, end = (min(max(x - spec.first, 0), spec.num_own) for x in (one.start, one.stop))
            if begin < end:
                whole = Part(chunk, states, gradient=gradient, own=own, first=spec.first, updates=one.updates)
                found.append(whole.cut(begin, end))
        return found

    def _update(self, parts: Sequence[Part], *, now: Step, tier: Tier, is_streamed: bool = False) -> None:
        """Update parts on the tier where their tensors are: the states, and the parameters."""
        fused: list[Elements] = []
        offloaded: list[tuple[Tensor, Tensor]] = []  # parameters on the host, and master weights on the device
        for part in parts:
            is_rounded = part.states[1].dtype != part.states[0].dtype
            if not can_be_fused(part.gradient, part.states) or (is_rounded and not self._noise.takes(part)):
                rounding = self._rounding_on(tier, is_streamed, part.states[0]) if is_rounded else None
                self._update_in_torch(part, now, rounding)
                continue
            states = part
            if part.own is not None and part.own.device != part.gradient.device:
                states = replace(part, own=None)
                offloaded.append((part.own, part.states[0]))
            if is_rounded:
                fused += [self._elements(piece, noise) for piece, noise in self._noise.of(states, now.number)]
            else:
                fused.append(self._elements(states))
        if fused:
            update_fused(fused, now, self.config)
        for own, master in offloaded:
            own.copy_(master)

    def _update_in_torch(self, part: Part, now: Step, rounding: Rounding | None) -> None:
        if rounding is None:
            update_in_torch(self._elements(part), now, self.config)
            return
        for smaller in part.split(rounding.size):
            with rounding.widened(smaller, now.number) as (first, second):
                wide = replace(smaller, states=(smaller.states[0], first, second))
                update_in_torch(self._elements(wide), now, self.config)

    def _rounding_on(self, tier: Tier, is_streamed: bool, like: Tensor) -> Rounding:
        """Return the rounding with buffers of its own: for what streams through the device they are others than for
        what stays there, since both are updated at the same time.
        """
        key = tier, is_streamed
        if key not in self._rounding:
            size = min(ROUNDED_AT_ONCE[tier], max(len(chunk.master) for chunk in self.chunks))
            self._rounding[key] = Rounding(size, like.dtype, like.device)
        return self._rounding[key]

    def _elements(self, part: Part, noise: Noise | None = None) -> Elements:
        decay = self.config.weight_decay if part.chunk.spec.is_matrix else 0.0
        return Elements(part.gradient, part.states, part.own, part.updates, decay, noise)


def _launched_together(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Return the chunks with states on the device in groups: the small ones are one, and each large one is another.

    The groups follow from sizes that all ranks of a chunk's axes agree on, so all launch its all-gather in one order.
    """
    found = [chunk for chunk in chunks if chunk.placement.states is Tier.DEVICE]
    small = [chunk for chunk in found if chunk.size <= SMALL]
    return [small, *([chunk] for chunk in found if chunk.size > SMALL)]
