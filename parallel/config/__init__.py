"""The config: a file or a dict, read once, checked as a whole, and frozen dataclasses from then on."""

from parallel.config.model import ModelConfig
from parallel.config.parallel import ContextConfig, ParallelConfig, PipelineConfig, TensorConfig
from parallel.config.parsing import Resolver, apply_overrides, load_raw, normalize, parse
from parallel.config.sections import (
    Config,
    DataConfig,
    EarlyStoppingConfig,
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
    "EarlyStoppingConfig",
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
