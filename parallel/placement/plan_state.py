"""The lifecycle of a placement plan: an enum, and a table of its transitions."""

from enum import Enum, auto

from parallel.placement.policy import PlacementPlan


class PlanState(Enum):
    """The stage that planning has reached."""

    FIXED = auto()  # nothing ever moves
    FIRST_STEP = auto()  # before the first step, which allocates memory that stays
    OFFLOADED = auto()  # everything is offloaded, and the next step will be profiled
    PROFILING = auto()
    MEASURING = auto()  # a plan is in force, and the time of a step under it is being measured
    KEPT = auto()  # a plan is in force, and its step time has been reported


TRANSITIONS = {
    (PlanState.FIRST_STEP, PlanState.OFFLOADED),
    (PlanState.FIRST_STEP, PlanState.MEASURING),  # by a plan that was saved
    (PlanState.OFFLOADED, PlanState.PROFILING),
    (PlanState.PROFILING, PlanState.MEASURING),
    (PlanState.PROFILING, PlanState.OFFLOADED),  # the update of the profiled step was skipped
    (PlanState.MEASURING, PlanState.KEPT),
    (PlanState.MEASURING, PlanState.OFFLOADED),  # steps outgrew the plan
    (PlanState.KEPT, PlanState.OFFLOADED),
}


class PlanLifecycle:
    """The state of planning, and the plan that is in force, if there is one."""

    def __init__(self, *, is_fixed: bool) -> None:
        self.state = PlanState.FIXED if is_fixed else PlanState.FIRST_STEP
        self.plan: PlacementPlan | None = None

    def adopt(self, plan: PlacementPlan) -> None:
        """Put a plan in force: its chunks have been moved."""
        self.move_to(PlanState.MEASURING)
        self.plan = plan

    def move_to(self, state: PlanState) -> None:
        """Enter another state. A plan ends where everything is offloaded."""
        assert (self.state, state) in TRANSITIONS, f"a plan cannot go from {self.state.name} to {state.name}"
        self.state = state
        if state is PlanState.OFFLOADED:
            self.plan = None
