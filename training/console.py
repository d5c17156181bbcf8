"""The console that rank 0 prints on."""

import sys

from rich.console import Console
from rich.text import Text

PLAIN_WIDTH = 110  # columns, where there is no terminal to ask


def make_console(*, quiet: bool) -> Console:
    """Return a console on stdout; a `quiet` one, that of every rank but the first, prints nothing."""
    return Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def print_line(console: Console, text: str) -> None:
    """Print the text as it is, without markup or line breaks; above the progress bar if there is one."""
    console.print(Text(text), soft_wrap=True)
