"""docs/models.md: its sizes are those of the code, and every row about fields and layouts is tried as a user would."""

import json
import re
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pytest

import launch
from models.costs import parameter_count
from models.family import FAMILIES, named_sizes
from models.llama.shape import FULL, SLIDING, LlamaShape
from models.shape import ModelShape
from models.shapes import from_hugging_face, resolve, shape_of
from parallel.config import parse
from parallel.errors import ConfigError, divisors
from tests.tables import ROOT, Row, rows

PAGE = "docs/models.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")


def shape(**model: Any) -> ModelShape:
    """Return the shape of a section `model`."""
    return shape_of(parse({"model": model}, resolve=resolve))


def refused(model: dict[str, Any], world_size: int | None = None, **sections: Any) -> str:
    """Return the message with which a config of this model is refused."""
    with pytest.raises(ConfigError) as caught:
        parse({"model": model, **sections}, world_size=world_size, resolve=resolve)
    return str(caught.value)


def tiny(**fields: Any) -> str:
    return refused({"name": "llama-tiny", **fields})


def directory(folder: Path, kind: str | None, **fields: Any) -> Path:
    """Return the folder with a config.json that has a small model of this family, and these fields."""
    sizes = {FAMILIES[kind].shape.field("num_hidden_layers"): 4, "vocab_size": 260} if kind in FAMILIES else {}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **fields}))
    return folder


def read(folder: Path, kind: str, **fields: Any) -> Any:
    """Return the shape in a directory of this family with these fields."""
    return from_hugging_face(directory(folder, kind, **fields))


def refused_directory(folder: Path, kind: str | None, **fields: Any) -> str:
    return refused({"path": str(directory(folder, kind, **fields))})


# -- families and sizes


def test_the_table_of_families_has_every_family_and_its_class() -> None:
    listed = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)` \|$", TEXT, re.MULTILINE)
    assert dict(listed) == {kind: family.shape.architecture for kind, family in FAMILIES.items()}


def test_the_table_of_sizes_is_that_of_the_code() -> None:
    listed = re.findall(r"^\| ([\w.-]+) \| ([\d,]+) \| (.*) \|$", TEXT, re.MULTILINE)
    assert [name for name, *_ in listed] == list(named_sizes())
    for name, count, others in listed:
        size = named_sizes()[name]
        numbers = (
            *(size.num_hidden_layers, size.hidden_size, size.num_attention_heads, size.num_kv_heads),
            *(size.head_size, size.max_positions),
        )
        head = "tied" if size.tie_word_embeddings else "its own"
        assert (count, others) == (f"{parameter_count(size):,}", " | ".join([*map("{:,}".format, numbers), head]))


@pytest.mark.parametrize("name", named_sizes())
def test_a_check_of_each_named_size_counts_its_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank of 1d holds its share of the matrices, and all of norms, of positions and of the vocabulary's padding."""
    size = named_sizes()[name]
    (heads,) = size.heads().values()
    parts = next(n for n in divisors(heads) if n > 1)
    changes = [f"model.name={name}", f"parallel.tensor={tensor('1d', parts)}", "train.device=cuda"]
    assert launch.main(launch.read_arguments(["--check", "--set", *changes])) == 0
    shown, count = capsys.readouterr().out, parameter_count(size)
    assert f"\n{name}: {count:,} parameters in fp32\n" in shown
    (of_a_rank,) = re.findall(r"embed, layers [\d–]+, head +│ +([\d,]+) │", shown)
    assert count <= parts * int(of_a_rank.replace(",", "")) < 1.3 * count


# -- fields


def unknown_to_hugging_face(folder: Path) -> str:
    assert read(folder, "qwen2", attention_bias=True) == read(folder, "qwen2")
    return ""


def nulls(folder: Path) -> str:
    fields = dict(pad_token_id=None, num_key_value_heads=None, sliding_window=None, head_dim=None)
    found = read(folder, "mistral", **fields)
    assert (found.padding_row, found.num_kv_heads, found.windows()) == (None, found.num_attention_heads, [None] * 4)
    return refused_directory(folder, "llama", hidden_size=None)


def head_width(folder: Path) -> str:
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        assert read(folder, kind, head_dim=32).head_size == 32
        assert read(folder, kind, head_dim=None).head_size == 4096 // 32
    assert shape(name="llama-tiny", hidden_size=256).head_size == 32
    return ""


def two_names(folder: Path) -> str:
    assert shape(name="gpt2", hidden_size=96) == shape(name="gpt2", n_embd=96) == shape(name="gpt2", n_embd=96)
    assert shape(name="gpt2", hidden_size=96, n_embd=96).hidden_size == 96
    return refused({"name": "gpt2", "hidden_size": 768, "n_embd": 96})


def rotary_spellings(folder: Path) -> str:
    scaling = {"factor": 4.0}
    spellings: list[dict[str, Any]] = [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", **scaling}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", **scaling}},
    ]
    found = [read(folder, "llama", **one) for one in spellings]
    assert found == [found[0]] * 3
    assert (found[0].rope_theta, found[0].scaling.factor) == (5e5, 4.0)
    sections = [shape(name="llama-tiny", **one) for one in spellings]
    assert sections == [sections[0]] * 3
    return ""


def too_long(folder: Path) -> str:
    for kind in ("linear", "dynamic", "yarn"):
        longer = {"name": "llama-tiny", "rope_scaling": {"rope_type": kind, "factor": 2.0}}
        parse({"model": longer, "data": {"sequence_length": 4096}}, resolve=resolve)
    return refused({"name": "llama-tiny"}, data={"sequence_length": 4096})


def mistral_window(folder: Path) -> str:
    assert read(folder, "mistral", sliding_window=16).windows() == [16] * 4
    assert read(folder, "mistral", sliding_window=None).windows() == [None] * 4
    return ""


def qwen_windows(folder: Path) -> str:
    fields: dict[str, Any] = dict(use_sliding_window=True, max_window_layers=3)
    for kind in ("qwen2", "qwen3"):
        assert read(folder, kind, sliding_window=16, **fields).windows() == [None, None, None, 16]
        assert read(folder, kind, sliding_window=16).windows() == [None] * 4
    return refused_directory(folder, "qwen3", sliding_window=None, **fields)


def qwen_kinds(folder: Path) -> str:
    kinds = [SLIDING, FULL, SLIDING, FULL]
    assert read(folder, "qwen3", sliding_window=8, use_sliding_window=True, layer_types=kinds).windows() == [
        *(8, None),
        *(8, None),
    ]
    return refused_directory(folder, "qwen3", layer_types=[FULL] * 5)


def mistral_kinds(folder: Path) -> str:
    found = read(folder, "mistral", sliding_window=16, layer_types=[SLIDING, FULL, FULL, SLIDING])
    assert found.windows() == [16, None, None, 16]
    assert found.exported()["model_type"] == "ministral"
    return ""


def biases(folder: Path) -> str:
    names = {"attention_bias": "self_attn.o_proj.bias", "mlp_bias": "mlp.up_proj.bias"}
    for kind, field in (("llama", "attention_bias"), ("llama", "mlp_bias"), ("qwen3", "attention_bias")):
        assert names[field] in read(folder, kind, **{field: True}).block_tensors(0)
        assert names[field] not in read(folder, kind).block_tensors(0)
    return ""


def several_ends(folder: Path) -> str:
    found = read(folder, "llama", eos_token_id=[1, 2])
    assert (found.end_tokens, found.exported()["eos_token_id"]) == ((1, 2), [1, 2])
    return ""


def tied_or_not(folder: Path) -> str:
    for kind, family in FAMILIES.items():
        for tied in (True, False):
            assert (family.shape.head in read(folder, kind, tie_word_embeddings=tied).public_tensors()) is not tied
    return ""


def gpt2_attention(folder: Path) -> str:
    for field in ("reorder_and_upcast_attn", "add_cross_attention"):
        assert f"model.{field}: True is not supported. Try False." in refused({"name": "gpt2", field: True})
        assert f"{field} in {folder}/config.json" in refused_directory(folder, "gpt2", **{field: True})
    return refused({"name": "gpt2", "scale_attn_by_inverse_layer_idx": True})


def read_by_hugging_face(folder: Path) -> str:
    """Refuse what transformers reads of a config in every family. `is_causal` was ignored in GPT-2 and OPT."""
    values = {"is_causal": False, "per_layer_config": {"0": {"vocab_size": 8}}, "transformers_weights": "a.safetensors"}
    for kind in FAMILIES:
        for field, value in values.items():
            assert f"{field} in {folder}/config.json: " in refused_directory(folder, kind, **{field: value})
        assert read(folder, kind, is_causal=True, per_layer_config={}, transformers_weights=None) == read(folder, kind)
    return refused_directory(folder, "opt", is_causal=False)


FIELDS: dict[str, Callable[[Path], str]] = {
    "a name of a size in other letters, `Llama-3.2-1B`": lambda folder: refused({"name": "Llama-3.2-1B"}),
    "a name of the hub, `meta-llama/Llama-3.2-1B`": lambda folder: refused({"name": "meta-llama/Llama-3.2-1B"}),
    "a directory of another family": lambda folder: refused_directory(folder, "mixtral"),
    "a directory whose config.json has no `model_type`": lambda folder: refused_directory(folder, None),
    "a `quantization_config`": lambda folder: refused_directory(folder, "llama", quantization_config={"bits": 4}),
    "a `model_type` that is not that of the name": lambda folder: tiny(model_type="qwen2"),
    "a field of another family": lambda folder: tiny(sliding_window=16),
    "a field of no family, in the section `model`": lambda folder: tiny(num_hidden_layer=2),
    "a field of config.json that Hugging Face's class does not have": unknown_to_hugging_face,
    "a null in config.json": nulls,
    "a `hidden_size` that the heads do not divide": lambda folder: tiny(hidden_size=100),
    "`head_dim`": head_width,
    "a `head_dim` that is odd": lambda folder: tiny(head_dim=15),
    "`num_key_value_heads` that do not divide the q heads": lambda folder: tiny(num_key_value_heads=3),
    "GPT-2's `hidden_size` beside `n_embd`": two_names,
    "`rope_scaling` as in transformers 4, with `rope_type` or `type`; `rope_parameters` as in transformers 5": (
        rotary_spellings
    ),
    "both spellings, with different values": lambda folder: tiny(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}),
    "a kind of rotary scaling that is not built": lambda folder: tiny(rope_scaling={"rope_type": "longrope"}),
    "a kind without a parameter that it needs": lambda folder: tiny(rope_scaling={"type": "linear"}),
    "a kind with a parameter of another one": lambda folder: tiny(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "low_freq_factor": 1.0}
    ),
    "a `rope_scaling` that is no dict": lambda folder: tiny(rope_scaling="linear"),
    "`partial_rotary_factor`": lambda folder: tiny(partial_rotary_factor=0.5),
    "samples that are longer than the model's positions": too_long,
    "Mistral's `sliding_window`": mistral_window,
    "`use_sliding_window` and `max_window_layers` of Qwen": qwen_windows,
    "`layer_types` of Qwen": qwen_kinds,
    "`layer_types` of a kind that is not built": lambda folder: refused_directory(
        folder, "qwen3", layer_types=["chunked_attention"] * 4
    ),
    "`layer_types` of Mistral": mistral_kinds,
    "`attention_bias` of Llama and Qwen3, `mlp_bias` of Llama": biases,
    "an activation that is not built": lambda folder: tiny(hidden_act="swish"),
    "a `pad_token_id` outside the vocabulary": lambda folder: tiny(pad_token_id=32000),
    "several `eos_token_id`": several_ends,
    "`tie_word_embeddings`, in any family": tied_or_not,
    "attention that GPT-2 scales by its layer's number, or computes in another precision; cross-attention": (
        gpt2_attention
    ),
    "OPT's `layerdrop`": lambda folder: refused({"name": "opt-tiny", "layerdrop": 0.1}),
    "`is_causal`, `per_layer_config` or `transformers_weights`, in any family": read_by_hugging_face,
}
ROWS = rows(PAGE, "Fields and directories that do not fit")


def test_every_row_about_fields_has_a_check() -> None:
    assert [row.what for row in ROWS] == list(FIELDS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_field_or_a_directory_is_treated_as_the_table_says(row: Row, tmp_path: Path) -> None:
    assert_said(row, FIELDS[row.what](tmp_path))


def assert_said(row: Row, said: str) -> None:
    """Assert that a message has all quoted words of a row; one that says what is refused quotes some."""
    quoted = [words for words in re.findall(r"`([^`]*)`", row.answer) if " " in words]
    assert all(words in said for words in quoted), (quoted, said)
    assert bool(said) == ("refused" in row.answer)
    assert bool(quoted) == bool(said)


# -- layouts


def layout(name: str, world_size: int, **parallel: Any) -> str:
    """Return the message with which a layout of a named size is refused; empty where it fits."""
    try:
        parse(
            {"model": {"name": name}, "parallel": parallel, "train": {"micro_batch_size": 36, "global_batch_size": 36}},
            world_size=world_size,
            resolve=resolve,
        )
    except ConfigError as error:
        return str(error)
    return ""


def tensor(mode: str, size: int, **more: int) -> dict[str, Any]:
    return dict(mode=mode, size=size, **more)


def context(kind: str, size: int) -> dict[str, Any]:
    return dict(kind=kind, size=size)


QWEN = "qwen2.5-0.5b"
LAYOUTS: dict[str, Callable[[], str]] = {
    "`llama-3.2-1b` in 1d over 8": lambda: layout("llama-3.2-1b", 8, tensor=tensor("1d", 8)),
    "`llama-3.2-1b` in 1d over 16": lambda: layout("llama-3.2-1b", 16, tensor=tensor("1d", 16)),
    "`qwen2.5-0.5b` in 1d over 4": lambda: layout(QWEN, 4, tensor=tensor("1d", 4)),
    "`qwen2.5-0.5b` in 2d over 4 × 4": lambda: layout(QWEN, 16, tensor=tensor("2d", 16)),
    "`qwen2.5-0.5b` in 2d with 4 rows and 2 columns": lambda: layout(QWEN, 8, tensor=tensor("2d", 8, rows=4)),
    "`qwen2.5-0.5b` in 3d over 27": lambda: layout(QWEN, 27, tensor=tensor("3d", 27)),
    "`qwen2.5-0.5b` with `all_to_all` over 4": lambda: layout(QWEN, 4, context=context("all_to_all", 4)),
    "`qwen2.5-0.5b` in 1d over 2, with `all_to_all` over 2": lambda: layout(
        QWEN, 4, tensor=tensor("1d", 2), context=context("all_to_all", 2)
    ),
    "`qwen2.5-0.5b` in 1d over 2, with a ring of 4": lambda: layout(
        QWEN, 8, tensor=tensor("1d", 2), context=context("ring", 4)
    ),
    "`smollm2-135m` in 1d over 2": lambda: layout("smollm2-135m", 2, tensor=tensor("1d", 2)),
    "`qwen3-0.6b` in 1d over 8": lambda: layout("qwen3-0.6b", 8, tensor=tensor("1d", 8)),
    "`gpt2-xl` in 1d over 2": lambda: layout("gpt2-xl", 2, tensor=tensor("1d", 2)),
}
LAYOUT_ROWS = rows(PAGE, "Layouts by example")


def test_every_row_about_layouts_has_a_check() -> None:
    assert [row.what for row in LAYOUT_ROWS] == list(LAYOUTS)


@pytest.mark.parametrize("row", LAYOUT_ROWS, ids=str)
def test_a_layout_fits_or_is_refused_as_the_table_says(row: Row) -> None:
    assert_said(row, LAYOUTS[row.what]())


def test_the_refusal_of_more_parts_than_key_value_heads_is_word_for_word() -> None:
    (listed,) = re.findall(r"^```\n(.*?)\n```$", TEXT, re.MULTILINE | re.DOTALL)
    assert layout("llama-3.2-1b", 16, tensor=tensor("1d", 16)) == listed


def test_a_refusal_names_known_fields_in_the_same_order_in_every_process() -> None:
    """It once had the order of a set, which differs between ranks."""
    (names,) = re.findall(r"Known: (.*)\.$", tiny(sliding_window=16))
    assert names.split(", ") == [field.name for field in dataclass_fields(LlamaShape)]
