"""Paths as a user writes them: `~` and `$NAME` are what a shell would make of them."""

import os
import re


class PathError(ValueError):
    """The error of a path that names a user or a variable which does not exist."""


def expanded(text: str) -> str:
    """Return the path with `~`, `~USER`, `$NAME` and `${NAME}` replaced. Raises PathError where one has no value.

    A file whose name has such a character itself is named as it is.
    """
    found = os.path.expandvars(os.path.expanduser(text))
    if os.path.lexists(found):
        return found
    if text.startswith("~") and found.startswith("~"):
        raise PathError(f"{text!r} begins with the home of a user who does not exist")
    if name := re.search(r"\$(\w+|\{\w+\})", found):
        raise PathError(f"{text!r} has the variable {name[0]}, which is not set")
    return found
