"""The kernels of norms with residual add, bias, dropout and the gradients of vectors, beside torch's functions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.layout.rng import Dropout, dropout_mask, seed_of
from parallel.ops.fp8 import E4M3
from parallel.ops.kernels.cast import EightBits, cast
from parallel.ops.kernels.norm import Dtypes, FlatAddend, NormKind
from parallel.ops.kernels.norm_backward_triton import launch_norm_backward, launch_row_sums
from parallel.ops.kernels.norm_forward_triton import (
    launch_local_statistics,
    launch_normalize,
    launch_residual_add,
    launch_residual_norm,
)
from tests.exactness import assert_as_exact

EPS = 1e-5


class Case(NamedTuple):
    """A case: the shape, dtypes of x and of the vectors, and what takes part."""

    rows: int
    row: int
    dtype: torch.dtype
    vectors: torch.dtype
    is_rms: bool
    is_affine: bool = True
    is_added: bool = True
    p: float = 0.0
    scale: float = 1.0


def cases() -> Iterator[Case]:
    """Generate sizes that nothing divides, nothing at all, and values that are large."""
    for is_rms, is_added, p in ((False, False, 0.0), (False, True, 0.3), (True, True, 0.0)):
        yield Case(7, 100, torch.bfloat16, torch.bfloat16, is_rms, is_added=is_added, p=p)
    yield Case(3, 1000, torch.float32, torch.float32, is_rms=False, p=0.5)
    yield Case(19, 24, torch.float16, torch.float32, is_rms=True, p=0.1)
    yield Case(1, 3, torch.float32, torch.float32, is_rms=True)
    yield Case(5, 33, torch.bfloat16, torch.float32, is_rms=False, is_affine=False)
    yield Case(0, 16, torch.bfloat16, torch.bfloat16, is_rms=False)
    yield Case(4, 64, torch.float32, torch.float32, is_rms=False, scale=1e15)
    yield Case(2, 3000, torch.bfloat16, torch.bfloat16, is_rms=False, p=0.2, scale=1e15)


class Inputs(NamedTuple):
    """The tensors of a case."""

    x: Tensor
    y: Tensor | None
    y_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtotal: Tensor
    dnormed: Tensor

    def to(self, dtype: torch.dtype | None) -> "Inputs":
        """Return copies in a dtype, or in their own, those before the gradients with gradients of their own."""
        copies = [None if t is None else t.detach().to(dtype or t.dtype, copy=True) for t in self]
        for t in copies[:5]:
            if t is not None:
                t.requires_grad_()
        return Inputs(*copies)  # type: ignore[arg-type]


def inputs_of(case: Case, device: str) -> Inputs:
    """Return random tensors for a case, the same on every device."""
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.row)

    def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + scale / 2).to(dtype).to(device)

    def vector(exists: bool) -> Tensor | None:
        return drawn(case.row, dtype=case.vectors) if exists else None

    def matrix(scale: float = 1.0) -> Tensor:
        return drawn(case.rows, case.row, dtype=case.dtype, scale=scale)

    weight, bias = vector(case.is_affine), vector(case.is_affine and not case.is_rms)
    y, y_bias = matrix(case.scale) if case.is_added else None, vector(case.is_added)
    return Inputs(matrix(case.scale), y, y_bias, weight, bias, matrix(), matrix())


def dropout_of(case: Case, device: str) -> Dropout | None:
    """Return the dropout of a case, at coordinates far from 0."""
    if case.p == 0:
        return None
    rows, columns = torch.arange(case.rows, device=device) * 3 + 2**40, torch.arange(case.row, device=device) + 77
    return Dropout(case.p, torch.tensor(seed_of("norm", case.row), device=device), rows, columns)


def composed(case: Case, given: Inputs, device: str) -> dict[str, Tensor]:
    """Return outputs and gradients by torch's functions in the dtype of `given`."""
    total, dropout = given.x, dropout_of(case, device)
    if given.y is not None and given.y_bias is not None:
        y = (given.y + given.y_bias).to(given.x.dtype)
        total = given.x + (y if dropout is None else dropout.of(y))
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centered = wide if case.is_rms else wide - wide.mean(-1, keepdim=True)
    normal = centered * (centered.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normed = normal if given.weight is None else normal * given.weight
    normed = (normed if given.bias is None else normed + given.bias).to(total.dtype)
    torch.autograd.backward((total, normed), (given.dtotal, given.dnormed))
    named = zip(Inputs._fields[:5], given[:5], strict=True)
    gradients = {f"d{name}": t.grad for name, t in named if t is not None and t.grad is not None}
    return {"total": total.detach(), "normed": normed.detach()} | gradients


def fused(case: Case, given: Inputs, device: str, *, is_split: bool) -> dict[str, Tensor]:
    """Return the same by the kernels; `is_split`: by those for rows that ranks divide, of which there is one here."""
    dropout, kind = dropout_of(case, device), NormKind(case.is_rms, EPS, case.row)
    mask = None if dropout is None else dropout.mask()
    addend = None if given.y is None else FlatAddend(given.y, given.y_bias, mask)
    wants: Dtypes = tuple(None if t is None else t.dtype for t in (given.weight, given.bias, given.y_bias))
    dweight = dbias = sums = None
    if is_split:
        total, statistics = launch_local_statistics(given.x, addend, kind)
        if case.is_rms:
            statistics = (statistics / case.row + EPS).rsqrt()
        else:
            statistics = torch.stack((statistics[1], (statistics[0] + EPS).rsqrt()))
        normed = launch_normalize(total, statistics, given.weight, given.bias, kind)
        sums, dweight, dbias = launch_row_sums(
            given.dnormed, total, statistics, given.weight, kind=kind, wants=wants[:2]
        )
        wants = None, None, wants[2]
    else:
        total, normed, statistics = launch_residual_norm(given.x, addend, given.weight, given.bias, kind)
    kept = total, statistics, given.weight
    found = launch_norm_backward(
        given.dtotal, given.dnormed, kept, kind=kind, mask=None if addend is None else mask, wants=wants, sums=sums
    )
    dweight, dbias = (found.dweight, found.dbias) if sums is None else (dweight, dbias)
    results = {"total": total, "normed": normed, "dx": found.dx, "dweight": dweight, "dbias": dbias}
    if addend is not None:
        results |= {"dy": found.dy, "dy_bias": found.dy_bias}
    return {name: t.detach() for name, t in results.items() if t is not None}


def compare(case: Case, device: str) -> None:
    """Compare every output and gradient of a case with fp64."""
    given = inputs_of(case, device)
    exact, reference = composed(case, given.to(torch.float64), device), composed(case, given.to(None), device)
    for is_split in (False, True) if case.row == 100 else (False,):
        found = fused(case, given, device, is_split=is_split)
        assert found.keys() == exact.keys(), (case, found.keys() ^ exact.keys())
        for name, want in exact.items():
            assert_as_exact(found[name], reference[name], want, (case, is_split, name))


def compare_add(case: Case, device: str) -> None:
    """Compare the residual add of a case, without a norm, and its gradients with fp64."""
    given, dropout = inputs_of(case, device), dropout_of(case, device)
    assert given.y is not None
    assert given.y_bias is not None
    assert dropout is not None
    addend = FlatAddend(given.y, given.y_bias, dropout.mask())

    def formula(inputs: Inputs) -> list[Tensor]:
        assert inputs.y is not None
        assert inputs.y_bias is not None
        y = dropout.of(inputs.y + inputs.y_bias)
        total = inputs.x + y
        return [total, *torch.autograd.grad(total, (inputs.y, inputs.y_bias), inputs.dtotal)]

    wants = None, None, given.y_bias.dtype
    found = launch_norm_backward(given.dtotal, None, None, kind=None, mask=addend.mask, wants=wants)
    assert found.dx is given.dtotal
    assert found.dy is not None
    assert found.dy_bias is not None
    ours = launch_residual_add(given.x, addend), found.dy, found.dy_bias
    for got, reference, exact in zip(ours, formula(given.to(None)), formula(given.to(torch.float64)), strict=True):
        assert_as_exact(got, reference.detach(), exact.detach(), case)


def compare_masks(device: str) -> None:
    """Compare which elements are dropped, of all signs of the hashes: the bits are those of `dropout_mask`."""
    case = Case(24, 130, torch.float32, torch.float32, is_rms=False, p=0.4)
    dropout = dropout_of(case, device)
    assert dropout is not None
    ones = torch.ones(case.rows, case.row, device=device)
    total = launch_residual_add(torch.zeros_like(ones), FlatAddend(ones, None, dropout.mask()))
    assert torch.equal(total == 0, dropout_mask(dropout.p, dropout.key, dropout.rows, dropout.columns))
    assert 0.3 < float((total == 0).float().mean()) < 0.5


def compare_cast(case: Case, device: str, *, is_split: bool) -> None:
    """Compare what is written in 8 bits with a cast of what is written otherwise: the same bits, and the maximum."""
    given, kind, dropout = inputs_of(case, device), NormKind(case.is_rms, EPS, case.row), dropout_of(case, device)
    assert given.y is not None
    addend = FlatAddend(given.y, given.y_bias, None if dropout is None else dropout.mask())
    scale, amax, known = (torch.tensor(value, device=device) for value in (32.0, 0.0, 0.0))
    total, normed, statistics = launch_residual_norm(given.x, addend, given.weight, given.bias, kind)
    eight_bits = EightBits(scale, amax)
    if is_split:
        found = launch_normalize(total, statistics, given.weight, given.bias, kind, eight_bits)
    else:
        found = launch_residual_norm(given.x, addend, given.weight, given.bias, kind, eight_bits)[1]
    wanted = cast(normed, scale, E4M3, known)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), case
    assert torch.equal(amax, known), (case, amax, known)


def main(device: str = "cpu") -> None:
    """Compare all cases."""
    compare_masks(device)
    for case in cases():
        compare(case, device)
    for is_rms in (False, True):
        compare_cast(Case(9, 100, torch.bfloat16, torch.bfloat16, is_rms, p=0.3), device, is_split=is_rms)
    compare_add(Case(7, 100, torch.bfloat16, torch.bfloat16, is_rms=False, p=0.3), device)


def interpret() -> None:
    """Compare on a CPU."""
    main()
