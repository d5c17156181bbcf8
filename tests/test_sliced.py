"""A matmul in slices equals one without them, sends as many bytes, and keeps less of what it gathers."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.config.parallel import TensorConfig
from parallel.ops.deferred import DeferredCalls
from parallel.ops.products import product_of
from parallel.ops.receiver import GradientReceiver
from parallel.tensor import sliced
from parallel.tensor.matmul import LinearCollectives, matmul
from parallel.tensor.sliced import Along, in_slices
from tests.accounts import UNSPLIT, Allocations, mesh_of
from tests.harness import run
from tests.parity import SHAPE, Batch, Raw, Trace, batches_of, compare, config_of, relative, train
from tests.test_weight_gradients import CASES, RANKS, Calls, Case, drawn, inputs, recorded

BOUND = 1e-13  # relative, in fp64: the same terms, added by products of other shapes

Results = dict[str, Tensor]


@contextmanager
def slices_of(least: int, number: int = 3) -> Iterator[None]:
    """A context on a rank in which a matmul has up to this number of slices, of so many tokens, rows or columns."""
    before = sliced.NUM_SLICES, sliced.LEAST
    sliced.NUM_SLICES, sliced.LEAST = number, least
    yield
    sliced.NUM_SLICES, sliced.LEAST = before


def results_of(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor, collectives: LinearCollectives) -> Results:
    """Return y and its gradients: of a backward that leaves them to autograd, and of one in two parts."""
    x, w, bias = (tensor.detach().requires_grad_() for tensor in (x, w, bias))
    y = matmul(x, w, collectives, bias)
    y.backward(dy)
    found = dict(y=y.detach(), dx=x.grad, dw=w.grad, db=bias.grad)
    deferred, received = DeferredCalls(), list[Tensor]()
    receiver = GradientReceiver(
        deferred, lambda a, b: received.append(product_of(a, b, torch.float64)), received.append
    )
    x.grad = None
    with deferred.deferring(0):
        matmul(x, w, collectives, receiver=receiver).backward(dy)
    deferred.run_deferred(0)
    found |= dict(dx_of_i=x.grad, dw_of_w=received[0])
    return {name: tensor for name, tensor in found.items() if tensor is not None}


OF_MODES = [
    Case(copy_x="col"),  # 1d, into a block
    Case(reduce_y="col"),  # 1d, out of a block
    Case(gather_x=(1, "col")),  # with the sequence split
    Case(scatter_y=(1, "col")),
    Case(gather_x=(-1, "col"), gather_w="row"),  # a grid
    Case(gather_x=(-1, "col")),  # of one row
    Case(gather_w="row"),  # of one column
    Case(gather_x=(0, "col"), gather_w="row", scatter_y=(0, "col")),  # nearly a cube
    Case(),
]
OTHERS = [case for case in CASES if case not in OF_MODES]
EACH = [*OF_MODES, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]


@dataclass(frozen=True)
class Compared:
    """The results of one rank with slices and without, and the calls."""

    errors: dict[str, float]
    sliced: Calls
    whole: Calls


def compared(rank: int, world_size: int, cases: list[Case]) -> list[Compared]:
    mesh = mesh_of(rank, TensorConfig("2d", 4, rows=2), UNSPLIT, connect=True)
    with slices_of(least=1):
        found = [compared_case(case, case.collectives(mesh), rank) for case in cases]
    mesh.close()
    return found


def compared_case(case: Case, collectives: LinearCollectives, rank: int) -> Compared:
    x, w, dy = inputs(case, rank)
    (whole, calls), (parts, more) = (
        results_and_calls(x, w, dy, around) for around in (collectives, in_slices(collectives))
    )
    assert whole.keys() == parts.keys()
    return Compared({name: relative(parts[name], whole[name]) for name in whole}, more, calls)


def results_and_calls(x: Tensor, w: Tensor, dy: Tensor, collectives: LinearCollectives) -> tuple[Results, Calls]:
    found: Results = {}
    calls = recorded(lambda: found.update(results_of(x, w, drawn(len(w), seed=30), dy, collectives)))
    return found, calls


@cache
def all_compared(*, slow: bool) -> list[list[Compared]]:
    """Return what every rank has of every case. The ranks are started once, or twice with the slow ones."""
    return run(compared, RANKS, OTHERS if slow else OF_MODES)


def on_all_ranks(case: Case) -> list[Compared]:
    cases = OTHERS if case in OTHERS else OF_MODES
    return [found[cases.index(case)] for found in all_compared(slow=cases is OTHERS)]


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_matmul_in_slices_and_its_gradients_equal_one_without(case: Case) -> None:
    for found in on_all_ranks(case):
        assert {name: error for name, error in found.errors.items() if error > BOUND} == {}


@pytest.mark.parametrize("case", EACH, ids=str)
def test_slices_send_as_many_elements_in_more_calls(case: Case) -> None:
    for found in on_all_ranks(case):
        assert elements(found.sliced) == elements(found.whole)
        assert (len(found.sliced) > len(found.whole)) == (case != Case())


def elements(calls: Calls) -> Counter[str]:
    """Return the number of elements that each kind of call is given."""
    found: Counter[str] = Counter()
    for kind, count in calls:
        found[kind] += count
    return found


# -- sizes drawn at random


def drawn_errors(rank: int, world_size: int, num_draws: int) -> dict[str, float]:
    """Return the errors that exceed the bound: of matmuls of random sizes and slices on two rows and three columns."""
    mesh = mesh_of(rank, TensorConfig("2d", 6, rows=2), UNSPLIT, connect=True)
    random, found = Random(0), dict[str, float]()
    for draw in range(num_draws):
        case = random.choice(CASES)
        around = case.collectives(mesh)
        splits_samples = any(dim == 0 and axis.size > 1 for dim, axis in (around.gather_x, around.scatter_y))
        samples = random.choice([6, 12]) if splits_samples else random.randint(1, 4)
        positions, k, n = 6 * random.randint(1, 7), 6 * random.randint(1, 7), random.randint(1, 20)
        shapes = [split((samples, positions, k), around.gather_x), (n, k // around.gather_w.size), (n,)]
        shapes.append(split((samples, positions, n), around.scatter_y))
        x, w, bias, dy = (drawn(*shape, seed=4 * (6 * draw + rank) + i) for i, shape in enumerate(shapes))
        whole = results_of(x, w, bias, dy, around)
        with slices_of(random.randint(1, 9), random.randint(2, 7)):
            parts = results_of(x, w, bias, dy, in_slices(around))
        errors = {f"{case} of {shapes}: {name}": relative(parts[name], whole[name]) for name in whole}
        found |= {name: error for name, error in errors.items() if not error <= BOUND}
    mesh.close()
    return found


def split(shape: tuple[int, ...], along: Along) -> tuple[int, ...]:
    """Return the shape of a rank's part."""
    sizes, (dim, axis) = list(shape), along
    sizes[dim] //= axis.size
    return tuple(sizes)


@pytest.mark.slow
def test_matmuls_of_drawn_sizes_in_drawn_slices_equal_those_without() -> None:
    assert run(drawn_errors, 6, 150) == [{}] * 6


# -- rounding and memory


@dataclass(frozen=True)
class Costs:
    """The rounding errors and the memory of a matmul on one rank, with slices and without."""

    errors: tuple[dict[str, float], dict[str, float]]
    """Relative errors in bf16, beside fp64 without slices."""

    forward: tuple[int, int]
    """The most bytes that it holds beside its arguments."""

    backward: tuple[int, int]


def costs(rank: int, world_size: int) -> list[Costs]:
    mesh = mesh_of(rank, TensorConfig("2d", 4, rows=2), UNSPLIT, connect=True)
    with slices_of(least=1, number=4):
        found = [costs_of(case, case.collectives(mesh), rank) for case in OF_MODES]
    mesh.close()
    return found


def costs_of(case: Case, collectives: LinearCollectives, rank: int) -> Costs:
    x, w, dy = (tensor.bfloat16() for tensor in inputs(case, rank, sizes=(2, 24, 48, 40)))
    bias, both = drawn(len(w), seed=30).bfloat16(), (in_slices(collectives), collectives)
    exact = results_of(x.double(), w.double(), bias.double(), dy.double(), collectives)
    narrow = [results_of(x, w, bias, dy, around) for around in both]
    errors = [{name: relative(found[name], exact[name]) for name in exact} for found in narrow]
    # A thread of gloo may free its tensors late, in some of the repetitions.
    peaks = [[min(found) for found in zip(*(peaks_of(x, w, dy, c) for _ in range(3)), strict=True)] for c in both]
    return Costs((errors[0], errors[1]), (peaks[0][0], peaks[1][0]), (peaks[0][1], peaks[1][1]))


def peaks_of(x: Tensor, w: Tensor, dy: Tensor, collectives: LinearCollectives) -> tuple[int, int]:
    """Return the most bytes that a forward and a backward allocate."""
    x, w = (tensor.detach().requires_grad_() for tensor in (x, w))
    forward, backward = Allocations(), Allocations()
    with forward:
        y = matmul(x, w, collectives)
    with backward:
        y.backward(dy)
    return forward.peak, backward.peak


@cache
def all_costs() -> list[list[Costs]]:
    """Return the costs of each of `OF_MODES` on every rank. The ranks are started once."""
    return run(costs, RANKS)


def test_slices_round_no_more_than_a_matmul_without() -> None:
    """No element is a sum over slices. So in bf16 the error is that of one product, but for the order of its sum."""
    for ranks in all_costs():
        for case, found in zip(OF_MODES, ranks, strict=True):
            sliced, whole = found.errors
            assert {name: error for name, error in sliced.items() if error > 1.1 * whole[name]} == {}, case


def test_slices_take_no_more_memory_than_what_is_gathered_whole() -> None:
    """A backward that gathers dy for two products is the exception: it holds all of dy, and two slices of four more."""
    for ranks in all_costs():
        for case, found in zip(OF_MODES, ranks, strict=True):
            more = 2 * 24 * 40 * 2 // 2 if case.scatter_y else 0
            assert found.forward[0] <= found.forward[1], case
            assert found.backward[0] <= found.backward[1] + more, case
        grid = ranks[OF_MODES.index(Case(gather_x=(-1, "col"), gather_w="row"))]
        assert grid.forward[0] < 0.75 * grid.forward[1]
        assert grid.backward[0] < 0.75 * grid.backward[1]


# -- whole models


LAYOUTS: dict[str, tuple[int, Raw]] = {
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "1d2-sequence": (2, dict(tensor=dict(mode="1d", size=2, sequence_parallel=True))),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4))),
}
MORE: dict[str, tuple[int, Raw]] = {
    "2d2x3": (6, dict(tensor=dict(mode="2d", size=6, rows=2))),
    "2.5d4-depth2": (4, dict(tensor=dict(mode="2.5d", size=4, depth=2, rows=2))),
    "3d8": (8, dict(tensor=dict(mode="3d", size=8))),
    "1d3-sequence": (3, dict(tensor=dict(mode="1d", size=3, sequence_parallel=True))),
    "pp2-1d2": (4, dict(pipeline=2, tensor=dict(mode="1d", size=2))),
    "pp2-1d2-sequence": (4, dict(pipeline=2, tensor=dict(mode="1d", size=2, sequence_parallel=True))),
    "pp2-2d4": (8, dict(pipeline=2, tensor=dict(mode="2d", size=4))),
}


def train_in_slices(rank: int, world_size: int, raw: Raw, batches: list[Batch]) -> Trace | None:
    with slices_of(least=1):
        return train(rank, world_size, raw, batches)


def overlapping(parallel: Raw, **train: Any) -> Raw:
    """Return a config of a model with dropout, whose linears overlap."""
    tensor = parallel.get("tensor", {})
    return config_of(
        parallel | dict(tensor=tensor | dict(overlap=bool(tensor))),
        steps=2,
        model=SHAPE | dict(name="opt-tiny", num_hidden_layers=2, dropout=0.25),
        train=train,
        optimizer=dict(eps=1e-3),  # with 1e-8 an element whose exact gradient is zero would move by a whole step
    )


@cache
def of_one_process() -> Trace:
    trace = run(train, 1, overlapping({}), batches_of(2))[0]
    assert trace is not None
    return trace


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_model_whose_linears_overlap_trains_as_in_one_process(layout: str) -> None:
    world_size, parallel = (LAYOUTS | MORE)[layout]
    trace = run(train_in_slices, world_size, overlapping(parallel), batches_of(2))[0]
    assert trace is not None
    compare(trace, of_one_process(), 1e-12, is_fp64=False)  # which leaves the bias of k out: its gradient is noise
