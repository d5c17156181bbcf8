"""The reference of the parity tests is Hugging Face's model, with windows that act and norms that are exact in fp64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from tests.families import FAMILIES, SHAPES, family_of, saved
from tests.parity import batches_of, config_of, distance, hugging_face, padded, reference, relative

ROTARY = [name for name in SHAPES if family_of(name) not in ("opt", "gpt2")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def logits_of(model: nn.Module, *, pad: bool) -> Tensor:
    """Return the logits of a batch, some samples of which are padded at the start or at the end."""
    (batch,) = padded(batches_of(1)) if pad else batches_of(1)
    with torch.no_grad():
        out: Tensor = model.eval()(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_equals_the_unchanged_model_in_fp32(name: str, folder: Path) -> None:
    """The replaced norms round otherwise: a few units in the last place (1.2e-7) for each of up to 13 norms."""
    path = saved(folder, name)
    unchanged = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    for pad in (False, True):
        ours, theirs = (logits_of(model, pad=pad) for model in (hugging_face(path, torch.float32), unchanged))
        assert relative(ours, theirs) < 5e-6
        assert (type(unchanged.base_model.norm).__name__ != "RMSNorm") if name in ROTARY else torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SHAPES)
def test_no_part_of_the_reference_but_rotary_tables_computes_in_fp32(name: str, folder: Path) -> None:
    """A change of the embedding by 1e-10 changes the logits by about as much, linearly.

    In a model that rounds to fp32 somewhere the change is lost, or becomes a step of 1e-8.
    """
    model = hugging_face(saved(folder, name), torch.float64)
    before, table = logits_of(model, pad=False), model.get_input_embeddings().weight
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = []
    for step in (1e-10, 1e-6):
        with torch.no_grad():
            table.add_(direction, alpha=step)
            changes.append((logits_of(model, pad=False) - before) / step)
            table.sub_(direction, alpha=step)
    # Differences of numbers around 1, each known to 1e-16 · 10, divided by 1e-10; and the second derivative times 1e-6.
    assert relative(*changes) < 1e-3


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return attention [B, S, heads, D] where `mask`[B, S, S] says which keys a query sees; nothing seen gives zero."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~mask.unsqueeze(1), -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)


def windows_of(name: str) -> list[int | None]:
    """Return the window of each layer, as the fields of the shape say."""
    shape = SHAPES[name]
    window, layers = shape.get("sliding_window"), shape.get("num_hidden_layers", 3)
    if family_of(name) == "mistral":
        return [window] * layers
    types = shape.get("layer_types")
    first = shape["max_window_layers"] if shape.get("use_sliding_window") else layers
    return [window if (types[i] == "sliding_attention" if types else i >= first) else None for i in range(layers)]


@pytest.mark.parametrize("name", [name for name in SHAPES if family_of(name) != "opt"])
def test_attention_of_the_reference_is_that_of_a_written_out_mask(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query at i sees the keys i − W + 1 … i that are no padding, under both kinds of padding."""
    model: Any = hugging_face(saved(folder, name), torch.float64)
    windows = windows_of(name)
    (batch,) = padded(batches_of(1))
    want = logits_of(model, pad=True)
    i, j = torch.arange(6).unsqueeze(1), torch.arange(6)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        window = windows[module.layer_idx] or 6
        seen = (j <= i) & (j > i - window) & batch["attention_mask"].bool().unsqueeze(1)
        return written_out(query, key, value, seen), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention)
    assert relative(logits_of(model, pad=True), want) < 1e-13
    if any(windows):
        windows[:] = [None] * len(windows)
        assert relative(logits_of(model, pad=True), want) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_training_in_fp32_stays_within_the_bound_of_the_parity_tests(name: str, folder: Path) -> None:
    """Layouts of ours are compared with the reference in fp32 too: its own error must leave them room."""
    path = saved(folder, name)
    exact, rounded = (reference(path, config_of({}, precision=p), batches_of(4)) for p in ("fp64", "fp32"))
    assert distance(rounded, exact) < 5e-6


def test_every_shape_is_of_a_model_that_hugging_face_knows() -> None:
    for name, shape in SHAPES.items():
        config = AutoConfig.for_model(family_of(name), **shape)
        unknown = [key for key in shape if not hasattr(config, key)]
        assert not unknown, f"{name}: {unknown}"
