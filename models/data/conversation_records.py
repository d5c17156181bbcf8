"""Records of conversations: what each must have, and what is refused of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from models.chat import ChatTemplate, Conversation
from models.data.records import checked_text
from parallel.errors import DataError, closest, names_text, shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
ASSISTANT = "assistant"
OTHER_NAMES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT, "ai": ASSISTANT}
WEIGHT = "weight"  # of an answer, 0 or 1, as in the format of OpenAI
MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
SHARE_GPT = "conversations"  # of messages with `from` and `value`; it is refused with what makes `messages` of it
TO_MESSAGES = (
    'jq -c \'{messages: [.conversations[] | {role: ({human: "user", gpt: "assistant"}[.from] // .from),'
    " content: .value}]}' FILE > NEW.jsonl"
)
MESSAGE_RECIPE = 'A message is an object {"role": "user", "content": "..."}.'
WITHOUT_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
"""Keys of a message of the assistant that needs no content beside them."""
OF_THE_RECORD = ("messages", "tools", "add_generation_prompt")
"""Variables of a template that `chat_template_kwargs` cannot set."""


class RecordKind(Enum):
    """The keys by which a record is a conversation."""

    MESSAGES = "`messages`"
    PROMPTED = "`prompt` and `completion` as messages"
    TEXT = "`prompt` and `completion` as text"


@dataclass(frozen=True)
class Dialogue:
    """Messages for the chat template. The answers from message `first` on are learned, but for those of weight 0."""

    conversation: Conversation
    first: int = 0

    def answers(self) -> dict[int, bool]:
        """Return the number of each message of the assistant, from 0, and whether it is learned."""
        return {
            number: number >= self.first and message.get(WEIGHT) != 0
            for number, message in enumerate(self.conversation.messages)
            if message["role"] == ASSISTANT
        }


@dataclass(frozen=True)
class Completion:
    """A text, and the text after it, which is learned."""

    prompt: str
    completion: str


def is_conversation(keys: Collection[str], text_key: str = "text") -> bool:
    """Return whether a record with these keys is a conversation, and not a text under the key that the config names."""
    if text_key in keys and (text_key != "text" or SHARE_GPT in keys):
        return False
    return MESSAGES in keys or (PROMPT in keys and COMPLETION in keys) or SHARE_GPT in keys


def needs_template(record: Mapping[str, Any]) -> bool:
    """Return whether records like this one are written by a chat template, as all but text are."""
    return MESSAGES in record or not isinstance(record.get(PROMPT), str)


def kind_of(record: Mapping[str, Any]) -> RecordKind:
    """Return the kind of a record. Raises DataError where it is none."""
    if MESSAGES in record:
        return RecordKind.MESSAGES
    if PROMPT not in record or COMPLETION not in record:
        if SHARE_GPT in record:
            raise DataError(f"it has `conversations`, and `messages` are needed. Write them: {TO_MESSAGES}")
        raise DataError(
            f"it has neither `messages` nor `prompt` and `completion`, but {names_text(map(repr, record)) or 'no key'}."
            " Leave out such records, or name their keys so."
        )
    is_text = [isinstance(record[key], str) for key in (PROMPT, COMPLETION)]
    if is_text[0] != is_text[1]:
        raise DataError("one of `prompt` and `completion` is text, and the other is not. Make both text, or messages.")
    return RecordKind.TEXT if is_text[0] else RecordKind.PROMPTED


def parse_record(record: Mapping[str, Any], template: ChatTemplate | None = None) -> Dialogue | Completion:
    """Return what a record says, whose roles are the usual ones, or named by the template.

    Raises DataError, which names the key and the message, for one that cannot be used.
    """
    kind = kind_of(record)
    if kind is RecordKind.TEXT:
        return Completion(checked_text(record[PROMPT], PROMPT), checked_text(record[COMPLETION], COMPLETION))
    prompt = _messages(record, PROMPT, template) if kind is RecordKind.PROMPTED else []
    messages = _messages(record, MESSAGES if kind is RecordKind.MESSAGES else COMPLETION, template)
    return Dialogue(Conversation([*prompt, *messages], _tools(record), _variables(record)), first=len(prompt))


def _messages(record: Mapping[str, Any], key: str, template: ChatTemplate | None) -> list[dict[str, Any]]:
    given = record[key]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f"`{key}` is {shown(given)}, and not a list of messages. {MESSAGE_RECIPE}")
    if not given:
        raise DataError(f"`{key}` is empty: it has no message. Leave out such records.")
    return [
        _message(message, f"message {number} of `{key}`", template) for number, message in enumerate(given, start=1)
    ]


def _message(given: Any, name: str, template: ChatTemplate | None) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DataError(f"{name} is {shown(given)}. {MESSAGE_RECIPE}")
    message = {str(key): value for key, value in given.items() if value is not None}
    role = message.get("role")
    if role is None:
        like = (
            " It has `from`, which must be `role`, and `value`, which must be `content`." if "from" in message else ""
        )
        raise DataError(f"{name} has no `role`.{like} {MESSAGE_RECIPE}")
    if role not in ROLES and not (template is not None and template.names_role(str(role))):
        match = OTHER_NAMES.get(str(role).casefold()) or closest(str(role), ROLES)
        hint = f"Did you mean {match!r}?" if match else f"Known: {', '.join(ROLES)}."
        raise DataError(f"{name} has the role {shown(role)}. {hint}")
    if "content" in message:
        message["content"] = checked_text(_text_of(message["content"], name), name)
    elif role != ASSISTANT or not any(key in message for key in WITHOUT_TEXT):
        raise DataError(f"{name} has no `content`. Leave out the record, or set it to an empty text.")
    if message.get(WEIGHT) not in (None, 0, 1):
        raise DataError(
            f"{name} has the weight {shown(message[WEIGHT])}. Known: 0, an answer that is not learned, and 1."
        )
    return message


def _text_of(content: Any, name: str) -> str:
    """Return a content as text; one that is a list of parts is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise DataError(f"the `content` of {name} is {shown(content)}, and not text. Leave out such records.")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            what = f"of type {shown(kind)}" if kind not in (None, "text") else shown(part)
            raise DataError(
                f"the `content` of {name} has a part {what}: only parts dict(type='text', text=...) can be trained on."
                " Leave out such records."
            )
        texts.append(part["text"])
    return "".join(texts)


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of a record, which may be written as JSON, so that all records of a table have one type."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"`tools` is text, but no JSON: {error}. Write a list of JSON schemas.") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"`tools` is {shown(tools)}, and not a list of JSON schemas.")
    return tools


def _variables(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    variables = record.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, Mapping):
        raise DataError(f"`chat_template_kwargs` is {shown(variables)}, and not an object.")
    if taken := [key for key in OF_THE_RECORD if key in (variables or {})]:
        raise DataError(f"`chat_template_kwargs` has {names_text(taken)}, which follow from the record itself.")
    return variables
