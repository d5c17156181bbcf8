"""A sequence split over ranks: attention across all of them, what they keep for it and what they send."""

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

from models.opt import Block as TransformerBlock
from models.shapes import OPTShape
from parallel.config.parallel import ContextConfig, TensorConfig
from parallel.layout.rng import dropout
from parallel.mesh.collectives import Pending, all_to_all, start_rotate
from parallel.mesh.mesh import ALONE, Axis
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence import Dropping, Masking, ring, sequence_of
from parallel.sequence import blocks as kernels
from parallel.sequence.blocks import Block, Kernel, index
from parallel.sequence.ring import Zigzag
from tests.accounts import Handed, Held, bytes_kept, letters, mesh_of, mode_of, saved_for_backward, storage_of, value
from tests.harness import run
from tests.parity import Raw, batches_of, config_of, engine_of, relative, share_of

NOTATION = Path(__file__).parent.parent / "docs/notation.md"
KINDS = ("ring", "all_to_all")
B, HEADS, S, D = 3, 12, 24, 5


def context(size: int, kind: str) -> Any:
    return dict(size=size, kind=kind)


# -- attention against attention written down --------------------------------------------------------------------------


def qkv(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, S, 3 * HEADS * D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def masking_of(kind: str) -> Masking:
    """`padded`: at the start of one sample and at the end of another, so that some rows see nothing."""
    tokens = dropping = None
    if kind in ("padded", "both"):
        tokens = torch.ones(B, S, dtype=torch.bool)
        tokens[0, :7], tokens[1, 20:] = False, False
    if kind in ("dropout", "both"):
        lines = torch.arange(B).unsqueeze(1) * HEADS + torch.arange(HEADS)
        dropping = Dropping(0.3, torch.tensor(11), lines)
    return Masking(tokens, dropping)


def written_down(x: Tensor, masking: Masking) -> Tensor:
    """Row by row, as a formula has it: no line of it is shared with what it checks, but the draw of a dropout."""
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
        if (drop := masking.dropping) is not None:
            weights = dropout(weights, drop.p, drop.key, drop.lines * S + i, torch.arange(S))
        rows.append((weights.unsqueeze(-1) * v).sum(-2))
    return torch.stack(rows, 1).flatten(2)


def attended(rank: int, world_size: int, config: ContextConfig, masked: str) -> tuple[Tensor, Tensor]:
    """y of this rank's positions, and the gradient of qkv there, for a gradient of y that is y's own square."""
    sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)
    x = sequence.cut(qkv()).requires_grad_()
    y = sequence.attend(x, HEADS, masking_of(masked))
    y.backward(y.detach() ** 2)
    assert x.grad is not None
    return y.detach(), x.grad


def joined(parts: list[Tensor], config: ContextConfig) -> Tensor:
    """[B, S, ...] of every rank's positions."""
    places = [sequence_of(mesh_of(rank, TensorConfig(), config), config) for rank in range(config.size)]
    index = torch.cat([place.positions(S // config.size, torch.device("cpu")) for place in places])
    whole = torch.full_like(torch.cat(parts, 1), torch.nan)
    whole[:, index] = torch.cat(parts, 1)
    return whole


@pytest.mark.parametrize("masked", ["causal", "padded", "dropout", "both"])
@pytest.mark.parametrize(
    ("size", "kind"), [(1, "ring"), (2, "ring"), (3, "ring"), (4, "ring"), (2, KINDS[1]), (4, KINDS[1])]
)
def test_attention_across_ranks_is_attention_written_down(size: int, kind: Any, masked: str) -> None:
    config = ContextConfig(size, kind)
    found = run(attended, size, config, masked)
    x = qkv().requires_grad_()
    want = written_down(x, masking_of(masked))
    want.backward(want.detach() ** 2)
    assert x.grad is not None
    assert relative(joined([y for y, _ in found], config), want.detach()) < 1e-14
    assert relative(joined([dx for _, dx in found], config), x.grad) < 1e-14


def torchs_kernels(device: torch.device) -> list[Kernel]:
    if device.type == "cpu":
        return [kernels.FLASH_ON_CPU]
    is_known = torch.cuda.get_device_capability(device) >= (9, 0)  # to cuDNN; before, to flash alone
    return list(kernels.ON_GPU.values()) if is_known else [kernels.ON_GPU[SDPBackend.FLASH_ATTENTION]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("part", ["whole", "own", "earlier"])
def test_torchs_kernels_and_ours_are_one(dtype: torch.dtype, part: str) -> None:
    """Of all tokens, of the later half alone, and of the later half's queries to the earlier's keys: views, as a ring
    has them. In bf16 within two of its roundings, relative to a whole tensor: three products, each rounded once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and dtype == torch.bfloat16 else "cpu")
    drawn = torch.randn(2, 64, 4, 3, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, k, v, dy = drawn.permute(2, 0, 3, 1, 4).unbind(0)  # positions before heads in memory
    after, before = slice(32, 64), slice(0, 32)
    rows, columns = {"whole": (slice(0, 64),) * 2, "own": (after, after), "earlier": (after, before)}[part]
    block = Block((range(64)[rows],), (range(64)[columns],), 64, part != "earlier")
    of_all = kernels.written_out().forward(q, k, v, Block((range(64),), (range(64),), 64, True))

    def all_of(kernel: Kernel) -> list[Tensor]:
        keys, values, queries = k[:, :, columns], v[:, :, columns], q[:, :, rows]
        y, logsumexp = kernel.forward(queries, keys, values, block)
        saved = queries, keys, values, *(x[:, :, rows] for x in of_all)
        return [y, logsumexp, *kernel.backward(dy[:, :, rows], saved, block)]

    ours = all_of(kernels.written_out())
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
        (SDPBackend.EFFICIENT_ATTENTION, 8, Masking()),  # whose logsumexp is padded
        (SDPBackend.CUDNN_ATTENTION, 12, Masking()),  # torch would pad it
        (SDPBackend.CUDNN_ATTENTION, 8, masking_of("padded")),
        (SDPBackend.FLASH_ATTENTION, 8, masking_of("dropout")),
    ],
)
def test_a_gpu_attends_by_the_kernel_that_torch_would_choose(choice: SDPBackend, head: int, masking: Masking) -> None:
    """Of queries half as many as a rank has: of the blocks, some are that short."""
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
        assert found is kernels.ON_GPU.get(choice, kernels.written_out(False))
    else:
        assert found is kernels.written_out(False)


def test_what_is_written_out_is_as_exact_as_flash() -> None:
    """Scores in fp32, in both; large ones show it."""
    q, k, v, dy = (3 * torch.randn(4, 2, 3, 64, 16, generator=torch.Generator().manual_seed(0))).bfloat16().unbind(0)
    block = Block((range(64),), (range(64),), 64, True)
    exact = [x.double() for x in (q, k, v, dy)]

    def errors(kernel: Kernel) -> list[float]:
        found = []
        for a, b, c, d in ((q, k, v, dy), exact):
            y, logsumexp = kernel.forward(a, b, c, block)
            found.append([y, *kernel.backward(d, (a, b, c, y, logsumexp), block)])
        return [relative(got, want) for got, want in zip(*found, strict=True)]

    flash, ours = errors(kernels.FLASH_ON_CPU), errors(kernels.written_out())
    assert all(one < 1.5 * other for one, other in zip(ours, flash, strict=True)), (ours, flash)


@given(st.integers(1, 9))
def test_every_pair_is_seen_once_and_every_rank_sees_as_many(ranks: int) -> None:
    own, device = 6, torch.device("cpu")
    length = own * ranks
    forward, backward = torch.zeros(2, ranks, length, length, dtype=torch.int64).unbind(0)
    for rank in range(ranks):
        zigzag = Zigzag(Axis("context", rank, ranks, tuple(range(ranks)), None, ALONE.traffic))
        of_others = [(n, zigzag.of(n, own, Masking())) for n in range(ranks) if n != rank]
        begin, end = ([(rank, part) for part in parts] for parts in zigzag.of_itself(own, Masking()))
        whole = (rank, zigzag.of(rank, own, Masking()))
        for seen, parts in ((forward, [whole, *of_others]), (backward, [*begin, *of_others, *end])):
            for source, (block, rows, columns) in parts:
                pairs = block.pairs(device)
                assert torch.equal(index(zigzag.positions(rank, own), device)[rows], pairs.rows)
                assert torch.equal(index(zigzag.positions(source, own), device)[columns], pairs.columns)
                earlier = pairs.rows.unsqueeze(1) >= pairs.columns
                assert block.is_causal or earlier.all()
                seen[rank][pairs.rows.unsqueeze(1), pairs.columns] += earlier
    for seen in (forward, backward):
        assert torch.equal(seen.sum(0), torch.ones(length, length, dtype=torch.int64).tril())
        assert len(set(seen.sum((1, 2)).tolist())) == 1


def order(rank: int, world_size: int) -> list[str]:
    """What a ring does, in order: `>` a part is sent on, `=` one is there, `#` a block is attended to."""
    found: list[str] = []
    config = ContextConfig(world_size, "ring")
    sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)

    @dataclass(frozen=True)
    class Watched:
        pending: Pending

        def wait(self) -> Tensor:
            found.append("=")
            return self.pending.wait()

    def sent(x: Tensor, axis: Axis) -> Watched:
        found.append(">")
        return Watched(start_rotate(x, axis))

    def attends(how: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given_: Any) -> Any:
            found.append("#")
            return how(*given_)

        return watched

    torchs = kernels.FLASH_ON_CPU
    watched = Kernel(attends(torchs.forward), attends(torchs.backward))
    x = sequence.cut(qkv()).requires_grad_()
    with (
        patch.object(ring, "start_rotate", sent),
        patch.object(ring, "kernel_for", lambda q, masking, compiles: watched),
    ):
        y = sequence.attend(x, HEADS, Masking())
        found.append("|")
        y.sum().backward()
    return found


def test_the_next_part_is_on_its_way_while_one_is_attended_to() -> None:
    """Forward: its own, then two others. Backward, where gradients come one step behind, wanted when there is something
    to add: some of its own while the first part is coming, and the rest while its own gradients come home.
    """
    for found in run(order, 3):
        assert "".join(found) == ">#=>#=#|>#=>#>=#=>##="


def attended_in_16_bits(rank: int, world_size: int, config: ContextConfig, masked: str) -> tuple[Tensor, Tensor]:
    sequence = sequence_of(mesh_of(rank, TensorConfig(), config, connect=True), config)
    x = sequence.cut(qkv()).bfloat16().requires_grad_()
    y = sequence.attend(x, HEADS, masking_of(masked))
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("masked", ["causal", "padded"])
def test_a_ring_in_16_bits_errs_no_more_than_one_rank_does(masked: str) -> None:
    """A rank rounds a result once, and a ring each part of it before they are added, in fp32: by half as much again."""
    x = qkv().bfloat16().double().requires_grad_()
    want = written_down(x, masking_of(masked))
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


def test_what_is_exchanged_and_what_goes_around() -> None:
    given_, exchanged, rotated = zip(*run(moved, 3), strict=True)
    for rank in range(3):
        assert torch.equal(exchanged[rank], torch.cat([x[:, 2 * rank : 2 * rank + 2] for x in given_], 2))
        assert torch.equal(rotated[rank], given_[rank - 1])


# -- what is kept and sent ---------------------------------------------------------------------------------------------

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
    """T is what a microbatch has on one of n ranks."""
    tensor, config = LAYOUTS[layout]
    return letters(tensor, SHAPE, SAMPLES, LENGTH // config.size) | dict(n=config.size)


def kept(rank: int, world_size: int, tensor: TensorConfig, config: ContextConfig) -> tuple[int, int]:
    """Bytes that a block keeps; and that it holds, but not for all autograd knows."""
    mode = mode_of(rank, tensor, torch.float32, config)
    block = TransformerBlock(SHAPE, mode, seed=0)
    x = torch.ones(mode.activation_shape(SAMPLES, LENGTH, SHAPE.hidden_size), requires_grad=True)
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    held = Held()
    with held, saved_for_backward() as saved:
        y = block(x, Microbatch(tokens, tokens, torch.arange(SAMPLES)))
    known = bytes_kept(saved, block) - x.nbytes + y.nbytes
    assert storage_of(x) in map(storage_of, saved)
    return bytes_kept(saved, block), held.now_or_soon(known) - known


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_keeps_its_own_tokens_alone(layout: str) -> None:
    """As without, of fewer tokens; the exchange keeps attention's result once more, as it was before it was given
    back.
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
    """Bytes over the context axis, forward and backward of one block; they are what our own counters say."""
    mode = mode_of(rank, tensor, torch.bfloat16, config)
    block = TransformerBlock(SHAPE, mode, seed=0)
    group = mode.mesh.axis("context").group
    assert group is not None
    x = torch.ones(mode.activation_shape(SAMPLES, LENGTH, SHAPE.hidden_size), dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    found = []
    handed = Handed("forward")
    with handed:
        y = block(x, Microbatch(tokens, tokens, torch.arange(SAMPLES)))
        handed.enter("backward")
        y.sum().backward()
    assert mode.mesh.traffic.bytes == handed.bytes
    for way in ("forward", "backward"):
        calls = [call for call in handed.calls if call.group == group.group_name and call.part == way]
        found.append(sum(call.sent * call.bytes / call.elements for call in calls))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_sends_what_the_table_says(layout: str) -> None:
    tensor, config = LAYOUTS[layout]
    row = re.search(rf"^\| {config.kind} \| (.*) \| (.*) \|$", NOTATION.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    wanted = [2 * value(formula, names_of(layout)) for formula in row.groups()]  # bytes of an element in bf16
    for found in run(sent, tensor.size * config.size, tensor, config):
        assert found == wanted


# -- a sequence that does not come out even ----------------------------------------------------------------------------


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
            "DataError: batch: input_ids: a sequence of 10 is not a multiple of 4, the parts that parallel.context"
            " splits it into: try 8 or 12."
        )
