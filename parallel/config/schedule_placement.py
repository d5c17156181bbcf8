"""The check that the stages of a plan are where a pipeline can have them."""

from parallel.plan.plan import Place, Plan, PlanError


def check_placement(plan: Plan) -> None:
    """Raise PlanError unless each rank has equally many stages, none is left out, and consecutive ones are neighbours.

    Messages are sent between neighbours alone; the first rank and the last one are neighbours too.
    """
    stages, places = plan.stages(), _first_places(plan)
    if [] in [list(each) for each in stages]:
        raise PlanError("the rank has no action, and each has a stage at least.", [(stages.index(()), 0)])
    missing = next(stage for stage in range(len(places) + 1) if stage not in places)
    if missing < len(places):
        last = max(places)
        wrong = f"there is a stage {last} and no stage {missing}. Stages count from 0, without a gap."
        raise PlanError(wrong, [places[last]])
    for rank, held in enumerate(stages):
        if len(held) != len(stages[0]):
            wrong = f"the rank holds {len(held)} of the stages, and rank 0 {len(stages[0])}. Each holds equally many."
            raise PlanError(wrong, [(rank, 0)])
    for stage in range(1, len(places)):
        before, after = places[stage - 1][0], places[stage][0]
        if (after - before) % len(stages) not in (0, 1, len(stages) - 1):
            wrong = (
                f"stage {stage} is on rank {after}, and stage {stage - 1} on rank {before}. Consecutive stages are on"
                f" one rank or on neighbours; ranks 0 and {len(stages) - 1} are neighbours too."
            )
            raise PlanError(wrong, [places[stage]])


def _first_places(plan: Plan) -> dict[int, Place]:
    """Return where each stage computes first."""
    places: dict[int, Place] = {}
    for rank, actions in enumerate(plan.ranks):
        for position, action in enumerate(actions):
            places.setdefault(action.stage, (rank, position))
    return places
