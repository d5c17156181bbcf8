"""Conversations that users bring are treated as the table of docs/conversations.md says."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.data import Corpus, load_tokens
from models.data.cache import Cache
from parallel.config import DataConfig
from parallel.errors import ColonnadeError, ConfigError
from tests.chat_templates import CHATML, CHATML_MARKED, TEMPLATES, VOCABULARY, save_tokenizer, theirs
from tests.tables import Row, rows
from tests.test_texts import refusal

Record = dict[str, Any]
USER, ANSWER = {"role": "user", "content": "Is he there?"}, {"role": "assistant", "content": "he is"}
PLAIN = {"messages": [USER, ANSWER]}


def corpus_of(
    folder: Path,
    *records: Record,
    template: str | None = CHATML,
    length: int = 100,
    cache: Cache | None = None,
    **fields: Any,
) -> Corpus:
    tokenizer, file = save_tokenizer(folder / "tokenizer", template), folder / "chat.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data: dict[str, Any] = (
        dict(path=str(file), tokenizer=str(tokenizer), sequence_length=length, validation_fraction=0.0) | fields
    )
    return load_tokens(DataConfig(**data), VOCABULARY, ends=(2,), pad=1, cache=cache)


def refused(folder: Path, *records: Record, error: type[ColonnadeError] | None = None, **how: Any) -> str:
    return refusal(lambda: corpus_of(folder, *records, **how), *([error] if error else []))


def said(corpus: Corpus) -> str:
    return "\n".join(corpus.messages)


def learned(folder: Path, corpus: Corpus, index: int = 0) -> str:
    """Return the text of the labels of a sample."""
    labels = corpus.training.sample(index)["labels"]
    return str(theirs(folder / "tokenizer").decode(labels[labels != -100].tolist()))


def messages(folder: Path) -> str:
    corpus = corpus_of(folder, PLAIN)
    assert learned(folder, corpus) == "he is<|im_end|>\n"
    return said(corpus)


def marked(folder: Path) -> str:
    assert learned(folder, corpus_of(folder, PLAIN, template=CHATML_MARKED)) == "he is<|im_end|>"
    return ""


def unmarked(folder: Path) -> str:
    assert learned(folder, corpus_of(folder, PLAIN, template=TEMPLATES["zephyr"])) == "he is</s>\n"
    return ""


def changing(folder: Path) -> str:
    thought = {"role": "assistant", "content": "<think>hm</think>he is"}
    record = {"messages": [USER, thought, USER, ANSWER]}
    assert learned(folder, corpus_of(folder, {"messages": [USER, thought]}, template=TEMPLATES["qwen3"]))
    return refused(folder, PLAIN, record, template=TEMPLATES["qwen3"])


def another_prompt(folder: Path) -> str:
    """A prompt of DeepSeek-R1's template ends with the beginning of the reasoning, which the text need not have."""
    return refused(folder, PLAIN, template=CHATML.replace("assistant\\n' }}", "assistant\\n<think>' }}"))


def within_a_token(folder: Path) -> str:
    begins = {"messages": [USER, {"role": "assistant", "content": "\nhe"}]}
    assert learned(folder, corpus_of(folder, begins, template=CHATML_MARKED)).endswith("he<|im_end|>")
    return refused(folder, begins)


def text_pair(folder: Path) -> str:
    assert learned(folder, corpus_of(folder, dict(prompt="Is he", completion=" there"), template=None)) == " there</s>"
    return ""


def joined_pair(folder: Path) -> str:
    return refused(folder, dict(prompt="Is he ", completion="there"), template=None)


def message_pair(folder: Path) -> str:
    record = dict(prompt=[USER, {"role": "assistant", "content": "he"}, USER], completion=[ANSWER])
    assert learned(folder, corpus_of(folder, record)) == "he is<|im_end|>\n"
    mixed = refused(folder, dict(prompt="Is he", completion=[ANSWER]))
    assert "one of `prompt` and `completion` is text, and the other is not" in mixed
    return ""


def weights(folder: Path) -> str:
    """An answer of weight 0 was learned as any other."""
    for template, end in ((CHATML, "<|im_end|>\n"), (CHATML_MARKED, "<|im_end|>")):
        for first, second, expected in ((0, 1, "the"), (1, 0, "he"), (None, 0.0, "he"), (0, None, "the")):
            answers = [dict(role="assistant", content=text, weight=w) for text, w in (("he", first), ("the", second))]
            record = {"messages": [USER, answers[0], USER, answers[1]]}
            assert learned(folder, corpus_of(folder, record, template=template)) == expected + end
        both = {"messages": [USER, answers[0], USER, answers[0]]}
        assert "have no answer and are left out" in said(corpus_of(folder, PLAIN, both, template=template))
    changing = {"messages": [USER, dict(role="assistant", content="<think>hm</think>he", weight=0), USER, ANSWER]}
    marked_qwen = TEMPLATES["qwen3"].replace(
        "{{- '<|im_start|>' +", "{%- generation %}{%- endgeneration %}{{- '<|im_start|>' +"
    )
    assert "whose answers are all learned" in refused(folder, changing, template=marked_qwen)
    return refused(folder, {"messages": [USER, dict(ANSWER, weight=0.5)]})


def tools(folder: Path) -> str:
    tool, template = {"type": "function", "function": {"name": "clock"}}, TEMPLATES["qwen2"]
    with_tools = corpus_of(folder, PLAIN | dict(tools=[tool]), template=template, length=512).num_tokens
    assert (
        with_tools
        == corpus_of(folder, PLAIN | dict(tools=json.dumps([tool])), template=template, length=512).num_tokens
    )
    assert with_tools > corpus_of(folder, PLAIN, template=template, length=512).num_tokens
    assert "no JSON" in refused(folder, PLAIN | dict(tools="clock"))
    assert "not a list of JSON schemas" in refused(folder, PLAIN | dict(tools=["clock"]))
    assert "and not an object" in refused(folder, PLAIN | dict(chat_template_kwargs=3))
    variables = dict(tools=[tool], style="kind")
    assert "`chat_template_kwargs` has tools, which follow" in refused(
        folder, PLAIN | dict(chat_template_kwargs=variables)
    )
    return ""


def parts(folder: Path) -> str:
    content = [{"type": "text", "text": "he "}, {"type": "text", "text": "is"}]
    corpus = corpus_of(folder, {"messages": [USER, {"role": "assistant", "content": content}]})
    assert learned(folder, corpus) == "he is<|im_end|>\n"
    return ""


def image(folder: Path) -> str:
    content = [{"type": "text", "text": "he "}, {"type": "image", "url": "there"}]
    assert "and not text" in refused(folder, {"messages": [{"role": "user", "content": 3}]})
    return refused(folder, {"messages": [{"role": "user", "content": content}, ANSWER]})


def without_jinja(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "models.chat_syntax", raising=False)
        patch.setitem(sys.modules, "jinja2", None)
        return refused(folder, PLAIN)


def unknown_role(folder: Path) -> str:
    named = TEMPLATES["chatml"] + "{% if messages[0].role == 'observation' %}{% endif %}"
    seen = {"messages": [dict(role="observation", content="he"), ANSWER]}
    assert learned(folder, corpus_of(folder, seen, template=named)) == "he is<|im_end|>\n"
    assert "has the role 'observation'" in refused(folder, seen)
    assert "Known: system, developer" in refused(folder, {"messages": [{"role": 3, "content": "he"}]})
    return refused(folder, {"messages": [USER, {"role": "gpt", "content": "he"}]})


def share_gpt(folder: Path) -> str:
    assert "is 'Is he there?'. A message is an object" in refused(folder, {"messages": ["Is he there?"]})
    assert "and not a list of messages" in refused(folder, {"messages": "Is he there?"})
    return refused(folder, {"messages": [{"from": "human", "value": "he"}]})


def share_gpt_records(folder: Path) -> str:
    turns = [{"from": "human", "value": "Is he there?"}, {"from": "gpt", "value": "he is"}]
    found, file = refused(folder, dict(conversations=turns)), folder / "chat.jsonl"
    recipe = found[found.index("jq") :].replace("FILE > NEW.jsonl", str(file))
    if shutil.which("jq"):
        record = json.loads(subprocess.check_output(recipe, shell=True))
        assert record == PLAIN
    return found


def never_ending(folder: Path) -> str:
    assert "does not learn to stop" not in said(corpus_of(folder, PLAIN, template=TEMPLATES["zephyr"]))
    return said(corpus_of(folder, PLAIN, template=CHATML))


def without_content(folder: Path) -> str:
    assert "message 2 of `messages`" in refused(folder, {"messages": [USER, {"role": "assistant"}]})
    return refused(folder, {"messages": [{"role": "user", "content": None}, ANSWER]})


def several_kinds(folder: Path) -> str:
    other = refused(folder, PLAIN, dict(text="he"))
    assert "it has neither `messages` nor `prompt` and `completion`, but 'text'" in other
    found = refused(folder, PLAIN, PLAIN, dict(prompt="he", completion="is"))
    assert f"{folder / 'chat.jsonl'} line 3: " in found
    return found


def half_a_pair(folder: Path) -> str:
    file = folder / "chat.jsonl"
    assert "half of" in refused(folder, dict(prompt="\ud800", completion="he"))
    assert "\\ud800" in file.read_text()
    shown = dict(chat_template_kwargs=dict(style="\ud800"))
    assert "half of" in refused(folder, PLAIN | shown, template="{{ style }}" + CHATML)
    return refused(folder, {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]})


def cut(folder: Path) -> str:
    long = {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "he is " * 40}]}
    corpus = corpus_of(folder, PLAIN, long)
    assert corpus.num_training == 2
    return said(corpus)


def left_out(folder: Path) -> str:
    late = {"messages": [{"role": "user", "content": "he is " * 40}, ANSWER]}
    corpus = corpus_of(folder, {"messages": [USER]}, PLAIN, late)
    assert corpus.num_training == 1
    assert learned(folder, corpus) == "he is<|im_end|>\n"
    return said(corpus)


def nothing_learned(folder: Path) -> str:
    assert "no conversation has an answer" in refused(folder, {"messages": [USER]})
    found = refused(folder, PLAIN, length=16)
    needed = int(re.findall(r"data.sequence_length to (\d+)", found)[0])
    assert corpus_of(folder, PLAIN, length=needed).num_training == 1
    assert "so that nothing is learned" in refused(folder, PLAIN, length=needed - 1)
    return found


def text_key(folder: Path) -> str:
    corpus = corpus_of(folder, dict(prompt="he", completion="is " * 99), length=8, text_key="completion")
    assert "labels" not in corpus.training.sample(0)
    return ""


def unknown_text_key(folder: Path) -> str:
    return "\n".join(corpus_of(folder, PLAIN, text_key="contnt").messages)


CHECKS: dict[str, Callable[[Path], str]] = {
    "`messages`": messages,
    "a template with `{% generation %}`": marked,
    "a template without it": unmarked,
    "a template that writes earlier messages in another way once others follow": changing,
    "a template whose prompt for an answer has more than the text before the answer": another_prompt,
    "an answer that shares a token with the text before it": within_a_token,
    "`prompt` and `completion` as text": text_pair,
    "a token that has the end of the prompt and the beginning of the completion": joined_pair,
    "`prompt` and `completion` as lists of messages": message_pair,
    "an answer with the `weight` 0, as in OpenAI's format": weights,
    "`tools`, a list or its JSON, and `chat_template_kwargs`": tools,
    "a content of several parts of text": parts,
    "a part that is no text": image,
    "a tokenizer without a chat template": lambda folder: refused(folder, PLAIN, template=None),
    "a template that is no Jinja": lambda folder: refused(folder, PLAIN, template="{% for %}"),
    "a template that needs jinja2, which is not installed": without_jinja,
    "messages that the template refuses": lambda folder: refused(
        folder, {"messages": [ANSWER, USER]}, template=TEMPLATES["mistral"]
    ),
    "a role that is neither a usual one nor named in the template": unknown_role,
    "`from` and `value`": share_gpt,
    "`conversations`": share_gpt_records,
    "a message without content": without_content,
    "a record without messages": lambda folder: refused(folder, {"messages": []}),
    "a template whose answers end with another token than the `eos_token`": never_ending,
    "records of several kinds": several_kinds,
    "half of a surrogate pair": half_a_pair,
    "conversations that are longer than a sample": cut,
    "conversations without an answer, or with none in what a sample has of them": left_out,
    "nothing that is learned": nothing_learned,
    "`data.text_key`, set to a key of the records": text_key,
    "`data.text_key`, set to a key that they lack": unknown_text_key,
    "`data.document_mask=True`": lambda folder: refused(folder, PLAIN, error=ConfigError, document_mask=True),
}


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefixes", "marks"])
def test_tokens_in_the_cache_are_those_of_the_same_template(tmp_path: Path, template: str) -> None:
    """The template is not in tokenizer.json: a template that is changed must not find the tokens of another."""
    cache = Cache(tmp_path / "cache")
    for source in (template, template, template.replace("<|im_end|>", "</s>")):
        made, kept = (corpus_of(tmp_path, PLAIN, template=source, cache=where) for where in (None, cache))
        assert kept.digest == made.digest
        for key, values in made.training.sample(0).items():
            assert kept.training.sample(0)[key].tolist() == values.tolist()
    assert len(list((tmp_path / "cache" / "entries").glob("*/"))) == 2


ROWS = rows("docs/conversations.md", "Conversations")


def test_every_row_of_the_table_has_a_check() -> None:
    assert [row.what for row in ROWS] == list(CHECKS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_conversations_that_users_bring_are_treated_as_the_table_says(row: Row, tmp_path: Path) -> None:
    found = CHECKS[row.what](tmp_path)
    quoted = [words for words in re.findall(r"`([^`]*)`", row.answer) if " " in words]
    assert all(words in found for words in quoted), (quoted, found)
