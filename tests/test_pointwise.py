"""On a GPU the kernels of activations, heads and sums of columns are as exact as torch's functions.

On a CPU `test_kernels.py` runs the same comparisons with Triton's interpreter.
"""

import pytest
import torch

from tests import blocks

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_is_as_exact_as_its_reference(dtype: torch.dtype) -> None:
    from tests.interpreted.pointwise import main  # imports Triton

    main("cuda", (dtype,))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", blocks.SHAPES)
def test_a_block_with_kernels_is_as_exact_as_without(family: str) -> None:
    blocks.compare(blocks.SHAPES[family], "cuda", length=70)
