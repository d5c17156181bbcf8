"""ZeRO: masters, moments and gradients divided over the ranks that would all hold the same."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.chunk import ALIGNMENT
from parallel.layout import box_shape, rectangles, slices
from tests.harness import run
from tests.parity import SHAPE, Raw, Trace, batches_of, compare, config_of, engine_of, share_of, train

LAYOUTS: dict[str, tuple[int, Raw]] = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp2-1d2": (4, dict(tensor=dict(mode="1d", size=2))),
    "dp2-pp2": (4, dict(pipeline=2)),
    "2.5d-depth2": (8, dict(tensor=dict(mode="2.5d", size=8, depth=2))),
    "dp2-2d4": (8, dict(tensor=dict(mode="2d", size=4))),
}


def trace_of(layout: str, stage: int, *, micro: int, precision: str = "fp64", **options: Any) -> Trace:
    world_size, parallel = LAYOUTS[layout]
    batch = dict(global_batch_size=24, micro_batch_size=micro) | options
    sections = dict(model=SHAPE, train=batch, zero=dict(stage=stage), optimizer=dict(eps=1e-3))
    raw = config_of(parallel, steps=3, precision=precision, **sections)
    found = run(train, world_size, raw, batches_of(3, batch=24))[0]
    assert found is not None
    return found


def assert_equal(got: Trace, want: Trace) -> None:
    assert (got.losses, got.norms) == (want.losses, want.norms)
    for name in want.weights:
        assert torch.equal(got.gradients[name], want.gradients[name]), name
        assert torch.equal(got.weights[name], want.weights[name]), name


def replicas(layout: str) -> int:
    return {"dp4": 4, "2.5d-depth2": 1}.get(layout, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_one_microbatch_stages_1_and_2_equal_stage_0_bit_for_bit_in_fp32(layout: str) -> None:
    whole = 24 // replicas(layout)
    want = trace_of(layout, 0, micro=whole, precision="fp32")
    for stage in (1, 2):
        assert_equal(trace_of(layout, stage, micro=whole, precision="fp32"), want)


@pytest.mark.parametrize("layout", ["dp2", "dp2-pp2", "dp2-1d2", "2.5d-depth2"])
def test_accumulation_keeps_stage_1_bit_for_bit_and_stage_2_within_rounding(layout: str) -> None:
    """Stage 2 adds up over ranks before it adds up over microbatches: another order, and so another rounding."""
    want = trace_of(layout, 0, micro=4)
    assert_equal(trace_of(layout, 1, micro=4), want)
    compare(trace_of(layout, 2, micro=4), want, 1e-12, wide=False)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_parameters_are_the_roundings_of_divided_masters(precision: str, stage: int) -> None:
    assert_equal(
        trace_of("dp2", stage, micro=12, precision=precision), trace_of("dp2", 0, micro=12, precision=precision)
    )


def bytes_of_a_rank(rank: int, world_size: int, raw: Raw) -> tuple[int, int, dict[str, int]]:
    """(parameters with padding, those of a rank's shards, bytes held after a backward: parameters, gradients, states)"""
    engine = engine_of(rank, world_size, raw)
    held: dict[str, int] = {}

    def count(*arguments: Any) -> None:
        held["gradients"] = sum(c.gradient.untyped_storage().nbytes() for c in engine.chunks if c.gradient is not None)

    update = engine.optimizer.step
    engine.optimizer.step = lambda *a: (count(), update(*a))[1]  # type: ignore[method-assign]
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    states = [chunk.master for chunk in engine.chunks]
    states += [
        x for inner in engine.optimizer.inners for s in inner.state.values() for n, x in s.items() if n != "step"
    ]
    held["states"] = sum(x.untyped_storage().nbytes() for x in states)
    held["parameters"] = sum(chunk.parameters.untyped_storage().nbytes() for chunk in engine.chunks)
    return sum(c.size for c in engine.chunks), sum(len(c.master) for c in engine.chunks), held


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_a_rank_are_the_papers(ranks: int, stage: int) -> None:
    """Rajbhandari et al. 2020, section 5: with Ψ parameters in 2 bytes and K = 12 bytes of state each, over N ranks, a
    rank holds 2Ψ + 2Ψ + KΨ, then 2Ψ + 2Ψ + KΨ/N, then 2Ψ + (2Ψ + KΨ)/N. Our gradients that are summed have 4 bytes.
    """
    micro = dict(global_batch_size=24, micro_batch_size=24 // ranks)
    raw = config_of({}, precision="bf16", model=SHAPE, train=micro, zero=dict(stage=stage))
    for psi, shard, held in run(bytes_of_a_rank, ranks, raw):
        assert psi % (ALIGNMENT * ranks) == 0
        assert shard == (psi // ranks if stage else psi)
        assert held["parameters"] == 2 * psi
        assert held["states"] == 12 * shard
        assert held["gradients"] == 4 * shard


def elements_sent(rank: int, world_size: int, raw: Raw) -> tuple[int, dict[str, float]]:
    engine = engine_of(rank, world_size, raw)
    engine.mesh.traffic.reset()
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    return sum(c.size for c in engine.chunks), {kind: count / 8 for kind, count in engine.mesh.traffic.bytes.items()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_sends_what_the_table_of_stages_says(stage: int) -> None:
    """Over a ring of n ranks, m microbatches: 2Ψ(n−1)/n in stages 0 and 1, (m+1)Ψ(n−1)/n in stage 2."""
    n, m = 2, 3
    micro = dict(global_batch_size=24, micro_batch_size=24 // n // m)
    raw = config_of({}, model=SHAPE, train=micro, zero=dict(stage=stage))
    for psi, handed in run(elements_sent, n, raw):
        scalars = 3 + 2  # labels and refusals; loss; norm
        sent = handed.get("reduce_scatter", 0) * (n - 1) / n + handed.get("all_gather", 0) * (n - 1)
        sums = handed["all_reduce"] - (psi if stage == 0 else 0)
        assert 0 < sums < scalars
        sent += 2 * (handed["all_reduce"] - sums) * (n - 1) / n
        assert sent == (m + 1 if stage == 2 else 2) * psi * (n - 1) / n


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_rectangles_are_the_elements_of_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    count = torch.Size(shape).numel()
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    numbers, found = torch.arange(count).view(shape), []
    for offset, box in rectangles(tuple(shape), start, stop):
        part = numbers[slices(box)]
        assert tuple(part.shape) == box_shape(box)
        assert offset == part.flatten()[0]
        found += part.flatten().tolist()
    assert found == list(range(start, stop))


def resumed(rank: int, world_size: int, raw: Raw, folder: str) -> list[float]:
    """Two steps, a checkpoint; an engine of another stage goes on from it: the losses of two more."""
    from pathlib import Path

    from parallel import checkpoint
    from training.loop import state_pieces

    batches = batches_of(4, batch=24)
    first = engine_of(rank, world_size, raw)
    for batch in batches[:2]:
        first.train_step(share_of(batch, first))
    pieces = state_pieces(first, owned=True)
    target = Path(folder, f"{raw['zero']['stage']}")
    meta = dict(step=2, counters=first.counters())
    checkpoint.save(target, pieces, metadata=meta, axis=first.mesh.world, keep=9)
    second = engine_of(rank, world_size, raw | dict(zero=dict(stage=2 - raw["zero"]["stage"])))
    checkpoint.load(target, state_pieces(second))
    second.restore(checkpoint.read_metadata(target)["counters"])
    return [second.train_step(share_of(batch, second)).loss for batch in batches[2:]]


def test_a_checkpoint_of_any_stage_resumes_in_any_other(tmp_path: Any) -> None:
    micro = dict(global_batch_size=24, micro_batch_size=12)
    losses = []
    for stage in (0, 2):
        raw = config_of({}, model=SHAPE, train=micro, zero=dict(stage=stage))
        losses.append(run(resumed, 2, raw, str(tmp_path))[0])
    assert losses[0] == losses[1]


def test_every_pair_of_a_stage_and_a_schedule_is_drawn_elsewhere() -> None:
    from tests.test_property import STAGES

    assert set(product(STAGES, ("1f1b", "gpipe"))) == {(s, x) for s in (0, 1, 2) for x in ("1f1b", "gpipe")}
