"""Tokens are made once, are those of the files and of the tokenizer as they are now, and are whole or not there."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from models.data import Cache, Corpus, block_sums, load_tokens
from models.data.block_sums import BlockSums, _check_block, check_files, remember
from models.data.cache import ENTRY, Report, _digest
from models.data.contents import digest_of_file
from models.data.documents import ArrayStore, Document, MemoryStore, RowWriter
from models.data.sources import find_source
from models.tokenizer import ByteTokenizer
from parallel.config import DataConfig
from parallel.errors import ConfigError, DataError
from tests.parting import TIMEOUT, play
from tests.test_data import byte_ids
from tests.test_records import lines_in
from tests.test_texts import WORDS, refusal, texts_in, tokenizer_in
from training.tokenizing import TokenizingScreen, cache_of


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every text is added that the byte tokenizer encodes."""
    texts: list[str] = []
    encode = ByteTokenizer.encode

    def noted(self: ByteTokenizer, text: str) -> Any:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", noted)
    return texts


def corpus_of(path: Path, cache: Cache | None, **changes: Any) -> Corpus:
    keys: dict[str, Any] = {"path": str(path), "sequence_length": 2, "validation_fraction": 0.0}
    return load_tokens(DataConfig(**keys | changes), 260, cache=cache)


def entries(cache: Cache) -> list[Path]:
    return sorted(entry.parent for entry in cache.folder.glob(f"entries/*/{ENTRY}"))


def test_texts_are_encoded_once_and_mapped_afterwards(tmp_path: Path, cache: Cache, encoded: list[str]) -> None:
    path = texts_in(tmp_path / "texts", a="one", b="two", c="")
    first, second, without = (corpus_of(path, one) for one in (cache, cache, None))
    assert (
        first.tokens.tolist()
        == second.tokens.tolist()
        == without.tokens.tolist()
        == [*byte_ids("one"), 2, *byte_ids("two")]
    )
    assert isinstance(second.tokens, np.memmap)
    assert first.digest == second.digest == without.digest
    assert first.messages == second.messages == without.messages
    assert any("left out, since there is no token in it: c.txt" in message for message in first.messages)
    assert len(encoded) == 2 * 3


def test_an_entry_is_that_of_the_contents_and_not_of_the_folder(
    tmp_path: Path, cache: Cache, encoded: list[str]
) -> None:
    path = texts_in(tmp_path / "texts", a="one")
    corpus_of(path, cache)
    path.rename(tmp_path / "moved")
    corpus_of(tmp_path / "moved", cache)
    assert encoded == ["one"]
    status = (tmp_path / "moved" / "a.txt").stat()
    (tmp_path / "moved" / "a.txt").write_text("two")
    os.utime(tmp_path / "moved" / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert corpus_of(tmp_path / "moved", cache).tokens.tolist() == byte_ids("two")


def test_another_tokenizer_key_or_end_token_has_another_entry(tmp_path: Path, cache: Cache) -> None:
    """Each of these, left out of the key, would train on the tokens of another run without a word."""
    path = lines_in(tmp_path / "a.jsonl", [{"text": "a b", "other": "c"}, {"text": "b", "other": "b b"}])
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    first = tokenizer_in(tmp_path / "first", plain)
    second = tokenizer_in(tmp_path / "second", plain, words=WORDS | {"a": 1, "b": 0})
    rows = [
        list(load_tokens(config, 260, ends=(end,), cache=cache).tokens.tolist())
        for end in (3, 4)
        for tokenizer in (first, second)
        for key in ("text", "other")
        for config in [DataConfig(path=str(path), tokenizer=str(tokenizer), text_key=key, sequence_length=2)]
    ]
    assert rows[:4] == [[0, 1, 3, 1], [2, 3, 1, 1], [1, 0, 3, 0], [2, 3, 0, 0]]
    assert rows[4:] == [[0, 1, 4, 1], [2, 4, 1, 1], [1, 0, 4, 0], [2, 4, 0, 0]]
    assert len(entries(cache)) == 8


def test_processes_that_come_together_do_the_work_once_and_the_others_wait(tmp_path: Path, cache: Cache) -> None:
    """A lock belongs to an open file: threads that open it exclude each other as processes do."""
    source, began = find_source(str(texts_in(tmp_path, a="x"))), []

    def work(store: ArrayStore, report: Report) -> dict[str, Any]:
        began.append(time.monotonic())
        for value in range(20):
            store.append("tokens", np.full(5, value))
            report(value / 20, 5 * value)
            time.sleep(0.02)
        return {"answer": 1}

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(cache.entry, source, {}, work) for _ in range(4)]
    assert len(began) == 1
    found = [thread.result() for thread in threads]
    assert all(entry.arrays["tokens"].tolist() == np.repeat(np.arange(20), 5).tolist() for entry in found)


def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, cache: Cache) -> None:
    source = find_source(str(texts_in(tmp_path, a="x")))

    def work(store: ArrayStore, report: Report, *, is_killed: bool) -> dict[str, Any]:
        store.append("tokens", np.arange(1000))
        if is_killed:
            os._exit(9)
        return {}

    if (child := os.fork()) == 0:
        cache.entry(source, {}, partial(work, is_killed=True))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(cache.folder.glob("entries/*.part/tokens.bin"))) == 1
    assert not entries(cache)
    assert len(cache.entry(source, {}, partial(work, is_killed=False)).arrays["tokens"]) == 1000
    assert not list(cache.folder.glob("entries/*.part"))


def _cut_off(folder: Path) -> None:
    file = folder / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-1])


def _changed(folder: Path) -> None:
    file = folder / ENTRY
    file.write_text(file.read_text().replace("uint16", "int16").replace("<u2", "<i2"))


def _without_starts(folder: Path) -> None:
    (folder / "starts.bin").unlink()


def _not_json(folder: Path) -> None:
    (folder / ENTRY).write_text("{")


def _null(folder: Path) -> None:
    (folder / ENTRY).write_text("null")


def _flipped(folder: Path) -> None:
    """Change a bit; size and time of modification stay as they were."""
    file = folder / "tokens.bin"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _pipe(folder: Path) -> None:
    (folder / "tokens.bin").unlink()
    os.mkfifo(folder / "tokens.bin")


def _objects(folder: Path) -> None:
    """Say that an array has Python's objects, whose addresses would be read from the file."""
    content = json.loads((folder / ENTRY).read_text())
    content.pop("digest")
    content["arrays"]["starts"]["dtype"] = "|O"
    (folder / ENTRY).write_text(json.dumps({**content, "digest": _digest(content)}))


DAMAGES = [_cut_off, _changed, _without_starts, _not_json, _null, _flipped, _pipe, _objects]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, cache: Cache, encoded: list[str], damage: Callable[[Path], None]
) -> None:
    path = texts_in(tmp_path / "texts", a="one")
    corpus_of(path, cache)
    damage(entries(cache)[0])
    for _ in range(2):
        assert corpus_of(path, cache).tokens.tolist() == byte_ids("one")
    assert encoded == ["one", "one"]


def test_a_byte_that_has_changed_in_a_large_entry_is_noticed_after_the_file_was_written_and_by_chance_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of 4 blocks is large here, and one of them is looked at where the file is as it was checked."""
    monkeypatch.setattr(block_sums, "BLOCK", 16)
    monkeypatch.setattr(block_sums, "WHOLE_TO", 32)
    monkeypatch.setattr(block_sums, "SAMPLED", 1)
    (file := tmp_path / "tokens.bin").write_bytes(content := bytes(range(60)))
    (sums := BlockSums()).update(memoryview(content)[:20])
    sums.update(memoryview(content)[20:])
    read: list[int] = []

    def noted(file: Path, number: int, expected: int) -> None:
        read.append(number)
        _check_block(file, number, expected)

    monkeypatch.setattr(block_sums, "_check_block", noted)

    def check() -> list[int]:
        read.clear()
        check_files(tmp_path, {file: sums.sums()}, lambda fraction: None)
        return list(read)

    assert len(sums.sums()) == 4
    assert check() == check() == [0, 1, 2, 3]  # the file has just been written: a change might have the same time
    remember(tmp_path, [file], before=math.inf)
    assert {i for _ in range(64) for i in check()} == {0, 1, 2, 3}  # none is left out, but with 4 · (3/4)⁶⁴ < 1e-7
    assert len(check()) == 1
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(content[:-1] + b"x")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"tokens\.bin has other bytes than were written, in its MiB 4"):
        check()


def test_an_entry_that_is_damaged_and_made_again_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = texts_in(tmp_path / "texts", a="one")
    cache = cache_of({"COLONNADE_CACHE": str(tmp_path / "cache")}, quiet=False)
    corpus_of(path, cache)
    _flipped(entries(cache)[0])
    capsys.readouterr()
    corpus_of(path, cache)
    corpus_of(path, cache)
    said = "".join(capsys.readouterr()).replace("\n", "")
    assert said.count("is damaged, and is made again") == 1
    assert str(entries(cache)[0]) in said


def test_a_cache_that_cannot_be_written_is_refused_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = texts_in(tmp_path / "texts", a="one")
    (tmp_path / "file").write_text("no folder")
    assert "COLONNADE_CACHE: tokens cannot be kept in" in refusal(
        lambda: corpus_of(path, Cache(tmp_path / "file" / "cache"))
    )
    full = Cache(tmp_path / "full")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert f"kept in {full.folder}: No space left on device. Set this" in refusal(lambda: corpus_of(path, full))
    assert [one.suffix for one in (full.folder / "entries").iterdir()] == [".lock"]


def test_where_a_file_system_has_no_locks_all_may_make_the_same_entry_at_once(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process once removed the files that the others were writing, and all but the last one were refused."""

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    source, found = find_source(str(texts_in(tmp_path, a="x"))), []

    def work(store: ArrayStore, report: Report, *, is_first: bool) -> dict[str, Any]:
        store.append("tokens", np.arange(500))
        assert len(list(cache.folder.glob("entries/*.part/tokens.bin"))) == (1 if is_first else 2)
        if is_first:  # another process comes, and is done before this one
            found.append(cache.entry(source, {}, partial(work, is_first=False)))
        store.append("tokens", np.arange(500, 1000))
        return {}

    found.append(cache.entry(source, {}, partial(work, is_first=True)))
    assert [entry.arrays["tokens"].tolist() for entry in found] == 2 * [list(range(1000))]
    assert [one.suffix for one in sorted((cache.folder / "entries").iterdir())] == ["", ".lock"]


def test_a_lock_that_fails_is_refused_with_what_to_set(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once was a traceback, or said of the data that they could not be read."""

    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", fail)
    monkeypatch.setattr("models.data.contents.REMEMBERED_FROM", 1)
    path = texts_in(tmp_path / "texts", a="one")
    assert f"COLONNADE_CACHE: tokens cannot be kept in {cache.folder}: Input/output error" in refusal(
        lambda: corpus_of(path, cache)
    )


def test_a_folder_whose_names_cannot_be_synced_is_no_error(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems answer so."""
    sync = os.fsync

    def sync_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files)
    assert corpus_of(texts_in(tmp_path / "texts", a="one"), cache).tokens.tolist() == byte_ids("one")


def test_a_cache_that_can_only_be_read_is_used(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = texts_in(tmp_path / "texts", a="one")
    corpus_of(path, cache)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    assert corpus_of(path, cache).tokens.tolist() == byte_ids("one")


def test_ids_are_checked_once_and_against_the_vocabulary_of_each_run(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", np.arange(200))
    config = DataConfig(path=str(tmp_path / "a.npy"), sequence_length=2)
    first = load_tokens(config, 200, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr("models.data.rows.survey", None)
        second = load_tokens(config, 200, pad=7, cache=cache)
    assert first.digest == second.digest
    assert "1 of its tokens are 7, model.pad_token_id" in second.messages[0]
    assert "token 150 at position 150, outside the vocabulary of 150" in refusal(
        lambda: load_tokens(config, 150, cache=cache)
    )


def test_a_large_file_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was replaced by one of the same size, time and inode was once taken for the one before."""
    monkeypatch.setattr("models.data.contents.REMEMBERED_FROM", 1)
    reads: list[float] = []
    file = tmp_path / "a.txt"
    file.write_text("one")

    def digest() -> str:
        return digest_of_file(file, "data.path", tmp_path / "cache", reads.append)

    young = [digest(), digest()]
    assert len(reads) == 2  # it could still change within the same tick of the file system's clock
    monkeypatch.setattr("models.data.contents.SECONDS_OF_A_TICK", -1.0)
    assert [digest(), digest()] == young
    assert len(reads) == 3
    status = file.stat()
    while file.stat().st_ctime_ns == status.st_ctime_ns:
        file.write_text("two")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert digest() != young[0]


def test_the_row_of_documents_has_their_starts_and_what_is_learned() -> None:
    store = MemoryStore()
    writer = RowWriter(store, 100, lambda: 9)
    learned = [np.array(flags, bool) for flags in ([0, 1], [1], [0, 0, 1], [1, 1])]
    parts = [([1, 2], False), ([9], False), ([3, 4, 5], True), ([6, 7], False)]
    for (ids, continues), flags in zip(parts, learned, strict=True):
        writer.add(Document(np.array(ids), flags, continues))
    writer.finish()
    arrays = {name: array.tolist() for name, array in store.arrays().items()}
    assert arrays["tokens"] == [1, 2, 9, 3, 4, 5, 9, 6, 7]
    assert arrays["starts"] == [0, 2, 7, 9]
    assert arrays["is_learned"] == [False, True, True, False, False, True, True, True, True]
    assert arrays["counts"] == [0, 1, 1, 1, 1, 1, 1, 1, 0, 2]


@pytest.mark.parametrize("ids", [[1, 9, 2, 3, 9], [1, 9, 2], [9]])
def test_documents_of_token_ids_end_after_each_end_token(tmp_path: Path, ids: list[int]) -> None:
    from models.data.rows import mapped_row

    np.save(tmp_path / "a.npy", np.array(ids * 2))
    source = find_source(str(tmp_path / "a.npy"))
    row = mapped_row(source, None, bin_dtype="uint16", vocab_size=10, end=9).row
    pieces = [row.tokens[a:b].tolist() for a, b in zip(row.starts, row.starts[1:], strict=False)]
    assert [id for piece in pieces for id in piece] == ids * 2
    assert all(9 not in piece[:-1] and piece for piece in pieces)
    assert all(piece[-1] == 9 for piece in pieces[:-1])


def test_the_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_of({}, quiet=True).folder == tmp_path / ".cache" / "colonnade"
    assert cache_of({"COLONNADE_CACHE": "~/here"}, quiet=True).folder == tmp_path / "here"
    with pytest.raises(ConfigError, match=r"^COLONNADE_CACHE: [^.]*\. Set it to a folder for tokens\.$"):
        cache_of({"COLONNADE_CACHE": "~nobody-has-this-name/here"}, quiet=True)


def test_a_long_work_shows_lines_and_at_the_end_what_was_kept(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.tokenizing.SECONDS_WITHOUT_WORD", 0.0)
    monkeypatch.setattr("training.tokenizing.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("models.data.cache.SECONDS_BETWEEN_REPORTS", 0.0)
    path = texts_in(tmp_path / "texts", a="one", b="two")
    for quiet in (True, False):
        corpus_of(path, cache_of({"COLONNADE_CACHE": str(cache.folder / str(quiet))}, quiet=quiet))
    said = capsys.readouterr().out
    assert f"data.path: 3 tokens, 100% of {path}" in said
    assert "data.path: 7 tokens encoded in 0 s, kept in " in said
    assert said.count("kept in") == 1


@pytest.mark.parametrize("ends", ["refused", "found"])
def test_a_bar_is_gone_when_the_work_has_ended_however_it_did(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """The terminal once had no cursor after a refusal, and the bar stood below the message."""
    monkeypatch.setattr("training.tokenizing.SECONDS_WITHOUT_WORD", 0.0)
    monkeypatch.setattr("models.data.cache.SECONDS_BETWEEN_REPORTS", 0.0)
    path = lines_in(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" if ends == "found" else None}])
    if ends == "found":
        corpus_of(path, cache)  # the next one reads the file, and has nothing to encode
    terminal = io.StringIO()
    screen = TokenizingScreen(Console(file=terminal, force_terminal=True, width=80))
    with nullcontext() if ends == "found" else pytest.raises(DataError, match="is null"):
        corpus_of(path, Cache(cache.folder, screen))
    shown = terminal.getvalue()
    assert "data.path: reading" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


def train_on_slow_texts(text: Path, rank: int, folder: Path) -> None:
    """Train two steps on a text whose tokenizer takes three times `train.timeout_seconds`."""
    from launch import main, read_arguments

    os.environ["COLONNADE_CACHE"] = str(text.parent / "cache")
    encode = ByteTokenizer.encode_documents

    def slow(self: ByteTokenizer, texts: list[str]) -> Any:
        (text.parent / f"encoded_{rank}").touch()
        time.sleep(3 * TIMEOUT)
        return encode(self, texts)

    ByteTokenizer.encode_documents = slow  # type: ignore[method-assign, assignment]
    small = ["model.num_hidden_layers=1", "train.steps=1", "output.export=False", "train.device=cpu"]
    own = [f"data.path={text}", f"output.dir={folder}/run", "data.sequence_length=16"]
    own += [f"train.timeout_seconds={TIMEOUT}"]
    sys.exit(main(read_arguments(["--set", *small, *own])))


@pytest.mark.slow
def test_ranks_that_wait_for_tokens_are_not_silent(tmp_path: Path) -> None:
    text = texts_in(tmp_path, a="x" * 999) / "a.txt"
    ends = play(partial(train_on_slow_texts, text), 2)
    assert [(end.code, end.errors) for end in ends] == [(0, ""), (0, "")]
    assert len(list(tmp_path.glob("encoded_*"))) == 1
