"""The corpus of a run: the samples that it trains on, and those that it is validated on.

Text and token ids are one row of tokens, cut into N = tokens // S samples, the last of which are for validation.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.chat import load_chat_template
from models.data.cache import Cache
from models.data.conversation_records import is_conversation, needs_template
from models.data.conversations import ConversationDocuments
from models.data.encoding import text_documents
from models.data.packed import PackedRow, pack_documents
from models.data.padded import pad_conversations
from models.data.records import Record, Records
from models.data.rows import Counted, encoded_row, mapped_row
from models.data.samples import Part, Samples, TokenRow
from models.data.separator import Separator
from models.data.sources import Kind, Source, find_source
from models.tokenizer import Ids, Tokenizer, load_tokenizer
from parallel.config import DataConfig
from parallel.errors import ConfigError, DataError, names_text

VALIDATION = "data.validation_path"


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
        if not self.validates_other_data:
            return self.training.digest
        parts = [(samples.num_tokens, samples.digest) for samples in (self.training, self.validation)]
        return zlib.crc32(json.dumps(parts).encode())

    @property
    def validates_other_data(self) -> bool:
        """True if the samples for validation are of `data.validation_path`, and not a share of the others."""
        return not isinstance(self.validation, Part)

    @property
    def tokens(self) -> Ids:
        """The row of tokens, where the data are one."""
        whole = self.training.whole if isinstance(self.training, Part) else self.training
        assert isinstance(whole, TokenRow | PackedRow), "these samples are not cut from one row"
        return whole.tokens


def corpus_of(samples: Samples, sequence_length: int, num_validation: int = 0, messages: Sequence[str] = ()) -> Corpus:
    """Return the corpus of some samples, the last `num_validation` of which are not trained on."""
    num_training = samples.num_samples - num_validation
    training, validation = Part(samples, range(num_training)), Part(samples, range(num_training, samples.num_samples))
    return Corpus(training, validation, sequence_length, tuple(messages))


def load_tokens(
    data: DataConfig,
    vocab_size: int,
    *,
    ends: Sequence[int] = (),
    pad: int | None = None,
    cache: Cache | None = None,
) -> Corpus:
    """Return the corpus that a config names.

    `ends` and `pad` are the model's eos_token_id and pad_token_id: of the former the first is used where the tokenizer
    names no token that ends a text. `cache` keeps what was encoded; without one all tokens are made in memory. Raises
    DataError if the corpus cannot be read, is too short, or has a token id outside `vocab_size`.
    """
    reader = _Reader(data, vocab_size, tuple(ends), pad, cache)
    source = find_source(data.path)
    training, messages = reader.samples(source)
    if data.validation_path is None:
        num_validation = math.floor(data.validation_fraction * training.num_samples)
        if num_validation >= training.num_samples:
            raise DataError(
                f"data.validation_fraction: {data.validation_fraction} takes all {training.num_samples} samples of"
                f" {data.path} and leaves none to train on. Use a fraction below 1."
            )
        return corpus_of(training, data.sequence_length, num_validation, [*messages, *_not_used(data, source)])
    other = find_source(data.validation_path, VALIDATION)
    validation, more = reader.samples(other)
    if shared := _shared(training, validation, source, other):
        more.append(f"{VALIDATION}: {shared}: the model is validated on what it is trained on")
    return Corpus(training, validation, data.sequence_length, (*messages, *more, *_not_used(data, source, other)))


def _not_used(data: DataConfig, *sources: Source) -> Iterator[str]:
    """Yield a message for each key that was set, and that none of the sources that are read needs."""
    default, kinds = DataConfig(), [source.kind for source in sources]
    if data.text_key != default.text_key and not any(kind.has_records for kind in kinds):
        yield f"data.text_key: {data.text_key!r} is not used, since {data.path} has no records"
    if data.bin_dtype != default.bin_dtype and Kind.BIN not in kinds:
        yield f"data.bin_dtype: {data.bin_dtype} is not used, since {data.path} is not of files .bin"
    if data.validation_path is not None and data.validation_fraction not in (0, default.validation_fraction):
        yield f"data.validation_fraction: {data.validation_fraction} is not used, since data.validation_path is set"


def _shared(training: Samples, validation: Samples, first: Source, second: Source) -> str:
    """Return what two sources have in common; nothing where that is not known."""
    if (training.num_tokens, training.digest) == (validation.num_tokens, validation.digest):
        return f"{second.path} has the same tokens as data.path"
    others = {file.resolve() for file in first.files}
    files = [str(file) for file in second.files if file.resolve() in others]
    return f"{names_text(files)} is also read for data.path" if files else ""


@dataclass(frozen=True)
class _Reader:
    """Reads a source as samples, as the section `data` says; `ends` and `pad` are ids of the model."""

    data: DataConfig
    vocab_size: int
    ends: tuple[int, ...]
    pad: int | None
    cache: Cache | None

    @property
    def end(self) -> int | None:
        return self.ends[0] if self.ends else None

    def samples(self, source: Source) -> tuple[Samples, list[str]]:
        """Return the samples of a source, of which there is at least one, and messages about it."""
        record = next(iter(Records(source)), {}) if source.kind.has_records else {}
        if is_conversation(record, self.data.text_key):
            return self._conversations(source, record)
        counted, messages = self._ids(source) if source.kind.has_ids else self._texts(source)
        row, messages = counted.row, [*self._messages(source, counted), *messages]
        samples: Samples = TokenRow(row.tokens, self.data.sequence_length, row.digest)
        if self.data.document_mask:
            samples, more = pack_documents(row, self.data.sequence_length, key=source.key)
            messages += more
        if not samples.num_samples:
            shorter = f", or a sequence_length of at most {len(row.tokens)}" if len(row.tokens) > 1 else ""
            raise DataError(
                f"{source.key}: {source.path} has {len(row.tokens)} tokens, too few for one sample of"
                f" data.sequence_length {self.data.sequence_length}. Use a longer text{shorter}."
            )
        return samples, messages

    def _ids(self, source: Source) -> tuple[Counted, list[str]]:
        """Return token ids as they stand. Where documents count, one ends after each end token."""
        end = None
        if self.data.document_mask:
            tokenizer = None if self.data.tokenizer == "bytes" else load_tokenizer(self.data.tokenizer)
            end = self.end if tokenizer is None or tokenizer.end is None else tokenizer.end
            if end is None:
                raise DataError(
                    f"data.document_mask: no token is known that ends a document of {source.path}. Set"
                    " model.eos_token_id, or data.tokenizer to the tokenizer that made the ids."
                )
        bin_dtype = self.data.bin_dtype
        return mapped_row(source, self.cache, bin_dtype=bin_dtype, vocab_size=self.vocab_size, end=end), []

    def _texts(self, source: Source) -> tuple[Counted, list[str]]:
        """Return texts as token ids, with a token between two that ends a text."""
        tokenizer, text_key = self._tokenizer(), self.data.text_key
        end = Separator(tokenizer, self.end, self.vocab_size)
        key = {
            "tokenizer": tokenizer.identity,
            "text_key": text_key if source.kind.has_records else None,
            "end": end.id,
        }
        documents = text_documents(source, tokenizer, text_key)
        vocab_size = tokenizer.vocab_size if end.id is None else max(tokenizer.vocab_size, end.id + 1)
        counted = encoded_row(documents, source, self.cache, key=key, vocab_size=vocab_size, end=end.required)
        row = counted.row
        messages = end.messages() if row.num_documents > 1 else []
        if self.data.document_mask and row.num_documents > 1 and row.tokens[row.starts[1] - 1] != end.id:
            messages.append(
                f"{source.key}: token {end.id}, which ends a text, is the first one of the next text, and so no label"
                " with data.document_mask: the model does not learn to stop"
            )
        return counted, messages

    def _conversations(self, source: Source, record: Record) -> tuple[Samples, list[str]]:
        """Return conversations, one in a sample, and messages about them. `record` is the first one."""
        if self.data.document_mask:
            raise ConfigError(
                f"data.document_mask: True, but {source.path} has conversations: a sample has one conversation, and"
                " there is nothing to mask. Set data.document_mask=False."
            )
        tokenizer = self._tokenizer()
        template = load_chat_template(self.data.tokenizer) if needs_template(record) else None
        end = Separator(tokenizer, self.end, self.vocab_size).id
        documents = ConversationDocuments(Records(source), tokenizer, template, end)
        key = {
            "conversations": 2,
            "tokenizer": tokenizer.identity,
            "template": None if template is None else template.content,
            "end": end,
        }
        vocab_size = max(tokenizer.vocab_size, (end or 0) + 1)
        counted = encoded_row(documents, source, self.cache, key=key, vocab_size=vocab_size, end=None)
        ends = sorted({*self.ends, *(() if end is None else (end,))})
        length, pad = self.data.sequence_length, self.pad or 0
        samples, messages = pad_conversations(counted.row, length, pad=pad, ends=ends, key=source.key)
        if self.data.text_key not in ("text", *record):
            messages.append(
                f"data.text_key: {self.data.text_key!r} is not used, since records of {source.path} lack it and are"
                " conversations"
            )
        return samples, [*self._messages(source, counted), *messages]

    def _messages(self, source: Source, counted: Counted) -> list[str]:
        """Return what was read otherwise than it stands, and whether the padding token occurs."""
        messages = [f"{source.key}: {message}" for message in counted.row.messages]
        if num_pads := counted.count(self.pad):
            messages.append(
                f"{source.key}: {num_pads} of its tokens are {self.pad}, model.pad_token_id, which the embedding does"
                " not learn where it is looked up. Set model.pad_token_id to an id that the texts do not have"
            )
        return messages

    def _tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises DataError where it has ids that the model has not."""
        tokenizer = load_tokenizer(self.data.tokenizer)
        if tokenizer.vocab_size > self.vocab_size:
            raise DataError(
                f"data.tokenizer: '{self.data.tokenizer}' has {tokenizer.vocab_size} ids, but the model's vocabulary"
                f" only {self.vocab_size}. Set model.vocab_size={tokenizer.vocab_size}, or use a smaller tokenizer."
            )
        return tokenizer
