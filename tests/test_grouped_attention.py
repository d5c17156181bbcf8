"""Attention with fewer heads of keys and values than of queries, and with windows, in every way to split a sequence."""

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from parallel.config.parallel import ContextConfig, TensorConfig
from parallel.layout.rng import dropout
from parallel.mesh.mesh import ALONE, Axis
from parallel.sequence import UNSPLIT, AttentionDropout, Masking, SequenceSplit, kernels, sequence_of
from parallel.sequence.ring import Zigzag
from tests.accounts import RecordedCalls, mesh_of, saved_for_backward, storage_of
from tests.harness import run
from tests.parity import relative

B, S, D = 3, 24, 5
WINDOWS = (None, 1, 3, S - 1, S, S + 5)
MASKED = ("causal", "padded", "dropout", "both")
SPLITS: list[tuple[Literal["ring", "all_to_all"], int]] = [("ring", 2), ("ring", 3), ("all_to_all", 2)]


@dataclass(frozen=True)
class Case:
    """The arguments of one attention: numbers of heads, a window, and what else is masked."""

    heads: int
    kv_heads: int
    window: int | None
    masked: str

    def drawn(self) -> tuple[Tensor, ...]:
        """Return q, k and v, [B, heads or kv_heads, S, D] in fp64, and the gradient of y, [B, S, heads · D]."""
        generator = torch.Generator().manual_seed(0)
        numbers = self.heads, self.kv_heads, self.kv_heads, self.heads
        q, k, v, dy = (torch.randn(B, S, n, D, generator=generator, dtype=torch.float64) for n in numbers)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dy.flatten(2)

    def masking(self) -> Masking:
        """Return the masking: padding is at the start of one sample, and at the end of another."""
        tokens = drop = None
        if self.masked in ("padded", "both"):
            tokens = torch.ones(B, S, dtype=torch.bool)
            tokens[0, :7], tokens[1, 17:] = False, False
        if self.masked in ("dropout", "both"):
            heads = torch.arange(B).unsqueeze(1) * self.heads + torch.arange(self.heads)
            drop = AttentionDropout(0.3, torch.tensor(11), heads)
        return Masking(tokens, drop, self.window)


HEADS = (6, 2), (4, 1), (8, 8)
CASES = [Case(*heads, window, masked) for heads, window, masked in product(HEADS, WINDOWS, MASKED)]


def reference(q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> Tensor:
    """Compute attention as its formula says, with each key written out for every query head and a mask of positions.

    It shares only the drawing of dropout with what it checks. A query that sees no key has a result of zero.
    """
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(length, device=q.device).unsqueeze(1), torch.arange(length, device=q.device)
    seen = (j <= i).expand(len(q), 1, length, length)
    if masking.window is not None:
        seen = seen & (j > i - masking.window)
    if masking.tokens is not None:
        seen = seen & masking.tokens[:, None, None]
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).where(seen.any(-1, keepdim=True), 0.0)
    if (drop := masking.dropout) is not None:
        weights = dropout(weights, drop.p, drop.key, drop.heads.unsqueeze(-1) * length + i[:, 0], j)
    return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)


def results_of(attend: Any, case: Case, sequence: SequenceSplit = UNSPLIT) -> list[Tensor]:
    """Return y and the gradients of q, k and v at this rank's positions, all as [B, S_context, ...]."""
    q, k, v = (sequence.local_part(x.transpose(1, 2)).requires_grad_() for x in case.drawn()[:3])
    y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), case.masking())
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), sequence.local_part(case.drawn()[3]))]


def compare(found: list[Tensor], case: Case) -> None:
    """Compare with the reference. Each number is a sum of at most 24 products, so that 1e-12 is far above rounding."""
    for name, got, want in zip(("y", "dq", "dk", "dv"), found, results_of(reference, case), strict=True):
        assert (got - want).abs().max() < 1e-12, f"{name} of {case}"


def test_whole_sequences_are_attended_to_as_the_formula_says() -> None:
    for case in CASES:
        compare(results_of(UNSPLIT.attend, case), case)


def test_keys_are_repeated_where_no_kernel_takes_groups() -> None:
    """A GPU has no such kernel in fp32, for instance."""
    with patch.object(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.MATH.value):
        for case in CASES:
            compare(results_of(UNSPLIT.attend, case), case)


def attended(rank: int, world_size: int, config: ContextConfig, cases: list[Case]) -> list[list[Tensor]]:
    sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)
    return [results_of(sequence.attend, case, sequence) for case in cases]


@pytest.mark.parametrize(("kind", "size"), SPLITS)
def test_split_sequences_are_attended_to_as_the_formula_says(kind: Any, size: int) -> None:
    config = ContextConfig(size, kind)
    cases = [case for case in CASES if kind == "ring" or case.kv_heads % size == 0]
    found = run(attended, size, config, cases)
    splits = [sequence_of(mesh_of(rank, TensorConfig(), config), config) for rank in range(size)]
    index = torch.cat([one.positions(S // size, torch.device("cpu")) for one in splits]).argsort()
    for case, parts in zip(cases, zip(*found, strict=True), strict=True):
        compare([torch.cat(of_ranks, 1)[:, index] for of_ranks in zip(*parts, strict=True)], case)


def test_memory_may_be_laid_out_in_any_order() -> None:
    """The numbers of one head need not be next to each other, and a gradient may be one number in all places."""
    case = Case(6, 2, 3, "causal")
    for masking in (Masking(), case.masking(), Case(6, 2, 3, "dropout").masking()):
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in case.drawn()[:3])
        found, want = (attend(q, k, v, masking) for attend in (UNSPLIT.attend, reference))
        ours, theirs = (torch.autograd.grad(y.sum(), (q, k, v)) for y in (found, want))
        for got, expected in zip((found, *ours), (want, *theirs), strict=True):
            assert (got - expected).abs().max() < 1e-12


# -- bytes -------------------------------------------------------------------------------------------------------------


def sent(rank: int, world_size: int, config: ContextConfig) -> list[dict[str, int]]:
    """Return the bytes that a rank sends with as many k, v heads as q heads, and with a quarter of them."""
    found = []
    for kv_heads, window in ((8, None), (2, None), (2, 3)):
        sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)
        with RecordedCalls("both") as calls:
            results_of(sequence.attend, Case(8, kv_heads, window, "causal"), sequence)
        assert sequence.axis.traffic.bytes == calls.bytes
        found.append(dict(calls.bytes))
    return found


def test_around_a_ring_keys_and_their_gradients_travel_once_for_each_group() -> None:
    """Each of 2 ranks sends its k and v forward and again in backward, and then the gradients of the other's."""
    for whole, quarter, windowed in run(sent, 2, ContextConfig(2, "ring")):
        assert whole == dict(rotate=3 * 2 * B * 8 * (S // 2) * D * 8)  # k and v, fp64
        assert quarter == windowed == dict(rotate=whole["rotate"] // 4)


def test_all_to_all_exchanges_queries_and_results_beside_the_keys_of_groups() -> None:
    """Forward and backward each exchange q and y of 8 heads, and k and v of 8 heads or of 2."""
    for whole, quarter, windowed in run(sent, 2, ContextConfig(2, "all_to_all")):
        of_a_head = 2 * B * (S // 2) * D * 8  # forward and backward, fp64
        assert whole == dict(all_to_all=(2 * 8 + 2 * 8) * of_a_head)
        assert quarter == windowed == dict(all_to_all=(2 * 8 + 2 * 2) * of_a_head)


@pytest.mark.slow
def test_compiled_code_attends_to_whole_sequences_in_one_graph() -> None:
    for case in (Case(6, 2, None, "causal"), Case(6, 2, 3, "padded")):
        compiled = torch.compile(UNSPLIT.attend, backend="eager", fullgraph=True)
        compare(results_of(compiled, case), case)


# -- kernels of a GPU --------------------------------------------------------------------------------------------------


def on_gpu(heads: int, kv_heads: int, length: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return q, k, v[2, heads or kv_heads, length, 64] and dy[2, length, heads · 64]."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    torch.manual_seed(0)
    numbers = heads, kv_heads, kv_heads, heads
    q, k, v, dy = (torch.randn(2, length, n, 64, device="cuda", dtype=dtype) for n in numbers)
    return *(x.transpose(1, 2).requires_grad_() for x in (q, k, v)), dy.flatten(2)


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", ["causal", "padded", "dropout"])
@pytest.mark.parametrize("window", [None, 2, 100, 256])
def test_a_gpu_attends_as_the_formula_says(
    window: int | None, masked: str, dtype: torch.dtype, is_compiled: bool
) -> None:
    """A tensor differs by at most two of its roundings in 16 bits, and in 32 bits by those of sums of 256 products.

    A query that sees no key is padding itself: its result is any number, and has no gradient.
    """
    q, k, v, dy = on_gpu(8, 2, 256, dtype)
    tokens = drop = None
    seeing = torch.ones(2, 256, 1, dtype=torch.bool, device="cuda")
    if masked == "padded":
        tokens = torch.ones(2, 256, dtype=torch.bool, device="cuda")
        tokens[0, :70], tokens[1, 200:] = False, False
        seeing[:, :, 0] = tokens
    if masked == "dropout":
        drop = AttentionDropout(0.3, torch.tensor(11, device="cuda"), torch.arange(16, device="cuda").view(2, 8))
    masking = Masking(tokens, drop, window)
    # not inductor, which leaves variables in the environment: what is chosen while a graph is traced matters here
    attend = torch.compile(UNSPLIT.attend, backend="aot_eager") if is_compiled else UNSPLIT.attend
    y = attend(q, k, v, masking)
    assert y.isfinite().all()
    y, dy = y.where(seeing, 0), dy.where(seeing, 0)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = reference(exact[0], exact[1], exact[2], masking).where(seeing, 0)
    ours = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    theirs = [want, *torch.autograd.grad(want, exact, dy.double())]
    for got, expected in zip(ours, theirs, strict=True):
        assert relative(got.detach(), expected.detach()) < (2**-7 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
def test_a_gpu_holds_neither_scores_nor_a_mask_nor_repeated_keys(window: int | None) -> None:
    """A mask of one byte for each pair of positions would be larger than all that attention allocates."""
    length = 16384
    q, k, v, dy = on_gpu(4, 1, length)
    with saved_for_backward() as saved:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = UNSPLIT.attend(q, k, v, Masking(window=window))
        torch.autograd.grad(y, (q, k, v), dy)
    assert torch.cuda.max_memory_allocated() - before < length**2
    kept = {storage_of(x): x.untyped_storage().nbytes() for x in saved}
    logsumexp = 2 * 4 * length * 4
    assert sum(kept.values()) <= 2 * q.nbytes + k.nbytes + v.nbytes + logsumexp + 1024  # 1024: random states


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 40, 64, 100, 150, 250, 383])
def test_flash_has_the_window_of_each_block_of_a_ring(window: int) -> None:
    """There are 3 ranks of 128 positions each. In bf16 two kernels agree within two of its roundings."""
    ranks, local = 3, 128
    q, k, v, dy = on_gpu(8, 2, local)
    dy = dy.unflatten(2, (8, 64)).transpose(1, 2)
    flash = kernels.kernel_for(q, Masking(window=window))
    assert flash is kernels.ON_GPU[SDPBackend.FLASH_ATTENTION]
    for rank in range(ranks):
        zigzag = Zigzag(Axis("context", rank, ranks, tuple(range(ranks)), None, ALONE.traffic))
        for source in range(ranks):
            for block, rows, columns in zigzag.parts_of(source, local, Masking(window=window)):
                found = []
                for kernel in (flash, kernels.unfused()):
                    queries, keys, values = (
                        x.detach()[..., part, :] for x, part in ((q, rows), (k, columns), (v, columns))
                    )
                    results = kernel.forward(queries, keys, values, block)
                    grads = kernel.backward(dy[..., rows, :], (queries, keys, values, *results), block)
                    found.append((*results, *grads))
                for got, want in zip(*found, strict=True):
                    error = (got.double() - want.double()).norm() / (1e-2 * want[..., 0].numel() ** 0.5 + want.norm())
                    assert error < 2**-7, (block, error)
