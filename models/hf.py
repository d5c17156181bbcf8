"""Read and write the weights of Hugging Face directories, of every family.

To read, each rank maps the files into memory and touches only its own slices. To write, rank 0 puts together one tensor
at a time.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from models.generation_config import FILE as GENERATION
from models.shape import ModelShape
from models.tokenizer import Tokenizer
from models.tokenizer_files import TEMPLATES, TOKENIZER_FILES
from models.weight_files import files_of
from parallel.checkpoint.archive import Archive, StoredPart, StoredTensor, open_safetensors
from parallel.checkpoint.hf_folder import INDEX, MODEL, SINGLE, FileNames, write_folder, write_tensors_of
from parallel.checkpoint.synced_file import write_json
from parallel.checkpoint.tensor_file import DTYPE_NAMES, Entry, is_ours
from parallel.errors import DataError, names_text
from parallel.layout.layout import Piece, box_shape
from parallel.mesh.mesh import ALONE, Axis

CONFIG = "config.json"
COMPARED_AT_ONCE = 1 << 22  # elements: a vocabulary may be larger than the memory
FLOATS = tuple(DTYPE_NAMES[dtype] for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16))


def has_weights(path: str | Path) -> bool:
    """Return whether the directory has weights in any format; `check_weights` tells if we can read them."""
    try:
        return bool(files_of(path))
    except DataError:
        return True  # what cannot be read may be weights


def check_weights(path: str | Path, shape: ModelShape) -> None:
    """Raise DataError unless the directory has exactly the tensors of the model, in the right shapes.

    Only headers are read, and the head where it is stored beside the embedding that it shares.
    """
    archive, expected = _archive(Path(path), shape), shape.public_tensors()
    found, head = archive.tensors, shape.head
    if missing := [name for name in expected if name not in found or _is_head_alone(name, found, shape)]:
        advice = " Try model.tie_word_embeddings=True." if missing == [head] else ""
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
    if more := [name for name in found if name not in expected and name != head]:
        raise DataError(
            f"model.path: {path} has {len(more)} tensors that the model lacks: {names_text(more)}. Set the keys of"
            " `model` so that it has them, or take them out of the files."
        )
    if head in found and head not in expected:
        _check_head(found[shape.embedding].parts[0], found[head].parts[0])


def _is_head_alone(name: str, found: Mapping[str, StoredTensor], shape: ModelShape) -> bool:
    """Return whether a head is read for the embedding, although the model has both."""
    return name == shape.embedding and not shape.tie_word_embeddings and found[name].parts[0].key == shape.head


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


def load_weights(path: str | Path, shape: ModelShape, pieces: Iterable[Piece]) -> int:
    """Fill each piece with its slice of the weights, cast to its dtype. Returns the number of bytes read."""
    return _archive(Path(path), shape).read_into(pieces)


def too_large(path: str | Path, shape: ModelShape, dtype: torch.dtype, *, part: int = 0, parts: int = 1) -> list[str]:
    """Return which tensors of the directory have finite values that are infinite in this dtype.

    One of `parts` equal parts of the tensors is read, and only where their own dtype has a far larger range.
    """
    found = []
    for name, stored in sorted(_archive(Path(path), shape).tensors.items())[part::parts]:
        (whole,) = stored.parts
        with open_safetensors(whole.file, DataError) as content:
            tensor = content.get_slice(whole.key)
            own = next(own for own, text in DTYPE_NAMES.items() if text == tensor.get_dtype())
            if torch.finfo(own).max > 2 * torch.finfo(dtype).max:  # bf16 and fp32 have nearly the same
                values = tensor[:]
                if (values.to(dtype).isinf() & values.isfinite()).any():
                    found.append(name)
    return found


def stored_dtypes(path: str | Path, shape: ModelShape) -> list[str]:
    """Return the dtypes of the weights of a directory, as safetensors names them: F32, BF16, ..."""
    found: set[str] = set()
    for file in files_of(path):
        with open_safetensors(file, DataError) as content:
            found |= {content.get_slice(key).get_dtype() for key in _used(content.keys(), shape)}
    return sorted(found)


def _used(keys: Iterable[str], shape: ModelShape) -> dict[str, str]:
    """Return the public name of each tensor of a file, without those that the model does not use."""
    names = {key: key if key == shape.head or key.startswith(shape.base) else f"{shape.base}{key}" for key in keys}
    return {key: name for key, name in sorted(names.items()) if not re.fullmatch(shape.unused, name)}


def _archive(path: Path, shape: ModelShape) -> Archive:
    """Return the weights of a directory under the public names, even if a model without its head wrote them."""
    tensors: dict[str, StoredTensor] = {}
    files = files_of(path)
    if not files:
        raise DataError(f"model.path: {path} has neither {SINGLE} nor {INDEX}.")
    for file in files:
        with open_safetensors(file, DataError) as content:
            for key, name in _used(content.keys(), shape).items():
                stored = content.get_slice(key)
                if stored.get_dtype() not in FLOATS:
                    raise DataError(
                        f"model.path: {file}: {key} is {stored.get_dtype()}, not one of {', '.join(FLOATS)}."
                    )
                size = tuple(stored.get_shape())
                if name in tensors:
                    other = tensors[name].parts[0]
                    raise DataError(
                        f"model.path: {path} has {name} twice: {other.key} of {other.file.name}, {key} of {file.name}."
                        " Take one of them out."
                    )
                tensors[name] = StoredTensor(size, (StoredPart(file, key, tuple((0, stop) for stop in size)),))
    if shape.head in tensors:  # a tied pair may be stored under the name of the head alone
        tensors.setdefault(shape.embedding, tensors[shape.head])
    return Archive(path, tensors, DataError)


def export(
    folder: Path,
    pieces: Iterable[Piece],
    *,
    shape: ModelShape,
    axis: Axis,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a directory that AutoModelForCausalLM.from_pretrained reads. Every rank of `axis` calls this.

    `pieces` are those that this rank owns. If rank 0 cannot write, every rank raises CheckpointError.
    """
    files = _OtherFiles(shape, dtype, tokenizer)
    write_folder(folder, pieces, entries_of(shape, dtype), axis=axis, describe=files.write, names=files.names)


def export_whole(
    folder: Path,
    tensors: Iterator[Tensor],
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the same directory from the whole tensors, in the order of `entries_of`: one process calls this alone."""
    files = _OtherFiles(shape, dtype, tokenizer)
    write_tensors_of(folder, entries_of(shape, dtype), tensors, axis=ALONE, describe=files.write, names=files.names)


def entries_of(shape: ModelShape, dtype: torch.dtype) -> list[Entry]:
    """Return the tensors of an exported directory, in the order in which they are written."""
    return [Entry(name, size, dtype) for name, size in shape.public_tensors().items()]


def not_exported(folder: Path) -> str:
    """Return the name of something in a folder that `export` did not write; empty where there is nothing like that.

    The weights of another program are told by their headers, which lack our mark. Without weights nothing is ours.
    """
    inner = folder / TEMPLATES.partition("/")[0]
    found = sorted({*folder.iterdir(), *inner.glob("*")} - ({inner} if inner.is_dir() else set()))
    weights = [path for path in found if path.suffix == ".safetensors" and is_ours(path)]
    for path in found:
        name = str(path.relative_to(folder))
        is_known = TOKENIZER_FILES.fullmatch(name) or name in (CONFIG, GENERATION, INDEX) or path in weights
        if not (is_known and weights):
            return name
    return ""


@dataclass(frozen=True)
class _OtherFiles:
    """The files of an export beside its weights."""

    shape: ModelShape
    dtype: torch.dtype
    tokenizer: Tokenizer | None

    @property
    def names(self) -> FileNames:
        """A chat template of the tokenizer that was there before would be taken for this one's: it goes."""
        return MODEL if self.tokenizer is None else MODEL.replacing(TOKENIZER_FILES)

    def write(self, folder: Path) -> None:
        """Write the config, and the tokenizer if there is one."""
        _write_configs(folder, self.shape, self.dtype)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)


def _write_configs(folder: Path, shape: ModelShape, dtype: torch.dtype) -> None:
    own = {"model_type": shape.model_type, "architectures": [shape.architecture]}
    write_json(folder / CONFIG, own | shape.exported() | {"dtype": str(dtype).removeprefix("torch.")})
