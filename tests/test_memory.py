"""A rank keeps between forward and backward what its mode's docstring says, and the logits never exist as a whole."""

import re
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import Attention
from models.family import FAMILIES
from models.gpt2.shape import GPT2Shape
from models.kept import kept_bytes, kept_for_weights
from models.layer import Block, Head
from models.llama.shape import LlamaShape, MinistralShape, MistralShape, Qwen2Shape, Qwen3Shape
from models.opt.shape import OPTShape
from models.shape import ModelShape
from parallel.config import Config, parse
from parallel.config.parallel import TensorConfig
from parallel.ops.deferred import DeferredCalls
from parallel.ops.receiver import GradientReceiver
from parallel.pipeline.microbatch import Microbatch
from parallel.tensor import MODES, Mode, loss
from parallel.tensor.layers import Linear
from tests.accounts import Allocations, bytes_kept, letters, mode_of, saved_for_backward, storage_of, value
from tests.harness import run
from tests.once import once
from tests.parity import config_of, engine_of
from tests.tables import rows

NOTATION = Path(__file__).parent.parent / "docs/notation.md"

LAYOUTS = {
    "serial": TensorConfig(),
    "1d2": TensorConfig("1d", 2),
    "1d4": TensorConfig("1d", 4),
    "1d2-sp": TensorConfig("1d", 2, sequence_parallel=True),
    "1d4-sp": TensorConfig("1d", 4, sequence_parallel=True),
    "2d1x2": TensorConfig("2d", 2, rows=1),
    "2d2x1": TensorConfig("2d", 2, rows=2),
    "2d2x2": TensorConfig("2d", 4),
    "2.5d2x2x2": TensorConfig("2.5d", 8, depth=2),
    "3d2x2x2": TensorConfig("3d", 8),
}
MEASURED = [pytest.param(name, marks=pytest.mark.slow) if name in ("1d4", "2d2x1") else name for name in LAYOUTS]
"""The layouts; of those that are alike some are slow."""

FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Kept:
    """The tensors that a block keeps for backward: their bytes in all, and the numbers of elements that occur."""

    bytes: int
    sizes: set[int]
    hidden: int  # bytes that are held too, but not saved by autograd


@dataclass(frozen=True)
class Peaks:
    """The peak bytes of the loss of a shorter sequence, of 8 token slices, and of a longer one, of 16."""

    shorter: int
    longer: int
    x: int  # the bytes of the shorter one's input
    logits: int  # the bytes of the logits of one token slice


@dataclass(frozen=True)
class Account:
    """The measurements of one rank: each variant's block, a whole model, and the loss."""

    blocks: dict[str, Kept]
    from_i_to_w: dict[str, int]  # bytes that a block holds
    model: int
    loss: Peaks


@cache
def accounts(layout: str) -> list[Account]:
    """Return the measurements of every rank. The ranks are started once for all tests of a layout."""
    return once(f"accounts of {layout}", partial(run, account, LAYOUTS[layout].size, LAYOUTS[layout]))


def account(rank: int, world_size: int, tensor: TensorConfig) -> Account:
    mode = mode_of(rank, tensor, torch.float32)
    blocks = {name: kept_by_a_block(shape, mode) for name, shape in {**VARIANTS, **FAMILY_SHAPES}.items()}
    blocks["paper"] = kept_by_a_block(PAPER, mode_of(rank, tensor, torch.bfloat16))
    blocks["padding"] = kept_by_a_block(SHAPE, mode, torch.ones(B, S, dtype=torch.int64))
    waiting = {name: kept_from_i_to_w(shape, mode, tensor) for name, shape in FAMILY_SHAPES.items()}
    return Account(blocks, waiting, kept_by_a_model(rank, world_size, tensor), peaks_of_the_loss(mode, tensor))


# -- a block -----------------------------------------------------------------------------------------------------------

B, S = 8, 4
SHAPE = OPTShape(
    vocab_size=37,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=16,
    word_embed_proj_dim=16,
    dropout=0.0,
)
VARIANTS = {
    "pre-norm": SHAPE,
    "post-norm": replace(SHAPE, do_layer_norm_before=False),
    "gelu": replace(SHAPE, activation_function="gelu"),
    "dropout": replace(SHAPE, dropout=0.5),
    "attention dropout": replace(SHAPE, attention_dropout=0.5),
}
PAPER = GPT2Shape(vocab_size=37, n_embd=16, n_layer=1, n_head=4, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
LLAMA_SIZES: dict[str, Any] = dict(
    vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=8, intermediate_size=40
)
FAMILY_SHAPES: dict[str, ModelShape] = {
    "opt": SHAPE,
    "opt, gelu": VARIANTS["gelu"],
    "gpt2": GPT2Shape(
        vocab_size=37, n_embd=16, n_layer=1, n_head=4, n_inner=48, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "llama": LlamaShape(**LLAMA_SIZES),
    "llama, grouped": LlamaShape(**LLAMA_SIZES, num_key_value_heads=4),
    "mistral": MistralShape(**LLAMA_SIZES, num_key_value_heads=4, sliding_window=2),
    "ministral": MinistralShape(**LLAMA_SIZES, num_key_value_heads=4, layer_types=("full_attention",)),
    "qwen2": Qwen2Shape(**LLAMA_SIZES, num_key_value_heads=4),
    "qwen3": Qwen3Shape(**LLAMA_SIZES, num_key_value_heads=4, head_dim=6),
}


def block_of(shape: ModelShape, mode: Mode) -> Block:
    """Return the first block of a family's model."""
    block = import_module(FAMILIES[shape.model_type].layers).layers_of(shape, mode, 0)[1].build()
    assert isinstance(block, Block)
    return block


def kept_by_a_block(shape: ModelShape, mode: Mode, attention_mask: Tensor | None = None) -> Kept:
    block = block_of(shape, mode)
    attention = block.attention
    assert isinstance(attention, Attention)
    x = torch.ones(mode.activation_shape(B, S, shape.hidden_size), dtype=mode.dtype, requires_grad=True)
    tokens = torch.zeros(B, S, dtype=torch.int64)
    held = Allocations()
    with held, saved_for_backward() as saved:
        y = block(x, Microbatch(tokens, tokens, torch.arange(B), attention_mask))
    total = bytes_kept(saved, block)
    known = total - x.nbytes + y.nbytes  # x existed before, and y is held by this function alone
    own = set(map(storage_of, block.parameters()))
    # Dropout in attention has a table of its heads' numbers, which is no activation.
    known += 8 * len(mode.local(tokens, mode.inner_batch)) * attention.heads * (attention.options.dropout > 0)
    return Kept(total, {t.numel() for t in saved if storage_of(t) not in own}, held.wait_for(known) - known)


def kept_from_i_to_w(shape: ModelShape, mode: Mode, tensor: TensorConfig) -> int:
    """Return the bytes that a block holds after a backward that leaves the gradients of weights for later."""
    block, deferred = block_of(shape, mode), DeferredCalls()
    for module in block.modules():
        if isinstance(module, Linear):
            module.receiver = GradientReceiver(deferred, lambda a, b: None, lambda gradient: None)
    tokens = torch.zeros(B, S, dtype=torch.int64)
    held = Allocations()
    with held:
        x = torch.ones(mode.activation_shape(B, S, shape.hidden_size)).requires_grad_()
        y = block(x, Microbatch(tokens, tokens, torch.arange(B)))
        dy = torch.ones_like(y)
        with deferred.deferring("a microbatch"):
            y.backward(dy)
        gradients = [p.grad for p in (x, *block.parameters()) if p.grad is not None]
        del x, y, dy
    known = sum({storage_of(x): x.untyped_storage().nbytes() for x in gradients}.values())
    tables = (
        2 * S * shape.head_size * FLOAT if shape.positions is None else 0
    )  # cosines and sines, which all blocks use
    found = held.wait_for(from_i_to_w(shape, tensor) + known + tables) - known - tables
    deferred.run_deferred("a microbatch")
    return found


def from_i_to_w(shape: ModelShape, tensor: TensorConfig) -> int:
    """Return the bytes that the document says a block holds from I to W."""
    name = {None: "none", "2d": "2d, 2.5d", "2.5d": "2d, 2.5d"}.get(tensor.kind, tensor.kind)
    (formula,) = (row.answer for row in rows("docs/notation.md", "From I to W") if row.what == name)
    return round(value(formula, letters(tensor, shape, B, S)) * FLOAT)


def formula_of(tensor: TensorConfig) -> str:
    """Return the formula in the docstring of the mode's class."""
    found = re.search(r"^ *kept by a block +(.*)$", MODES[tensor.kind].__doc__ or "", re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("layout", MEASURED)
def test_a_block_keeps_what_its_mode_says_and_nothing_gathered(layout: str) -> None:
    tensor = LAYOUTS[layout]
    a = letters(tensor, SHAPE, B, S)
    T, H, F, A, p = (a[letter] for letter in "THFAp")
    between = T * H // (1 if tensor.kind == "1d" else p)
    tokens = T // tensor.batch_parts  # inside the block
    rows = tokens // tensor.length_parts  # of the norms
    own = {between, T * H // p, T * F // p, A * T // p, rows}  # elements of a rank's part of each kind of tensor
    wanted = value(formula_of(tensor), a) * FLOAT
    for kept in (found.blocks for found in accounts(layout)):
        for name in ("pre-norm", "post-norm"):
            assert kept[name].bytes == wanted
            assert kept[name].sizes == own
        assert kept["gelu"].bytes == wanted + T * F // p * FLOAT
        assert kept["padding"].bytes == wanted + tokens * S * FLOAT  # the attention kernel's mask, in floats
        assert kept["dropout"].bytes == wanted + 2 * between  # two masks, a byte for each element
        assert kept["attention dropout"].bytes == wanted  # no probabilities: backward computes them again
        assert not any(found.hidden for found in kept.values())


@pytest.mark.parametrize("layout", MEASURED)
@pytest.mark.parametrize("family", FAMILY_SHAPES)
def test_a_block_of_each_family_keeps_what_its_shape_says(family: str, layout: str) -> None:
    """There are the tables of cosines and sines, too, which all blocks of a stage share, and on a CPU the mask of a
    window. No tensor is larger than this rank's part, so no more features and no more heads than its own.
    """
    tensor, shape = LAYOUTS[layout], FAMILY_SHAPES[family]
    a = letters(tensor, shape, B, S)
    T, A, G, D, Z, p = (a[letter] for letter in "TAGDZp")
    is_rotary = shape.positions is None
    tables = (2 * S * D if is_rotary else 0) + (S * S if family == "mistral" else 0)
    between = T * a["H"] // (1 if tensor.kind == "1d" else p)
    for kept in (found.blocks[family] for found in accounts(layout)):
        assert kept.bytes == (value(formula_of(tensor), a) + tables) * FLOAT
        assert max(kept.sizes) == max(between, T * A * D // p, T * Z // p)
        assert T * G * D // p in kept.sizes  # k and v have their own number of heads
        assert not kept.hidden


@pytest.mark.parametrize("layout", MEASURED)
@pytest.mark.parametrize("family", FAMILY_SHAPES)
def test_a_block_keeps_from_i_to_w_what_the_documents_say(family: str, layout: str) -> None:
    """The formula counts the rank's own part of each factor: nothing that was gathered, nothing that only I needs."""
    for found in accounts(layout):
        assert found.from_i_to_w[family] == from_i_to_w(FAMILY_SHAPES[family], LAYOUTS[layout])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documents_have_what_a_familys_shape_says(family: str) -> None:
    """The table of docs/notation.md gives O, I and N of a family in the letters of its widths."""
    a = letters(TensorConfig(), FAMILY_SHAPES[family], B, S)
    row = re.compile(r"^\| ([^|]*) \| ([^|]*) \| ([^|]*) \| (\d) \|$", re.MULTILINE)
    rows = {name: cells for names, *cells in row.findall(NOTATION.read_text("utf-8")) for name in names.split(", ")}
    (cells,) = (rows[name] for name in rows if name.lower().replace("-", "") == family)
    assert [value(formula, a) for formula in cells] == [a["O"], a["I"], a["N"]]


@pytest.mark.parametrize("layout", ["serial", "1d2", "1d2-sp", "2d2x2", "3d2x2x2"])
def test_the_documents_have_the_formula_of_the_docstrings(layout: str) -> None:
    assert f" {formula_of(LAYOUTS[layout])} |" in NOTATION.read_text(encoding="utf-8")


@pytest.mark.parametrize("layout", ["serial", "1d2-sp", "1d4-sp"])
def test_a_block_of_gpt2_keeps_what_the_paper_of_sequence_parallelism_counts_but_attention(layout: str) -> None:
    """The paper counts 34 bytes for each element of x, and the map of attention, which is not kept here.

    These ranks compute on a CPU, whose LayerNorm has its two statistics in 16 bits and not in 32.
    """
    a = letters(LAYOUTS[layout], PAPER, B, S)
    narrow = 2 * 2 * 2 * a["T"] // a["p"]  # two bytes fewer for each of two numbers of two norms
    rows = dict(re.findall(r"^\| (the paper|ours) \| (.*) \|$", NOTATION.read_text(encoding="utf-8"), re.MULTILINE))
    attention = a["T"] * (5 * a["A"] * S - 4 * a["A"] - 16) / a["p"]
    assert value(rows["the paper"], a) - value(rows["ours"], a) == attention
    for kept in (found.blocks["paper"] for found in accounts(layout)):
        assert kept.bytes == value(rows["ours"], a) - narrow
        assert not kept.hidden


# -- a whole model -----------------------------------------------------------------------------------------------------


def kept_by_a_model(rank: int, world_size: int, tensor: TensorConfig) -> int:
    """Return the bytes kept by embedding, blocks, head and loss, with the gradients that the loss computes at once.

    The table's is kept as that of a further microbatch is: only the first one's is computed in the buffer of its chunk.
    """
    model = dict(vocab_size=260, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, ffn_dim=256, dropout=0.0)
    raw = config_of(dict(tensor=asdict(tensor)), precision="fp32", model=model, data=dict(sequence_length=32))
    stage = engine_of(rank, world_size, raw).part
    head = stage.layers[-1]
    assert isinstance(head, Head)
    head.table.receiver = None
    tokens = torch.arange(8 * 32).view(8, 32)
    with saved_for_backward() as saved:
        stage(None, Microbatch(tokens, tokens, torch.arange(8)), 0)
    return bytes_kept(saved, stage)


@pytest.mark.parametrize("layout", ["1d4-sp", "2d2x2", "2.5d2x2x2", "3d2x2x2"])
def test_a_model_split_over_p_ranks_keeps_a_pth_on_each(layout: str) -> None:
    """The tolerance is 5%, because LayerNorm's two numbers for each token, and the tokens, are not split along the
    hidden dim.
    """
    (serial,), ranks = accounts("serial"), accounts(layout)
    for found in ranks:
        assert found.model == pytest.approx(serial.model / len(ranks), rel=0.05)


# -- as it is foreseen -------------------------------------------------------------------------------------------------


def foreseen(shape: ModelShape, tensor: TensorConfig, batch: int, sequence: int, **train: Any) -> list[int]:
    """Return the bytes of each layer that `--check` counts for a microbatch of this size."""
    return kept_bytes(shape, microbatch_of(tensor, batch, sequence, **train))


def microbatch_of(tensor: TensorConfig, batch: int, sequence: int, **train: Any) -> Config:
    """Return a config whose microbatches have this size."""
    raw = dict(
        parallel=dict(tensor=asdict(tensor)),
        train=dict(micro_batch_size=batch, global_batch_size=batch, fp8_min_elements=0) | train,
        data=dict(sequence_length=sequence),
    )
    return parse(raw)


@pytest.mark.parametrize("layout", MEASURED)
@pytest.mark.parametrize("family", FAMILY_SHAPES)
def test_the_bytes_foreseen_of_a_block_are_those_of_its_modes_formula(family: str, layout: str) -> None:
    """Statistics keep their four bytes in bf16."""
    tensor, shape, batch = LAYOUTS[layout], FAMILY_SHAPES[family], 8
    a = letters(tensor, shape, batch, S)
    wanted = value(formula_of(tensor), a)
    statistics = wanted - value(formula_of(tensor), a | {"N": 0})
    assert foreseen(shape, tensor, batch, S)[1] == wanted * FLOAT
    assert foreseen(shape, tensor, batch, S, precision="bf16")[1] == 2 * wanted + 2 * statistics
    is_whole = tensor.mode == "1d" and not tensor.sequence_parallel
    between = a["T"] * a["H"] // (1 if is_whole else tensor.size)
    assert foreseen(shape, tensor, batch, S, activation_checkpointing="full")[1] == FLOAT * between
    assert foreseen(shape, tensor, batch, S, activation_checkpointing="offload")[1] == 0


@pytest.mark.parametrize("layout", MEASURED)
@pytest.mark.parametrize("family", FAMILY_SHAPES)
def test_the_bytes_foreseen_from_i_to_w_are_those_of_the_documents(family: str, layout: str) -> None:
    tensor, shape = LAYOUTS[layout], FAMILY_SHAPES[family]
    wanted = from_i_to_w(shape, tensor)
    for precision, share in (("fp32", 1.0), ("bf16", 0.5)):
        found = kept_for_weights(shape, microbatch_of(tensor, B, S, precision=precision))
        assert found == [0, *[share * wanted] * shape.num_hidden_layers, 0]


@pytest.mark.parametrize("layout", MEASURED)
def test_the_bytes_foreseen_of_a_model_are_those_that_it_keeps(layout: str) -> None:
    """The tolerance is 3%: token ids, a few vectors, and the vocabulary's padding are not counted."""
    shape = replace(SHAPE, vocab_size=260, hidden_size=64, num_hidden_layers=4, ffn_dim=256, word_embed_proj_dim=64)
    expected = sum(foreseen(shape, LAYOUTS[layout], 8, 32))
    for found in accounts(layout):
        assert found.model == pytest.approx(expected, rel=0.03)


# -- the loss ----------------------------------------------------------------------------------------------------------

V, H, POSITIONS_PER_SLICE = 640, 16, 8


def peaks_of_the_loss(mode: Mode, tensor: TensorConfig) -> Peaks:
    own = B // tensor.batch_parts
    loss.TOKENS_PER_SLICE = own * POSITIONS_PER_SLICE
    table = mode.vocabulary(V, H, padding_idx=1)

    def peak(sequence: int) -> int:
        """Return the lowest of six measurements: the thread of a collective may release its tensors late."""
        return min(measured(sequence) for _ in range(6))

    def measured(sequence: int) -> int:
        x = torch.ones(mode.activation_shape(B, sequence, H), requires_grad=True)
        labels = torch.zeros(B, sequence, dtype=torch.int64)
        held = Allocations()
        with held:
            mode.lm_loss(x, table, labels)
        return held.peak

    shorter, longer = (peak(slices * POSITIONS_PER_SLICE) for slices in (8, 16))
    x = B * 8 * POSITIONS_PER_SLICE * H // (1 if tensor.kind == "1d" else tensor.size)
    logits = loss.TOKENS_PER_SLICE * len(table.weight)
    return Peaks(shorter, longer, x * FLOAT, logits * FLOAT)


@pytest.mark.parametrize("layout", MEASURED)
def test_the_loss_holds_the_logits_of_one_token_slice_however_long_the_sequence(layout: str) -> None:
    """Only dx grows with the sequence."""
    for peaks in (found.loss for found in accounts(layout)):
        assert abs(peaks.longer - peaks.shorter - peaks.x) < peaks.logits
        assert peaks.shorter < 8 * peaks.logits
