"""A linear in groups equals one that is not split, and sends what `linear_in` sends."""

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.config.parallel import TensorConfig
from parallel.ops.deferred import DeferredCalls
from parallel.ops.products import product_of
from parallel.ops.receiver import GradientReceiver
from parallel.tensor import Mode
from parallel.tensor.layers import Linear
from tests.accounts import RecordedCalls, mode_of, part, summed
from tests.harness import run
from tests.parity import relative

BOUND = 1e-12  # relative, in fp64: some hundreds of roundings
B, S, K, KV_HEADS, Q_HEADS, D = 4, 3, 8, 4, 12, 2
ROWS = (Q_HEADS // KV_HEADS + 2) * D  # of a group: its q heads, k and v

LAYOUTS = {
    "1d2": TensorConfig("1d", 2),
    "2d2x2": TensorConfig("2d", 4, rows=2),
    "2.5d-depth2": TensorConfig("2.5d", 4, depth=2, rows=1),
    "3d2x2x2": TensorConfig("3d", 8),
}


@dataclass(frozen=True)
class Account:
    """The measurements of one rank."""

    errors: dict[str, float]
    """The relative differences to a linear that is not split, by the name of what is compared."""

    calls: dict[str, list[tuple[str, int]]]
    """The calls for q, k and v, forward and backward: the kind and the number of elements of each."""

    received: int
    """The number of times that a receiver of the weight's gradient is called in a backward."""


@cache
def accounts(layout: str) -> list[Account]:
    """Return the measurements of every rank. The ranks are started once for all tests of a layout."""
    return run(account, LAYOUTS[layout].size, LAYOUTS[layout])


def account(rank: int, world_size: int, tensor: TensorConfig) -> Account:
    mode = mode_of(rank, tensor, torch.float64)
    head = Q_HEADS * D
    kinds = {
        "one grouped": [mode.linear_in_groups(KV_HEADS, ROWS, K)],
        "one fused": [mode.linear_in(head, K, fused=3)],
        "q, and k with v": [mode.linear_in(head, K), mode.linear_in(KV_HEADS * D, K, fused=2)],
    }
    calls = {name: calls_of(linears, mode) for name, linears in kinds.items()}
    return Account(errors_of(mode), calls, received_of(mode))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors_of(mode: Mode) -> dict[str, float]:
    x, weight, bias = drawn(B, S, K, seed=0), drawn(KV_HEADS, ROWS, K, seed=1), drawn(KV_HEADS, ROWS, seed=2)
    dy = drawn(B, S, KV_HEADS * ROWS, seed=3)
    linear = mode.linear_in_groups(KV_HEADS, ROWS, K)
    assert linear.bias is not None
    of_weight, of_bias = (linear.layouts[name].axes_of_dims for name in ("weight", "bias"))
    linear.weight.data.copy_(part(weight, *of_weight))
    linear.bias.data.copy_(part(bias, *of_bias))
    between, inside = (mode.batch, (), mode.hidden), (mode.inner_batch, (), mode.inner_hidden)
    own = part(x, *between).requires_grad_()
    y = linear(own)
    y.backward(part(dy, *inside))
    assert own.grad is not None
    wx, ww, wb = (tensor.clone().requires_grad_() for tensor in (x, weight, bias))
    whole = F.linear(wx, ww.flatten(0, 1), wb.flatten())
    whole.backward(dy)
    weight_gradient, bias_gradient = (summed(p, linear.layouts[name]) for name, p in linear.named_parameters())
    pairs = {
        "y": (y.detach(), whole.detach(), inside),
        "dx": (own.grad, wx.grad, between),
        "dw": (weight_gradient, ww.grad, of_weight),
        "db": (bias_gradient, wb.grad, of_bias),
    }
    found = {}
    for name, (got, want, split) in pairs.items():
        assert got is not None
        assert want is not None
        found[name] = relative(got, part(want, *split))
    return found


def calls_of(linears: list[Linear], mode: Mode) -> list[tuple[str, int]]:
    x = torch.ones(mode.activation_shape(B, S, K), dtype=torch.float64, requires_grad=True)
    with RecordedCalls("q, k, v") as calls:
        torch.cat([linear(x) for linear in linears], -1).sum().backward()
    return [(call.kind, call.elements) for call in calls.calls]


def received_of(mode: Mode) -> int:
    """Check what a receiver gets in place of autograd, and return how often it gets something."""
    linear = mode.linear_in_groups(KV_HEADS, ROWS, K)
    found: list[Tensor] = []
    linear.receiver = GradientReceiver(
        DeferredCalls(), lambda a, b: found.append(product_of(a, b, torch.float64)), found.append
    )
    linear(torch.ones(mode.activation_shape(B, S, K), dtype=torch.float64)).sum().backward()
    assert linear.weight.grad is None
    assert [gradient.shape for gradient in found] == [linear.weight.flatten(0, -2).shape]
    return len(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_grouped_linear_and_its_gradients_equal_one_that_is_not_split(layout: str) -> None:
    for found in accounts(layout):
        assert {name: error for name, error in found.errors.items() if error > BOUND} == {}
        assert found.received == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_grouped_linear_makes_the_calls_of_a_fused_one(layout: str) -> None:
    """It makes as many of each kind; the weight has other sizes."""
    for found in accounts(layout):
        grouped, fused = (Counter(kind for kind, _ in found.calls[name]) for name in ("one grouped", "one fused"))
        assert grouped == fused


def test_in_1d_q_k_and_v_as_one_parameter_spare_an_all_reduce() -> None:
    """A block all-reduces dx twice in backward, once for q, k, v; as two linears it would do so three times."""
    dx = ("all_reduce", B * S * K)
    for found in accounts("1d2"):
        assert found.calls["one grouped"] == [dx]
        assert found.calls["q, and k with v"] == [dx, dx]


def test_in_2d_q_k_and_v_as_one_parameter_spare_two_gathers_of_x() -> None:
    """x is gathered once forward and once backward, and dx is scattered once; W is as large in one part as in two."""
    own = B * S * K // 4
    for found in accounts("2d2x2"):
        grouped, two = Counter(found.calls["one grouped"]), Counter(found.calls["q, and k with v"])
        assert (grouped["all_gather", own], two["all_gather", own]) == (2, 4)
        assert (grouped["reduce_scatter", 2 * own], two["reduce_scatter", 2 * own]) == (1, 2)
        sent = [
            sum(size for (kind, size) in calls if kind == "all_gather") - times * own
            for calls, times in ((found.calls["one grouped"], 2), (found.calls["q, and k with v"], 4))
        ]
        assert sent[0] == sent[1]


def test_groups_that_the_axes_do_not_divide_are_refused() -> None:
    mode = mode_of(0, TensorConfig("1d", 2), torch.float64)
    with pytest.raises(AssertionError, match="3 groups are not divisible by 2"):
        mode.linear_in_groups(3, 4, K)
