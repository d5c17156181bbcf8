"""The cache of tokens of a run: where it is, and what the user sees of work on it."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from models.data.cache import Cache, CacheEntry, CacheObserver
from models.data.sources import Source
from parallel.errors import ConfigError
from training.console import make_console, print_line
from training.text import readable_bytes

VARIABLE, DEFAULT = "COLONNADE_CACHE", "~/.cache/colonnade"
SECONDS_WITHOUT_WORD = 1.0  # shorter work shows no progress
SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


def cache_of(environment: Mapping[str, str], *, quiet: bool, check: Callable[[], object] = lambda: None) -> Cache:
    """Return the cache in the folder that the environment names; a `quiet` one shows nothing.

    `check` is called again and again while there is work on it.
    """
    try:
        folder = Path(environment.get(VARIABLE) or DEFAULT).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{VARIABLE}: {str(error).rstrip('.')}. Set it to a folder for tokens.") from error
    return Cache(folder, TokenizingScreen(make_console(quiet=quiet), check))


class TokenizingScreen(CacheObserver):
    """Shows how far a source is encoded: as a bar on a terminal, else by a line from time to time."""

    def __init__(self, console: Console, check: Callable[[], object] = lambda: None) -> None:
        self._console, self._check = console, check
        self._began: float | None = None
        self._last_line = 0.0
        self._bar: Progress | None = None

    def advance(self, source: Source, fraction: float, num_tokens: int) -> None:
        self._check()
        now = time.monotonic()
        if self._began is None:
            self._began = self._last_line = now
        if now - self._began < SECONDS_WITHOUT_WORD or self._console.quiet:
            return
        doing = f"{num_tokens:,} tokens" if num_tokens else "reading"
        if self._console.is_terminal:
            self._show(f"{source.key}: {doing}", fraction)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print_line(self._console, f"{source.key}: {doing}, {fraction:.0%} of {source.path}")

    def finish(self, source: Source, entry: CacheEntry, folder: Path) -> None:
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        self.stop()
        if (tokens := entry.arrays.get("tokens")) is not None:
            size = readable_bytes(sum(array.nbytes for array in entry.arrays.values()))
            took = f" in {seconds:.0f} s" if seconds >= SECONDS_WITHOUT_WORD else ""
            print_line(self._console, f"{source.key}: {len(tokens):,} tokens encoded{took}, kept in {folder} ({size})")

    def damaged(self, source: Source, folder: Path) -> None:
        self.stop()
        print_line(self._console, f"{source.key}: {folder} is damaged, and is made again")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()  # it shows the cursor again
        self._bar = self._began = None

    def _show(self, text: str, fraction: float) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.add_task(text, total=1.0)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=text, completed=fraction)
