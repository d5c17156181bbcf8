"""A head with weights of its own trains as Hugging Face's does, in every way to split it, and is drawn once."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from models.costs import flops_per_token, parameter_count
from models.family import named_sizes
from models.opt.shape import OPTShape
from models.shapes import from_hugging_face
from tests.harness import run
from tests.parity import (
    BOUND,
    PROJECTED,
    SHAPE,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    engine_of,
    exported,
    reference,
    save_model,
    train,
)

HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
STAGE_3 = dict(stage=3, tensor_placement_policy="cpu")
LAYOUTS: dict[str, tuple[int, Raw, Raw]] = {  # ranks, parallel, zero
    "single": (1, {}, {}),
    "pp2-1d2": (4, dict(pipeline=2, tensor=dict(mode="1d", size=2)), {}),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4)), {}),
    "dp2-stage3-cpu": (2, {}, STAGE_3),
    "3d8": (8, dict(tensor=dict(mode="3d", size=8)), {}),
    "2.5d4-pp2": (8, dict(pipeline=2, tensor=dict(mode="2.5d", size=4)), {}),
    "ring3": (3, dict(context=3), {}),
}
MANY = ("3d8", "2.5d4-pp2", "ring3")


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a Hugging Face directory with a head of its own, of each shape."""
    folder = tmp_path_factory.mktemp("untied")
    shapes = {"plain": SHAPE, "projected": PROJECTED}
    return {name: save_model(folder / name, **shape, tie_word_embeddings=False) for name, shape in shapes.items()}


@cache
def wanted(path: Path) -> Trace:
    return reference(path, config_of({}), batches_of(4))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *(pytest.param("plain", name, marks=pytest.mark.slow if name in MANY else []) for name in LAYOUTS),
        ("projected", "single"),
        pytest.param("projected", "2.5d4-pp2", marks=pytest.mark.slow),
    ],
)
def test_a_head_of_its_own_trains_as_hugging_faces(models_of: dict[str, Path], shape: str, layout: str) -> None:
    """The bounds are those of the tied head: the arithmetic is the same, and one sum of two gradients less."""
    ranks, parallel, zero = LAYOUTS[layout]
    path = models_of[shape]
    micro = dict(micro_batch_size=3 if zero else 4)
    trace = run(train, ranks, config_of(parallel, model=dict(path=str(path)), zero=zero, train=micro), batches_of(4))[0]
    assert trace is not None
    compare(trace, wanted(path), BOUND["fp64"], is_fp64=True)
    assert not torch.equal(trace.weights[HEAD], trace.weights[EMBEDDING])


def drawn(rank: int, world_size: int, raw: Raw) -> dict[str, torch.Tensor]:
    return exported(engine_of(rank, world_size, raw))


def test_a_head_of_its_own_is_drawn_from_the_seed_alone() -> None:
    """Its values do not depend on the layout. They are normal, in the row of the padding token too."""
    shape = SHAPE | dict(tie_word_embeddings=False, vocab_size=997, init_std=0.5)
    alone, split = (run(drawn, n, config_of(layout, model=shape))[0] for n, layout in ((1, {}), (2, dict(pipeline=2))))
    assert alone.keys() == split.keys() >= {HEAD, EMBEDDING}
    assert all(torch.equal(alone[name], split[name]) for name in alone)
    assert not torch.equal(alone[HEAD], alone[EMBEDDING])
    assert alone[HEAD][1].any()
    assert not alone[EMBEDDING][1].any()
    # 997 · 24 numbers: their deviation is known to 1/sqrt(2 · 23928) = 0.5%, four of which are allowed.
    assert alone[HEAD].std().item() == pytest.approx(0.5, rel=0.02)


def test_expected_tensors_and_the_parameter_count_are_those_of_transformers(models_of: dict[str, Path]) -> None:
    for path in models_of.values():
        shape, model = from_hugging_face(path), OPTForCausalLM(OPTConfig.from_pretrained(path))
        sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert shape.public_tensors() == sizes
        assert parameter_count(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_a_head_of_its_own_costs_memory_and_no_flops() -> None:
    tied = named_sizes()["opt-125m"]
    untied = OPTShape(tie_word_embeddings=False)
    assert flops_per_token(untied, 128) == flops_per_token(tied, 128)
    assert parameter_count(untied) - parameter_count(tied) == tied.vocab_size * tied.embedding_width
