"""Parallel training, written by hand on torch: process groups, tensor-parallel layers, a pipeline, ZeRO, and engines
that compose them.
"""

from parallel import collectives
from parallel.engine.context import Context, Place, current, launch_from_torch, leave
from parallel.engine.engine import Engine
from parallel.engine.initialize import initialize, sharded_init
from parallel.engine.module_engine import ModuleEngine
from parallel.engine.results import StepResult, UpdateResult
from parallel.engine.stop_signals import catch_signals
from parallel.errors import (
    CheckpointError,
    ColonnadeError,
    ConfigError,
    DataError,
    LostRankError,
    ModelError,
    NoRoomError,
    StorageError,
)

__all__ = [
    "CheckpointError",
    "ColonnadeError",
    "ConfigError",
    "Context",
    "DataError",
    "Engine",
    "LostRankError",
    "ModelError",
    "ModuleEngine",
    "NoRoomError",
    "Place",
    "StepResult",
    "StorageError",
    "UpdateResult",
    "catch_signals",
    "collectives",
    "current",
    "initialize",
    "launch_from_torch",
    "leave",
    "sharded_init",
]
