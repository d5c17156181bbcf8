"""A terminal on which a process may have left a progress bar: its cursor is hidden, in a line that has no end."""

import os
import sys
from contextlib import suppress

SHOW_CURSOR = "\x1b[?25h"
CLEAR_LINE = "\r\x1b[2K"


def print_line(text: str) -> None:
    """Write a line to standard error at once; on a terminal in place of a progress bar, and show the cursor.

    Where nobody can read it any more, what follows it is done all the same.
    """
    start = SHOW_CURSOR + CLEAR_LINE if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{start}{text}\n".encode(errors="backslashreplace"))


def show_cursor() -> None:
    """Show the cursor, where standard output is a terminal, before a process ends that may have a progress bar."""
    with suppress(OSError, ValueError, AttributeError):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), SHOW_CURSOR.encode())
