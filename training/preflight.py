"""The checks before a run: everything that can be refused is refused before anything is started or touched."""

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.data import Cache, Corpus
from models.generation_config import GenerationConfig, read_generation_config
from models.tokenizer import Tokenizer
from parallel.checkpoint.newest import FoundCheckpoint
from parallel.config import Config
from parallel.engine.context import Place
from parallel.engine.device import check_precision, choose_device, device_type
from parallel.engine.facts import digest_of_code, facts_of
from parallel.errors import CheckpointError, ConfigError
from parallel.ops.kernels.table import what_triton_lacks
from parallel.regular_file import without_links
from parallel.storage import state_file
from training.callbacks import Callback
from training.config import override_messages
from training.disk_room import check_disk, disk_messages
from training.inputs import input_messages, read_corpus, tokenizer_of
from training.length import RunPosition, length_messages, with_steps
from training.loggers import callbacks_of
from training.metrics import read as read_metrics
from training.resume import check_start, find_another, find_start, start_messages
from training.run_folder import RunFolder
from training.schedule_messages import schedule_messages
from training.tracer import steps_to_trace


@dataclass(frozen=True)
class RunRequest:
    """The config that a user has given to start a run, with its epochs or steps, and the options of the command."""

    config: Config
    resume: str | None = None
    overridden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, as far as they are known before a device or a folder is looked at.

    `config` is the one that was given, with its number of steps. The contents of `found` are verified once the ranks
    are connected, since these share the files: `without_damaged` returns the inputs with another one.
    """

    request: RunRequest
    config: Config
    corpus: Corpus
    found: FoundCheckpoint | None  # the checkpoint that the run continues
    messages: tuple[str, ...]

    @classmethod
    def of(cls, request: RunRequest, corpus: Corpus, found: FoundCheckpoint | None) -> "Inputs":
        """Return the inputs of a run that goes on from `found`: all that follows from it. Raises CheckpointError."""
        if found is not None:
            check_start(found, request.config, corpus)
        taken = RunPosition.before(found)
        config = with_steps(request.config, corpus, taken)
        messages = (
            *override_messages(request.overridden),
            *start_messages(config, request.resume, found),
            *input_messages(config, corpus),
            *schedule_messages(config, corpus),
            *length_messages(config, corpus, taken),
        )
        return cls(request, config, corpus, found, messages)

    def without_damaged(self, damage: CheckpointError) -> "Inputs":
        """Return the inputs of a run that goes on from another checkpoint, since the contents of `found` are damaged.

        Raises CheckpointError where `--resume` named this one, or no other one is whole.
        """
        assert self.found is not None
        return Inputs.of(self.request, self.corpus, find_another(self.found, self.request.resume, damage))


def read_inputs(config: Config, *, resume: str | None, overridden: Sequence[str], cache: Cache | None = None) -> Inputs:
    """Return the inputs of a run, checked. Raises ConfigError, DataError or CheckpointError."""
    corpus = read_corpus(config, cache)
    return Inputs.of(RunRequest(config, resume, tuple(overridden)), corpus, find_start(config, resume))


@dataclass(frozen=True)
class Job:
    """A run that has passed every check."""

    inputs: Inputs
    place: Place
    tokenizer: Tokenizer | None  # None: the data are token ids, and no tokenizer is named
    generation: GenerationConfig | None  # that of model.path
    profile: range  # the steps that the user has asked to trace, counted from 1
    callbacks: tuple[type[Callback], ...]  # the loggers and the user's own
    is_again: bool = False  # an earlier attempt of the same launch has made the run's folder

    @property
    def config(self) -> Config:
        """The config, with its number of steps."""
        return self.inputs.config

    @property
    def corpus(self) -> Corpus:
        """The samples."""
        return self.inputs.corpus

    @property
    def resume_from(self) -> Path | None:
        """The folder of the checkpoint that the run continues."""
        return None if self.inputs.found is None else self.inputs.found.index.folder

    @property
    def folder(self) -> RunFolder:
        """The run's folder; that of an earlier attempt is not renamed."""
        found = folder_of(self.config, self.resume_from)
        return replace(found, resumed=True) if self.is_again else found

    @property
    def traced_steps(self) -> range:
        """The steps to trace: those asked for that the run will take."""
        return self._tracing()[0]

    @property
    def messages(self) -> tuple[str, ...]:
        """The messages that are printed when the run starts."""
        again = (f"started again: the run goes on in {self.folder.path}",) if self.is_again else ()
        taken = RunPosition.before(self.inputs.found).steps
        here = (*kernel_messages(self.config), *disk_messages(self.config, num_steps=taken))
        return (*again, *self.inputs.messages, *self._tracing()[1], *here)

    def _tracing(self) -> tuple[range, list[str]]:
        taken = RunPosition.before(self.inputs.found).steps
        return steps_to_trace(self.profile, taken=taken, steps=self.config.train.steps)


def prepare(
    config: Config,
    place: Place,
    *,
    resume: str | None = None,
    profile: range = range(0),
    overridden: Sequence[str] = (),
    cache: Cache | None = None,
) -> Job:
    """Check all that a run needs (data, weights, device, checkpoint, folder) and return the run as a Job.

    Nothing is written but into the `cache` of tokens. Raises ConfigError, DataError or CheckpointError.
    """
    callbacks = callbacks_of(config)
    inputs = read_inputs(config, resume=resume, overridden=overridden, cache=cache)
    check_device(config, place)
    generation = None if config.model.path is None else read_generation_config(config.model.path)
    job = Job(inputs, place, tokenizer_of(config), generation, profile, callbacks)
    check_disk(job.config, num_steps=RunPosition.before(inputs.found).steps)
    check_folder(job.config, job.resume_from)
    check_nvme_dir(job.config)
    steps_to_trace(profile, taken=RunPosition.before(inputs.found).steps, steps=job.config.train.steps)
    return job


def facts_of_job(job: Job, *, debug_comm: bool = False) -> dict[str, Any]:
    """Return what must be the same of a run on all ranks: config, code, versions, and what was found in the files."""
    training, found = Path(__file__).parent, job.inputs.found
    return {
        **facts_of(job.config, job.place.world_size),
        "code of models": digest_of_code(training.parent / "models"),
        "code of training": digest_of_code(training),
        "data.path, tokens": job.corpus.num_tokens,
        "data.path, digest": f"{job.corpus.digest:08x}",
        "--resume": None if found is None else f"{found.index.folder.name}, {found.index.digest[:16]}",
        "--profile": str(job.traced_steps),
        "--debug-comm": debug_comm,
    }


def check_device(config: Config, place: Place) -> None:
    """Raise ConfigError if this machine lacks the device that the run asks for, or what torch.compile needs there."""
    device, _ = choose_device(config.train.device, local_rank=place.local_rank, local_world_size=place.local_world_size)
    check_precision(config.train.precision, device)
    if config.train.compile:
        check_compiler(device)


def problems_here(config: Config, place: Place, found: FoundCheckpoint | None) -> list[str]:
    """Return messages of why this machine would refuse the run: its device, its packages, the run's folder or disk.

    These are for `--check`, which goes on, since it may be for another machine.
    """
    problems = []
    checks: tuple[Callable[[], object], ...] = (
        partial(check_device, config, place),
        partial(callbacks_of, config),
        partial(check_disk, config, num_steps=RunPosition.before(found).steps),
        partial(check_folder, config, None if found is None else found.index.folder),
        partial(check_nvme_dir, config),
    )
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.append(f"on this machine the run would be refused: {error}")
    return [*problems, *kernel_messages(config), *disk_messages(config, num_steps=RunPosition.before(found).steps)]


def folder_of(config: Config, resume_from: Path | None) -> RunFolder:
    """Return the run's folder."""
    run = Path(config.output.dir)
    return RunFolder(
        run, resumed=resume_from is not None and without_links(resume_from).is_relative_to(without_links(run))
    )


def check_folder(config: Config, resume_from: Path | None) -> None:
    """Raise ConfigError if the run cannot write in its folder, or reads what it would rename."""
    folder = folder_of(config, resume_from)
    folder.check_writable()
    if folder.resumed:
        deque(read_metrics(folder.metrics), maxlen=0)  # its lines are read again when the run starts
    check_not_renamed(config, folder)


def check_nvme_dir(config: Config) -> None:
    """Raise ConfigError if the run cannot write in `zero.nvme_dir`. Nothing is changed."""
    if config.zero.nvme_dir is not None:
        state_file.check_folder(config.zero.nvme_dir)


def modules_of_steps(config: Config) -> list[str]:
    """Return the modules that the first step would import otherwise, so that it is not timed with their import.

    torch's activation checkpointing imports torch's compiler at its first call.
    """
    is_needed = config.train.compile or config.train.activation_checkpointing != "none"
    return ["torch._dynamo"] if is_needed else []


def kernel_messages(config: Config) -> list[str]:
    """Return a message if a GPU is used, and this machine lacks what its kernels need: torch's own take their place."""
    missing = what_triton_lacks() if device_type(config.train.device) == "cuda" else ""
    if not missing or config.train.precision == "fp64":
        return []
    return [f"kernels of this library need {missing}, and there is none: steps are slower, with torch's own kernels"]


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch.compile lacks what it needs: Triton with a C compiler, on a CPU a C++ compiler."""
    if device.type == "cuda":
        missing = what_triton_lacks()
    else:
        missing = "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "a C++ compiler, such as g++"
    if missing:
        raise ConfigError(f"train.compile: True needs {missing}, and there is none. Try False.")


def check_not_renamed(config: Config, folder: RunFolder) -> None:
    """Raise ConfigError if a path that the run will read lies in a folder that is renamed when the run starts."""
    if folder.resumed or not folder.path.exists():
        return
    for key, path in (("model.path", config.model.path), ("zero.nvme_dir", config.zero.nvme_dir)):
        if path is not None and without_links(path).is_relative_to(without_links(folder.path)):
            raise ConfigError(
                f"{key}: {path} lies in output.dir {folder.path}, an earlier run that is renamed when this one begins."
                " Set another output.dir."
            )
