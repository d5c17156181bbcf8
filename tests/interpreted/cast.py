"""Casts to 8 bits, compared with torch's own conversion, which rounds to the nearest: all results are the same bits."""

import torch
from torch import Tensor

from parallel.ops import fp8
from parallel.ops.fp8 import E4M3, E5M2
from parallel.ops.kernels.cast_triton import (
    CAST_TILE,
    TRANSPOSE_TILE,
    Tile,
    launch_cast,
    launch_cast_and_transpose,
    launch_transpose,
)

SHAPES = [(1, 1), (3, 5), (16, 32), (33, 17), (70, 130)]
SMALL = Tile(32, 16, 4)


def drawn(shape: tuple[int, ...], *, wide: bool) -> Tensor:
    """Return numbers of all magnitudes, about half of them outside the range of E4M3 if `wide`."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    powers = torch.randn(shape, generator=generator) * (6 if wide else 1)
    return (x * powers.exp2()).bfloat16()


def assert_same_bits(found: Tensor, expected: Tensor, what: object) -> None:
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    are_nan = found.float().isnan() & expected.float().isnan()
    same = (found.view(torch.uint8) == expected.view(torch.uint8)) | are_nan
    assert bool(same.all()), (what, found.float()[~same][:8], expected.float()[~same][:8])


def check(x: Tensor, power: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare all three kernels with their references, for a matrix and a scale of 2 to this power."""
    scale, expected = torch.tensor(2.0**power), fp8.cast(x, torch.tensor(2.0**power), dtype)
    largest = fp8.largest_magnitude(x)
    what = tuple(x.shape), x.dtype, dtype, power
    x, scale = x.to(device), scale.to(device)
    amax = [torch.zeros((), device=device), torch.full((), 1e-3, device=device)]
    flat = launch_cast(x, scale, dtype, amax[0])
    rows, columns, sums = launch_cast_and_transpose(x, scale, dtype, amax[1], True, SMALL)
    padded = torch.zeros(len(x) + -len(x) % 16, x.shape[1]).to(dtype)
    padded.view(torch.uint8)[: len(x)] = expected.view(torch.uint8)
    transposed = padded.view(torch.uint8).T.contiguous().view(dtype)
    assert_same_bits(flat.cpu(), expected, what)
    assert_same_bits(rows.cpu(), expected, what)
    assert_same_bits(columns.cpu(), transposed, what)
    assert_same_bits(launch_transpose(rows, SMALL).cpu(), transposed, what)
    assert_same_bits(launch_transpose(rows, TRANSPOSE_TILE).cpu(), transposed, what)
    assert_same_bits(launch_cast_and_transpose(x, scale, dtype, None, False, CAST_TILE)[1].cpu(), transposed, what)
    assert [float(found) for found in amax] == [float(largest), max(float(largest), float(torch.tensor(1e-3)))], what
    if bool(x.isfinite().all()):
        assert sums is not None
        exact = x.double().sum(0)
        bound = x.double().abs().sum(0) * (torch.finfo(x.dtype).eps + len(x) * 2.0**-23)
        assert bool(((sums.double() - exact).abs() <= bound).all()), what


def check_all(device: str = "cpu") -> None:
    """Compare sizes that nothing divides, all magnitudes, and every number of both dtypes and what is between two."""
    for i, shape in enumerate(SHAPES):
        for dtype in (E4M3, E5M2):
            check(drawn(shape, wide=True), (0, 3, -2)[i % 3], dtype, device)
    check(drawn((17, 33), wide=False).float(), 5, E4M3, device)
    special = torch.tensor([0.0, -0.0, 448, 449, 464, 465, -1e9, 57344, 61440, 1e30, 2.0**-9, 2.0**-10, 3 * 2.0**-11])
    for extra in ((), (torch.nan,), (torch.inf,), (-torch.inf,)):
        for dtype in (E4M3, E5M2):
            check(torch.cat([special, torch.tensor(extra)]).unsqueeze(0), 0, dtype, device)
        check(special.unsqueeze(0), 120, E4M3, device)
    for dtype in (E4M3, E5M2):
        every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        every = every[every.isfinite()].sort().values
        between = (every[1:] + every[:-1]) / 2
        near = torch.cat([between, between * (1 + 2.0**-20), between * (1 - 2.0**-20)])
        check(torch.cat([every, near]).unsqueeze(0), 0, dtype, device)
    empty = torch.empty(0, 5, dtype=torch.bfloat16, device=device)
    assert launch_cast(empty, torch.ones((), device=device), E4M3, None).shape == (0, 5)


def interpret() -> None:
    """Compare on a CPU."""
    check_all()
