"""The folder of a run: the path of everything that it leaves, and how the folder is checked and made."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from parallel.config import Config
from parallel.errors import ConfigError
from parallel.regular_file import check_regular, with_key
from parallel.storage.folders import check_writable, standing_folder
from parallel.storage.no_room import naming
from parallel.storage.replaced_file import replacing
from training.run_lock import RunLock


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME and what is in it.

    A `resumed` run goes on writing in the folder. Any other run first renames a folder that is already there.
    """

    path: Path
    resumed: bool

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def trace(self, rank: int) -> Path:
        return self.profile / f"rank_{rank}.json"

    def action_times(self, rank: int) -> Path:
        return self.profile / f"actions_rank_{rank}.json"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank_{rank}.log"

    @property
    def lock(self) -> RunLock:
        return RunLock(self.path)

    def check_writable(self) -> None:
        """Raise ConfigError if the folder cannot be written or another run writes there. Nothing is changed."""
        standing_folder(self.path, _refusal)
        for file in self._written() if self.resumed else ():
            if os.path.lexists(file):
                check_regular(file, with_key(ConfigError, "output.dir"))
        if self.lock.is_held():
            raise ConfigError(
                f"output.dir: a run that has not ended writes in {self.path}. Stop it, or set another output.dir."
            )
        check_writable(self.path.absolute().parent, _refusal)  # a folder is renamed in the one around it
        if self.resumed:
            check_writable(self.path, _refusal)

    def _written(self) -> Iterator[Path]:
        """Yield the files of the folder that a resumed run writes to, or replaces."""
        yield from (self.path / "config.json", self.path / "ended.json", self.plot, self.metrics)
        yield from (self.path / "logs").glob("*")

    def make(self, config: Config) -> Path | None:
        """Make the folder with its config.json, and return the new name of an earlier run if there was one.

        Rank 0 alone calls this. Raises OSError, also if another run has begun to write here since `check_writable`.
        """
        if self.lock.is_held():
            raise self.lock.held_by_another()
        earlier = None if self.resumed or not self.path.exists() else self._rename_earlier()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_config(config)
        return earlier

    def _write_config(self, config: Config) -> None:
        """Write config.json, or leave the one of an earlier run as it was."""
        file = self.path / "config.json"
        with naming(file), replacing(file) as temporary:
            temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")

    def _rename_earlier(self) -> Path:
        """Rename the folder to the first of NAME.1, NAME.2, ... that is free, and return that name."""
        names = (self.path.with_name(f"{self.path.name}.{number}") for number in count(1))
        return self.path.rename(next(name for name in names if not name.exists()))


def _refusal(problem: str) -> ConfigError:
    return ConfigError(f"output.dir: {problem} Try another output.dir.")
