"""Docstrings begin with a sentence, and the script that lists those which do not finds one."""

import subprocess
from pathlib import Path

import pytest

from tests.prose import fragments, main

ROOT = Path(__file__).parent.parent

FILE = '''"""Of parts."""

LIMIT = 3
"""Than which there are no more."""


class Sentence:
    """A complete sentence."""

    def method(self) -> None:
        """
        What it returns.
        """

    def without(self) -> None:
        return None


def function() -> None:
    """Fortunately a word that only starts as one of the list does."""
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one file, which git does not even track yet."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "part.py").write_text(FILE, encoding="utf-8")
    return tmp_path


def test_no_docstring_of_the_tree_begins_with_a_fragment() -> None:
    assert fragments(ROOT) == []


def test_a_docstring_that_begins_with_a_fragment_is_found(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        "parallel/part.py:1: Of parts.",
        "parallel/part.py:4: Than which there are no more.",
        "parallel/part.py:11: What it returns.",
    ]
    assert fragments(checkout) == found
    assert main(["--root", str(checkout), "parallel"]) == 1
    assert capsys.readouterr().out.splitlines() == [*found, "3 docstrings begin with a fragment"]


def test_a_tree_without_fragments_ends_well(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "parallel" / "part.py").write_text('"""A part of the model."""\n', encoding="utf-8")
    assert main(["--root", str(checkout), "parallel"]) == 0
    assert capsys.readouterr().out.splitlines() == ["0 docstrings begin with a fragment"]
