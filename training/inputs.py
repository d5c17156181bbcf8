"""The inputs of a run: its corpus, its tokenizer, and a check of the weights that it starts from."""

from pathlib import Path

from models.data import Corpus, load_tokens
from models.hf import check_weights, has_weights
from models.shapes import shape_of
from models.tokenizer import Tokenizer, is_of_bytes, load_tokenizer
from parallel.config import Config


def read_corpus(config: Config) -> Corpus:
    """Return the corpus, after checking it and the weights in `model.path`. Raises ConfigError or DataError."""
    shape, path = shape_of(config), config.model.path
    corpus = load_tokens(config.data, shape.vocab_size)
    if path is not None and has_weights(path):
        check_weights(path, shape)
    return corpus


def tokenizer_of(config: Config) -> Tokenizer | None:
    """Return the tokenizer that the export will contain, or None for token ids whose tokenizer is not named."""
    is_default = config.data.tokenizer == "bytes"
    return None if is_default and config.data.path.endswith(".npy") else load_tokenizer(config.data.tokenizer)


def input_messages(config: Config, corpus: Corpus) -> list[str]:
    """Return a message for each input that the user may not have meant."""
    messages, path = [], config.model.path
    if path is not None and config.data.tokenizer == "bytes" and not config.data.path.endswith(".npy"):
        file = Path(path) / "tokenizer.json"
        if has_weights(path) and file.is_file() and not is_of_bytes(file):
            messages.append(
                f"the data are read as bytes, but {path} has a tokenizer of its own: data.tokenizer={path} uses it"
            )
    if config.output.eval_every and not corpus.num_validation:
        messages.append("no validation: output.eval_every is set, but data.validation_fraction leaves no sample for it")
    return messages
