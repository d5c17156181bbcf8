"""Every entry of `FAMILIES` has the fields, tensors and drawn weights of transformers' class of its `model_type`.

A family that is new needs no test of its own for this: an entry and a tiny shape in `tests/families.py` are enough.
"""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from models.family import FAMILIES, Family
from models.shape import ModelShape, Normal
from models.shapes import shape_from
from tests import families, test_family_files, test_family_runs, test_memory, test_parity
from tests.families import SHAPES, family_of
from tests.parity import named_as_in_files

HOW_IT_IS_RUN = {"use_cache"}
"""Fields of Hugging Face's classes that say how a model is run, and not what it computes."""


def test_every_family_has_tiny_shapes_and_layouts_in_the_tests() -> None:
    """`ministral` has a variant only: it is a Mistral with types of layers."""
    assert {family_of(name) for name in SHAPES} == FAMILIES.keys()
    assert {shape.model_type for shape in test_memory.FAMILY_SHAPES.values()} == FAMILIES.keys()
    others = set(families.FAMILIES[1:])
    assert others == FAMILIES.keys() - {"opt", "ministral"}
    for of_families in (
        *(test_parity.DIAGONAL, test_parity.PADDED),
        *(test_family_files.LAYOUT_OF, test_family_runs.TINY),
    ):
        assert of_families.keys() == others


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_transformers_class_is_built_or_refused(kind: str) -> None:
    """A field that is neither would be left out in silence, and the model would be another one than the file's."""
    family, theirs = FAMILIES[kind], type(AutoConfig.for_model(kind))
    own = {field.name for field in fields(theirs)} - {field.name for field in fields(PreTrainedConfig)}
    assert sorted(key for key in own if not is_known(family, key)) == []
    assert hasattr(transformers, family.shape.architecture)


def is_known(family: Family, key: str) -> bool:
    ours = {field.name for field in fields(family.shape)}
    read = family.shape.normalized({key: {"rope_theta": 2.0} if key == "rope_parameters" else 2})
    return key in HOW_IT_IS_RUN | family.shape.only.keys() or (bool(read) and read.keys() <= ours)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family_of(name), **SHAPES[name]))


def shape_of(name: str) -> ModelShape:
    family = FAMILIES[family_of(name)]
    return shape_from({"model_type": family_of(name), **family.shape.normalized(SHAPES[name])})


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_drawn_as_transformers_draws_it(name: str) -> None:
    """The std of n drawn elements is off by about 1/√(2 n) of itself, and their mean by 1/√n of it: six times that."""
    shape, found = shape_of(name), named_as_in_files(model_of(name))
    assert {name: tuple(x.shape) for name, x in found.items()} == shape.public_tensors()
    for tensor, parameter in found.items():
        ours, theirs = shape.initial(tensor), parameter.detach().double()
        assert isinstance(ours, Normal), f"{tensor}: {type(shape).__name__}.initial() returns {ours}"
        if tensor == shape.embedding and shape.padding_row is not None:
            theirs = theirs[torch.arange(len(theirs)) != shape.padding_row]
        std, mean, n = theirs.std(correction=0).item(), theirs.mean().item(), theirs.numel()
        assert abs(std - ours.std) <= 6 / math.sqrt(2 * n) * ours.std, f"{tensor}: std {std:.4f}, not {ours.std:.4f}"
        assert abs(mean - ours.mean) <= 6 / math.sqrt(n) * ours.std, f"{tensor}: mean {mean:.4f}, not {ours.mean:.4f}"
