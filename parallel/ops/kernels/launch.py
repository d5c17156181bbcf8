"""Launches of Triton's kernels that take the host some microseconds, where Triton's own take some tens.

Triton looks up the compiled kernel of a launch by the type of each argument, in Python. Here the key is one tuple.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    *,
    constants: Mapping[str, object],
    num_warps: int,
) -> None:
    """Launch a kernel, whose parameters are tensors, then numbers, then constants, in this order.

    What is None is a constant, too. Compiled code, and an interpreted kernel, launch it in Triton's own way.
    """
    if torch.compiler.is_compiling() or not hasattr(kernel, "device_caches"):
        kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps)
        return
    places = [None if x is None else x.data_ptr() for x in tensors]
    types = tuple([None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
    values = tuple(constants.values())
    compiled = _compiled(id(kernel), torch.cuda.current_device(), types, _forms(numbers), (*values, num_warps))
    if not compiled:
        compiled.append(kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps))
        return
    compiled[0][(*grid, 1, 1)[:3]](*places, *numbers, *values)


def _forms(numbers: Sequence[int | float]) -> tuple[object, ...]:
    """Return what Triton compiles a kernel anew for, of its integers; nothing of floating point numbers."""
    return tuple([None if isinstance(n, float) else (n == 1, n % 16 == 0, -(2**31) <= n < 2**31) for n in numbers])


@cache
def _compiled(*key: object) -> list[Any]:
    """Return where the compiled kernel of a key is kept: a list, which is empty before the first launch."""
    return []
