"""Chat templates write what transformers writes with them, or are refused by name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

from models import chat_limits
from models.chat import ChatTemplate, Conversation, load_chat_template
from models.tokenizer_files import BEGIN_OF_CLASS
from parallel.errors import DataError
from tests.chat_templates import CHATML, CHATML_MARKED, TEMPLATES, save_tokenizer, theirs

USER, ANSWER = {"role": "user", "content": " Is it <|im_end|>\n\n there? "}, {"role": "assistant", "content": "he\n"}
SYSTEM = {"role": "system", "content": "Be “kind” & brief."}
TOOL = {"type": "function", "function": {"name": "clock", "description": "says <the> time: é", "parameters": {}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"a": 1}}}]}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "answered": [USER, ANSWER],
    "long": [USER, ANSWER, USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "thought": [USER, {"role": "assistant", "content": "<think>hm</think>\nyes"}, USER, {**ANSWER, "name": None}],
}
TAKES_NO_SYSTEM = ("mistral", "gemma")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompted", [False, True])
def test_a_conversation_is_written_as_transformers_writes_it(tmp_path: Path, name: str, prompted: bool) -> None:
    folder = save_tokenizer(tmp_path, TEMPLATES[name])
    template, reference = load_chat_template(str(folder)), theirs(folder)
    assert template is not None
    for which, messages in CONVERSATIONS.items():
        if which == "system" and name in TAKES_NO_SYSTEM:
            with pytest.raises(DataError, match=r"supported|must alternate"):
                template.render(messages)
            continue
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        assert template.render(messages, add_generation_prompt=prompted) == expected, which


def test_tools_and_variables_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, TEMPLATES["qwen2"])
    template, reference = load_chat_template(str(folder)), theirs(folder)
    messages: list[dict[str, Any]] = [
        USER,
        CALL,
        {"role": "tool", "content": "noon"},
        {"role": "tool", "content": "one"},
        ANSWER,
    ]
    assert template is not None
    text = template.write(Conversation(messages, [TOOL])).text
    assert text == reference.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    assert "says <the> time: é" in text

    folder = save_tokenizer(tmp_path / "3", TEMPLATES["qwen3"])
    template, reference = load_chat_template(str(folder)), theirs(folder)
    assert template is not None
    ours = template.write(Conversation([USER], None, {"enable_thinking": False}), add_generation_prompt=True).text
    expected = reference.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert ours == expected
    assert "</think>" in ours


def test_documents_are_a_variable_that_a_record_can_set(tmp_path: Path) -> None:
    """They were None whatever the record said. None is what transformers passes without them."""
    folder = save_tokenizer(tmp_path, "{{ documents }}")
    template, reference = load_chat_template(str(folder)), theirs(folder)
    assert template is not None
    for documents in (None, [{"title": "he", "text": "the"}]):
        text = template.write(Conversation([USER], None, {"documents": documents} if documents else None)).text
        assert text == reference.apply_chat_template([USER], documents=documents, tokenize=False)


SYNTAX = {
    "control of loops": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "lines of blocks": "{% for m in messages %}\n  {% if 1 %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "json": "{{ messages | tojson(indent=2) }}{{ {'b': '<', 'a': 1} | tojson(sort_keys=true) }}",
    "dates": "{{ strftime_now('%Y') }}",
    "namespaces": "{% set n = namespace(self=1) %}{% for m in messages %}{% set n.n = m.role %}{% endfor %}{{ n.n }}",
    "dicts": "{{ dict(a=1).a }}{{ dict.fromkeys(['x']) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ cls_token is defined }}",
    "undefined tools": "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.reasoning }};{% endfor %}",
}


@pytest.mark.parametrize("source", SYNTAX.values(), ids=SYNTAX)
def test_templates_have_the_functions_and_the_blanks_of_transformers(tmp_path: Path, source: str) -> None:
    folder = save_tokenizer(tmp_path, source)
    template = load_chat_template(str(folder))
    assert template is not None
    messages = [USER, {**ANSWER, "reasoning": "hm"}, {**ANSWER, "thinking": "so"}]
    assert template.render(messages) == theirs(folder).apply_chat_template(messages, tokenize=False)


HOSTILE = {
    "a method of Python's": "{{ ''.__class__.__mro__ }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a name of a namespace": "{% set n = namespace(__class__=1) %}",
    "an attribute that is not there": "{{ nothing.at.all }}",
    "an addition to nothing": "{{ 'a' + none }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_what_a_template_may_not_do_is_a_data_error(tmp_path: Path, source: str) -> None:
    template = load_chat_template(str(save_tokenizer(tmp_path, source)))
    assert template is not None
    with pytest.raises(DataError, match=r"the chat template of .* refuses it"):
        template.render([USER])


def test_answers_are_where_the_generation_blocks_are(tmp_path: Path) -> None:
    template = load_chat_template(str(save_tokenizer(tmp_path, CHATML_MARKED)))
    assert template is not None
    assert template.marks_answers()
    written = template.write(Conversation(CONVERSATIONS["long"]))
    assert [written.text[start:stop] for start, stop in written.answers] == ["he\n<|im_end|>"] * 2


@pytest.mark.parametrize(
    "source", ["{% macro a() %}X{% endmacro %}", "{% set a %}X{% endset %}", "{% filter trim %}X{% endfilter %}"]
)
def test_a_generation_block_whose_place_is_not_known_is_refused(tmp_path: Path, source: str) -> None:
    """transformers takes the beginning of the text that is written at that moment, which is another place."""
    marked = source.replace("X", "{% generation %}x{% endgeneration %}")
    with pytest.raises(DataError, match="generation block inside a macro, a set or a filter"):
        load_chat_template(str(save_tokenizer(tmp_path, marked)))


def test_templates_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    def both(folder: Path, tools: list[Any] | None = None) -> str:
        template = load_chat_template(str(folder))
        assert template is not None
        text = template.write(Conversation([USER], tools)).text
        assert text == theirs(folder).apply_chat_template([USER], tools=tools, tokenize=False)
        return text

    listed = save_tokenizer(
        tmp_path / "listed",
        None,
        chat_template=[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
    )
    assert both(listed) == "plain"
    assert both(listed, [TOOL]) == "tools"
    beside = save_tokenizer(tmp_path / "beside", CHATML)
    (beside / "chat_template.jinja").write_text("beside")
    assert both(beside) == both(beside, [TOOL]) == "beside"
    (beside / "additional_chat_templates").mkdir()
    (beside / "additional_chat_templates" / "tool_use.jinja").write_text("tools beside")
    assert (both(beside), both(beside, [TOOL])) == ("beside", "tools beside")
    assert load_chat_template(str(save_tokenizer(tmp_path / "none", None))) is None
    assert load_chat_template("bytes") is load_chat_template("bpe") is None
    (beside / "chat_template.jinja").unlink()
    template = load_chat_template(str(beside))
    assert template is not None
    with pytest.raises(DataError, match="has the chat templates tool_use, and none that is named 'default'"):
        template.render([USER])


def test_an_export_has_the_template_of_its_tokenizer(tmp_path: Path) -> None:
    from models.tokenizer import load_tokenizer

    folder = save_tokenizer(tmp_path / "a", CHATML)
    (folder / "chat_template.jinja").write_text(CHATML_MARKED)
    (tmp_path / "export").mkdir()
    load_tokenizer(str(folder)).save(tmp_path / "export")
    ours, exported = load_chat_template(str(folder)), load_chat_template(str(tmp_path / "export"))
    assert ours is not None
    assert exported is not None
    assert exported.content == ours.content


def test_what_is_no_template_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"is no Jinja: Expected an expression"):
        load_chat_template(str(save_tokenizer(tmp_path / "a", "{% for message in %}")))
    with pytest.raises(DataError, match="is neither text nor a list of objects"):
        load_chat_template(str(save_tokenizer(tmp_path / "b", None, chat_template=3)))
    folder = save_tokenizer(tmp_path / "c", CHATML)
    monkeypatch.delitem(sys.modules, "models.chat_syntax", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DataError, match=r"needs the package 'jinja2': pip install jinja2"):
        load_chat_template(str(folder))


def test_special_tokens_that_only_the_class_names_are_those_of_transformers(tmp_path: Path) -> None:
    for kind in (GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer):
        assert kind().bos_token == BEGIN_OF_CLASS.get(kind.__name__)
    folder = save_tokenizer(tmp_path, CHATML)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ bos_token }}{{ eos_token }}"})
    )
    template = load_chat_template(str(folder))
    assert template is not None
    assert template.render([USER]) == "<s></s>"


ENDLESS = {
    "loops within a loop": "{% for a in range(99) %}{% for b in range(99) %}{% endfor %}{% endfor %}",
    "loops over iterators": "{% for a in range(99) %}{% for b in range(99)|map('abs') %}{% endfor %}{% endfor %}",
    "a macro that calls itself": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}"
    ),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_rounds_of_loops_and_calls_are_counted_in_each_text(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lower here, and each text begins to count anew."""
    monkeypatch.setattr(chat_limits, "MOST_ROUNDS", 1000)
    found = ""
    try:
        ChatTemplate({"default": ENDLESS[case]}, {}, folder="here").render([USER])
    except DataError as error:
        found = str(error)
    assert "here refuses it: it takes more than 1000 rounds of loops and calls for one text" in found
    template = ChatTemplate({"default": "{% for a in range(900) %}a{% endfor %}"}, {})
    assert [len(template.render([USER])) for _ in range(3)] == [900] * 3
