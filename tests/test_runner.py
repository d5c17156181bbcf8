"""Whatever valid plan a pipeline runs, on however many stages a rank has, it trains as a single process does."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from models import build
from models.shapes import resolve
from parallel.config import PipelineConfig, parse
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.plan.validate import validate
from tests.drawn_plans import drawn_plan
from tests.harness import run
from tests.parity import (
    Batch,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    engine_of,
    share_of,
    traced,
    updating_on_device,
)

LOOP2 = PipelineConfig(size=2, schedule="interleaved", chunks=2)
V2 = PipelineConfig(size=2, schedule="zero_bubble_v", chunks=2)
ALONE = PipelineConfig(size=1, schedule="interleaved", chunks=3)
RING = PipelineConfig(size=3, schedule="interleaved", chunks=2)
V3 = PipelineConfig(size=3, schedule="zero_bubble_v", chunks=2)
LINE = PipelineConfig(size=2, schedule="zero_bubble")

OPT: Raw = dict(
    name="opt-tiny",
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=5,
    num_attention_heads=4,
    ffn_dim=20,
    dropout=0.25,
    attention_dropout=0.25,
    init_std=0.3,
)


def trained_by(
    rank: int, world_size: int, raw: Raw, batches: list[Batch], pipeline: PipelineConfig, seed: int | None
) -> Trace | None:
    """Train in this pipeline, by a plan that is drawn; with no seed, by the schedule's own."""
    config = parse(raw, world_size=world_size, resolve=resolve)
    config = replace(config, parallel=replace(config.parallel, pipeline=pipeline))
    context = make_context(config, Place(rank, world_size, rank, world_size))
    torch.set_num_threads(1)
    engine = updating_on_device(Engine(build(context), context))
    if seed is not None:
        num_microbatches = config.num_microbatches(world_size)
        recomputes = config.train.activation_checkpointing != "none"
        plan = drawn_plan(context.mesh.topology.rank_of_stage, num_microbatches, seed=seed, halves=not recomputes)
        validate(plan)
        engine.passes.plans[True, num_microbatches] = plan
    return traced(engine, batches)


def check(pipeline: PipelineConfig, seed: int | None = 0, *, data: int = 1, model: Raw = OPT, **sections: Any) -> None:
    """Compare two steps in a pipeline with a single process, which trains the batch as a whole, in fp64."""
    tensor = sections.pop("tensor", {})
    world = pipeline.size * data * tensor.get("size", 1)
    train = dict(global_batch_size=20, micro_batch_size=4 // data) | sections.pop("train", {})
    common: dict[str, Any] = dict(steps=2, model=model, optimizer=dict(eps=1e-3))
    batches, alone = batches_of(2, batch=20, vocabulary=37), dict(global_batch_size=20, micro_batch_size=20)
    want = run(trained_by, 1, config_of({}, train=alone, **common), batches, PipelineConfig(), None)
    raw = config_of(dict(pipeline=pipeline.size, tensor=tensor), train=train, **common, **sections)
    got = run(trained_by, world, raw, batches, pipeline, seed)
    assert got[0] is not None
    assert want[0] is not None
    compare(got[0], want[0], 1e-12, is_fp64=False)


@pytest.mark.parametrize("pipeline", [V2, ALONE, LINE], ids=["v", "alone", "line"])
def test_a_drawn_plan_trains_as_a_single_process(pipeline: PipelineConfig) -> None:
    check(pipeline)


UNTIED_LLAMA: Raw = dict(
    name="llama-tiny",
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=20,
    tie_word_embeddings=False,
    max_position_embeddings=16,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
TIED_GPT2: Raw = dict(
    name="gpt2",
    vocab_size=37,
    n_embd=24,
    n_head=4,
    n_inner=20,
    n_layer=4,
    n_positions=16,
    resid_pdrop=0.25,
    embd_pdrop=0.25,
    attn_pdrop=0.25,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
PROJECTED = OPT | dict(word_embed_proj_dim=12, do_layer_norm_before=False)
ON_HOST: Raw = dict(zero=dict(stage=3, tensor_placement_policy="cpu"))
CASES: dict[str, tuple[PipelineConfig, dict[str, Any]]] = {
    "loop": (LOOP2, {}),
    "alone dp2 zero2": (ALONE, dict(data=2, zero=dict(stage=2))),
    "alone dp2 zero3 cpu": (ALONE, dict(data=2, **ON_HOST)),
    "v dp2 zero2": (V2, dict(data=2, zero=dict(stage=2))),
    "v dp2 zero1 projected": (V2, dict(data=2, model=PROJECTED, zero=dict(stage=1))),
    "loop dp2 zero3": (LOOP2, dict(data=2, zero=dict(stage=3))),
    "loop dp2 zero3 cpu gpt2": (
        LOOP2,
        dict(data=2, model=TIED_GPT2, **ON_HOST),
    ),
    "v dp2 zero3 auto": (V2, dict(data=2, zero=dict(stage=3, tensor_placement_policy="auto"))),
    "v one microbatch zero3 cpu": (V2, dict(data=2, train=dict(micro_batch_size=10), **ON_HOST)),
    "alone one microbatch zero3 cpu": (ALONE, dict(data=2, train=dict(micro_batch_size=10), **ON_HOST)),
    "alone 2d4": (ALONE, dict(tensor=dict(mode="2d", size=4))),
    "v 1d2": (V2, dict(tensor=dict(mode="1d", size=2))),
    "line dp2 zero2 untied": (LINE, dict(data=2, model=UNTIED_LLAMA, zero=dict(stage=2))),
    "ring untied": (RING, dict(model=UNTIED_LLAMA)),
    "ring": (RING, {}),
    "v3": (V3, {}),
    "v recompute": (V2, dict(train=dict(activation_checkpointing="full"))),
    "loop offload": (LOOP2, dict(train=dict(activation_checkpointing="offload"))),
    "alone offload zero2 dp2": (
        ALONE,
        dict(data=2, zero=dict(stage=2), train=dict(activation_checkpointing="offload")),
    ),
    "alone dp2 zero2 projected": (ALONE, dict(data=2, model=PROJECTED, zero=dict(stage=2))),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_drawn_plans_in_other_layouts_train_as_a_single_process(case: str, seed: int) -> None:
    pipeline, sections = CASES[case]
    check(pipeline, seed, **sections)


def collectives_of(rank: int, world_size: int, raw: Raw, batch: Batch) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of collectives of a step, and what it should be by the chunks of this rank."""
    engine = engine_of(rank, world_size, raw)
    engine.train_step(share_of(batch, engine))
    engine.mesh.traffic.reset()
    engine.train_step(share_of(batch, engine))
    found, zero = dict(engine.mesh.traffic.calls), engine.config.zero.stage
    microbatches = engine.config.num_microbatches(world_size)
    layers = [chunk for chunk in engine.chunks if chunk.infos[0].unit in engine.part.units]
    rounds = microbatches if zero >= 2 else 1
    gathers = 2 * microbatches * len(layers) + len(engine.chunks) - len(layers) if zero == 3 else len(engine.chunks)
    engine.mesh.close()
    return found, dict(reduce_scatter=rounds * len(engine.chunks), all_gather=gathers)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_chunks_are_summed_once_for_each_round_and_layers_gathered_once_for_each_pass(zero: int) -> None:
    """A table that two stages of a rank share is summed after both of its gradients. What follows the last layer of a
    stage is not known: a layer that is gathered ahead and not used would be gathered again.
    """
    pipeline = dict(size=1, schedule="interleaved", chunks=3)
    train = dict(global_batch_size=20, micro_batch_size=2)
    raw = config_of(dict(pipeline=pipeline), steps=2, model=OPT, train=train, zero=dict(stage=zero))
    for found, wanted in run(collectives_of, 2, raw, batches_of(1, batch=20)[0]):
        assert {kind: found[kind] for kind in wanted} == wanted


def evaluated(rank: int, world_size: int, raw: Raw, batches: list[Batch]) -> float:
    """Return the loss of these batches, evaluated between two steps."""
    engine = engine_of(rank, world_size, raw)
    engine.train_step(share_of(batches[0], engine))
    loss = engine.evaluate([share_of(batch, engine) for batch in batches[1:]])
    engine.train_step(share_of(batches[0], engine))
    engine.mesh.close()
    return loss


EVALUATED: dict[str, tuple[int, Raw]] = {
    "v": (2, dict(size=2, schedule="zero_bubble_v")),
    "alone": (1, dict(size=1, schedule="interleaved", chunks=3)),
    "ring": (3, dict(size=3, schedule="interleaved")),
    "line": (3, dict(size=3, schedule="zero_bubble")),
    "dp2-v": (4, dict(size=2, schedule="zero_bubble_v")),
}


@pytest.mark.parametrize(
    "name", [name if name == "v" else pytest.param(name, marks=pytest.mark.slow) for name in EVALUATED]
)
def test_an_evaluation_in_several_stages_has_the_loss_of_a_single_process(name: str) -> None:
    """Dropout is off then; one batch is shorter than the number of ranks."""
    world_size, pipeline = EVALUATED[name]
    batches = batches_of(3, batch=20)
    batches[2] = {key: x[:4] for key, x in batches[2].items()}
    zero = dict(stage=3 if name.startswith("dp2") else 0)
    common: dict[str, Any] = dict(steps=2, model=OPT)
    train = dict(global_batch_size=20, micro_batch_size=2 if name.startswith("dp2") else 4)
    found = run(evaluated, world_size, config_of(dict(pipeline=pipeline), train=train, zero=zero, **common), batches)
    alone = config_of({}, train=dict(global_batch_size=20, micro_batch_size=4), **common)
    assert found == pytest.approx(run(evaluated, 1, alone, batches) * world_size, rel=1e-12)
