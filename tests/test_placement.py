"""The placement of chunks changes nothing of what is trained."""

import re
import time
import weakref
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parallel
from models import build
from models.shapes import resolve
from parallel.chunk.sharing import Sharing
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.optim import shared_update, streaming
from parallel.optim.adamw import AdamW
from parallel.optim.shared_update import OffloadedElements, Side, UpdateTimes
from parallel.placement.policy import (
    SAFETY,
    ChunkBytes,
    HostRoom,
    MemorySample,
    host_bytes,
    max_states_on_host,
    peak_bytes,
    plan_placement,
)
from parallel.storage.transfer import ON_DEVICE, Placement, Tier
from tests.harness import run
from tests.parity import (
    SHAPE,
    Raw,
    Trace,
    assert_bits,
    assert_same_update,
    batches_of,
    config_of,
    engine_of,
    relative,
    share_of,
    train,
    whole,
)
from tests.test_module_engine import MODELS, batches, loss_of
from tests.test_module_engine import config_of as module_config
from tests.test_module_engine import engine_of as module_engine
from tests.test_module_state import train as train_module
from tests.test_zero import assert_equal
from training.metrics import peak_host_bytes

LAYOUTS: dict[str, tuple[int, Raw]] = {
    "single": (1, {}),
    "pp2": (2, dict(pipeline=2)),
    "dp2-1d2": (4, dict(tensor=dict(mode="1d", size=2))),
    "2.5d-depth2": (8, dict(tensor=dict(mode="2.5d", size=8, depth=2))),
}
BUDGETS = {"single": "200KiB", "pp2": "150KiB", "dp2-1d2": "120KiB"}  # so little that something is offloaded


def raw_of(layout: str, policy: str, stage: int, *, precision: str = "fp64", **options: Any) -> Raw:
    if policy == "auto" and torch.cuda.is_available():
        pytest.skip("a GPU's allocator cannot be capped at some KiB")
    batch = dict(global_batch_size=24, micro_batch_size=4) | options
    zero = dict(
        stage=stage, tensor_placement_policy=policy, device_memory=BUDGETS[layout] if policy == "auto" else None
    )
    return config_of(LAYOUTS[layout][1], steps=4, precision=precision, model=SHAPE, train=batch, zero=zero)


@cache
def trace_of(layout: str, policy: str, stage: int, **options: Any) -> Trace:
    found = run(train, LAYOUTS[layout][0], raw_of(layout, policy, stage, **options), batches_of(4, batch=24))[0]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("layout", "stage", "policy"),
    [
        *(pytest.param(*case, "cpu", marks=pytest.mark.gpu) for case in (("single", 0), ("pp2", 0), ("dp2-1d2", 2))),
        *((*case, "auto") for case in (("single", 0), ("pp2", 0), ("dp2-1d2", 2), ("dp2-1d2", 3))),
        pytest.param("2.5d-depth2", 3, "cpu", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)
def test_training_is_the_same_bit_for_bit_by_every_policy(layout: str, stage: int, policy: str) -> None:
    assert_equal(trace_of(layout, policy, stage), trace_of(layout, "cuda", stage))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [*(pytest.param(p, marks=pytest.mark.slow) for p in ("fp32", "fp16")), "bf16"])
def test_training_from_the_host_is_the_same_in_every_precision(precision: str) -> None:
    for options in (dict(micro_batch_size=6), dict(activation_checkpointing="full")):
        want = trace_of("dp2-1d2", "cuda", 2, precision=precision, **options)
        assert_equal(trace_of("dp2-1d2", "cpu", 2, precision=precision, **options), want)


def losses_and_bytes(rank: int, world_size: int, raw: Raw) -> tuple[list[Any], float]:
    """Return the losses and norms of steps with evaluations between them, and the bytes of chunks for each element."""
    engine = engine_of(rank, world_size, raw)
    seen: list[Any] = []
    for step, batch in enumerate(batches_of(5, batch=24)):
        if step == 2 and engine.loss_scale.is_dynamic:
            engine.loss_scale.scale = 2.0**40
        found = engine.train_step(share_of(batch, engine))
        seen += [found.loss, found.grad_norm, engine.evaluate([share_of(batch, engine)])]
    assert isinstance(engine.optimizer, AdamW)
    tensors = [
        x for chunk in engine.chunks for x in (chunk.parameters.own, chunk.master, *engine.optimizer.moments.of(chunk))
    ]
    tensors += [c.gradient.host_buffer for c in engine.chunks if c.gradient.host_buffer is not None]
    return seen, sum(x.nbytes for x in tensors) / sum(chunk.size for chunk in engine.chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_with_one_microbatch_a_gradient_reuses_the_memory_of_its_parameters(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is changed by overflows, after which the parameters are put back there, nor by evaluations."""
    for micro, per_parameter in ((24, 14), (12, 18)):
        found, wanted = (
            run(losses_and_bytes, 1, raw_of("single", policy, 0, precision=precision, micro_batch_size=micro))[0]
            for policy in ("cpu", "cuda")
        )
        assert found[0] == wanted[0]
        assert (None in found[0]) == (precision == "fp16")  # steps that were skipped
        assert found[1] == per_parameter


def shared(rank: int, world_size: int, raw: Raw, share: float) -> tuple[dict[str, torch.Tensor], float]:
    """Return the masters after three steps, two of them with this share of the host, and the balance after them."""
    streaming.PART, shared_update.HOST_PART = 1024, 256  # whole vectors: a remainder would be rounded differently
    engine = engine_of(rank, world_size, raw)
    assert isinstance(engine.optimizer, AdamW)
    for batch in batches_of(3, batch=24):
        engine.train_step(share_of(batch, engine))
        engine.optimizer.host_share = share
    return whole(engine, [chunk.master for chunk in engine.chunks]), engine.optimizer.balance()


@pytest.mark.gpu
@pytest.mark.parametrize(("share", "balance"), [(0.0, (0.0, 0.0)), (0.4, (0.01, 0.99)), (1.0, (0.5, 1.0))])
def test_host_and_device_share_an_update(share: float, balance: tuple[float, float]) -> None:
    want = run(shared, 1, raw_of("single", "cuda", 0, precision="bf16"), 0.0)[0]
    found = []
    for _ in range(10):  # on a busy machine either side may be suspended for as long as its whole part takes
        got = run(shared, 1, raw_of("single", "cpu", 0, precision="bf16"), share)[0]
        if share and torch.cuda.is_available():  # its AdamW rounds differently
            assert all(relative(got[0][name], want[0][name]) <= 1e-5 for name in want[0])
        else:
            assert_bits(got[0], want[0])
        found.append(got[1])
        if balance[0] <= got[1] <= balance[1]:
            return
    pytest.fail(f"no share within {balance}: {found}")


ALL_MOVABLE = OffloadedElements(disk=0, host=800, movable=800)


def times_with(disk: Side) -> UpdateTimes:
    """Return the times of an update with 600 elements on the device at 200 a second, 200 on the host at 100 a second,
    and others from a disk.
    """
    return UpdateTimes(disk, Side(600, 3.0), Side(200, 2.0))


def test_the_seconds_of_an_update_with_another_host_share_are_predicted() -> None:
    times = times_with(Side(0, 0.0))
    assert times.best(ALL_MOVABLE) == pytest.approx(1 / 3)
    for share, seconds in {0.25: times.took, 0.0: 4.0, 0.5: 4.0, 5 / 16: 2.75}.items():
        assert times.seconds(share, ALL_MOVABLE) == pytest.approx(seconds)


@pytest.mark.parametrize(("disk", "share"), [(1.0, 5 / 12), (2.0, 1 / 2), (9.0, 1.0)])
def test_the_host_has_a_larger_share_if_the_device_waits_for_a_disk(disk: float, share: float) -> None:
    """The speeds are the same, but there are also states on a disk, which only the device can update."""
    times, elements = times_with(Side(50, disk)), OffloadedElements(disk=50, host=800, movable=800)
    assert times.best(elements) == pytest.approx(share)
    assert times.seconds(0.25, elements) == times.took
    assert times.seconds(1.0, elements) == pytest.approx(max(disk, 8.0))


@pytest.mark.parametrize(
    ("elements", "share", "seconds"),
    [
        (OffloadedElements(disk=0, host=600, movable=400), 1 / 2, 2.0),
        (OffloadedElements(disk=0, host=600, movable=100), 1.0, 2.5),
        (OffloadedElements(disk=0, host=300, movable=300), 1 / 3, 1.0),
        (OffloadedElements(disk=25, host=400, movable=400), 1 / 2, 2.0),  # half as many on the disk: 1 second
        (OffloadedElements(disk=0, host=600, movable=0), 1.0, 3.0),
    ],
)
def test_the_hosts_share_is_that_of_the_elements_of_another_plan(
    elements: OffloadedElements, share: float, seconds: float
) -> None:
    times = times_with(Side(50, 2.0))
    assert times.best(elements) == pytest.approx(share)
    assert times.seconds(share, elements) == pytest.approx(seconds)


def test_a_disk_that_was_not_timed_is_as_fast_as_the_bus() -> None:
    times, elements = times_with(Side(0, 0.0)), OffloadedElements(disk=200, host=400, movable=400)
    assert times.best(elements) == pytest.approx(1 / 2)
    assert times.seconds(0.5, elements) == pytest.approx(2.0)


def test_a_side_that_was_not_timed_leaves_the_share_as_it_is() -> None:
    for bus, host in ((Side(0, 0.0), Side(800, 8.0)), (Side(800, 4.0), Side(0, 0.0))):
        assert UpdateTimes(Side(50, 1.0), bus, host).best(ALL_MOVABLE) is None


def left_behind(rank: int, world_size: int, raw: Raw) -> int:
    """Return how many masters still exist where they were, once every chunk has moved."""
    engine = engine_of(rank, world_size, raw)
    engine.train_step(share_of(batches_of(1, batch=24)[0], engine))
    masters = [weakref.ref(chunk.master) for chunk in engine.chunks]
    for chunk in engine.chunks:
        engine.optimizer.move(chunk, ON_DEVICE)
    return sum(master() is not None for master in masters)


@pytest.mark.gpu
def test_a_chunk_that_has_moved_leaves_nothing_where_it_was() -> None:
    """A host that is nearly full has no room to keep it until the next update."""
    assert run(left_behind, 1, raw_of("single", "cpu", 0, precision="bf16")) == [0]


def built(rank: int, world_size: int, raw: Raw) -> int:
    """Return by how many bytes building a model raises the peak memory of this process."""
    context = make_context(parse(raw, resolve=resolve), Place())
    before = peak_host_bytes()
    build(context)
    return peak_host_bytes() - before


def test_building_a_model_on_the_host_holds_no_more_than_a_layer_at_a_time() -> None:
    """A layer takes 128 MiB of 1.5 GiB. There is room for another one."""
    shape = SHAPE | dict(hidden_size=1024, word_embed_proj_dim=1024, ffn_dim=16384, num_attention_heads=16)
    shape |= dict(num_hidden_layers=12)
    raw = dict(model=shape, data=dict(sequence_length=6), zero=dict(tensor_placement_policy="cpu"))
    assert run(built, 1, raw)[0] < 300 * 2**20


def moved_about(rank: int, world_size: int, raw: Raw) -> dict[str, torch.Tensor]:
    """Return the masters after steps between which every chunk moves."""
    engine = engine_of(rank, world_size, raw)
    placements = [Placement(parameters, states) for parameters in (Tier.DEVICE, Tier.HOST) for states in Tier]
    for step, batch in enumerate(batches_of(6, batch=24)):
        engine.train_step(share_of(batch, engine))
        for i, chunk in enumerate(engine.chunks):
            engine.optimizer.move(chunk, placements[(step + i) % len(placements)])
        for chunk in engine.chunks:
            chunk.settle()
    assert len({chunk.placement for chunk in engine.chunks}) == len(placements)
    return whole(engine, [chunk.master for chunk in engine.chunks])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "stage"), [("bf16", 1), ("fp64", 3), pytest.param("fp64", 0, marks=pytest.mark.slow)]
)
def test_chunks_may_move_between_any_two_steps(precision: str, stage: int, tmp_path: Path) -> None:
    layout = "dp2-1d2"
    want = run(moved_never, 4, raw_of(layout, "cuda", stage, precision=precision))
    raw = raw_of(layout, "cpu", stage, precision=precision)
    raw["zero"]["nvme_dir"] = str(tmp_path)
    got = run(moved_about, 4, raw)
    assert all(torch.equal(got[0][name], want[0][name]) for name in want[0])


def moved_never(rank: int, world_size: int, raw: Raw) -> dict[str, torch.Tensor]:
    engine = engine_of(rank, world_size, raw)
    for batch in batches_of(6, batch=24):
        engine.train_step(share_of(batch, engine))
    return whole(engine, [chunk.master for chunk in engine.chunks])


def module_weights(rank: int, world_size: int, raw: Raw, model: str, passes: bool) -> dict[str, torch.Tensor]:
    """Return the weights after five steps. `passes`: the user passes an optimizer of torch's."""
    module = MODELS[model]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.3) if passes else None
    engine, _ = module_engine(rank, world_size, raw, module, optimizer=optimizer)
    train_module(engine, 0, 5)
    placements = {chunk.placement for chunk in engine.chunks}
    assert len(placements) == 1 or raw["zero"].get("tensor_placement_policy") == "auto"
    return {piece.name + str(piece.box): piece.data.clone() for piece in engine.weights()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "stage", "passes"), [("plain", 0, True), ("opt", 2, False), ("plain", 3, False), ("opt", 3, True)]
)
def test_a_users_own_module_trains_the_same_under_every_policy(model: str, stage: int, passes: bool) -> None:
    want = run(module_weights, 2, module_config(stage), model, passes)
    for policy, memory, device in (("cpu", None, "auto"), ("auto", "80KiB", "cpu")):  # a GPU cannot be capped at that
        zero = dict(stage=stage, tensor_placement_policy=policy, device_memory=memory)
        got = run(module_weights, 2, module_config(stage, device=device) | dict(zero=zero), model, passes)
        for ours, theirs in zip(got, want, strict=True):
            assert_same_update(ours, theirs)


def on_the_device(rank: int, world_size: int, raw: Raw) -> tuple[int, int, list[str], list[float]]:
    """Return the most bytes of chunks on the device while any layer was used, the budget, the lines logged, and the
    seconds of each step. One of the three that are measured is held up for longer than any step before it took.
    """
    engine = engine_of(rank, world_size, raw)
    most, lines, took = 0, list[str](), list[float]()
    engine.placement_manager.log = lines.append

    def count(*_: Any) -> None:
        nonlocal most
        held = 0
        for chunk in engine.chunks:
            held += chunk.parameters.whole.untyped_storage().nbytes()
            resident = chunk.placement.states is Tier.DEVICE
            shares = chunk.sharing is Sharing.ALL
            held += resident * (3 - shares) * chunk.master.nbytes
            for gradient in (chunk.gradient.accumulator.buffer, chunk.gradient.total):
                if resident and gradient is not None:
                    held += gradient.nbytes
        most = max(most, held)

    for layer in engine.part.units.values():
        layer.register_forward_pre_hook(count)
        for parameter in layer.parameters():
            parameter.register_hook(count)

    def hold_up(*_: Any) -> None:
        hook.remove()
        time.sleep(2 * max(took))

    for step, batch in enumerate(batches_of(7, batch=24), 1):
        if step == 6:  # one of those that are measured
            hook = engine.part.register_forward_pre_hook(hold_up)
        begun = time.perf_counter()
        engine.train_step(share_of(batch, engine))
        took.append(time.perf_counter() - begun)
    assert any(c.placement.states is Tier.DEVICE for c in engine.chunks)
    assert any(c.placement.states is Tier.HOST for c in engine.chunks)
    return most, engine.placement_manager.budget, lines, took


def test_auto_keeps_to_its_budget_and_logs_what_it_plans() -> None:
    raw = raw_of("single", "auto", 0)
    raw["zero"]["device_memory"] = "200KiB"
    most, budget, lines, took = run(on_the_device, 1, raw)[0]
    assert most <= budget == 200 * 1024
    assert "predicted peak" in lines[0]
    found = re.fullmatch(r"placement: measured a step ([\d.]+) s", lines[1])
    assert found is not None
    assert 0 < float(found[1]) <= median(took[4:]) + 0.0005  # of three steps, one was held up; 3 digits are logged


def refused(rank: int, world_size: int, raw: Raw) -> str:
    try:
        engine_of(rank, world_size, raw)
    except parallel.ConfigError as error:
        return str(error)
    return ""


def test_a_budget_that_cannot_work_is_refused_on_every_rank_with_numbers() -> None:
    raw = raw_of("pp2", "auto", 0)
    raw["zero"]["device_memory"] = "8KiB"
    for message in run(refused, 2, raw):
        assert "zero.device_memory: 0.01 MiB cannot hold 0.0" in message


@given(st.data())
def test_a_plan_fits_and_everything_stays_on_the_device_if_it_fits(data: st.DataObject) -> None:
    sizes = st.builds(ChunkBytes, *(st.integers(1, 100) for _ in range(6)), st.booleans(), st.booleans())
    chunks = data.draw(st.lists(sizes, min_size=1, max_size=8))
    some = st.frozensets(st.integers(0, len(chunks) - 1))
    samples = data.draw(st.lists(st.builds(MemorySample, st.integers(0, 300), some, some), min_size=1, max_size=5))
    count, ratio = len(chunks), data.draw(st.floats(0, 1))
    least, most = peak_bytes(chunks, samples, 0, 0), peak_bytes(chunks, samples, count, count)
    fitting = int(least / SAFETY) + 1
    budget = data.draw(st.integers(fitting, max(fitting, most)) | st.integers(1, 4000))  # the former fits some of it
    room = HostRoom(data.draw(st.just(4000) | st.integers(0, 2500)), data.draw(st.booleans()))
    found, allowed = plan_placement(chunks, samples, budget, ratio, room), int(budget * SAFETY)
    if found is None:
        assert least > allowed or max_states_on_host(chunks, room) is None
        return
    used = [host_bytes(chunks, found.num_device_states, found.num_device_parameters, k) for k in range(count + 1)]
    assert used[found.num_host_states] <= room.budget
    assert all(more > room.budget for more in used[found.num_host_states + 1 :])
    assert found.num_device_states <= found.num_host_states <= count
    assert room.has_disk or found.num_host_states == count
    assert found.peak == peak_bytes(chunks, samples, found.num_device_states, found.num_device_parameters) <= allowed
    if most <= allowed:
        assert (found.num_device_states, found.num_device_parameters) == (count, count)


def resumed(rank: int, world_size: int, raw: Raw, folder: Path) -> list[float]:
    """Return the losses of a run with its chunks on the host (or device) resumed by one with them on the other tier."""
    from parallel.checkpoint import checkpoint

    batches = batches_of(4, batch=24)
    first = engine_of(rank, world_size, raw)
    for batch in batches[:2]:
        first.train_step(share_of(batch, first))
    policy = raw["zero"]["tensor_placement_policy"]
    metadata = dict(step=2, counters=first.counters())
    checkpoint.save(folder / policy, first.state_pieces(owned=True), metadata=metadata, axis=first.mesh.world, keep=9)
    other = dict(stage=3, tensor_placement_policy="cpu" if policy == "cuda" else "cuda")
    second = engine_of(rank, world_size, raw | dict(zero=other))
    checkpoint.load(folder / policy, second.state_pieces())
    second.restore(checkpoint.read_metadata(folder / policy)["counters"])
    return [second.train_step(share_of(batch, second)).loss for batch in batches[2:]]


@pytest.mark.gpu
def test_a_checkpoint_made_under_one_policy_is_resumed_under_another(tmp_path: Path) -> None:
    losses = [run(resumed, 4, raw_of("dp2-1d2", policy, 3), tmp_path)[0] for policy in ("cpu", "cuda")]
    assert losses[0] == losses[1]


def out_of_memory(rank: int, world_size: int, raw: Raw) -> list[str]:
    """Return the messages of engines whose device runs out of memory in a step."""

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    ours = engine_of(rank, world_size, raw)
    ours.part.register_forward_pre_hook(exhausted)
    theirs, _ = module_engine(rank, world_size, module_config(0), MODELS["opt"]())
    loss = loss_of(theirs, batches()[0][0], step=0)
    loss.register_hook(exhausted)
    updating, _ = module_engine(rank, world_size, module_config(0), MODELS["opt"]())
    updating.backward(loss_of(updating, batches()[0][0], step=0))
    setattr(updating.optimizer, "step", exhausted)  # noqa: B010
    batch = share_of(batches_of(1, batch=24)[0], ours)
    messages = []
    for act in (
        lambda: ours.train_step(batch),
        lambda: ours.evaluate([batch]),
        lambda: theirs.backward(loss),
        lambda: updating.step(),
    ):
        with pytest.raises((parallel.ConfigError, torch.OutOfMemoryError)) as caught:
            act()
        messages.append(str(caught.value))
    return messages


@pytest.mark.gpu
def test_a_step_that_does_not_fit_says_what_would_help() -> None:
    for message in run(out_of_memory, 1, raw_of("single", "cuda", 0))[0]:
        assert message.startswith("rank 0 on ")
        assert "2.00 GiB more were asked for" in message
        assert "tensor_placement_policy='auto'" in message
