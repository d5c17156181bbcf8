"""Hugging Face OPT directories: its names for our parameters, weights in, and weights out, slice by slice.

Reading, a rank maps the files and touches only its own slices. Writing, rank 0 puts together one tensor at a time.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.shapes import OPTShape
from models.tokenizer import Tokenizer
from parallel.collectives import gather_objects, receive, send
from parallel.errors import DataError
from parallel.layout import Box, Piece, slices
from parallel.mesh import Axis
from parallel.shards import (
    DTYPE_NAMES,
    Archive,
    Entry,
    Part,
    Stored,
    covered_once,
    opened,
    read_json,
    replacing,
    write,
    write_json,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
TIED = "lm_head.weight"  # the token embedding once more: we neither read nor write it
FLOATS = tuple(DTYPE_NAMES[dtype] for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16))


def sources(name: str) -> tuple[str, ...]:
    """Hugging Face's name for a parameter of ours; three of them for the fused q, k, v."""
    public = f"model.decoder.{name.removeprefix('embed.').removeprefix('head.')}"
    if ".self_attn.qkv." not in public:
        return (public,)
    return tuple(public.replace(".qkv.", f".{projection}.") for projection in ("q_proj", "k_proj", "v_proj"))


def expected_tensors(shape: OPTShape) -> dict[str, tuple[int, ...]]:
    """Every public tensor of a model and its shape, in the order of the model."""
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
    """Whether the directory holds weights, of whatever format: `check` says if they can be read."""
    path = Path(path)
    return (path / SINGLE).is_file() or (path / INDEX).is_file() or any(path.glob("pytorch_model*"))


def check(path: str | Path, shape: OPTShape) -> None:
    """Raise a DataError unless the directory has every tensor of the model, in its shape. Only headers are read."""
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


def load(path: str | Path, pieces: Iterable[Piece]) -> int:
    """Fill each piece with its slice of the weights, cast to its dtype. Returns the bytes read: those slices alone."""
    return _archive(Path(path)).fill(pieces)


def _archive(path: Path) -> Archive:
    """The weights of a directory, under the names of OPTForCausalLM, even if it was OPTModel that wrote them."""
    tensors = {}
    for file in _files(path):
        with opened(file, DataError) as content:
            for key in sorted(set(content.keys()) - {TIED}):
                stored = content.get_slice(key)
                if stored.get_dtype() not in FLOATS:
                    raise DataError(f"model.path: {file}: {key} is {stored.get_dtype()}, not one of {_few(FLOATS)}.")
                size = tuple(stored.get_shape())
                name = f"model.{key}" if key.startswith("decoder.") else key
                tensors[name] = Stored(size, (Part(file, key, tuple((0, stop) for stop in size)),))
    return Archive(path, tensors, DataError)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a directory, all there."""
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
            f"model.path: {path} has its weights as pytorch_model.bin only; they are read as safetensors. Convert them:"
            f" OPTForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW_DIRECTORY)."
        )
    raise DataError(f"model.path: {path} has neither {SINGLE} nor {INDEX}.")


def _few(words: Sequence[str]) -> str:
    """The first four of the words, and how many more there are."""
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
    """Write a directory that OPTForCausalLM.from_pretrained reads.

    `pieces` are those this rank owns: each element of each public tensor is owned by one rank of the axis. They go to
    rank 0 in the order of the model, a tensor at a time. If it cannot write, every rank raises a CheckpointError, and
    nothing is left.
    """
    expected = expected_tensors(shape)
    order = {name: place for place, name in enumerate(expected)}
    owned = sorted(pieces, key=lambda piece: order[piece.name])
    owners = _owners(gather_objects([(piece.name, piece.box) for piece in owned], axis), expected)
    with replacing(folder, axis) as temporary:
        if axis.rank > 0:
            for piece in owned:
                send(piece.data.to("cpu", dtype), axis, to=0)
        else:
            entries = [Entry(name, size, dtype) for name, size in expected.items()]
            tensors = _assemble(entries, owners, owned, axis)
            try:
                _write_weights(temporary, entries, tensors)
                _write_configs(temporary, shape, dtype)
                if tokenizer is not None:
                    tokenizer.save(temporary)
            finally:  # whatever went wrong here, the others send, and must be heard
                for _ in tensors:
                    pass


Owners = dict[str, list[tuple[int, Box]]]
"""For each tensor the rank that owns a box of it, and the box, in the order in which they are sent."""


def _owners(boxes_of_ranks: list[list[tuple[str, Box]]], expected: dict[str, tuple[int, ...]]) -> Owners:
    owners: Owners = {name: [] for name in expected}
    for rank, boxes in enumerate(boxes_of_ranks):
        for name, box in boxes:
            owners[name].append((rank, box))
    for name, size in expected.items():
        assert covered_once(size, [box for _, box in owners[name]]), f"{name} is not owned once: {owners[name]}"
    return owners


def _assemble(entries: Sequence[Entry], owners: Owners, owned: Sequence[Piece], axis: Axis) -> Iterator[Tensor]:
    """Each tensor, whole, on rank 0: its own pieces, and those that the others send."""
    own = iter(owned)
    for entry in entries:
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for rank, box in owners[entry.key]:
            here = whole[slices(box)]
            here.copy_(next(own).data if rank == 0 else receive(here, axis, rank))
        yield whole


def _write_weights(folder: Path, entries: Sequence[Entry], tensors: Iterator[Tensor]) -> None:
    """One file, or numbered shards and their index."""
    shards = _shards(entries)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write(folder / name, shard, itertools.islice(tensors, len(shard)))
    if len(shards) > 1:
        weight_map = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The entries in order, in runs of at most MAX_SHARD_BYTES, unless one alone is larger."""
    shards: list[list[Entry]] = [[]]
    room = MAX_SHARD_BYTES
    for entry in entries:
        if shards[-1] and entry.num_bytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards


def _write_configs(folder: Path, shape: OPTShape, dtype: torch.dtype) -> None:
    fields = asdict(shape)
    fields["_remove_final_layer_norm"] = fields.pop("remove_final_layer_norm")  # OPTConfig's name has an underscore
    fields |= {"model_type": "opt", "architectures": ["OPTForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", fields)
