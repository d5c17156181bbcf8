"""Tokens, samples and their order, compared with their definitions written out one element at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.data import Corpus, Loader, SampleOrder, load_tokens
from models.data.corpus import corpus_of
from models.data.samples import TokenRow
from models.tokenizer import ByteTokenizer, load_tokenizer
from parallel.config import DataConfig
from parallel.errors import DataError

VOCAB = 272


def data_config(path: Path | str, **changes: Any) -> DataConfig:
    keys = {"tokenizer": "bytes", "sequence_length": 4, "shuffle": False, "validation_fraction": 0.0}
    return DataConfig(path=str(path), **{**keys, **changes})


def byte_ids(text: str) -> list[int]:
    return [byte + 4 for byte in text.encode()]


def counting_corpus(num_samples: int, sequence_length: int = 4, num_validation: int = 0) -> Corpus:
    """Return a corpus in which all tokens differ, with a rest at the end that is too short for a sample."""
    tokens = np.arange(num_samples * sequence_length + sequence_length - 1)
    return corpus_of(TokenRow(tokens, sequence_length), sequence_length, num_validation)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_decode_to_the_text_that_was_encoded(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == byte_ids(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_leaves_out_specials_and_padding_ids_and_replaces_invalid_utf8() -> None:
    assert ByteTokenizer().decode([0, 1, 4 + ord("a"), 2, 3, 260, 4 + 0xC3]) == "a\ufffd"


def test_transformers_reads_the_saved_byte_tokenizer_as_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ByteTokenizer().save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    # All characters of one and two bytes, and so every byte that UTF-8 uses in them; a sample of the longer ones.
    every_plane = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 4999)]))
    for text in ["", " a  b\n\n\tc ", "it's <s> a </s><pad> text<unk>", "Ünïcödé 漢字 🙂", every_plane]:
        ids = theirs(text)["input_ids"]
        assert ids == byte_ids(text)
        assert theirs.decode(ids) == text
        assert theirs.decode([0, *ids, 2], skip_special_tokens=True) == text
    specials = [theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id]
    assert specials == [0, 1, 2, 3]
    assert len(theirs) == 260


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    """Return a folder with a two-word tokenizer.json, whose saved truncation would cut any text to one token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 4, "cat": 9}, unk_token="the"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(1)
    folder = tmp_path / "words"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_file_encodes_the_whole_text(word_tokenizer: Path) -> None:
    for spec in [word_tokenizer, word_tokenizer / "tokenizer.json"]:
        tokenizer = load_tokenizer(str(spec))
        assert tokenizer.encode("the cat the").tolist() == [4, 9, 4]
        assert tokenizer.decode(np.array([9, 4])) == "cat the"
        assert tokenizer.vocab_size == 10


def test_a_tokenizer_file_is_saved_even_after_its_folder_was_renamed(word_tokenizer: Path, tmp_path: Path) -> None:
    (word_tokenizer / "tokenizer_config.json").write_text('{"unk_token": "the"}')
    before = {file.name: file.read_bytes() for file in word_tokenizer.iterdir()}
    tokenizer = load_tokenizer(str(word_tokenizer))
    word_tokenizer.rename(tmp_path / "words.1")
    export = tmp_path / "export"
    export.mkdir()
    tokenizer.save(export)
    assert {file.name: file.read_bytes() for file in export.iterdir()} == before


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_built_in_tokenizer_is_saved_into_a_new_folder(name: str, tmp_path: Path) -> None:
    """The refusal of conversations without a chat template says so."""
    folder = tmp_path / "new" / "tokenizer"
    load_tokenizer(name).save(folder)
    assert load_tokenizer(str(folder)).encode("A cat.").tolist() == load_tokenizer(name).encode("A cat.").tolist()


def test_a_lone_tokenizer_file_is_saved_with_a_config_that_transformers_reads(
    word_tokenizer: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    load_tokenizer(str(word_tokenizer)).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)("cat")["input_ids"] == [9]


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(str(tmp_path))
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_the_built_in_corpus_is_pythons_help_topics_in_order() -> None:
    from pydoc_data.topics import topics

    corpus = load_tokens(data_config("python-docs", sequence_length=256, validation_fraction=0.05), VOCAB)
    text = ByteTokenizer().decode(corpus.tokens)
    assert text == "\n".join(body for _, body in sorted(topics.items()))
    num_samples = corpus.num_training + corpus.num_validation
    assert num_samples > 1000
    assert corpus.num_validation == int(0.05 * num_samples)


def test_a_text_file_is_read_as_pythons_text_mode_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b" one\r\ntwo\rthree\n\r\n\xc3\xa9\n")
    assert load_tokens(data_config(file), VOCAB).tokens.tolist() == byte_ids(file.read_text(encoding="utf-8"))


def test_a_folder_is_joined_by_token_2_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second", "a.txt": "first", "c.md": "no text file"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "d.txt").mkdir()
    assert load_tokens(data_config(tmp_path), VOCAB).tokens.tolist() == [*byte_ids("first"), 2, *byte_ids("second")]


def test_text_is_encoded_by_the_tokenizer_of_the_config(word_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("cat cat the cat")
    assert load_tokens(data_config(file, tokenizer=str(word_tokenizer)), VOCAB).tokens.tolist() == [9, 9, 4, 9]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", ">i8", "uint64"])
def test_a_token_file_stays_memory_mapped(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "tokens.npy"
    np.save(file, np.arange(30).astype(dtype))
    corpus = load_tokens(data_config(file), 30)
    before = corpus.training.sample(6)["input_ids"]
    assert before.dtype == np.int64
    assert before.tolist() == [24, 25, 26, 27]
    # What is now written to the file appears in the corpus, but not in a sample that was taken before.
    np.lib.format.open_memmap(file, mode="r+")[25] = 3
    assert corpus.training.sample(6)["input_ids"].tolist() == [24, 3, 26, 27]
    assert before.tolist() == [24, 25, 26, 27]


# -- refusing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((3, 5), np.int32), r"2 dimensions, \(3, 5\)"),
        (np.zeros(9, np.float32), "float32"),
        (np.zeros(9, bool), "bool"),
        (np.zeros(3, np.int32), "3 tokens, too few .* 4"),
        (np.zeros(0, np.int32), "0 tokens, too few .* 4"),
        (np.array([5, 6, 300, 7, 301]), "token 300 at position 2, .* vocabulary of 272.* at least 301"),
        (np.array([5, 6, 7, 8, -1]), "token -1 at position 4"),
        (np.array([5, 6, 7, 2**64 - 1], np.uint64), "token 18446744073709551615 at position 3"),
    ],
)
def test_a_wrong_token_file_is_refused_by_name(tmp_path: Path, array: Any, complaint: str) -> None:
    np.save(tmp_path / "tokens.npy", array)
    with pytest.raises(DataError, match=rf"tokens\.npy (.|\n)*{complaint}"):
        load_tokens(data_config(tmp_path / "tokens.npy"), VOCAB)


def test_an_id_is_found_in_every_block_of_a_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.data.token_files.AT_ONCE", 4)
    for position in range(11):
        np.save(tmp_path / "tokens.npy", np.where(np.arange(11) >= position, VOCAB, 0))
        with pytest.raises(DataError, match=f"token 272 at position {position},"):
            load_tokens(data_config(tmp_path / "tokens.npy"), VOCAB)


def test_a_path_without_texts_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.md").write_text("a text")
    (tmp_path / "broken.npy").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    complaints = {
        "nowhere.txt": "does not exist",
        "nowhere.npy": "does not exist",
        "empty": r"no \*\.txt",
        "text.md": r"not of a kind that is read: \.txt, .*\.npy",
        "broken.npy": "not an array",
        "latin.txt": "not UTF-8: byte 0xe9 at position 3",
    }
    for name, complaint in complaints.items():
        with pytest.raises(DataError, match=complaint) as error:
            load_tokens(data_config(tmp_path / name), VOCAB)
        assert str(tmp_path / name) in str(error.value)


def test_a_text_too_short_for_a_sample_or_for_training_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("seven b")
    with pytest.raises(DataError, match=r"7 tokens.*sequence_length 8.* at most 7"):
        load_tokens(data_config(file, sequence_length=8), VOCAB)
    with pytest.raises(DataError, match=r"1\.0 takes all 1 samples"):
        load_tokens(data_config(file, validation_fraction=1.0), VOCAB)
    assert load_tokens(data_config(file, validation_fraction=0.99), VOCAB).num_training == 1


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    with pytest.raises(DataError, match=r"'bytes' has 260 ids.*only 259.*vocab_size=260"):
        load_tokens(data_config("python-docs"), 259)


# -- order -------------------------------------------------------------------------------------------------------------


@given(num_samples=st.integers(1, 40), global_batch=st.integers(1, 50), step=st.integers(0, 10**6))
def test_unshuffled_order_is_the_position_modulo_the_samples(num_samples: int, global_batch: int, step: int) -> None:
    order = SampleOrder(num_samples, shuffle=False, seed=0)
    expected = [(step * global_batch + j) % num_samples for j in range(global_batch)]
    assert order.take(step * global_batch, global_batch).tolist() == expected


@given(num_samples=st.integers(1, 40), global_batch=st.integers(1, 50), seed=st.integers(0, 2**64))
def test_every_epoch_of_a_shuffled_order_has_every_sample_once(num_samples: int, global_batch: int, seed: int) -> None:
    order = SampleOrder(num_samples, shuffle=True, seed=seed)
    num_epochs = 3
    num_steps = -(-num_epochs * num_samples // global_batch)
    run = [int(i) for step in range(num_steps) for i in order.take(step * global_batch, global_batch)]
    for epoch in range(num_epochs):
        assert sorted(run[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [SampleOrder(50, shuffle=True, seed=seed) for seed in (0, 1)]
    epochs = {tuple(order.take(50 * epoch, 50).tolist()) for order in orders for epoch in range(3)}
    assert len(epochs) == 6


def test_a_step_is_the_same_whatever_steps_were_drawn_before() -> None:
    running = SampleOrder(7, shuffle=True, seed=3)
    steps = [running.take(4 * step, 4).tolist() for step in range(12)]
    for step in reversed(range(12)):
        assert SampleOrder(7, shuffle=True, seed=3).take(4 * step, 4).tolist() == steps[step]
        assert running.take(4 * step, 4).tolist() == steps[step]


def test_shuffled_order_does_not_depend_on_the_batch_size() -> None:
    order = SampleOrder(7, shuffle=True, seed=3)
    one_by_one = [int(order.take(step, 1)[0]) for step in range(24)]
    assert np.concatenate([order.take(6 * step, 6) for step in range(4)]).tolist() == one_by_one


def test_the_order_of_a_seed_never_changes() -> None:
    """A resumed run must find the order of the run before it, also with another version of numpy."""
    assert SampleOrder(8, shuffle=True, seed=1).take(8, 8).tolist() == [5, 3, 2, 7, 0, 1, 4, 6]


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 6])
def test_replicas_together_take_the_samples_of_the_step(num_replicas: int) -> None:
    corpus = counting_corpus(num_samples=11, num_validation=2)
    order = SampleOrder(corpus.num_training, shuffle=True, seed=5)
    for step in range(5):
        batches = [
            Loader(corpus, order, global_batch=6, replica=replica, num_replicas=num_replicas).training(6 * step)
            for replica in range(num_replicas)
        ]
        expected = [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in order.take(6 * step, 6).tolist()]
        assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == expected
        assert torch.cat([batch["sample_ids"] for batch in batches]).tolist() == [6 * step + j for j in range(6)]
        assert all(tensor.dtype == torch.int64 for batch in batches for tensor in batch.values())


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("num_validation", [0, 1, 4, 7])
def test_validation_is_the_last_samples_once_and_padding_has_no_label(num_validation: int, num_replicas: int) -> None:
    corpus = counting_corpus(num_samples=10, num_validation=num_validation)
    order = SampleOrder(corpus.num_training, shuffle=True, seed=5)
    replicas = [
        list(Loader(corpus, order, global_batch=4, replica=replica, num_replicas=num_replicas).validation())
        for replica in range(num_replicas)
    ]
    batches = [
        {key: torch.cat([batch[key] for batch in step]) for key in step[0]} for step in zip(*replicas, strict=True)
    ]
    rows = [row for batch in batches for row in zip(*(batch[key].tolist() for key in batch), strict=True)]
    expected = [list(range(4 * i, 4 * i + 4)) for i in range(10 - num_validation, 10)]
    assert [(row, row, index) for index, row in enumerate(expected)] == rows[:num_validation]
    assert [labels for _, labels, _ in rows[num_validation:]] == [[-100] * 4] * (-num_validation % 4)
    assert all(batch["input_ids"].shape == (4, 4) and batch["input_ids"].dtype == torch.int64 for batch in batches)


@pytest.mark.parametrize("key", ["data.path", "data.tokenizer"])
def test_a_file_that_cannot_be_read_is_named(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if Path(path) in (text, tokenizer):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, mode)

    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    for file in (text, tokenizer):
        file.write_text("{}")
    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    named = tokenizer if key == "data.tokenizer" else text
    with pytest.raises(DataError, match=rf"{key}: cannot read {named}: Permission denied\."):
        load_tokens(data_config(text, tokenizer=str(tokenizer) if named == tokenizer else "bytes"), VOCAB)
