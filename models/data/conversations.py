"""Conversations as token ids, of which the answers are learned.

What the text of a conversation is, and its tokens, is what `apply_chat_template` of transformers returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from models.chat import ChatTemplate, Conversation
from models.data.conversation_records import Completion, Dialogue, kind_of, parse_record
from models.data.documents import Document
from models.data.records import Located, Records
from models.tokenizer import Ids, Tokenizer
from parallel.errors import DataError

EXAMPLE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARK = "Mark what an answer is in the chat template, between {% generation %} and {% endgeneration %}"
_CHANGED = (
    "the chat template writes the messages up to message {number} otherwise when others follow, so that it cannot be"
    " found which tokens are the answer."
)
_CHANGED_PROMPT = (
    "the chat template writes the prompt for message {number} otherwise when the answer follows, so that it cannot be"
    " found which tokens are the answer."
)


def documents_of(
    records: Iterable[Located],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    end: int | None = None,
    key: str = "data.path",
) -> Iterator[Document]:
    """Yield the conversations of records, which are all of the kind of the first one.

    `end` ends a completion where the tokenizer names no token for it. `key` is that of the config which names the
    records. Raises DataError, with the place of the record, where one cannot be used.
    """
    encoder, first = ConversationEncoder(tokenizer, template, end), None
    for located in records:
        try:
            kind = kind_of(located.record)
            first = first or kind
            if kind is not first:
                raise DataError(f"it has {kind.value}, but the first record has {first.value}. Keep them in two files.")
            document = encoder.document(parse_record(located.record, template))
            if not len(document.ids):
                raise DataError("the chat template writes no text of it. Leave out such records.")
        except DataError as error:
            raise DataError(f"{key}: {located.place}: {error}") from error
        yield document


class ConversationDocuments:
    """The documents of records of conversations. `end` is as for `documents_of`."""

    def __init__(
        self, records: Records, tokenizer: Tokenizer, template: ChatTemplate | None, end: int | None = None
    ) -> None:
        self._records, self._tokenizer, self._template, self._end = records, tokenizer, template, end

    @property
    def fraction(self) -> float:
        return self._records.fraction

    def __iter__(self) -> Iterator[Document]:
        located, key = self._records.located(), self._records.source.key
        return documents_of(located, self._tokenizer, self._template, end=self._end, key=key)

    def messages(self) -> list[str]:
        if self._template is None or not self._template.writes_date:
            return []
        return ["the chat template may write a date: it is that of the day on which the data were encoded"]


class ConversationEncoder:
    """Encodes conversations: messages through the chat template, prompts and completions of plain text without it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, end: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._end = end if tokenizer.end is None else tokenizer.end
        self._before = np.array(tokenizer.beginning, np.int32)

    def document(self, record: Dialogue | Completion) -> Document:
        """Return the tokens of a record, and which of them are learned. Raises DataError."""
        return self._completed(record) if isinstance(record, Completion) else self._written(record)

    def _completed(self, record: Completion) -> Document:
        """Return a prompt and its completion as one text, with the token after it that ends a text.

        The special tokens are those that the tokenizer puts around a text.
        """
        (ids,) = self._tokenizer.encode_documents([record.prompt + record.completion])
        prompt = np.concatenate([self._before, self._tokenizer.encode(record.prompt)])
        if not _begins(ids, prompt):
            raise DataError(
                "the tokens of `prompt` are not those that it has before `completion`: a token has the end of the one"
                " and the beginning of the other. Move the blanks at the end of `prompt` to `completion`."
            )
        if self._end is None:
            raise DataError(
                "no token ends a completion, since the tokenizer names no eos_token. Name it in tokenizer_config.json,"
                " or set model.eos_token_id."
            )
        if not len(ids) or ids[-1] != self._end:
            ids = np.append(ids, np.array([self._end], ids.dtype))
        return Document(ids, np.arange(len(ids)) >= len(prompt))

    def _written(self, dialogue: Dialogue) -> Document:
        template = self._template
        if template is None:
            raise DataError(
                "messages need a chat template, and the tokenizer of data.tokenizer has none. Write"
                f" chat_template.jinja beside its tokenizer.json, such as: {EXAMPLE} The files of a built-in tokenizer"
                " are written by load_tokenizer(NAME).save(FOLDER) of models.tokenizer."
            )
        if template.marks_answers(dialogue.conversation.tools):
            return self._by_marks(template, dialogue)
        return self._by_prefixes(template, dialogue)

    def _by_marks(self, template: ChatTemplate, dialogue: Dialogue) -> Document:
        """Return a conversation in whose template blocks {% generation %} say what is learned.

        A token is learned if any of its characters is.
        """
        written = template.write(dialogue.conversation)
        unlearned = list(_unlearned_parts(template, dialogue, written.text))
        ids, places = self._tokenizer.encode_with_places(written.text)
        is_learned = np.zeros(len(ids), np.bool_)
        for start, stop in written.answers:
            if not any(start in part for part in unlearned):
                is_learned |= (places[:, 0] < stop) & (places[:, 1] > start)
        return Document(ids, is_learned)

    def _by_prefixes(self, template: ChatTemplate, dialogue: Dialogue) -> Document:
        """Return a conversation in which an answer is what the text has more than the text of the messages before it.

        The text of the messages before it ends as a prompt does, such as "<|im_start|>assistant\\n". Of "A B" the
        answer B is what follows "A ", if "A " is a prefix, in characters and in tokens.
        """
        conversation = dialogue.conversation
        text = template.write(conversation).text
        ids = self._tokenizer.encode(text)
        is_learned = np.zeros(len(ids), np.bool_)
        for number, is_answer_learned in dialogue.answers().items():
            if is_answer_learned:
                prompt = template.write(_until(conversation, number), add_generation_prompt=True).text
                answered = template.write(_until(conversation, number + 1)).text
                start = self._num_tokens(text, ids, prompt, number + 1, changed=_CHANGED_PROMPT)
                stop = self._num_tokens(text, ids, answered, number + 1)
                is_learned[start:stop] = True
        return Document(ids, is_learned)

    def _num_tokens(self, text: str, ids: Ids, part: str, number: int, *, changed: str = _CHANGED) -> int:
        """Return how many of the tokens of a text are those of its first part, which ends at message `number`.

        `changed` is the error where the text begins in another way.
        """
        if not text.startswith(part):
            raise DataError(f"{changed.format(number=number)} {MARK}.")
        if part == text:
            return len(ids)
        begin = self._tokenizer.encode(part)
        if not _begins(ids, begin):
            raise DataError(
                f"message {number} begins or ends within a token, so that a prompt would have other tokens than"
                f" it has here. Strip the blanks around the answer. Or: {MARK[0].lower()}{MARK[1:]}."
            )
        return len(begin)


def _unlearned_parts(template: ChatTemplate, dialogue: Dialogue, text: str) -> Iterator[range]:
    """Yield the characters of the prompt, and of the answers after it that are not learned.

    Raises DataError where the template writes them otherwise when other messages follow.
    """
    answers = dialogue.answers().items()
    parts = [(0, dialogue.first), *((n, n + 1) for n, learned in answers if n >= dialogue.first and not learned)]
    for part in parts:
        before = [template.write(_until(dialogue.conversation, number)).text if number else "" for number in part]
        for number, beginning in zip(part, before, strict=True):
            if not text.startswith(beginning):
                raise DataError(
                    f"{_CHANGED.format(number=number)} Write it as `messages` whose answers are all learned."
                )
        yield range(*map(len, before))


def _until(conversation: Conversation, number: int) -> Conversation:
    """Return a conversation with its first messages alone."""
    return Conversation(conversation.messages[:number], conversation.tools, conversation.variables)


def _begins(ids: Ids, part: Ids) -> bool:
    return len(part) <= len(ids) and bool(np.array_equal(ids[: len(part)], part))
