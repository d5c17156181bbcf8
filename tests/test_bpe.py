"""The tokenizer "bpe", which is shipped: any text, the ids of bytes and special tokens, transformers, the wheel."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.demo_words import known_share
from models.data.texts import built_in_text
from models.tokenizer import SPECIALS, ByteTokenizer, load_tokenizer
from models.tokenizer_files import BUILT_IN_BPE
from models.train_bpe import VOCAB_SIZE, bpe_json, trained_merges
from parallel.errors import DataError
from tests.test_docs import MANUAL_OF_THE_README
from tests.test_texts import messages_of, model_in, of_folder, texts_in, tokens_of

ROOT = Path(__file__).parent.parent
BPE = load_tokenizer("bpe")
HARD = [
    "",
    " a  b\n\n\tc ",
    "it's <s> a </s><pad> text<unk>",
    "Ünïcödé 漢字 🙂",
    "The with statement\n   is used",
    "\x00",
]


@settings(max_examples=50)
@given(st.text())
def test_the_bpe_decodes_to_the_text_that_was_encoded(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert (ids >= len(SPECIALS)).all(), "a special token in a text is text"


def test_the_ids_of_special_tokens_and_bytes_are_those_of_the_byte_tokenizer() -> None:
    """The default bos_token_id, pad_token_id and eos_token_id of opt-tiny are then the right ones."""
    vocabulary = BPE.vocabulary()
    assert ByteTokenizer().vocabulary().items() <= vocabulary.items()
    assert sorted(vocabulary.values()) == list(range(BPE.vocab_size)) == list(range(VOCAB_SIZE))
    assert BPE.end == ByteTokenizer().end


def test_transformers_reads_the_same_bpe_from_an_export(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 4999)]))]:
        ids = BPE.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode([0, *ids, 2], skip_special_tokens=True) == text == BPE.decode([0, *ids, 2])
    assert [theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id] == [0, 1, 2, 3]
    assert len(theirs) == BPE.vocab_size


def test_the_shipped_bpe_is_what_its_script_trains() -> None:
    texts = [built_in_text()]
    if hashlib.sha256("".join(texts).encode()).hexdigest() != MANUAL_OF_THE_README:
        pytest.skip("the shipped one was trained on the manual of another Python")
    shipped = json.loads((BUILT_IN_BPE / "tokenizer.json").read_text(encoding="utf-8"))
    assert bpe_json(trained_merges(texts, VOCAB_SIZE)) == shipped


def test_a_vocabulary_that_is_too_small_for_the_bpe_is_refused_with_one_that_fits(tmp_path: Path) -> None:
    path = texts_in(tmp_path, a="a text of some words") / "a.txt"
    with pytest.raises(DataError, match=re.escape("'bpe' has 4096 ids") + r".*Set model\.vocab_size=4096"):
        tokens_of(path, "bpe", 260)
    assert tokens_of(path, "bpe", 4096) == BPE.encode("a text of some words").tolist()


def test_weights_that_do_not_say_their_tokenizer_are_named_beside_the_bpe(tmp_path: Path) -> None:
    said = messages_of(tmp_path, of_folder(model_in(tmp_path / "model", vocab_size=4096)), "data.tokenizer=bpe")
    assert re.search(r"the data are read with the built-in bpe, but .* does not say with which tokenizer", said)


def test_the_share_of_known_words_counts_words_of_two_letters_and_more() -> None:
    share, different = known_share(["The cat, the c@t: statemint x\nTHE"], ["the cat's statement"])
    assert (share, different) == (4 / 5, 3)
