"""Lookups in a table or in a part of it, and the gradient of the table: alone, or added to a sum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.ops.kernels.lookup import lookup_fused, lookup_in_torch
from parallel.optim.gradients import Gradients
from tests.exactness import assert_as_exact
from tests.parts import chunk_of


@dataclass(frozen=True)
class Case:
    """Tokens and a table; `drawn` is how many rows occur: tokens of few rows are many to each."""

    tokens: tuple[int, ...]
    rows: int
    width: int
    drawn: int
    padding_idx: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices, some of which are no rows, the table, and the gradient of the rows found."""
        generator = torch.Generator().manual_seed(self.rows)
        indices = torch.randint(self.drawn, self.tokens, generator=generator) * (self.rows + 2) // self.drawn - 1
        table = torch.randn(self.rows, self.width, generator=generator)
        dy = torch.randn(*self.tokens, 2 * self.width, generator=generator)[..., ::2]  # strided
        return indices.to(device), table.to(device, self.dtype), dy.to(device, self.dtype)


CASES = [
    Case((3, 15), 50, 7, 50),
    Case((2, 45), 20, 16, 3, padding_idx=0),
    Case((100,), 9, 5, 1, dtype=torch.float32),
    Case((33,), 1000, 24, 1000, dtype=torch.float16),
    Case((64,), 2, 8, 2, padding_idx=1),
    Case((1, 70), 6, 3, 4, dtype=torch.float32),
    Case((2, 0), 6, 3, 4),
]


def check(case: Case, device: str) -> None:
    indices, table, dy = case.inputs(device)

    def results(function: object, table: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        table = table.clone().requires_grad_()
        if function is lookup_fused:
            y = lookup_fused(indices, table, case.padding_idx)
        else:
            y = lookup_in_torch(indices, table, case.padding_idx, is_part=True)
        return y.detach(), torch.autograd.grad(y, table, dy)[0]

    found = results(lookup_fused, table, dy)
    of_torch = results(lookup_in_torch, table, dy)
    exact = results(lookup_in_torch, table.double(), dy.double())
    assert torch.equal(found[0], of_torch[0]), case
    assert_as_exact(found[1], of_torch[1], exact[1], case)
    untouched = torch.ones(case.rows, dtype=torch.bool).index_fill_(
        0, indices.cpu().clamp(0, case.rows - 1).flatten(), 0
    )
    assert not found[1][untouched.to(device)].any()
    if device == "cuda":  # where programs do not run one after another
        assert torch.equal(found[1], results(lookup_fused, table, dy)[1])


def check_sum(case: Case, device: str) -> None:
    """Let two microbatches add their rows to the buffer of a chunk, which is fp32 then."""
    indices, table, dy = case.inputs(device)
    chunk = chunk_of((case.rows, case.width), device=device)
    (info,) = chunk.infos
    sums = Gradients([chunk])
    sums.begin(2)
    chunk.gradient.accumulator.views()[0].fill_(torch.nan)  # as fresh memory may be
    for _ in range(2):
        found = lookup_fused(indices, info.parameter, case.padding_idx, sums.receiver(info.parameter))
        found.backward(dy.float())
    sums.finish()
    assert info.parameter.grad is None
    assert chunk.gradient.total is not None
    reference, exact = (
        torch.autograd.grad(lookup_in_torch(indices, leaf, case.padding_idx, is_part=True), leaf, dy.to(leaf.dtype))[0]
        for leaf in (table.to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    )
    assert_as_exact(chunk.spec.views(chunk.gradient.total)[0], 2 * reference, 2 * exact, case)


def check_all(device: str) -> None:
    for case in CASES:
        check(case, device)
    for case in CASES[:2]:
        check_sum(case, device)


def interpret() -> None:
    """Compare on a CPU."""
    check_all("cpu")
