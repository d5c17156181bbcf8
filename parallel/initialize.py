"""The door of the library: a model and what trains it, in; an engine, out."""

from typing import Any

import torch
from torch import nn

from parallel.context import current
from parallel.engine import Engine
from parallel.errors import ModelError
from parallel.loaders import divide
from parallel.module_engine import Criterion, ModuleEngine
from parallel.pipeline.stage import Stage


class NoScheduler:
    """Stands where no learning-rate scheduler was passed: does nothing."""

    def step(self, *_: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    criterion: Criterion | None = None,
    train_dataloader: Any = None,
    eval_dataloader: Any = None,
    lr_scheduler: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """(engine, train_dataloader, eval_dataloader, lr_scheduler), for the context of the last `launch_from_torch`.

    The engine is an `Engine` for a stage of `models.build`, a `ModuleEngine` for any other module, which is changed in
    place: its parameters become views of the engine's buffers, on this rank's device, in the config's precision. Every
    replica starts with rank 0's values. A passed optimizer wins over the config's (its class, groups, hyperparameters),
    and so does its learning rate over the config's schedule. A DataLoader of global batches comes back as one of this
    replica's parts (`loaders.divide`). The scheduler is the one passed, or one that does nothing.

    Raises ConfigError or ModelError for what cannot be trained so.
    """
    context = current()
    engine: Engine | ModuleEngine
    if isinstance(model, Stage):
        if criterion is not None:
            raise ModelError("criterion: a stage of models.build makes its own loss. Leave the criterion out.")
        engine = Engine(model, context, optimizer)
    else:
        engine = ModuleEngine(model, context, optimizer, criterion)
    loaders = [divide(loader, engine.data) for loader in (train_dataloader, eval_dataloader)]
    return engine, *loaders, lr_scheduler if lr_scheduler is not None else NoScheduler()
