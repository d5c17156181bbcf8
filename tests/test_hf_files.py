"""Hugging Face directories: we read, by the slice, what transformers writes; it reads what we write, bit for bit."""

import json
import resource
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from models import hf
from models.build import part_of
from models.opt.shape import OPTShape
from models.shape import ModelShape
from models.shapes import fields_of, from_hugging_face, resolve
from models.tokenizer import ByteTokenizer
from parallel.checkpoint import hf_folder
from parallel.checkpoint.tensor_file import Entry, write_tensors
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.errors import DataError, DiskFullError
from parallel.layout.layout import Layout, ParameterInfo, Piece, slices
from parallel.mesh.mesh import Axis, Traffic
from tests.harness import run
from tests.parity import owns

SMALL: dict[str, Any] = {
    "vocab_size": 51,  # no axis divides it
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 24,
    "max_position_embeddings": 30,
    "word_embed_proj_dim": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "projected": {"word_embed_proj_dim": 8, "do_layer_norm_before": False},  # as in OPT-350m
    "bare": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "no final norm": {"_remove_final_layer_norm": True},
}


def hugging_face_model(variant: str) -> Any:
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**(SMALL | VARIANTS[variant])))
    for parameter in model.parameters():  # all elements differ, those of biases and norms too
        nn.init.normal_(parameter)
    return model


def public_tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def axis(rank: int, size: int) -> Axis:
    return Axis("planned", rank, size, tuple(range(size)), None, Traffic())


def world(rank: int, size: int) -> Axis:
    return Axis("world", rank, size, tuple(range(size)), dist.group.WORLD if size > 1 else None, Traffic())


def parameters_of(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return our parameters and their shapes, with q, k and v fused."""
    config = parse({"model": fields_of(shape), "data": {"sequence_length": 2}}, resolve=resolve)
    context = make_context(config, Place(), connect=False, device=torch.device("meta"))
    return {info.name: info.layout.shape for info in part_of(context).infos}


def infos_of(shape: ModelShape, rank: int, size: int) -> list[ParameterInfo]:
    """Return zeros for this rank: a matrix is split over rows and columns, a vector over columns only, fused or not."""
    row, column = axis(rank // 2, max(1, size // 2)), axis(rank % 2, min(2, size))
    infos = []
    for name, full in parameters_of(shape).items():
        is_matrix = len(full) - (".qkv." in name) == 2
        split = ((row,), (column,)) if is_matrix else ((column,),)
        dims = (*((),) * (len(full) - len(split)), *split)
        layout = Layout(full, dims, copies=() if is_matrix else (row,))
        parameter, unit = nn.Parameter(torch.zeros(layout.local_shape)), name.split(".")[0]
        infos.append(ParameterInfo(name, unit, parameter, layout, shape.sources(name)))
    return infos


def load_and_export(rank: int, size: int, source: Path, target: Path, max_shard_bytes: int) -> int:
    """Load a directory in parts, export it again, and return the bytes read.

    The caller compares the export with the source, and with it what each rank has loaded.
    """
    shape = from_hugging_face(source)
    infos = infos_of(shape, rank, size)
    hf.check_weights(source, shape)
    num_bytes = hf.load_weights(source, shape, [piece for info in infos for piece in info.pieces()])
    owned = [piece for info in infos if owns(info.layout) for piece in info.pieces()]
    with patch.object(hf_folder, "MAX_SHARD_BYTES", max_shard_bytes):
        axes, tokenizer = world(rank, size), ByteTokenizer()
        hf.export(target, owned, shape=shape, axis=axes, dtype=torch.float32, tokenizer=tokenizer)
    return num_bytes


@pytest.mark.parametrize("variant", VARIANTS)
def test_expected_tensors_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    model = hugging_face_model(variant)
    model.config.save_pretrained(tmp_path)
    theirs = {name: tuple(tensor.shape) for name, tensor in public_tensors(model).items()}
    assert from_hugging_face(tmp_path).public_tensors() == theirs


def test_sources_name_the_tensors_of_hugging_face() -> None:
    def names(parameter: str) -> tuple[str, ...]:
        return tuple(source.name for source in OPTShape(num_hidden_layers=4).sources(parameter))

    assert names("embed.table.weight") == ("model.decoder.embed_tokens.weight",)
    assert names("head.table.weight") == ("model.decoder.embed_tokens.weight",)
    assert names("head.norm.bias") == ("model.decoder.final_layer_norm.bias",)
    assert names("layers.3.feed_forward.up.bias") == ("model.decoder.layers.3.fc1.bias",)
    assert names("layers.3.attention.qkv.weight") == tuple(
        f"model.decoder.layers.3.self_attn.{projection}_proj.weight" for projection in "qkv"
    )


@pytest.mark.parametrize(
    ("variant", "size", "source_shards", "max_shard_bytes"),
    [
        ("plain", 1, "1GB", 10**9),
        ("projected", 4, "5KB", 7000),
        ("bare", 2, "5KB", 10**9),
        ("no final norm", 2, "1GB", 7000),
    ],
)
def test_transformers_reads_back_bit_for_bit_what_it_wrote(
    tmp_path: Path, variant: str, size: int, source_shards: str, max_shard_bytes: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "run" / "export"
    model = hugging_face_model(variant)
    model.save_pretrained(source, max_shard_size=source_shards)
    run(load_and_export, size, source, target, max_shard_bytes)
    again = OPTForCausalLM.from_pretrained(target)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert ours == {key: value for key, value in theirs.items() if key not in ("transformers_version", "use_cache")}
    ids = torch.arange(6)[None]
    assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(target).decode([4 + ord("o"), 4 + ord("k")]) == "ok"
    files = sorted(target.glob("*.safetensors"))
    assert [path.name for path in target.parent.iterdir()] == ["export"]
    assert (len(files) > 1) == (max_shard_bytes == 7000)
    assert all(file.stat().st_size < 7000 + 4000 for file in files) or len(files) == 1  # with the header


def test_a_rank_reads_its_own_slices_and_no_more(tmp_path: Path) -> None:
    model = hugging_face_model("plain")
    model.save_pretrained(tmp_path)
    tensors, seen, shape = public_tensors(model), 0, from_hugging_face(tmp_path)
    for rank in range(4):
        pieces = [piece for info in infos_of(shape, rank, 4) for piece in info.pieces()]
        assert hf.load_weights(tmp_path, shape, pieces) == 4 * sum(piece.data.numel() for piece in pieces)
        for piece in pieces:
            assert torch.equal(piece.data, tensors[piece.name][slices(piece.box)])
            seen += piece.data.numel()
    num_vector = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 1)
    assert seen == sum(tensor.numel() for tensor in tensors.values()) + num_vector  # vectors are on both rows


GIANT = (16, 2**24)  # 1 GiB; its rows are longer than what a system reads ahead when a page is touched


def load_a_column_of_a_giant(rank: int, size: int, folder: Path) -> int:
    """Load eight columns of the tensor, and return by how many bytes the peak resident memory grows."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    piece = Piece("model.decoder.giant.weight", GIANT, ((0, 16), (70000, 70008)), torch.ones(16, 8))
    assert hf.load_weights(folder, OPTShape(**SMALL), [piece]) == 16 * 8 * 4
    assert piece.data.abs().sum() == 0
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_reading_a_column_slice_does_not_read_the_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    entry = Entry("model.decoder.giant.weight", GIANT, torch.float32)
    header = json.dumps({entry.key: {"dtype": "F32", "shape": entry.shape, "data_offsets": [0, entry.num_bytes]}})
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header.encode())
        out.truncate(8 + len(header) + entry.num_bytes)  # a hole, which takes no space on the disk
    (growth,) = run(load_a_column_of_a_giant, 1, tmp_path)
    assert growth < entry.num_bytes / 4


def test_weights_of_the_bare_decoder_are_read_too(tmp_path: Path) -> None:
    """OPTModel.save_pretrained leaves out the prefix that OPTForCausalLM adds to names."""
    model = hugging_face_model("plain")
    model.model.save_pretrained(tmp_path)
    hf.check_weights(tmp_path, from_hugging_face(tmp_path))
    data = torch.zeros(16)
    hf.load_weights(tmp_path, OPTShape(**SMALL), [Piece("model.decoder.layers.1.fc2.bias", (16,), ((0, 16),), data)])
    assert torch.equal(data, model.model.decoder.layers[1].fc2.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_export_has_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = hugging_face_model("plain")
    model.save_pretrained(tmp_path / "source")
    shape = from_hugging_face(tmp_path / "source")
    pieces = [piece for info in infos_of(shape, 0, 1) for piece in info.pieces()]
    hf.load_weights(tmp_path / "source", shape, pieces)
    hf.export(tmp_path / "export", pieces, shape=shape, axis=world(0, 1), dtype=dtype)
    again = OPTForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    for name, tensor in public_tensors(model).items():
        assert torch.equal(again.state_dict()[name], tensor.to(dtype)), name


def export_with_a_full_disk_on_rank_0(rank: int, size: int, target: Path) -> str:
    shape = OPTShape(**SMALL)
    owned = [piece for info in infos_of(shape, rank, size) if owns(info.layout) for piece in info.pieces()]
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))  # bytes: some tensors fit
    with pytest.raises(DiskFullError) as failure:
        hf.export(target, owned, shape=shape, axis=world(rank, size), dtype=torch.float32)
    return str(failure.value)


def test_a_full_disk_fails_on_every_rank_and_leaves_the_old_export(tmp_path: Path) -> None:
    old = tmp_path / "export" / "config.json"
    old.parent.mkdir()
    old.write_text("the old one")
    for message in run(export_with_a_full_disk_on_rank_0, 4, tmp_path / "export"):
        assert "model.safetensors: File too large" in message
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert old.read_text() == "the old one"


def test_an_export_without_an_owner_of_a_tensor_fails(tmp_path: Path) -> None:
    shape = OPTShape(**SMALL)
    pieces = [piece for info in infos_of(shape, 0, 1) for piece in info.pieces()]
    with pytest.raises(AssertionError, match="is not owned once"):
        hf.export(tmp_path / "export", pieces[1:], shape=shape, axis=world(0, 1), dtype=torch.float32)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with the weights of SMALL in one file, all zero."""
    save_zeros(tmp_path, OPTShape(**SMALL).public_tensors())
    return tmp_path


def save_zeros(folder: Path, tensors: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
    entries = [Entry(name, size, dtype) for name, size in tensors.items()]
    write_tensors(folder / "model.safetensors", entries, (torch.zeros(size, dtype=dtype) for size in tensors.values()))


def refusal(folder: Path) -> str:
    """Return the message with which `check_weights` refuses a directory that should hold SMALL."""
    with pytest.raises(DataError) as failure:
        hf.check_weights(folder, OPTShape(**SMALL))
    return str(failure.value)


def test_missing_tensors_are_counted_and_named(directory: Path) -> None:
    expected = OPTShape(**SMALL).public_tensors()
    save_zeros(directory, {name: size for name, size in expected.items() if "layers.1." not in name})
    message = refusal(directory)
    assert f"lacks 16 of {len(expected)} tensors: model.decoder.layers.1.self_attn.q_proj.weight" in message
    assert "and 8 more" in message


def test_a_tensor_of_another_shape_is_named_with_file_and_both_shapes(directory: Path) -> None:
    name = "model.decoder.layers.0.fc1.bias"
    save_zeros(directory, {**OPTShape(**SMALL).public_tensors(), name: (23,)})
    assert f"model.safetensors has {name} as (23,), the model needs (24,)" in refusal(directory)


def test_quantized_weights_are_refused(directory: Path) -> None:
    save_zeros(directory, OPTShape(**SMALL).public_tensors(), torch.uint8)
    assert "embed_positions.weight is U8, not one of F64, F32, F16, BF16" in refusal(directory)


def test_a_missing_shard_is_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert "names shards that are missing: model-00002-of-00002.safetensors" in refusal(directory)


def test_a_truncated_file_is_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged" in refusal(directory)


def test_old_weights_are_refused_with_the_way_to_convert_them(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert hf.has_weights(directory)  # else weights would be drawn from the seed instead
    assert "save_pretrained" in refusal(directory)


def test_a_missing_directory_and_one_without_weights_have_different_messages(tmp_path: Path) -> None:
    assert not hf.has_weights(tmp_path)
    assert "has neither model.safetensors nor" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "nowhere")
