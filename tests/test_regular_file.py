"""Files that a user names are opened only if they are regular files, and read only as far as they may be large."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from models.data.sources import find_source
from models.generation.trained_model import find_trained_model
from models.model_folder import read_config
from models.shapes import resolve
from parallel.config import parse
from parallel.config.parsing import load_raw
from parallel.errors import ColonnadeError, ConfigError, DataError
from parallel.regular_file import check_regular, open_regular, parse_json, read_bytes, read_json, without_links
from tests.test_hostile_files import make_socket
from training.preflight import folder_of

MEBIBYTE = 2**20


def refusal(action: Callable[[], object], size: int = 0) -> str:
    """Return the words of the refusal, for which no more than a megabyte above the file's size is allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            action()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEBIBYTE + size, peak
    text = str(caught.value)
    assert "\n" not in text
    return text


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "is a pipe, and not a regular file"),
    "a folder": (Path.mkdir, "is a folder, and not a regular file"),
    "a socket": (make_socket, "is a socket, and not a regular file"),
    "a link to a device": (lambda file: file.symlink_to("/dev/zero"), "is a device, and not a regular file"),
    "a link to itself": (lambda file: file.symlink_to(file.name), "Too many levels of symbolic links"),
    "a link to nothing": (lambda file: file.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
    "nothing": (lambda file: None, "does not exist"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_regular_file_is_refused_before_it_is_opened(name: str, tmp_path: Path) -> None:
    make, words = SPECIAL[name]
    make(file := tmp_path / "file")
    for action in (
        lambda: check_regular(file, DataError, links=True),
        lambda: read_bytes(file, DataError, at_most=1, links=True),
        lambda: read_json(file, DataError, links=True),
    ):
        text = refusal(action)
        assert words in text
        assert str(file) in text


def test_a_link_to_a_file_is_read_only_where_links_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (link := tmp_path / "link").symlink_to("file")
    assert read_bytes(link, DataError, at_most=7, links=True) == b"content"
    assert "is a link, to file, and not the file itself" in refusal(lambda: read_bytes(link, DataError, at_most=7))
    assert "is a link" in refusal(lambda: check_regular(link, DataError))


def test_a_file_that_is_too_large_or_grows_is_refused_without_being_read(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    os.truncate(file, 2**40)
    assert "has 1024.00 GiB, more than the 1.00 GiB that it may have" in refusal(lambda: read_json(file, DataError))
    assert "has changed while it was read" in refusal(  # its size is 0, and it has content
        lambda: read_bytes(Path("/proc/self/status"), DataError, at_most=2**20)
    )


def test_a_file_that_takes_the_name_of_another_one_is_not_opened_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "file").touch()
    real = os.open

    def replaced(path: Path, flags: int) -> int:
        file.unlink()
        os.mkfifo(file)
        return real(path, flags)

    monkeypatch.setattr(os, "open", replaced)
    assert "is a pipe" in refusal(lambda: open_regular(file, DataError).__enter__())


JSON: dict[str, tuple[bytes, str]] = {
    "100,000 lists in one another": (b"[" * 10**5 + b"]" * 10**5, "nested too deep"),
    "201 lists in one another": (b"[" * 201 + b"]" * 201, "nested too deep, in more than 200 levels"),
    "100,000 objects in one another": (b'{"a":' * 10**5, "nested too deep"),
    "a number of 100,000 digits": (b"1" * 10**5, "is damaged, or it is not JSON: Exceeds the limit"),
    "NaN": (b'{"a": NaN}', "it has NaN, which is no number of JSON"),
    "infinity": (b"-Infinity", "it has -Infinity, which is no number of JSON"),
    "a key that is there twice": (b'{"a": {"b": 1, "b": 2}}', "an object has the key 'b' twice"),
    "bytes that are no UTF-8": (b'"\xff"', "is damaged, or it is not JSON"),
    "nothing": (b"", "is damaged, or it is not JSON"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_not_plain_is_refused_by_the_name_of_its_file(name: str, tmp_path: Path) -> None:
    content, words = JSON[name]
    (file := tmp_path / "file.json").write_bytes(content)
    text = refusal(lambda: read_json(file, DataError), len(content))
    assert words in text
    assert str(file) in text


def test_json_is_read_as_python_reads_it(tmp_path: Path) -> None:
    nested = b"[" * 200 + b"]" * 200
    assert parse_json(nested, "it", DataError) != []
    assert parse_json(b'{"a": [1, 2.5, null, {"b": "\\u00e9"}]}', "it", DataError) == {"a": [1, 2.5, None, {"b": "é"}]}


def test_a_name_is_shown_on_one_line_and_one_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert r"a\nb does not exist" in refusal(lambda: check_regular(tmp_path / "a\nb", DataError))
    assert "no name that a file can have" in refusal(lambda: check_regular(tmp_path / "a\0b", DataError))
    assert "no name that a file can have" in refusal(lambda: check_regular(tmp_path / "a\ud800b", DataError))
    (odd := tmp_path / os.fsdecode(b"\xff")).mkdir()
    assert r"\udcff is a folder" in refusal(lambda: check_regular(odd, DataError))


UNREACHABLE: dict[str, Callable[[Path], object]] = {
    "a config": lambda folder: load_raw(folder / "config.py"),
    "data": lambda folder: find_source(str(folder / "text.txt")),
    "an export": lambda folder: find_trained_model(folder),
    "a model": lambda folder: read_config(folder, ["opt"]),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_what_cannot_be_reached_is_not_said_to_be_missing(case: str, tmp_path: Path) -> None:
    """A folder that may not be entered hides what is in it, but not from root. So here a link leads to itself."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ColonnadeError, match=r"Too many (levels of )?symbolic links"):
        UNREACHABLE[case](tmp_path / "loop" / "inner")


def test_a_path_by_links_in_a_circle_stays_as_it_is(tmp_path: Path) -> None:
    """`--to`, and `output.dir` of a run that is resumed, ended with a traceback there."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("folder")
    assert without_links(tmp_path / "loop" / "inner") == tmp_path / "loop" / "inner"
    assert without_links(tmp_path / "link" / "inner") == tmp_path / "folder" / "inner"
    config = parse(dict(output=dict(dir=str(tmp_path / "loop" / "run"))), world_size=1, resolve=resolve)
    with pytest.raises(ConfigError, match=r"output\.dir: .*Too many (levels of )?symbolic links"):
        folder_of(config, resume_from=tmp_path).check_writable()
