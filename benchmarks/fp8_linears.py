"""Measure a linear in bf16 and in 8 bits, forward and backward, by the size of its weight: which sizes gain?

    python -m benchmarks.fp8_linears              # on a GPU of compute capability 8.9 or higher
    python -m benchmarks.fp8_linears --tokens 32768

The times are the device's alone: each call is captured in a CUDA graph, so that the host's time does not count. The
backward writes the weight's gradient into a buffer, as in a step of one microbatch. The columns are a linear in bf16;
one in 8 bits, whose weight has been cast before; the same with the cast of its weight, which a step does once; and one
whose input was written in 8 bits by the kernel before it. Rows are in the order of the weights' elements. The last line
is the `train.fp8_min_elements` of this GPU: from it on every weight gains, the cast of the weight included.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from parallel.ops.deferred import DeferredCalls
from parallel.ops.products import Factor, write_product
from parallel.ops.receiver import GradientReceiver
from parallel.tensor.fp8_matmul import CastInput, EightBitLinear, fp8_matmul
from parallel.tensor.matmul import LinearCollectives, matmul
from parallel.tensor.scaling import LinearScales, ScalingState, TensorScale

TOKENS = 8192
WIDTHS = (768, 1024, 1152, 1280, 2048, 4096)


def sizes() -> list[tuple[int, int]]:
    """Return K and N of a block's linears, the smallest weight first: attention's output, q k v, and both of the
    feed-forward.
    """
    return sorted((size for h in WIDTHS for size in ((h, h), (h, 3 * h), (h, 4 * h), (4 * h, h))), key=prod)


def least_that_gains(ratios: Mapping[tuple[int, int], float]) -> int | None:
    """Return the elements of the smallest weight from which on all gain, by the ratios of bf16's times to those in 8
    bits; None if the largest does not.
    """
    most_that_lose = max((prod(size) for size, ratio in ratios.items() if ratio <= 1), default=0)
    return min((prod(size) for size in ratios if prod(size) > most_that_lose), default=None)


def scale_of(x: Tensor, largest: float) -> TensorScale:
    """Return the scale of a tensor of normally distributed numbers."""
    scale = (largest / 2 / x.abs().max().float()).log2().floor().exp2()
    return TensorScale(scale, 1 / scale, torch.zeros_like(scale))


def microseconds(call: Callable[[], None]) -> float:
    """Return the median time of a call on the device."""
    from triton.testing import do_bench_cudagraph  # where there is no GPU it may not be installed

    median: float = do_bench_cudagraph(call, rep=20, return_mode="median")  # ms
    return 1000 * median


def measured(tokens: int, k: int, n: int) -> tuple[float, float, float, float]:
    """Return the microseconds in bf16, in 8 bits, with the weight's cast, and with an input that was cast before."""
    x, w, dy = (torch.randn(*size, device="cuda").bfloat16() for size in ((1, tokens, k), (n, k), (1, tokens, n)))
    w /= k**0.5
    bias, sum_of_dw = w.new_zeros(n), torch.empty_like(w)
    scales = LinearScales(scale_of(x, 448.0), scale_of(w, 448.0), scale_of(dy, 57344.0), ScalingState(True, True))
    linear = EightBitLinear(LinearCollectives(), scales, torch.bfloat16)

    def write(a: Factor, b: Factor) -> None:
        write_product(a, b, sum_of_dw)

    receiver = GradientReceiver(DeferredCalls(), write, lambda dw: None)
    for leaf in (x, w, bias):
        leaf.requires_grad_()

    def backward(y: Tensor) -> None:
        y.backward(dy)
        x.grad = bias.grad = None

    def with_cast() -> None:
        linear.weight.clear()
        backward(fp8_matmul(x, w, linear, bias, receiver))

    cast_before = CastInput(x, linear.cast_input(x).data)
    return (
        microseconds(lambda: backward(matmul(x, w, LinearCollectives(), bias, receiver))),
        microseconds(lambda: backward(fp8_matmul(x, w, linear, bias, receiver))),
        microseconds(with_cast),
        microseconds(lambda: backward(fp8_matmul(cast_before, w, linear, bias, receiver))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"rows of the input; usually {TOKENS}")
    tokens = parser.parse_args().tokens
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        sys.exit("fp8_linears: it needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell).")
    print(f"{tokens} tokens; us of the device, forward and backward, and the ratio to bf16")
    print(f"{'K':>6} {'N':>6} {'bf16':>7} {'8 bits':>13} {'and W cast':>13} {'x cast before':>13}")
    ratios = {}
    for k, n in sizes():
        plain, *others = measured(tokens, k, n)
        print(f"{k:>6} {n:>6} {plain:>7.0f} " + " ".join(f"{us:>6.0f} {plain / us:5.2f}x" for us in others), flush=True)
        ratios[k, n] = plain / others[1]
    least = least_that_gains(ratios)
    print("no weight gains" if least is None else f"train.fp8_min_elements={least}")


if __name__ == "__main__":
    main()
