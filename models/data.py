"""Make batches from text and token files.

A corpus is one row of token ids, cut into N = tokens // S samples, the last of which are for validation. The samples of
a step follow from the seed and the number of samples taken before it. So their order is the same in every layout and
for every batch size, and a resumed run need not replay the steps before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from models.tokenizer import PAD, SEPARATOR, Ids, load_tokenizer
from parallel.config import DataConfig
from parallel.errors import DataError
from parallel.layout.labels import IGNORED

Indexes: TypeAlias = npt.NDArray[np.int64]
Batch: TypeAlias = dict[str, torch.Tensor]

DIGESTED = 1 << 18  # tokens: a MiB of 32-bit integers
CHECKED_AT_ONCE = 1 << 22  # tokens: a file may be larger than the memory


@dataclass(frozen=True)
class Corpus:
    """`tokens[T]`, cut into N = T // S samples of S tokens. The last `num_validation` are not trained on."""

    tokens: Ids
    sequence_length: int
    num_validation: int

    @property
    def num_samples(self) -> int:
        return len(self.tokens) // self.sequence_length

    @property
    def num_training(self) -> int:
        return self.num_samples - self.num_validation

    @cached_property
    def digest(self) -> str:
        """A digest of the first and of the last MiB of tokens, as 32-bit integers, wherever they were read from."""
        ends = (self.tokens[:DIGESTED], self.tokens[-DIGESTED:])
        return hashlib.sha256(b"".join(np.asarray(end, "<i4").tobytes() for end in ends)).hexdigest()

    def sample(self, index: int) -> Indexes:
        """Return a copy of sample i, `tokens[i*S:(i+1)*S]`."""
        assert 0 <= index < self.num_samples, f"sample {index} of {self.num_samples}"
        start = index * self.sequence_length
        return np.array(self.tokens[start : start + self.sequence_length], np.int64)


class SampleOrder:
    """The order in which a run takes the training samples: as they come, or in a new permutation for each epoch."""

    def __init__(self, num_samples: int, *, shuffle: bool, seed: int) -> None:
        self.num_samples = num_samples
        self._shuffle = shuffle
        self._seed = seed
        # Two are kept, because a step may begin in one epoch and end in the next.
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def take(self, first: int, count: int) -> Indexes:
        """Return the indexes of the `count` samples that a run takes after its first `first` ones."""
        epochs, offsets = np.divmod(np.arange(first, first + count), self.num_samples)
        if not self._shuffle:
            return offsets
        return np.concatenate([self._permutation(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _draw_permutation(self, epoch: int) -> Indexes:
        # The raw bits are the same in every version of numpy; the result of `Generator.permutation` may change.
        bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
        return np.argsort(bits.random_raw(self.num_samples), kind="stable")


class Loader:
    """The batches of data-parallel replica d of D: rows [d*G/D, (d+1)*G/D) of each global batch of G samples."""

    def __init__(
        self, corpus: Corpus, order: SampleOrder, *, global_batch: int, replica: int = 0, num_replicas: int = 1
    ) -> None:
        assert global_batch % num_replicas == 0, f"{global_batch} samples over {num_replicas} replicas"
        self._corpus = corpus
        self._order = order
        self._global_batch = global_batch
        rows = global_batch // num_replicas
        self._block = slice(replica * rows, (replica + 1) * rows)

    def training(self, first: int) -> Batch:
        """Return the training batch after the first `first` samples of the run: input_ids[G/D, S], sample_ids[G/D].

        The sample ids number the samples of the whole run, and dropout masks follow from them.
        """
        samples = self._order.take(first, self._global_batch)[self._block]
        input_ids = np.stack([self._corpus.sample(int(index)) for index in samples])
        return {"input_ids": torch.from_numpy(input_ids), "sample_ids": self._sample_ids(first)}

    def validation(self) -> Iterator[Batch]:
        """Yield all validation samples once, in order: input_ids[G/D, S], labels[G/D, S] and sample_ids[G/D].

        Every global batch has G samples, so that any layout divides it: the last one is filled up with rows that have
        no labels.
        """
        for step in range(math.ceil(self._corpus.num_validation / self._global_batch)):
            sample_ids = self._sample_ids(step * self._global_batch)
            input_ids = torch.full((len(sample_ids), self._corpus.sequence_length), PAD)
            labels = torch.full_like(input_ids, IGNORED)
            for row, index in enumerate(sample_ids.tolist()):
                if index < self._corpus.num_validation:
                    input_ids[row] = torch.from_numpy(self._corpus.sample(self._corpus.num_training + index))
                    labels[row] = input_ids[row]
            yield {"input_ids": input_ids, "labels": labels, "sample_ids": sample_ids}

    def _sample_ids(self, first: int) -> torch.Tensor:
        """Return first + j for each row j of this replica in a global batch."""
        return torch.arange(first + self._block.start, first + self._block.stop)


def load_tokens(data: DataConfig, vocab_size: int) -> Corpus:
    """Return the corpus that a config names.

    Raises DataError if it cannot be read, is too short, or has a token id outside `vocab_size`.
    """
    tokens = _read_token_file(Path(data.path)) if data.path.endswith(".npy") else _encode(data, vocab_size)
    _check_ids(tokens, vocab_size, source=data.path)
    num_samples = len(tokens) // data.sequence_length
    if num_samples == 0:
        raise DataError(
            f"data.path: {data.path} has {len(tokens)} tokens, too few for one sample of data.sequence_length "
            f"{data.sequence_length}. Use a longer text, or a sequence_length of at most {len(tokens)}."
        )
    corpus = Corpus(tokens, data.sequence_length, num_validation=math.floor(data.validation_fraction * num_samples))
    if corpus.num_training <= 0:
        raise DataError(
            f"data.validation_fraction: {data.validation_fraction} takes all {num_samples} samples of {data.path} and "
            f"leaves none to train on. Use a fraction below 1."
        )
    return corpus


def _encode(data: DataConfig, vocab_size: int) -> Ids:
    """Return the texts of `data.path` as token ids, with `</s>` between two texts."""
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer: '{data.tokenizer}' has {tokenizer.vocab_size} ids, but the model's vocabulary only "
            f"{vocab_size}. Set model.vocab_size={tokenizer.vocab_size}, or use a smaller tokenizer."
        )
    parts: list[Ids] = []
    for text in _read_texts(data.path):
        if parts:
            parts.append(np.array([SEPARATOR], np.int32))
        parts.append(tokenizer.encode(text))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read_texts(source: str) -> Iterator[str]:
    """Yield the texts of the built-in corpus, of FILE.txt, or of the *.txt of a folder in the order of their names."""
    path = Path(source)
    if source == "python-docs":
        # This is 465 KB of English that comes with every CPython.
        from pydoc_data.topics import topics

        yield "\n".join(topics[name] for name in sorted(topics))
    elif path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
        if not files:
            raise DataError(f"data.path: the folder {path} has no *.txt in it. Name a folder of texts, or a file.")
        yield from map(_read_text, files)
    elif not path.exists():
        raise DataError(
            f"data.path: {path} does not exist. Name a FILE.txt, a folder of *.txt, a FILE.npy, or 'python-docs'."
        )
    elif path.suffix == ".txt":
        yield _read_text(path)
    else:
        raise DataError(f"data.path: {path} is neither a .txt nor a .npy. Rename it, or convert it to one of them.")


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise DataError(f"data.path: cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path: {file} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}. "
            f"Convert it, as in: iconv -f LATIN1 -t UTF-8."
        ) from error


def _read_token_file(file: Path) -> Ids:
    """Return a 1-d array of token ids, mapped into memory."""
    if not file.is_file():
        raise DataError(f"data.path: there is no file {file}. Name a 1-d array of token ids, as numpy.save writes it.")
    try:
        tokens: npt.NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
    except OSError as error:
        raise DataError(f"data.path: cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"data.path: {file} is not an array that numpy can memory-map: {error}") from error
    if tokens.ndim != 1:
        raise DataError(f"data.path: {file} has {tokens.ndim} dimensions, {tokens.shape}, not 1. Save it flattened.")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"data.path: {file} holds {tokens.dtype}, not token ids. Save it as an integer type.")
    return tokens


def _check_ids(tokens: Ids, vocab_size: int, *, source: str) -> None:
    """Raise DataError for the first token id outside the vocabulary. One block of tokens is in memory at a time."""
    for start in range(0, len(tokens), CHECKED_AT_ONCE):
        block = tokens[start : start + CHECKED_AT_ONCE]
        (outside,) = np.nonzero((block < 0) | (block >= vocab_size))
        if len(outside):
            id, position = int(block[outside[0]]), start + int(outside[0])
            advice = (
                f"set model.vocab_size to at least {id + 1}" if id >= 0 else "no id is negative: write the file again"
            )
            raise DataError(
                f"data.path: {source} has token {id} at position {position}, outside the vocabulary of {vocab_size}. "
                f"{advice[0].upper()}{advice[1:]}."
            )
