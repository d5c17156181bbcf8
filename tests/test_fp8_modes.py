"""Two linears in 8 bits are as exact in every mode as in one process, up to a factor of 2."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.config.parallel import TensorConfig
from parallel.tensor.fp8_matmul import EightBitLinear, fp8_matmul
from parallel.tensor.matmul import LinearCollectives
from tests.accounts import mode_of, part, summed
from tests.harness import run
from tests.parity import relative
from tests.test_fp8_matmul import scales
from tests.test_weight_gradients import drawn

WIDTH, INNER = 32, 64
SHAPES = dict(x=(8, 8, WIDTH), up=(INNER, WIDTH), down=(WIDTH, INNER), dy=(8, 8, WIDTH))
MODES = {
    "1d": TensorConfig("1d", 4),
    "1d-sp": TensorConfig("1d", 4, sequence_parallel=True),
    "2d": TensorConfig("2d", 4, rows=2),
    "2.5d": TensorConfig("2.5d", 4, depth=2, rows=2),
    "3d": TensorConfig("3d", 8),
}
EACH = ["1d-sp", "2d", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1d", "2.5d", "3d"))]


def tensors() -> dict[str, Tensor]:
    """Return whole tensors in bf16, with weights that leave magnitudes as they are: the scales of tests suit those."""
    found = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    weights = {name: found[name] / SHAPES[name][1] ** 0.5 for name in ("up", "down")}
    return {name: x.bfloat16() for name, x in (found | weights).items()}


Products = Callable[[Tensor], Tensor]


def results(x: Tensor, up: Products, down: Products, dy: Tensor) -> dict[str, Tensor]:
    """Return y = down(gelu(up(x))) and the gradient of x."""
    x = x.detach().requires_grad_()
    y = down(F.gelu(up(x)))
    y.backward(dy)
    assert x.grad is not None
    return dict(y=y.detach(), x=x.grad)


def in_one_process(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return y and all gradients of whole tensors."""
    whole = {name: x.to(dtype) for name, x in tensors().items()}
    up, down = whole["up"].requires_grad_(), whole["down"].requires_grad_()
    found = results(whole["x"], lambda x: product(x, up), lambda x: product(x, down), whole["dy"])
    assert up.grad is not None
    assert down.grad is not None
    return found | dict(up=up.grad, down=down.grad)


def in_8_bits(x: Tensor, w: Tensor) -> Tensor:
    return fp8_matmul(x, w, EightBitLinear(LinearCollectives(), scales(), w.dtype))


def errors(rank: int, world_size: int, tensor: TensorConfig) -> dict[str, tuple[float, float]]:
    """Return errors of this rank's parts: in this mode, and in one process. Both are relative to fp64."""
    mode = mode_of(rank, tensor, torch.bfloat16)
    between = mode.batch, mode.length, mode.hidden
    splits = dict(x=between, y=between, up=(mode.inner_hidden, mode.k_in), down=(mode.hidden, mode.k_out))
    own = tensors()
    linears = dict(up=mode.linear_in(INNER, WIDTH, bias=False), down=mode.linear_out(WIDTH, INNER, bias=False))
    for name, linear in linears.items():
        linear.multiply_in_8_bits(scales())
        linear.weight.data.copy_(part(own[name], *splits[name]))
    found = results(part(own["x"], *between), linears["up"], linears["down"], part(own["dy"], *between))
    found |= {name: summed(linear.weight, linear.layouts["weight"]) for name, linear in linears.items()}
    unsplit, exact = in_one_process(in_8_bits, torch.bfloat16), in_one_process(F.linear, torch.float64)
    wanted = {name: part(value, *splits[name]) for name, value in exact.items()}
    return {
        name: (relative(found[name], wanted[name]), relative(part(unsplit[name], *splits[name]), wanted[name]))
        for name in wanted
    }


@pytest.mark.parametrize("mode", EACH)
def test_the_error_of_a_layout_is_at_most_twice_that_of_one_process(mode: str) -> None:
    for of_rank in run(errors, MODES[mode].size, MODES[mode]):
        for name, (ours, unsplit) in of_rank.items():
            assert 0.005 < unsplit < 0.15, (name, unsplit)  # of 3 bits of mantissa, and 2
            assert ours <= 2 * unsplit, (name, ours, unsplit)
