"""The file ended.json of a run: how it ended, for whoever comes later."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.storage.replaced_file import replacing
from parallel.watch.beat import Beat
from parallel.watch.process import host_name
from parallel.watch.progress import Progress

FILE = "ended.json"


@dataclass(frozen=True)
class Ended:
    """The end of a run: its exit code, the line that was printed, and where the rank that caused it was then.

    `step` is the number of steps that were taken, and `phase` what the rank did: "saving", "an evaluation".
    """

    code: int
    reason: str
    step: int
    rank: int
    host: str
    phase: str

    @classmethod
    def of_rank(cls, code: int, reason: str, rank: int, progress: Progress, phase: str = "") -> "Ended":
        """Return the end of a run that this rank caused, or all together, in this `phase` or in its own."""
        return cls(int(code), reason, progress.step, rank, host_name(), phase or progress.phase or progress.action)

    @classmethod
    def of_lost(cls, code: int, reason: str, beat: Beat) -> "Ended":
        """Return the end of a run that a lost rank caused, as its last beat tells of it."""
        return cls(int(code), reason, beat.step, beat.rank, beat.host, beat.phase or beat.action)


class EndRecord:
    """Writes ended.json into the run's folder, once the folder is this run's: `begin` says so.

    `log` is the log of this rank that has the traceback of an exception, where one has ended the run.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.log: Path | None = None

    def begin(self, folder: Path, *, removes: bool) -> None:
        """Take in the run's folder; `removes`: remove what an earlier run, or an earlier attempt, has left there."""
        self.folder = folder
        if removes:
            with suppress(OSError):
                (folder / FILE).unlink(missing_ok=True)

    @contextmanager
    def logging(self, log: Path) -> Iterator[None]:
        """Take in that this rank's log is open while the block runs. An exception that ends it is in the log then."""
        self.log = log
        yield
        self.log = None

    def step(self) -> int:
        """Return the step that the file has, where a rank of this run has written it; 0 without one."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            return int(json.loads((self.folder or Path()).joinpath(FILE).read_bytes())["step"])
        return 0

    def write(self, ended: Ended) -> None:
        """Write the file, in one piece or not at all. A disk that fails must not hide the end of the run."""
        if self.folder is None:
            return
        with suppress(OSError), replacing(self.folder / FILE, ended.rank) as temporary:
            temporary.write_text(json.dumps(asdict(ended), indent=2) + "\n")
