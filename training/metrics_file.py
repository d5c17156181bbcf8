"""The file metrics.jsonl of a run, while it is written."""

import json
import math
import os
from pathlib import Path
from typing import IO

from training.callbacks import Callback, Run
from training.metrics import MetricsLine, read


class MetricsFile(Callback):
    """Writes metrics.jsonl. Lines of steps that a resumed run takes again are removed when it starts.

    Every line is valid JSON, so NaN and the infinities become null. When `on_step` returns, the operating system has
    the line, so it is not lost if the process is killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def on_start(self, run: Run) -> None:
        after = run.num_steps
        kept = [line for line in read(self.path) if int(line["step"] or 0) <= after] if after else []
        temporary = self.path.with_name(f".{self.path.name}.incomplete")
        temporary.write_text("".join(map(_encode, kept)))
        os.replace(temporary, self.path)
        self._file = self.path.open("a")

    def on_step(self, line: MetricsLine) -> None:
        assert self._file is not None, "on_start comes first"
        self._file.write(_encode(line))
        self._file.flush()

    def on_end(self, error: BaseException | None) -> None:
        if self._file is not None:
            self._file.close()


def _encode(line: MetricsLine) -> str:
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
