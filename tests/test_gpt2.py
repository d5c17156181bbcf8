"""GPT-2: its sizes and tensors are those of transformers, and it trains as transformers' own model does."""

import json
import math
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2 import modeling_gpt2

from models import hf
from models.gpt2.shape import SIZES, GPT2Shape
from models.shape import Normal
from models.shapes import from_hugging_face, resolve, shape_of
from parallel.config import parse
from parallel.errors import ConfigError
from parallel.layout.rng import dropout, seed_of
from parallel.layout.sources import Source
from tests.harness import run
from tests.parity import (
    Batch,
    Raw,
    assert_bits,
    batches_of,
    config_of,
    engine_of,
    exported,
    relative,
    train,
)

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


REFUSED = [
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True),
    ("reorder_and_upcast_attn", True),
    ("add_cross_attention", True),
    ("pruned_heads", {"0": [1]}),
    ("per_layer_config", {"0": {"n_inner": 12}}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_function_that_ours_is_not_is_refused_by_the_name_of_its_field(
    tmp_path: Path, field: str, value: object
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", field: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"model.path: {field} in .* is not supported. Try "):
        from_hugging_face(tmp_path)
    with pytest.raises(ConfigError, match=f"model.{field}: .* is not supported. Try "):
        parse(dict(model=dict(name="gpt2", **{field: value})), resolve=resolve)


def test_the_common_names_of_sizes_are_read_too() -> None:
    ours = dict(n_embd=64, n_layer=3, n_head=4, n_positions=32)
    common = {common: ours[own] for common, own in GPT2Shape.aliases.items()}
    both = [
        parse(dict(model=dict(name="gpt2", **f), data=dict(sequence_length=8)), resolve=resolve) for f in (ours, common)
    ]
    assert both[0] == both[1]
    assert both[0].model.fields["n_embd"] == 64


def test_two_values_of_one_field_are_refused(tmp_path: Path) -> None:
    """transformers takes that of the common name, whichever comes first. The message names the file that has both."""
    twice: dict[str, Any] = dict(hidden_size=32, n_embd=64)
    assert GPT2Config(**twice).n_embd == GPT2Config(**dict(reversed(twice.items()))).n_embd == 32
    words = "n_embd.*: it is given as 64 and as 32, once under the name hidden_size. Keep one."
    with pytest.raises(ConfigError, match=f"model.{words}"):
        parse(dict(model=dict(name="gpt2", **twice)), resolve=resolve)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **twice}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"model.path: {words}".replace(".*", f" in {tmp_path}/config.json")):
        from_hugging_face(tmp_path)


# -- training ----------------------------------------------------------------------------------------------------------

DROPPING: Raw = dict(n_inner=60, resid_pdrop=0.2, embd_pdrop=0.3, attn_pdrop=0.25)
SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model in which no weight is zero or one, biases included, with three dropouts."""
    shape = replace(SMALL, pad_token_id=1, **DROPPING)
    torch.manual_seed(7)
    model = GPT2LMHeadModel(config_of_transformers(shape)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    path = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(path)
    return path


class Dropping(nn.Module):
    """A dropout of our masks: of the element of x[B, ..., C] that has these coordinates among all samples of a run."""

    def __init__(self, p: float, samples: Tensor, key: int) -> None:
        super().__init__()
        self.p, self.samples, self.key = p, samples, torch.tensor(key)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.samples
        for size in x.shape[1:-1]:
            rows = rows.unsqueeze(-1) * size + torch.arange(size)
        return dropout(x, self.p, self.key, rows, torch.arange(x.shape[-1]))


def attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention as transformers' own function does, but with the module's dropout.

    A query that sees no key gets zeros: transformers' function lets it see all of them.
    """
    scores = (q @ k.mT * options["scaling"]).masked_fill(mask != 0, -math.inf)
    weights = module.get_submodule("attn_dropout")(scores.softmax(-1).nan_to_num(0.0))
    return (weights @ v).transpose(1, 2), weights


def with_our_masks(model: GPT2LMHeadModel, samples: Tensor) -> GPT2LMHeadModel:
    """Replace every dropout of transformers' model by one with our mask, and return the model."""
    config: Any = model.config
    body: Any = model.transformer
    body.drop = Dropping(config.embd_pdrop, samples, seed_of(seed_of(SEED, "dropout", "embeddings")))
    for index, block in enumerate(body.h):
        seed = seed_of(SEED, "dropout", index)
        block.attn.attn_dropout = Dropping(config.attn_pdrop, samples, seed_of(seed_of(seed, "attention")))
        block.attn.resid_dropout = Dropping(config.resid_pdrop, samples, seed_of(seed, 0))
        block.mlp.dropout = Dropping(config.resid_pdrop, samples, seed_of(seed, 1))
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert left == []
    return model


def gradients_of_transformers(folder: Path, batch: Batch) -> tuple[float, float, dict[str, Tensor]]:
    """Return the loss of a batch, the norm of its gradient and the clipped gradients, of transformers' own model."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").train()
    with_our_masks(model, batch["sample_ids"])
    with patch.object(modeling_gpt2, "eager_attention_forward", attention):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return loss.item(), norm.item(), {name: p.grad for name, p in model.named_parameters()}


def padded_batch() -> Batch:
    """Return a batch with samples that are padded on the left and on the right, and with numbers of samples."""
    ids = batches_of(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0::3, :2] = mask[1::3, 4:] = 0
    ids, labels = ids.masked_fill(mask == 0, 1), ids.masked_fill(mask == 0, -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels, sample_ids=7 * torch.arange(12) + 1000)


LAYOUTS: dict[str, tuple[int, Raw]] = {
    "2d1x2": (2, dict(tensor=dict(mode="2d", size=2, rows=1))),
    "single": (1, {}),
    "pp2-2d1x2": (4, dict(pipeline=2, tensor=dict(mode="2d", size=2, rows=1))),
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4))),
    "ring3": (3, dict(context=3)),
    "a2a2-dp2": (4, dict(context=dict(size=2, kind="all_to_all"))),
    "3d8": (8, dict(tensor=dict(mode="3d", size=8))),
}


@pytest.mark.parametrize("layout", ["2d1x2", *(pytest.param(name, marks=pytest.mark.slow) for name in [*LAYOUTS][1:])])
def test_each_dropout_stands_where_transformers_has_it(folder: Path, layout: str) -> None:
    """The reference is transformers' model, of which each dropout draws its mask by our coordinates.

    The padding token is looked up in the batch, and its row gets a gradient, although the config has a pad_token_id. In
    fp64 losses and gradients are equal but for the roundings of some thousand operations.
    """
    world_size, parallel = LAYOUTS[layout]
    micro = 3 if layout.endswith("dp2") else 4
    batch = padded_batch()
    raw = config_of(parallel, steps=1, model=dict(path=str(folder)), train=dict(seed=SEED, micro_batch_size=micro))
    got = run(train, world_size, raw, [batch])[0]
    assert got is not None
    loss, norm, gradients = gradients_of_transformers(folder, batch)
    assert got.losses == pytest.approx([loss], rel=1e-9)
    assert got.norms == pytest.approx([norm], rel=1e-9)
    assert got.gradients.keys() == gradients.keys()
    assert max(relative(got.gradients[name], want) for name, want in gradients.items()) < 1e-9
    assert gradients["transformer.wte.weight"][1].abs().max() > 0


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_as_on_the_hub_are_read_and_an_export_is_read_by_transformers(folder: Path, tmp_path: Path) -> None:
    """The files of the hub lack the prefix of the head's model, and have the masks of older versions, bool or float."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(folder / "model.safetensors").items()}
    for layer in range(SMALL.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    older = {"n_ctx": 16, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
    (tmp_path / "config.json").write_text(json.dumps(config | older), encoding="utf-8")

    engine = engine_of(0, 1, config_of({}, model=dict(path=str(tmp_path))))
    shape, target = shape_of(engine.config), tmp_path / "export"
    hf.export(target, engine.weights(), shape=shape, axis=engine.mesh.world, dtype=torch.float64)
    again = GPT2LMHeadModel.from_pretrained(target, dtype=torch.float64)
    assert_bits(again.state_dict(), model.state_dict())
    assert again.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}
    assert hf.stored_dtypes(tmp_path, shape) == ["F64"]


def drawn(rank: int, world_size: int, raw: Raw) -> dict[str, Tensor]:
    return exported(engine_of(rank, world_size, raw))


def test_one_seed_draws_one_gpt2_in_every_layout() -> None:
    """Each rank draws its parts of q, k and v out of one public tensor, by its columns."""
    model = dict(name="gpt2-tiny", n_layer=2, n_embd=96, n_head=4, n_positions=8, tie_word_embeddings=False)
    alone, split = (config_of(parallel, model=model) for parallel in ({}, dict(tensor=dict(mode="1d", size=2))))
    want, got = drawn(0, 1, alone), run(drawn, 2, split)[0]
    assert_bits(got, want)
    out, into = (want[f"transformer.h.1.attn.{name}.weight"] for name in ("c_proj", "c_attn"))
    assert into.std().item() == pytest.approx(0.02, rel=0.03)
    assert out.std().item() == pytest.approx(0.01, rel=0.03)  # 0.02 / √(2 · 2)
