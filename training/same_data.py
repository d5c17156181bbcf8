"""The data of a resumed run: it goes on at the sample where it stopped, or is refused."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.data import Corpus, Samples
from parallel.config import Config
from parallel.errors import CheckpointError

DOCUMENTS = "data.document_mask"
DECIDES_THE_ORDER = ("train.seed", "data.sequence_length", "data.shuffle", "data.validation_fraction", DOCUMENTS)
"""The keys that a resumed run may not change: with another value samples would be repeated and others left out, and
validation losses could not be compared."""

BATCH, STEPS = "train.global_batch_size", "train.steps"
FRACTION, VALIDATION = "data.validation_fraction", "data.validation_path"


def corpus_record(corpus: Corpus) -> dict[str, Any]:
    """Return what a checkpoint says about a corpus, wherever its file lies."""
    record: dict[str, Any] = _record_of(corpus.training)
    return {**record, "validation": _record_of(corpus.validation)} if corpus.validates_other_data else record


def _record_of(samples: Samples) -> dict[str, int]:
    return {"tokens": samples.num_tokens, "digest": samples.digest}


LENGTH = STEPS, "train.epochs"


def samples_taken(metadata: Mapping[str, Any]) -> int:
    """Return the number of samples that a run had taken when it saved this checkpoint."""
    counters = metadata["counters"]
    if "samples" in counters:
        return int(counters["samples"])
    return int(counters["step"]) * int(dict(_flat(metadata["config"]))[BATCH])  # of an older version


def check_same_data(folder: Path, metadata: Mapping[str, Any], config: Config, corpus: Corpus) -> None:
    """Raise CheckpointError if a run with this config and corpus could not go on at the sample where it stopped.

    All that differs is named, with the value that would work.
    """
    saved, ours = {DOCUMENTS: False, **dict(_flat(metadata["config"]))}, dict(_flat(config.to_dict()))
    problems = [
        f"{key} is {ours[key]}, and the checkpoint was saved with {saved[key]}; set {key}={saved[key]}"
        for key in DECIDES_THE_ORDER
        if key in saved and saved[key] != ours[key] and not (key == FRACTION and ours[VALIDATION] is not None)
    ]
    if (record := metadata.get("corpus")) is not None and saved[DOCUMENTS] == ours[DOCUMENTS]:
        problems += _other_data(record, config, corpus)
    if problems:
        raise CheckpointError(
            f"--resume: {folder} cannot go on at its place in the data: {'. '.join(problems)}. To train its weights on"
            f" other data, begin a new run: model.path={folder.parent.parent}/export."
        )


def _other_data(record: Mapping[str, Any], config: Config, corpus: Corpus) -> Iterator[str]:
    """Yield what is wrong with the corpus, where a checkpoint has the `record` of another one."""
    ours = corpus_record(corpus)
    if ("validation" in record) != ("validation" in ours):
        had, cure = "a share of data.path", f"set {VALIDATION}=None"
        if "validation" in record:
            had, cure = "data of their own", f"name these as {VALIDATION}"
        yield f"{VALIDATION} is {config.data.validation_path}, and the checkpoint's run was validated on {had}; {cure}"
    named = {"data.path": (config.data.path, record, ours)}
    if "validation" in record and "validation" in ours:
        named[VALIDATION] = (str(config.data.validation_path), record["validation"], ours["validation"])
    for key, (path, theirs, found) in named.items():
        if theirs["tokens"] != found["tokens"]:
            yield (
                f"{key}: {path} has {found['tokens']} tokens, and not {theirs['tokens']}; name the corpus of the"
                " checkpoint's run"
            )
        elif theirs["digest"] != found["digest"]:
            other = "other tokens, or other documents" if config.data.document_mask else "other tokens"
            yield f"{key}: {path} has {other}; name the corpus of the checkpoint's run"


def resume_messages(metadata: Mapping[str, Any], config: Config) -> list[str]:
    """Return messages about where a resumed run goes on, and about all keys that it has changed."""
    saved, ours = dict(_flat(metadata["config"])), dict(_flat(config.to_dict()))
    found, taken = [], samples_taken(metadata)
    if saved.get(BATCH, ours[BATCH]) != ours[BATCH]:
        found.append(f"{BATCH} is {ours[BATCH]}, and was {saved[BATCH]}: the run goes on at sample {taken}")
    if any(saved.get(key) != ours.get(key) for key in (BATCH, *LENGTH)):
        updates, steps = metadata["counters"]["updates"], config.train.steps
        found.append(f"the learning rate follows the updates: {updates} of the schedule's {steps} are done")
    if metadata.get("corpus") is None:
        found.append("the checkpoint does not say which corpus it was saved with: data.path must be the same")
    changed = [f"{key} is {ours[key]}, was {saved[key]}" for key in ours if key in saved and saved[key] != ours[key]]
    changed = [text for text in changed if not text.startswith(("output.", BATCH))]
    return [*found, *([f"changed since the checkpoint: {'; '.join(changed)}"] if changed else [])]


def _flat(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of a config with its value, as JSON has it."""
    for key, value in json.loads(json.dumps(sections)).items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
