"""The fused attention of new tokens to a cache is that of torch, to the rounding of its dtype, and writes in place.

Without a GPU the kernel is run by Triton's interpreter, which is chosen when the kernel is imported: in a process of
its own.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.ops.captured import CALLS_BEFORE, Captured, graphs_of
from parallel.ops.kernels.cached_attention import attend_fused, attend_in_torch, is_fused
from parallel.sequence.cache import masks_at
from tests.patience import LIMIT


@dataclass(frozen=True)
class Case:
    """Sizes, positions and the kind of an attention of one new token of each text."""

    positions: tuple[int, ...]
    length: int
    heads: tuple[int, int]  # of q, and of k and v
    size: int
    window: int | None = None
    dtype: torch.dtype = torch.float32

    def inputs(self, device: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Return q, k and v as views of one tensor, the cache, and the positions. What no query sees is NaN."""
        generator = torch.Generator().manual_seed(0)
        heads, kv_heads = self.heads
        batch = len(self.positions)
        joint = torch.randn(batch, 1, heads + 2 * kv_heads, self.size, generator=generator, dtype=torch.float64)
        cache = torch.randn(2, batch, kv_heads, self.length, self.size, generator=generator, dtype=torch.float64)
        for text, position in enumerate(self.positions):
            cache[:, text, :, position:] = torch.nan
        joint = joint.to(device, self.dtype)
        q, k, v = joint.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
        return (q, k, v), cache.to(device, self.dtype), torch.tensor(self.positions, device=device)


def exact(case: Case, new: tuple[Tensor, Tensor, Tensor], cache: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention in fp64, text by text, and the cache with the new keys and values."""
    q = new[0].double().squeeze(2)
    cache, rows = cache.clone(), []
    for text, position in enumerate(case.positions):
        cache[0, text, :, position], cache[1, text, :, position] = new[1][text, :, 0], new[2][text, :, 0]
        first = 0 if case.window is None else max(0, position - case.window + 1)
        group = case.heads[0] // case.heads[1]
        keys, values = cache[:, text, :, first : position + 1].double().repeat_interleave(group, 1)
        weights = (q[text].unsqueeze(1) @ keys.mT * case.size**-0.5).softmax(-1)
        rows.append((weights @ values).flatten())
    return torch.stack(rows), cache


def assert_as_exact_as_torch(case: Case, device: str, found: Tensor, cache: Tensor) -> None:
    """Compare with fp64: an error of at most twice that of torch's attention, and every element of the cache.

    Torch's counts as at least half the distance of two numbers of the dtype near the largest result, and of two fp32
    numbers near the largest value: sums are in fp32.
    """
    new, before, positions = case.inputs(device)
    wanted, cache_after = exact(case, new, before)
    mask = masks_at(positions, case.length, {case.window}, case.dtype)[case.window]
    of_torch = attend_in_torch(*new, before.nan_to_num(), positions, mask)
    rounding = wanted.abs().max() * torch.finfo(case.dtype).eps / 2
    rounding += cache_after.nan_to_num().abs().max() * torch.finfo(torch.float32).eps / 2
    bound = 2 * torch.maximum((of_torch.double() - wanted).abs().max(), rounding)
    assert found.dtype == case.dtype
    assert (found.double() - wanted).abs().max() <= bound, case
    torch.testing.assert_close(cache, cache_after, rtol=0, atol=0, equal_nan=True)


SMALL_CASES = [
    (Case((0, 36, 17), 37, (2, 2), 5), (8, 1)),
    (Case((36, 8), 37, (4, 2), 20, None, torch.bfloat16), (4, 4)),
    (Case((36, 0), 37, (6, 2), 8, 19), (4, 2)),
    (Case((25,), 37, (4, 1), 16, 6, torch.float16), (4, 1)),
    (Case((3, 36), 40, (1, 1), 12, 1, torch.bfloat16), (16, 2)),
    (Case((20,), 24, (16, 1), 8, 7), (8, 1)),
]
"""Cases for the interpreter, each with keys of a tile and parts: sizes that nothing divides among them."""


def check_small_cases() -> None:
    from parallel.ops.kernels.cached_attention_triton import Tiling, launch_attend

    for case, (keys, parts) in SMALL_CASES:
        new, cache, positions = case.inputs("cpu")
        window = case.length if case.window is None else case.window
        found = launch_attend(new, cache, positions, window=window, tiling=Tiling(keys, parts, warps=4))
        assert_as_exact_as_torch(case, "cpu", found, cache)


def check_tilings() -> None:
    from parallel.ops.kernels.cached_attention_triton import Tiling, tiling_for

    def tiling(batch: int, heads: int, length: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tiling:
        q = torch.empty(batch, heads, 1, size, dtype=dtype, device="meta")
        return tiling_for(q, torch.empty(2, batch, heads, length, size, dtype=dtype, device="meta"))

    assert tiling(1, 32, 384, 64) == Tiling(256, 1, 8)
    assert tiling(1, 32, 4096, 64) == Tiling(256, 4, 8)
    assert tiling(8, 32, 4096, 64) == Tiling(256, 2, 8)
    assert tiling(1, 32, 4096, 64, torch.float32) == Tiling(128, 8, 8)
    for batch, heads, length, size in product((1, 3, 700), (1, 7, 64), (1, 64, 5000, 2**20), (1, 8, 80, 96, 256)):
        found = tiling(batch, heads, length, size)
        assert all(n > 0 and n & (n - 1) == 0 for n in (found.keys, found.parts))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_interpreted_kernel_is_as_exact_as_torch_and_leaves_the_rest_of_the_cache() -> None:
    """Positions 0 and L − 1, windows, groups, and NaN wherever no query looks. A long cache is split over programs."""
    command = [sys.executable, "-m", "tests.test_cached_attention"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[1]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert child.returncode == 0, child.stderr


# -- on a GPU ----------------------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [
    *(Case((383,), 384, (32, 32), 64, dtype=dtype) for dtype in DTYPES),
    *(Case((4095, 0, 2047, 300), 4096, (8, 2), 128, window, dtype) for dtype in DTYPES for window in (None, 1000)),
    *(Case((99, 1, 0), 100, (16, 1), size, 60, torch.bfloat16) for size in (80, 96, 256, 40)),
    Case(tuple(range(40, 104)), 128, (12, 4), 64, dtype=torch.bfloat16),
    Case((9000,), 16384, (32, 8), 128, dtype=torch.bfloat16),
]


def skip_without_kernel() -> None:
    if not torch.cuda.is_available() or not is_fused(torch.device("cuda"), torch.bfloat16, 64, rows=1):
        pytest.skip("there is no GPU with Triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_as_exact_as_torch_on_a_gpu(case: Case) -> None:
    skip_without_kernel()
    new, cache, positions = case.inputs("cuda")
    found = attend_fused(*new, cache, positions, case.window)
    assert_as_exact_as_torch(case, "cuda", found, cache)


@pytest.mark.gpu
def test_compiled_code_writes_into_the_cache_itself() -> None:
    skip_without_kernel()
    case = Case((300, 4095), 4096, (8, 2), 128, 1000, torch.bfloat16)
    new, cache, positions = case.inputs("cuda")
    torch._dynamo.reset()
    found = torch.compile(attend_fused, fullgraph=True)(*new, cache, positions, case.window)
    assert_as_exact_as_torch(case, "cuda", found, cache)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_positions() -> None:
    skip_without_kernel()
    case = Case((5, 700, 64), 1024, (8, 4), 64, dtype=torch.bfloat16)
    new, cache, positions = case.inputs("cuda")
    y = torch.empty(3, 8 * 64, dtype=case.dtype, device="cuda")

    def attend() -> None:
        y.copy_(attend_fused(*new, cache, positions, None))

    captured = Captured(attend, graphs_of(torch.device("cuda", 0)), what="new tokens")
    for number in range(CALLS_BEFORE + 3):
        moved = Case(tuple(position + number for position in case.positions), *(1024, (8, 4), 64, None, case.dtype))
        _, fresh, moved_positions = moved.inputs("cuda")
        cache.copy_(fresh)
        positions.copy_(moved_positions)
        captured()
        assert_as_exact_as_torch(moved, "cuda", y, cache)


if __name__ == "__main__":
    check_small_cases()
    check_tilings()
