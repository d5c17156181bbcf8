"""The metrics of a step: what it did and what it cost. metrics.jsonl has a line of JSON for each."""

import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch

from models.costs import flops_per_token
from models.shapes import shape_of
from parallel.config import Config
from parallel.engine.results import StepResult
from parallel.errors import ConfigError
from parallel.regular_file import open_regular, parse_json, with_key

MetricsLine: TypeAlias = dict[str, Any]

PEAK_TFLOPS = {
    r"A10G?": 125.0,
    r"A100|A800": 312.0,
    r"L4": 121.0,
    r"L40S": 362.0,
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.0,
    r"H100|H800|H200|GH200": 989.0,
    r"B200": 2250.0,
    r"RTX 3090": 71.0,
    r"RTX 4090": 165.0,
}
"""Dense bf16 TFLOP/s with fp32 accumulation, from NVIDIA's data sheets. The first name that matches counts."""


@dataclass(frozen=True)
class Meter:
    """Computes the metrics of a step from its result and its seconds.

    `step` counts from 1. `loss` is the loss before the update, the mean over the labels of the step; `grad_norm` is
    the norm of the gradient before clipping, and `lr` the learning rate of the update. `skipped` is true where nothing
    was updated, since an fp16 gradient overflowed or a number was not finite; then `grad_norm` is null.
    `nonfinite_steps` counts the steps so far with a number that was not finite, without fp16's overflows. `tokens` are
    all tokens of the run so far, padding included, and `tokens_per_second` those of this step, on all devices, divided
    by `step_seconds`. `epoch` is the number of passes over the `num_training` samples, with a fraction; null where
    these are not known.

    `tflops` is what each device achieved: the model's TFLOP/s (`flops_per_token`, without recomputation) divided by the
    number of devices. `mfu` is `tflops` divided by the device's bf16 peak, whatever the precision, and null where the
    peak is not known. `phases` are the parts of `step_seconds` as this process spent them. `peak_device_bytes` and
    `peak_host_bytes` are of this process too, since it started; with tensor_placement_policy="auto" those of the device
    are since the last placement plan was made. After a validation the line also has `validation_loss`, and where loss
    or norm is far from those before it `outliers`, their names, both of which the run adds.
    """

    config: Config
    world_size: int
    device: torch.device
    num_training: int = 0

    @cached_property
    def _flops_per_token(self) -> float:
        return flops_per_token(shape_of(self.config), self.config.data.sequence_length)

    @cached_property
    def _peak_tflops(self) -> float | None:
        return peak_tflops(self.device)

    def line(self, step: int, result: StepResult, seconds: float, *, samples: int) -> MetricsLine:
        """Return the line of a step, counted from 1, with which the run has taken so many samples."""
        train, sequence = self.config.train, self.config.data.sequence_length
        tokens = train.global_batch_size * sequence
        tflops = tokens * self._flops_per_token / seconds / self.world_size / 1e12
        peak = self._peak_tflops
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": samples * sequence,
            "epoch": samples / self.num_training if self.num_training else None,
            "step_seconds": seconds,
            "phases": dict(result.phases),
            "tokens_per_second": tokens / seconds,
            "tflops": tflops,
            "mfu": None if peak is None else tflops / peak,
            "peak_device_bytes": peak_device_bytes(self.device),
            "peak_host_bytes": peak_host_bytes(),
            "skipped": result.skipped,
            "nonfinite_steps": result.nonfinite_steps,
        }


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense bf16 TFLOP/s in the device's data sheet; None for a CPU and for a GPU not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(rf"\b({pattern})\b", name)), None)


def peak_device_bytes(device: torch.device) -> int:
    """Return the most memory that torch has had allocated on the device; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_host_bytes() -> int:
    """Return the most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def read(path: Path) -> Iterator[MetricsLine]:
    """Yield the lines of a metrics.jsonl, if there is one. A last line that a crash cut short is left out.

    Raises ConfigError for a line that no run has written.
    """
    if not os.path.lexists(path):
        return
    error = with_key(ConfigError, "output.dir")
    with open_regular(path, error) as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                found = parse_json(line, f"{path} line {number}", error)
                if not isinstance(found, dict) or type(found.get("step")) is not int:
                    raise error(f"{path} line {number} is not of a step. Move the file away to go on without it.")
                yield found
