"""Activations, heads of attention and sums of columns, beside torch and fp64.

The cases are the same on a GPU, where `test_pointwise.py` calls them.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from parallel.ops.fp8 import E4M3
from parallel.ops.kernels.accumulate_triton import launch_accumulate
from parallel.ops.kernels.activation import FUNCTIONS
from parallel.ops.kernels.activation_triton import (
    launch_activated,
    launch_activated_backward,
    launch_gated,
    launch_gated_backward,
)
from parallel.ops.kernels.cast import EightBits, cast
from parallel.ops.kernels.column_sum_triton import launch_column_sum
from parallel.ops.kernels.heads import Tables, by_head, parts_of, rotated
from parallel.ops.kernels.heads_triton import launch_heads, launch_heads_backward
from tests import blocks
from tests.exactness import assert_as_exact

LARGE = 1e3  # a magnitude whose square is no number of fp16


def main(device: str = "cpu", dtypes: Sequence[torch.dtype] = (torch.float16,)) -> None:
    """Run every comparison."""
    for dtype in dtypes:
        for name in FUNCTIONS:
            for scale in (1.0, LARGE):
                compare_activated(name, numbers((2, 20, 130), device, dtype) * scale, has_bias=scale == 1.0)
                compare_gated(name, numbers((2, 5, 130), device, dtype) * scale)
        compare_cast("silu", numbers((3, 5, 130), device, dtype))
        compare_activated("gelu", numbers((0, 8), device, dtype), has_bias=True)
        compare_gated("silu", numbers((0, 8), device, dtype))
        for shape in ((0, 7), (1, 1), (70, 130), (3, 0)):
            compare_column_sum(numbers(shape, device, dtype))
        compare_column_sum(numbers((70, 300), device, dtype)[:, 100:231])
        compare_accumulate(numbers((5000,), device, dtype))
        for counts, size, turned in (((2, 2), 6, 6), ((2, 2), 8, 0), ((4, 2), 8, 4)):
            compare_heads(counts, (2, 5, size), turned, device, dtype)
        compare_heads((3, 0), (2, 5, 8), 8, device, dtype)
        compare_heads((2, 2), (1, 0, 8), 8, device, dtype)


def numbers(shape: Sequence[int], device: str, dtype: torch.dtype) -> Tensor:
    """Return normal numbers, the same ones for the same sizes, and a zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    x.view(-1)[:1] = 0
    return x.to(device, dtype)


def compare_activated(name: str, u: Tensor, *, has_bias: bool) -> None:
    """Compare f = act(u + bias), du and the bias's gradient; without a bias there is no sum."""
    df = numbers(u.shape, str(u.device), u.dtype).flip(-1)
    bias = numbers(u.shape[-1:], str(u.device), u.dtype) if has_bias else None
    f = launch_activated(u, bias, name)
    kept = (f, None) if name == "relu" else (u, bias)
    du, db = launch_activated_backward(df, *kept, name, sums=has_bias)
    assert (db is not None) == has_bias
    found = {"f": f, "du": du} | ({} if db is None else {"db": db})
    reference, exact = (_activated(name, u, bias, df, dtype) for dtype in (u.dtype, torch.float64))
    _compare(found, reference, exact, (name, u.shape))


def _activated(name: str, u: Tensor, bias: Tensor | None, df: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    u = u.to(dtype).requires_grad_()
    f = FUNCTIONS[name](u if bias is None else u + bias.to(dtype))
    (du,) = torch.autograd.grad(f, u, df.to(dtype))
    return {"f": f.detach(), "du": du, "db": du.flatten(0, -2).sum(0)}


def compare_gated(name: str, x: Tensor) -> None:
    """Compare f = act(gate) · up and dx."""
    df = numbers((*x.shape[:-1], x.shape[-1] // 2), str(x.device), x.dtype).flip(-1)

    def torchs(dtype: torch.dtype) -> dict[str, Tensor]:
        wide = x.to(dtype).requires_grad_()
        gate, up = wide.chunk(2, -1)
        f = FUNCTIONS[name](gate) * up
        (dx,) = torch.autograd.grad(f, wide, df.to(dtype))
        return {"f": f.detach(), "dx": dx}

    found = {"f": launch_gated(x, name), "dx": launch_gated_backward(df, x, name)}
    _compare(found, torchs(x.dtype), torchs(torch.float64), ("gated", name, x.shape))


def compare_cast(name: str, x: Tensor) -> None:
    """Compare outputs in 8 bits with those that are cast in a pass of their own: all numbers, and amax."""
    scale = torch.full((), 64.0, device=x.device)  # some numbers are too large
    bias = numbers(x.shape[-1:], str(x.device), x.dtype)
    fs = launch_activated(x, bias, name), launch_gated(x, name)
    for f, function in zip(fs, (partial(launch_activated, x, bias), partial(launch_gated, x)), strict=True):
        amax, wanted = torch.zeros_like(scale), torch.zeros_like(scale)
        found = function(name, EightBits(scale, amax))
        expected = cast(f, scale, E4M3, wanted)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(amax, wanted), name
        assert torch.equal(function(name, EightBits(scale, None)).view(torch.uint8), found.view(torch.uint8)), name


def compare_column_sum(x: Tensor) -> None:
    """Compare the sum of rows of x[T, N]; a second one is the same to the bit."""
    found = launch_column_sum(x)
    _compare({"sum": found}, {"sum": x.sum(0)}, {"sum": x.double().sum(0)}, ("column sum", x.shape))
    assert torch.equal(found, launch_column_sum(x))


def compare_accumulate(x: Tensor) -> None:
    """Compare a copy to fp32 and a sum in it: both are what torch computes, bit for bit."""
    out, wanted = (torch.full_like(x, torch.nan, dtype=torch.float32) for _ in range(2))
    launch_accumulate(x, out, is_first=True)
    assert torch.equal(out, wanted.copy_(x))
    launch_accumulate(x.flip(0), out, is_first=False)
    assert torch.equal(out, wanted.add_(x.flip(0)))


def compare_heads(
    counts: tuple[int, int], sizes: tuple[int, int, int], num_turned: int, device: str, dtype: torch.dtype
) -> None:
    """Compare q, k and v of a joint tensor, and its gradient and that of a bias, for gradients of other strides."""
    (heads, kv_heads), (batch, length, size) = counts, sizes
    qkv = numbers((batch, length, (heads + 2 * kv_heads) * size), device, dtype)
    tables = _tables((batch, length, num_turned), device, dtype) if num_turned else None
    gradients = tuple(
        numbers((batch, n, size, length), device, dtype).mT
        if n != kv_heads
        else numbers((batch, n, length, size), device, dtype)
        for n in (heads, kv_heads, kv_heads)
        if n
    )

    def torchs(dtype: torch.dtype) -> dict[str, Tensor]:
        wide = qkv.to(dtype).requires_grad_()
        if kv_heads:
            q, k, v = map(by_head, parts_of(wide, heads, kv_heads))
        else:
            q = wide.unflatten(-1, (heads, size)).transpose(1, 2)
        turns = (lambda x: x) if tables is None else lambda x: rotated(x, tables[0].to(dtype), tables[1].to(dtype))
        outputs = (turns(q), turns(k), v) if kv_heads else (turns(q),)
        (dqkv,) = torch.autograd.grad(outputs, wide, [x.to(dtype) for x in gradients])
        named = dict(zip("qkv", (x.detach() for x in outputs), strict=False))
        return named | {"dqkv": dqkv, "db": dqkv.flatten(0, -2).sum(0)}

    out = torch.full_like(qkv, torch.nan)
    parts = out.unflatten(-1, (-1, size)).split([n for n in (heads, kv_heads, kv_heads) if n], 2)
    by_heads = [x.transpose(1, 2) for x in parts]
    launch_heads(qkv, by_heads, tables)
    dqkv, db = launch_heads_backward(gradients, tables, sums=True)
    assert db is not None
    found = dict(zip("qkv", by_heads, strict=False)) | {"dqkv": dqkv, "db": db}
    _compare(found, torchs(dtype), torchs(torch.float64), (counts, sizes, num_turned))
    assert torch.equal(dqkv, launch_heads_backward(gradients, tables)[0])
    if heads == kv_heads and tables is not None:  # in place
        parts = qkv.unflatten(-1, (-1, size)).split([heads, kv_heads, kv_heads], 2)
        launch_heads(qkv, [x.transpose(1, 2) for x in parts], tables, moves_v=False)
        assert torch.equal(qkv, out)


def _tables(sizes: tuple[int, int, int], device: str, dtype: torch.dtype) -> Tables:
    batch, length, num_turned = sizes
    angles = torch.rand(batch, 1, length, num_turned // 2, dtype=torch.float64) * 6
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _compare(found: dict[str, Tensor], reference: dict[str, Tensor], exact: dict[str, Tensor], what: object) -> None:
    for key, x in found.items():
        assert_as_exact(x, reference[key], exact[key], (what, key))


def interpret() -> None:
    """Compare on a CPU."""
    main()
    blocks.compare_interpreted()
