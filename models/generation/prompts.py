"""Prompts as a user gives them, by text or in a file, and their tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from models.chat import ChatTemplate
from models.generation.source import Source
from models.tokenizer import Tokenizer
from parallel.errors import DataError, shown

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: each message has a `role` and a `content`."""

RECIPE = 'Write one object a line: {"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}]}.'


def read_prompts(file: Path) -> list[str | Messages]:
    """Return the prompts of a file: each line of a .txt, or each record of a .jsonl. Raises DataError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"--prompts: cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts: {file} is not UTF-8.") from error
    if file.suffix == ".jsonl":
        found = [_of_record(line, f"{file}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    else:
        found = list(filter(None, lines))
    if not found:
        raise DataError(f"--prompts: {file} has no prompt. Write one on each line.")
    return found


def _of_record(line: str, where: str) -> str | Messages:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"--prompts: {where} is not JSON: {error}. {RECIPE}") from error
    if not isinstance(record, dict):
        raise DataError(f"--prompts: {where} is no object: {shown(record)}. {RECIPE}")
    prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(prompt, str) and messages is None:
        return prompt
    if prompt is None and isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise DataError(
        f"--prompts: {where} has the keys {', '.join(map(repr, record)) or 'of nothing'}, and needs a prompt that is"
        f" text, or messages that have a role and a content. {RECIPE}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def tokens_of(prompt: str | Messages, source: Source, template: ChatTemplate | None) -> list[int]:
    """Return the tokens that a model is given for a prompt.

    With a template, which messages need, text is the message of a user. Without one, text has before it what the
    tokenizer puts there, and a text of nothing begins after the token that ends one. Raises DataError.
    """
    if template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return _ids(source.tokenizer, template.render(messages, add_generation_prompt=True))
    assert isinstance(prompt, str)
    ids = [*source.tokenizer.beginning, *_ids(source.tokenizer, prompt)]
    if ids:
        return ids
    if source.begin is None:
        raise DataError(
            f"{source.folder}: neither the tokenizer nor the model says which token begins a text. Give a --prompt that"
            " is not empty."
        )
    return [source.begin]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).tolist() if text else []
