"""Norms with the residual add before them are one kernel each way on a GPU, also over a dim that ranks divide."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from tests.test_kernels import interpret


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_of_a_split_norm_equal_torch_on_whole_rows() -> None:
    interpret("_norm_over_ranks")


@pytest.mark.gpu
@pytest.mark.parametrize("program", ["norm", "norm_in_blocks"])
def test_the_kernels_are_as_exact_as_torch_on_a_gpu(program: str) -> None:
    """They are the cases that are interpreted elsewhere."""
    if not torch.cuda.is_available():
        pytest.skip("interpreted in test_kernels.py")
    import_module(f"tests.interpreted.{program}").main("cuda")
