"""The kernels of activations, heads and sums of columns are as exact on a GPU as torch's functions.

On a CPU `test_kernels.py` runs the same comparisons with Triton's interpreter.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from parallel.ops.kernels import table
from tests import blocks
from tests.patience import LIMIT

needs_gpu = pytest.mark.usefixtures("gpu")


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


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", ["llama", "llama, grouped"])
def test_a_compiled_block_with_kernels_is_as_exact_as_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = {name: replace(table.KERNELS[name], is_left_to_compiler=False) for name in ("activation", "heads")}
    monkeypatch.setattr(table, "KERNELS", {**table.KERNELS, **called})
    blocks.compare(blocks.SHAPES[family], "cuda", length=70, backend="inductor")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_compiled_code_calls_kernels_as_operators() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = "from tests import blocks; blocks.compare_compiled_and_interpreted()"
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=LIMIT)
    assert child.returncode == 0, child.stdout + child.stderr
