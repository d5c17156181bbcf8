"""Read and write Hugging Face OPT directories, and translate the names of parameters into theirs.

To read, each rank maps the files into memory and touches only its own slices. To write, rank 0 puts together one tensor
at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from models.shapes import OPTShape
from models.tokenizer import Tokenizer
from parallel.checkpoint.hf_folder import INDEX, SINGLE, write_folder
from parallel.checkpoint.shards import (
    DTYPE_NAMES,
    Archive,
    Entry,
    StoredPart,
    StoredTensor,
    open_safetensors,
    read_json,
    write_json,
)
from parallel.errors import DataError
from parallel.layout.layout import Piece
from parallel.mesh.mesh import Axis

TIED = "lm_head.weight"  # the token embedding a second time: neither read nor written
FLOATS = tuple(DTYPE_NAMES[dtype] for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16))


def sources(name: str) -> tuple[str, ...]:
    """Return Hugging Face's name of one of our parameters; three names for the fused q, k, v."""
    public = f"model.decoder.{name.removeprefix('embed.').removeprefix('head.')}"
    if ".self_attn.qkv." not in public:
        return (public,)
    return tuple(public.replace(".qkv.", f".{projection}.") for projection in ("q_proj", "k_proj", "v_proj"))


def expected_tensors(shape: OPTShape) -> dict[str, tuple[int, ...]]:
    """Return the name and the shape of every tensor of Hugging Face's model, in the order of the model."""
    hidden, width = shape.hidden_size, shape.word_embed_proj_dim
    tensors: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (shape.vocab_size, width),
        "embed_positions.weight": (shape.max_position_embeddings + 2, hidden),  # OPT's positions start at 2
    }
    if width != hidden:
        tensors |= {"project_in.weight": (hidden, width), "project_out.weight": (width, hidden)}
    for layer in range(shape.num_hidden_layers):
        tensors |= {f"layers.{layer}.{name}": size for name, size in _layer_tensors(shape).items()}
    if shape.has_final_layer_norm:
        tensors |= _norm_tensors("final_layer_norm", shape)
    return {f"model.decoder.{name}": size for name, size in tensors.items()}


def _layer_tensors(shape: OPTShape) -> dict[str, tuple[int, ...]]:
    hidden, ffn = shape.hidden_size, shape.ffn_dim
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in {**attention, "fc1": (ffn, hidden), "fc2": (hidden, ffn)}.items():
        tensors[f"{name}.weight"] = (rows, columns)
        if shape.enable_bias:
            tensors[f"{name}.bias"] = (rows,)
    return tensors | _norm_tensors("self_attn_layer_norm", shape) | _norm_tensors("final_layer_norm", shape)


def _norm_tensors(name: str, shape: OPTShape) -> dict[str, tuple[int, ...]]:
    if not shape.layer_norm_elementwise_affine:
        return {}
    return {f"{name}.weight": (shape.hidden_size,), f"{name}.bias": (shape.hidden_size,)}


def has_weights(path: str | Path) -> bool:
    """Return whether the directory has weights in any format; `check_weights` tells if we can read them."""
    path = Path(path)
    return (path / SINGLE).is_file() or (path / INDEX).is_file() or any(path.glob("pytorch_model*"))


def check_weights(path: str | Path, shape: OPTShape) -> None:
    """Raise DataError unless the directory has every tensor of the model in the right shape. Only headers are read."""
    found, expected = _archive(Path(path)).tensors, expected_tensors(shape)
    if missing := [name for name in expected if name not in found]:
        raise DataError(f"model.path: {path} lacks {len(missing)} of {len(expected)} tensors: {_few(missing)}.")
    differing = [
        f"{found[name].parts[0].file.name} has {name} as {found[name].shape}, the model needs {size}"
        for name, size in expected.items()
        if found[name].shape != size
    ]
    if differing:
        raise DataError(f"model.path: {path}: {_few(differing)}.")


def load_weights(path: str | Path, pieces: Iterable[Piece]) -> int:
    """Fill each piece with its slice of the weights, cast to its dtype. Returns the number of bytes read."""
    return _archive(Path(path)).read_into(pieces)


def _archive(path: Path) -> Archive:
    """Return the weights of a directory under the names of OPTForCausalLM, even if OPTModel wrote them."""
    tensors = {}
    for file in _files(path):
        with open_safetensors(file, DataError) as content:
            for key in sorted(set(content.keys()) - {TIED}):
                stored = content.get_slice(key)
                if stored.get_dtype() not in FLOATS:
                    raise DataError(f"model.path: {file}: {key} is {stored.get_dtype()}, not one of {_few(FLOATS)}.")
                size = tuple(stored.get_shape())
                name = f"model.{key}" if key.startswith("decoder.") else key
                tensors[name] = StoredTensor(size, (StoredPart(file, key, tuple((0, stop) for stop in size)),))
    return Archive(path, tensors, DataError)


def _files(path: Path) -> list[Path]:
    """Return the safetensors files of a directory. Raises DataError if one is missing."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        index = read_json(path / INDEX, DataError)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise DataError(f"model.path: {path / INDEX} is damaged: it has no 'weight_map'.")
        files = [path / name for name in sorted(set(index["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"model.path: {path / INDEX} names shards that are missing: {_few(missing)}.")
        return files
    if not path.is_dir():
        raise DataError(f"model.path: {path} is not a directory.")
    if has_weights(path):
        raise DataError(
            f"model.path: {path} has its weights only as pytorch_model.bin, but safetensors are needed. Convert them:"
            f" OPTForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW_DIRECTORY)."
        )
    raise DataError(f"model.path: {path} has neither {SINGLE} nor {INDEX}.")


def _few(words: Sequence[str]) -> str:
    """Return the first four of the words, and the number of the others."""
    more = [f"and {len(words) - 4} more"] if len(words) > 4 else []
    return ", ".join([*words[:4], *more])


def export(
    folder: Path,
    pieces: Iterable[Piece],
    *,
    shape: OPTShape,
    axis: Axis,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a directory that OPTForCausalLM.from_pretrained reads. Every rank of `axis` calls this.

    `pieces` are those that this rank owns. If rank 0 cannot write, every rank raises CheckpointError.
    """
    entries = [Entry(name, size, dtype) for name, size in expected_tensors(shape).items()]

    def describe(temporary: Path) -> None:
        _write_configs(temporary, shape, dtype)
        if tokenizer is not None:
            tokenizer.save(temporary)

    write_folder(folder, pieces, entries, axis=axis, describe=describe)


def _write_configs(folder: Path, shape: OPTShape, dtype: torch.dtype) -> None:
    fields = asdict(shape)
    fields["_remove_final_layer_norm"] = fields.pop("remove_final_layer_norm")  # OPTConfig's name has an underscore
    fields |= {"model_type": "opt", "architectures": ["OPTForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", fields)
