"""Runs that are killed and go on: layouts, launches, and the comparison of all that two runs leave.

`Layout.reference` is a run that nothing interrupts. A run that was killed at any moment and was then started again with
`--resume auto` must leave the same files, with the same bytes but for times and memory.
"""

import json
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 (imported once, by the server of which all ranks are forks)

import launch
from tests.killer import ROOT, Kill, kill_file, killed_file
from training import metrics

TIMES = (
    *("step_seconds", "phases", "tokens_per_second", "tflops", "mfu"),
    *("peak_host_bytes", "peak_device_bytes"),
)
"""The keys of metrics in which any two runs differ."""

OPT = (
    "model.hidden_size=32",
    "model.ffn_dim=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.max_position_embeddings=16",
    "model.dropout=0.1",
)
LLAMA = (
    "model.name=llama-tiny",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
)
BASE = (
    "data.sequence_length=16",
    "data.validation_fraction=0.001",
    "train.device=cpu",
    "train.steps=6",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.timeout_seconds=60",
    "lr_scheduler.warmup_steps=2",
    "output.checkpoint_every=2",
    f"output.callbacks=('{ROOT / 'tests' / 'killer.py'}:Killer',)",
)
FP8 = ("train.precision=fp8", "train.fp8_min_elements=0")
VALIDATED = ("output.eval_every=2", "output.keep_best=True", "train.early_stopping={'patience': 5}")


@dataclass(frozen=True)
class Layout:
    """The number of ranks of a run and its assignments, beside those that all runs have in common."""

    num_ranks: int
    own: tuple[str, ...] = ()
    model: tuple[str, ...] = OPT

    def assignments(self, folder: Path) -> list[str]:
        """Return all assignments of a run in this folder. `{disk}` in one is a folder beside it, which is made."""
        disk = folder.with_name(f"{folder.name}.disk")
        disk.mkdir(parents=True, exist_ok=True)
        own = [text.replace("{disk}", str(disk)) for text in self.own]
        return [*self.model, *BASE, *own, f"output.dir={folder}"]


def tensor(mode: str, size: int, **more: int) -> str:
    return f"parallel.tensor={dict(mode=mode, size=size, **more)}"


LAYOUTS: dict[str, Layout] = {
    "one rank, validated": Layout(1, VALIDATED),
    "ZeRO 1": Layout(2, ("zero.stage=1",)),
    "ZeRO 3, validated": Layout(2, ("zero.stage=3", *VALIDATED)),
    "offloaded": Layout(1, ("zero.tensor_placement_policy=cpu",)),
    "placed by a plan": Layout(
        2, ("zero.stage=3", "zero.tensor_placement_policy=auto", "zero.device_memory=200KiB", "train.steps=9")
    ),
    "on disk": Layout(
        1,
        (
            *("zero.tensor_placement_policy=cpu", "zero.nvme_dir={disk}", "zero.host_memory=1450KiB"),
            "model.num_hidden_layers=10",
        ),
    ),
    "fp16 with overflows": Layout(1, ("train.precision=fp16", "model.init_std=4.0")),
    "bf16 with bf16 moments": Layout(2, ("train.precision=bf16", "optimizer.state_dtype=bf16", "zero.stage=2")),
    "a ring": Layout(2, ("parallel.context=2",)),
    "a pipeline, validated": Layout(2, ("parallel.pipeline=2", *VALIDATED)),
    "1d": Layout(2, (tensor("1d", 2),)),
    "2d": Layout(2, (tensor("2d", 2, rows=1),)),
    "Llama in 1d": Layout(2, (tensor("1d", 2), "train.activation_checkpointing=full"), LLAMA),
}
LARGER: dict[str, Layout] = {
    "2.5d": Layout(4, (tensor("2.5d", 4, depth=1),)),
    "Llama in a pipeline of 1d": Layout(4, ("parallel.pipeline=2", tensor("1d", 2), *VALIDATED), LLAMA),
    "offloaded in a pipeline of ZeRO 3": Layout(
        4, ("parallel.pipeline=2", "zero.stage=3", "zero.tensor_placement_policy=cpu")
    ),
    "an interleaved pipeline": Layout(
        2, ("parallel.pipeline={'size': 2, 'schedule': 'interleaved'}", "model.num_hidden_layers=3", *VALIDATED)
    ),
    "fp8 in 1d": Layout(2, (tensor("1d", 2, sequence_parallel=True), *FP8, *VALIDATED)),
    "fp8 in a pipeline of ZeRO 3": Layout(4, ("parallel.pipeline=2", "zero.stage=3", *FP8), LLAMA),
    "a V of ZeRO 2": Layout(4, ("parallel.pipeline={'size': 2, 'schedule': 'zero_bubble_v'}", "zero.stage=2")),
}
"""Layouts of four ranks, and those that only slow tests kill."""


def start(layout: Layout, folder: Path, *arguments: str, more: tuple[str, ...] = ()) -> int:
    """Start the run in this folder on new processes, as `--nprocs` does, and return its exit code."""
    options = ["--nprocs", str(layout.num_ranks), *arguments, "--set", *layout.assignments(folder), *more]
    return launch.main(launch.read_arguments(options))


def start_killed(layout: Layout, folder: Path, kill: Kill, *arguments: str, more: tuple[str, ...] = ()) -> int:
    """Start or resume the run, have it killed so, and return its exit code. Fails if the moment never came."""
    kill.write(folder)
    code = start(layout, folder, "--resume", "auto", *arguments, more=more)
    kill_file(folder).unlink(missing_ok=True)
    assert killed_file(folder).exists(), f"the run ended with {code} before {kill}"
    return code


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the keys in which any two runs differ."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(folder / "metrics.jsonl")]


def files_of(folder: Path) -> dict[str, Path]:
    """Return every file and every empty folder below a folder, also hidden ones, by their relative names."""
    found = {}
    for name, folders, files in os.walk(folder):
        for one in files if files or folders else ["."]:
            path = Path(name) / one
            found[str(path.relative_to(folder))] = path
    return found


def differences(got: Path, want: Path) -> list[str]:
    """Return what two runs have left that is not the same: names of files, and bytes, but for times and memory."""
    ours, theirs = files_of(got), files_of(want)
    found = [f"{name}: only one run has it" for name in sorted(ours.keys() ^ theirs.keys())]
    for left, right in zip_longest(lines_of(got), lines_of(want)):
        if left != right:
            found.append(f"metrics.jsonl: {left} is not {right}")
    for name in sorted(ours.keys() & theirs.keys()):
        file, other = ours[name], theirs[name]
        if file.suffix == ".safetensors" or name.startswith("export/") or file.name in ("latest", "best"):
            is_same = file.read_bytes() == other.read_bytes()
        else:
            is_same = file.suffix != ".json" or _plain(file, got) == _plain(other, want)
        if not is_same:
            found.append(f"{name}: its content differs")
    return found


MAY_DIFFER = ("timeout_seconds", "host_share")
"""Keys of JSON files that may differ: a launch may have a shorter timeout, and the share of an update that the host
does with `tensor_placement_policy` follows from measured seconds."""


def _plain(file: Path, run: Path) -> Any:
    """Return a JSON file, with RUN in place of the run's folder, and without the keys that may differ."""
    text = file.read_text().replace(str(run), "RUN")
    return json.loads(text, object_hook=lambda x: {k: v for k, v in x.items() if k not in MAY_DIFFER})
