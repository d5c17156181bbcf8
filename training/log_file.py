"""The log of a rank: logs/rank_N.log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.callbacks import Callback
from training.metrics import MetricsLine

PACKAGES = ("parallel", "models", "training")


class StepLog(Callback):
    """Logs the metrics of each step and the checkpoints, on every rank."""

    on_every_rank = True

    def on_step(self, line: MetricsLine) -> None:
        logging.getLogger(__name__).info("%s", line)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        logging.getLogger(__name__).info("saved %s", folder)


@contextmanager
def log_file(file: Path, *, append: bool) -> Iterator[None]:
    """Write to `file` what this process logs until the `with` statement ends, and the traceback of what ended it.

    That is every message of this project's packages from INFO up, and the warnings of other packages.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, mode="a" if append else "w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        logging.getLogger(__name__).error("ended by %s", type(error).__name__, exc_info=error)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
