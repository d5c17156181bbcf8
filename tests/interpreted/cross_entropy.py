"""Cross entropy and its gradient in place: one kernel, and two where the vocabulary is split."""

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.ops.kernels.cross_entropy import (
    Exchange,
    VocabularyPart,
    cross_entropy_fused,
    cross_entropy_in_torch,
    multiply_fused,
)
from tests.exactness import assert_as_exact

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """Logits of some tokens, of which every third is not counted, and the ranks that split the vocabulary."""

    columns: int
    batch: tuple[int, int] = (2, 3)
    padding: int = 0
    dtype: torch.dtype = torch.bfloat16
    largest: float = 10.0
    kind: str = "normal"
    scale: float | None = 0.125

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Return logits[B, S, V] with arbitrary values in the padding, and labels[B, S]."""
        generator = torch.Generator().manual_seed(self.columns)
        logits = torch.randn(*self.batch, self.columns, generator=generator) * self.largest / 4
        if self.kind == "near":  # adding two of these would lose their difference
            logits += self.largest * 10
        labels = torch.randint(self.columns - self.padding, self.batch, generator=generator)
        labels.view(-1)[::3] = IGNORED
        logits[..., self.columns - self.padding :] = 1e6
        return logits.to(device), labels.to(device)

    @property
    def part(self) -> VocabularyPart:
        """The whole vocabulary."""
        return VocabularyPart(range(self.columns - self.padding))

    @property
    def options(self) -> dict[str, Any]:
        return dict(scale=self.scale, dtype=self.dtype)


CASES = [
    Case(1),
    Case(7, padding=3, dtype=torch.float32),
    Case(512, (1, 2), dtype=torch.float16),
    Case(1000, (1, 4), largest=1e4),
    Case(1003, (1, 3), padding=2, kind="near"),
    Case(700, (1, 5), padding=500, dtype=torch.float32, largest=100.0),
    Case(777, scale=None),
    Case(64, (2, 0)),
    Case(600, (3, 1), scale=1024.0),
]


def exact(case: Case, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and `scale` times its gradient, in fp64."""
    wide = logits.double().requires_grad_()
    entries = wide[..., : case.columns - case.padding]
    loss = F.cross_entropy(entries.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, wide)
    return loss.detach(), gradient * (case.scale or 0)


def check(case: Case, device: str) -> None:
    logits, labels = case.inputs(device)
    loss, gradient = exact(case, logits, labels)
    of_torch = cross_entropy_in_torch(logits.clone(), labels, case.part, **case.options)
    memory = logits.clone()
    found = cross_entropy_fused(memory, labels, case.part, **case.options)
    assert_as_exact(found[0], of_torch[0], loss, case)
    if case.scale is None:
        assert found[1] is None
        assert torch.equal(memory, logits)  # nothing is written
        return
    assert found[1] is not None
    assert of_torch[1] is not None
    assert found[1].untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert_as_exact(found[1], of_torch[1], gradient, case)
    assert not found[1][..., len(case.part.entries) :].any()  # the padding's is 0, not merely small
    assert not found[1][labels < 0].any()


def check_split(case: Case, ranks: int, device: str) -> None:
    """Compute as `ranks` ranks do, which exchange three numbers of each token: two runs, the second knows the sums."""
    case = replace(case, columns=-(-case.columns // ranks) * ranks, padding=case.padding + -case.columns % ranks)
    logits, labels = case.inputs(device)
    loss, gradient = exact(case, logits, labels)
    used, width = case.columns - case.padding, case.columns // ranks
    results = []
    for function in (cross_entropy_in_torch, cross_entropy_fused):
        tops: list[Tensor] = []
        sums: list[Tensor] = []

        def run(exchange: Exchange, function: Any = function) -> list[tuple[Tensor, Tensor]]:
            parts = [part.contiguous().clone() for part in logits.split(width, -1)]
            spans = [range(i * width, max(i * width, min(used, (i + 1) * width))) for i in range(ranks)]
            return [
                function(part, labels, VocabularyPart(span, exchange), **case.options)
                for part, span in zip(parts, spans, strict=True)
            ]

        def noted(found: list[Tensor], x: Tensor, result: Tensor | None = None) -> Tensor:
            found.append(x.clone())
            return x if result is None else result

        run(Exchange(lambda x, tops=tops: noted(tops, x), lambda x: x))  # type: ignore[misc]
        top = torch.stack(tops).amax(0)
        run(Exchange(lambda x, top=top: top, lambda x, sums=sums: noted(sums, x)))  # type: ignore[misc]
        total = torch.stack(sums).sum(0)
        parts = run(Exchange(lambda x, top=top: top, lambda x, total=total: total))  # type: ignore[misc]
        assert all(torch.equal(part[0], parts[0][0]) for part in parts)
        results.append((parts[0][0], torch.cat([part[1] for part in parts], -1)))
    (of_torch, found) = results
    assert_as_exact(found[0], of_torch[0], loss, (case, ranks))
    assert_as_exact(found[1], of_torch[1], gradient, (case, ranks))


def check_not_finite(device: str) -> None:
    """A NaN, an ∞ or a row of −∞ gives NaN wherever it does so in torch, also in a row that is not counted."""
    every, in_first_tile, in_last_tile = slice(None), slice(10, 11), slice(690, 691)
    for value, at in product((torch.nan, torch.inf, -torch.inf), (every, in_first_tile, in_last_tile)):
        case = Case(700, (1, 2))
        logits, labels = case.inputs(device)
        for token in range(2):  # the first is not counted
            changed = logits.clone()
            changed[0, token, at] = value
            loss, gradient = cross_entropy_in_torch(changed.clone(), labels, case.part, **case.options)
            found, found_gradient = cross_entropy_fused(changed, labels, case.part, **case.options)
            torch.testing.assert_close(found, loss, equal_nan=True)
            assert found.isnan() == (at == every or value != -torch.inf)
            assert gradient is not None
            assert found_gradient is not None
            assert torch.equal(found_gradient.isnan(), gradient.isnan())


def check_factors(device: str) -> None:
    """The product is rounded once. By 1 nothing changes, but a backward that kept the tensor notices both."""
    for dtype, factor in product((torch.float32, torch.bfloat16), (1.0, 0.3, torch.nan)):
        x = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        found, before = x.clone(), x._version
        multiply_fused(found, torch.tensor(factor, device=device))
        assert found._version > before
        assert found.isnan().all() == math.isnan(factor)
        if not math.isnan(factor):
            assert_as_exact(found, x * factor, x.double() * factor, (dtype, factor))
    multiply_fused(x[:0], torch.tensor(2.0, device=device))


def check_all(device: str) -> None:
    check_factors(device)
    for case in CASES:
        check(case, device)
    check_split(Case(600, dtype=torch.float32, largest=1e4), 2, device)
    check_split(Case(503, (1, 5), padding=2, kind="near"), 2, device)
    check_split(Case(9, (1, 4), padding=6), 4, device)
    check_not_finite(device)
    case = Case(700)
    logits, labels = case.inputs(device)
    nothing = cross_entropy_fused(logits, labels.fill_(IGNORED), case.part, **case.options)
    assert not nothing[0]
    assert nothing[1] is not None
    assert not nothing[1].any()


def interpret() -> None:
    """Compare on a CPU, with sizes that are small there."""
    import parallel.ops.kernels.cross_entropy_triton as kernels

    kernels.WARPS = 4
    kernels.TILE_KEPT, kernels.MOST_KEPT = 128, 3  # a row of 300 stays in registers
    kernels.TILE, kernels.KEPT = 256, 2  # and of one of 600, the first tile is read twice
    kernels.TILE_READ_ONCE, kernels.WARPS_READ_ONCE = 128, 4
    check_all("cpu")
