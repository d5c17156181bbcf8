"""A sequence split over ranks: attention across all of them, the bytes they keep for it and the bytes they send."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from models.opt.layers import block_of
from models.opt.shape import OPTShape
from parallel.config.parallel import ContextConfig, TensorConfig
from parallel.layout.rng import dropout
from parallel.mesh.collectives import Pending, all_to_all, start_rotate
from parallel.mesh.mesh import ALONE, Axis
from parallel.ops.kernels.heads import by_head, parts_of
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence import AttentionDropout, Masking, kernels, ring, sequence_of
from parallel.sequence.blocks import Block, positions_in
from parallel.sequence.kernels import Kernel
from parallel.sequence.ring import Zigzag
from tests.accounts import (
    Allocations,
    RecordedCalls,
    bytes_kept,
    letters,
    mesh_of,
    mode_of,
    saved_for_backward,
    storage_of,
    value,
)
from tests.harness import run
from tests.parity import Raw, batches_of, config_of, engine_of, relative, share_of

NOTATION = Path(__file__).parent.parent / "docs/notation.md"
KINDS = ("ring", "all_to_all")
B, HEADS, S, D = 3, 12, 24, 5


def context(size: int, kind: str) -> Any:
    return dict(size=size, kind=kind)


# -- attention against its formula -------------------------------------------------------------------------------------


def qkv(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, S, 3 * HEADS * D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def masking_of(kind: str) -> Masking:
    """Return a masking; `padded` is at the start of one sample, where rows see nothing, and at the end of another."""
    tokens = drop = None
    if kind in ("padded", "both"):
        tokens = torch.ones(B, S, dtype=torch.bool)
        tokens[0, :7], tokens[1, 20:] = False, False
    if kind in ("dropout", "both"):
        heads = torch.arange(B).unsqueeze(1) * HEADS + torch.arange(HEADS)
        drop = AttentionDropout(0.3, torch.tensor(11), heads)
    return Masking(tokens, drop)


def reference(x: Tensor, masking: Masking) -> Tensor:
    """Compute attention row by row, as its formula says. It shares only the drawing of dropout with what it checks."""
    q, k, v = (part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in x.chunk(3, -1))
    rows = []
    for i in range(S):
        seen = torch.zeros(B, 1, S, dtype=torch.bool)
        seen[..., : i + 1] = True
        if masking.tokens is not None:
            seen &= masking.tokens.unsqueeze(1)
        scores = (q[:, :, i : i + 1] * k).sum(-1) / D**0.5
        weights = torch.where(seen, scores - scores.detach().amax(-1, keepdim=True), -torch.inf).exp()
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
        if (drop := masking.dropout) is not None:
            weights = dropout(weights, drop.p, drop.key, drop.heads * S + i, torch.arange(S))
        rows.append((weights.unsqueeze(-1) * v).sum(-2))
    return torch.stack(rows, 1).flatten(2)


def heads_of(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v[B, heads, S, D] of a joint linear's output."""
    q, k, v = parts_of(qkv, HEADS, HEADS)
    return by_head(q), by_head(k), by_head(v)


def attended(rank: int, world_size: int, config: ContextConfig, masked: str) -> tuple[Tensor, Tensor]:
    """Return y at this rank's positions, and the gradient of qkv there, where y's gradient is the square of y."""
    sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)
    x = sequence.local_part(qkv()).requires_grad_()
    y = sequence.attend(*heads_of(x), masking_of(masked))
    y.backward(y.detach() ** 2)
    assert x.grad is not None
    return y.detach(), x.grad


def joined(parts: list[Tensor], config: ContextConfig) -> Tensor:
    """Return [B, S, ...] in the order of positions, from every rank's part."""
    splits = [sequence_of(mesh_of(rank, TensorConfig(), config), config) for rank in range(config.size)]
    index = torch.cat([split.positions(S // config.size, torch.device("cpu")) for split in splits])
    whole = torch.full_like(torch.cat(parts, 1), torch.nan)
    whole[:, index] = torch.cat(parts, 1)
    return whole


@pytest.mark.parametrize("masked", ["causal", "padded", "dropout", "both"])
@pytest.mark.parametrize(
    ("size", "kind"), [(1, "ring"), (2, "ring"), (3, "ring"), (4, "ring"), (2, KINDS[1]), (4, KINDS[1])]
)
def test_attention_across_ranks_equals_its_formula(size: int, kind: Any, masked: str) -> None:
    config = ContextConfig(size, kind)
    found = run(attended, size, config, masked)
    x = qkv().requires_grad_()
    want = reference(x, masking_of(masked))
    want.backward(want.detach() ** 2)
    assert x.grad is not None
    assert relative(joined([y for y, _ in found], config), want.detach()) < 1e-14
    assert relative(joined([dx for _, dx in found], config), x.grad) < 1e-14


def torchs_kernels(device: torch.device) -> list[Kernel]:
    if device.type == "cpu":
        return [kernels.FLASH_ON_CPU]
    is_known = torch.cuda.get_device_capability(device) >= (9, 0)  # cuDNN supports it; older devices have flash alone
    return list(kernels.ON_GPU.values()) if is_known else [kernels.ON_GPU[SDPBackend.FLASH_ATTENTION]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("part", ["whole", "own", "earlier"])
def test_torchs_kernels_equal_unfused_attention(dtype: torch.dtype, part: str) -> None:
    """All tokens attend to all, the later half to itself, and the later half to the earlier: views, as a ring has them.

    In bf16 they agree within two of its roundings, relative to a whole tensor: three products, each rounded once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and dtype == torch.bfloat16 else "cpu")
    drawn = torch.randn(2, 64, 4, 3, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, k, v, dy = drawn.permute(2, 0, 3, 1, 4).unbind(0)  # positions before heads in memory
    after, before = slice(32, 64), slice(0, 32)
    rows, columns = {"whole": (slice(0, 64),) * 2, "own": (after, after), "earlier": (after, before)}[part]
    block = Block((range(64)[rows],), (range(64)[columns],), 64, part != "earlier")
    of_all = kernels.unfused().forward(q, k, v, Block((range(64),), (range(64),), 64, True))

    def all_of(kernel: Kernel) -> list[Tensor]:
        keys, values, queries = k[:, :, columns], v[:, :, columns], q[:, :, rows]
        y, logsumexp = kernel.forward(queries, keys, values, block)
        saved = queries, keys, values, *(x[:, :, rows] for x in of_all)
        return [y, logsumexp, *kernel.backward(dy[:, :, rows], saved, block)]

    ours = all_of(kernels.unfused())
    torchs = torchs_kernels(device)
    assert kernels.kernel_for(q, Masking()) in torchs
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for kernel in torchs:
        for got, want in zip(all_of(kernel), ours, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            assert relative(got, want) < bound


@pytest.mark.parametrize(
    ("choice", "head", "masking"),
    [
        (SDPBackend.CUDNN_ATTENTION, 8, Masking()),
        (SDPBackend.FLASH_ATTENTION, 64, Masking()),
        (SDPBackend.EFFICIENT_ATTENTION, 8, Masking()),  # its logsumexp is padded
        (SDPBackend.CUDNN_ATTENTION, 12, Masking()),  # torch would pad it
        (SDPBackend.CUDNN_ATTENTION, 8, masking_of("padded")),
        (SDPBackend.FLASH_ATTENTION, 8, masking_of("dropout")),
    ],
)
def test_a_gpu_attends_with_the_kernel_that_torch_would_choose(choice: SDPBackend, head: int, masking: Masking) -> None:
    """torch is asked for half of a rank's queries, since some blocks have only so many."""
    asked: list[torch.Size] = []

    class OnGpu(Tensor):
        is_cuda = True

    def choose(q: Tensor, *_: Tensor, is_causal: bool) -> int:
        asked.append(q.shape)
        return choice.value

    with patch.object(torch, "_fused_sdp_choice", choose):
        found = kernels.kernel_for(torch.empty(2, 3, 32, head).as_subclass(OnGpu), masking)
    if masking == Masking() and head % 8 == 0:
        assert asked == [(2, 3, 16, head)]
        assert found is kernels.ON_GPU.get(choice, kernels.unfused(False))
    else:
        assert found is kernels.unfused(False)


def test_unfused_attention_is_as_exact_as_flash() -> None:
    """Both compute scores in fp32, which matters for large ones."""
    q, k, v, dy = (3 * torch.randn(4, 2, 3, 64, 16, generator=torch.Generator().manual_seed(0))).bfloat16().unbind(0)
    block = Block((range(64),), (range(64),), 64, True)
    exact = [x.double() for x in (q, k, v, dy)]

    def errors(kernel: Kernel) -> list[float]:
        found = []
        for a, b, c, d in ((q, k, v, dy), exact):
            y, logsumexp = kernel.forward(a, b, c, block)
            found.append([y, *kernel.backward(d, (a, b, c, y, logsumexp), block)])
        return [relative(got, want) for got, want in zip(*found, strict=True)]

    flash, ours = errors(kernels.FLASH_ON_CPU), errors(kernels.unfused())
    assert all(one < 1.5 * other for one, other in zip(ours, flash, strict=True)), (ours, flash)


@given(st.integers(1, 9), st.none() | st.integers(1, 60))
def test_every_pair_is_computed_once_and_every_rank_computes_as_many(ranks: int, window: int | None) -> None:
    """Ranks compute unequally many pairs with a window, but no block has a query that sees nothing in it."""
    local, device, masking = 6, torch.device("cpu"), Masking(window=window)
    length = local * ranks
    forward, backward = torch.zeros(2, ranks, length, length, dtype=torch.int64).unbind(0)
    for rank in range(ranks):
        zigzag = Zigzag(Axis("context", rank, ranks, tuple(range(ranks)), None, ALONE.traffic))
        remote = [(n, part) for n in range(ranks) if n != rank for part in zigzag.parts_of(n, local, masking)]
        first, last = ([(rank, part) for part in parts] for parts in zigzag.own_parts(local, masking))
        own = [(rank, part) for part in zigzag.parts_of(rank, local, masking)]
        for seen, parts in ((forward, [*own, *remote]), (backward, [*first, *remote, *last])):
            for source, (block, rows, columns) in parts:
                pairs = block.pairs(device)
                assert torch.equal(positions_in(zigzag.positions(rank, local), device)[rows], pairs.rows)
                assert torch.equal(positions_in(zigzag.positions(source, local), device)[columns], pairs.columns)
                assert block.is_causal or (pairs.rows.unsqueeze(1) >= pairs.columns).all()
                hidden = pairs.hidden()
                visible = torch.ones(len(pairs.rows), len(pairs.columns)) if hidden is None else ~hidden[0, 0]
                assert visible.any(1).all()
                seen[rank][pairs.rows.unsqueeze(1), pairs.columns] += visible.to(torch.int64)
    for seen in (forward, backward):
        in_window = torch.ones(length, length, dtype=torch.int64).tril().triu(1 - (window or length))
        assert torch.equal(seen.sum(0), in_window)
        assert window is not None or len(set(seen.sum((1, 2)).tolist())) == 1


def order(rank: int, world_size: int) -> list[str]:
    """Return what a ring does, in order: `>` sends keys and values on, `=` receives some, `#` computes a block."""
    found: list[str] = []
    config = ContextConfig(world_size, "ring")
    sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)

    @dataclass(frozen=True)
    class Recorded:
        pending: Pending

        def wait(self) -> Tensor:
            found.append("=")
            return self.pending.wait()

    def sent(x: Tensor, axis: Axis) -> Recorded:
        found.append(">")
        return Recorded(start_rotate(x, axis))

    def recorded(attend: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found.append("#")
            return attend(*arguments)

        return call

    torchs = kernels.FLASH_ON_CPU
    kernel = Kernel(recorded(torchs.forward), recorded(torchs.backward))
    x = sequence.local_part(qkv()).requires_grad_()
    with (
        patch.object(ring, "start_rotate", sent),
        patch.object(ring, "kernel_for", lambda q, masking, compiles: kernel),
    ):
        y = sequence.attend(*heads_of(x), Masking())
        found.append("|")
        y.sum().backward()
    return found


def test_keys_are_in_flight_while_others_are_attended_to() -> None:
    """Forward: a rank computes its own block, then those of two others, each while the next is in flight.

    Backward: gradients follow one step behind, and are waited for once there is something to add. A part of its own
    block is computed while the first keys are in flight, and the rest while its own gradients return.
    """
    for found in run(order, 3):
        assert "".join(found) == ">#=>#=#|>#=>#>=#=>##="


def attended_in_16_bits(rank: int, world_size: int, config: ContextConfig, masked: str) -> tuple[Tensor, Tensor]:
    sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)
    x = sequence.local_part(qkv()).bfloat16().requires_grad_()
    y = sequence.attend(*heads_of(x), masking_of(masked))
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("masked", ["causal", "padded"])
def test_a_ring_in_16_bits_is_about_as_exact_as_one_rank(masked: str) -> None:
    """One rank rounds a result once. A ring rounds each part of it before they are added in fp32: half as much more."""
    x = qkv().bfloat16().double().requires_grad_()
    want = reference(x, masking_of(masked))
    want.backward(torch.ones_like(want))
    assert x.grad is not None
    errors = []
    for size in (1, 4):
        config = ContextConfig(size, "ring")
        found = run(attended_in_16_bits, size, config, masked)
        ys, dxs = (joined([pair[i] for pair in found], config) for i in range(2))
        errors.append((relative(ys, want.detach()), relative(dxs, x.grad)))
    assert all(ours <= 1.5 * single < 2**-6 for single, ours in zip(*errors, strict=True)), errors


def moved(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    axis = mesh_of(rank, TensorConfig(), ContextConfig(world_size, "ring"), connect=True).axis("context")
    mine = torch.arange(2 * 6 * 4).view(2, 6, 4) + 1000 * rank
    return mine, all_to_all(mine, 1, 2, axis), start_rotate(mine, axis).wait()


def test_all_to_all_and_rotate_move_the_right_parts() -> None:
    given_, exchanged, rotated = zip(*run(moved, 3), strict=True)
    for rank in range(3):
        assert torch.equal(exchanged[rank], torch.cat([x[:, 2 * rank : 2 * rank + 2] for x in given_], 2))
        assert torch.equal(rotated[rank], given_[rank - 1])


# -- bytes kept and bytes sent -----------------------------------------------------------------------------------------

SHAPE = OPTShape(
    vocab_size=37,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    ffn_dim=64,
    max_position_embeddings=16,
    word_embed_proj_dim=64,
    dropout=0.0,
)
LAYOUTS: dict[str, tuple[TensorConfig, ContextConfig]] = {
    "ring 2": (TensorConfig(), ContextConfig(2, "ring")),
    "ring 4": (TensorConfig(), ContextConfig(4, "ring")),
    "all_to_all 2": (TensorConfig(), ContextConfig(2, "all_to_all")),
    "all_to_all 4": (TensorConfig(), ContextConfig(4, "all_to_all")),
    "ring 2 × 1d": (TensorConfig("1d", 2), ContextConfig(2, "ring")),
    "all_to_all 2 × 2d": (TensorConfig("2d", 4), ContextConfig(2, "all_to_all")),
}
SAMPLES, LENGTH = 8, 16


def names_of(layout: str) -> dict[str, int]:
    """Return the letters of docs/notation.md; T is a microbatch's tokens on one of the n ranks of the context axis."""
    tensor, config = LAYOUTS[layout]
    return letters(tensor, SHAPE, SAMPLES, LENGTH // config.size) | dict(n=config.size)


def kept(rank: int, world_size: int, tensor: TensorConfig, config: ContextConfig) -> tuple[int, int]:
    """Return the bytes that a block keeps for backward, and those that stay allocated beside what autograd knows."""
    mode = mode_of(rank, tensor, torch.float32, config)
    block = block_of(SHAPE, mode, 0)
    x = torch.ones(mode.activation_shape(SAMPLES, LENGTH, SHAPE.hidden_size), requires_grad=True)
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    held = Allocations()
    with held, saved_for_backward() as saved:
        y = block(x, Microbatch(tokens, tokens, torch.arange(SAMPLES)))
    known = bytes_kept(saved, block) - x.nbytes + y.nbytes
    assert storage_of(x) in map(storage_of, saved)
    return bytes_kept(saved, block), held.wait_for(known) - known


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_keeps_only_its_own_tokens(layout: str) -> None:
    """It keeps as much as a block that is not split keeps of as many tokens.

    all_to_all keeps attention's result once more, in the form that it has before the exchange back.
    """
    tensor, config = LAYOUTS[layout]
    names = names_of(layout)
    formula = re.search(r"^ *kept by a block +(.*)$", mode_of(0, tensor, torch.float32).__doc__ or "", re.MULTILINE)
    assert formula is not None
    wanted = value(formula[1], names)
    if config.kind == "all_to_all":
        wanted += names["T"] * names["H"] / names["p"]
    for found in run(kept, tensor.size * config.size, tensor, config):
        assert found == (wanted * 4, 0)


def sent(rank: int, world_size: int, tensor: TensorConfig, config: ContextConfig) -> list[float]:
    """Return the bytes sent over the context axis in a block's forward and backward; our own counters agree."""
    mode = mode_of(rank, tensor, torch.bfloat16, config)
    block = block_of(SHAPE, mode, 0)
    group = mode.mesh.axis("context").group
    assert group is not None
    x = torch.ones(mode.activation_shape(SAMPLES, LENGTH, SHAPE.hidden_size), dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    found = []
    handed = RecordedCalls("forward")
    with handed:
        y = block(x, Microbatch(tokens, tokens, torch.arange(SAMPLES)))
        handed.enter("backward")
        y.sum().backward()
    assert mode.mesh.traffic.bytes == handed.bytes
    for part in ("forward", "backward"):
        calls = [call for call in handed.calls if call.group == group.group_name and call.part == part]
        found.append(sum(call.sent * call.bytes / call.elements for call in calls))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_sends_as_much_as_the_table_says(layout: str) -> None:
    tensor, config = LAYOUTS[layout]
    row = re.search(rf"^\| {config.kind} \| (.*) \| (.*) \|$", NOTATION.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    wanted = [2 * value(formula, names_of(layout)) for formula in row.groups()]  # bytes of an element in bf16
    for found in run(sent, tensor.size * config.size, tensor, config):
        assert found == wanted


# -- a sequence that cannot be split evenly ----------------------------------------------------------------------------


def refused(rank: int, world_size: int, raw: Raw) -> str:
    engine = engine_of(rank, world_size, raw)
    try:
        engine.train_step(share_of(batches_of(1, sequence=10)[0], engine))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_batch_whose_sequence_does_not_divide_is_refused_on_every_rank() -> None:
    raw = config_of(dict(context=context(2, "ring")), data=dict(sequence_length=12))
    raw["model"] = asdict(SHAPE)
    for found in run(refused, 2, raw):
        assert found == (
            "DataError: batch: input_ids: a sequence of 10 is not a multiple of 4, the parts that the layout"
            " splits it into: try 8 or 12."
        )
