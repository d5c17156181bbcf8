"""The gradient of a weight can be computed later than that of the input, whatever collectives surround the matmul."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.config import PipelineConfig
from parallel.config.parallel import TensorConfig
from parallel.engine import planned_passes
from parallel.errors import ConfigError
from parallel.mesh.mesh import ALONE, Axis, Mesh
from parallel.ops.deferred import DeferredCalls
from parallel.ops.products import product_of
from parallel.ops.receiver import GradientReceiver
from parallel.pipeline.schedule import SCHEDULES
from parallel.pipeline.transfers import with_transfers
from parallel.plan.plan import Action, Op, Plan
from parallel.tensor.matmul import LinearCollectives, matmul
from tests.accounts import UNSPLIT, Allocations, RecordedCalls, mesh_of
from tests.harness import run
from tests.parity import (
    SHAPE,
    Batch,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    engine_of,
    padded,
    reference,
    relative,
    save_model,
    share_of,
    train,
)
from tests.patience import LIMIT
from training import preflight

BOUND = 1e-13  # relative, in fp64: sums of at most 24 terms
RANKS = 4  # two rows of two columns
B, S, K, N = 4, 6, 8, 3  # of a rank's whole x and y

Along: TypeAlias = tuple[int, str]
"""A dim, and the name of an axis."""


@dataclass(frozen=True)
class Case:
    """The collectives of a matmul by the names of their axes, None where there are none: see LinearCollectives."""

    gather_x: Along | None = None
    gather_w: str | None = None
    scatter_y: Along | None = None
    copy_x: str | None = None
    reduce_y: str | None = None

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value) or "alone"

    def collectives(self, mesh: Mesh) -> LinearCollectives:
        def axis(name: str | None) -> Axis:
            return mesh.axis(name) if name else ALONE

        gather_x, scatter_y = (
            (along[0], axis(along[1])) if along else (0, ALONE) for along in (self.gather_x, self.scatter_y)
        )
        return LinearCollectives(gather_x, axis(self.gather_w), scatter_y, axis(self.copy_x), axis(self.reduce_y))


WAYS_IN: list[dict[str, Along | str]] = [
    {},
    dict(gather_x=(-1, "col")),  # a grid's
    dict(gather_x=(0, "col")),  # a cube's
    dict(gather_x=(1, "col")),  # a line's, with the sequence split
    dict(copy_x="col"),  # a line's
]
WAYS_OUT: list[dict[str, Along | str]] = [
    {},
    dict(scatter_y=(0, "row")),  # a cube's
    dict(scatter_y=(1, "col")),  # a line's, with the sequence split
    dict(reduce_y="col"),  # a line's
]
WEIGHTS: list[dict[str, str]] = [{}, dict(gather_w="row"), dict(gather_w="col")]
CASES = [Case(**a, **b, **c) for a, b, c in product(WAYS_IN, WEIGHTS, WAYS_OUT)]  # type: ignore[arg-type]

# -- the reference: all ranks in one process, and torch's autograd


def peers(rank: int, axis: str | None) -> list[int]:
    """Return the ranks that differ from this one only along this axis, in order; ranks are numbered row by row."""
    if axis is None:
        return [rank]
    row, col = divmod(rank, 2)
    return [2 * i + col if axis == "row" else 2 * row + i for i in range(2)]


def first_peer(rank: int, axis: str | None) -> int:
    return peers(rank, axis)[0]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(case: Case, rank: int, sizes: tuple[int, int, int, int] = (B, S, K, N)) -> tuple[Tensor, Tensor, Tensor]:
    """Return a rank's own x, W and dy. Ranks that have the same x or the same dy draw it with one seed."""
    B, S, K, N = sizes
    size = [B, S, K]
    if case.gather_x:
        size[case.gather_x[0]] //= 2
    out = [B, S, N]
    if case.scatter_y:
        out[case.scatter_y[0]] //= 2
    x = drawn(*size, seed=first_peer(rank, case.copy_x))
    w = drawn(N, K // (2 if case.gather_w else 1), seed=10 + rank)
    return x, w, drawn(*out, seed=20 + first_peer(rank, case.reduce_y))


def exact(case: Case, rounded: Callable[[Tensor, str], Tensor] = lambda x, name: x) -> list[tuple[Tensor, Tensor]]:
    """Return dx and dW of every rank: autograd's, of the sum over all ranks of y · dy, where a y that several ranks
    have counts once. `rounded` rounds x, w and dy, which it is given by name.
    """
    names = ("x", "w", "dy")
    own = [[rounded(x, name) for x, name in zip(inputs(case, rank), names, strict=True)] for rank in range(RANKS)]
    xs = [own[first_peer(rank, case.copy_x)][0].requires_grad_() for rank in range(RANKS)]
    ws = [w.requires_grad_() for _, w, _ in own]
    dim, axis = case.gather_x or (0, None)
    whole_x = [torch.cat([xs[peer] for peer in peers(rank, axis)], dim) for rank in range(RANKS)]
    whole_w = [torch.cat([ws[peer] for peer in peers(rank, case.gather_w)], -1) for rank in range(RANKS)]
    partial = [F.linear(x, w) for x, w in zip(whole_x, whole_w, strict=True)]
    dim, axis = case.scatter_y or (0, None)
    total = torch.zeros((), dtype=torch.float64)
    for rank, (_, _, dy) in enumerate(own):
        y = torch.stack([partial[peer] for peer in peers(rank, axis)]).sum(0)
        y = y.chunk(len(peers(rank, axis)), dim)[peers(rank, axis).index(rank)]
        if case.reduce_y:
            y = torch.stack([partial[peer] for peer in peers(rank, case.reduce_y)]).sum(0)
        if rank == first_peer(rank, case.reduce_y):
            total = total + (y * dy).sum()
    total.backward()
    return [(_gradient(x), _gradient(w)) for x, w in zip(xs, ws, strict=True)]


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# -- ours

Calls: TypeAlias = list[tuple[str, int]]
"""The kind and the number of elements of each call."""


@dataclass(frozen=True)
class Halves:
    """The gradients of one rank, and what was called for them."""

    dx: Tensor
    dw: Tensor
    left_to_autograd: Tensor
    """The weight's gradient of a matmul without a receiver."""

    before_w: int
    """The number of gradients of the weight that there were after I, with the receiver or with autograd."""

    in_i: Calls
    in_w: Calls
    in_b: Calls
    """The calls of a whole backward."""


def received(found: list[Tensor], deferred: DeferredCalls) -> GradientReceiver:
    return GradientReceiver(deferred, lambda a, b: found.append(product_of(a, b, torch.float64)), found.append)


def recorded(compute: Callable[[], object]) -> Calls:
    with RecordedCalls("") as calls:
        compute()
    return [(call.kind, call.elements) for call in calls.calls]


def halves(rank: int, world_size: int, cases: list[Case]) -> list[Halves]:
    mesh = mesh_of(rank, TensorConfig("2d", 4, rows=2), UNSPLIT, connect=True)
    found = [halves_of(case, case.collectives(mesh), rank) for case in cases]
    mesh.close()
    return found


def halves_of(case: Case, collectives: LinearCollectives, rank: int) -> Halves:
    """Compute the gradients in I and W, in B with a receiver, and in B with autograd alone."""
    x, w, dy = inputs(case, rank)
    x.requires_grad_()
    w.requires_grad_()
    deferred, found = DeferredCalls(), list[Tensor]()
    receiver = received(found, deferred)

    def in_two_parts() -> None:
        with deferred.deferring("a microbatch"):
            matmul(x, w, collectives, receiver=receiver).backward(dy)

    forward = recorded(lambda: matmul(x, w, collectives))
    in_i = recorded(in_two_parts)[len(forward) :]
    before_w, dx = len(found) + (w.grad is not None), _gradient(x)
    in_w = recorded(lambda: deferred.run_deferred("a microbatch"))
    assert len(found) == 1
    x.grad = None
    in_b = recorded(lambda: matmul(x, w, collectives, receiver=receiver).backward(dy))[len(forward) :]
    assert w.grad is None
    assert torch.equal(dx, _gradient(x))
    split, whole = found
    assert torch.equal(split, whole)
    matmul(x, w, collectives).backward(dy)
    return Halves(dx, split, _gradient(w), before_w, in_i, in_w, in_b)


@cache
def all_halves() -> list[list[Halves]]:
    """Return what every rank has of every case. The ranks are started once."""
    return run(halves, RANKS, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_in_i_and_weights_in_w_have_the_gradients_of_one_process(case: Case) -> None:
    for rank, (found, wanted) in enumerate(zip(all_halves(), exact(case), strict=True)):
        mine = found[CASES.index(case)]
        assert mine.before_w == 0
        for got, want in ((mine.dx, wanted[0]), (mine.dw, wanted[1]), (mine.left_to_autograd, wanted[1])):
            assert relative(got, want) < BOUND, f"rank {rank}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_i_sends_what_dx_needs_w_what_dw_needs_and_b_gathers_dy_once(case: Case) -> None:
    x, w, dy = (tensor.numel() for tensor in inputs(case, 0))
    whole_x, whole_w = x * (2 if case.gather_x else 1), w * (2 if case.gather_w else 1)
    gathered_dy = [("all_gather", dy)] if case.scatter_y else []
    gathered_w, scattered_dw = (
        [(kind, size)] if case.gather_w else [] for kind, size in (("all_gather", w), ("reduce_scatter", whole_w))
    )
    gathered_x = [("all_gather", x)] if case.gather_x else []
    summed_dx = [("reduce_scatter", whole_x)] if case.gather_x else [("all_reduce", x)] if case.copy_x else []
    for ranks in all_halves():
        mine = ranks[CASES.index(case)]
        assert sorted(mine.in_i) == sorted(gathered_dy + gathered_w + summed_dx)
        assert sorted(mine.in_w) == sorted(gathered_dy + gathered_x + scattered_dw)
        assert sorted(mine.in_b) == sorted(gathered_dy + gathered_w + gathered_x + summed_dx + scattered_dw)


# -- what is kept between the two


KEPT = [
    Case(gather_x=(-1, "col"), gather_w="row"),
    Case(gather_x=(0, "col"), gather_w="row", scatter_y=(0, "row")),
    Case(gather_x=(1, "col")),
    Case(scatter_y=(1, "col")),
]


def bytes_kept(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return for each case the bytes that are held between I and W, and those of the rank's own x, dy and dx."""
    mesh = mesh_of(rank, TensorConfig("2d", 4, rows=2), UNSPLIT, connect=True)
    found = [bytes_kept_of(case, case.collectives(mesh), rank) for case in KEPT]
    mesh.close()
    return found


def bytes_kept_of(case: Case, collectives: LinearCollectives, rank: int) -> tuple[int, int]:
    existing, w, given = inputs(case, rank)
    w.requires_grad_()
    deferred = DeferredCalls()
    receiver = received([], deferred)
    held = Allocations()
    with held:
        x, dy = existing.clone().requires_grad_(), given.clone()
        with deferred.deferring(0):
            matmul(x, w, collectives, receiver=receiver).backward(dy)
        dx = _gradient(x)
        known = x.nbytes + dy.nbytes + dx.nbytes
        del x, dy
    now = held.wait_for(known)
    deferred.run_deferred(0)
    return now, known


def test_a_rank_keeps_its_own_parts_between_i_and_w_and_nothing_gathered() -> None:
    for ranks in run(bytes_kept, RANKS):
        for now, known in ranks:
            assert now == known


# -- a whole training step

MODEL: Raw = SHAPE | dict(num_hidden_layers=2)
LAYOUTS: dict[str, tuple[int, Raw]] = {  # name: world size, parallel section
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "1d2-sp": (2, dict(tensor=dict(mode="1d", size=2, sequence_parallel=True))),
    "2d2x2-overlap": (4, dict(tensor=dict(mode="2d", size=4, overlap=True))),
    "2d2x2": (4, dict(tensor=dict(mode="2d", size=4))),
    "2d1x2-zero2": (4, dict(tensor=dict(mode="2d", size=2, rows=1))),
    "2.5d-depth2": (4, dict(tensor=dict(mode="2.5d", size=4, depth=2, rows=2))),
    "3d2x2x2": (8, dict(tensor=dict(mode="3d", size=8))),
    "pp2-2d2x2": (8, dict(pipeline=2, tensor=dict(mode="2d", size=4))),
}
FAST = ("2d2x2",)


def all_weights_last(pipeline: PipelineConfig, num_microbatches: int, *, recomputes: bool) -> Plan:
    """Return a plan in which each W comes after everything else of its rank, the last microbatch first."""
    plan = SCHEDULES[pipeline.schedule](pipeline.size, num_microbatches, pipeline.num_chunks)
    ranks = []
    for actions in plan.ranks:
        backwards = [action for action in actions if action.op is Op.B]
        inputs = [Action(Op.I, a.stage, a.microbatch) if a.op is Op.B else a for a in actions]
        ranks.append((*inputs, *(Action(Op.W, a.stage, a.microbatch) for a in reversed(backwards))))
    return with_transfers(Plan(tuple(ranks), plan.num_stages, plan.num_microbatches))


def train_in_two_parts(rank: int, world_size: int, raw: Raw, batches: list[Batch]) -> Trace | None:
    with patch.object(planned_passes, "plan_of", all_weights_last):
        return train(rank, world_size, raw, batches)


@pytest.mark.parametrize(
    "layout", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_steps_whose_weight_gradients_all_come_last_equal_hugging_face(tmp_path: Path, layout: str) -> None:
    """The bound is that of tests/test_gradient_rules.py: 1e-9 in fp64."""
    world_size, parallel = LAYOUTS[layout]
    path, batches = save_model(tmp_path / "model", **MODEL), padded(batches_of(2))
    sections: Raw = dict(zero=dict(stage=2)) if "zero2" in layout else {}
    micro = 2 if "zero2" in layout else 4
    raw = config_of(parallel, steps=2, model=dict(path=str(path)), train=dict(micro_batch_size=micro), **sections)
    found = run(train_in_two_parts, world_size, raw, batches)[0]
    assert found is not None
    compare(found, reference(path, raw, batches), 1e-9, is_fp64=True)


def gradients_in_w(rank: int, world_size: int, raw: Raw) -> list[int]:
    """Return how many gradients of weights each W of a step computes."""
    trained = engine_of(rank, world_size, raw)
    deferred, found = trained.gradients.deferred, list[int]()

    def run_deferred(key: Hashable) -> None:
        before = sum(total.missing or 0 for total in trained.gradients._sums)
        DeferredCalls.run_deferred(deferred, key)
        found.append(before - sum(total.missing or 0 for total in trained.gradients._sums))

    with patch.object(deferred, "run_deferred", run_deferred):
        trained.train_step(share_of(batches_of(1)[0], trained))
    trained.mesh.close()
    return found


@pytest.mark.slow
@pytest.mark.timeout(2 * 1800)
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tensor", [{}, dict(mode="2d", size=2, rows=2)], ids=["none", "2d2x1"])
def test_a_compiled_block_leaves_the_gradients_of_its_weights_to_w(tensor: Raw, compiles: bool) -> None:
    """The second stage has one block of four linears, and its backwards are I and W. Compiled code that computed the
    four gradients in I would leave nothing to W. (The last W completes the chunk, which counts anew.)
    """
    skip_without_compiler()
    parallel = dict(pipeline=dict(size=2, layers=[1, 1]), tensor=tensor)
    raw = config_of(parallel, steps=1, model=MODEL, train=dict(compile=compiles))
    *_, last = run(gradients_in_w, 2 * tensor.get("size", 1), raw, timeout=3 * LIMIT)
    assert last[:2] == [4, 4]


def skip_without_compiler() -> None:
    try:
        preflight.check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
