"""Each kernel in Triton is at most twice as inexact as its reference in torch, also where there is no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.patience import LIMIT

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "update": ("adamw", "fingerprint", "sums"),
    "loss": ("cross_entropy", "lookup"),
    "block": ("cast", "norm", "norm_in_blocks", "pointwise"),
}
"""The programs of tests/interpreted, in groups that have one process each: to import torch takes as long as to run."""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("group", PROGRAMS)
def test_interpreted_kernels_are_as_exact_as_their_references(group: str) -> None:
    """Sizes that nothing divides, strides, nothing at all, and values that are large: see the programs."""
    interpret(*PROGRAMS[group])


def test_every_interpreted_program_is_run() -> None:
    found = {path.stem for path in (ROOT / "tests" / "interpreted").glob("[a-z]*.py")}
    assert found == {name for names in PROGRAMS.values() for name in names}


def interpret(*programs: str) -> None:
    """Run these programs of tests/interpreted with Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.interpreted", *programs]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert child.returncode == 0, child.stdout + child.stderr
