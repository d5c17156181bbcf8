"""The comparison of a kernel with its reference in torch: both are compared with fp64."""

import torch
from torch import Tensor


def assert_as_exact(found: Tensor, reference: Tensor, exact: Tensor, what: object = "") -> None:
    """Compare a kernel's result with `exact`, of fp64: an error of at most twice the reference's.

    The largest error counts, relative to nothing. The reference's counts as at least half the distance of two numbers
    of the dtype near the largest value: a reference that happens to round well is no measure.
    """
    assert found.dtype == reference.dtype, (what, found.dtype, reference.dtype)
    assert found.shape == exact.shape, (what, found.shape, exact.shape)
    if not exact.numel():
        return
    rounding = exact.abs().max() * torch.finfo(found.dtype).eps / 2
    error, of_reference = ((x.double() - exact).abs().max() for x in (found, reference))
    bound = 2 * torch.maximum(of_reference, rounding)
    assert bool(error <= bound), f"{what}: an error of {error:.3e}, of {of_reference:.3e} in torch"
