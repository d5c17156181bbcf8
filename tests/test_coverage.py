"""A family whose layers and shape do not have the same tensors is refused when it is built, by name."""

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from models.build import part_of
from models.family import FAMILIES, Family
from models.gpt2 import layers
from models.gpt2.shape import GPT2Shape
from parallel.errors import ModelError
from parallel.layout.sources import fused, joined, transposed
from tests.families import GPT2
from tests.parity import config_of
from tests.test_family_runs import context_of
from tests.test_parity import LAYOUTS

Attributes = dict[str, Any]
UNTIED: Attributes = dict(tie_word_embeddings=False)


def refusal(attributes: Attributes, *, layout: str = "single", **fields: Any) -> str:
    """Build rank 0's stage of GPT-2 with other attributes of its shape, and return why it is refused."""
    shape = type("WrongShape", (GPT2Shape,), attributes)
    world_size, parallel = LAYOUTS[layout]
    with patch.dict(FAMILIES, gpt2=Family(shape, {"gpt2": shape()}, "models.gpt2.layers")):
        context = context_of(config_of(parallel, model=dict(name="gpt2") | GPT2 | fields), 0, world_size)
        try:
            part_of(context)
        except ModelError as error:
            return str(error)
    return ""


def changed(method: Callable[..., Any], changes: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a method that returns what `method` does, with these entries changed, or without them where None."""

    def other(*arguments: Any) -> dict[str, Any]:
        found = method(*arguments) | changes
        return {key: value for key, value in found.items() if value is not None}

    return other


def names(**changes: str | None) -> Attributes:
    return {"names": changed(GPT2Shape.names, {name.replace("__", "."): value for name, value in changes.items()})}


def block_tensors(changes: Mapping[str, tuple[int, ...] | None]) -> Attributes:
    return {"block_tensors": changed(GPT2Shape.block_tensors, changes)}


def q_three_times(self: GPT2Shape, names: Any, shapes: Any) -> Any:
    """Return q's columns of the joint tensor as the source of k and of v, too."""
    if ".c_attn." not in names[0]:
        return GPT2Shape.sources_of(self, names, shapes)
    rows, *columns = shapes[0][::-1]
    (q, k, v) = transposed(joined(names[0], fused([names[0]] * 3, (rows // 3, *columns))))
    return q, *(type(q)(q.name, q.shape, other.box, q.transposed) for other in (k, v))


H = "transformer.h.0."
WRONG: dict[str, tuple[Attributes, str]] = {
    "a module without a name": (
        names(feed_forward_norm=None),
        "layers.0.feed_forward_norm.weight: WrongShape.names() has no 'feed_forward_norm'",
    ),
    "a name that is misspelt": (
        names(attention__out="attn.proj"),
        f"layers.0.attention.out.weight: WrongShape.names() makes of it {H}attn.proj.weight, which is no tensor of the"
        f" shape. Did you mean '{H}attn.c_proj.weight'?",
    ),
    "a tensor left out": (
        block_tensors({"mlp.c_proj.bias": None}),
        f"layers.0.feed_forward.down.bias: WrongShape.names() makes of it {H}mlp.c_proj.bias, which is no tensor",
    ),
    "a tensor too many": (
        block_tensors({"attn.scale": (24,)}),
        f"{H}attn.scale: a public tensor of the shape that no parameter holds.",
    ),
    "one name for two modules": (
        names(feed_forward_norm="ln_1"),
        f"{H}ln_1.weight: row 0 is held twice, by layers.0.attention_norm.weight, layers.0.feed_forward_norm.weight.",
    ),
    "a part of a tensor twice": ({"sources_of": q_three_times}, f"{H}attn.c_attn.weight: row 0 is held twice, by"),
    "the name of the embedding": (
        dict(
            embedding="transformer.embed.weight",
            first_tensors=lambda self: GPT2Shape().with_fields(**GPT2).first_tensors(),
        ),
        "WrongShape.embedding: transformer.embed.weight is not among first_tensors(): transformer.wte.weight",
    ),
    "the prefix": (dict(base="model."), "transformer.wte.weight: it does not begin with WrongShape.base, 'model.'"),
}


@pytest.mark.parametrize(("attributes", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("fields", [{}, UNTIED], ids=["tied", "untied"])
def test_what_a_shape_says_otherwise_than_its_layers_is_refused_by_name(
    attributes: Attributes, message: str, fields: Attributes
) -> None:
    assert message in refusal(attributes, **fields)


@pytest.mark.parametrize("layout", ["single", "1d2", "pp2", "2d4"])
def test_a_parameter_that_is_not_the_modes_is_refused(layout: str) -> None:
    """No rank would sum its gradient, update it or save it, and nothing would say so."""
    block_of = layers.block_of

    def with_more(*arguments: Any) -> nn.Module:
        block = block_of(*arguments)
        block.feed_forward.scale = nn.Parameter(torch.ones(24))
        block.attention.linear = nn.Linear(24, 24, bias=False)
        return block

    with patch.object(layers, "block_of", with_more):
        message = refusal({}, layout=layout)
    assert "layers.0.feed_forward.scale: a parameter (24,) without a layout." in message
    assert "layers.0.attention.linear.weight: a parameter (24, 24) without a layout." in message


def test_a_width_that_the_shape_does_not_name_is_refused_where_ranks_would_have_padding() -> None:
    message = refusal({"inner_widths": lambda self: {}}, layout="1d4", n_inner=50)
    assert "layers.0.feed_forward.up.weight: 4 ranks cannot split its dim of 50 evenly. WrongShape.heads()" in message


def test_a_family_as_it_is_is_not_refused() -> None:
    assert refusal({}) == refusal({}, **UNTIED) == refusal({}, layout="2d4") == ""


def test_an_entry_without_an_attribute_or_with_one_of_no_type_is_refused() -> None:
    missing = type("Nameless", (GPT2Shape.__bases__[0],), {})
    with pytest.raises(ModelError, match=r"Nameless lacks model_type, architecture, may_change, block_tensors, .*"):
        Family(missing, {}, "models.gpt2.layers")
    untyped = type("Untyped", (GPT2Shape,), {"attention_bias": True})
    with pytest.raises(ModelError, match=r"Untyped.attention_bias: .* Write attention_bias: bool = True"):
        Family(untyped, {}, "models.gpt2.layers")
