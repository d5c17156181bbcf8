"""The entry points of the library: `initialize` makes an engine of a model, `sharded_init` shards the model first."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from parallel.engine.context import current
from parallel.engine.engine import Engine
from parallel.engine.environment import environment_variables
from parallel.engine.loaders import divide_loader
from parallel.engine.module_engine import ModuleEngine
from parallel.errors import ModelError
from parallel.mesh.agreement import Agreement
from parallel.mesh.mesh import ALONE
from parallel.modules.construction import construction
from parallel.modules.loss import Criterion
from parallel.pipeline.part import ModelPart


@contextmanager
def sharded_init() -> Iterator[None]:
    """Load, construct or change models in the block without any rank ever holding one whole.

        with parallel.sharded_init():
            model = OPTForCausalLM.from_pretrained(path)

    In ZeRO stage 3 each data-parallel rank keeps a shard of every parameter; in other stages the model is whole after
    the block. Its values are the same in every stage, on any number of ranks: those of the first rank, whose torch
    generator the random ones follow from. The first rank logs which tensors were drawn because no file has them. Every
    rank enters and leaves the block together. Raises ModelError on every rank for models that differ by rank, or where
    the block fails on another one; RuntimeError before `launch_from_torch`. (The counterparts are FSDP's construction
    on the meta device, torchdistx's deferred_init and DeepSpeed's zero.Init.)
    """
    context = current()
    replicas = context.mesh.axis("data")
    shard_axis = replicas if context.config.zero.stage == 3 else ALONE
    # By default transformers reads all tensors ahead, in threads: then a rank would hold the whole model.
    agreement = Agreement(context.mesh.world)
    agreement.agree_on("the beginning of a sharded_init")
    with environment_variables(HF_DEACTIVATE_ASYNC_LOAD="1"), construction(replicas, shard_axis):
        yield
    agreement.agree_on("the end of a sharded_init")


class NoScheduler:
    """The learning-rate scheduler that `initialize` returns where none was passed; it does nothing."""

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
    """Return (engine, train_dataloader, eval_dataloader, lr_scheduler) for the current context.

    That is the context of the last `launch_from_torch`.

    The engine is an `Engine` for what `models.build` returns, a `ModuleEngine` for any other module. Such a module is
    changed in place: its parameters become views of the engine's buffers, on this rank's device, in the config's
    precision. Every replica starts with rank 0's values.

    A passed optimizer is used instead of the config's (its class, groups and hyperparameters), and its learning rate
    instead of the config's schedule. `criterion`: see `ModuleEngine.train_step`. A DataLoader of global batches is
    returned as one of this replica's parts (see `loaders.divide_loader`). The scheduler is the one that was passed, or
    one that does nothing. Every rank calls this with the same arguments.

    Raises ConfigError or ModelError for what cannot be trained in this way; RuntimeError before `launch_from_torch`.
    """
    context = current()
    Agreement(context.mesh.world).agree_on(f"initialize with {_description(model)}")
    engine: Engine | ModuleEngine
    if isinstance(model, ModelPart):
        if criterion is not None:
            raise ModelError("criterion: the model of models.build makes its own loss. Leave the criterion out.")
        engine = Engine(model, context, optimizer)
    else:
        engine = ModuleEngine(model, context, optimizer, criterion)
    given = (train_dataloader, eval_dataloader)
    loaders = [divide_loader(loader, engine.data, engine._agreement, context.shares) for loader in given]
    return engine, *loaders, lr_scheduler if lr_scheduler is not None else NoScheduler()


def _description(model: nn.Module) -> str:
    """Return what must be the same of a model on all ranks: its class, and its parameters without their values.

    The ranks of a pipeline have different stages, of which only the class is the same.
    """
    if isinstance(model, ModelPart):
        return "a stage"
    named = dict(model.named_parameters())
    parameters = [(name, _shape_of(x), x.dtype, x.requires_grad) for name, x in named.items()]
    digest = hashlib.sha256(repr(parameters).encode()).hexdigest()[:8]
    return f"a {type(model).__name__} of {len(parameters)} parameters ({digest})"


def _shape_of(x: Any) -> tuple[int, ...]:
    """Return the shape of a parameter; none of a lazy one, which gets it in its first forward."""
    return () if is_lazy(x) else tuple(x.shape)
