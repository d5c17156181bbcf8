"""The chat template of a tokenizer, which writes messages as the text that a model is trained on.

What it writes equals `apply_chat_template` of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from models.tokenizer import unwritable
from models.tokenizer_files import TokenizerFiles, tokenizer_file
from parallel.errors import DataError, names_text

if TYPE_CHECKING:
    from jinja2 import Template

Message: TypeAlias = Mapping[str, Any]
DEFAULT, WITH_TOOLS = "default", "tool_use"
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message's reasoning, the standard one first


@dataclass(frozen=True)
class Conversation:
    """Messages, and what a template may know besides: tools as JSON schemas, and variables of the template."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    variables: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Rendering:
    """The text of a conversation. `answers` are the characters, from and to, that the template says are generated."""

    text: str
    answers: tuple[tuple[int, int], ...]


def load_chat_template(spec: str) -> ChatTemplate | None:
    """Return the chat template of the tokenizer that `data.tokenizer` names, or None where it has none.

    As for `AutoTokenizer`, chat_template.jinja and the files of additional_chat_templates/ replace the `chat_template`
    of tokenizer_config.json. Raises DataError where the files cannot be read, or jinja2 is not installed.
    """
    if spec == "bytes":
        return None
    files = TokenizerFiles(tokenizer_file(spec))
    sources = files.chat_templates()
    return ChatTemplate(sources, files.special_tokens(), folder=str(files.folder)) if sources else None


class ChatTemplate:
    """The chat template of a tokenizer, or its templates by name.

    `sources` are the texts of the templates, `special_tokens` the variables bos_token, eos_token and so on, `folder` is
    what messages call it by.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], *, folder: str = "") -> None:
        self.sources = dict(sources)
        self.special_tokens = dict(special_tokens)
        self._folder = folder
        self._compiled = {name: self._compile(name, source) for name, source in self.sources.items()}

    @property
    def content(self) -> str:
        """All that decides what the template writes, as text."""
        return json.dumps([self.sources, self.special_tokens], sort_keys=True)

    @property
    def writes_date(self) -> bool:
        """True if the text may depend on the day on which it is written."""
        return any("strftime_now" in source for source in self.sources.values())

    def names_role(self, role: str) -> bool:
        """Return whether a template has this role in quotes, as it would to write its messages in their own way."""
        return any(quoted in source for source in self.sources.values() for quoted in (f"'{role}'", f'"{role}"'))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the text of messages, with the beginning of an answer after them if it is asked for.

        Raises DataError where the template refuses them.
        """
        return self.write(Conversation(messages), add_generation_prompt=add_generation_prompt).text

    def write(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendering:
        """Return the text of a conversation, and where the answers are in it. Raises DataError as `render` does."""
        from models.chat_limits import MOST_CHARACTERS, LimitedEnvironment
        from models.chat_syntax import Answer

        template, _ = self._chosen(conversation.tools)
        variables = {
            **self.special_tokens,
            "documents": None,
            **(conversation.variables or {}),
            "messages": [_as_templates_expect(message) for message in conversation.messages],
            "tools": conversation.tools,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, answers, length, environment = [], [], 0, template.environment
        assert isinstance(environment, LimitedEnvironment), "it was compiled so"
        try:
            environment.begin()
            for piece in template.generate(variables):
                pieces.append(piece)
                if length > MOST_CHARACTERS:
                    raise ValueError(f"it writes more than {MOST_CHARACTERS} characters")
                if isinstance(piece, Answer):
                    answers.append((length, length + len(piece)))
                length += len(piece)
        except Exception as error:  # whatever the expressions of a template raise, such as a TypeError
            raise DataError(f"the chat template of {self._folder} refuses it: {error}") from error
        text = "".join(pieces)
        if found := unwritable(text):
            raise DataError(f"the chat template of {self._folder} writes {found}. Replace it in the record.")
        return Rendering(text, tuple(answers))

    def marks_answers(self, tools: Sequence[Any] | None = None) -> bool:
        """Return whether the template that is used with these tools has blocks {% generation %}."""
        return self._chosen(tools)[1]

    def _chosen(self, tools: Sequence[Any] | None) -> tuple[Template, bool]:
        name = WITH_TOOLS if tools is not None and WITH_TOOLS in self._compiled else DEFAULT
        if name not in self._compiled:
            raise DataError(
                f"data.tokenizer: {self._folder} has the chat templates {names_text(self._compiled)}, and none that is"
                f" named {DEFAULT!r}. Name one of them so."
            )
        return self._compiled[name]

    def _compile(self, name: str, source: str) -> tuple[Template, bool]:
        try:
            from models.chat_syntax import compile_template
        except ImportError as error:
            raise DataError(
                f"data.tokenizer: the chat template of {self._folder} needs the package 'jinja2': pip install jinja2."
            ) from error
        try:
            return compile_template(source)
        except Exception as error:  # jinja2 also raises errors of Python's own for a damaged template
            raise DataError(f"data.tokenizer: the chat template {name!r} of {self._folder} is no Jinja: {error}") from (
                error
            )


def _as_templates_expect(message: Message) -> dict[str, Any]:
    """Return a message without keys that are None, and with its reasoning under each name by which templates ask."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}
