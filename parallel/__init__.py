"""Parallel training, hand-written on torch: process groups, tensor-parallel layers, a pipeline, and the engine that
composes them.
"""

from parallel.context import Context, current, launch_from_torch
from parallel.engine import Engine, StepResult
from parallel.errors import CheckpointError, ConfigError, DataError
from parallel.short_forms import sharded_init

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "Engine",
    "StepResult",
    "current",
    "launch_from_torch",
    "sharded_init",
]
