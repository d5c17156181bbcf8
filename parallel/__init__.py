"""Parallel training, hand-written on torch: process groups, tensor-parallel layers, a pipeline, and the engine that
composes them.
"""

from parallel.context import Context, current, launch_from_torch
from parallel.engine import Engine
from parallel.engine_base import StepResult
from parallel.errors import CheckpointError, ColonnadeError, ConfigError, DataError, ModelError, StorageError
from parallel.initialize import initialize, sharded_init
from parallel.mesh import leave
from parallel.module_engine import ModuleEngine, UpdateResult

__all__ = [
    "CheckpointError",
    "ColonnadeError",
    "ConfigError",
    "Context",
    "DataError",
    "Engine",
    "ModelError",
    "ModuleEngine",
    "StepResult",
    "StorageError",
    "UpdateResult",
    "current",
    "initialize",
    "launch_from_torch",
    "leave",
    "sharded_init",
]
