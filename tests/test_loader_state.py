"""The state of a loader: a loop goes on with the next sample, on any number of replicas."""

import itertools
import json
from typing import Any

import pytest
from torch import nn

from tests.harness import run
from tests.test_loaders import (
    BATCHES,
    LOADERS,
    divided_by,
    engine_on,
    may_have_children,
    seed_all,
    values_of,
)

WORKERS = ("read by workers", "read by workers that stay", "a dataset that workers divide")
KINDS = list(LOADERS)
EPOCHS = 3
SAVED = (0, 1, 3, 5, 6, 8)  # after this number of batches in all


def batches_of(rank: int, world_size: int, kinds: list[str], states: Any = None) -> dict[str, Any]:
    """Return the batches of three epochs on this replica and, as JSON, the states of the loader after some of them.

    With `states`: for each of them the batches that are left, from a new loader, whose seeds are others.
    """
    may_have_children()
    engine, *_ = engine_on(rank, world_size, nn.Linear(1, 1))
    counts = engine.context.shares.counts
    found: dict[str, Any] = {}
    for kind in kinds:
        for saved in (states or {kind: {-1: ""}})[kind].items():
            seed_all(100 + rank + 7 * (saved[0] + 1))
            loader = divided_by(engine, LOADERS[kind]())
            first_epoch = first_batch = 0
            if states:
                state = json.loads(saved[1])
                loader.load_state_dict(state)
                assert json.loads(json.dumps(loader.state_dict())) == state
                first_epoch, first_batch = state["epoch"], state["batches"]
            batches, taken = [], {0: json.dumps(loader.state_dict())}
            for epoch in range(first_epoch, EPOCHS):
                if epoch != first_epoch or not states or state["source"] is None:
                    loader.set_epoch(3 + epoch)
                for batch in itertools.islice(loader, BATCHES - (first_batch if epoch == first_epoch else 0)):
                    batches.append(values_of(batch) if counts(batch) is not False else [])
                    if not states:
                        taken[len(batches)] = json.dumps(loader.state_dict())
            found.setdefault(kind, {})[saved[0]] = batches
            if not states:
                found[kind]["states"] = {n: taken[n] for n in SAVED if n in taken}
    return found


def together(parts: list[dict[str, Any]], kind: str, key: int) -> list[list[int]]:
    return [list(itertools.chain(*batch)) for batch in zip(*(part[kind][key] for part in parts), strict=True)]


@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 3, marks=pytest.mark.slow), (2, 1)])
def test_a_loader_goes_on_with_the_next_sample_on_any_number_of_replicas(before: int, after: int) -> None:
    """The states are taken at the beginning, within an epoch and at its end; batches were read ahead of some."""
    parts = run(batches_of, before, KINDS)
    states = {kind: found["states"] for kind, found in parts[0].items()}
    for kind in WORKERS:  # each start of workers takes a while
        states[kind] = {count: state for count, state in states[kind].items() if count in (1, 5)}
    left = run(batches_of, after, KINDS, states)
    for kind, saved in states.items():
        whole = together(parts, kind, -1)
        for count in saved:
            assert together(left, kind, count) == whole[count:], (kind, count)
