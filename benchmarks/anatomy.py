"""The anatomy of training steps on a GPU: the time of kernels in groups, and the gaps between them, from a trace."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import parallel.ops.kernels

OTHER = "other"

OWN: Mapping[str, str] = {
    "accumulate_triton": "gradients' sums",
    "activation_triton": "activations",
    "adamw_triton": "update",
    "cast_triton": "casts",
    "column_sum_triton": "gradients' sums",
    "cross_entropy_triton": "loss",
    "fingerprint_triton": OTHER,
    "heads_triton": "rotary + joining",
    "lookup_triton": "lookups",
    "norm_backward_triton": "norm + residual",
    "norm_forward_triton": "norm + residual",
    "sums_triton": "update",
}
"""The group of our own kernels, by the module that has them."""

GROUPS: Mapping[str, str] = {
    "attention": r"sdpa|flash|fmha|attention|dot_do_o|convert_dq",
    "matmuls": r"nvjet|gemm|cutlass|cublas|splitK|xmma",
    "loss": r"softmax|cross_entropy|liger_cross|nll_loss|MaxOps|scatter_gather|copy__mul_unsqueeze"
    r"|elementwise_kernel<.*BinaryFunctor<float, .*MulFunctor",
    "activations": r"relu|gelu|silu|swiglu|threshold|clamp",
    "norm + residual": r"layer_?norm|rms_?norm|GammaBeta|CUDAFunctor_add<c10::BFloat16>|fused_add_view"
    r"|view_add_(\w+_)?\d",
    "update": r"multi_tensor_apply|FusedOptimizer|NormTwoOps|bfloat16_copy|_to_copy_mul_\d|sum_functor<double",
    "gradients' sums": r"sum_functor<(c10::BFloat16|float)|fused_.*sum",
    "rotary + joining": r"CatArray|rotary|rope|fused_.*cat_|neg",
    "lookups": r"embedding|index|gather",
    "copies": r"memcpy|memset|copy|fill",
}
"""The group of torch's, cuBLAS's, cuDNN's and the compiler's kernels: the first whose pattern a name has.

Capitals count as small letters.
"""

NAMES = ("matmuls", "casts", *(name for name in GROUPS if name != "matmuls"), OTHER)

LENGTHS = (2.0, 5.0, 20.0, 100.0)  # microseconds


@dataclass(frozen=True)
class Kernel:
    """A kernel, a copy or a memset of a trace; times are in microseconds."""

    name: str
    start: float
    duration: float


@dataclass(frozen=True)
class Gap:
    """The microseconds without any kernel, and the names of those before and after."""

    duration: float
    before: str
    after: str


def kernels_of(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """Return what ran on the device, in order, from the events of a trace of torch's profiler."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [
        Kernel(event["name"], float(event["ts"]), float(event["dur"])) for event in events if event.get("cat") in kinds
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def totals(kernels: Sequence[Kernel]) -> dict[str, tuple[float, int]]:
    """Return the microseconds and the launches of each group."""
    found = dict.fromkeys(NAMES, (0.0, 0))
    before = OTHER
    for kernel in kernels:
        before = group_of(kernel.name, before)
        microseconds, launches = found[before]
        found[before] = microseconds + kernel.duration, launches + 1
    return found


def group_of(name: str, before: str = OTHER) -> str:
    """Return the group of a kernel. One of ours whose name several modules have is of the group of the one `before`."""
    if groups := own_kernels().get(name):
        return before if before in groups else min(groups)
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


@cache
def own_kernels() -> Mapping[str, frozenset[str]]:
    """Return the groups of our own kernels by their names, which are those of functions in the modules of `OWN`."""
    found: dict[str, frozenset[str]] = {}
    for module, group in OWN.items():
        path = Path(next(iter(parallel.ops.kernels.__path__)), f"{module}.py")
        text = path.read_text() if path.is_file() else ""
        for name in re.findall(r"@triton\.jit(?:\([^)]*\))?\s+def (\w+)", text):
            found[name] = found.get(name, frozenset()) | {group}
    return found


def gaps_of(kernels: Sequence[Kernel]) -> list[Gap]:
    """Return the times in which nothing ran, between the first kernel and the last, in order."""
    found = []
    end, last = kernels[0].start, ""
    for kernel in kernels:
        if kernel.start > end:
            found.append(Gap(kernel.start - end, last, kernel.name))
        if kernel.start + kernel.duration >= end:
            end, last = kernel.start + kernel.duration, kernel.name
    return found


def by_length(gaps: Iterable[Gap]) -> dict[str, tuple[float, int]]:
    """Return the microseconds and the number of gaps of each range of lengths."""
    names = [f"< {length:.0f} µs" for length in LENGTHS] + [f"≥ {LENGTHS[-1]:.0f} µs"]
    found = dict.fromkeys(names, (0.0, 0))
    for gap in gaps:
        name = names[sum(gap.duration >= length for length in LENGTHS)]
        microseconds, count = found[name]
        found[name] = microseconds + gap.duration, count + 1
    return found
