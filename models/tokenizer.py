"""Tokenizers, which turn text into token ids and back: bytes, the default, or any Hugging Face `tokenizer.json`.

One of the latter is built in: "bpe", a byte-level BPE of 4,096 ids (models/train_bpe.py).

Each can save itself in an exported directory, where `transformers` then finds the tokenizer of the training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from models.tokenizer_files import TokenizerFiles, tokenizer_file
from models.windows import WindowEncoder
from parallel.errors import DataError
from parallel.regular_file import is_missing

if TYPE_CHECKING:
    import tokenizers

Ids: TypeAlias = npt.NDArray[np.integer[Any]]

# OPT's special tokens, in the order of their ids.
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
SEPARATOR = SPECIALS.index("</s>")


class Tokenizer(Protocol):
    """A tokenizer. `vocab_size` is one more than the largest id."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer names none."""

    @property
    def beginning(self) -> Sequence[int]:
        """The ids that stand before a text by the tokenizer's post-processor, such as the one of <s>."""

    def vocabulary(self) -> Mapping[str, int]:
        """Return the id of each token, the special tokens among them."""

    @property
    def num_special(self) -> int:
        """The number of special tokens that a document has beside those of its text."""

    @property
    def identity(self) -> str:
        """A digest of all that decides which ids a text becomes."""

    def encode(self, text: str) -> Ids:
        """Return the ids of a text, without special tokens."""

    def encode_with_places(self, text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return what `encode` returns, and of each token from which character to which it is: int64 [T, 2]."""

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, with the special tokens that the tokenizer puts before and after a text."""

    def encode_long(self, chunks: Iterable[str]) -> Iterator[Ids]:
        """Yield, part by part, the ids of a document whose text comes in chunks: those that it has in one."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of these ids. Special tokens are left out."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer into an exported Hugging Face directory, from which `AutoTokenizer` reads it."""


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names: "bytes", "bpe", a tokenizer.json, or a folder with one.

    Raises DataError.
    """
    if spec == "bytes":
        return ByteTokenizer()
    return FileTokenizer(tokenizer_file(spec))


def unwritable(text: str) -> str:
    """Return which character of a text no encoding can write, as the end of a message, or ""."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the character {text[error.start]!r}, half of a surrogate pair, which no encoding can write"
    return ""


class ByteTokenizer:
    """Bytes of UTF-8 as tokens: the id of a byte is the byte + 4, after OPT's four special tokens."""

    vocab_size = 256 + len(SPECIALS)
    end: int | None = SEPARATOR
    beginning: Sequence[int] = ()
    num_special = 0

    def vocabulary(self) -> Mapping[str, int]:
        return _byte_level_vocabulary()

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(SPECIALS)

    def encode_with_places(self, text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
        starts = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
        return self.encode(text), np.stack([starts, starts + 1], axis=1)

    @property
    def identity(self) -> str:
        return "bytes"

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def encode_long(self, chunks: Iterable[str]) -> Iterator[Ids]:
        return map(self.encode, chunks)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text. Bytes that are not UTF-8 become U+FFFD, and ids that are not bytes are left out."""
        array = np.asarray(ids, np.int64)
        is_byte = (array >= len(SPECIALS)) & (array < self.vocab_size)
        return (array[is_byte] - len(SPECIALS)).astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, folder: Path) -> None:
        _write_json(folder / "tokenizer.json", byte_level_json())
        _write_json(folder / "tokenizer_config.json", byte_level_config())


def is_of_bytes(file: Path) -> bool:
    """Return whether a tokenizer.json is the one that `ByteTokenizer.save` writes."""
    ours = _json_text(byte_level_json()).encode()
    return file.is_file() and file.stat().st_size == len(ours) and file.read_bytes() == ours


class FileTokenizer:
    """A tokenizer.json, run by the `tokenizers` library, with the files beside it."""

    def __init__(self, file: Path) -> None:
        if is_missing(file):
            raise DataError(
                f"data.tokenizer: {file} does not exist. Name a tokenizer.json or a folder with one "
                "(save_pretrained of a fast Hugging Face tokenizer writes it), or 'bpe', or 'bytes'."
            )
        self._files = TokenizerFiles(file)
        self._tokenizer = _parse(file, self._files.tokenizer)
        # Whether "</s>" in a text is text, or the token that ends one. An export of the byte tokenizer says the former.
        self._tokenizer.encode_special_tokens = bool(self._files.config.get("split_special_tokens"))
        if self._files.adds_prefix_space is not None:
            _set_prefix_space(self._tokenizer, self._files.adds_prefix_space)
        ids = self.vocabulary()
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.end = self._files.end(ids)
        self.num_special: int = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    @property
    def beginning(self) -> Sequence[int]:
        before: list[int] = self._special_tokens()[0].tolist()
        return before

    def vocabulary(self) -> Mapping[str, int]:
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return ids

    @property
    def identity(self) -> str:
        import tokenizers

        own = self._tokenizer.encode_special_tokens, self._files.adds_prefix_space
        return hashlib.sha256(self._files.tokenizer + repr((own, tokenizers.__version__)).encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_places(self, text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(encoding.ids, np.int32) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def encode_long(self, chunks: Iterable[str]) -> Iterator[Ids]:
        before, after = self._special_tokens()
        parts = (part for part in WindowEncoder(self._tokenizer).encode(chunks) if len(part))
        if (first := next(parts, None)) is not None:
            yield np.concatenate([before, first])
            yield from parts
            yield after

    def _special_tokens(self) -> tuple[Ids, Ids]:
        """Return the special tokens before and after a document, as the post-processor puts them."""
        for text in ("a", *self.vocabulary()):
            encoding = self._tokenizer.encode(text)
            mask = encoding.special_tokens_mask
            if 0 in mask:  # some tokenizers have no token for some texts
                first, last = mask.index(0), len(mask) - mask[::-1].index(0)
                return np.array(encoding.ids[:first], np.int32), np.array(encoding.ids[last:], np.int32)
        raise AssertionError("no text has a token")

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        self._files.save(folder)


def _parse(file: Path, content: bytes) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"data.tokenizer: {file} needs the package 'tokenizers': pip install tokenizers. Or use 'bytes'."
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no narrower class
        raise DataError(f"data.tokenizer: {file} is not a tokenizer.json that 'tokenizers' reads: {error}") from error
    # A saved tokenizer often has the truncation of its last use in it, which would silently cut a corpus to 512 tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _set_prefix_space(tokenizer: tokenizers.Tokenizer, value: bool) -> None:
    """Set whether a text begins with a space, where the tokenizer has the pre-tokenizer that can add one."""
    pre_tokenizer = tokenizer.pre_tokenizer
    if hasattr(pre_tokenizer, "add_prefix_space"):
        pre_tokenizer.add_prefix_space = value
        tokenizer.pre_tokenizer = pre_tokenizer


def byte_level_json(*, use_regex: bool = False) -> dict[str, Any]:
    """Return the byte tokenizer in the format of `tokenizers`: a byte-level BPE without merges.

    `use_regex` divides a text into words first, as GPT-2 does, which matters once there are merges.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **flags} for id, token in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "unk_token": None, "vocab": _byte_level_vocabulary(), "merges": []},
    }


def _byte_level_vocabulary() -> dict[str, int]:
    specials = {token: id for id, token in enumerate(SPECIALS)}
    return specials | {character: byte + len(SPECIALS) for byte, character in enumerate(_byte_characters())}


def byte_level_config() -> dict[str, object]:
    """Return the tokenizer_config.json that stands beside it."""
    bos, pad, eos, unk = SPECIALS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "pad_token": pad,
        "eos_token": eos,
        "unk_token": unk,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is text, as it was in training
    }


def _byte_characters() -> list[str]:
    """Return the character by which ByteLevel shows each byte: the byte's own if it prints, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    placeholder = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(placeholder)) for byte in range(256)]


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_json_text(content), encoding="utf-8")


def _json_text(content: dict[str, object]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
