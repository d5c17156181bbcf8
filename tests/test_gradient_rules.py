"""Each gradient rule separately, on the fewest ranks that can break it; most of `tests.mutants` must fail here.

Microbatches have different numbers of labels, and so have replicas, so that a mean of their means would be wrong.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import build
from models.opt.layers import block_of
from models.opt.shape import OPTShape
from models.shapes import resolve
from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkSpec
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.layout import sources
from parallel.layout.labels import IGNORED
from parallel.layout.layout import Layout, ParameterInfo, slices
from parallel.mesh.mesh import Mesh
from parallel.mesh.topology import Topology
from parallel.optim.grad_norm import clip_coefficient, global_norm
from parallel.pipeline.microbatch import Microbatch
from parallel.tensor import MODES
from parallel.tensor import loss as tensor_loss
from parallel.tensor.loss import HeadLayout, sum_cross_entropy
from parallel.tensor.matmul import LinearCollectives
from tests.harness import run
from tests.parity import (
    SHAPE,
    Batch,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    engine_of,
    owns,
    reference,
    relative,
    save_model,
    train,
)

BOUND = 1e-9  # relative, in fp64; seen: 1e-13
MODEL: Raw = SHAPE | dict(num_hidden_layers=2)
LAYOUTS: dict[str, tuple[int, Raw]] = {  # name: world size, parallel section
    "single": (1, {}),
    "dp2": (2, {}),
    "pp2": (2, dict(pipeline=2)),
    "pp2-gpipe": (2, dict(pipeline=dict(size=2, schedule="gpipe"))),
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "2d1x2": (2, dict(tensor=dict(mode="2d", size=2, rows=1))),
    "2d2x1": (2, dict(tensor=dict(mode="2d", size=2, rows=2))),
    "2d2x2": (4, dict(tensor=dict(mode="2d", size=4))),
    "2.5d-depth2": (2, dict(tensor=dict(mode="2.5d", size=2, depth=2))),
    "3d2x2x2": (8, dict(tensor=dict(mode="3d", size=8))),
}


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "two_layers", **MODEL)


def unequal_batches() -> list[Batch]:
    """Return batches of 12 samples in which no two microbatches, and no two replicas, have as many labels.

    Samples 0 and 1 are padded at the end, 5 at the start, and 8 has one label.
    """
    batches = batches_of(2)
    for batch in batches:
        mask = torch.ones_like(batch["input_ids"])
        mask[:2, 3:] = 0
        mask[5, :2] = 0
        batch["attention_mask"] = mask
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, IGNORED)
        batch["labels"][8, 2:] = IGNORED
    return batches


@cache
def wanted(path: Path) -> Trace:
    return reference(path, config_of({}, steps=2), unequal_batches())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unequal_microbatches_train_as_one_batch_of_hugging_face(opt: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    micro = dict(micro_batch_size=2 if layout.startswith("dp2") else 4)
    raw = config_of(parallel, steps=2, model=dict(path=str(opt)), train=micro)
    trace = run(train, world_size, raw, unequal_batches())[0]
    assert trace is not None
    compare(trace, wanted(opt), BOUND, is_fp64=True)


def test_the_parts_of_these_batches_have_different_numbers_of_labels() -> None:
    for batch in unequal_batches():
        counted = (batch["labels"][:, 1:] != IGNORED).sum(1)
        assert len({int(part.sum()) for part in counted.split(4)}) == 3
        assert len({int(part.sum()) for part in counted.split(6)}) == 2


@pytest.mark.parametrize("limit", [0.5, 5.0, 50.0])
def test_clipping_equals_torch(limit: float) -> None:
    """The norm is 5: one limit is below it, one is equal to it, and one does not change the gradient."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    info = ParameterInfo("layer.w", "layer", parameter, Layout((2,), ((),)), sources.whole("w", (2,)))
    chunk = Chunk(ChunkSpec([info], torch.float64))
    gradient = torch.zeros(chunk.size, dtype=torch.float64)
    (ours,) = chunk.spec.views(gradient)
    ours.copy_(torch.tensor([3.0, -4.0]))
    chunk.store_gradient(gradient)
    parameter.grad = ours.clone()
    norm = global_norm([chunk], Mesh(Topology(dict(pipe=1)), 0).world)
    coefficient = clip_coefficient(norm, limit)
    assert norm == torch.nn.utils.clip_grad_norm_([parameter], limit)
    torch.testing.assert_close(ours * coefficient, parameter.grad, rtol=1e-15, atol=0.0)


def test_the_norm_of_many_numbers_is_exact_to_a_few_units_in_the_last_place() -> None:
    """torch's own norm of as many fp32 numbers on a CPU has an error of 5e-4, since it adds in fp32."""
    parameter = torch.nn.Parameter(torch.randn(12_000_000, generator=torch.Generator().manual_seed(0)))
    info = ParameterInfo("layer.w", "layer", parameter, Layout((12_000_000,), ((),)), sources.whole("w", (12_000_000,)))
    chunk = Chunk(ChunkSpec([info], torch.float32))
    chunk.store_gradient(chunk.master)
    norm = global_norm([chunk], Mesh(Topology(dict(pipe=1)), 0).world)
    torch.testing.assert_close(norm, chunk.master.double().norm(), rtol=1e-8, atol=0.0)


# -- initial parameters ------------------------------------------------------------------------------------------------


def drawn(world_size: int, parallel: Raw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights that the ranks of a layout draw together, and the number of owners of each element."""
    raw = config_of(parallel, model=MODEL, train=dict(global_batch_size=16))
    config = parse(raw, world_size=world_size, resolve=resolve)
    weights: dict[str, Tensor] = {}
    owners: dict[str, Tensor] = {}
    for rank in range(world_size):
        for info in build(make_context(config, Place(rank, world_size), connect=False)).infos:
            for piece in info.pieces():
                weights.setdefault(piece.name, torch.full(piece.shape, torch.nan).double())
                owners.setdefault(piece.name, torch.zeros(piece.shape))
                if owns(info.layout):
                    weights[piece.name][slices(piece.box)] = piece.data
                    owners[piece.name][slices(piece.box)] += 1
    return weights, owners


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_of_a_layout_draw_one_model_and_own_each_element_once(layout: str) -> None:
    weights, owners = drawn(*LAYOUTS[layout])
    assert all(bool((count == 1).all()) for count in owners.values())
    alone, _ = drawn(1, {})
    assert weights.keys() == alone.keys()
    for name, weight in alone.items():
        assert torch.equal(weights[name], weight), name
    rows = alone["model.decoder.embed_tokens.weight"]
    assert [row for row in range(len(rows)) if not rows[row].any()] == [1], "the padding token's embedding is zero"


# -- the vocabulary-parallel loss --------------------------------------------------------------------------------------


def large_logits(kind: str) -> tuple[Tensor, Tensor]:
    """Return fp32 logits[2, 3, 7] whose exponentials overflow, and labels[2, 3], one of which is not counted.

    "apart": they differ by hundreds. "near": they differ by little, and are so large that adding two of them would lose
    the difference.
    """
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 3, 4], [6, IGNORED, 5]])
    return (logits * 200 if kind == "apart" else logits + 1e5), labels


def loss_of_a_split_vocabulary(rank: int, world_size: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return the summed loss and its gradient with respect to all logits[2, 3, 8], the last of which are padding.

    The padding has arbitrary values. The embedding is the identity matrix, so that x are the logits.
    """
    axis = Mesh(Topology(dict(pipe=1, t=world_size)), rank).axis("t")
    logits, labels = large_logits(kind)
    x = F.pad(logits, (0, 1), value=1e6).requires_grad_()
    head = HeadLayout(LinearCollectives(copy_x=axis), (axis,), Layout((7, 8), ((axis,), ())))
    loss = sum_cross_entropy(x, torch.eye(8).tensor_split(world_size)[rank], labels, head)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("kind", ["apart", "near"])
def test_loss_and_gradient_of_large_logits_in_two_slices_equal_torch(kind: str) -> None:
    logits, labels = large_logits(kind)
    logits.requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    loss.backward()
    assert logits.grad is not None
    for total, gradient in run(loss_of_a_split_vocabulary, 2, kind):
        torch.testing.assert_close(total, loss.detach())
        torch.testing.assert_close(gradient, F.pad(logits.grad, (0, 1)))


@pytest.mark.parametrize("tokens", [2, 4, 6, 12, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_and_gradients_do_not_depend_on_how_many_logits_exist_at_a_time(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding's gradient is the same too. Products of bf16 are added up in fp32, and rounded once."""
    monkeypatch.setattr(tensor_loss, "TOKENS_PER_SLICE", tokens)
    generator = torch.Generator().manual_seed(0)
    x, table = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((2, 6, 4), (7, 4)))
    labels = torch.randint(7, (2, 6), generator=generator)
    loss = sum_cross_entropy(x, table, labels, HeadLayout(LinearCollectives(), (), Layout((7, 4), ((), ()))))
    loss.backward()
    exact_x, exact_table = (tensor.detach().double().requires_grad_() for tensor in (x, table))
    exact = F.cross_entropy((exact_x @ exact_table.T).flatten(0, 1), labels.flatten(), reduction="sum")
    exact.backward()
    bound = 1e-12 if dtype == torch.float64 else 2**-8
    for got, want in ((loss, exact), (x.grad, exact_x.grad), (table.grad, exact_table.grad)):
        assert got is not None
        assert want is not None
        assert relative(got.detach(), want.detach()) <= bound


# -- dropout -----------------------------------------------------------------------------------------------------------

DROPPED: dict[str, Any] = dict(dropout=0.5, attention_dropout=0.5, init_std=0.3)


def equal_samples(count: int) -> Microbatch:
    """Return samples that differ only in their numbers."""
    ids = torch.full((count, 6), 5)
    return Microbatch(ids, ids, torch.arange(count))


@pytest.mark.parametrize("part", ["block", "attention"])
def test_no_two_samples_and_no_two_positions_have_one_dropout_mask(part: str) -> None:
    """All rows of equal samples differ, which are equal without dropout."""
    rates = dict(dropout=0.5, attention_dropout=0.0) if part == "block" else dict(dropout=0.0, attention_dropout=0.5)
    shape = OPTShape(**MODEL | rates)
    block = block_of(shape, MODES[None](Mesh(Topology(dict(pipe=1, data=1, context=1)), 0), torch.float64), 3)
    layer = block if part == "block" else block.attention
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    rows = layer(torch.ones(4, 6, shape.hidden_size, dtype=torch.float64), equal_samples(4)).flatten(0, 1)
    assert len(rows.detach().unique(dim=0)) == len(rows)


def test_a_batch_repeated_in_the_next_step_has_other_dropout_masks() -> None:
    engine = engine_of(0, 1, config_of({}, steps=2, model=MODEL | DROPPED, optimizer=dict(lr=0.0)))
    batch = batches_of(1)[0]
    assert engine.train_step(batch).loss != engine.train_step(batch).loss


def test_replicas_have_the_dropout_masks_of_a_single_rank() -> None:
    def trace(world_size: int, micro: int) -> Trace:
        raw = config_of(
            {}, steps=2, model=MODEL | DROPPED, train=dict(micro_batch_size=micro), optimizer=dict(eps=1e-3)
        )
        found = run(train, world_size, raw, batches_of(2))[0]
        assert found is not None
        return found

    compare(trace(2, 2), trace(1, 12), BOUND, is_fp64=False)
