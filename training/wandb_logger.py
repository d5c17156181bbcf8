"""The logger of Weights & Biases."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from parallel.errors import first_line
from training.callbacks import Callback, Run
from training.metrics import MetricsLine
from training.scalars import scalars_of

if TYPE_CHECKING:
    import wandb

FOLDER, ID_FILE = "wandb", "run_id"
PROJECT = "colonnade"
SECONDS_TO_CONNECT, SECONDS_TO_UPLOAD = 30.0, 120.0


class WandbLogger(Callback):
    """Logs every number of metrics.jsonl, and the config, to Weights & Biases.

    Its files are in wandb/ of the run's folder, and so is the id of its run, which a resumed run goes on with. wandb's
    own variables choose the mode, the project and the account: WANDB_MODE=offline needs no network. Where its server
    cannot be reached, or knows no account, the run is logged offline, which is said; a run never ends because of wandb.
    """

    def __init__(self) -> None:
        self._run: wandb.Run | None = None
        self._log: Callable[[str], None] = print

    def on_start(self, run: Run) -> None:
        import wandb

        self._log = run.log
        try:
            self._start(run, None)
        except wandb.Error as error:
            run.log(f"wandb: {first_line(error)}. The run is logged offline, for `wandb sync` to upload.")
            wandb.teardown()  # what has failed still holds the id of the run
            self._guarded(lambda: self._start(run, "offline"))
        except OSError as error:
            run.log(f"wandb: {first_line(error)}. Nothing is logged there.")
        if self._run is not None:
            run.log(f"wandb: {Path(self._run.dir).parent if self._run.offline else self._run.url}")

    def on_step(self, line: MetricsLine) -> None:
        if self._run is not None:
            self._guarded(self._run.log, scalars_of(line), step=line["step"])

    def on_end(self, error: BaseException | None) -> None:
        if self._run is not None:
            self._guarded(self._run.finish, exit_code=0 if error is None else 1)

    def _start(self, run: Run, mode: Literal["offline"] | None) -> None:
        self._run = _begin(run, mode)

    def _guarded(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call a function of wandb's; where it fails, say so, and log no more."""
        try:
            call(*arguments, **options)
        except Exception as error:
            self._run = None
            self._log(f"wandb: {first_line(error)}. Nothing more is logged there.")


def _begin(run: Run, mode: Literal["offline"] | None) -> "wandb.Run":
    """Return wandb's run, new or resumed; None: in the mode that wandb's own settings choose. Raises wandb.Error.

    wandb prints nothing, asks nothing, and leaves standard output alone, where the progress bar is.
    """
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=SECONDS_TO_CONNECT, finish_timeout=SECONDS_TO_UPLOAD
    )
    project = wandb.setup(settings).settings.project or PROJECT
    return wandb.init(
        project=project,
        dir=run.folder,
        id=_run_id(run.folder / FOLDER / ID_FILE),
        name=run.folder.name,
        config=run.config.to_dict(),
        mode=mode,
        resume="allow",
        settings=settings,
    )


def _run_id(file: Path) -> str:
    """Return the id that a file has, or else a new one, which it has from now on."""
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{uuid.uuid4().hex[:8]}\n")
    return file.read_text().strip()
