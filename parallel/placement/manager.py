"""`tensor_placement_policy`: where chunks are at home, from a run's first step to its last."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from operator import le
from statistics import median
from typing import Any, Protocol, TypeAlias

import torch

from parallel.chunk.chunk import Chunk
from parallel.config import ZeroConfig
from parallel.errors import ConfigError, RoomError, size_text
from parallel.mesh.collectives import all_reduce, gather_objects
from parallel.mesh.mesh import Axis
from parallel.placement.initial import InitialPlacement, agreed_minimum, explain_host_shortage
from parallel.placement.policy import (
    ChunkBytes,
    MemorySample,
    PlacementPlan,
    max_states_on_host,
    peak_of,
    plan_placement,
)
from parallel.placement.profile import StepProfile
from parallel.storage.transfer import Placement, Tier

Work: TypeAlias = tuple[int, ...]
"""How large a step is: numbers of which none may grow, lest it need more memory."""


class PlanState(Enum):
    """How far a plan has come."""

    FIXED = auto()  # everything stays where it is
    FRESH = auto()  # before the first step, in which memory is made that stays
    LEAN = auto()  # everything is on the host, and the next step will be looked on at
    WATCHING = auto()
    PLANNED = auto()  # what comes of the plan is yet to be said
    KEPT = auto()


MOVES = {
    (PlanState.FRESH, PlanState.LEAN),
    (PlanState.FRESH, PlanState.PLANNED),  # a plan that was saved
    (PlanState.LEAN, PlanState.WATCHING),
    (PlanState.WATCHING, PlanState.PLANNED),
    (PlanState.WATCHING, PlanState.LEAN),  # its update was skipped
    (PlanState.PLANNED, PlanState.KEPT),
    (PlanState.PLANNED, PlanState.LEAN),  # other work has come
    (PlanState.KEPT, PlanState.LEAN),
}
UNLIMITED = 2**62  # bytes: a host that stands for a device has no limit of its own
SETTLING, MEASURED = 2, 3  # steps under a new plan: before they are measured, and of which the median is said


class Placed(Protocol):
    """What updates chunks, and moves with them."""

    host_share: float

    def move(self, chunk: Chunk, placement: Placement) -> None: ...

    def state_bytes(self, chunk: Chunk) -> int: ...

    def balance(self) -> float: ...

    def gain(self, share: float) -> float: ...


class PlacementManager:
    """Watches a step under the leanest plan, then places chunks by `policy.plan`: the same on every rank. A step of
    more work than any before it, or with a layer that was not used then, is watched again, and the plan made for both.

    `say` hears what was planned and, some steps later, what came of it.
    """

    def __init__(
        self, chunks: Sequence[Chunk], optimizer: Placed, zero: ZeroConfig, world: Axis, start: InitialPlacement
    ) -> None:
        self.chunks, self.world, self.zero, self.start = list(chunks), world, zero, start
        self.say: Callable[[str], None] = lambda text: None
        self.plan: PlacementPlan | None = None
        self._optimizer = optimizer
        self._device = chunks[0].memory.device
        self._phase = PlanState.FIXED if zero.tensor_placement_policy == "cuda" else PlanState.FRESH
        self._observer: StepProfile | None = None
        self._moments: list[MemorySample] = []  # of every watched step
        self._seen: list[Work] = []
        self._used: set[str] = set()  # layers, in this step
        self._known: set[str] = set()  # those of watched steps
        self._surprised = False  # by something in the middle of a step
        self._began = 0.0
        self._took: list[float] = []  # seconds of each step under the plan
        self._everywhere: list[list[int]] = []  # each rank's chunks: how many, and of how many elements
        self._refuse_hopeless()

    def before_step(self, work: Work) -> None:
        """Between two steps, on all ranks together."""
        if self._phase is PlanState.FIXED:
            return
        if self._is_new(work) and self._phase in (PlanState.PLANNED, PlanState.KEPT):
            self._make_lean()
        self._used.clear()
        self._surprised = False
        if self._phase is not PlanState.KEPT:  # then the host may run ahead
            self._synchronize()
        if self._phase is PlanState.LEAN:
            self._move(PlanState.WATCHING)
            self._observer = StepProfile(self.chunks, self._device)
        self._began = time.perf_counter()

    def within_step(self, work: Work) -> None:
        """As `before_step`, where a step goes on: if this is more than was said, the next step will be looked on at."""
        if self._phase is not PlanState.FIXED:
            self._surprised |= self._is_new(work)

    @contextmanager
    def using(self, unit: str, *, backward: bool) -> Iterator[None]:
        """Around what makes a layer's parameters whole, before it computes."""
        self._used.add(unit)
        if self._observer is None:
            yield
            return
        with self._observer.waiting(unit):
            yield
        self._observer.used(unit, backward=backward)

    def before_update(self) -> None:
        if self._observer is not None:
            self._observer.computed()
            self._synchronize()

    def after_step(self, *, skipped: bool) -> None:
        """Between two steps: nothing is fetched, and there are no gradients. A step that `skipped` its update made no
        memory for one, and tells nothing of it.
        """
        observer, self._observer = self._observer, None
        if skipped:
            if self._phase is PlanState.WATCHING:
                self._move(PlanState.LEAN)
        elif self._phase is PlanState.FRESH:
            self._move(PlanState.LEAN)
        elif observer is not None:
            self._synchronize()
            self._carry_out(observer, time.perf_counter())
            return  # whatever it was, it has been seen
        elif self._phase is PlanState.PLANNED:
            self._synchronize()
            self._took.append(time.perf_counter() - self._began)
            if len(self._took) == SETTLING + MEASURED:
                self._move(PlanState.KEPT)
                self.say(f"placement: measured {self._measured()}a step {median(self._took[SETTLING:]):.3f} s")
        if self._phase in (PlanState.PLANNED, PlanState.KEPT) and self._is_surprised():
            self._make_lean()

    def state(self) -> dict[str, Any]:
        """The plan, to be saved with a run: host and device round an update differently."""
        if self.plan is None or self._phase not in (PlanState.PLANNED, PlanState.KEPT):
            return {}  # or it is about to be made again
        return dict(
            key=self._key(),
            moving=[len(self.chunks) - k for k in (self.plan.num_states, self.plan.num_parameters)],
            peak=self.plan.peak,
            host_share=self._optimizer.host_share,
            work=[list(seen) for seen in self._seen],
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Before the first step: go on by a plan that was saved, if it was made for such chunks and such a budget."""
        if self._phase is not PlanState.FRESH:
            return
        fits = state.get("key") == self._key()  # of ranks with other devices perhaps not on all
        if not all(gather_objects(fits, self.world)):
            return
        self._seen = [tuple(work) for work in state["work"]]
        self._known = {chunk.infos[0].unit for chunk in self.chunks}
        self._place(state["moving"], self.start.sizes, state["peak"], state["host_share"])

    @contextmanager
    def explain_shortage(self) -> Iterator[None]:
        """A user whose batch does not fit is told so in a RoomError, with what would help."""
        try:
            with explain_host_shortage(self.start):
                yield
        except torch.OutOfMemoryError as error:
            lean = not any(Tier.DEVICE in (c.placement.parameters, c.placement.states) for c in self.chunks)
            more = "" if lean else " Or try zero.tensor_placement_policy='auto', which moves what it can."
            raise RoomError(
                f"train.micro_batch_size: a step does not fit in zero.device_memory={size_text(self.budget)}:"
                f" {str(error).splitlines()[0]} Try a smaller micro_batch_size, or"
                f" activation_checkpointing='full' or 'offload'.{more}"
            ) from error

    @property
    def budget(self) -> int:
        """Bytes of the device."""
        if self.zero.device_memory is not None:
            return int(self.zero.device_memory)
        if self._device.type != "cuda":
            return UNLIMITED
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def _carry_out(self, observer: StepProfile, now: float) -> None:
        self._moments += observer.end()
        self._known |= self._used
        sizes, count = observer.sizes(self.start.sizes, self._optimizer.state_bytes), len(self.chunks)
        own = self._own_plan(sizes)
        wanted = (0, 0) if own is None else (own.num_states, own.num_parameters)
        # Of ranks with other chunks, or less room: as many move on each as anyone needs, of states and of parameters.
        # The host's share is the least too: replicas of a master must all be updated on the same side.
        proposals = gather_objects(([count - k for k in wanted], self._optimizer.balance()), self.world)
        moving = [max(counts) for counts in zip(*(moving for moving, _ in proposals), strict=True)]
        states, parameters = self._staying(moving)
        peak = peak_of(sizes, self._moments, states, parameters)
        host_share = min(share for _, share in proposals)
        self._place(moving, sizes, peak, host_share)
        streamed = sum(size.states for size in sizes[states:]) / sum(size.states for size in sizes)
        spared = observer.waited({chunk.infos[0].unit for chunk in self.chunks[:parameters]})
        computing = observer.computing()  # what else the step took is for states elsewhere
        predicted = computing - spared + (now - self._began - computing - self._optimizer.gain(host_share)) * streamed
        self.say(f"{self._planned()}, a step {predicted:.3f} s")

    def _own_plan(self, sizes: Sequence[ChunkBytes]) -> PlacementPlan | None:
        if self.zero.tensor_placement_policy == "cpu":
            return None
        return plan_placement(sizes, self._moments, self.budget, self.zero.gpu_margin_mem_ratio, self.start.room)

    def _place(self, moving: Sequence[int], sizes: Sequence[ChunkBytes], peak: int, host_share: float) -> None:
        """Give all but the last chunks their home on the device: so many of them have states, parameters that move. Of
        these states the first are on the host, as far as there is room.
        """
        states, parameters = self._staying(moving)
        num_host_states = max_states_on_host(sizes, self.start.room, states, parameters)
        if num_host_states is None:  # gradients are wider than was foreseen
            num_host_states = states if self.start.room.has_disk else len(self.chunks)
        num_host_states = agreed_minimum(num_host_states, sizes, self.world)
        for i, chunk in enumerate(self.chunks):  # what leaves the host gives room to what comes
            home = Tier.DEVICE if i < parameters else Tier.HOST
            self._optimizer.move(chunk, Placement(home, chunk.placement.states))
        for i, chunk in enumerate(self.chunks):
            far = Tier.HOST if i < num_host_states else Tier.DISK
            self._optimizer.move(chunk, Placement(chunk.placement.parameters, Tier.DEVICE if i < states else far))
        self._optimizer.host_share = host_share
        self.plan, self._took = PlacementPlan(states, parameters, num_host_states, peak), []
        self._move(PlanState.PLANNED)

    def _staying(self, moving: Sequence[int]) -> tuple[int, int]:
        states, parameters = (max(0, len(self.chunks) - count) for count in moving)
        return states, parameters

    def _planned(self) -> str:
        assert self.plan is not None
        far = len(self.chunks) - self.plan.num_host_states
        on_disk = f", states of {far} on the disk" if far else ""
        limit = f" of {size_text(self.budget)}" if self.budget < UNLIMITED else ""
        return (
            f"placement: states of {self.plan.num_states} and parameters of {self.plan.num_parameters} of"
            f" {len(self.chunks)} chunks stay on the device{on_disk}; predicted peak {size_text(self.plan.peak)}{limit}"
        )

    def _is_surprised(self) -> bool:
        """By more work than was said, or by a layer that had been skipped: the same on all ranks, which agree on the
        layers that they use.
        """
        return self._surprised or not self._used <= self._known

    def _is_new(self, work: Work) -> bool:
        """Whether this may need more, on any rank, than the steps that were planned for."""
        is_new = not any(len(work) == len(seen) and all(map(le, work, seen)) for seen in self._seen)
        if not all_reduce(torch.tensor(is_new, dtype=torch.int64), self.world):
            return False
        self._seen.append(work)
        return True

    def _make_lean(self) -> None:
        if self.zero.tensor_placement_policy == "cpu":
            return  # it is
        self.say("placement: the steps are others now; planning again")
        if not self._moments:  # a saved plan, of steps that this process has not watched: they are new to the next one
            del self._seen[:-1]
        returns = [*zip(self.chunks, self.start.storages, strict=True)][::-1]
        for chunk, home in returns:  # states first: some go on to the disk
            self._optimizer.move(chunk, Placement(chunk.placement.parameters, home.placement.states))
        for chunk, home in returns:
            self._optimizer.move(chunk, home.placement)
        self._move(PlanState.LEAN)

    def _move(self, phase: PlanState) -> None:
        assert (self._phase, phase) in MOVES, f"a plan cannot go from {self._phase.name} to {phase.name}"
        self._phase = phase

    def _key(self) -> dict[str, Any]:
        """What a plan depends on."""
        zero = self.zero
        return dict(
            chunks=self._everywhere,
            stage=zero.stage,
            policy=zero.tensor_placement_policy,
            budget=self.budget,
            margin=zero.gpu_margin_mem_ratio,
            ranks=self.world.size,
        )

    def _refuse_hopeless(self) -> None:
        """Before anything is computed: what is whole at once must fit, whatever is moved."""
        units: dict[str, int] = {}
        for chunk in self.chunks:
            if chunk.is_gathered_on_demand:
                units[chunk.infos[0].unit] = units.get(chunk.infos[0].unit, 0) + chunk.spec.whole_bytes
        needed = sum(sorted(units.values())[-3:])
        own = needed, self.budget, len(self.chunks), sum(chunk.size for chunk in self.chunks)
        everywhere = gather_objects(own, self.world)
        self._everywhere = [list(sizes) for _, _, *sizes in everywhere]
        if hopeless := [(needed, budget) for needed, budget, *_ in everywhere if needed > budget]:
            most, budget = max(hopeless)
            raise ConfigError(
                f"zero.device_memory: {size_text(budget)} cannot hold {size_text(most)}, the parameters"
                " that are on the device at once, whatever is moved: the embedding's and two layers'. Give it more, or"
                " split the model by parallel.tensor or parallel.pipeline."
            )

    def _measured(self) -> str:
        if self._device.type != "cuda":
            return ""
        return f"peak {size_text(torch.cuda.max_memory_allocated(self._device))}, "

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
