"""Shapes, sizes and rotary positions of Llama, Mistral, Qwen2 and Qwen3, compared with Hugging Face's."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.costs import parameter_count
from models.family import FAMILIES
from models.llama.layers import block_of
from models.llama.rope import RopeScaling
from models.llama.shape import LlamaShape, MinistralShape, MistralShape, Qwen2Shape, Qwen3Shape
from models.llama.shared import SharedShape
from models.llama.sizes import LLAMA, MISTRAL, QWEN2, QWEN3
from models.rotary import Rotary, RotarySettings
from models.shapes import from_hugging_face, resolve, shape_of
from parallel.config import parse
from parallel.config.parallel import TensorConfig
from parallel.errors import ConfigError, ModelError
from parallel.mesh.mesh import ALONE
from parallel.ops.kernels.heads import rotated
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence import Documents
from parallel.sequence.split import SequenceSplit
from tests.accounts import bytes_kept, mode_of, saved_for_backward
from tests.harness import run

CPU = torch.device("cpu")
TINY = LLAMA["llama-tiny"]
CLASSES: tuple[type[SharedShape], ...] = (LlamaShape, MinistralShape, MistralShape, Qwen2Shape, Qwen3Shape)

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "yarn": dict(rope_type="yarn", factor=4.0),
    "yarn with an original length": dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=20.0, beta_slow=2.0
    ),
    "yarn with an attention factor": dict(rope_type="yarn", factor=4.0, attention_factor=1.3),
    "yarn with weights, not rounded": dict(
        rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.2, truncate=False
    ),
}


def shrunk(shape: SharedShape, **changes: Any) -> SharedShape:
    """Return a small copy of a shape, with what its family has of its own."""
    small: dict[str, Any] = dict(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    return shape.with_fields(**small | changes)


def write_config(folder: Path, raw: Mapping[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def theirs_of(folder: Path, shape: SharedShape) -> Any:
    """Return what Hugging Face reads in the config.json of an export."""
    raw = {"model_type": shape.model_type, "architectures": [shape.architecture], **shape.exported()}
    return AutoConfig.from_pretrained(write_config(folder, raw))


def rotary_of(shape: SharedShape) -> Rotary:
    settings = RotarySettings(shape.head_size, shape.rope_theta, shape.scaling, shape.max_position_embeddings)
    return Rotary(settings, CPU)


def problems(**model: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({"model": model, "data": {"sequence_length": 8}}, resolve=resolve)
    return "\n".join(caught.value.problems)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", CLASSES)
def test_a_shape_has_the_fields_and_defaults_of_hugging_faces_config(shape: type[SharedShape]) -> None:
    """The rotary positions are two fields, as in transformers 4; the others are those of the installed version."""
    theirs = type(AutoConfig.for_model(shape.model_type))
    own = {field.name for field in fields(theirs)} - {field.name for field in fields(PreTrainedConfig)}
    # Hugging Face's models read these from a file, though their configs do not declare them: used, and ignored.
    undeclared = {"qwen2": {"head_dim"}, "mistral": {"layer_types"}}.get(shape.model_type, set())
    ours = {field.name: field.default for field in fields(shape)}
    assert ours.keys() - undeclared - {"rope_theta", "rope_scaling"} == own - {"rope_parameters"}
    defaults = {field.name: field.default for field in fields(theirs)}
    # An interval's default is wrapped; an object of the class has it.
    assert {name: ours[name] for name in own if name in ours and isinstance(defaults[name], int | float | str)} == {
        name: value for name, value in defaults.items() if name in ours and isinstance(value, int | float | str)
    }
    assert all(ours[name] is None for name in own & ours.keys() if defaults[name] is None)
    assert ours["rope_theta"] == theirs.default_theta


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_size_has_the_published_number_of_parameters(name: str) -> None:
    shape = {**LLAMA, **MISTRAL, **QWEN2, **QWEN3}[name]
    assert parameter_count(shape) == PUBLISHED[name]
    assert shape.problems() == []


def test_every_named_size_is_compared_but_the_tiny_ones() -> None:
    names = {name for sizes in (LLAMA, MISTRAL, QWEN2, QWEN3) for name in sizes}
    assert names - PUBLISHED.keys() == {"llama-tiny", "qwen3-tiny"}
    assert all(1.0e6 < parameter_count(shape) < 1.2e6 for shape in (TINY, QWEN3["qwen3-tiny"]))


@pytest.mark.parametrize(
    "shape",
    [
        shrunk(LLAMA["llama-3.1-8b"]),
        shrunk(LLAMA["llama-3.2-1b"], attention_bias=True, mlp_bias=True, head_dim=16),
        shrunk(MISTRAL["mistral-7b"]),
        shrunk(QWEN2["qwen2.5-0.5b"]),
        shrunk(QWEN3["qwen3-8b"], attention_bias=True),
        shrunk(QWEN3["qwen3-0.6b"], head_dim=20),
    ],
    ids=lambda shape: f"{shape.model_type}-{'tied' if shape.tie_word_embeddings else 'untied'}",
)
def test_the_public_tensors_are_those_of_hugging_faces_model(shape: SharedShape, tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(theirs_of(tmp_path, shape)).state_dict()
    if shape.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert list(shape.public_tensors().items()) == [(name, tuple(x.shape)) for name, x in theirs.items()]


def test_every_public_tensor_is_a_source_of_exactly_one_parameter() -> None:
    for shape in (shrunk(TINY), shrunk(QWEN3["qwen3-0.6b"], attention_bias=True), shrunk(QWEN2["qwen2.5-7b"])):
        leaves = dict.fromkeys(("attention.qkv", "attention.out"), ("weight", "bias"))
        found: list[str] = []
        for module in shape.names():
            places = [module] if module.startswith(("embed", "head")) else [f"layers.{i}.{module}" for i in range(2)]
            for place in places:
                for leaf in leaves.get(module, ("weight",)):
                    try:
                        found += [source.name for source in shape.sources(f"{place}.{leaf}")]
                    except ModelError:  # the shape has no such bias, norm or head of its own
                        continue
        assert sorted(set(found)) == sorted(shape.public_tensors())
        assert len(found) - len(set(found)) == shape.tie_word_embeddings  # the tied table is the head's, too


def test_grouped_heads_are_named_where_a_mode_does_not_divide_them() -> None:
    raw: dict[str, Any] = {"data": {"sequence_length": 8}, "parallel": {"tensor": {"mode": "1d", "size": 8}}}
    with pytest.raises(ConfigError, match=r"model.num_key_value_heads: 4 is not divisible by .* Try size 2 or 4\."):
        parse({**raw, "model": {"name": "llama-tiny"}}, resolve=resolve)
    wide = {"name": "qwen3-tiny", "head_dim": 6, "num_attention_heads": 4}
    raw["parallel"]["tensor"] = {"mode": "3d", "size": 64}
    with pytest.raises(ConfigError, match=r"model\.num_attention_heads × head_dim: 24 is not divisible by 4 × 4"):
        parse({**raw, "model": wide}, resolve=resolve)


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Qwen2Shape(), Qwen3Shape()], ids=lambda shape: shape.model_type)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ("sliding_attention", "full_attention") * 2},
    ],
)
def test_windows_are_those_of_hugging_faces_layers(shape: SharedShape, changes: dict[str, Any], tmp_path: Path) -> None:
    ours = shrunk(shape).with_fields(num_hidden_layers=4, **changes)
    raw = {**ours.exported(), "model_type": ours.model_type, "layer_types": changes.get("layer_types")}
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(write_config(tmp_path, raw))
        theirs = AutoModelForCausalLM.from_config(config).model.layers
    assert ours.windows() == [layer.self_attn.sliding_window for layer in theirs]
    assert ours.spans(5) == [5] * 4
    assert ours.spans(100) == [window or 100 for window in ours.windows()]


@pytest.mark.parametrize("shape", [MistralShape(), MinistralShape()], ids=lambda shape: shape.model_type)
def test_a_mistral_with_layer_types_has_the_windows_of_the_model_that_hugging_face_reads(
    shape: SharedShape, tmp_path: Path
) -> None:
    """`AutoModel` takes a mistral's config with layer_types for a ministral's; so the export says that it is one."""
    types = ("sliding_attention", "full_attention") * 2
    ours = shrunk(shape).with_fields(num_hidden_layers=4, sliding_window=7, layer_types=types)
    config = theirs_of(tmp_path, ours)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).model.layers
    assert config.model_type == "ministral"
    assert ours.windows() == [7, None, 7, None] == [layer.self_attn.sliding_window for layer in theirs]
    config.save_pretrained(tmp_path / "saved")
    read = from_hugging_face(tmp_path / "saved")
    assert (read.model_type, read.spans(100)) == ("ministral", ours.spans(100))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text()) | {"model_type": "mistral"}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(saved))
    assert from_hugging_face(tmp_path / "saved").spans(100) == ours.spans(100)


def test_a_file_that_writes_default_layer_types_out_can_be_given_fewer_layers(tmp_path: Path) -> None:
    """transformers 5 writes `layer_types` of all layers, which do not fit another number of them."""
    theirs_of(tmp_path, QWEN3["qwen3-0.6b"]).save_pretrained(tmp_path)
    assert "full_attention" in (tmp_path / "config.json").read_text()
    config = parse({"model": {"path": str(tmp_path), "num_hidden_layers": 3}}, resolve=resolve)
    assert shape_of(config).with_fields(num_hidden_layers=28) == QWEN3["qwen3-0.6b"]


# -- rotary positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_size", [8, 80])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_the_tables_are_hugging_faces_to_the_last_bit(scaling: dict[str, Any], head_size: int, tmp_path: Path) -> None:
    """300 positions are more than the 128 of the model, so that dynamic scaling has another base."""
    ours = replace(TINY, head_dim=head_size, max_position_embeddings=128, rope_theta=5e5)
    ours = replace(ours, rope_scaling=RopeScaling(**scaling) if scaling else None)
    theirs = LlamaRotaryEmbedding(theirs_of(tmp_path, ours))
    for length in (100, 300):
        positions = torch.arange(length).unsqueeze(0)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            cos, sin = rotary_of(ours).tables(positions, length, dtype)
            expected = theirs(torch.empty(0, dtype=dtype), positions)
            assert torch.equal(cos.squeeze(1), expected[0])
            assert torch.equal(sin.squeeze(1), expected[1])


def test_dynamic_tables_depend_on_their_own_batch_alone(tmp_path: Path) -> None:
    """Hugging Face's remember the longest sequence; ours after a long one are those of a new model of theirs."""
    ours = replace(TINY, max_position_embeddings=128, rope_scaling=RopeScaling("dynamic", factor=3.0))
    rotary, positions = rotary_of(ours), torch.arange(200).unsqueeze(0)
    rotary.tables(torch.arange(300).unsqueeze(0), 300, torch.float32)
    cos, _ = rotary.tables(positions, 200, torch.float32)
    fresh, _ = LlamaRotaryEmbedding(theirs_of(tmp_path, ours))(torch.empty(0), positions)
    assert torch.equal(cos.squeeze(1), fresh)
    by_ids, _ = rotary.tables(positions, torch.tensor(200), torch.float32)
    assert torch.equal(by_ids, cos)


def test_dynamic_tables_of_a_document_are_those_of_its_own_length() -> None:
    """They were those of the longest document of the microbatch, so that a split into others gave another loss."""
    ours = replace(TINY, max_position_embeddings=4, rope_scaling=RopeScaling("dynamic", factor=3.0))
    mode, x, ids = mode_of(0, TensorConfig(), torch.float32), torch.randn(2, 4, 10, 16), torch.zeros(2, 10).long()
    ids[0, 7:] = 1
    batch = Microbatch(ids, ids, torch.arange(2), documents=Documents.of(ids))
    found, _ = rotary_of(ours)(x, x, batch, mode)
    for sample, part in ((0, slice(0, 7)), (0, slice(7, 10)), (1, slice(0, 10))):
        one, tokens = x[sample : sample + 1, :, part], ids[:1, part]
        alone, _ = rotary_of(ours)(one, one, Microbatch(tokens, tokens, torch.arange(1)), mode)
        torch.testing.assert_close(found[sample : sample + 1, :, part], alone, rtol=1e-6, atol=1e-6)


class LaterHalf(SequenceSplit):
    """A split of which this rank has the positions of the later half."""

    def ranges(self, local: int) -> tuple[range, ...]:
        return (range(local, 2 * local),)

    def local_part(self, x: Tensor) -> Tensor:
        return x[:, x.shape[1] // 2 :]


@pytest.mark.parametrize("is_given", [False, True])
def test_a_rank_turns_by_the_positions_that_it_has_of_the_whole_sequence(is_given: bool) -> None:
    mode, rotary, x = mode_of(0, TensorConfig(), torch.float32), rotary_of(TINY), torch.randn(2, 4, 10, 16)
    tokens, positions = torch.zeros(2, 10, dtype=torch.int64), torch.arange(10)
    ids = torch.stack((positions, positions + 3)) if is_given else None
    batch = Microbatch(tokens, tokens, torch.arange(2), position_ids=ids)
    whole, _ = rotary(x, x, batch, mode)
    mode.sequence = LaterHalf(ALONE)
    part, _ = rotary(x[:, :, 5:], x[:, :, 5:], batch, mode)
    assert torch.equal(part, whole[:, :, 5:])


@pytest.mark.slow
def test_compiled_code_has_the_same_tables_to_the_last_bit() -> None:
    """The compiler's own cosines of fp32 angles were off by a bit, 1e-8 in the loss of an fp64 model."""
    assert run(compiled_is_equal, 1) == [True]


def compiled_is_equal(rank: int, world_size: int) -> bool:
    mode, rotary = mode_of(0, TensorConfig(), torch.float64), rotary_of(TINY)
    tokens, x = torch.zeros(1, 300, dtype=torch.int64), torch.randn(1, 2, 300, 16, dtype=torch.float64)
    batch = Microbatch(tokens, tokens, torch.arange(1))

    def turned(x: Tensor) -> Tensor:
        q, _ = rotary(x, x, batch, mode)
        return q

    return torch.equal(torch.compile(turned)(x), turned(x))


def test_q_and_k_are_turned_as_hugging_face_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 16)
    cos, sin = rotary_of(TINY).tables(torch.randint(0, 2000, (2, 50)), 50, x.dtype)
    expected, _ = apply_rotary_pos_emb(x, x, cos.squeeze(1), sin.squeeze(1))
    assert torch.equal(rotated(x, cos, sin), expected)


@pytest.mark.parametrize("size", [4, 12])
def test_tables_narrower_than_a_head_turn_its_first_elements_as_in_gpt_neox(size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 16)
    cos, sin = Rotary(RotarySettings(size, 1e4, TINY.scaling, 64), CPU).tables(torch.arange(50)[None], 50, x.dtype)
    expected, _ = modeling_gpt_neox.apply_rotary_pos_emb(x, x, cos.squeeze(1), sin.squeeze(1))
    assert torch.equal(rotated(x, cos, sin), expected)


def test_a_rotation_keeps_the_tables_alone_for_backward() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, 3, 50, 16, requires_grad=True)
    cos, sin = rotary_of(TINY).tables(torch.arange(50).unsqueeze(0), 50, x.dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rotated(x, cos, sin)
    assert {tensor.data_ptr() for tensor in saved} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize(
    "shape",
    [
        shrunk(TINY),
        shrunk(TINY, num_key_value_heads=4),
        shrunk(TINY, hidden_act="gelu"),
        shrunk(QWEN3["qwen3-tiny"]),
        shrunk(QWEN3["qwen3-tiny"], num_key_value_heads=4),
    ],
)
def test_a_block_keeps_what_its_shape_says_and_the_tables(shape: SharedShape) -> None:
    """A view of v once kept the whole output of the linear of q, k and v, of which q and k are not needed any more."""
    mode, tokens = mode_of(0, TensorConfig(), torch.float32), torch.zeros(3, 6, dtype=torch.int64)
    block = block_of(shape, mode, rotary_of(shape), None, seed=0)
    x = torch.ones(3, 6, shape.hidden_size, requires_grad=True)
    with saved_for_backward() as saved:
        block(x, Microbatch(tokens, tokens, torch.arange(3)))
    kept, tables = shape.kept(), 2 * 6 * shape.head_size
    assert bytes_kept(saved, block) == 4 * (tokens.numel() * (kept.outer + kept.inner + kept.statistics) + tables)


def test_all_blocks_of_a_stage_share_the_tables_of_a_microbatch() -> None:
    mode, rotary = mode_of(0, TensorConfig(), torch.float32), rotary_of(TINY)
    ids, q = torch.arange(12).view(2, 6) % 4, torch.randn(2, 4, 6, 16, requires_grad=True)
    tokens = torch.zeros(2, 6, dtype=torch.int64)

    def tables_of(batch: Microbatch) -> set[int]:
        with saved_for_backward() as saved:
            rotary(q, q, batch, mode)
        return {x.data_ptr() for x in saved}

    counted = Microbatch(tokens, tokens, torch.arange(2))
    given = replace(counted, position_ids=ids)
    assert tables_of(counted) == tables_of(replace(counted))
    assert tables_of(given) == tables_of(given) != tables_of(counted)
    before, _ = rotary(q, q, given, mode)
    other, _ = rotary(q, q, replace(counted, position_ids=ids.flip(1)), mode)
    assert not torch.equal(before, other)
    rotary(q, q, given, mode)
    ids += 1  # a caller's buffer, written in place
    after, _ = rotary(q, q, given, mode)
    assert not torch.equal(before, after)


# -- config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_both_spellings_of_a_file_are_read(scaling: dict[str, Any], tmp_path: Path) -> None:
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling or None}
    new = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default", **scaling}}
    oldest = {**old, "rope_scaling": {"type" if key == "rope_type" else key: v for key, v in scaling.items()} or None}
    expected = LlamaShape(rope_theta=5e5, rope_scaling=RopeScaling(**scaling) if scaling else None)
    for raw in (old, new, oldest, {**old, **new, "rope_scaling": None}):
        assert from_hugging_face(write_config(tmp_path, raw)) == expected


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_an_original_length_beside_the_dict_is_the_one_that_hugging_face_uses(kind: str, tmp_path: Path) -> None:
    """It was ignored, as a field that Hugging Face's class does not have: the angles were others, without a word."""
    scaling = {key: value for key, value in SCALINGS[kind].items() if key != "original_max_position_embeddings"}
    raw = shrunk(TINY).exported() | {"model_type": "llama", "rope_scaling": scaling, "head_dim": 32}
    write_config(tmp_path, {**raw, "hidden_size": 128, "original_max_position_embeddings": 16})
    shape = from_hugging_face(tmp_path)
    assert isinstance(shape, SharedShape)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.arange(16)[None]
    cos, sin = rotary_of(shape).tables(positions, 16, torch.float64)
    expected = theirs(torch.zeros(1, dtype=torch.float64), positions)
    assert torch.equal(cos[:, 0], expected[0])
    assert torch.equal(sin[:, 0], expected[1])


def test_a_ministral_without_windows_is_exported_as_the_mistral_that_it_is(tmp_path: Path) -> None:
    """Hugging Face's Ministral fails in its first step where `sliding_window` is null."""
    for shape in (
        MinistralShape(sliding_window=None),
        MistralShape(sliding_window=None, layer_types=("full_attention",) * 32),
    ):
        theirs = theirs_of(tmp_path, shape)
        assert (theirs.model_type, theirs.sliding_window) == ("mistral", None)
        again = from_hugging_face(tmp_path)
        assert isinstance(again, SharedShape)
        assert again.windows() == shape.windows()


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_an_export_is_read_to_the_same_numbers_and_again_by_us(scaling: dict[str, Any], tmp_path: Path) -> None:
    rope = RopeScaling(**scaling) if scaling else None
    for sizes in (LLAMA, MISTRAL, QWEN2, QWEN3):
        shape = shrunk(next(iter(sizes.values()))).with_fields(rope_scaling=rope, eos_token_id=(1, 2))
        theirs = theirs_of(tmp_path, shape)
        assert (theirs.num_key_value_heads, theirs.head_dim) == (shape.num_kv_heads, shape.head_size)
        assert theirs.eos_token_id == [1, 2]
        assert theirs.rope_parameters["rope_theta"] == shape.rope_theta
        assert {key: theirs.rope_parameters.get(key) for key in scaling} == scaling
        again = from_hugging_face(tmp_path)
        assert again.exported() == shape.exported()


@pytest.mark.parametrize("name", ["llama-3.2-1b", "mistral-7b", "qwen2.5-7b", "qwen3-4b"])
def test_a_file_that_hugging_face_saves_is_the_shape_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    shape = {**LLAMA, **MISTRAL, **QWEN2, **QWEN3}[name]
    theirs_of(tmp_path, shape).save_pretrained(tmp_path)
    again = from_hugging_face(tmp_path)
    assert isinstance(again, SharedShape)
    assert again.windows() == shape.windows()
    assert again.exported() | {"sliding_window": None} == shape.exported() | {"sliding_window": None}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_the_section_model_may_set_the_rotary_positions(scaling: dict[str, Any]) -> None:
    config = parse({"model": {"name": "llama-3.2-1b", "rope_scaling": scaling or None}}, resolve=resolve)
    expected = replace(LLAMA["llama-3.2-1b"], rope_scaling=RopeScaling(**scaling) if scaling else None)
    assert shape_of(config) == expected
    assert shape_of(parse(config.to_dict(), resolve=resolve)) == expected


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 2048),
        (RopeScaling("linear", factor=2.5), 5120),
        (RopeScaling("dynamic", factor=2.0), 4096),
        (RopeScaling("yarn", factor=4.0), 8192),
        (RopeScaling("yarn", factor=4.0, original_max_position_embeddings=512), 2048),
        (RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), 2048),
    ],
)
def test_scaling_allows_sequences_as_long_as_it_was_made_for(scaling: RopeScaling | None, longest: int) -> None:
    assert replace(TINY, rope_scaling=scaling).max_positions == longest


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "rope_scaling.rope_type: 'longrope' is not",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type: 'mrope' is not available"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "finetuned": True}},
            "rope_scaling.finetuned: unknown key",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}},
            "rope_scaling.beta_fast: rope_type",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor: rope_type 'default' has no such parameter"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.factor: rope_type 'dynamic' needs it"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor: needs at least 1, got 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e300}}, "rope_scaling.factor: needs at most 1048576, got"),
        ({"rope_theta": 1, "rope_scaling": SCALINGS["yarn"]}, "model.rope_theta: rope_type 'yarn' needs more than 1"),
        ({"rope_scaling": {**SCALINGS["llama3"], "high_freq_factor": 1.0}}, "high_freq_factor: 1.0 is not more than"),
        ({"rope_scaling": {**SCALINGS["linear"], "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not"),
        ({"rope_scaling": {**SCALINGS["linear"], "type": "yarn"}}, "rope_scaling.type: 'yarn' is not the rope_type"),
        ({"rope_scaling": "linear"}, "model.rope_scaling: needs a dict, got 'linear'"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "model.rope_theta: it is given as 10000.0 and as",
        ),
        (
            {"rope_parameters": SCALINGS["linear"], "rope_scaling": SCALINGS["yarn"]},
            "model.rope_scaling: rope_parameters",
        ),
        (
            {"rope_parameters": {"full_attention": SCALINGS["linear"], "sliding_attention": SCALINGS["linear"]}},
            "rotary positions of each type of layers (full_attention, sliding_attention) are not available",
        ),
        (
            {"rope_parameters": {**SCALINGS["linear"], "rope_theta": 50.0}, "rope_scaling": SCALINGS["linear"]},
            "model.rope_theta: of rope_parameters and rope_scaling one gives it as 50.0, and the other does not",
        ),
        (
            {"rope_scaling": SCALINGS["llama3"], "original_max_position_embeddings": 32},
            "original_max_position_embeddings: it is given as 64 and as 32, once outside of the dict",
        ),
        (
            {
                "name": "llama-3.2-1b",
                "rope_parameters": {"rope_theta": 1e6},
            },  # the scaling was left out, without a word
            "model.rope_parameters: it has no rope_type, and the model's own is 'llama3'",
        ),
        ({"partial_rotary_factor": 0.5}, "model.partial_rotary_factor: 0.5 is not supported. Try 1.0"),
        ({"is_causal": False}, "model.is_causal: False is not supported"),
        (
            {"num_key_value_heads": 3},
            "model.num_key_value_heads: 3 does not divide model.num_attention_heads 8. Try 2, 4",
        ),
        ({"head_dim": 15}, "model.head_dim: rotary positions turn pairs, but a head has 15 elements. Try 16"),
        ({"head_dim": 2, "rope_scaling": SCALINGS["dynamic"]}, "'dynamic' needs heads of at least 4 elements"),
        ({"hidden_act": "swiglu"}, "model.hidden_act: 'swiglu' is not available"),
        ({"pad_token_id": 260}, "model.pad_token_id: 260 is outside model.vocab_size 260"),
        ({"name": "mistral-7b", "layer_types": ["full_attention"] * 3}, "it has 3 entries, but"),
        (
            {"name": "mistral-7b", "sliding_window": None, "layer_types": ["sliding_attention"] * 32},
            "model.sliding_window: None is no window",
        ),
        ({"name": "qwen3-tiny", "layer_types": ["sliding_attention"] * 4}, "model.use_sliding_window is False"),
        (
            {"name": "qwen3-tiny", "layer_types": ["full_attention"] * 3},
            "it has 3 entries, but model.num_hidden_layers",
        ),
        ({"name": "qwen3-tiny", "layer_types": ["linear_attention"] * 4}, "'linear_attention' is not available"),
        ({"name": "qwen3-tiny", "use_sliding_window": True}, "model.sliding_window: None is no window"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model: dict[str, Any], message: str) -> None:
    assert message in problems(**{"name": "llama-tiny", **model})


def test_a_file_with_more_layers_than_a_model_has_is_refused_in_no_time(tmp_path: Path) -> None:
    """The windows of all of them were listed first, to compare them with `layer_types`."""
    raw = {"model_type": "mistral", "num_hidden_layers": 10**13, "layer_types": ["full_attention"]}
    with pytest.raises(ConfigError, match="num_hidden_layers: needs at most 1024"):
        from_hugging_face(write_config(tmp_path, raw))


def test_the_families_of_llama_are_known() -> None:
    assert {kind for kind, family in FAMILIES.items() if issubclass(family.shape, SharedShape)} == {
        *("llama", "ministral", "mistral", "qwen2", "qwen3")
    }
