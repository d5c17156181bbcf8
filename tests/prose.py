"""List the docstrings that begin with a fragment instead of a sentence, and measure the library's structure.

    python -m tests.prose [FOLDER ...]                   default: the whole tree, and the measures
    python -m tests.prose --root CHECKOUT [--measures]   another checkout; --measures: without the docstrings

It prints each docstring that begins with a fragment and how many there are. The measures are the modules directly under
parallel/, the lengths of files, the largest classes, the folders, and the arrows between folders. The exit code is 1
where a docstring begins with a fragment.

The first line of a docstring says what the thing is ("The axes over which ...") or what it does ("Return ...").
A preposition, a conjunction or a relative pronoun at its beginning leaves out what is spoken of.
"""

import argparse
import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.layering import folder_measures

ROOT = Path(__file__).parent.parent
FRAGMENTS = re.compile(
    r"(of|than|those|whose|which|who|whom|as|at|with|without|to|and|or|but|what|where|how|whether|from|on|by|in|into|"
    r"for|about|around|between|beside|besides|behind|before|after|until|since|within|out|up|down|over|under|by|like|"
    r"also|so|then|that|because|though|although)\b",
    re.IGNORECASE,
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_files(root: Path, folders: Sequence[str] = ()) -> list[Path]:
    """Return the Python files that git tracks under these folders of `root`, or under all of it."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    return [root / name for name in names.split("\0") if name.endswith(".py") and (root / name).is_file()]


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring in a file, and of each string that documents an assignment."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, Documented):
            continue
        for before, statement in zip([node, *node.body], node.body, strict=False):
            is_documented = before is node or isinstance(before, ast.Assign | ast.AnnAssign)
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))) if is_documented:
                    yield statement.lineno, text.strip()


def fragments(root: Path, folders: Sequence[str] = ()) -> list[str]:
    """Return where a docstring begins with a fragment, and its first line, one string each."""
    return [
        f"{file.relative_to(root)}:{line}: {text.splitlines()[0]}"
        for file in python_files(root, folders)
        for line, text in docstrings(file)
        if FRAGMENTS.match(text) or not text
    ]


def attributes(node: ast.ClassDef) -> set[str]:
    """Return the names that the methods of a class assign on `self`."""
    return {
        target.attr
        for statement in ast.walk(node)
        for target in ast.walk(statement)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        and isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def measures(root: Path) -> Iterator[str]:
    """Yield a line for each measure of the library's files, classes and folders."""
    yield from sizes(root)
    yield from folder_measures(root)


def sizes(root: Path) -> Iterator[str]:
    """Yield a line for each measure of the library's files and classes."""
    files = python_files(root, ["parallel"])
    direct = [file for file in files if file.parent == root / "parallel" and file.name != "__init__.py"]
    yield f"modules directly under parallel/: {len(direct)}"
    lines = sorted((len(file.read_text(encoding="utf-8").splitlines()), file) for file in files)
    modules = [(count, file) for count, file in lines if file.name != "__init__.py"]
    longest, file = modules[-1]
    median = statistics.median(count for count, _ in modules)
    yield f"files: {len(modules)}, median {median:.0f} lines; the longest, {file.relative_to(root)}, {longest}"
    classes = [
        (node.end_lineno - node.lineno + 1, len(attributes(node)), node.name)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.end_lineno is not None
    ]
    for length, count, name in sorted(classes, reverse=True)[:3]:
        yield f"class {name}: {length} lines, {count} attributes"
    count, name = max((count, name) for _, count, name in classes)
    yield f"most attributes: {name}, {count}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the module's docstring says; return the exit code."""
    description = "List docstrings that begin with a fragment, and measure the library's structure."
    parser = argparse.ArgumentParser(prog="python -m tests.prose", description=description)
    parser.add_argument("folders", metavar="FOLDER", nargs="*")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    parser.add_argument("--measures", action="store_true", help="print only the measures")
    options = parser.parse_args(arguments)
    if options.measures:
        print(*measures(options.root), sep="\n")
        return 0
    found = fragments(options.root, options.folders)
    for text in (*found, f"{len(found)} docstrings begin with a fragment"):
        print(text)
    if not options.folders:
        print(*measures(options.root), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
