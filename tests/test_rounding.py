"""Moments in bf16: stochastic rounding has no bias, and its noise is the same wherever an element is."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.shapes import resolve
from parallel.checkpoint import checkpoint
from parallel.config import parse
from parallel.engine.base import EngineBase
from parallel.layout import sources
from parallel.optim import adamw as optim
from parallel.optim import shared_update, streaming
from parallel.optim.adamw import AdamW
from parallel.optim.part import Part
from parallel.optim.rounding import TABLE, Rounding, _tables
from parallel.storage.transfer import Tier
from tests.harness import run
from tests.parity import (
    SHAPE,
    Raw,
    Trace,
    assert_bits,
    batches_of,
    compare,
    config_of,
    engine_of,
    relative,
    share_of,
    train,
    whole,
)
from tests.parts import chunk_of, chunk_of_sources, part_of
from tests.test_module_engine import MODELS
from tests.test_module_engine import config_of as module_config
from tests.test_module_engine import engine_of as module_engine
from tests.test_module_state import train as train_module
from tests.test_placement import raw_of
from training.preview import preview_of

BF16 = dict(state_dtype="bf16", betas=(0.9, 0.999))


def narrow(raw: Raw, state_dtype: str = "bf16") -> Raw:
    return raw | dict(optimizer=raw.get("optimizer", {}) | BF16 | dict(state_dtype=state_dtype))


class OpsOf(TorchDispatchMode):
    """Records the operations whose result is on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.found = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if isinstance(y, Tensor) and y.device == self.device:
            self.found.append(func.overloadpacket.__name__)
        return y


def test_the_device_computes_no_tables_in_the_stream_that_asks_for_them_first() -> None:
    """The first update streamed in a stream of its own. It asked for the tables, and computed half of them there, while
    the update of what stays on the device read them in the stream of computation: that noise was whatever had been in
    the memory, so that two runs of one seed differed everywhere. Copies from the host are complete when they return.
    """
    meta = torch.device("meta")
    with OpsOf(meta) as ops:
        _tables.__wrapped__(meta)
    assert ops.found == ["_to_copy", "_to_copy"]


# -- one part ----------------------------------------------------------------------------------------------------------


def rounded(part: Part, values: tuple[Tensor, Tensor], update: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rounding = Rounding(len(part.gradient), dtype, torch.device("cpu"))
    with rounding.widened(part, update) as wide:
        for x, value in zip(wide, values, strict=True):
            x.copy_(value)
    return list(part.states[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_over_updates_is_the_number_before_rounding(dtype: torch.dtype) -> None:
    """Each result is one of the two neighbours in bf16. The standard deviation of the mean of U updates is at most half
    a bf16 unit / sqrt(U); 5 of these are allowed for the elements of a chunk. The noise of elements is independent: for
    the mean over all n elements, 5 / sqrt(U · n) / 2 units are allowed.
    """
    chunk, updates = chunk_of((24, 40), (7,), (), (2, 3, 5, 4)), 400
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, chunk.size, generator=generator, dtype=dtype).float().to(dtype)
    values *= 10.0 ** torch.randint(-20, 3, (2, chunk.size), generator=generator)
    total = torch.zeros(2, chunk.size, dtype=torch.float64)
    covered = torch.zeros(chunk.size, dtype=torch.bool)
    for view in chunk.spec.views(covered):
        view.fill_(True)
    unit = 2.0 ** (values.abs().double().log2().floor() - 7)
    for update in range(updates):
        found = torch.stack(rounded(part_of(chunk), (values[0], values[1]), update, dtype)).double()
        assert ((found - values).abs() < unit).all()
        total += found
    off = ((total / updates - values) / unit)[:, covered]
    assert off.abs().max() < 5 * 0.5 * updates**-0.5
    assert abs(float(off.mean())) < 5 * 0.5 * (updates * off.numel()) ** -0.5
    assert off.std() > 0.3 * updates**-0.5  # it is noise, and differs from update to update


def test_zero_and_numbers_that_bf16_can_represent_stay_the_same() -> None:
    chunk = chunk_of((8, 8), (3,))
    held = torch.randn(chunk.size).bfloat16()
    for update in range(50):
        first, second = rounded(part_of(chunk), (torch.zeros(chunk.size), held.float()), update)
        assert not first.view(torch.int16).any()
        assert torch.equal(second, held)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_noise_of_an_element_depends_on_neither_ranks_nor_parts(ranks: int) -> None:
    """The chunk is divided into slices of ranks, and these into parts that begin and end inside a row."""
    shapes = ((24, 40), (7,), (130,), (3, 5, 7), (64, 16))
    found = [sources.whole(f"a.{i}", shape) for i, shape in enumerate(shapes)]
    found.append(sources.grouped(["q", "k", "v"], [(24, 9), (8, 9), (8, 9)], 4))
    found.append(sources.transposed(sources.joined("c_attn", sources.fused(["q", "k", "v"], (6, 11)))))
    one = chunk_of_sources(*found)
    values = torch.rand(2, chunk_of_sources(*found, ranks=ranks).size)
    want = rounded(part_of(one), (values[0, : one.size], values[1, : one.size]), 3)
    for rank in range(ranks):
        chunk = chunk_of_sources(*found, rank=rank, ranks=ranks)
        mine = slice(chunk.spec.first, chunk.spec.first + len(chunk.master))
        held = part_of(chunk)
        for part in held.split(33):
            here = slice(part.first, part.first + len(part.gradient))
            rounded(part, (values[0, here], values[1, here]), 3)
        for got, wanted in zip(held.states[1:], want, strict=True):
            for segment in chunk.spec.segments(got):
                at = segment.data.storage_offset() + mine.start
                assert torch.equal(segment.data, wanted[at : at + len(segment.data)]), segment.info.name


def test_noise_differs_between_moments_updates_tensors_and_elements() -> None:
    """Values half-way between two neighbours are rounded up half of the time. Two sets of such draws agree in half of
    their elements, within 5 standard deviations.
    """
    chunk = chunk_of((64, 64), (64, 64))
    halves = torch.full((chunk.size,), 1 + 2.0**-8)
    draws = [torch.stack(rounded(part_of(chunk), (halves, halves), update)) > 1 for update in (1, 2)]
    a = draws[0][0][:4096].view(64, 64)
    others = [draws[0][1][:4096], draws[1][0][:4096], draws[0][0][4096:], a.T, a.roll(1, 0), a.roll(1, 1), a.roll(9)]
    assert (
        torch.linalg.matrix_norm(a.float() - 0.5, 2) < 1.1 * 0.5 * 2 * 64**0.5
    )  # as for a random matrix, which has no pattern
    for other in others:
        agree = float((a.flatten() == other.flatten()).float().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / 64


def test_a_dim_longer_than_the_table_repeats_it() -> None:
    chunk = chunk_of((TABLE + 100,))
    halves = torch.full((chunk.size,), 1 + 2.0**-8)
    found = rounded(part_of(chunk), (halves, halves), 1)[0]
    assert torch.equal(found[:100], found[TABLE : TABLE + 100])
    assert float((found[: TABLE // 2] == found[TABLE // 2 : TABLE]).float().mean()) < 0.6


# -- training ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, Raw, int]] = {
    "pp2": (2, dict(pipeline=2), 0),
    "1d2": (2, dict(tensor=dict(mode="1d", size=2)), 0),
    "dp2-1d2-2": (4, dict(tensor=dict(mode="1d", size=2)), 2),
    "dp2-1d2-3": (4, dict(tensor=dict(mode="1d", size=2)), 3),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4)), 0),
    "2.5d-depth2-3": (8, dict(tensor=dict(mode="2.5d", size=8, depth=2)), 3),
}


def trace_of(layout: str, precision: str, changes: Raw) -> Trace:
    world_size, layout_of, stage = LAYOUTS.get(layout, (1, {}, 0))
    batch = dict(global_batch_size=24, micro_batch_size=4)
    raw = config_of(layout_of, steps=4, precision=precision, model=SHAPE, train=batch, zero=dict(stage=stage))
    raw["optimizer"] |= changes
    found = run(train, world_size, raw, batches_of(4, batch=24))[0]
    assert found is not None
    return found


@pytest.mark.parametrize("layout", [*list(LAYOUTS)[:-1], pytest.param("2.5d-depth2-3", marks=pytest.mark.slow)])
def test_one_seed_gives_one_model_in_every_layout(layout: str) -> None:
    """The run is in fp64, and moments are rounded to fp32 and then stochastically. A difference in the last bit of fp64
    changes the fp32 number once in about 2^28 times, and that changes the bf16 number once in 2^16. So all moments are
    the same here, and what differs is fp64's own rounding.
    """
    want = trace_of("single", "fp64", BF16)
    compare(trace_of(layout, "fp64", BF16), want, 1e-9, is_fp64=False)


@pytest.mark.parametrize("layout", ["pp2", "dp2-1d2-3"])
def test_in_fp32_moments_of_layouts_differ_only_where_their_last_bits_decide_the_rounding(layout: str) -> None:
    """An fp32 moment that is off by k units in the last place is rounded differently with probability k / 2^16. Then it
    is off by 2^-7 at most, and changes its weight by lr · 2^-7 in an update, at most. With k about 16 (1e-6, relative)
    and 4 updates that makes 4 · lr · 2^-7 · sqrt(2^-12) = 5e-6 in the norm over all weights of a tensor. Weights are
    0.02 to 0.2: a relative 2e-4.
    """
    want = trace_of("single", "fp32", BF16)
    compare(trace_of(layout, "fp32", BF16), want, 2e-4, is_fp64=False)


def test_training_with_narrow_moments_is_close_but_not_the_same() -> None:
    """Two moments that are rounded by 2^-8 change a weight by 1e-2 of its updates, which are 4 of lr = 0.01 at most."""
    wide, narrow = (trace_of("single", "fp64", dict(state_dtype=name)) for name in ("fp32", "bf16"))
    compare(narrow, wide, 1e-2, is_fp64=False)
    with pytest.raises(AssertionError):
        compare(narrow, wide, 1e-5, is_fp64=False)


@pytest.mark.parametrize(
    ("layout", "stage", "precision"),
    [
        *(("single", 0, "fp64"), ("single", 0, "bf16"), ("dp2-1d2", 2, "bf16"), ("pp2", 0, "fp16")),
        pytest.param("dp2-1d2", 3, "fp32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("policy", [pytest.param("cpu", marks=pytest.mark.gpu), "auto"])
def test_a_model_trains_bit_for_bit_wherever_its_states_are_placed(
    layout: str, stage: int, precision: str, policy: str
) -> None:
    assert_bits(weights_of(layout, policy, stage, precision), weights_of(layout, "cuda", stage, precision))


@cache
def weights_of(layout: str, policy: str, stage: int, precision: str) -> dict[str, Tensor]:
    raw = narrow(raw_of(layout, policy, stage, precision=precision))
    share = 0.0 if torch.cuda.is_available() else 0.5  # of the host, whose AdamW rounds differently from a GPU's
    return run(weights_in, 4 if layout == "dp2-1d2" else 1 + (layout == "pp2"), raw, share)[0]


def weights_in(rank: int, world_size: int, raw: Raw, share: float) -> dict[str, Tensor]:
    """Return the weights and both moments after some steps, in which chunks are updated in small parts."""
    streaming.PART, shared_update.HOST_PART = 1024, 512  # whole vectors: a remainder would be rounded differently
    optim.ROUNDED_AT_ONCE = {Tier.DEVICE: 512, Tier.HOST: 256}
    engine = engine_of(rank, world_size, raw)
    for batch in batches_of(4, batch=24):
        engine.train_step(share_of(batch, engine))
        assert isinstance(engine.optimizer, AdamW)
        engine.optimizer.host_share = share
    return everything(engine)


def everything(engine: EngineBase) -> dict[str, Tensor]:
    assert isinstance(engine.optimizer, AdamW)
    moments = engine.optimizer.moments
    found: dict[str, Tensor] = {}
    for kind in range(3):
        flats = [(chunk.master, *moments.of(chunk))[kind] for chunk in engine.chunks]
        found |= {f"{kind}/{name}": x for name, x in whole(engine, flats).items()}
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_host_and_device_round_moments_in_the_same_way(share: float) -> None:
    by_two = share > 0 and torch.cuda.is_available()  # its AdamW rounds differently, as layouts in fp32 do above
    precision = "fp32" if by_two else "bf16"  # in bf16 a weight rounded differently would change every gradient
    want = run(weights_in, 1, narrow(raw_of("single", "cuda", 0, precision=precision)), 0.0)[0]
    got = run(weights_in, 1, narrow(raw_of("single", "cpu", 0, precision=precision)), share)[0]
    if by_two:
        weights = {name for name in want if name.startswith("0/") and not name.endswith("k_proj.bias")}
        errors = {name: relative(got[name], want[name]) for name in weights}
        assert max(errors.values()) <= 2e-4, errors
    else:
        assert_bits(got, want)


@pytest.mark.gpu
def test_the_noise_is_the_same_on_a_gpu_and_on_the_host() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    chunk = chunk_of((24, 40), (7,), (130,), (3, 5, 7))
    values = torch.randn(2, chunk.size)
    want = rounded(part_of(chunk), (values[0], values[1]), 3)
    on_host = part_of(chunk)
    first, second = (x.cuda() for x in on_host.states[1:])
    part = replace(on_host, states=(chunk.master.cuda(), first, second), gradient=on_host.gradient.cuda())
    with Rounding(chunk.size, torch.float32, torch.device("cuda")).widened(part, 3) as wide:
        for x, value in zip(wide, values, strict=True):
            x.copy_(value)
    for got, wanted in zip(part.states[1:], want, strict=True):
        assert torch.equal(got.cpu(), wanted)


def without_a_break(rank: int, world_size: int, raw: Raw, folder: Path | None, resumes: bool) -> dict[str, Tensor]:
    """Train four steps, with a checkpoint after the second if there is a folder; or resume from it."""
    engine, batches = engine_of(rank, world_size, raw), batches_of(4, batch=24)
    if resumes:
        assert folder is not None
        checkpoint.load(folder / "two", engine.state_pieces())
        engine.restore(checkpoint.read_metadata(folder / "two")["counters"])
    for step in range(2 if resumes else 0, 4):
        engine.train_step(share_of(batches[step], engine))
        if step == 1 and folder is not None:
            pieces = engine.state_pieces(owned=True)
            assert {p.data.dtype for p in pieces if "/" in p.name and "exp_avg" in p.name} == {torch.bfloat16}
            meta = dict(counters=engine.counters())
            checkpoint.save(folder / "two", pieces, metadata=meta, axis=engine.mesh.world, keep=9)
    return everything(engine)


@pytest.mark.gpu
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    raw = narrow(raw_of("dp2-1d2", "cuda", 3, precision="bf16"))
    want = run(without_a_break, 4, raw, tmp_path, False)[0]
    for policy, stage in (("cpu", 3), ("cuda", 2)):
        other = narrow(raw_of("dp2-1d2", policy, stage, precision="bf16"))
        got = run(without_a_break, 4, other, tmp_path, True)[0]
        assert_bits(got, want)


def test_another_layout_and_other_moments_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    want = run(without_a_break, 4, narrow(raw_of("dp2-1d2", "cuda", 2)), tmp_path, False)[0]
    got = run(without_a_break, 1, narrow(raw_of("single", "cuda", 0)), tmp_path, True)[0]
    for name in want:
        if not name.endswith("k_proj.bias"):  # whose gradient is rounding noise
            assert (got[name] - want[name]).norm() <= 1e-9 * want[name].norm(), name
    wide = narrow(raw_of("single", "cuda", 0), "fp32")
    cast, never = (
        run(without_a_break, 1, wide, tmp_path if resumes else None, resumes)[0] for resumes in (True, False)
    )
    for name in never:
        if name.startswith("0/") and not name.endswith("k_proj.bias"):
            assert 0 < (cast[name] - never[name]).norm() <= 2e-2 * never[name].norm(), name


def bytes_held(rank: int, world_size: int, raw: Raw) -> tuple[int, int]:
    engine = engine_of(rank, world_size, raw)
    assert isinstance(engine.optimizer, AdamW)
    return sum(map(engine.optimizer.state_bytes, engine.chunks)), sum(len(chunk.master) for chunk in engine.chunks)


@pytest.mark.parametrize(("precision", "own"), [("bf16", 8), ("fp32", 4), ("fp64", 4)])
def test_the_preview_counts_four_bytes_of_moments(precision: str, own: int) -> None:
    """A weight in the dtype of master weights is its own master weight, and is counted as a weight."""
    raw = narrow(config_of({}, precision=precision, model=SHAPE))
    stage = preview_of(parse(raw, world_size=1, resolve=resolve), 1).parts[0]
    assert stage.optimizer_bytes == own * stage.parameters
    held, count = run(bytes_held, 1, raw)[0]
    assert held == (12 if precision == "fp64" else 8) * count


# -- any module --------------------------------------------------------------------------------------------------------


def module_state(rank: int, world_size: int, raw: Raw, model: str, folder: Path | None) -> dict[str, Tensor]:
    """Return the weights and moments after four steps; with a folder, another engine resumes after the second."""
    engine, _ = module_engine(rank, world_size, raw, MODELS[model]())
    train_module(engine, 0, 2)
    if folder is not None:
        engine.save_checkpoint(folder)
        engine, _ = module_engine(rank, world_size, raw, MODELS[model]())
        engine.load_checkpoint(folder)
    train_module(engine, 2, 4)
    assert isinstance(engine.optimizer, AdamW)
    trained: Any = [chunk for chunk in engine.chunks if not chunk.is_frozen]
    found: dict[str, Tensor] = {}
    for chunk in trained:
        chunk.settle()  # the host may still be updating it
    for kind in range(3):
        for chunk in trained:
            for piece in chunk.spec.pieces((chunk.master, *engine.optimizer.moments.of(chunk))[kind]):
                found[f"{kind}/{piece.name}{piece.box}"] = piece.data.clone()
    return found


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        pytest.param("opt", "bf16", marks=pytest.mark.gpu),
        *(pytest.param("plain", precision, marks=pytest.mark.slow) for precision in ("fp64", "bf16")),
    ],
)
def test_narrow_moments_of_a_module_are_the_same_wherever_they_are(model: str, precision: str, tmp_path: Path) -> None:
    """They are the same bit for bit, also through a checkpoint. Without any gradient a second moment is zero."""
    for stage in (0, 3):
        raw = narrow(module_config(stage, precision=precision))
        want = run(module_state, 2, raw, model, None)
        there = raw | dict(zero=dict(stage=stage, tensor_placement_policy="cpu"))
        for other, folder in ((there, None), (raw, tmp_path / f"{stage}"), (there, tmp_path / f"{stage} on the host")):
            for got, wanted in zip(run(module_state, 2, other, model, folder), want, strict=True):
                assert_bits(got, wanted)
        never = [x for found in want for name, x in found.items() if name.startswith("2/") and ".never" in name]
        assert bool(never) == (model == "plain")
        assert not any(x.any() for x in never)


def module_trace(rank: int, world_size: int, raw: Raw) -> tuple[dict[str, Tensor], set[torch.dtype]]:
    engine, _ = module_engine(rank, world_size, raw, MODELS["plain"]())
    train_module(engine, 0, 3)
    assert isinstance(engine.optimizer, AdamW)
    kinds = {x.dtype for _, x in engine.optimizer.moments.held()}
    return whole(engine, [chunk.master for chunk in engine.chunks]), kinds


def test_the_moments_of_a_module_are_the_same_on_any_number_of_ranks() -> None:
    """The run is in fp64: see `test_one_seed_gives_one_model_in_every_layout`."""
    want, kinds = run(module_trace, 1, narrow(module_config(0)))[0]
    assert kinds == {torch.bfloat16}
    for ranks, stage in ((2, 0), (3, 2), (2, 3)):
        got, _ = run(module_trace, ranks, narrow(module_config(stage)))[0]
        for name in want:
            assert (got[name] - want[name]).norm() <= 1e-9 * want[name].norm(), name
