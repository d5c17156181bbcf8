"""The sizes of OPT models, compared with Hugging Face's, and the check that a config fits them."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from models.costs import flops_per_token, layer_costs, parameter_count
from models.opt.shape import SIZES, OPTShape
from models.shapes import from_hugging_face, resolve, shape_of
from parallel.config import parse
from parallel.errors import ConfigError
from parallel.pipeline.partition import partition


def hugging_face(shape: OPTShape) -> OPTConfig:
    keys = asdict(shape)
    return OPTConfig(_remove_final_layer_norm=keys.pop("remove_final_layer_norm"), **keys)


def problems(**raw: Any) -> tuple[str, ...]:
    raw = {"data": {"sequence_length": 8}, "train": {"micro_batch_size": 144, "global_batch_size": 144}, **raw}
    with pytest.raises(ConfigError) as caught:
        parse(raw, resolve=resolve)
    return caught.value.problems


def tensor(**keys: Any) -> dict[str, Any]:
    return {"tensor": keys}


def test_a_shape_has_hugging_faces_defaults() -> None:
    theirs = OPTConfig()
    known = {key.name: getattr(theirs, key.name) for key in fields(OPTShape) if hasattr(theirs, key.name)}
    assert OPTShape(**known | dict(word_embed_proj_dim=None)) == OPTShape()
    assert theirs.word_embed_proj_dim == OPTShape().embedding_width
    assert theirs._remove_final_layer_norm is OPTShape().remove_final_layer_norm


def test_a_resolved_config_has_exactly_the_fields_of_the_familys_shape() -> None:
    fields_of_model = parse({}, resolve=resolve).model.fields
    assert fields_of_model.keys() == {key.name for key in fields(OPTShape)} | {"model_type"}


@pytest.mark.parametrize(
    "shape",
    [
        SIZES["opt-tiny"],
        SIZES["opt-125m"],
        SIZES["opt-350m"],
        SIZES["opt-175b"],
        replace(SIZES["opt-tiny"], enable_bias=False, remove_final_layer_norm=True),
        replace(SIZES["opt-tiny"], layer_norm_elementwise_affine=False),
    ],
)
def test_parameter_count_is_that_of_hugging_faces_model(shape: OPTShape) -> None:
    with torch.device("meta"):
        theirs = OPTForCausalLM(hugging_face(replace(shape, num_hidden_layers=2)))
    assert parameter_count(replace(shape, num_hidden_layers=2)) == sum(weight.numel() for weight in theirs.parameters())


@pytest.mark.parametrize(("name", "billions"), [("opt-1.3b", 1.3), ("opt-13b", 13), ("opt-30b", 30), ("opt-175b", 175)])
def test_a_named_size_has_about_the_parameters_it_is_named_for(name: str, billions: float) -> None:
    assert parameter_count(SIZES[name]) / 1e9 == pytest.approx(billions, rel=0.03)


def test_flops_are_three_times_those_of_the_forward_matmuls() -> None:
    """The reference adds up the matmuls."""
    shape, length = SIZES["opt-1.3b"], 1024
    hidden, ffn = shape.hidden_size, shape.ffn_dim
    layer = 2 * (4 * hidden * hidden + 2 * hidden * ffn) + 2 * (2 * hidden * length)  # scores, and values
    forward = shape.num_hidden_layers * layer + 2 * hidden * shape.vocab_size
    assert flops_per_token(shape, length) == 3 * forward


# -- reading a Hugging Face directory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "blocks"), [("cuda", [8, 8, 9, 7]), ("cpu", [8, 8, 8, 8])])
def test_the_partition_counts_the_time_of_more_than_matmuls(device: str, blocks: list[int]) -> None:
    """OPT-6.7b's last stage took 717 ms of a step on H100s, the others 585, with 8 blocks in each."""
    costs = layer_costs(SIZES["opt-6.7b"], 2048, device)
    first, *middle, last = (len(stage) for stage in partition(costs, 4))
    assert [first - 1, *middle, last - 1] == blocks
    assert (costs[-1] > 1.5 * costs[1]) == (device == "cuda")


@pytest.mark.parametrize("name", ["opt-tiny", "opt-350m"])
def test_what_hugging_face_saves_reads_back(tmp_path: Path, name: str) -> None:
    hugging_face(SIZES[name]).save_pretrained(tmp_path)
    assert from_hugging_face(tmp_path) == SIZES[name]


def test_an_embedding_is_as_wide_as_the_model_unless_its_width_is_given(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "opt", "hidden_size": 48, "word_embed_proj_dim": None})
    )
    assert from_hugging_face(tmp_path) == OPTShape(hidden_size=48)
    wider = parse({"model": {"path": str(tmp_path), "hidden_size": 96}}, resolve=resolve)
    assert shape_of(wider).embedding_width == 96


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "model_type None"),
        ('{"model_type": "bert"}', "model_type 'bert'"),
        ('{"model_type": "opt", "ffn_dim": "wide"}', "needs an int, got 'wide'"),
        ('{"model_type": "opt", "hidden_size": null}', "hidden_size: needs an int, got None"),
    ],
)
def test_a_directory_of_another_model_or_none_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    (problem,) = problems(model={"path": str(tmp_path)})
    assert str(tmp_path / "config.json") in problem
    assert words in problem


# -- resolving ---------------------------------------------------------------------------------------------------------


def test_resolve_fills_in_every_field_and_overrides_win() -> None:
    config = parse({"model": {"name": "opt-350m", "vocab_size": 300}}, resolve=resolve)
    assert shape_of(config) == replace(SIZES["opt-350m"], vocab_size=300)
    assert None not in {key: value for key, value in asdict(config.model).items() if key != "path"}.values()
    assert parse(config.to_dict(), resolve=resolve) == config


def pipeline(**keys: Any) -> dict[str, Any]:
    """Return a raw config whose section `parallel.pipeline` has these keys."""
    return {"parallel": {"pipeline": keys}}


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"model": {"name": "opt-1.2b"}}, "model.name: unknown model 'opt-1.2b'. Did you mean 'opt-1.3b'?"),
        (
            {"model": {"num_attention_heads": 7}},
            "model.num_attention_heads: 7 does not divide model.hidden_size 128. Try 2, 4 or 8.",
        ),
        ({"model": {"pad_token_id": 260}}, "model.pad_token_id: 260 is outside model.vocab_size 260. Try 259."),
        (
            {"model": {"activation_function": "gelu_ne"}},
            "model.activation_function: 'gelu_ne' is not available. Did you mean 'gelu_new'?",
        ),
        ({"model": {"layerdrop": 0.1}}, "model.layerdrop: 0.1 is not available. Try 0.0."),
        (
            {"data": {"sequence_length": 4096}},
            "data.sequence_length: 4096 is more than model.max_position_embeddings 2048. Try 2048.",
        ),
        (
            {"parallel": {"pipeline": {"size": 3, "layers": (1, 1, 1)}}},
            "parallel.pipeline.layers: (1, 1, 1) adds up to 3, but the model has 4 layers. Try (1, 2, 1).",
        ),
        (
            {"parallel": {"pipeline": {"size": 6, "layers": (0, 1, 1, 1, 2, 0)}}},
            "parallel.pipeline.layers: (0, 1, 1, 1, 2, 0) adds up to 5, but the model has 4 layers."
            " Try (0, 1, 1, 1, 1, 0).",
        ),
        (
            {"parallel": {"pipeline": 7}},
            "parallel.pipeline.size: 7 stages are more than embedding, 4 layers and head can fill. Try 6, or"
            " model.num_hidden_layers=5.",
        ),
        (
            pipeline(size=2, schedule="interleaved", chunks=4),
            "parallel.pipeline.chunks: size 2 × chunks 4 = 8 stages are more than embedding, 4 layers and head can"
            " fill. Try chunks=3, or size=1, or model.num_hidden_layers=6.",
        ),
        (
            pipeline(size=4, schedule="interleaved"),
            "parallel.pipeline.chunks: size 4 × chunks 2 = 8 stages are more than embedding, 4 layers and head can"
            " fill. Try size=3, or model.num_hidden_layers=6.",
        ),
        (
            pipeline(size=4, schedule="interleaved", chunks=7),
            "parallel.pipeline.chunks: size 4 × chunks 7 = 28 stages are more than embedding, 4 layers and head can"
            " fill. Try size=3, chunks=2.",
        ),
        (
            pipeline(size=1, schedule="interleaved", chunks=2**40),
            "parallel.pipeline.chunks: size 1 × chunks 1099511627776 = 1099511627776 stages are more than embedding, 4"
            " layers and head can fill. Try chunks=6.",
        ),
        (
            pipeline(size=4, schedule="zero_bubble_v"),
            "parallel.pipeline.chunks: size 4 × chunks 2 = 8 stages are more than embedding, 4 layers and head can"
            " fill. Try size=3, or model.num_hidden_layers=6.",
        ),
        (
            pipeline(size=3, layers=(2, 2)),
            "parallel.pipeline.layers: (2, 2) is for 2 stages, got size 3. Try (1, 2, 1).",
        ),
        (
            pipeline(size=2, schedule="interleaved", layers=(2, 2)),
            "parallel.pipeline.layers: (2, 2) is for 2 stages, got size 2 × chunks 2 = 4. Try (1, 1, 1, 1).",
        ),
        (
            pipeline(size=2, schedule="zero_bubble_v", layers=(1, 1, 1, 2)),
            "parallel.pipeline.layers: (1, 1, 1, 2) adds up to 5, but the model has 4 layers. Try (1, 1, 1, 1).",
        ),
        (
            pipeline(size=3, layers=(2, 0, 2)),
            "parallel.pipeline.layers: (2, 0, 2) leaves stage 1 empty; only the first, which has the embedding, and the"
            " last, which has the head, may have no layers. Try (1, 2, 1).",
        ),
    ],
)
def test_a_value_that_does_not_fit_a_model_is_refused_with_the_nearest(raw: dict[str, Any], problem: str) -> None:
    assert problems(**raw) == (problem,)


def test_a_schedules_file_with_more_stages_than_layers_is_refused_with_the_layers_that_it_needs(tmp_path: Path) -> None:
    """Its stages are given, so that neither chunks nor size could be other ones."""
    file = tmp_path / "own.csv"
    file.write_text(",".join([*(f"{stage}F0" for stage in range(7)), *(f"{6 - stage}B0" for stage in range(7))]))
    assert problems(**pipeline(schedule=str(file))) == (
        "parallel.pipeline.chunks: size 1 × chunks 7 = 7 stages are more than embedding, 4 layers and head can fill."
        " Try model.num_hidden_layers=5.",
    )


@pytest.mark.parametrize(
    ("model", "tensor", "keys"),
    [
        ({"ffn_dim": 510}, {"mode": "1d", "size": 4}, ["ffn_dim"]),
        ({"word_embed_proj_dim": 66}, {"mode": "2d", "size": 16}, ["word_embed_proj_dim"] * 2),
        ({"ffn_dim": 513}, {"mode": "2d", "size": 2, "rows": 1}, ["ffn_dim"]),
        ({"ffn_dim": 513}, {"mode": "2d", "size": 2, "rows": 2}, ["ffn_dim"]),
        ({"ffn_dim": 510}, {"mode": "3d", "size": 8}, ["ffn_dim"]),
        ({"num_attention_heads": 1}, {"mode": "3d", "size": 8}, ["num_attention_heads"]),
        ({"num_attention_heads": 1}, {"mode": "2d", "size": 2, "rows": 2}, []),
        ({"vocab_size": 261}, {"mode": "3d", "size": 8}, []),
    ],
)
def test_a_mode_must_divide_these_widths(model: dict[str, Any], tensor: dict[str, Any], keys: list[str]) -> None:
    raw = {"model": model, "parallel": {"tensor": tensor}, "train": {"micro_batch_size": 4}}
    _, found = resolve(parse(raw))
    assert [problem.partition(":")[0] for problem in found] == [f"model.{key}" for key in keys]


def test_an_indivisible_width_names_the_nearest_sizes() -> None:
    assert problems(parallel=tensor(mode="1d", size=3)) == (
        "model.num_attention_heads: 8 is not divisible by tensor.size 3. Try size 2, 4 or 8.",
        "model.ffn_dim: 512 is not divisible by tensor.size 3. Try size 2, 4 or 8.",
    )
    assert problems(parallel=tensor(mode="2d", size=9))[-1] == (
        "model.word_embed_proj_dim: 128 is not divisible by the 3 rows of tensor.size 9. Try 2, 4 or 8 rows."
    )
    assert problems(parallel=tensor(mode="3d", size=27))[1] == (
        "model.hidden_size: 128 is not divisible by 3 × 3, a face of the cube of tensor.size 27. Try size 8, 64 or 512."
    )


@pytest.mark.parametrize(
    "wrong",
    [
        dict(ffn_dim=8, hidden_sise=64, vocab_size=0),  # unknown, misspelt, out of range
        dict(ffn_dim=8, num_key_value_heads=3),  # unknown, and one that does not fit the others
    ],
)
def test_all_that_is_wrong_in_the_section_model_is_said_at_once(wrong: dict[str, int]) -> None:
    said = {problem.partition(":")[0] for problem in problems(model=dict(name="llama-tiny", **wrong))}
    assert said == {f"model.{key}" for key in wrong}
