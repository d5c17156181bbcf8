"""Conversations have the tokens of transformers, and what is learned of them is what the assistant says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from models.chat import load_chat_template
from models.data.conversation_records import is_conversation
from models.data.conversations import documents_of
from models.data.documents import Document, DocumentRow
from models.data.padded import pad_conversations
from models.data.records import Located
from models.tokenizer import ByteTokenizer, load_tokenizer
from parallel.errors import DataError
from tests.chat_templates import BOS, CHATML, CHATML_MARKED, EOS, TEMPLATES, save_tokenizer, theirs

USER, ANSWER = {"role": "user", "content": "Is he <there>?"}, {"role": "assistant", "content": "the\n\nhe 😀, yes"}
AGAIN, SHORT = {"role": "user", "content": "the\n"}, {"role": "assistant", "content": "he"}
LONG = [USER, ANSWER, AGAIN, SHORT]
ENDS = {  # what a template writes after an answer
    "chatml": "<|im_end|>\n",
    "qwen2": "<|im_end|>\n",
    "qwen3": "<|im_end|>\n",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "zephyr": "</s>\n",
    "gemma": "<end_of_turn>\n",
}


def documents(folder: Path, *records: dict[str, Any], end: int | None = None) -> list[Document]:
    tokenizer, template = load_tokenizer(str(folder)), load_chat_template(str(folder))
    located = (Located(record, f"FILE line {number}") for number, record in enumerate(records, start=1))
    return list(documents_of(located, tokenizer, template, end=end))


def learned_texts(folder: Path, document: Document) -> list[str]:
    """Return the text of each run of learned tokens."""
    assert document.is_learned is not None
    edges = np.flatnonzero(np.diff(document.is_learned.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [theirs(folder).decode(document.ids[start:stop].tolist()) for start, stop in edges]


# -- the tokens, and which are learned ---------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["he", " the", "\n", "é", "😀", "x"]), min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="session")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("marked"), CHATML_MARKED)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(WORDS, min_size=1, max_size=5))
def test_a_generation_mask_is_that_of_transformers(marked: Path, texts: list[str]) -> None:
    messages = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
    (document,) = documents(marked, {"messages": messages})
    expected = theirs(marked).apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert document.ids.tolist() == expected["input_ids"]
    assert document.is_learned is not None
    assert document.is_learned.astype(int).tolist() == expected["assistant_masks"]


def test_the_last_character_of_an_answer_is_learned_whole(tmp_path: Path) -> None:
    """transformers' mask has only the first of the tokens of a last character such as 😀."""
    source = CHATML_MARKED.replace("message.content + '<|im_end|>'", "message.content")
    folder = save_tokenizer(tmp_path, source)
    messages = [USER, {"role": "assistant", "content": "he 😀"}]
    (document,) = documents(folder, {"messages": messages})
    assert learned_texts(folder, document) == ["he 😀"]
    found = theirs(folder).apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert document.is_learned is not None
    assert document.is_learned.sum() == sum(found["assistant_masks"]) + 3


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_is_learned_with_what_ends_it_and_nothing_else_is(tmp_path: Path, name: str) -> None:
    """The tokens are those of `apply_chat_template`; the template has no block {% generation %}."""
    folder = save_tokenizer(tmp_path, TEMPLATES[name])
    (document,) = documents(folder, {"messages": LONG})
    assert document.ids.tolist() == theirs(folder).apply_chat_template(LONG)["input_ids"]
    assert learned_texts(folder, document) == [str(m["content"]) + ENDS[name] for m in (ANSWER, SHORT)]


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma"])
def test_a_template_that_writes_the_first_token_gets_no_second_one(tmp_path: Path, name: str) -> None:
    """The tokenizer puts <s> before a text, and so does the template."""
    folder = save_tokenizer(tmp_path, TEMPLATES[name])
    (document,) = documents(folder, {"messages": LONG})
    assert document.ids[0] == BOS
    assert document.ids.tolist().count(BOS) == 1
    assert theirs(folder)("x")["input_ids"][0] == BOS


PAIRS = [("Is he", " there"), ("", "the"), ("Is\n\n", "he"), ("Is he", " the</s>"), ("he<s>", "<pad>"), ("he", "")]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_a_completion_of_text_is_learned_with_an_end_as_trl_has_it(
    tmp_path: Path, prompt: str, completion: str
) -> None:
    """Its rule: the tokens of both texts in one, the end token unless it is there, and a mask after the prompt's."""
    folder = save_tokenizer(tmp_path, None)
    (document,) = documents(folder, dict(prompt=prompt, completion=completion))
    reference = theirs(folder)
    whole = completion if completion.endswith("</s>") else completion + "</s>"
    ids = reference(prompt + whole)["input_ids"]
    assert document.ids.tolist() == ids
    assert document.is_learned is not None
    assert document.is_learned.tolist() == [i >= len(reference(prompt)["input_ids"]) for i in range(len(ids))]


def test_a_tokenizer_without_a_token_for_the_letter_a_puts_its_first_token_before_a_prompt(tmp_path: Path) -> None:
    """The tokens before a text were found in those of "a"."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "h": 1, "i": 2, "</s>": 3}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (document,) = documents(tmp_path, dict(prompt="h", completion=" i"))
    assert document.ids.tolist() == [0, 1, 2, 3]
    assert document.is_learned is not None
    assert document.is_learned.tolist() == [False, False, True, True]


def test_bytes_complete_a_text_too() -> None:
    located = [Located(dict(prompt="ab", completion="c"), "FILE line 1")]
    (document,) = documents_of(located, ByteTokenizer(), None)
    assert document.ids.tolist() == [4 + 97, 4 + 98, 4 + 99, EOS]
    assert document.is_learned is not None
    assert document.is_learned.tolist() == [False, False, True, True]


@pytest.mark.parametrize("source", [CHATML, CHATML_MARKED], ids=["prefixes", "marks"])
def test_answers_in_a_prompt_of_messages_are_not_learned(tmp_path: Path, source: str) -> None:
    folder = save_tokenizer(tmp_path, source)
    split, whole = documents(folder, dict(prompt=LONG[:3], completion=LONG[3:])), documents(folder, dict(messages=LONG))
    assert split[0].ids.tolist() == whole[0].ids.tolist()
    assert learned_texts(folder, split[0]) == learned_texts(folder, whole[0])[1:]


def test_tools_parts_and_variables_reach_the_template(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "a", TEMPLATES["qwen2"])
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    parts: dict[str, Any] = {
        "role": "user",
        "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "time?"}],
    }
    messages = [parts, call, {"role": "tool", "content": "noon"}, SHORT]
    as_list = documents(folder, dict(messages=messages, tools=[tool]))
    joined = [{"role": "user", "content": "what time?"}, *messages[1:]]
    expected = theirs(folder).apply_chat_template(joined, tools=[tool])["input_ids"]
    assert as_list[0].ids.tolist() == expected
    assert documents(folder, dict(messages=messages, tools=json.dumps([tool])))[0].ids.tolist() == expected
    answers = learned_texts(folder, as_list[0])
    assert [("<tool_call>" in answer, answer.endswith("<|im_end|>\n")) for answer in answers] == [
        (True, True),
        (False, True),
    ]

    folder = save_tokenizer(tmp_path / "b", "{{ style }}{% for m in messages %}{{ m.content }}{% endfor %}")
    (document,) = documents(folder, dict(messages=[USER], chat_template_kwargs=dict(style="kind")))
    assert theirs(folder).decode(document.ids.tolist()) == "kind" + str(USER["content"])


# -- samples -----------------------------------------------------------------------------------------------------------


def row_of(*learned: str) -> DocumentRow:
    """Return a row of documents, each given by a digit for each token: 1 for those that are learned.

    Its dtype is that of a small vocabulary, in which a label of −100 was once 65436.
    """
    is_learned = np.array([bit == "1" for bits in learned for bit in bits], np.bool_)
    starts = np.cumsum([0, *map(len, learned)])
    return DocumentRow(np.arange(10, 10 + len(is_learned), dtype=np.uint16), starts.astype(np.int64), is_learned)


def test_a_sample_is_a_conversation_that_is_cut_or_padded_on_the_right() -> None:
    samples, messages = pad_conversations(row_of("0011", "011", "00110001", "000001", "100"), 5, pad=1)
    assert samples.num_samples == 3
    assert samples.num_tokens == 24
    rows = [(sample["input_ids"].tolist(), sample["labels"].tolist()) for sample in map(samples.sample, range(3))]
    assert rows == [
        ([10, 11, 12, 13, 1], [-100, -100, 12, 13, -100]),
        ([14, 15, 16, 1, 1], [-100, 15, 16, -100, -100]),
        ([17, 18, 19, 20, 21], [-100, -100, 19, 20, -100]),
    ]
    assert messages == [
        "data.path: 3 conversations, one in a sample, padded to 5 tokens; 6 of their 12 tokens are learned,"
        " those of the answers",
        "data.path: 2 of 5 conversations are longer than data.sequence_length 5 and are cut, the longest has 8 tokens:"
        " 2 of the 8 tokens of answers are lost",
        "data.path: 1 of 5 conversations have no answer and are left out",
        "data.path: 1 of 5 conversations have none of their answer in the first 5 tokens and are left out",
    ]


@given(bits=st.lists(st.text("01", max_size=9), min_size=1, max_size=12), length=st.integers(2, 10))
@settings(max_examples=60, deadline=None)
def test_every_sample_has_a_label_and_what_is_left_out_is_counted(bits: list[str], length: int) -> None:
    """A label is a learned token with another before it, within the sample: its first token never is one."""
    kept = [index for index, text in enumerate(bits) if "1" in text[1:length]]
    if not kept:
        with pytest.raises(DataError, match=r"so that nothing is learned") as refusal:
            pad_conversations(row_of(*bits), length, pad=1)
        if found := re.search(r"Set data.sequence_length to (\d+) or more", str(refusal.value)):
            needed = int(found[1])
            assert pad_conversations(row_of(*bits), needed, pad=1)[0].num_samples
            assert needed == min(text.index("1", 1) + 1 for text in bits if "1" in text[1:])
        return
    samples, messages = pad_conversations(row_of(*bits), length, pad=1)
    assert samples.numbers.tolist() == kept
    for index in range(samples.num_samples):
        assert (samples.sample(index)["labels"][1:] != -100).any()
    said = "\n".join(messages)
    answerless = sum("1" not in text[1:] for text in bits)
    beyond = len(bits) - len(kept) - answerless
    assert (f"{answerless} of {len(bits)} conversations have no answer and are left out" in said) == (answerless > 0)
    assert (f"{beyond} of {len(bits)} conversations have none of their answer" in said) == (beyond > 0)
    whole = sum(text[1:].count("1") for text in bits)
    lost = whole - sum(text[1:length].count("1") for text in bits)
    if any(len(text) > length for text in bits):
        assert f"{lost} of the {whole} tokens of answers are lost" in said


def test_records_are_conversations_by_their_keys() -> None:
    assert is_conversation(["id", "messages", "text"])
    assert is_conversation(["prompt", "completion"])
    assert is_conversation(["prompt", "messages"])
    assert not is_conversation(["prompt", "text"])
    assert not is_conversation(["prompt", "completion"], "completion")
