"""Everything that can be refused, refused before anything is started or touched."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from models import hf
from models.data import Corpus, load_tokens
from models.shapes import OPTShape, resolve, shape_of
from models.tokenizer import Tokenizer, load_tokenizer
from parallel import checkpoint
from parallel.config import Config, apply_overrides, load_raw, parse
from parallel.context import Place, choose_device
from parallel.errors import CheckpointError, ConfigError
from training.run_folder import RunFolder

DEFAULT_NAME = "default"


@dataclass(frozen=True)
class Job:
    """A run that nothing speaks against."""

    config: Config
    place: Place
    corpus: Corpus
    tokenizer: Tokenizer | None  # None: the data are token ids, and nobody said of which tokenizer
    folder: RunFolder
    start: Path | None  # the checkpoint to go on from
    profiled: range  # the steps to trace, counted from 1: those that the run will take
    notes: tuple[str, ...]  # what rank 0 says of it all


def read_config(file: str | None, assignments: Sequence[str], world_size: int | None) -> Config:
    """The resolved config of a file, or the built-in default, with overrides. Raises ConfigError."""
    raw = apply_overrides({} if file is None else load_raw(file), assignments)
    config = parse(raw, world_size=world_size, resolve=resolve)
    name = DEFAULT_NAME if file is None else Path(file).stem
    return replace(config, output=replace(config.output, dir=config.output.dir.replace("{name}", name)))


def read_inputs(config: Config) -> Corpus:
    """The corpus, with nothing wrong with it nor with the weights. Raises DataError."""
    shape, path = shape_of(config), config.model.path
    corpus = load_tokens(config.data, shape.vocab_size)
    if path is not None and hf.has_weights(path):
        hf.check(path, shape)
    return corpus


def inspect(
    config: Config,
    place: Place,
    *,
    resume: str | None = None,
    profiled: range = range(0),
    overridden: Sequence[str] = (),
) -> Job:
    """Look at all that the run will need: data, weights, device, checkpoint, folder. Raises a user's error."""
    corpus = read_inputs(config)
    device, _ = choose_device(config.train.device, place)
    if config.train.compile:
        check_compiler(device)
    start, notes = find_start(config, resume)
    profiled, unprofiled = find_profiled(profiled, start, config.train.steps)
    run = Path(config.output.dir)
    folder = RunFolder(run, resumed=start is not None and start.resolve().is_relative_to(run.resolve()))
    folder.check()
    notes = [*override_notes(overridden), *notes, *unprofiled]
    return Job(config, place, corpus, _tokenizer(config), folder, start, profiled, tuple(notes))


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile lacks what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cuda":
        missing = "" if find_spec("triton") else "Triton (pip install triton)"
    else:
        missing = "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "a C++ compiler, such as g++"
    if missing:
        raise ConfigError(f"train.compile: True needs {missing}, and there is none. Try False.")


def find_start(config: Config, resume: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is to be said of it. Raises CheckpointError."""
    if resume is None:
        return None, []
    start = checkpoint.find(resume, Path(config.output.dir))
    if start is None:
        return None, [f"nothing to resume in {config.output.dir}: starting from the beginning"]
    check_same_model(start, shape_of(config))
    return start, [f"resuming from {start}"]


def find_profiled(asked: range, start: Path | None, steps: int) -> tuple[range, list[str]]:
    """Of the steps asked for, those that a run of `steps` takes from `start` on, and what is to be said of them.

    Raises ConfigError if the run ends before the first of them.
    """
    if not asked:
        return asked, []
    text = f"{asked.start}:{asked.stop}"
    if asked.start > steps:
        raise ConfigError(
            f"--profile {text}: step {asked.start} is past the last, train.steps={steps}. Try {steps}:{steps + 1}."
        )
    taken = 0 if start is None else int(checkpoint.read_metadata(start)["step"])
    coming = range(max(asked.start, taken + 1), min(asked.stop, steps + 1))
    return coming, [] if coming else [f"--profile {text}: nothing to trace, {taken} of {steps} steps were taken before"]


def override_notes(overridden: Sequence[str]) -> list[str]:
    return [f"overridden: {assignment}" for assignment in overridden]


def metadata(config: Config, counters: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "step": counters["step"],
        "counters": dict(counters),
        "model": asdict(shape_of(config)),
        "config": config.to_dict(),
    }


def check_same_model(start: Path, shape: OPTShape) -> None:
    """Raise CheckpointError if the checkpoint's tensors are not those of this model."""
    try:
        saved = OPTShape(**checkpoint.read_metadata(start)["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"--resume: {start} is not a checkpoint of this program: {error}.") from error
    if hf.expected_tensors(saved) == hf.expected_tensors(shape):
        return
    ours, theirs = asdict(shape), asdict(saved)
    differing = [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]
    raise CheckpointError(f"--resume: {start} is of another model: it has {'; '.join(differing)}.")


def _tokenizer(config: Config) -> Tokenizer | None:
    """What the export carries, so that its reader can go from text to tokens and back."""
    is_default = config.data.tokenizer == "bytes"
    return None if is_default and config.data.path.endswith(".npy") else load_tokenizer(config.data.tokenizer)
