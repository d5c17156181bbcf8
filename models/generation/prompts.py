"""Prompts as a user gives them, by text or in a file, and their tokens."""

import io
from pathlib import Path

from models.chat import ChatTemplate
from models.data.conversation_records import MESSAGES, PROMPT, Dialogue, parse_record
from models.data.records import Record, Records
from models.data.sources import LONE_SUFFIXES, find_source
from models.generation.trained_model import TrainedModel
from models.tokenizer import Tokenizer
from parallel.errors import DataError
from parallel.regular_file import read_input, with_key

MOST_BYTES = 1 << 26
RECIPE = 'Write one object a line: {"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}]}.'


def read_prompts(file: Path) -> list[str | Record]:
    """Return the prompts of a file: `prompt` of its records, records with `messages`, or each line of a text.

    Raises DataError.
    """
    kind = next((kind for suffix, kind in LONE_SUFFIXES.items() if file.name.endswith(suffix)), None)
    found: list[str | Record]
    if kind is not None and kind.has_records:
        records = Records(find_source(str(file), "--prompts"))
        found = [_of_record(located.record, located.place) for located in records.located()]
    else:
        found = list(filter(None, _lines(file)))
    if not found:
        raise DataError(f"--prompts: {file} has no prompt. Write one on each line.")
    return found


def _lines(file: Path) -> list[str]:
    content = read_input(file, with_key(DataError, "--prompts"), at_most=MOST_BYTES)
    try:
        text = io.IncrementalNewlineDecoder(None, translate=True).decode(content.decode("utf-8-sig"), final=True)
        return text.split("\n")  # U+2028, say, is a character of a line
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts: {file} is not UTF-8.") from error


def _of_record(record: Record, place: str) -> str | Record:
    """Return the prompt of a record, or the record itself where it has messages."""
    prompt = record.get(PROMPT)
    if isinstance(prompt, str) and record.get(MESSAGES) is None:
        return prompt
    if prompt is None and record.get(MESSAGES) is not None:
        return record
    raise DataError(
        f"--prompts: {place} has the keys {', '.join(map(repr, record)) or 'of nothing'}, and needs a prompt that is"
        f" text, or messages. {RECIPE}"
    )


def tokens_of(prompt: str | Record, trained: TrainedModel, template: ChatTemplate | None) -> list[int]:
    """Return the tokens that a model is given for a prompt.

    With a template, which messages need, text is the message of a user, and a record is read as in training, with its
    tools. Without one, text has before it what the tokenizer puts there, and a text of nothing begins after the token
    that ends one. Raises DataError.
    """
    if template is not None:
        asked = {MESSAGES: [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else prompt
        dialogue = parse_record(asked, template)
        assert isinstance(dialogue, Dialogue), "it has messages"
        return _ids(trained.tokenizer, template.write(dialogue.conversation, add_generation_prompt=True).text)
    assert isinstance(prompt, str)
    ids = [*trained.tokenizer.beginning, *_ids(trained.tokenizer, prompt)]
    if ids:
        return ids
    if trained.begin is None:
        raise DataError(
            f"{trained.folder}: neither the tokenizer nor the model says which token begins a text. Give a --prompt"
            " that is not empty."
        )
    return [trained.begin]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"it has the character {text[error.start]!r}, which is half of a surrogate pair, or a byte that is not"
            " UTF-8. Replace it."
        ) from error
    return tokenizer.encode(text).tolist() if text else []
