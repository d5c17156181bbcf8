"""Read and write Hugging Face OPT directories, and translate the names of parameters into theirs.

To read, each rank maps the files into memory and touches only its own slices. To write, rank 0 puts together one tensor
at a time.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch

from models.shapes import OPTShape
from models.tokenizer import Tokenizer
from models.tokenizer_files import TOKENIZER_FILES
from models.weight_files import files_of
from parallel.checkpoint.hf_folder import INDEX, MODEL, SINGLE, write_folder
from parallel.checkpoint.shards import (
    DTYPE_NAMES,
    Archive,
    Entry,
    StoredPart,
    StoredTensor,
    open_safetensors,
    write_json,
)
from parallel.errors import DataError, names_text
from parallel.layout.layout import Piece, box_shape
from parallel.layout.sources import Source, fused, whole
from parallel.mesh.mesh import Axis

EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
UNUSED = (HEAD, "model.decoder.version")  # the tied head again, and a number that OPT's first conversion left
COMPARED_AT_ONCE = 1 << 22  # elements: a vocabulary may be larger than the memory
FLOATS = tuple(DTYPE_NAMES[dtype] for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16))


def sources(name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
    """Return Hugging Face's tensor that one of our parameters, of this whole shape, is; three for the fused q, k, v."""
    if name.startswith("head.lm_head."):
        return whole(name.removeprefix("head."), shape)
    public = f"model.decoder.{name.removeprefix('embed.').removeprefix('head.')}"
    if ".self_attn.qkv." not in public:
        return whole(public, shape)
    names = [public.replace(".qkv.", f".{projection}.") for projection in ("q_proj", "k_proj", "v_proj")]
    return fused(names, shape[1:])


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
    tensors = {f"model.decoder.{name}": size for name, size in tensors.items()}
    return tensors if shape.tie_word_embeddings else {**tensors, HEAD: (shape.vocab_size, width)}


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
    try:
        return bool(files_of(path))
    except DataError:
        return True  # what cannot be read may be weights


def check_weights(path: str | Path, shape: OPTShape) -> None:
    """Raise DataError unless the directory has exactly the tensors of the model, in the right shapes.

    Only headers are read, and the head where it is stored beside the embedding that it shares.
    """
    archive, expected = _archive(Path(path)), expected_tensors(shape)
    found = archive.tensors
    if missing := [name for name in expected if name not in found or _is_head_alone(name, found, expected)]:
        advice = " Try model.tie_word_embeddings=True." if missing == [HEAD] else ""
        raise DataError(
            f"model.path: {path} lacks {len(missing)} of {len(expected)} tensors: {names_text(missing)}.{advice}"
        )
    differing = [
        f"{found[name].parts[0].file.name} has {name} as {found[name].shape}, the model needs {size}"
        for name, size in expected.items()
        if found[name].shape != size
    ]
    if differing:
        raise DataError(f"model.path: {path}: {names_text(differing)}.")
    if more := [name for name in found if name not in expected and name not in UNUSED]:
        raise DataError(
            f"model.path: {path} has {len(more)} tensors that the model lacks: {names_text(more)}. Set the keys of"
            " `model` so that it has them, or take them out of the files."
        )
    if HEAD in found and HEAD not in expected:
        _check_head(found[EMBEDDING].parts[0], found[HEAD].parts[0])


def _is_head_alone(name: str, found: Mapping[str, StoredTensor], expected: Container[str]) -> bool:
    """Return whether a head is read for the embedding, although the model has both."""
    return name == EMBEDDING and HEAD in expected and found[name].parts[0].key == HEAD


def _check_head(embedding: StoredPart, head: StoredPart) -> None:
    """Raise DataError unless the head that is stored has the values of the embedding, which the model uses for it."""
    problem = f"{head.file.name} has {head.key} as {box_shape(head.box)}, and not as the embedding"
    if embedding.box == head.box:
        row = _first_different_row(embedding, head)
        if row is None:
            return
        problem = f"{head.key} of {head.file.name} is not the embedding {embedding.key}: row {row} differs"
    raise DataError(
        f"model.path: {head.file.parent}: {problem}, but the model ties them. Set model.tie_word_embeddings=False for a"
        f" head of its own, or take {head.key} out of the file to use the embedding."
    )


def _first_different_row(one: StoredPart, other: StoredPart) -> int | None:
    """Return the first row in which two stored matrices of one shape differ, or None. A block of rows is in memory."""
    (_, rows), *rest = one.box
    block = max(1, COMPARED_AT_ONCE // max(1, prod(stop for _, stop in rest)))
    with open_safetensors(one.file, DataError) as first, open_safetensors(other.file, DataError) as second:
        ours, theirs = first.get_slice(one.key), second.get_slice(other.key)
        for start in range(0, rows, block):
            a, b = (tensor[start : start + block].double() for tensor in (ours, theirs))
            different = ((a != b) & ~(a.isnan() & b.isnan())).flatten(1).any(1).nonzero()
            if len(different):
                return start + int(different[0])
    return None


def load_weights(path: str | Path, pieces: Iterable[Piece]) -> int:
    """Fill each piece with its slice of the weights, cast to its dtype. Returns the number of bytes read."""
    return _archive(Path(path)).read_into(pieces)


def too_large(path: str | Path, dtype: torch.dtype, *, part: int = 0, parts: int = 1) -> list[str]:
    """Return which tensors of the directory have finite values that are infinite in this dtype.

    One of `parts` equal parts of the tensors is read, and only where their own dtype has a far larger range.
    """
    found = []
    for name, stored in sorted(_archive(Path(path)).tensors.items())[part::parts]:
        (whole,) = stored.parts
        with open_safetensors(whole.file, DataError) as content:
            tensor = content.get_slice(whole.key)
            own = next(own for own, text in DTYPE_NAMES.items() if text == tensor.get_dtype())
            if torch.finfo(own).max > 2 * torch.finfo(dtype).max:  # bf16 and fp32 have nearly the same
                values = tensor[:]
                if (values.to(dtype).isinf() & values.isfinite()).any():
                    found.append(name)
    return found


def stored_dtypes(path: str | Path) -> list[str]:
    """Return the dtypes of the weights of a directory, as safetensors names them: F32, BF16, ..."""
    found: set[str] = set()
    for file in files_of(path):
        with open_safetensors(file, DataError) as content:
            found |= {content.get_slice(key).get_dtype() for key in content.keys()}  # noqa: SIM118
    return sorted(found)


def _archive(path: Path) -> Archive:
    """Return the weights of a directory under the names of OPTForCausalLM, even if OPTModel wrote them."""
    tensors: dict[str, StoredTensor] = {}
    files = files_of(path)
    if not files:
        raise DataError(f"model.path: {path} has neither {SINGLE} nor {INDEX}.")
    for file in files:
        with open_safetensors(file, DataError) as content:
            for key in sorted(content.keys()):
                stored = content.get_slice(key)
                if stored.get_dtype() not in FLOATS:
                    raise DataError(
                        f"model.path: {file}: {key} is {stored.get_dtype()}, not one of {', '.join(FLOATS)}."
                    )
                size = tuple(stored.get_shape())
                name = f"model.{key}" if key.startswith("decoder.") else key
                if name in tensors:
                    other = tensors[name].parts[0]
                    raise DataError(
                        f"model.path: {path} has {name} twice: {other.key} of {other.file.name}, {key} of {file.name}."
                        " Take one of them out."
                    )
                tensors[name] = StoredTensor(size, (StoredPart(file, key, tuple((0, stop) for stop in size)),))
    if HEAD in tensors:  # a tied pair may be stored under the name of the head alone
        tensors.setdefault(EMBEDDING, tensors[HEAD])
    return Archive(path, tensors, DataError)


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

    # A chat template of the tokenizer that was there before would be taken for this one's.
    names = MODEL if tokenizer is None else MODEL.replacing(TOKENIZER_FILES)
    write_folder(folder, pieces, entries, axis=axis, describe=describe, names=names)


def _write_configs(folder: Path, shape: OPTShape, dtype: torch.dtype) -> None:
    fields = asdict(shape)
    fields["_remove_final_layer_norm"] = fields.pop("remove_final_layer_norm")  # OPTConfig's name has an underscore
    fields |= {"model_type": "opt", "architectures": ["OPTForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", fields)
