"""The config: a file or a dict, read once, checked whole, and from then on frozen dataclasses."""

from parallel.config.parallel import ContextConfig, ParallelConfig, PipelineConfig, TensorConfig
from parallel.config.parsing import Resolver, apply_overrides, load_raw, normalize, parse
from parallel.config.sections import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SchedulerConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "Config",
    "ContextConfig",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ParallelConfig",
    "PipelineConfig",
    "Resolver",
    "SchedulerConfig",
    "TensorConfig",
    "TrainConfig",
    "ZeroConfig",
    "apply_overrides",
    "load_raw",
    "normalize",
    "parse",
]
