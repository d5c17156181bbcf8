"""A matmul in 8 bits multiplies the same 8-bit numbers in every layout, and its backward keeps and sends 8 bits."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.activations.recompute import Recomputed
from parallel.config.parallel import TensorConfig
from parallel.layout.layout import Layout
from parallel.ops import fp8
from parallel.ops.deferred import DeferredCalls
from parallel.ops.fp8 import E4M3, E5M2, LARGEST, Scaled, scale_for, scaled_product
from parallel.ops.kernels.cast import EightBits, cast_and_transpose, transposed
from parallel.ops.kernels.table import has_triton
from parallel.ops.placeholder import placeholder_like
from parallel.ops.products import add_product
from parallel.tensor import fp8_matmul as fp8_matmul_module
from parallel.tensor.fp8_matmul import CastInput, EightBitLinear, fp8_matmul
from parallel.tensor.layers import Linear
from parallel.tensor.matmul import LinearCollectives, matmul
from parallel.tensor.scaling import LinearScales, ScalingState, TensorScale
from tests.accounts import UNSPLIT, Allocations, mesh_of
from tests.harness import run
from tests.parity import relative
from tests.test_sliced import EACH, OF_MODES, OTHERS
from tests.test_weight_gradients import RANKS, Case, drawn, exact, inputs, received

BOUND = 1e-13  # relative, in fp64: products of the same 8-bit numbers, added in another order
POWERS = {"x": 6, "w": 5, "dy": 10}  # of the scales: the values are of a standard normal distribution
DTYPES = {"x": E4M3, "w": E4M3, "dy": E5M2}


def scale_of(power: int, device: str) -> TensorScale:
    scale = torch.tensor(2.0**power, device=device)
    return TensorScale(scale, 1 / scale, torch.zeros((), device=device))


def scales(*, is_known: bool = True, records: bool = True, device: str = "cpu") -> LinearScales:
    x, w, dy = (scale_of(power, device) for power in POWERS.values())
    return LinearScales(x, w, dy, ScalingState(is_known, records))


def rounded(x: Tensor, name: str) -> Tensor:
    """Return what an 8-bit x holds. Nothing is too large here."""
    factor = 2.0 ** POWERS[name]
    assert x.abs().max() * factor < LARGEST[DTYPES[name]]
    return (x.float() * factor).to(DTYPES[name]).double() / factor


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# -- scales and casts


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_a_scale_is_the_largest_power_of_2_that_leaves_a_margin_of_2(dtype: torch.dtype) -> None:
    amax = torch.cat([torch.logspace(-30, 30, 241), torch.tensor([LARGEST[dtype], LARGEST[dtype] / 2, 1, 7, 7.001])])
    scale = scale_for(amax, dtype)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), "a power of 2"
    largest = LARGEST[dtype] / 2
    assert bool(((amax * scale <= largest) & (2 * amax * scale > largest)).all())
    assert scale_for(torch.tensor([0.0, math.inf, math.nan, -0.0]), dtype).tolist() == [1.0] * 4
    extreme = scale_for(torch.tensor([1e-45, 3e38]), dtype)
    assert bool((extreme.isfinite() & (1 / extreme).isfinite() & (extreme > 0)).all())


def test_a_cast_saturates_but_keeps_what_is_not_finite() -> None:
    x = torch.tensor([1e4, -1e9, math.inf, -math.inf, math.nan, 448, -0.0])
    found = fp8.cast(x, torch.tensor(1.0), E4M3).float().tolist()
    assert found[:2] == [448, -448]
    assert all(map(math.isnan, found[2:5]))
    assert found[5:] == [448, 0]
    assert float(fp8.cast(torch.tensor(1e30), torch.tensor(2.0**126), E4M3)) == 448
    assert fp8.largest_magnitude(x) == math.inf
    assert fp8.largest_magnitude(x[:2]) == 1e9
    assert fp8.largest_magnitude(x[:0]) == 0


@pytest.mark.parametrize("tokens", [0, 1, 16, 23])
def test_a_transpose_ends_with_zeros_up_to_a_multiple_of_16(tokens: int) -> None:
    x = torch.randn(tokens, 5)
    found = cast_and_transpose(x, torch.tensor(8.0), E4M3, sums=True)
    assert found.columns.shape == (5, tokens + -tokens % 16)
    assert torch.equal(found.columns[:, :tokens].float(), found.rows.float().T)
    assert not found.columns[:, tokens:].float().any()
    assert torch.equal(transposed(found.rows).float(), found.columns.float())
    assert found.sums is not None
    assert torch.equal(found.sums, x.sum(0))


def test_a_product_of_8_bit_numbers_is_exact_but_for_its_sum() -> None:
    a, b = drawn(7, 40, seed=0), drawn(40, 9, seed=1)
    left, right = ((x.float() * 16).to(E4M3) for x in (a, b))
    sixteenth, bias = torch.tensor(1 / 16), drawn(9, seed=2)
    found = scaled_product(Scaled(left, sixteenth), Scaled(right, sixteenth), torch.float64, bias=bias)
    assert relative(found, (left.double() / 16) @ (right.double() / 16) + bias) < BOUND


def test_products_of_many_microbatches_are_added_as_exactly_as_their_sum_is_kept() -> None:
    """A sum in fp32 of 64 products, on whatever device there is. Rounding each to bf16 is off by some 1e-3 of one."""
    device = "cuda" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) else "cpu"
    sixteenth, exact_sum = torch.tensor(1 / 16, device=device), torch.zeros(32, 48, dtype=torch.float64)
    found = torch.zeros(32, 48, device=device)
    for seed in range(64):
        a, b = ((drawn(n, 16, seed=seed + n) * 16).to(x) for n, x in ((32, E5M2), (48, E4M3)))
        add_product(Scaled(a.to(device), sixteenth), Scaled(b.to(device).T, sixteenth), found)
        exact_sum += (a.double() / 16) @ (b.double() / 16).T
    assert relative(found.cpu(), exact_sum) < 1e-6


# -- every combination of collectives


@dataclass(frozen=True)
class Gradients:
    """The gradients of a rank: dx and dW of a backward, of one in two parts, and of a recomputation."""

    both: list[tuple[Tensor, Tensor]]
    db: Tensor


class OneLinear(nn.Module):
    """A linear of 8 bits, given its collectives by `linear`."""

    def __init__(self, linear: EightBitLinear, w: Tensor, receiver: Any) -> None:
        super().__init__()
        self.linear, self.receiver = linear, receiver
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return fp8_matmul(x, self.w, self.linear, receiver=self.receiver)


def gradients_of(case: Case, around: LinearCollectives, rank: int) -> Gradients:
    x, w, dy = (tensor.clone() for tensor in inputs(case, rank))
    linear = EightBitLinear(around, scales(), torch.float64)
    x.requires_grad_()
    w.requires_grad_()
    bias = torch.zeros(len(w), dtype=torch.float64, requires_grad=True)
    fp8_matmul(x, w, linear, bias).backward(dy)
    both, db = [(_gradient(x), _gradient(w))], _gradient(bias)
    for recomputes in (False, True):
        deferred, found = DeferredCalls(), list[Tensor]()
        module: nn.Module = OneLinear(linear, w.detach(), received(found, deferred))
        x.grad = None
        if recomputes:
            Recomputed(module)(x).backward(dy)
        else:
            with deferred.deferring(0):
                module(x).backward(dy)
            deferred.run_deferred(0)
        both.append((_gradient(x), found[0]))
    return Gradients(both, db)


def all_gradients_of(rank: int, world_size: int, cases: list[Case]) -> list[Gradients]:
    mesh = mesh_of(rank, TensorConfig("2d", 4, rows=2), UNSPLIT, connect=True)
    found = [gradients_of(case, case.collectives(mesh), rank) for case in cases]
    mesh.close()
    return found


@cache
def all_gradients(*, slow: bool) -> list[list[Gradients]]:
    return run(all_gradients_of, RANKS, OTHERS if slow else OF_MODES)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_every_layout_multiplies_the_same_8_bit_numbers(case: Case) -> None:
    """The reference rounds each tensor by itself, and multiplies in fp64 in one process, by torch's autograd."""
    cases = OTHERS if case in OTHERS else OF_MODES
    found = [ranks[cases.index(case)] for ranks in all_gradients(slow=cases is OTHERS)]
    for rank, (mine, wanted) in enumerate(zip(found, exact(case, rounded), strict=True)):
        for dx, dw in mine.both:
            assert relative(dx, wanted[0]) < BOUND, f"rank {rank}"
            assert relative(dw, wanted[1]) < BOUND, f"rank {rank}"
        assert relative(mine.db, inputs(case, rank)[2].sum((0, 1))) < BOUND, f"rank {rank}"


def test_a_plain_product_is_that_of_the_rounded_factors() -> None:
    x, w, _ = inputs(Case(), 0)
    y = fp8_matmul(x, w, EightBitLinear(LinearCollectives(), scales(), torch.float64))
    assert relative(y, F.linear(rounded(x, "x"), rounded(w, "w"))) < BOUND


# -- what is kept and sent


KEPT = [
    Case(gather_x=(-1, "col"), gather_w="row"),
    Case(gather_x=(0, "col"), gather_w="row", scatter_y=(0, "row")),
    Case(scatter_y=(1, "col")),
]


def bytes_of(rank: int, world_size: int) -> list[tuple[int, int, int, int]]:
    """Return for each case the bytes kept between I and W, and those that its gathers are given; and the elements."""
    mesh = mesh_of(rank, TensorConfig("2d", 4, rows=2), UNSPLIT, connect=True)
    found = []
    for case in KEPT:
        existing, w, given = inputs(case, rank)
        linear = EightBitLinear(case.collectives(mesh), scales(), torch.float64)
        linear.weight.is_kept = False
        deferred, held = DeferredCalls(), Allocations()
        mesh.traffic.reset()
        w.requires_grad_()
        with held:
            x, dy = existing.clone().requires_grad_(), given.clone()
            with deferred.deferring(0):
                fp8_matmul(x, w, linear, receiver=received([], deferred)).backward(dy)
            dx = _gradient(x)
            known = dx.nbytes + x.numel() + dy.numel()
            del x, dy
        found.append((held.wait_for(known), known, mesh.traffic.bytes["all_gather"], gathered(case, rank)))
        deferred.run_deferred(0)
    mesh.close()
    return found


def gathered(case: Case, rank: int) -> int:
    """Return the elements that gathers are given in a forward and a backward of inputs."""
    x, w, dy = (tensor.numel() for tensor in inputs(case, rank))
    return (x if case.gather_x else 0) + (2 * w if case.gather_w else 0) + (dy if case.scatter_y else 0)


def test_a_rank_keeps_and_gathers_one_byte_an_element() -> None:
    for ranks in run(bytes_of, RANKS):
        for now, known, sent, elements in ranks:
            assert now == known
            assert sent == elements


# -- the state of the scales


def test_without_scales_it_multiplies_in_its_dtype_and_records() -> None:
    x, w, dy = (tensor.bfloat16() for tensor in inputs(Case(), 0))
    own = scales(is_known=False)
    results = []
    for linear in (EightBitLinear(LinearCollectives(), own, torch.bfloat16), None):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = matmul(x, w, LinearCollectives()) if linear is None else fp8_matmul(x, w, linear)
        y.backward(dy)
        results.append((y, x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [float(scale.amax) for scale in (own.x, own.weight, own.dy)] == [
        float(tensor.detach().abs().amax()) for tensor in (x, w, dy)
    ]


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("records", [False, True])
def test_an_evaluation_records_nothing_and_a_step_the_largest_magnitudes(is_known: bool, records: bool) -> None:
    own = scales(is_known=is_known, records=records)
    linear = EightBitLinear(LinearCollectives(), own, torch.float64)
    x, w, dy = inputs(Case(), 0)
    for factor in (0.5, 1.0, 0.25):
        linear.weight.clear()
        given, weight = (factor * x).requires_grad_(), (factor * w).requires_grad_()
        fp8_matmul(given, weight, linear).backward(factor * dy)
    wanted = [float(tensor.abs().amax().float()) if records else 0.0 for tensor in (x, w, dy)]
    assert [float(scale.amax) for scale in (own.x, own.weight, own.dy)] == wanted


def test_what_is_not_finite_is_recorded_as_infinity_and_reaches_the_product() -> None:
    own = scales()
    x, w, _ = inputs(Case(), 0)
    x[0, 0, 0] = math.nan
    y = fp8_matmul(x, w, EightBitLinear(LinearCollectives(), own, torch.float64))
    assert own.x.amax == math.inf
    assert bool(y[0, 0].isnan().all())


def test_a_weight_is_cast_once_until_its_copy_is_cleared() -> None:
    linear = EightBitLinear(LinearCollectives(), scales(), torch.float64)
    x, w, dy = inputs(Case(), 0)
    w.requires_grad_()

    def y_and_dx() -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        y = fp8_matmul(given, w, linear)
        y.backward(dy)
        return y.detach(), _gradient(given)

    before = y_and_dx()
    with torch.no_grad():
        w.mul_(2)
    assert all(map(torch.equal, y_and_dx(), before))
    linear.weight.clear()
    assert all(torch.equal(found, 2 * was) for found, was in zip(y_and_dx(), before, strict=True))
    linear.weight.clear()
    linear.weight.is_kept = False
    for factor in (4, 2):
        with torch.no_grad():
            w.mul_(2 if factor == 4 else 0.5)
        assert all(torch.equal(found, factor * was) for found, was in zip(y_and_dx(), before, strict=True))


def test_an_evaluation_does_not_transpose_weights() -> None:
    linear = EightBitLinear(LinearCollectives(), scales(), torch.float64)
    x, w, _ = inputs(Case(), 0)
    w.requires_grad_()
    with torch.no_grad(), patch.object(fp8_matmul_module, "cast_and_transpose") as both:
        y = fp8_matmul(x, w, linear)
    assert not both.called
    assert torch.equal(fp8_matmul(x, w, linear), y)


class _DoubleIn8Bits(torch.autograd.Function):
    """Doubles x and casts it, as a norm in 8 bits would: two outputs, of which the first has the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: EightBits) -> tuple[Tensor, Tensor]:
        data = fp8.cast(2 * x, form.scale, E4M3)
        ctx.mark_non_differentiable(data)
        return placeholder_like(x), data

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, None]:
        return 2 * dy, None


class DoubledLinear(nn.Module):
    """A linear of 2x, which is cast by the linear or, if `is_joint`, by what doubles it."""

    def __init__(self, w: Tensor, *, is_joint: bool) -> None:
        super().__init__()
        self.linear = Linear(LinearCollectives(), Layout(tuple(w.shape), ((), ()), (), ()), None, w)
        self.linear.weight.data.copy_(w)
        self.is_joint = is_joint
        assert self.linear.input_form is None
        self.linear.multiply_in_8_bits(scales())

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_joint:
            return cast(Tensor, self.linear(2 * x))
        like, data = _DoubleIn8Bits.apply(x, self.linear.input_form)  # type: ignore[no-untyped-call]
        return cast(Tensor, self.linear(CastInput(like, data)))


@pytest.mark.parametrize("recomputes", [False, True])
def test_an_input_may_be_cast_by_what_makes_it(recomputes: bool) -> None:
    x, w, dy = inputs(Case(), 0)
    results = []
    for is_joint in (False, True):
        module, given = DoubledLinear(w, is_joint=is_joint), x.clone().requires_grad_()
        y: Tensor = (Recomputed(module) if recomputes else module)(given)
        y.backward(dy)
        results.append((y.detach(), _gradient(given), _gradient(module.linear.weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- on a GPU


def skip_without_fp8() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9) or not has_triton():
        pytest.skip("there is no GPU that multiplies 8 bits, with Triton")


@pytest.mark.gpu
def test_casts_on_a_gpu_are_those_of_torch_to_the_bit() -> None:
    """The kernels there round by an instruction, and in the interpreter by themselves."""
    skip_without_fp8()
    from tests.interpreted.cast import check, check_all
    from tests.interpreted.cast import drawn as drawn_widely

    check_all("cuda")
    check(drawn_widely((1000, 784), wide=True), 2, E5M2, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "k", "n"), [(64, 128, 96), (50, 72, 40), (3, 16, 16)])
def test_a_gpu_computes_what_a_cpu_emulates(tokens: int, k: int, n: int) -> None:
    """Each result is rounded to bf16, by half of 2⁻⁷ at most; tensor cores sum a forward in fewer bits than fp32."""
    skip_without_fp8()
    results = []
    for device in ("cpu", "cuda"):
        x, w, bias, dy = (
            drawn(*shape, seed=i).bfloat16().to(device).requires_grad_()
            for i, shape in enumerate([(1, tokens, k), (n, k), (n,), (1, tokens, n)])
        )
        own = scales(device=device)
        y = fp8_matmul(x, w, EightBitLinear(LinearCollectives(), own, torch.bfloat16), bias)
        y.backward(dy.detach())
        maxima = torch.stack([own.x.amax, own.weight.amax, own.dy.amax])
        results.append([t.detach().cpu() for t in (y, _gradient(x), _gradient(w), _gradient(bias), maxima)])
    for emulated, found in zip(*results, strict=True):
        assert relative(found, emulated) < 2**-7
