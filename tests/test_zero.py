"""ZeRO: master weights, moments and gradients are divided over ranks that would otherwise hold the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import build
from models.shapes import resolve
from parallel.checkpoint import checkpoint
from parallel.chunk.spec import ALIGNMENT
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.layout.layout import ParameterInfo, box_shape, rectangles, slices
from parallel.optim.adamw import AdamW
from parallel.zero.gatherer import State, Unit
from tests.harness import run
from tests.parity import (
    SHAPE,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    engine_of,
    reference,
    save_model,
    share_of,
    train,
)
from tests.test_fp16_and_recompute import plant_infinity

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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name == "dp2-2d4" else []) for name in LAYOUTS]
)
def test_with_one_microbatch_every_stage_equals_stage_0_bit_for_bit_in_fp32(layout: str) -> None:
    whole = 24 // replicas(layout)
    want = trace_of(layout, 0, micro=whole, precision="fp32")
    for stage in (1, 2, 3):
        assert_equal(trace_of(layout, stage, micro=whole, precision="fp32"), want)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("dp2", marks=pytest.mark.gpu),
        *("dp2-pp2", "dp2-1d2", pytest.param("2.5d-depth2", marks=pytest.mark.slow)),
    ],
)
def test_accumulation_keeps_stage_1_bit_for_bit_and_the_others_within_rounding(layout: str) -> None:
    """Stages 2 and 3 sum over ranks before they sum over microbatches: this order gives another rounding."""
    want = trace_of(layout, 0, micro=4)
    assert_equal(trace_of(layout, 1, micro=4), want)
    scattered = trace_of(layout, 2, micro=4)
    compare(scattered, want, 1e-12, is_fp64=False)
    assert_equal(trace_of(layout, 3, micro=4), scattered)
    assert_equal(trace_of(layout, 3, micro=4, activation_checkpointing="full"), scattered)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_parameters_are_divided_master_weights_rounded(precision: str, stage: int) -> None:
    assert_equal(
        trace_of("dp2", stage, micro=12, precision=precision), trace_of("dp2", 0, micro=12, precision=precision)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("victim", [0, 3])
def test_an_overflow_in_any_slice_makes_every_rank_skip_and_halve(victim: int, stage: int) -> None:
    world_size, parallel = LAYOUTS["dp2-pp2"]
    micro, zero = dict(micro_batch_size=2), dict(stage=stage)
    raw = config_of(parallel, precision="fp16", model=SHAPE, train=micro, zero=zero)
    for results, unchanged, scale in run(plant_infinity, world_size, raw, victim):
        assert [result.skipped for result in results] == [False, True, False, False]
        assert unchanged
        assert scale == 2.0**15


def bytes_of_a_rank(rank: int, world_size: int, raw: Raw) -> tuple[int, int, dict[str, int]]:
    """Return the number of parameters, with padding; the number in a rank's slices; and bytes when an update begins."""
    engine = engine_of(rank, world_size, raw)
    held: dict[str, int] = {}

    optimizer = engine.optimizer
    assert isinstance(optimizer, AdamW)
    update = optimizer.step

    def counted(factor: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        totals = [x for c in engine.chunks for x in (c.gradient.total, c.gradient.accumulator.buffer)]
        held["gradients"] = sum(x.untyped_storage().nbytes() for x in totals if x is not None)
        update(factor, lr, found_inf)

    engine.optimizer.step = counted  # type: ignore[method-assign]
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    states = [chunk.master for chunk in engine.chunks]
    states += [x for _, x in optimizer.moments.held()]
    held["states"] = sum(x.untyped_storage().nbytes() for x in states)
    assert held["states"] == sum(map(optimizer.state_bytes, engine.chunks))
    parameters = [chunk.parameters.whole for chunk in engine.chunks]
    parameters += [chunk.parameters.own for chunk in engine.chunks if chunk.spec.is_partitioned]
    held["parameters"] = sum(x.untyped_storage().nbytes() for x in parameters)
    return sum(c.size for c in engine.chunks), sum(len(c.master) for c in engine.chunks), held


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "state_dtype", "k"), [(2, "fp32", 12), (4, "fp32", 12), (2, "bf16", 8)])
def test_bytes_of_a_rank_equal_the_zero_paper(ranks: int, state_dtype: str, k: int, stage: int) -> None:
    """Rajbhandari et al. 2020, section 5: with Ψ parameters of 2 bytes, K = 12 bytes of states for each, and N ranks, a
    rank holds 2Ψ + 2Ψ + KΨ in stage 0, 2Ψ + 2Ψ + KΨ/N in stage 1, 2Ψ + (2Ψ + KΨ)/N in stage 2 and (2Ψ + 2Ψ + KΨ)/N in
    stage 3. Our gradients have 4 bytes where they are summed, and in stage 1, too, only a slice of them is left when
    the update begins. With moments in bf16 K is 8.
    """
    micro = dict(global_batch_size=24, micro_batch_size=24 // ranks)
    raw = config_of({}, precision="bf16", model=SHAPE, train=micro, zero=dict(stage=stage))
    raw["optimizer"] |= dict(state_dtype=state_dtype)
    for psi, shard, held in run(bytes_of_a_rank, ranks, raw):
        assert psi % (ALIGNMENT * ranks) == 0
        assert shard == (psi // ranks if stage else psi)
        assert held["parameters"] == 2 * (psi if stage < 3 else shard)
        assert held["states"] == k * shard
        assert held["gradients"] == 4 * shard


def elements_sent(rank: int, world_size: int, raw: Raw) -> tuple[int, int, dict[str, float]]:
    """Return the number of parameters, the number in blocks, and the elements given to each collective in a step."""
    engine = engine_of(rank, world_size, raw)
    engine.mesh.traffic.reset()
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    blocks = sum(chunk.size for chunk in engine.chunks if chunk.infos[0].unit in engine.part.units)
    handed = {kind: count / 8 for kind, count in engine.mesh.traffic.bytes.items()}
    return sum(chunk.size for chunk in engine.chunks), blocks, handed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_sends_what_the_table_of_stages_says(stage: int) -> None:
    """A rank in a ring of n ranks sends, with m microbatches, 2Ψ(n−1)/n in stages 0 and 1, and (m+1)Ψ(n−1)/n in stage
    2. In stage 3 a block is gathered for each forward and each backward, and the root once a step: this makes
    (m + gathers)Ψ(n−1)/n.
    """
    n, m = 2, 3
    micro = dict(global_batch_size=24, micro_batch_size=24 // n // m)
    raw = config_of({}, model=SHAPE, train=micro, zero=dict(stage=stage))
    for psi, blocks, handed in run(elements_sent, n, raw):
        scalars = 6 + 3  # labels, refusals, samples and their squares; loss; norm; written parameters, twice
        sent = handed.get("reduce_scatter", 0) * (n - 1) / n + handed.get("all_gather", 0) * (n - 1)
        sums = handed["all_reduce"] - (psi if stage == 0 else 0)
        assert 0 < sums < scalars
        sent += 2 * (handed["all_reduce"] - sums) * (n - 1) / n
        wanted = {0: 2 * psi, 1: 2 * psi, 2: (m + 1) * psi, 3: m * psi + 2 * m * blocks + (psi - blocks)}
        assert sent == wanted[stage] * (n - 1) / n


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
    """Train two steps and save a checkpoint. Return the losses of two more steps, by an engine of another stage."""
    batches = batches_of(4, batch=24)
    first = engine_of(rank, world_size, raw)
    for batch in batches[:2]:
        first.train_step(share_of(batch, first))
    pieces = first.state_pieces(owned=True)
    target = Path(folder, f"{raw['zero']['stage']}")
    meta = dict(step=2, counters=first.counters())
    checkpoint.save(target, pieces, metadata=meta, axis=first.mesh.world, keep=9)
    second = engine_of(rank, world_size, raw | dict(zero=dict(stage=3 - raw["zero"]["stage"])))
    checkpoint.load(target, second.state_pieces())
    second.restore(checkpoint.read_metadata(target)["counters"])
    return [second.train_step(share_of(batch, second)).loss for batch in batches[2:]]


@pytest.mark.gpu
def test_a_checkpoint_of_any_stage_resumes_in_any_other(tmp_path: Path) -> None:
    micro = dict(global_batch_size=24, micro_batch_size=12)
    losses = []
    for stage in (0, 3):
        raw = config_of({}, model=SHAPE, train=micro, zero=dict(stage=stage))
        losses.append(run(resumed, 2, raw, str(tmp_path))[0])
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["dp2", "dp2-pp2"])
def test_stage_3_of_a_loaded_model_equals_hugging_face(layout: str, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    path = save_model(tmp_path / "opt", **SHAPE)
    raw = config_of(parallel, model=dict(path=str(path)), train=dict(micro_batch_size=2), zero=dict(stage=3))
    trace = run(train, world_size, raw, batches_of(4))[0]
    assert trace is not None
    compare(trace, reference(path, raw, batches_of(4)), 1e-9, is_fp64=True)


def bytes_at_start(rank: int, world_size: int, raw: Raw) -> tuple[list[int], int]:
    """Return the bytes of all parameters after the stage is built, whenever a chunk is filled, and at the end; and
    those of the largest chunk.
    """
    config = parse(raw, world_size=world_size, resolve=resolve)
    context = make_context(config, Place(rank, world_size, rank, world_size))
    stage = build(context)

    def held() -> int:
        storages = [parameter.untyped_storage() for parameter in stage.parameters()]
        sizes = {storage._cdata: storage.nbytes() for storage in storages}.values()
        return sum(size for size in sizes if size > 8)  # not the single element of a placeholder

    found, fill = [held()], stage.set_initial_values

    def watched(infos: Sequence[ParameterInfo]) -> None:
        fill(infos)
        found.append(held())

    stage.set_initial_values = watched
    engine = Engine(stage, context)
    return [*found, held()], 8 * max(chunk.size for chunk in engine.chunks)


@pytest.mark.gpu
def test_stage_3_never_holds_a_model_whole_at_its_start() -> None:
    raw = config_of({}, model=SHAPE, train=dict(micro_batch_size=6), zero=dict(stage=3))
    for found, largest in run(bytes_at_start, 2, raw):
        assert (found[0], max(found), found[-1]) == (0, largest, 0)


def evaluated(rank: int, world_size: int, raw: Raw) -> tuple[float, int]:
    engine = engine_of(rank, world_size, raw)
    loss = engine.evaluate([share_of(batch, engine) for batch in batches_of(2, batch=24)])
    return loss, sum(chunk.parameters.whole.untyped_storage().nbytes() for chunk in engine.chunks)


@pytest.mark.gpu
def test_evaluation_in_stage_3_has_the_same_loss_and_releases_the_parameters() -> None:
    batch = dict(global_batch_size=24, micro_batch_size=4)
    for (loss, whole), (divided, left) in zip(
        run(evaluated, 2, config_of({}, model=SHAPE, train=batch, zero=dict(stage=0))),
        run(evaluated, 2, config_of({}, model=SHAPE, train=batch, zero=dict(stage=3))),
        strict=True,
    ):
        assert divided == loss
        assert whole > left == 0


def most_whole(rank: int, world_size: int, raw: Raw) -> int:
    """Return how many layers, at most, are gathering or whole while a layer computes, forward or backward."""
    engine = engine_of(rank, world_size, raw)
    most = 0

    def count(*arguments: Any) -> None:
        nonlocal most
        most = max(most, sum(unit.state is not State.RELEASED for unit in engine.gatherer.units))

    for layer in engine.part.units.values():
        layer.register_forward_pre_hook(count)
        for parameter in layer.parameters():
            parameter.register_hook(count)
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    return most


@pytest.mark.gpu
def test_no_more_than_two_layers_are_whole_at_once() -> None:
    """These are the one that computes, and the next one, which is being gathered."""
    batch = dict(global_batch_size=24, micro_batch_size=6)
    raw = config_of({}, model=SHAPE | dict(num_hidden_layers=6), train=batch, zero=dict(stage=3))
    assert run(most_whole, 2, raw) == [2, 2]


def test_a_unit_refuses_to_be_released_while_it_is_gathering() -> None:
    unit = Unit([])
    unit.gather()
    with pytest.raises(AssertionError, match="cannot go from GATHERING to RELEASED"):
        unit.release()
