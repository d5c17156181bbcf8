"""The kernels of the loss and of lookups are at most twice as inexact as torch on a GPU; see also test_kernels.py."""

import pytest
import torch

from tests.interpreted import cross_entropy, lookup


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_cross_entropy_on_a_gpu_is_as_exact_as_its_reference_at_real_sizes_too() -> None:
    cross_entropy.check_all("cuda")
    sizes = (50_272, (2, 40)), (128_256, (1, 30)), (50_257, (3, 5)), (128_257, (1, 3)), (16_032, (1, 9))
    for columns, batch in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            cross_entropy.check(cross_entropy.Case(columns, batch, padding=columns % 16, dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_lookup_on_a_gpu_is_as_exact_as_its_reference_and_the_same_in_each_run() -> None:
    lookup.check_all("cuda")
    for drawn in (40, 3_000, 50_272):
        lookup.check(lookup.Case((8, 1024), 50_272, 2048, drawn, padding_idx=1), "cuda")
