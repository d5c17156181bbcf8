"""A long text that is encoded in windows has exactly the token ids of the whole text."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

from models.windows import Sizes, WindowEncoder

ENGLISH = "\n".join(topics[name] for name in sorted(topics))[:60_000]
SMALL = Sizes(window=96, overlap=32, end=8, agreeing=3, at_once=3)
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([ENGLISH[i : i + 1000] for i in range(0, len(ENGLISH), 1000)], trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))


def opt() -> Tokenizer:
    tokenizer = gpt2()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens([AddedToken("</s>", lstrip=True, rstrip=True)])
    return tokenizer


def llama3() -> Tokenizer:
    tokenizer = Tokenizer(kinds.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))


def llama2() -> Tokenizer:
    """Return a tokenizer without words: the whole text is one, as SentencePiece's BPE has it."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    trained(tokenizer, trainer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unknown_fused() -> Tokenizer:
    tokenizer = llama2()
    tokenizer.model.byte_fallback = False
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = llama2()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def t5(*, split: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    trained(tokenizer, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False))


def words() -> Tokenizer:
    tokenizer = Tokenizer(kinds.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(tokenizer, trainers.WordLevelTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2,
    "opt": opt,
    "llama3": llama3,
    "llama2": llama2,
    "unknown fused": unknown_fused,
    "gemma": gemma,
    "t5": t5,
    "t5 without words": lambda: t5(split=False),
    "bert": bert,
    "words": words,
}


@pytest.fixture(scope="module", params=KINDS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = KINDS[request.param]()
    return made


pieces = st.one_of(
    st.integers(0, len(ENGLISH) - 200).flatmap(lambda at: st.integers(1, 200).map(lambda n: ENGLISH[at : at + n])),
    st.sampled_from(["</s>", " </s> ", "<s>", "\n", "\n\n", "  ", "'t", "don't", "12345", "é", "e\u0301", "▁", "ﬁ"]),
    st.builds(
        lambda text, n: text * n,
        st.sampled_from(["a", "1", " ", "\n", ".", "é", "🙂", "ab", "\r\n", " a", "漢字"]),
        st.integers(1, 90),
    ),
    st.text(max_size=20),
)


@settings(max_examples=60)
@example("\r\n" * 152 + "</s>", 50)  # the special token takes in all of the space
@example("x" * 19 + "word" * 60, 7)  # a word that is cut is another word, also where it is cut far away
@given(st.lists(pieces, max_size=12).map("".join), st.integers(1, 50))
def test_windows_have_the_tokens_of_the_whole_text(tokenizer: Tokenizer, text: str, chunk: int) -> None:
    chunks = [text[at : at + chunk] for at in range(0, len(text), chunk)]
    parts = list(WindowEncoder(tokenizer, SMALL).encode(chunks))
    assert np.concatenate([[], *parts]).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
