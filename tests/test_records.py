"""Records, token files and folders that users bring are read as json, pyarrow and datasets read them, or refused."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from models.data import has_token_ids, load_tokens
from models.data.records import Records
from models.data.sources import find_source
from models.tokenizer import load_tokenizer
from parallel.config import DataConfig, parse
from parallel.errors import DataError
from tests.tables import Row, rows
from tests.test_texts import byte_ids, messages_of, refusal, texts_in, tokenizer_in
from training.inputs import tokenizer_of

PAGE, HEADING = "docs/data.md", "Records and token ids"
RECORDS = [{"text": f"é is {number}", "n": number, "more": {"a": [1, None]}} for number in range(5)]
IDS = np.arange(4, 104)


def lines_in(file: Path, records: list[Any] | None = None) -> Path:
    text = "\n".join(map(json.dumps, RECORDS if records is None else records)) + "\n"
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def parquet_in(file: Path, records: list[Any] | None = None) -> Path:
    table, written = pytest.importorskip("pyarrow").Table, pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(exist_ok=True, parents=True)
    written.write_table(table.from_pylist(RECORDS if records is None else records), file, row_group_size=2)
    return file


def dataset_in(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder)
    return folder


def bin_in(file: Path, ids: Any = IDS, dtype: str = "<u2") -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    np.asarray(ids).astype(dtype).tofile(file)
    return file


def tokens_of(path: Path, **changes: Any) -> list[int]:
    config = DataConfig(**{"path": str(path), "sequence_length": 2, "validation_fraction": 0.0, **changes})
    return list(load_tokens(config, 260).tokens.tolist())


def joined(texts: list[str]) -> list[int]:
    return [id for text in texts for id in [2, *byte_ids(text)]][1:]


def refused(path: Path, **changes: Any) -> str:
    return refusal(lambda: tokens_of(path, **changes))


# -- a check for each row: it returns the messages in which the quoted words must stand --------------------------------


def lines(folder: Path) -> str:
    wanted = joined([str(record["text"]) for record in RECORDS])
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"):
        file = lines_in(folder / name)
        assert list(Records(find_source(str(file)))) == RECORDS
        assert tokens_of(file) == wanted
    marked = folder / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert tokens_of(marked) == wanted
    return ""


def parquet(folder: Path) -> str:
    file = parquet_in(folder / "a.parquet")
    assert list(Records(find_source(str(file)))) == RECORDS
    assert tokens_of(file) == joined([str(record["text"]) for record in RECORDS])
    (folder / "b.parquet").write_bytes(file.read_bytes()[:-40])
    assert "b.parquet is not Parquet, or is damaged" in refused(folder / "b.parquet")
    return ""


def saved(folder: Path) -> str:
    path = dataset_in(folder / "saved")
    assert list(Records(find_source(str(path)))) == RECORDS
    assert tokens_of(path) == joined([str(record["text"]) for record in RECORDS])
    return ""


def saved_splits(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(folder)
    said = refused(folder)
    assert f"data.path={folder}/train, and data.validation_path={folder}/test" in said
    assert tokens_of(folder / "train") == joined([str(record["text"]) for record in RECORDS])
    return said


def questions(folder: Path) -> str:
    """The recipe once was to train on the questions alone. It has no other key than those that the record has."""
    several = refused(lines_in(folder / "a.jsonl", [{"title": "a", "body": "b"}]))
    assert "it has 'title', 'body'. Set data.text_key to one of them." in several
    asked = refused(lines_in(folder / "b.jsonl", [{"question": "a", "answer": "b"}]))
    assert 'content: (.question)}, {role: "assistant", content: .answer}]' in asked
    file = lines_in(folder / "c.jsonl", [{"instruction": "a", "input": "b", "output": "c"}])
    said = refused(file)
    recipe = said[said.index("jq") :].replace("FILE > NEW.jsonl.", str(file))
    assert 'content: (.instruction + .input)}, {role: "assistant", content: .output}]' in recipe
    if shutil.which("jq"):
        made = json.loads(subprocess.check_output(recipe, shell=True))
        assert made == {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}
    return said


def missing_key(folder: Path) -> str:
    records = [{"content": "a"}, {"content": "b"}]
    for path in (lines_in(folder / "a.jsonl", records), parquet_in(folder / "b.parquet", records)):
        said = refused(path)
        assert "has no key 'text': it has 'content'. Set data.text_key=content." in said
    later = lines_in(folder / "c.jsonl", [{"text": "a"}, {"other": 1, "texts": "a"}])
    assert f"{later} line 2 has no key 'text': it has 'other', 'texts'. Set data.text_key=texts." in refused(later)
    assert tokens_of(folder / "a.jsonl", text_key="content") == joined(["a", "b"])
    return said


def no_text(folder: Path) -> str:
    for value, kind in ((None, "null"), ([1], "a list"), (3, "a number"), ({}, "an object")):
        path = lines_in(folder / "a.jsonl", [{"text": "a"}, {"text": value}])
        assert f"line 2: 'text' is {kind}, and not text" in refused(path)
    path.write_text('{"text": "\\ud800"}')
    assert "half of a surrogate pair" in refused(path)
    return refused(lines_in(folder / "a.jsonl", [{"text": None}]))


def empty_text(folder: Path) -> str:
    records = [{"text": "x" * 50}, {"text": ""}, {"text": "y" * 50}]
    path = lines_in(folder / "a.jsonl", records)
    assert tokens_of(path) == joined(["x" * 50, "y" * 50])
    assert "is empty: there is no token in it" in refused(lines_in(folder / "b.jsonl", [{"text": ""}]))
    assert "is empty: there is no token in it" in refused(lines_in(folder / "c.jsonl", []))
    return messages_of(folder, f"data.path={path}")


def no_record(folder: Path) -> str:
    path = folder / "a.jsonl"
    path.write_text('{"text": "a"}\n[1, 2]\n')
    assert f"{path} line 2 is a list, and not a record" in refused(path)
    path.write_text('{"text": "a"}\n{"text": \n')
    assert f"{path} line 2 is not JSON" in refused(path)
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    assert "line 1 is not UTF-8: byte 0xe9 at position 13" in refused(path)
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    assert "is UTF-16-LE. Convert it" in refused(path)
    for array in (json.dumps(RECORDS, indent=1), json.dumps(RECORDS)[:50]):  # which need not be read to its end
        path.write_text(array)
        assert "line 1 is a list, and not a record {...}" in refused(path)
    return refused(path)


def packed(folder: Path) -> str:
    file = lines_in(folder / "a.jsonl.gz")
    plain = folder / "b.jsonl"
    plain.write_bytes(file.read_bytes())
    assert f"Rename it to {plain.name}.gz" in refused(plain)
    (folder / "c.jsonl.gz").write_text('{"text": "a"}')
    assert "c.jsonl.gz is not packed by gzip" in refused(folder / "c.jsonl.gz")
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert "it begins as gzip does. Unpack or convert it." in refused(folder / "e.jsonl.gz")
    (folder / "d.jsonl.gz").write_bytes(file.read_bytes()[:-12])
    return refused(folder / "d.jsonl.gz")


def nanogpt(folder: Path) -> str:
    assert tokens_of(bin_in(folder / "a.bin")) == IDS.tolist()
    assert tokens_of(bin_in(folder / "b.bin", dtype="<u4"), bin_dtype="uint32") == IDS.tolist()
    return ""


def odd_bin(folder: Path) -> str:
    file = bin_in(folder / "a.bin")
    file.write_bytes(file.read_bytes() + b"\0")
    return refused(file)


def wrong_dtype(folder: Path) -> str:
    assert "or data.bin_dtype=uint16" in refused(bin_in(folder / "a.bin"), bin_dtype="uint32")
    of_llama = np.random.default_rng(0).integers(0, 128_000, 999)  # the upper halves are 0 and 1
    assert "below 16, as when ids of 4 bytes are read as uint16" in refused(bin_in(folder / "c.bin", of_llama, "<u4"))
    for dtype in ("uint16", "uint32"):
        said = refused(bin_in(folder / "d.bin", dtype="<i8"), bin_dtype=dtype)
        assert f"as when ids of 8 bytes are read as {dtype}. Write it again, numpy.fromfile(" in said
    return refused(bin_in(folder / "b.bin", dtype="<u4"))


def text_as_ids(folder: Path) -> str:
    """Two letters are an id that a vocabulary of 50,000 has; this text ends within a character."""
    (folder / "a.bin").write_bytes(("Two letters are one id, é. " * 9).encode()[:24])
    return refused(folder / "a.bin")


def shared_validation(folder: Path) -> str:
    texts = texts_in(folder / "texts", a="x" * 99, b="y" * 99)
    for path in (texts, texts / "a.txt"):
        config = DataConfig(path=str(texts), validation_path=str(path), sequence_length=3)
        (said,) = load_tokens(config, 260).messages
        assert "the model is validated on what it is trained on" in said
    assert f"{texts}/a.txt is also read for data.path" in said
    return said


def with_header(folder: Path) -> str:
    file = folder / "a.bin"
    file.write_bytes(struct.pack("<256i", 20240520, 1, 100, *[0] * 253) + IDS.astype("<u2").tobytes())
    assert "it begins as Parquet does" in refused(bin_in(folder / "b.bin", np.frombuffer(b"PAR1PAR1", "<u2")))
    return refused(file)


def megatron(folder: Path) -> str:
    file = bin_in(folder / "a.bin", dtype="<i4")
    (folder / "a.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QB", 1, 4) + bytes(99))
    assert tokens_of(file, bin_dtype="uint32") == IDS.tolist()
    return refused(file)


def of_one_kind(folder: Path) -> str:
    lines_in(folder / "lines" / "b.jsonl", [{"text": "b"}])
    lines_in(folder / "lines" / "a.jsonl.gz", [{"text": "a"}])
    assert tokens_of(folder / "lines") == joined(["a", "b"])
    parquet_in(folder / "tables" / "1.parquet", [{"text": "a"}])
    parquet_in(folder / "tables" / "2.parquet", [{"text": "b"}])
    assert tokens_of(folder / "tables") == joined(["a", "b"])
    bin_in(folder / "ids" / "1.bin", IDS[:50])
    bin_in(folder / "ids" / "2.bin", IDS[50:])
    assert tokens_of(folder / "ids") == IDS.tolist()
    (folder / "arrays").mkdir()
    np.save(folder / "arrays" / "1.npy", IDS[:50].astype(np.uint8))
    np.save(folder / "arrays" / "2.npy", IDS[50:75].astype(np.int64))
    np.save(folder / "arrays" / "3.npy", IDS[75:].astype(np.uint64))
    assert tokens_of(folder / "arrays") == IDS.tolist()
    assert all(isinstance(id, int) for id in tokens_of(folder / "arrays"))  # numpy makes float64 of the last two
    return ""


def of_several_kinds(folder: Path) -> str:
    lines_in(folder / "a.jsonl")
    return refused(texts_in(folder, b="x").parent / folder.name)


def of_splits(folder: Path) -> str:
    bin_in(folder / "train.bin")
    bin_in(folder / "val.bin")
    parquet_in(folder / "tables" / "train-00000-of-00001.parquet")
    parquet_in(folder / "tables" / "test-00000-of-00001.parquet")
    assert "are different splits by their names" in refused(folder / "tables")
    said = refused(folder)
    assert f"data.path={folder}/train.bin data.validation_path={folder}/val.bin" in said
    return said


def not_used(folder: Path) -> str:
    """A user who names a key of records for a text believed that it was read by this key."""
    text, ids = str(texts_in(folder / "texts", a="x" * 99)), str(bin_in(folder / "a.bin", dtype="<u4"))
    of_records = messages_of(folder, f"data.path={text}", "data.text_key=content")
    assert f"data.text_key: 'content' is not used, since {text} has no records" in of_records
    both = (f"data.path={text}", f"data.validation_path={ids}", "data.bin_dtype=uint32")
    assert "data.bin_dtype" not in messages_of(folder, *both)
    assert "data.text_key: 'content' is not used" in messages_of(folder, *both, "data.text_key=content")
    return messages_of(folder, f"data.path={text}", "data.bin_dtype=uint32")


def other_kind(folder: Path) -> str:
    for name in ("a.csv", "a.txt.gz", "a.arrow", "a.pt"):
        (folder / name).write_text("x")
        assert "is not of a kind that is read" in refused(folder / name)
    empty = folder / "rows"
    for number, (name, recipe) in enumerate({"b.csv": "Convert it", "k=1": "Name a folder of one of"}.items()):
        (empty / str(number) / name).mkdir(parents=True)
        said = refused(empty / str(number))
        assert f"it has {name}. {recipe}" in said
    return refused(folder / "a.csv")


def validation(folder: Path) -> str:
    path, other = bin_in(folder / "a.bin"), texts_in(folder / "texts", a="x" * 9, b="y" * 8)
    config = DataConfig(path=str(path), validation_path=str(other), sequence_length=3, validation_fraction=0.5)
    corpus = load_tokens(config, 260)
    assert (corpus.num_training, corpus.num_validation, corpus.num_tokens) == (33, 6, 100)
    assert corpus.validation.sample(3)["input_ids"].tolist() == [2, *byte_ids("yy")]
    without = load_tokens(DataConfig(path=str(path), sequence_length=3), 260)
    assert corpus.digest != without.digest == corpus.training.digest
    named = (f"data.path={texts_in(folder / 'more', a='x' * 999)}", f"data.validation_path={folder / 'more'}")
    assert "is not used" not in messages_of(folder, *named, "data.validation_fraction=0")
    return messages_of(folder, *named, "data.validation_fraction=0.5")


def short_validation(folder: Path) -> str:
    path = bin_in(folder / "a.bin")
    assert "data.validation_path: nowhere.txt does not exist" in refused(path, validation_path="nowhere.txt")
    return refused(path, validation_path=str(bin_in(folder / "b.bin", [4])))


def special_tokens(folder: Path) -> str:
    """Return nothing; the ids of each text are those of AutoTokenizer, and one end token stands between two."""
    from transformers import AutoTokenizer

    texts = ["a b", "c <|end|>", "b a", "<|end|> c", "b"]
    path = lines_in(folder / "a.jsonl", [{"text": text} for text in texts])
    templates = {"$A": (), "<s> $A": ("<s>",), "$A <|end|>": ("<|end|>",), "<|end|> $A": ("<|end|>",)}
    vocabulary = {"a": 0, "b": 1, "c": 2, "<|end|>": 3, "<s>": 4}
    for number, (template, special) in enumerate(templates.items()):
        tokenizer = tokenizer_in(folder / str(number), words=vocabulary)
        file = tokenizer / "tokenizer.json"
        changed = json.loads(file.read_text())
        made = processors.TemplateProcessing(
            single=template, special_tokens=[(one, vocabulary[one]) for one in special]
        )
        changed["post_processor"] = json.loads(made.__getstate__())
        file.write_text(json.dumps(changed))
        theirs = AutoTokenizer.from_pretrained(tokenizer)
        row: list[int] = []
        for text in texts:
            ids = theirs(text)["input_ids"]
            row += [3] * bool(row and 3 not in (row[-1], ids[0]))
            row += ids
        assert tokens_of(path, tokenizer=str(tokenizer)) == row, template
        long = " ".join(texts) * 10_000
        ours = np.concatenate(list(load_tokenizer(str(tokenizer)).encode_long([long[:99], long[99:]])))
        assert ours.tolist() == theirs(long)["input_ids"], template
    return ""


CHECKS: dict[str, Callable[[Path], str]] = {
    "FILE.jsonl, FILE.jsonl.gz, or a .json of lines": lines,
    "FILE.parquet": parquet,
    "a folder that `datasets.save_to_disk` wrote": saved,
    "such a folder with several splits": saved_splits,
    "records without `data.text_key`": missing_key,
    "records with a question and its answer under other keys, such as `instruction` and `output`": questions,
    "a value that is no text": no_text,
    "records with an empty text": empty_text,
    "lines that are no records, such as a JSON array": no_record,
    "a packed file that is cut off": packed,
    "nanoGPT's FILE.bin": nanogpt,
    "a .bin of half an id": odd_bin,
    "a .bin of another dtype": wrong_dtype,
    "a .bin that is text": text_as_ids,
    "a .bin with the header of llm.c": with_header,
    "a .bin of Megatron of another dtype": megatron,
    "a folder with files of one kind": of_one_kind,
    "a folder with files of several kinds": of_several_kinds,
    "a folder with a training split and others": of_splits,
    "a file of another kind": other_kind,
    "`data.text_key` or `data.bin_dtype`, for data without records or without .bin": not_used,
    "data for validation": validation,
    "data for validation that are too short": short_validation,
    "data for validation that are trained on": shared_validation,
    "special tokens that the tokenizer puts around a text": special_tokens,
}
ROWS = rows(PAGE, HEADING)


def test_every_row_of_the_table_has_a_check() -> None:
    assert [row.what for row in ROWS] == list(CHECKS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_users_bring_as_data_is_treated_as_the_table_says(row: Row, tmp_path: Path) -> None:
    said = CHECKS[row.what](tmp_path)
    quoted = re.findall(r"`([^`]*)`", row.answer)
    assert all(words in said for words in quoted if " " in words), (quoted, said)


@pytest.mark.parametrize(
    ("path", "tokenizer", "vocab_size"),
    [("gone.jsonl", "bytes", 260), ("gone.npy", "bytes", None), ("gone", "bpe", 4096), ("python-docs", "bytes", 260)],
)
def test_the_tokenizer_of_a_run_is_known_although_its_data_have_moved(
    path: str, tokenizer: str, vocab_size: int | None
) -> None:
    """An export after the data had moved once lost a tokenizer that was named, since the data were looked at first."""
    config = parse(dict(data=dict(path=path, tokenizer=tokenizer)), batches=False)
    found = tokenizer_of(config)
    assert (None if found is None else found.vocab_size) == vocab_size


def test_a_folder_of_token_ids_is_told_from_texts(tmp_path: Path) -> None:
    """Generation from a checkpoint once took the ids of a folder for bytes: it looked at the end of the path alone."""
    bin_in(tmp_path / "ids.txt" / "a.bin")
    assert has_token_ids(str(tmp_path / "ids.txt"))
    assert not has_token_ids(str(texts_in(tmp_path / "texts.bin", a="x")))
    with pytest.raises(DataError, match="does not exist"):
        has_token_ids(str(tmp_path / "gone"))
