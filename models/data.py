"""Make batches from text and token files.

A corpus is one row of token ids, cut into N = tokens // S samples, the last of which are for validation. The samples of
a step follow from the seed and the number of samples taken before it. So their order is the same in every layout and
for every batch size, and a resumed run need not replay the steps before it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from models.texts import Texts
from models.tokenizer import PAD, Ids, Tokenizer, load_tokenizer
from parallel.config import DataConfig
from parallel.errors import DataError
from parallel.layout.labels import IGNORED

Indexes: TypeAlias = npt.NDArray[np.int64]
Batch: TypeAlias = dict[str, torch.Tensor]

CHECKED_AT_ONCE = 1 << 22  # tokens: a file may be larger than the memory


@dataclass(frozen=True)
class Corpus:
    """`tokens[T]`, cut into N = T // S samples of S tokens. The last `num_validation` are not trained on.

    `digest` is a checksum of all tokens, by which ranks, and a run that is resumed, know that they read the same.
    `messages` say what in the data was read otherwise than the user may expect.
    """

    tokens: Ids
    sequence_length: int
    num_validation: int
    digest: int = 0
    messages: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.tokens) // self.sequence_length

    @property
    def num_training(self) -> int:
        return self.num_samples - self.num_validation

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


def load_tokens(data: DataConfig, vocab_size: int, *, ends: Sequence[int] = (), pad: int | None = None) -> Corpus:
    """Return the corpus that a config names.

    `ends` and `pad` are the model's eos_token_id and pad_token_id: of the former the first is used where the tokenizer
    names no token that ends a text. Raises DataError if the corpus cannot be read, is too short, or has a token id
    outside `vocab_size`.
    """
    messages: list[str] = []
    if data.path.endswith(".npy"):
        tokens = _read_token_file(Path(data.path))
    else:
        tokens, messages = _encode(data, vocab_size, ends[0] if ends else None)
    num_pads, digest = _check_ids(tokens, vocab_size, pad, source=data.path)
    if num_pads:
        messages.append(
            f"data.path: {num_pads} of its tokens are {pad}, model.pad_token_id, which the embedding does not learn"
            " where it is looked up. Set model.pad_token_id to an id that the texts do not have"
        )
    num_samples = len(tokens) // data.sequence_length
    if num_samples == 0:
        shorter = f", or a sequence_length of at most {len(tokens)}" if len(tokens) > 1 else ""
        raise DataError(
            f"data.path: {data.path} has {len(tokens)} tokens, too few for one sample of data.sequence_length "
            f"{data.sequence_length}. Use a longer text{shorter}."
        )
    num_validation = math.floor(data.validation_fraction * num_samples)
    corpus = Corpus(tokens, data.sequence_length, num_validation, digest, tuple(messages))
    if corpus.num_training <= 0:
        raise DataError(
            f"data.validation_fraction: {data.validation_fraction} takes all {num_samples} samples of {data.path} and "
            f"leaves none to train on. Use a fraction below 1."
        )
    return corpus


def _encode(data: DataConfig, vocab_size: int, end: int | None) -> tuple[Ids, list[str]]:
    """Return the texts of `data.path` as token ids, with a token between two that ends a text, and messages."""
    tokenizer, texts = load_tokenizer(data.tokenizer), Texts(data.path)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer: '{data.tokenizer}' has {tokenizer.vocab_size} ids, but the model's vocabulary only "
            f"{vocab_size}. Set model.vocab_size={tokenizer.vocab_size}, or use a smaller tokenizer."
        )
    parts: list[Ids] = []
    for name, text in texts:
        ids = tokenizer.encode(text)
        if len(ids):
            parts.append(ids)
        else:
            texts.mention(name, "left out, since there is no token in it")
    if not parts:
        raise DataError(f"data.path: {data.path} is empty: there is no token in it. Name a text.")
    messages = texts.messages()
    if len(parts) > 1:
        separator, more = _separator(tokenizer, end, vocab_size)
        messages += more
        parts = [part for text in parts for part in (np.array([separator], np.int32), text)][1:]
    return np.concatenate(parts), messages


def _separator(tokenizer: Tokenizer, end: int | None, vocab_size: int) -> tuple[int, list[str]]:
    """Return the token that joins two texts: the tokenizer's own, else the model's, which a message says."""
    if tokenizer.end is not None:
        return tokenizer.end, []
    if end is None or end >= vocab_size:
        raise DataError(
            "data.tokenizer: it names no token that ends a text, which must stand between two texts of data.path. Name"
            " its eos_token in tokenizer_config.json, or set model.eos_token_id."
        )
    token = next((repr(token) for token, id in tokenizer.vocabulary().items() if id == end), "of no text")
    return end, [
        f"texts are joined by token {end}, {token}: model.eos_token_id, since the tokenizer names no eos_token"
    ]


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


def _check_ids(tokens: Ids, vocab_size: int, pad: int | None, *, source: str) -> tuple[int, int]:
    """Return how often the token `pad` occurs, and a checksum of all ids, which does not depend on their dtype.

    One block of tokens is in memory at a time. Raises DataError for the first token id outside the vocabulary.
    """
    num_pads = digest = 0
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
        num_pads += 0 if pad is None else int((block == pad).sum())
        digest = zlib.crc32(block.astype("<i8").tobytes(), digest)
    return num_pads, digest
