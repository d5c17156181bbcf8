"""The weight files of a Hugging Face directory: those that are read, and those that cannot be used and are refused.

A directory with a config.json and no weights is a model whose weights are drawn from the seed. So a file that might be
weights, but cannot be read as such, must never be taken for no weights: it is refused by its name.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from parallel.checkpoint.hf_folder import INDEX, SINGLE
from parallel.errors import DataError, names_text, shown
from parallel.regular_file import is_missing, read_json, with_key

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PARTS_OF_A_DOWNLOAD = ("incomplete", "part", "partial", "crdownload", "download", "aria2", "tmp")
FORMATS = (
    *("safetensors", "bin", "pt", "pth", "ckpt", "pkl", "msgpack", "h5", "gguf", "ggml", "onnx", "npz", "distcp"),
    *("tflite", "ot", "mlmodel", "keras", "weights", "zip", "tar", "tgz"),
)
WEIGHT_LIKE = re.compile(rf"\.({'|'.join((*FORMATS, *PARTS_OF_A_DOWNLOAD))})(\W|$)", re.IGNORECASE)
NOT_WEIGHTS = re.compile(r"training_args\.bin|tokenizer\.(bin|pkl)|.*\.(lock|metadata)", re.IGNORECASE)
MOST_INDEX = 1 << 26  # bytes: the largest index of a published model has 20 MiB
DEPTH = 3  # levels of folders: the hub's client keeps parts of a download in .cache/huggingface/download
ADAPTER = "adapter_config.json"


def files_of(path: str | Path) -> list[Path]:
    """Return the safetensors files of a directory, none where it has no weights.

    As transformers does, it prefers model.safetensors to the shards of an index, and both to any other file. Raises
    DataError, with the name of the file, where the weights are in a file that cannot be read.
    """
    folder = Path(path)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        problem = "is not a directory" if not folder.is_dir() else f"cannot be read: {error.strerror}"
        raise DataError(f"model.path: {folder} {problem}.") from error
    if ADAPTER in names:
        raise DataError(
            f"model.path: {folder / ADAPTER} describes an adapter, which is not supported. Merge it into its model:"
            " merge_and_unload of peft, then save_pretrained(NEW_DIRECTORY)."
        )
    if SINGLE in names:
        return [_usable(folder / SINGLE)]
    if INDEX in names:
        return _shards(_usable(folder / INDEX))
    if unusable := next(_unusable(folder), None):
        raise DataError(
            f"model.path: {unusable} cannot be used as weights: {_advice(unusable, folder)} To draw weights from"
            " train.seed instead, name a directory that has none."
        )
    return []


def _usable(file: Path) -> Path:
    """Return a file that should hold weights or their index. Raises DataError where it is plain that it does not."""
    if problem := _problem(file):
        raise DataError(f"model.path: {file} {problem}")
    return file


def _problem(file: Path) -> str:
    """Return what is wrong with a file from the outside, and what would work; an empty text where nothing is."""
    try:
        if file.is_symlink() and not file.exists():
            return f"is a link to {os.readlink(file)}, which does not exist. Download the file again."
        if not file.is_file():
            return "is not a file. Download it again."
        with file.open("rb") as content:
            start = content.read(len(LFS_POINTER))
    except OSError as error:
        return f"cannot be read: {error.strerror}."
    if not start:
        return "is empty. Download it again."
    if start == LFS_POINTER:
        return "is a pointer of Git LFS and not the file itself. Fetch it: git lfs pull."
    return ""


def _shards(index: Path) -> list[Path]:
    """Return the shards that an index names. Raises DataError unless all are there."""
    content = read_json(index, with_key(DataError, "model.path"), at_most=MOST_INDEX, links=True)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise DataError(f"model.path: {index} is damaged: it has no 'weight_map' of files.")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if name != Path(name).name]:
        raise DataError(
            f"model.path: {index} names {shown(outside[0])}, which is no name of a file beside it. Download it again."
        )
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if is_missing(file)]:
        raise DataError(
            f"model.path: {index} names shards that are missing: {names_text(missing)}. Download them into"
            f" {index.parent}."
        )
    return [_usable(file) for file in files]


def _unusable(folder: Path) -> Iterator[Path]:
    """Yield the files of a directory, and of the folders in it, that might hold weights."""
    for inside, folders, names in os.walk(folder, onerror=_refuse_unreadable(folder)):
        is_inner = len(Path(inside).relative_to(folder).parts) >= DEPTH
        folders[:] = [] if is_inner else sorted(name for name in folders if name != ".git")
        for name in sorted([*names, *(n for n in folders if WEIGHT_LIKE.search(n))]):
            if WEIGHT_LIKE.search(name) and not NOT_WEIGHTS.fullmatch(name):
                yield Path(inside) / name


def _refuse_unreadable(folder: Path) -> Callable[[OSError], None]:
    def refuse(error: OSError) -> None:
        raise DataError(f"model.path: {error.filename or folder} cannot be read: {error.strerror}.") from error

    return refuse


def _advice(file: Path, folder: Path) -> str:
    """Return why a file cannot be used, and what would work."""
    parts = file.name.lower().split(".")
    if problem := _problem(file) if not file.is_dir() else "":
        return f"it {problem}"
    if set(parts) & {*PARTS_OF_A_DOWNLOAD}:
        return "it is a part of a download. Download the model again."
    if re.fullmatch(r".*\d+-of-\d+\.safetensors", file.name):
        return f"it is a shard, and {INDEX}, which would say of what, is missing. Download the model again."
    if parts[-1] == "safetensors":
        return f"its name is not {SINGLE}. Rename it, if it has all of the model's weights, or convert it."
    return (
        "safetensors are needed. Convert them:"
        f" AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_DIRECTORY)."
    )
