"""The sums of squares, of one tensor and of many, of sizes that nothing divides."""

from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.ops.kernels import sums_triton
from parallel.ops.kernels.sums import sum_of_squares_in_torch
from parallel.ops.kernels.sums_triton import launch_sums_of_squares

SIZES = (0, 1, 64, 1000, 4096, 70_001)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cases(device: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield tensors whose squares are summed by one call."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in SIZES]
        yield f"{dtype}", tensors
        yield f"{dtype}, one of them", tensors[-1:]
        yield f"{dtype}, from an odd element on", [x[1:] for x in tensors[2:]]
    large = torch.full((5000,), 3e18)
    yield "large", [large.to(device), large.bfloat16().to(device), torch.ones(2, device=device)]
    yield "several dtypes", [torch.randn(size, generator=generator).to(device, DTYPES[size % 3]) for size in SIZES]


def check(device: str) -> None:
    """Compare every case with fp64 and with torch; the same tensors give the same bits in any company."""
    for name, tensors in cases(device):
        found = launch_sums_of_squares(tensors)
        reference = torch.stack([sum_of_squares_in_torch(x) for x in tensors])
        for one, of_torch, x in zip(found, reference, tensors, strict=True):
            exact = x.double().square().sum()
            rounding = exact * 2**-24  # a reference that happens to round well is no measure
            error, bound = (one - exact).abs(), 2 * torch.maximum((of_torch - exact).abs(), rounding)
            assert bool(error <= bound), f"{name} {len(x)}: an error of {error:.3e}, of at most {bound:.3e}"
            assert torch.equal(one, launch_sums_of_squares([x])[0]), f"{name} {len(x)}: not the same bits alone"
    for bad in (torch.inf, torch.nan):
        x = torch.zeros(300, device=device)
        x[299] = bad
        assert not launch_sums_of_squares([x, x])[1].isfinite()


def interpret() -> None:
    """Compare on a CPU, with sizes that are small there."""
    sums_triton.PARTS = 4  # fewer programs: the interpreter runs one after the other
    check("cpu")
