"""The corpus of a run: the samples that it trains on, and those that it is validated on.

Text and token ids are one row of tokens, cut into N = tokens // S samples, the last of which are for validation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.data.samples import Part, Samples, TokenRow
from models.data.texts import Texts
from models.data.token_files import read_token_file
from models.tokenizer import Ids, Tokenizer, load_tokenizer
from parallel.config import DataConfig
from parallel.errors import DataError

CHECKED_AT_ONCE = 1 << 22  # tokens: a file may be larger than the memory


@dataclass(frozen=True)
class Corpus:
    """The samples of a run, of `sequence_length` tokens each.

    `messages` say what in the data was read otherwise than the user may expect.
    """

    training: Samples
    validation: Samples
    sequence_length: int
    messages: tuple[str, ...] = ()

    @property
    def num_training(self) -> int:
        return self.training.num_samples

    @property
    def num_validation(self) -> int:
        return self.validation.num_samples

    @property
    def num_tokens(self) -> int:
        """The tokens of the data that `data.path` names."""
        return self.training.num_tokens

    @property
    def digest(self) -> int:
        """A checksum of all data, by which ranks, and a run that is resumed, know that they read the same."""
        return self.training.digest

    @property
    def tokens(self) -> Ids:
        """The row of tokens, where the data are one."""
        whole = self.training.whole if isinstance(self.training, Part) else self.training
        assert isinstance(whole, TokenRow), "these samples are not cut from one row"
        return whole.tokens


def corpus_of(samples: Samples, sequence_length: int, num_validation: int = 0, messages: Sequence[str] = ()) -> Corpus:
    """Return the corpus of some samples, the last `num_validation` of which are not trained on."""
    num_training = samples.num_samples - num_validation
    training, validation = Part(samples, range(num_training)), Part(samples, range(num_training, samples.num_samples))
    return Corpus(training, validation, sequence_length, tuple(messages))


def load_tokens(data: DataConfig, vocab_size: int, *, ends: Sequence[int] = (), pad: int | None = None) -> Corpus:
    """Return the corpus that a config names.

    `ends` and `pad` are the model's eos_token_id and pad_token_id: of the former the first is used where the tokenizer
    names no token that ends a text. Raises DataError if the corpus cannot be read, is too short, or has a token id
    outside `vocab_size`.
    """
    messages: list[str] = []
    if data.path.endswith(".npy"):
        tokens = read_token_file(Path(data.path))
    else:
        tokens, messages = _encode(data, vocab_size, ends[0] if ends else None)
    num_pads, digest = _check_ids(tokens, vocab_size, pad, source=data.path)
    if num_pads:
        messages.append(
            f"data.path: {num_pads} of its tokens are {pad}, model.pad_token_id, which the embedding does not learn"
            " where it is looked up. Set model.pad_token_id to an id that the texts do not have"
        )
    samples = TokenRow(tokens, data.sequence_length, digest)
    if not samples.num_samples:
        shorter = f", or a sequence_length of at most {len(tokens)}" if len(tokens) > 1 else ""
        raise DataError(
            f"data.path: {data.path} has {len(tokens)} tokens, too few for one sample of data.sequence_length "
            f"{data.sequence_length}. Use a longer text{shorter}."
        )
    num_validation = math.floor(data.validation_fraction * samples.num_samples)
    corpus = corpus_of(samples, data.sequence_length, num_validation, messages)
    if corpus.num_training <= 0:
        raise DataError(
            f"data.validation_fraction: {data.validation_fraction} takes all {samples.num_samples} samples of"
            f" {data.path} and leaves none to train on. Use a fraction below 1."
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
