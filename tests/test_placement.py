"""Where chunks are at home changes nothing of what they are."""

from typing import Any

import pytest

from tests.harness import run
from tests.parity import SHAPE, Raw, Trace, batches_of, config_of, train
from tests.test_zero import assert_equal

LAYOUTS: dict[str, tuple[int, Raw]] = {
    "single": (1, {}),
    "pp2": (2, dict(pipeline=2)),
    "dp2": (2, {}),
    "dp2-1d2": (4, dict(tensor=dict(mode="1d", size=2))),
    "2.5d-depth2": (8, dict(tensor=dict(mode="2.5d", size=8, depth=2))),
}


def trace_of(layout: str, policy: str, stage: int, *, precision: str = "fp64", **options: Any) -> Trace:
    world_size, parallel = LAYOUTS[layout]
    batch = dict(global_batch_size=24, micro_batch_size=4) | options
    zero = dict(stage=stage, tensor_placement_policy=policy)
    raw = config_of(parallel, steps=3, precision=precision, model=SHAPE, train=batch, zero=zero)
    found = run(train, world_size, raw, batches_of(3, batch=24))[0]
    assert found is not None
    return found


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_home_on_the_host_a_model_trains_bit_for_bit_as_on_the_device(layout: str, stage: int) -> None:
    assert_equal(trace_of(layout, "cpu", stage), trace_of(layout, "cuda", stage))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_narrow_parameters_too(precision: str) -> None:
    for options in (dict(micro_batch_size=12), dict(activation_checkpointing="full")):
        want = trace_of("dp2", "cuda", 2, precision=precision, **options)
        assert_equal(trace_of("dp2", "cpu", 2, precision=precision, **options), want)
