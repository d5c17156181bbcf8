"""A file is replaced whole or not at all."""

from pathlib import Path

import pytest

from parallel.storage.replaced_file import replacing


def test_a_file_is_replaced_at_the_end_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text("old")
    with replacing(file, 7) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_whose_replacement_fails_is_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    """The temporary file of a cache lay there for ever where the disk was full."""
    file = tmp_path / "f.json"
    file.write_text("old")

    def write() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("another's")
    (tmp_path / ".f.json.incomplete").symlink_to(other)
    with replacing(tmp_path / "f.json") as temporary:
        temporary.write_text("new")
    assert (other.read_text(), (tmp_path / "f.json").read_text()) == ("another's", "new")
