"""A training step sends exactly what the tables in docs/notation.md say, in each of its parts."""

import re
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import nn

from models.layer import Block, Embed, Head
from models.llama.shape import LlamaShape, Qwen3Shape
from models.opt.shape import OPTShape
from models.shape import ModelShape
from parallel.config.parallel import TensorConfig
from parallel.engine.engine import Engine
from parallel.mesh.notices import Notices
from parallel.ops.deferred import DeferredCalls
from parallel.plan.plan import Action, Op, Plan
from parallel.tensor import loss, sliced
from tests.accounts import Call, RecordedCalls, letters, value
from tests.harness import run
from tests.parity import Batch, Raw, batches_of, config_of, engine_of, share_of

TABLES = Path(__file__).parent.parent / "docs/notation.md"
LOOKUP, LINEARS, LOSS = "lookup", "a block's linears", "head, loss"  # as the tables name them
WAYS = ("forward", "backward")
SUMS, OUTSIDE = "gradient sums", "outside the layers"
IN_PARTS = " in I and W"  # behind the name of a model
PARTS, IN_W = "I and W of a block's linears", "Block W"
FEW = 4  # elements: counts of labels and samples, the loss and the norm may be summed over the same axes as gradients

MODEL = OPTShape(
    vocab_size=37,  # nothing divides it
    hidden_size=256,  # a multiple of 64 on every rank: flat buffers of gradients need no padding then
    word_embed_proj_dim=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=256,
    max_position_embeddings=16,
    dropout=0.0,
)
GROUPED: Raw = dict(
    vocab_size=37,
    hidden_size=512,  # the last norm has one vector: it is a flat buffer of its own
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=256,
)
MODELS: dict[str, tuple[ModelShape, str]] = {  # the shape, and the row of its norms in the tables
    "opt": (MODEL, "a LayerNorm"),
    "llama": (LlamaShape(**GROUPED, attention_bias=True, mlp_bias=True), "an RMSNorm"),
    "qwen3": (Qwen3Shape(**GROUPED, head_dim=128, tie_word_embeddings=True), "an RMSNorm"),  # heads · D ≠ hidden
}
OF_LLAMA = ("llama", "qwen3")
B, S = 8, 6  # of a microbatch
POSITIONS_PER_SLICE = 2  # so the loss has three slices

SPLIT = "1d, sequence parallel"
LAYOUTS = {  # name: (row of the tables, tensor mode, replicas)
    "dp2": ("1d", TensorConfig(), 2),
    "1d4": ("1d", TensorConfig("1d", 4), 1),
    "dp2-1d2": ("1d", TensorConfig("1d", 2), 2),
    "1d2-sp": (SPLIT, TensorConfig("1d", 2, sequence_parallel=True), 1),
    "dp2-1d2-sp": (SPLIT, TensorConfig("1d", 2, sequence_parallel=True), 2),
    "2d2x4": ("2d, 2.5d", TensorConfig("2d", 8, rows=2), 1),
    "2.5d2x2x2": ("2d, 2.5d", TensorConfig("2.5d", 8, depth=2), 1),
    "dp2-2.5d2x1x2": ("2d, 2.5d", TensorConfig("2.5d", 4, depth=2, rows=1), 2),
    "3d2x2x2": ("3d", TensorConfig("3d", 8), 1),
    "1d4-overlap": ("1d", TensorConfig("1d", 4, overlap=True), 1),
    "1d2-sp-overlap": (SPLIT, TensorConfig("1d", 2, sequence_parallel=True, overlap=True), 1),
    "2d2x2-overlap": ("2d, 2.5d", TensorConfig("2d", 4, overlap=True), 1),
    "3d2x2x2-overlap": ("3d", TensorConfig("3d", 8, overlap=True), 1),
}
WITH_ALL_MODELS = (
    "dp2",
    "1d4",
    "1d2-sp",
    "2d2x4",
    "2.5d2x2x2",
    "3d2x2x2",
)  # ranks start once for all models


def _is_quick(layout: str, model: str) -> bool:
    return layout in WITH_ALL_MODELS or (model == "opt" and not LAYOUTS[layout][1].overlap)


CASES = [
    pytest.param(
        layout,
        model,
        marks=[] if _is_quick(layout, model) else pytest.mark.slow,
        id=f"{layout}-{model}",
    )
    for layout in LAYOUTS
    for model in MODELS
]


def calls_of_steps(
    rank: int, world_size: int, tensor: TensorConfig, microbatches: int, names: tuple[str, ...]
) -> dict[str, tuple[list[Call], str]]:
    """Return for each model every collective call of a step, and the name of the process group over depth.

    Under the model's name with `IN_PARTS` are those of a step whose backwards are I and W.
    """
    found = {}
    for name in names:
        model = dict(name=f"{name}-tiny", **asdict(MODELS[name][0]))
        engine, batch = engine_and_batch(rank, world_size, tensor, microbatches, model)
        depth = engine.mesh.axis("depth").group if tensor.depth > 1 else None
        for suffix, plan in (("", None), (IN_PARTS, weights_last(microbatches))):
            calls = calls_of_a_step(engine, batch, plan)
            found[name + suffix] = calls, depth.group_name if depth else ""
        engine.mesh.close()
    return found


def engine_and_batch(
    rank: int, world_size: int, tensor: TensorConfig, microbatches: int, model: Raw
) -> tuple[Engine, Batch]:
    """Return an engine whose loss has several slices, and this rank's batch."""
    replicas = world_size // tensor.size
    samples = B * microbatches * replicas
    batch = batches_of(1, batch=samples, sequence=S, vocabulary=MODEL.vocab_size)[0]
    train = dict(global_batch_size=samples, micro_batch_size=B)
    raw = config_of(dict(tensor=asdict(tensor)), model=model, data=dict(sequence_length=S), train=train)
    engine = engine_of(rank, world_size, raw)
    loss.TOKENS_PER_SLICE = POSITIONS_PER_SLICE * B // tensor.batch_parts
    sliced.LEAST = 1
    return engine, share_of(batch, engine)


def weights_last(microbatches: int) -> Plan:
    """Return the plan of one stage in which each backward is an I, and each W comes at the end."""
    orders = [(Op.F, Op.I), (Op.W,)]
    actions = (Action(op, 0, m) for ops in orders for m in range(microbatches) for op in ops)
    return Plan((tuple(actions),), 1, microbatches)


def calls_of_a_step(engine: Engine, batch: Batch, plan: Plan | None) -> list[Call]:
    """Return every collective call of a step, with this plan or the engine's own.

    The calls are caught where torch dispatches them. Our own counters must have counted the same, to the byte.
    """
    engine.mesh.traffic.reset()
    on_host = engine.mesh.world.on_host
    assert on_host is not None
    assert on_host.group is not None
    handed = RecordedCalls(OUTSIDE, agreement=on_host.group.group_name)
    with handed, ExitStack() as stack:
        mark_parts(engine, handed, stack)
        if plan is not None:
            stack.enter_context(patch.object(engine.passes, "plan", lambda *_, **__: plan))
        engine.train_step(batch)
    assert engine.mesh.traffic.bytes == handed.bytes
    # A step begins with an agreement on the host: of the largest and the smallest digest, and of the notices.
    assert [call.bytes for call in handed.agreed] == [8 * (2 + len(Notices.NAMES))]
    return [named(call, engine) for call in handed.calls]


def named(call: Call, engine: Engine) -> Call:
    """Return the call, with the part `gradient sums` if it is one.

    A chunk's sum over its first axis may be launched during any part of the last backward. It is recognized by its
    group: no layer's backward all-reduces anything over such a group. The sum over a further axis, that of heads for
    the norms of q and k, follows after the last backward, outside the layers, which all-reduce over the same group.
    """
    syncs = [info.layout.sync for info in engine.part.infos]
    first = {sync[0].group.group_name for sync in syncs if sync[0].group is not None}
    further = {axis.group.group_name for sync in syncs for axis in sync[1:] if axis.group is not None}
    is_forward = call.part.endswith(" forward")
    is_sum = (call.group in first and not is_forward) or (call.group in further and call.part == OUTSIDE)
    is_sum = is_sum and call.kind == "all_reduce" and call.elements > FEW
    return replace(call, part=SUMS) if is_sum else call


def mark_parts(engine: Engine, handed: RecordedCalls, stack: ExitStack) -> None:
    """Register hooks that set `handed.part` in the course of a step, until the stack is closed.

    The part is a layer's forward from its call, and its backward from the gradient of its output. The tied embedding's
    gradient is the last of a backward: calls after it, and before the next forward, are in no layer. Only linears have
    anything in W.
    """
    for layer in engine.part.layers:
        forward, backward = (partial(handed.enter, f"{type(layer).__name__} {way}") for way in WAYS)
        stack.enter_context(layer.register_forward_pre_hook(forward))
        stack.enter_context(
            layer.register_forward_hook(lambda module, x, y, backward=backward: y.register_hook(backward) and None)
        )
    embed = engine.part.layers[0]
    assert isinstance(embed, Embed)
    table = embed.table.weight
    stack.enter_context(table.register_post_accumulate_grad_hook(partial(handed.enter, OUTSIDE)))
    deferred = engine.gradients.deferred

    def run_deferred(key: Hashable) -> None:
        handed.enter(IN_W)
        DeferredCalls.run_deferred(deferred, key)
        handed.enter(OUTSIDE)

    stack.enter_context(patch.object(deferred, "run_deferred", run_deferred))


def steps(layout: str, model: str, microbatches: int = 1) -> list[tuple[list[Call], str]]:
    """Return every rank's calls of a step, and the name of its process group over depth."""
    with_others = layout in WITH_ALL_MODELS and microbatches == 1
    plain = model.removesuffix(IN_PARTS)
    names = tuple(MODELS) if with_others else OF_LLAMA if plain in OF_LLAMA else (plain,)
    return [found[model] for found in _steps(layout, microbatches, names)]


@cache
def _steps(layout: str, microbatches: int, names: tuple[str, ...]) -> list[dict[str, tuple[list[Call], str]]]:
    """Return what `calls_of_steps` returns on every rank; it runs once for all tests of a layout."""
    _, tensor, replicas = LAYOUTS[layout]
    return run(calls_of_steps, tensor.size * replicas, tensor, microbatches, names)


def sent(calls: list[Call], part: str) -> float:
    return sum(call.sent for call in calls if call.part == part)


def formulas(row: str, part: str) -> list[str]:
    """Return the last cells of a row of the tables: a part's forward and backward, or what the gradient sums send."""
    found = re.search(rf"^\| {re.escape(row)} \| {part} \| (.*) \|$", TABLES.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1].split(" | ")


def layers_of(norm: str) -> dict[type[nn.Module], list[str]]:
    """Return the rows of the tables that count each kind of layer."""
    return {Embed: [LOOKUP], Block: [norm, norm, LINEARS], Head: [norm, LOSS]}


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_each_part_of_a_step_sends_what_the_tables_say(layout: str, model: str) -> None:
    (row, tensor, replicas), (shape, norm) = LAYOUTS[layout], MODELS[model]
    names = letters(tensor, shape, B, S) | dict(n=replicas)
    for calls, _ in steps(layout, model):
        for layer, parts in layers_of(norm).items():
            times = shape.num_hidden_layers if layer is Block else 1
            wanted = [
                times * sum(value(formula, names) for formula in way)
                for way in zip(*(formulas(row, part) for part in parts), strict=True)
            ]
            assert [sent(calls, f"{layer.__name__} {way}") for way in WAYS] == wanted
        (formula,) = formulas(row, SUMS)
        assert sent(calls, SUMS) == value(formula, names)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_i_and_w_send_what_the_table_says(layout: str, model: str) -> None:
    """The other calls of a block's backward, the sums of its norms, are in I."""
    (row, tensor, _), (shape, norm) = LAYOUTS[layout], MODELS[model]
    names, times = letters(tensor, shape, B, S), shape.num_hidden_layers
    in_i, in_w = (value(formula, names) for formula in formulas(row, PARTS))
    in_norms = value(formulas(row, norm)[1], names)
    for (whole, _), (halves, _) in zip(steps(layout, model), steps(layout, model + IN_PARTS), strict=True):
        assert sent(halves, "Block backward") == times * (in_i + 2 * in_norms)
        assert sent(halves, IN_W) == times * in_w
        for part in {call.part for call in whole} - {"Block backward", OUTSIDE}:
            assert sent(halves, part) == sent(whole, part)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_outside_its_layers_a_step_sends_only_gradients_and_a_few_numbers(layout: str, model: str) -> None:
    for calls, _ in steps(layout, model):
        others = [call.elements for call in calls if call.part == OUTSIDE]
        assert len(others) <= 4  # the count of labels, what was written, the loss, the norm
        assert not others or max(others) <= FEW


def test_in_1d_a_block_all_reduces_twice_each_way_with_grouped_heads_too() -> None:
    """A backward would all-reduce dx three times with q in one linear and k, v in another."""
    for model in ("llama", "qwen3"):
        for calls, _ in steps("1d4", model):
            for way in WAYS:
                elements = [call.elements for call in calls if call.part == f"Block {way}"]
                assert elements == [B * S * MODELS[model][0].hidden_size] * 2 * MODELS[model][0].num_hidden_layers


@pytest.mark.parametrize("model", MODELS)
def test_sequence_parallelism_sends_what_plain_1d_sends_and_gathers_x_once_more(model: str) -> None:
    """This is arithmetic between two rows of the tables, in a step without gradient sums."""
    shape, norm = MODELS[model]
    names = letters(TensorConfig("1d", 4), shape, B, S) | dict(n=1)

    def in_a_step(row: str) -> float:
        parts = [LOOKUP, LOSS, norm, *[norm, norm, LINEARS] * shape.num_hidden_layers]
        return sum(value(formula, names) for part in parts for formula in formulas(row, part))

    linears = 2 * shape.num_hidden_layers  # those into a block, whose input is gathered for dW
    gather = (names["p"] - 1) * names["T"] * names["H"] / names["p"]
    assert in_a_step(SPLIT) == in_a_step("1d") + linears * gather
    for way, row in zip(zip(formulas(SPLIT, LINEARS), formulas("1d", LINEARS), strict=True), (0, 2), strict=True):
        assert value(way[0], names) == value(way[1], names) + row * gather


@pytest.mark.parametrize("model", ["opt", *(pytest.param(name, marks=pytest.mark.slow) for name in OF_LLAMA)])
def test_gradients_are_summed_once_a_step_over_depth_too(model: str) -> None:
    """Three microbatches send three times what one sends in 2.5d, but over depth they send the same."""
    layout = "2.5d2x2x2"
    for (one, _), (three, depth) in zip(steps(layout, model), steps(layout, model, 3), strict=True):
        for part in {call.part for call in one}:
            assert sent(three, part) == (1 if part in (SUMS, OUTSIDE) else 3) * sent(one, part)
        assert {call.part for call in three if call.group == depth} == {SUMS}


@pytest.mark.parametrize(
    ("paper", "row", "tensor"),
    [
        ("Megatron-LM", "1d", TensorConfig("1d", 8)),
        ("Optimus", "2d, 2.5d", TensorConfig("2d", 16)),
        ("Tesseract", "2d, 2.5d", TensorConfig("2.5d", 32, depth=2)),
        ("3-D", "3d", TensorConfig("3d", 64)),
    ],
)
def test_the_linears_send_what_the_paper_says_except_for_what_the_documents_list(
    paper: str, row: str, tensor: TensorConfig
) -> None:
    """This is arithmetic between two tables; the tests above compare our own with what is sent."""
    names = letters(tensor, MODEL, B, S)
    names["q"] = max(names["q"], names["c"])
    (cells,) = re.findall(rf"^\| {paper} \| (.*) \|$", TABLES.read_text(encoding="utf-8"), re.MULTILINE)
    forward, backward, more = (value(formula, names) for formula in cells.split(" | "))
    assert [forward, backward + more] == [value(formula, names) for formula in formulas(row, LINEARS)]
