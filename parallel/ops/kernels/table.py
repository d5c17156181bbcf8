"""The table of kernels: what each of them can be given. Anything else is computed by its reference in torch.

A kernel is two files: NAME.py has the reference and the function that callers use, which asks this table; and
NAME_triton.py has the kernel and the functions `launch_...`, and is imported where it is launched for the first time.
"""

import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from parallel.ops.compiling import constant_in_compiled_code

NARROW = frozenset({torch.bfloat16, torch.float16})
FLOATS = NARROW | {torch.float32}
EIGHT_BITS = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    dtypes               those of the tensor that the kernel reads most of
    largest_row          the most elements of a row, where a program holds a whole row; None: any number
    is_left_to_compiler  True: compiled code has torch's functions, which the compiler fuses with what surrounds them
    """

    dtypes: frozenset[torch.dtype]
    largest_row: int | None = None
    is_left_to_compiler: bool = False


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "accumulate": Kernel(NARROW),
        "activation": Kernel(NARROW, is_left_to_compiler=True),
        "adamw": Kernel(FLOATS),  # of gradients; master weights are fp32
        "cached_attention": Kernel(FLOATS, largest_row=256),
        "cast": Kernel(FLOATS),
        "column_sum": Kernel(FLOATS, is_left_to_compiler=True),
        "cross_entropy": Kernel(frozenset({torch.float32})),
        "fingerprint": Kernel(FLOATS | {torch.float64, torch.int64}),  # of bits, as 64-bit words
        "heads": Kernel(NARROW, is_left_to_compiler=True),
        "lookup": Kernel(FLOATS, is_left_to_compiler=True),
        "multiply": Kernel(FLOATS),
        "norm": Kernel(FLOATS, largest_row=16384, is_left_to_compiler=True),
        "sums": Kernel(FLOATS),
        "transpose": Kernel(EIGHT_BITS),
    }
)


def is_fused(name: str, x: Tensor, *, row: int = 0) -> bool:
    """Return whether the code that runs now launches the kernel `name` for x, whose rows have `row` elements."""
    if not x.is_cuda or (torch.compiler.is_compiling() and _is_left_to_compiler(name)):
        return False
    return can_be_given(name, x.dtype, row=row)


@constant_in_compiled_code
def can_be_given(name: str, dtype: torch.dtype, *, row: int = 0) -> bool:
    """Return whether the kernel `name` can be launched on a GPU for tensors of this dtype and rows of this size."""
    kernel = KERNELS[name]
    return dtype in kernel.dtypes and (kernel.largest_row is None or row <= kernel.largest_row) and has_triton()


@constant_in_compiled_code
def _is_left_to_compiler(name: str) -> bool:
    return KERNELS[name].is_left_to_compiler


@constant_in_compiled_code
def has_triton() -> bool:
    """Return whether Triton is here, and what it builds its launcher with: a C compiler and Python's header."""
    return not what_triton_lacks()


@cache
def what_triton_lacks() -> str:
    """Return what kernels need and this machine has not, as a message names it, or an empty string."""
    if find_spec("triton") is None:
        return "Triton (pip install triton)"
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler, gcc or clang"
    return "" if _header().is_file() else f"Python's headers, {_header()}"


def _header() -> Path:
    return Path(sysconfig.get_paths()["include"], "Python.h")
