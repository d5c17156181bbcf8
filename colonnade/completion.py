"""The completion of the command line by a shell, as shtab writes it."""

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "tcsh")
FOLDERS, FILES = ("DIR", "CHECKPOINT", "EXPORT", "RUN"), ("FILE",)
"""Words in the metavar of an argument whose value is a folder, or a file."""


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes this parser's command line, paths among it, in one of SHELLS."""
    import shtab

    for action in _actions(parser):
        words = str(action.metavar).replace("|", " ").replace("_", " ").split()
        if any(word in words for word in FILES):
            vars(action)["complete"] = shtab.FILE
        elif any(word in words for word in FOLDERS):
            vars(action)["complete"] = shtab.DIRECTORY
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield every argument of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
