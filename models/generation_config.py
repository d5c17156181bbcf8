"""The generation_config.json of a Hugging Face directory: which tokens end a text, and what an export carries on."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from models.shape import ModelShape
from models.tokenizer import Tokenizer
from parallel.checkpoint.synced_file import write_json
from parallel.errors import DataError
from parallel.regular_file import is_missing, read_json, with_key

FILE = "generation_config.json"
MOST_BYTES = 1 << 20
GenerationConfig: TypeAlias = Mapping[str, Any]


def read_generation_config(folder: str | Path) -> GenerationConfig | None:
    """Return the content of the directory's generation_config.json, or None where it has none. Raises DataError."""
    file = Path(folder) / FILE
    if is_missing(file):
        return None
    content = read_json(file, with_key(DataError, "model.path"), at_most=MOST_BYTES, links=True)
    if not isinstance(content, dict):
        raise DataError(f"model.path: {file} is not a JSON object.")
    ends = content.get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise DataError(
            f"model.path: {file} has eos_token_id {ends!r}, which is neither a token id nor a list of them."
        )
    return content


def write_generation_config(
    folder: Path, content: GenerationConfig, *, ends: Collection[int], before: Collection[int]
) -> None:
    """Write the content into another directory. A text ends there with `ends` in place of `before`, the model's tokens.

    Other tokens that end a text stay.
    """
    tokens = carried_ends(content, ends=ends, before=before)
    write_json(folder / FILE, {**content, "eos_token_id": tokens[0] if len(tokens) == 1 else tokens or None})


def exported_shape(shape: ModelShape, tokenizer: Tokenizer | None) -> ModelShape:
    """Return the shape of a model's export, whose texts end as those of the tokenizer do.

    Where the tokenizer names a token that ends a text, it is that of the exported model too; and so is the token that
    begins one, if it was the same.
    """
    if tokenizer is None or (end := tokenizer.end) is None or end in shape.end_tokens:
        return shape
    begin = end if shape.bos_token_id == shape.eos_token_id else shape.bos_token_id
    return shape.with_fields(bos_token_id=begin, eos_token_id=end)


def carried_ends(content: GenerationConfig, *, ends: Collection[int], before: Collection[int]) -> list[int]:
    """Return the tokens that end a text where `ends` take the place of `before`, the model's tokens; others stay."""
    found = content.get("eos_token_id")
    tokens: list[int] = found if isinstance(found, list) else [] if found is None else [found]
    return [*ends, *(token for token in tokens if token not in {*ends, *before})]


def end_tokens(content: GenerationConfig | None, shape: ModelShape) -> set[int]:
    """Return the tokens with which a generated text ends, as Hugging Face's `generate` finds them."""
    if content is None:
        return set(shape.end_tokens)
    found = content.get("eos_token_id")
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}
