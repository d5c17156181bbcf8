"""The texts of a corpus, read from files as Python's text mode reads them, or refused by the file's name."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from models.weight_files import LFS_POINTER
from parallel.errors import DataError, closest, names_text

BUILT_IN = "python-docs"
BYTE_ORDER_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
NO_TEXTS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"%PDF-": "PDF",
    LFS_POINTER: "a pointer of Git LFS",
}


class Texts:
    """The texts that `data.path` names, in order: the built-in one, FILE.txt, or the *.txt of a folder by their names.

    Iterating reads one file at a time, and yields its name and its text. Raises DataError for a file that cannot be
    read as text.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._mentioned: dict[str, list[str]] = {}
        self.files = [] if source == BUILT_IN else self._find(Path(source))
        if source == BUILT_IN and Path(source).exists():
            self.mention(f"./{source} names the other", f"the built-in {source} is read, not what has its name here")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        if self.source == BUILT_IN:
            # This is 465 KB of English that comes with every CPython.
            from pydoc_data.topics import topics

            yield self.source, "\n".join(topics[name] for name in sorted(topics))
        for file in self.files:
            yield file.name, self._read(file)

    def messages(self) -> list[str]:
        """Return a message for each thing that was read otherwise than as it stands, or left out."""
        return [f"data.path: {what}: {names_text(names)}" for what, names in self._mentioned.items()]

    def mention(self, name: str, what: str) -> None:
        """Add a file to those of which a message says this."""
        self._mentioned.setdefault(what, []).append(name)

    def _find(self, path: Path) -> list[Path]:
        if path.is_symlink() and not path.exists():
            raise DataError(f"data.path: {path} is a link to {path.readlink()}, which does not exist.")
        if path.is_dir():
            return self._in_folder(path)
        if not path.exists():
            match = closest(path.name.strip(), _names(path.parent))
            hint = f" Did you mean {str(path.with_name(match))!r}?" if match else ""
            raise DataError(
                f"data.path: {path} does not exist.{hint} Name a FILE.txt, a folder of *.txt, a FILE.npy, or"
                f" {BUILT_IN!r}."
            )
        if path.suffix != ".txt":
            raise DataError(f"data.path: {path} is neither a .txt nor a .npy. Rename it, or convert it to one of them.")
        if not path.is_file():
            raise DataError(f"data.path: {path} is not a regular file. Name one.")
        return [path]

    def _in_folder(self, folder: Path) -> list[Path]:
        """Return the *.txt of a folder in the order of their names; what else is there is named in a message."""
        files = []
        for name in _names(folder):
            file = folder / name
            if file.suffix != ".txt" or not (file.is_file() or file.is_symlink()) or file.is_dir():
                if not name.startswith("."):
                    self.mention(name, "not read, since only files *.txt of the folder itself are")
            elif not file.exists():
                raise DataError(f"data.path: {file} is a link to {file.readlink()}, which does not exist.")
            else:
                files.append(file)
        if not files:
            raise DataError(f"data.path: the folder {folder} has no *.txt in it. Name a folder of texts, or a file.")
        return files

    def _read(self, file: Path) -> str:
        """Return a file's text without its byte-order mark, and with line ends of \\n."""
        text, encoding = _decode(file)
        if encoding != "UTF-8":
            self.mention(file.name, f"read as {encoding}, as its byte-order mark says")
        if "\r" in text:
            self.mention(file.name, r"line ends \r\n and \r are read as \n")
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return text


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"data.path: cannot read {folder}: {error.strerror}.") from error


def _decode(file: Path) -> tuple[str, str]:
    """Return the text of a file, and its encoding: that of its byte-order mark, else UTF-8."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"data.path: cannot read {file}: {error.strerror}.") from error
    if kind := next((kind for start, kind in NO_TEXTS.items() if content.startswith(start)), None):
        raise DataError(f"data.path: {file} is no text: it begins as {kind} does. Unpack or convert it first.")
    mark, encoding = next(((m, e) for m, e in BYTE_ORDER_MARKS if content.startswith(m)), (b"", "UTF-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        raise DataError(
            f"data.path: {file} is not {encoding}: byte 0x{content[at]:02x} at position {at}. "
            f"Convert it, as in: iconv -f LATIN1 -t UTF-8."
        ) from error
    if "\0" in text:
        raise DataError(
            f"data.path: {file} is no text: it has a zero byte, near position {text.index(chr(0))}. If it is UTF-16"
            " without a byte-order mark, convert it, as in: iconv -f UTF-16LE -t UTF-8."
        )
    return text, encoding
