"""GPT-2: its sizes and tensors are those of transformers, and it trains as transformers' own model does."""

from dataclasses import fields, replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from models.gpt2.shape import SIZES, GPT2Shape
from models.shape import Normal
from parallel.layout.sources import Source

COUNTS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
"""The numbers of parameters of the four published models."""

NOT_OURS = {"use_cache"}
"""The fields of Hugging Face's config that say how to generate, and not what the model is."""

SMALL = GPT2Shape(vocab_size=37, n_positions=16, n_embd=24, n_layer=3, n_head=12)
VARIANTS = {
    "small": SMALL,
    "inner": replace(SMALL, n_inner=60),
    "untied": replace(SMALL, tie_word_embeddings=False),
}


def config_of_transformers(shape: GPT2Shape) -> GPT2Config:
    return GPT2Config(**shape.exported())


def tensors_of_transformers(shape: GPT2Shape) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the state dict of transformers' model; a tied head is there once."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(config_of_transformers(shape))
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shape.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


# -- the shape ---------------------------------------------------------------------------------------------------------


def test_the_fields_and_defaults_are_those_of_transformers() -> None:
    ours = {field.name: field.default for field in fields(GPT2Shape)}
    assert not ours.keys() & GPT2Shape.only.keys()
    assert GPT2Config.__annotations__.keys() - GPT2Shape.only.keys() - NOT_OURS == ours.keys()
    theirs = GPT2Config()
    assert ours == {name: getattr(theirs, name) for name in ours}
    refused = {name: allowed for name, allowed in GPT2Shape.only.items() if name in GPT2Config.__annotations__}
    assert {name: (getattr(theirs, name),) for name in refused} == refused
    assert GPT2Config.attribute_map == GPT2Shape.aliases
    assert GPT2Config.model_type == GPT2Shape.model_type


@pytest.mark.parametrize("shape", [*VARIANTS.values(), *SIZES.values()], ids=[*VARIANTS, *SIZES])
def test_the_public_tensors_are_those_of_transformers(shape: GPT2Shape) -> None:
    assert shape.public_tensors() == tensors_of_transformers(shape)


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_sizes_have_the_published_counts(name: str) -> None:
    assert sum(map(prod, SIZES[name].public_tensors().values())) == COUNTS[name]


def filled(shape: GPT2Shape, sources: list[Source]) -> dict[str, np.ndarray]:
    """Return how often each element of each public tensor is held by these sources."""
    counts = {name: np.zeros(size, int) for name, size in shape.public_tensors().items()}
    for source in sources:
        rows = prod(stop - start for start, stop in source.box[: len(source.box) - len(source.shape) + 1])
        held = counts[source.name].T if source.transposed else counts[source.name]
        held[source.first : source.first + rows] += 1
    return counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_parameters_hold_every_public_element_once(variant: str) -> None:
    shape = VARIANTS[variant]
    found: list[Source] = []
    for module in shape.names():
        layers = [""] if module.startswith(("embed.", "head.")) else [f"layers.{i}." for i in range(shape.n_layer)]
        has_bias = not module.startswith("embed.") and module != "head.table"
        if module != "head.table" or not shape.tie_word_embeddings:
            leaves = ["weight", "bias"] if has_bias else ["weight"]
            found += [s for layer in layers for leaf in leaves for s in shape.sources(f"{layer}{module}.{leaf}")]
    counts = filled(shape, found)
    assert all((count == 1).all() for count in counts.values())


def test_weights_are_drawn_as_transformers_draws_them() -> None:
    """The matrices that lead back to the residual stream have a smaller standard deviation.

    The std of n drawn elements is off by about 1/√(2 n) of itself, and their mean by 1/√n of the std: 0.8% and 1% of
    the smallest matrix here, of 9,216 elements.
    """
    shape = replace(SMALL, n_embd=96, vocab_size=300, n_positions=96, initializer_range=0.05)
    torch.manual_seed(0)
    for name, tensor in GPT2LMHeadModel(config_of_transformers(shape)).state_dict().items():
        drawn, ours = tensor.double(), shape.initial(name)
        if drawn.ndim == 1:
            assert ours.std == 0
            assert (drawn == ours.mean).all(), name
        else:
            assert ours == Normal(std=ours.std)
            assert drawn.std(correction=0).item() == pytest.approx(ours.std, rel=0.04), name
            assert abs(drawn.mean()) < 0.05 * ours.std, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(n_head=7), "model.n_head: 7 does not divide model.n_embd 24. Try 4, 6 or 8."),
        (dict(activation_function="gelu_neu"), "model.activation_function: 'gelu_neu' is not available."),
    ],
)
def test_shapes_that_no_layout_can_train_are_refused(changes: dict[str, Any], words: str) -> None:
    (problem,) = replace(SMALL, **changes).problems()
    assert problem.startswith(words)
