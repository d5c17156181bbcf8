"""Data parallelism and ZeRO for any torch module, with the user's own loop around it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from parallel.activations.offload import InputsOnHost
from parallel.chunk.chunk import Chunk, make_chunks
from parallel.engine.base import StepResult, initial_placement_of, optimizer_of
from parallel.engine.context import Context
from parallel.engine.module_state import ModuleState
from parallel.errors import ConfigError, DataError, ModelError
from parallel.layout.layout import ParameterInfo
from parallel.mesh.collectives import all_reduce
from parallel.modules.buffers import broadcast_buffers
from parallel.modules.evaluation import evaluating
from parallel.modules.loss import Criterion, ModuleLoss, loss_problem
from parallel.modules.parameters import (
    OriginalParameters,
    broadcast_parameters,
    make_gradients_dense,
    refuse_state_dict,
)
from parallel.modules.passes import ModulePasses
from parallel.modules.recompute import recompute_layers
from parallel.modules.units import infos_of, layers_of
from parallel.optim.grad_norm import global_norm
from parallel.optim.gradients import ModuleGradients
from parallel.placement.initial import InitialPlacement
from parallel.storage.transfer import HostCopy, to_device
from parallel.zero.gatherer import Gatherer


@dataclass(frozen=True)
class UpdateResult:
    """The result of `ModuleEngine.step`, the same on every rank.

    `grad_norm` is the norm before clipping; None where an fp16 gradient overflowed and the update was `skipped`. `lr`
    is the learning rate of the update.
    """

    grad_norm: float | None
    lr: float
    skipped: bool = False


class ModuleEngine(ModuleState):
    """Trains a module on this replica's samples; its forward may be anything (the counterparts are DDP and FSDP).

        loss = engine(**batch).loss; engine.backward(loss); engine.step(); engine.zero_grad()

    Gradients are the mean over replicas, and over nothing else: those of two backwards before a step add up. Parameters
    and floating-point inputs have the config's precision, and so have the buffers of the module's state; master weights
    are fp32 at least. Gradients never stay in `.grad`: `step` clips them as the config says, and reports their norm.
    In ZeRO stage 3 a parameter is NaN outside the forward and backward of its layer (see `modules.units.layers_of`) or,
    where it belongs to no layer, of the module.

    A passed optimizer is used instead of the config's AdamW. `criterion`, for a module without a loss of its own, is
    described at `train_step`. Raises ConfigError or ModelError for what it cannot train.
    """

    def __init__(
        self,
        module: nn.Module,
        context: Context,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        config, data = context.config, context.mesh.axis("data")
        if config.parallel.model_size > 1:
            raise ConfigError(
                "parallel: a module of your own is not split by a pipeline, tensor or context; only models.build's are."
                " Leave parallel empty, and set zero.stage."
            )
        layers = layers_of(module)
        infos = infos_of(module, layers, data)
        if not any(info.parameter.requires_grad for info in infos):
            raise ModelError("model: none of its parameters requires a gradient.")
        chunks, placement = _make_chunks(infos, context, is_torchs=optimizer is not None)
        super().__init__(module, context, chunks, optimizer_of(chunks, config, optimizer), placement)
        self._loss = ModuleLoss(
            module,
            criterion,
            size=config.train.micro_batch_size,
            device=context.device,
            agreement=self._agreement,
        )
        is_gathered_on_demand = any(chunk.is_gathered_on_demand for chunk in chunks)
        gatherer = Gatherer(
            layers if is_gathered_on_demand else {},
            chunks,
            watcher=self.placement_manager,
            agree=self._agreement.agree_on,
        )
        original = OriginalParameters(module, chunks)
        self._passes = ModulePasses(gatherer, self.placement_manager, self._agreement, original)
        self._trained = [chunk for chunk in chunks if not chunk.is_frozen]
        self._gradients = ModuleGradients(self._trained, scatters_each=config.zero.stage >= 2)
        self._synchronizes = True
        self.inputs = _prepare(module, layers, context)
        self._passes.follow(module)
        if is_gathered_on_demand:
            refuse_state_dict(module)

    # -- the user's loop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for these inputs.

        Tensors are moved to this rank's device, and floating-point ones cast to the config's precision. Raises
        ModelError, on every rank, where the module was changed since the engine took it over, or where ranks do not run
        the same layers; ConfigError where the device has too little memory.
        """
        args, kwargs = tree_map(self._input, (args, kwargs))
        with self.placement_manager.explain_shortage():
            return self.module(*args, **kwargs)

    def backward(self, loss: Any, *, retain_graph: bool = False) -> None:
        """Add the gradients of this loss, averaged over replicas, to those since the last step.

        Raises ModelError, on every rank, for a loss that is not a scalar with a gradient, and where ranks do different
        things; ConfigError where the device has too little memory.
        """
        self._passes.begin_backward(loss_problem(loss))
        with self._gradients.backward(synchronizes=self._synchronizes), self.placement_manager.explain_shortage():
            (loss * self.loss_scale.scale).backward(retain_graph=retain_graph)
        self._passes.end_backward(retains_graph=retain_graph)

    def step(self) -> UpdateResult:
        """Clip the gradients, update the weights, then drop the gradients.

        A parameter that had no gradient on any rank stays as it is. Raises ModelError on every rank where one does
        something else.
        """
        self._agreement.agree_on(f"a step with learning rate {self.lr}")
        self._passes.release()
        self._gradients.finish()
        divisor = self.loss_scale.scale * self.data.size
        norm = global_norm(self._trained, self.mesh.world) / divisor
        on_host = HostCopy(norm)
        lr = self.lr
        self.optimizer.unused = self._unused()
        with self.placement_manager.explain_shortage():
            skipped = self._update(norm, divisor)
        self.zero_grad()
        self.placement_manager.after_step(skipped=skipped)
        self._passes.end_step()
        return UpdateResult(None if skipped else on_host.wait().item(), lr, skipped)

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Do as `EngineBase.restore`, and drop what was gathered of the weights before."""
        self._passes.release()
        super().restore(counters)

    def zero_grad(self) -> None:
        """Drop all gradients since the last step."""
        self._gradients.begin()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Have gradients add up on this rank alone in the block, as DDP's no_sync does.

        The next backward after it, or a step, sums them over replicas. In ZeRO stages 2 and 3, where no rank keeps a
        whole gradient, each is summed at once: the result is the same.
        """
        before, self._synchronizes = self._synchronizes, False
        try:
            yield
        finally:
            self._synchronizes = before

    # -- a whole step, and an evaluation

    def train_step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Do one update by this replica's samples, micro × k of them; every tensor's dim 0 is the samples.

        The loss is the mean over the counted labels (those that are not −100) of all microbatches and replicas: the
        model's own `.loss` or, with a criterion, criterion(output, labels), each a mean over its microbatch. Labels are
        `batch["labels"]`, or the `input_ids` of a language model. Raises DataError for a batch that has neither, or no
        counted label on any replica.
        """
        self.train()
        microbatches = list(self._loss.microbatches(batch))
        counts = torch.tensor([microbatch.num_counted for microbatch in microbatches], dtype=torch.int64)
        tokens = int(all_reduce(counts.sum(), self._agreement.axis))
        if not tokens:
            raise DataError("batch: no label to learn from: all of them are -100.")
        self.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for i, microbatch in enumerate(microbatches):
            loss, count = self._loss.of(self, microbatch), microbatch.num_counted
            if count:  # the mean of nothing is NaN
                total += loss.detach() * count
            with self.no_sync() if i < len(microbatches) - 1 else nullcontext():
                self.backward(loss * (count * self.data.size / tokens))
        done = self.step()
        mean = all_reduce(total, self.data).item() / tokens
        return StepResult(mean, done.grad_norm, done.lr, tokens, skipped=done.skipped)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """Return the mean loss over all counted labels of all batches, the same on every rank; NaN without a label.

        Every replica must give as many batches as the others, of as many microbatches. Afterwards each part of the
        module is in training or evaluation mode as it was before. Raises DataError for a batch without labels.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(self.module):
            for batch in batches:
                for microbatch in self._loss.microbatches(batch):
                    loss, count = self._loss.of(self, microbatch).item(), microbatch.num_counted
                    sums += torch.tensor([loss * count if count else 0.0, count], dtype=torch.float64)
        self._agreement.agree_on("the end of an evaluation")
        total, tokens = all_reduce(sums, self._agreement.axis).tolist()
        return total / tokens if tokens else float("nan")

    # -- details

    def _input(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = to_device(x, self.mesh.device)
        return x.to(self.context.dtype) if x.is_floating_point() else x

    def _unused(self) -> set[nn.Parameter]:
        """Return the parameters that have had no gradient since the last step, on any rank."""
        arrived = all_reduce(self._gradients.arrived(), self._agreement.axis).tolist()
        parameters = [info.parameter for chunk in self._trained for info in chunk.infos]
        return {parameter for parameter, count in zip(parameters, arrived, strict=True) if not count}


def _make_chunks(
    infos: Sequence[ParameterInfo], context: Context, *, is_torchs: bool
) -> tuple[list[Chunk], InitialPlacement]:
    """Return the chunks of these parameters, with rank 0's values, and their placement before the first step.

    `is_torchs`: with an optimizer of torch's.
    """
    # A step has as many microbatches as the user likes: 2 stands for any number above 1.
    placement = initial_placement_of(infos, context, num_microbatches=2, is_torchs=is_torchs)
    with placement.explain_host_shortage():
        chunks = make_chunks(
            placement.specs,
            placement.storages,
            fill=partial(broadcast_parameters, axis=context.mesh.axis("data")),
            device=context.device,
        )
    return chunks, placement


def _prepare(module: nn.Module, layers: Mapping[str, nn.Module], context: Context) -> InputsOnHost | None:
    """Change the module as the config says: its buffers, and how its layers compute.

    Returns the inputs of its recomputed layers, where those are kept on the host.
    """
    train = context.config.train
    make_gradients_dense(module)
    broadcast_buffers(module, context.device, context.dtype, context.mesh.axis("data"))
    if train.compile:
        for layer in layers.values():
            layer.forward = torch.compile(layer.forward)
    inputs = InputsOnHost(context.device) if train.activation_checkpointing == "offload" else None
    if train.activation_checkpointing != "none":
        recompute_layers(module, layers, inputs, compiles=train.compile)
    return inputs
