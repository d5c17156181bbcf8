"""`tensor_placement_policy`: where chunks are at home, from a run's first step to its last."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from parallel.chunk import Chunk
from parallel.collectives import gather_objects
from parallel.config import ZeroConfig
from parallel.errors import ConfigError, size_text
from parallel.memory.observer import Observer
from parallel.memory.policy import Plan, near, peak_of, plan
from parallel.memory.start import Start, alike, explaining_host
from parallel.mesh import Axis
from parallel.transfer import Placement, Tier

WATCHED = 1  # from 0: in the step before it memory is made that stays

Place = Callable[[Chunk, Placement], None]


class Placer:
    """With `auto`, watches a step under the leanest plan, then places chunks by `policy.plan`: the same on every rank.

    `say` hears what was planned and, two steps later, what came of it.
    """

    def __init__(self, chunks: Sequence[Chunk], place: Place, zero: ZeroConfig, world: Axis, start: Start) -> None:
        self.chunks, self.world, self.zero, self.start = list(chunks), world, zero, start
        self.say: Callable[[str], None] = lambda text: None
        self.plan: Plan | None = None
        self.observer: Observer | None = None
        self._place = place
        self._device = chunks[0].parameters.device
        self._began = self._computed = self._predicted = 0.0
        self._done = zero.tensor_placement_policy != "auto"
        self._refuse_hopeless()

    def before_step(self, step: int) -> None:
        if self._done or step < WATCHED:
            return
        self._synchronize()
        self._began = time.perf_counter()
        if self.plan is None:
            self.observer = Observer(self.chunks, self._device)

    def before_update(self) -> None:
        if self.observer is not None:
            self._synchronize()
            self._computed = time.perf_counter()

    def after_step(self, step: int) -> None:
        """Between two steps: nothing is fetched, and there are no gradients."""
        if self.observer is not None:
            self._synchronize()
            self._carry_out(self.observer, time.perf_counter())
            self.observer = None
        elif self.plan is not None and not self._done and step > WATCHED + 2:
            self._synchronize()
            self._done = True
            self.say(f"placement: measured {self._seen()}a step {time.perf_counter() - self._began:.3f} s")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """A user whose batch does not fit is told so in a ConfigError, with what would help."""
        try:
            with explaining_host(self.start):
                yield
        except torch.OutOfMemoryError as error:
            lean = not any(Tier.DEVICE in (c.placement.parameters, c.placement.states) for c in self.chunks)
            more = "" if lean else " Or try zero.tensor_placement_policy='auto', which moves what it can."
            raise ConfigError(
                f"train.micro_batch_size: a step does not fit in zero.device_memory={size_text(self.budget)}:"
                f" {str(error).splitlines()[0]} Try a smaller micro_batch_size, or"
                f" activation_checkpointing='full'.{more}"
            ) from error

    @property
    def budget(self) -> int:
        """Bytes of the device."""
        if self.zero.device_memory is not None:
            return int(self.zero.device_memory)
        if self._device.type != "cuda":
            return 2**62  # a host has no limit of its own
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def _carry_out(self, observer: Observer, now: float) -> None:
        moments, room = observer.end(), self.start.room
        sizes = observer.sizes(self.start.sizes)
        own = plan(sizes, moments, self.budget, self.zero.gpu_margin_mem_ratio, room)
        count = len(sizes)
        wanted = (0, 0) if own is None else (own.num_states, own.num_parameters)
        # Of ranks with other chunks, or less room: none has more than another, in chunks yet to be placed.
        left = max(gather_objects((count - wanted[0], count - wanted[1]), self.world), key=sum)
        states, parameters = (max(0, count - rest) for rest in left)
        num_near = alike(max(states, near(sizes, room, states, parameters) or 0), sizes, self.world)
        self.plan = Plan(states, parameters, num_near, peak_of(sizes, moments, states, parameters))
        for i, chunk in enumerate(self.chunks):
            far = Tier.HOST if i < num_near else Tier.DISK
            self._place(
                chunk, Placement(Tier.DEVICE if i < parameters else Tier.HOST, Tier.DEVICE if i < states else far)
            )
        total = sum(size.states for size in sizes)
        streamed = sum(size.states for size in sizes[states:]) / total
        self._predicted = self._computed - self._began + (now - self._computed) * streamed
        self.say(
            f"placement: states of {states} and parameters of {parameters} of {count} chunks stay on the device"
            f"{self._apart(num_near)}; predicted peak {size_text(self.plan.peak)} of {size_text(self.budget)}, a step"
            f" {self._predicted:.3f} s"
        )

    def _apart(self, num_near: int) -> str:
        beyond = len(self.chunks) - num_near
        return f", states of {beyond} on the disk" if beyond else ""

    def _refuse_hopeless(self) -> None:
        """Before anything is computed: what is whole at once must fit, whatever is moved."""
        units: dict[str, int] = {}
        for chunk in self.chunks:
            if chunk.comes_and_goes:
                units[chunk.infos[0].unit] = units.get(chunk.infos[0].unit, 0) + chunk.whole_bytes
        needed = sum(sorted(units.values())[-3:])
        most = max(gather_objects(needed, self.world))
        if most > self.budget:
            raise ConfigError(
                f"zero.device_memory: {size_text(self.budget)} cannot hold {size_text(most)}, the parameters"
                " that are on the device at once, whatever is moved: the embedding's and two layers'. Give it more, or"
                " split the model by parallel.tensor or parallel.pipeline."
            )

    def _seen(self) -> str:
        if self._device.type != "cuda":
            return ""
        return f"peak {size_text(torch.cuda.max_memory_allocated(self._device))}, "

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
