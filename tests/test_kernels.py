"""Each kernel in Triton is at most twice as inexact as its reference in torch, also where there is no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.patience import LIMIT

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "tests" / "interpreted").glob("[a-z]*.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_interpreted_kernel_is_as_exact_as_its_reference(program: str) -> None:
    """Sizes that nothing divides, strides, nothing at all, and values that are large: see the program."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"tests.interpreted.{program}"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert child.returncode == 0, child.stdout + child.stderr
