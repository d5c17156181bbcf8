"""`zero.tensor_placement_policy`: where chunks are, from a run's first step to its last."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from parallel.chunk.chunk import Chunk
from parallel.config import ZeroConfig
from parallel.mesh.mesh import Axis
from parallel.placement.agreement import Proposal, RankAgreement, agreed_minimum
from parallel.placement.chunk_bytes import measured_bytes
from parallel.placement.initial import InitialPlacement
from parallel.placement.moves import MovingOptimizer, move_back, move_by_plan
from parallel.placement.plan_state import PlanLifecycle, PlanState
from parallel.placement.policy import ChunkBytes, PlacementPlan, max_states_on_host, peak_bytes, plan_placement
from parallel.placement.profile import StepProfile
from parallel.placement.report import StepTimer, describe_measurement, describe_plan, predicted_seconds, synchronize
from parallel.placement.room import device_budget
from parallel.placement.workloads import StepSize, WorkloadHistory


class PlacementManager:
    """Profiles a step with everything offloaded, then moves chunks to where `policy.plan_placement` wants them: the
    same on every rank. Colossal-AI's Gemini manager is its counterpart.

    The first step is not profiled, since it allocates memory that stays. A step that is larger than any before it, or
    uses a layer that no profiled step used, ends the plan: everything is offloaded, such a step is profiled in its
    turn, and the next plan is made for all that were profiled.

    `log` is given what was planned and, some steps later, the time that a step takes under the plan.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        optimizer: MovingOptimizer,
        zero: ZeroConfig,
        world: Axis,
        initial: InitialPlacement,
    ) -> None:
        """Raises ConfigError, on every rank, where on one no plan could ever fit the device."""
        self.chunks, self.optimizer, self.zero, self.initial = list(chunks), optimizer, zero, initial
        self.log: Callable[[str], None] = lambda text: None
        self._device = chunks[0].memory.device
        self.budget = device_budget(zero, self._device)
        self._agreement = RankAgreement(chunks, zero, self.budget, world)
        self._lifecycle = PlanLifecycle(is_fixed=zero.tensor_placement_policy == "cuda")
        self._history = WorkloadHistory()
        self._profile: StepProfile | None = None  # of the running step
        self._timer = StepTimer(self._device)

    @property
    def plan(self) -> PlacementPlan | None:
        """The plan that is in force."""
        return self._lifecycle.plan

    # -- a step, in the order of the calls

    def before_step(self, size: StepSize) -> None:
        """Prepare for a step of this size. All ranks call it together, between two steps."""
        if self._lifecycle.state is PlanState.FIXED:
            return
        if self._is_larger(size) and self.plan is not None:
            self._offload_everything()
        self._history.begin_step()
        if self._lifecycle.state is not PlanState.KEPT:  # then the host may run ahead of the device
            self._complete_update()
            synchronize(self._device)
        if self._lifecycle.state is PlanState.OFFLOADED:
            self._lifecycle.move_to(PlanState.PROFILING)
            self._profile = StepProfile(self.chunks, self._device)
        self._timer.start()

    def within_step(self, size: StepSize) -> None:
        """Note that the running step has a further part of this size. If that is larger than any before, the next step
        will be profiled. All ranks call it together.
        """
        if self._lifecycle.state is not PlanState.FIXED and self._is_larger(size):
            self._history.note_growth()

    @contextmanager
    def using(self, unit: str, *, backward: bool) -> Iterator[None]:
        """Note that a layer is used, by a block that makes its parameters whole, before it computes."""
        self._history.note_layer(unit)
        if self._profile is None:
            yield
            return
        with self._profile.using(unit, backward=backward):
            yield

    def before_update(self) -> None:
        """Note that the device has been given all computation of the step."""
        if self._profile is not None:
            self._profile.times.end_computation()
            synchronize(self._device)

    def after_step(self, *, skipped: bool) -> None:
        """Plan by the step if it was profiled. All ranks call it together, between two steps: no parameters are being
        gathered, and there are no gradients.

        A step that `skipped` its update allocated no memory for one, and so no plan is made by it.
        """
        profile, self._profile = self._profile, None
        state = self._lifecycle.state
        if skipped:
            if state is PlanState.PROFILING:
                self._lifecycle.move_to(PlanState.OFFLOADED)
        elif state is PlanState.FIRST_STEP:
            self._lifecycle.move_to(PlanState.OFFLOADED)
        elif profile is not None:
            self._plan_by(profile)
            return  # the new plan covers whatever this step was
        elif state is PlanState.MEASURING:
            self._measure()
        if self.plan is not None and self._history.is_outgrown():  # on all ranks: they use the same layers
            self._offload_everything()

    # -- saved with a run

    def state(self) -> dict[str, Any]:
        """Return the plan in force, to be saved with a run: host and device round an update differently."""
        plan, count = self.plan, len(self.chunks)
        if plan is None:  # or it is about to be made again
            return {}
        return dict(
            key=self._agreement.key,
            moving=[count - plan.num_device_states, count - plan.num_device_parameters],
            peak=plan.peak,
            host_share=self.optimizer.host_share,
            work=[list(size) for size in self._history.sizes],
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put a saved plan in force, before the first step, if it was made for these chunks and this budget."""
        if self._lifecycle.state is not PlanState.FIRST_STEP:
            return
        fits = state.get("key") == self._agreement.key  # perhaps not on all ranks: they may have other devices
        if not self._agreement.is_true_on_all(fits):
            return
        layers = {chunk.infos[0].unit for chunk in self.chunks}
        self._history.restore([tuple(size) for size in state["work"]], layers)
        offloaded_states, offloaded_parameters = state["moving"]
        self._carry_out(Proposal(offloaded_states, offloaded_parameters), self.initial.sizes, state["peak"])
        self.optimizer.host_share = state["host_share"]

    # -- parts of a step

    def _is_larger(self, size: StepSize) -> bool:
        """Return whether this may need, on any rank, more memory than all steps before it; from now on it is one."""
        if not self._agreement.is_true_on_any(not self._history.covers(size)):
            return False
        self._history.add(size)
        return True

    def _offload_everything(self) -> None:
        """End the plan: the next step will be profiled."""
        if self.zero.tensor_placement_policy == "cpu":
            return  # everything is offloaded, and stays so
        self.log("placement: the steps have changed; planning again")
        self._history.drop_unmeasured()
        move_back(self.chunks, self.optimizer, self.initial.storages)
        self.optimizer.host_share = self.optimizer.first_share
        self._lifecycle.move_to(PlanState.OFFLOADED)

    def _plan_by(self, profile: StepProfile) -> None:
        """Make a plan by a step that has just been profiled, carry it out and log it."""
        for chunk in self.chunks:
            chunk.settle()  # the host may still be updating
        step, times = self._timer.elapsed(), profile.times
        self._history.add_profile(profile.memory.end())
        sizes = measured_bytes(self.initial.sizes, self.chunks, self.optimizer.state_bytes)
        agreed = self._agreement.agree(self._propose(sizes))
        num_states, num_parameters = agreed.on_device(len(self.chunks))
        peak = peak_bytes(sizes, self._history.samples, num_states, num_parameters)
        plan = self._carry_out(agreed, sizes, peak)
        self.optimizer.host_share = self._agreement.least_share(self.optimizer.balance())  # where they are now
        seconds = predicted_seconds(
            step,
            computing=times.seconds_computing(),
            spared=times.seconds_waiting({chunk.infos[0].unit for chunk in self.chunks[:num_parameters]}),
            updates=self.optimizer.update_seconds(),
            streamed=sum(size.states for size in sizes[num_states:]) / sum(size.states for size in sizes),
        )
        self.log(describe_plan(plan, len(self.chunks), self.budget, seconds))

    def _complete_update(self) -> None:
        """Wait for the last update: the host may still be updating, and parts may not be launched yet."""
        for chunk in self.chunks:
            chunk.parameters.written.synchronize()

    def _propose(self, sizes: Sequence[ChunkBytes]) -> Proposal:
        """Return what this rank would offload: everything with the policy "cpu", and where no plan fits."""
        plan, count, zero = None, len(self.chunks), self.zero
        if zero.tensor_placement_policy != "cpu":
            samples, room = self._history.samples, self.initial.room
            plan = plan_placement(sizes, samples, self.budget, zero.gpu_margin_mem_ratio, room)
        num_states, num_parameters = (plan.num_device_states, plan.num_device_parameters) if plan else (0, 0)
        return Proposal(count - num_states, count - num_parameters)

    def _carry_out(self, agreed: Proposal, sizes: Sequence[ChunkBytes], peak: int) -> PlacementPlan:
        """Move the chunks as the ranks agreed, and put that plan in force.

        Of the offloaded states those of the first chunks go to the host, as far as it has room.
        """
        room, count = self.initial.room, len(self.chunks)
        num_states, num_parameters = agreed.on_device(count)
        num_host_states = max_states_on_host(sizes, room, num_states, num_parameters)
        if num_host_states is None:  # gradients are wider than was foreseen
            num_host_states = num_states if room.has_disk else count
        num_host_states = agreed_minimum(num_host_states, sizes, self._agreement.world)
        plan = PlacementPlan(num_states, num_parameters, num_host_states, peak)
        move_by_plan(self.chunks, self.optimizer, plan)
        self._timer.reset()
        self._lifecycle.adopt(plan)
        return plan

    def _measure(self) -> None:
        """Time a step under a new plan, with the whole of its update. Log the median once there are enough."""
        self._complete_update()
        self._timer.record()
        if self._timer.is_complete:
            self._lifecycle.move_to(PlanState.KEPT)
            self.log(describe_measurement(self._device, self._timer.median))
