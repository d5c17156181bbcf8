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
from models.tokenizer import Tokenizer, is_of_bytes, load_tokenizer
from parallel.checkpoint import checkpoint
from parallel.config import Config, apply_overrides, load_raw, parse
from parallel.engine.context import Place, choose_device, device_type
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
    check_set_aside(config, folder)
    notes = [*override_notes(overridden), *notes, *unprofiled, *input_notes(config, corpus)]
    return Job(config, place, corpus, _tokenizer(config), folder, start, profiled, tuple(notes))


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile lacks what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cuda":
        missing = "" if find_spec("triton") else "Triton (pip install triton)"
    else:
        missing = "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "a C++ compiler, such as g++"
    if missing:
        raise ConfigError(f"train.compile: True needs {missing}, and there is none. Try False.")


def check_set_aside(config: Config, folder: RunFolder) -> None:
    """Raises ConfigError for what will be looked for later in a folder that has another name by then."""
    if folder.resumed or not folder.path.exists():
        return
    for key, path in (("model.path", config.model.path), ("zero.nvme_dir", config.zero.nvme_dir)):
        if path is not None and Path(path).resolve().is_relative_to(folder.path.resolve()):
            raise ConfigError(
                f"{key}: {path} lies in output.dir {folder.path}, an earlier run that is renamed when this one begins."
                " Set another output.dir."
            )


def input_notes(config: Config, corpus: Corpus) -> list[str]:
    """What a user may not have meant."""
    found, path = [], config.model.path
    if path is not None and config.data.tokenizer == "bytes" and not config.data.path.endswith(".npy"):
        file = Path(path) / "tokenizer.json"
        if hf.has_weights(path) and file.is_file() and not is_of_bytes(file):
            found.append(f"the data are bytes, and {path} has a tokenizer of its own: data.tokenizer={path} takes it")
    if config.output.eval_every and not corpus.num_validation:
        found.append("no validation: data.validation_fraction leaves no sample for output.eval_every")
    return found


def find_start(config: Config, resume: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is to be said of what a run begins with. Raises CheckpointError."""
    path = config.model.path
    drawn = path is None or not hf.has_weights(path)
    beginning = f"weights drawn from train.seed {config.train.seed}" if drawn else f"weights from {path}"
    if resume is None:
        return None, [beginning]
    start = checkpoint.find_checkpoint(resume, Path(config.output.dir))
    if start is None:
        return None, [f"nothing to resume in {config.output.dir}: starting from the beginning", beginning]
    try:
        checkpoint.check_files(start)
    except CheckpointError as error:
        if earlier := checkpoint.previous_checkpoint(start):
            raise CheckpointError(f"{error} Try --resume {earlier}.") from error
        raise
    check_same_model(start, shape_of(config))
    return start, [f"resuming from {start}"]


def device_notes(config: Config) -> list[str]:
    """What a plan that is made on this machine may get wrong."""
    pipeline = config.parallel.pipeline
    if config.train.device != "auto" or pipeline.size == 1 or pipeline.layers is not None:
        return []
    if device_type("auto") == "cuda":
        return []
    return ["stages are cut as for CPUs: train.device=cuda cuts them as for GPUs"]


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


MAY_CHANGE = {"dropout", "attention_dropout", "layerdrop", "init_std", "bos_token_id", "eos_token_id"}
"""Of a model's shape: with another value the same weights are the same function."""


def check_same_model(start: Path, shape: OPTShape) -> None:
    """Raise CheckpointError if the checkpoint is of another function than this model."""
    try:
        saved = OPTShape(**checkpoint.read_metadata(start)["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"--resume: {start} is not a checkpoint of this program: {error}.") from error
    ours, theirs = asdict(shape), asdict(saved)
    keys = [key for key in ours if key not in MAY_CHANGE and ours[key] != theirs[key]]
    if keys:
        differing = "; ".join(f"{key} {theirs[key]}, not {ours[key]}" for key in keys)
        raise CheckpointError(f"--resume: {start} is of another model: it has {differing}.")


def _tokenizer(config: Config) -> Tokenizer | None:
    """What the export carries, so that its reader can go from text to tokens and back."""
    is_default = config.data.tokenizer == "bytes"
    return None if is_default and config.data.path.endswith(".npy") else load_tokenizer(config.data.tokenizer)
