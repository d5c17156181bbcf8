"""The gradient of a table that the head and a lookup share is computed in its chunk's buffer, and is autograd's."""

import pytest
import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkSpec
from parallel.layout import sources
from parallel.layout.layout import Layout, ParameterInfo
from parallel.ops.kernels.lookup import lookup
from parallel.ops.receiver import GradientReceiver
from parallel.optim.gradients import Gradients
from parallel.tensor import loss
from parallel.tensor.loss import HeadLayout, sum_cross_entropy
from parallel.tensor.matmul import LinearCollectives
from tests.parity import relative

V, H, B, S = 11, 4, 2, 6
LAYOUT = Layout((V, H), ((), ()))
HEAD = HeadLayout(LinearCollectives(), (), LAYOUT)


def chunk_of_a_table(dtype: torch.dtype) -> Chunk:
    """Return a chunk of one table [V, H], whose parameter has this dtype."""
    values = torch.randn(
        V, H, generator=torch.Generator().manual_seed(0), dtype=torch.promote_types(dtype, torch.float32)
    )
    info = ParameterInfo("a.table", "a", nn.Parameter(values), LAYOUT, sources.whole("a.table", (V, H)))
    return Chunk(ChunkSpec([info], dtype))


def loss_of(table: Tensor, microbatch: int, receiver: GradientReceiver | None = None) -> Tensor:
    """Look tokens up, and return the loss of what is found."""
    tokens = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(microbatch))
    x = 2 * lookup(tokens, table, padding_idx=1, is_part=True, receiver=receiver)
    return sum_cross_entropy(x, table, tokens.roll(1, 1), HEAD, scale=0.5, receiver=receiver)


def received(chunk: Chunk, plan: str, *, in_round: int | None = None) -> Tensor:
    """Return the sum of the gradients of a plan's forwards and backwards, such as `F0 B0 F1 B1`."""
    (info,) = chunk.infos
    sums, actions = Gradients([chunk], num_gradients={info.parameter: 2}), plan.split()
    sums.begin(len(actions) // 2)
    if in_round is not None:  # as where each microbatch is summed over ranks by itself
        sums._sums[0].expect(in_round)
    receiver, losses = sums.receiver(info.parameter), dict[int, Tensor]()
    for way, microbatch in ((action[0], int(action[1:])) for action in actions):
        if way == "F":
            losses[microbatch] = loss_of(info.parameter, microbatch, receiver)
        else:
            losses.pop(microbatch).backward()
    sums.finish()
    assert info.parameter.grad is None
    assert chunk.gradient.total is not None
    return chunk.spec.views(chunk.gradient.total)[0].clone()


def of_autograd(table: Tensor, microbatch: int) -> Tensor:
    table = table.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(table, microbatch), table)[0]


@pytest.mark.parametrize("tokens", [4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_microbatch_leaves_the_bits_that_autograd_returns(
    dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of several token slices are added in fp32, and rounded once."""
    monkeypatch.setattr(loss, "TOKENS_PER_SLICE", tokens)
    chunk = chunk_of_a_table(dtype)
    found = received(chunk, "F0 B0")
    assert found.dtype == dtype
    assert torch.equal(found, of_autograd(chunk.infos[0].parameter, 0))


@pytest.mark.parametrize("in_round", [None, 1])
@pytest.mark.parametrize("plan", ["F0 B0 F1 B1 F2 B2", "F0 F1 F2 B0 B1 B2", "F0 F1 B0 F2 B1 B2"])
def test_microbatches_are_summed_whatever_is_computed_before_their_gradients_arrive(
    plan: str, in_round: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, so that an order of additions changes the last places alone."""
    monkeypatch.setattr(loss, "TOKENS_PER_SLICE", 4)
    chunk = chunk_of_a_table(torch.float64)
    wanted = sum(of_autograd(chunk.infos[0].parameter, i) for i in range(3))
    assert isinstance(wanted, Tensor)
    assert relative(received(chunk, plan, in_round=in_round), wanted) <= 1e-14


def test_microbatches_of_a_narrow_table_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gradient of the head is never rounded: the error is smaller than that of gradients from autograd."""
    monkeypatch.setattr(loss, "TOKENS_PER_SLICE", 4)
    chunk = chunk_of_a_table(torch.bfloat16)
    table = chunk.infos[0].parameter
    exact = sum(of_autograd(table.double(), i) for i in range(2))
    rounded = sum(of_autograd(table, i).float() for i in range(2))
    assert isinstance(exact, Tensor)
    assert isinstance(rounded, Tensor)
    found = received(chunk, "F0 B0 F1 B1")
    assert found.dtype == torch.float32
    assert relative(found, exact) < relative(rounded, exact)


def test_a_frozen_table_gets_no_gradient() -> None:
    chunk = chunk_of_a_table(torch.float32)
    (info,) = chunk.infos
    sums = Gradients([chunk], num_gradients={info.parameter: 2})
    sums.begin(1)
    receiver = sums.receiver(info.parameter)
    info.parameter.requires_grad_(False)
    x = torch.ones(B, S, H, requires_grad=True)
    tokens = torch.zeros(B, S, dtype=torch.int64)
    y = x + lookup(tokens, info.parameter, receiver=receiver)
    sum_cross_entropy(y, info.parameter, tokens, HEAD, receiver=receiver).backward()
    sums.finish()
    assert x.grad is not None
    assert x.grad.any()
    assert chunk.gradient.total is not None
    assert not chunk.gradient.total.any()


def test_a_place_in_the_buffer_is_given_to_the_first_gradient_of_a_step_alone() -> None:
    """Later gradients of a step may be computed before earlier ones arrive, in the round that those belong to."""
    chunk = chunk_of_a_table(torch.float32)
    sums = Gradients([chunk])
    receiver = sums.receiver(chunk.infos[0].parameter)
    for _ in range(2):
        sums.begin(2)
        sums._sums[0].expect(1)
        first, second = receiver.room([torch.float32]), receiver.room([torch.float32])
        assert first is not None
        assert second is None
        receiver.add(first.fill_(2.0))
        assert receiver.room([torch.float32]) is None
        receiver.add(torch.ones(V, H))
        sums.finish()
        assert chunk.gradient.total is not None
        assert chunk.spec.views(chunk.gradient.total)[0].eq(3).all()
