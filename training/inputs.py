"""The inputs of a run: its corpus, its tokenizer, and a check of the weights that it starts from."""

import math
from pathlib import Path

from models.data import Cache, Corpus, has_token_ids, load_tokens
from models.generation_config import read_generation_config
from models.hf import check_weights, has_weights, stored_dtypes
from models.shape import ModelShape
from models.shapes import shape_of
from models.tokenizer import Tokenizer, is_of_bytes, load_tokenizer
from parallel.config import Config
from parallel.errors import ConfigError, DataError

DTYPES = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}
UNUSED_ROWS = 1024  # a vocabulary is often padded to a multiple of 64 or 128, which needs no message


def read_corpus(config: Config, cache: Cache | None = None) -> Corpus:
    """Return the corpus, after checking it and the files in `model.path`. Raises ConfigError or DataError.

    Without a `cache` the tokens of texts are in memory.
    """
    shape, path = shape_of(config), config.model.path
    corpus = load_tokens(config.data, shape.vocab_size, ends=shape.end_tokens, pad=shape.padding_row, cache=cache)
    _check_validation(config, corpus)
    if path is not None:
        read_generation_config(path)
        if has_weights(path):
            check_weights(path, shape)
    return corpus


def _check_validation(config: Config, corpus: Corpus) -> None:
    """Raise ConfigError for a key that needs a validation loss, where the data leave no sample for it."""
    wants = {"output.keep_best": config.output.keep_best, "train.early_stopping": config.train.early_stopping}
    needing = [key for key, value in wants.items() if value]
    if needing and not corpus.num_validation:
        smallest = 1 / corpus.num_training
        raise ConfigError(
            *(
                f"{key}: it needs validation samples, and data.validation_fraction {config.data.validation_fraction:g}"
                f" of {corpus.num_training} samples leaves none. Try data.validation_fraction="
                f"{math.ceil(smallest * 1000) / 1000:g}, or data.validation_path."
                for key in needing
            )
        )


def tokenizer_of(config: Config) -> Tokenizer | None:
    """Return the tokenizer that the export will contain, or None for token ids whose tokenizer is not named."""
    if config.data.tokenizer == "bytes" and has_token_ids(config.data.path):
        return None
    return load_tokenizer(config.data.tokenizer)


def input_messages(config: Config, corpus: Corpus) -> list[str]:
    """Return a message for each input that the user may not have meant."""
    shape, path = shape_of(config), config.model.path
    messages, tokenizer = list(corpus.messages), tokenizer_of(config)
    if tokenizer is not None:
        messages += _vocabulary_messages(tokenizer, shape)
    if path is not None and has_weights(path):
        messages += _dtype_messages(config, path, shape)
        if tokenizer is not None:
            messages += _tokenizer_messages(config.data.tokenizer, tokenizer, path)
    return messages


def _dtype_messages(config: Config, path: str, shape: ModelShape) -> list[str]:
    """Say which dtype the weights are cast to, where that is not their own."""
    run, stored = config.train.dtype, [DTYPES[dtype] for dtype in stored_dtypes(path, shape)]
    if stored == [run]:
        return []
    exported = config.output.export_dtype or ("fp64" if run == "fp64" else "fp32")
    return [
        f"the weights in {path} are {' and '.join(stored)}: this run computes in {run} (train.precision), and exports"
        f" {exported} (output.export_dtype)"
    ]


def _vocabulary_messages(tokenizer: Tokenizer, shape: ModelShape) -> list[str]:
    """Say where the tokenizer and the model's shape do not fit each other."""
    messages = []
    if tokenizer.end is not None and tokenizer.end not in shape.end_tokens:
        messages.append(
            f"a text ends with token {tokenizer.end}, the tokenizer's eos_token, and not with model.eos_token_id"
            f" {shape.eos_token_id}: the export has {tokenizer.end}"
        )
    if tokenizer.vocab_size > shape.vocab_size:  # texts would be refused, but these data are token ids
        messages.append(
            f"data.tokenizer, which is exported, has {tokenizer.vocab_size} ids, but the model's vocabulary only"
            f" {shape.vocab_size}"
        )
    if shape.vocab_size - tokenizer.vocab_size > UNUSED_ROWS:
        messages.append(
            f"model.vocab_size is {shape.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids: the other rows"
            " of the embedding are never looked up"
        )
    return messages


def _tokenizer_messages(spec: str, tokenizer: Tokenizer, path: str) -> list[str]:
    """Say where the ids of the data mean other tokens than those that the weights in `path` were trained with."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        built_in = {"bytes": "the data are read as bytes", "bpe": "the data are read with the built-in bpe"}
        read = built_in.get(spec, "")
        return [f"{read}, but {path} does not say with which tokenizer its weights were trained"] if read else []
    if spec == "bytes":
        if is_of_bytes(file):
            return []
        return [f"the data are read as bytes, but {path} has a tokenizer of its own: data.tokenizer={path} uses it"]
    try:
        theirs = load_tokenizer(path).vocabulary()
    except DataError as error:
        return [f"data.tokenizer cannot be compared with that of the weights: {error}"]
    ours = tokenizer.vocabulary()
    differing = sorted((id, token) for token, id in ours.items() if theirs.get(token) != id)
    if not differing:
        return []
    id, token = differing[0]
    return [
        f"{len(differing)} of the {len(ours)} tokens of data.tokenizer have another id in the tokenizer of {path}, or"
        f" none ({token!r} is {id}, there {theirs.get(token)}): data.tokenizer={path} uses its own"
    ]
