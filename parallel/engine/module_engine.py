"""Data parallelism and ZeRO for any torch module: the user's own loop around it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from parallel.activations.offload import InputsOnHost
from parallel.chunk.chunk import make_chunks
from parallel.engine.base import StepResult, initial_placement_of, optimizer_of
from parallel.engine.context import Context
from parallel.engine.module_state import ModuleState
from parallel.errors import ConfigError, DataError, ModelError
from parallel.layout.labels import IGNORED
from parallel.mesh.collectives import all_reduce
from parallel.mesh.mesh import on_the_host
from parallel.modules import adapters as modules
from parallel.modules.agreement import Agreement
from parallel.modules.units import infos_of, layers_of
from parallel.optim.grad_norm import global_norm
from parallel.optim.gradients import ModuleGradients
from parallel.placement.initial import explain_host_shortage
from parallel.storage.transfer import HostCopy, to_device
from parallel.zero.gatherer import Gatherer

Criterion = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class UpdateResult:
    """What `ModuleEngine.step` did, the same on every rank: `grad_norm` is from before clipping, None where an fp16
    gradient overflowed and the update was skipped."""

    grad_norm: float | None
    lr: float
    skipped: bool = False


class ModuleEngine(ModuleState):
    """Trains a module whose forward is its own affair, on this replica's samples.

        loss = engine(**batch).loss; engine.backward(loss); engine.step(); engine.zero_grad()

    Gradients are the mean over replicas, and over nothing else: two backwards before a step add up. Parameters and
    floating-point inputs have the config's precision, and so have buffers of the module's state; masters are fp32 at
    least. Gradients never stay in `.grad`: `step` clips them as the config says and reports their norm. In ZeRO stage 3
    a parameter is NaN outside the forward and backward of its layer (see `zero.units.layers_of`) or, where it belongs
    to no layer, of the module.
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
        zero = config.zero.stage
        fill = partial(modules.fill, axis=data)
        start = initial_placement_of(
            infos, context, num_microbatches=2, is_torchs=optimizer is not None
        )  # as many as a user likes
        with explain_host_shortage(start):
            chunks = make_chunks(start.specs, start.storages, fill=fill, device=context.device)
        super().__init__(module, context, chunks, optimizer_of(chunks, config, optimizer), start)
        self.criterion = criterion
        self._control = on_the_host(data)
        self._agreement = Agreement(self._control)
        self._layers = layers
        is_gathered_on_demand = any(chunk.is_gathered_on_demand for chunk in chunks)
        self._gatherer = Gatherer(
            layers if is_gathered_on_demand else {},
            chunks,
            watcher=self.placement_manager,
            agree=self._agreement.check,
        )
        self._trained = [chunk for chunk in chunks if not chunk.is_frozen]
        self._gradients = ModuleGradients(self._trained, scatters_each=zero >= 2)
        self._infos = {info.parameter: info for chunk in self._trained for info in chunk.infos}
        self._synchronizes = True
        self._awaits_backward = False
        self._is_between_steps = True
        self._known = {n: (p, p.requires_grad) for n, p in module.named_parameters(remove_duplicate=False)}
        self._chunk_of = {info.parameter: chunk for chunk in chunks for info in chunk.infos}
        modules.make_gradients_dense(module)
        modules.place_buffers(module, context.device, context.dtype, data)
        if config.train.compile:
            for layer in layers.values():
                layer.forward = torch.compile(layer.forward)
        if config.train.activation_checkpointing == "offload":
            self.inputs = InputsOnHost(context.device)
        if config.train.activation_checkpointing != "none":
            modules.recompute(module, layers, self.inputs, compiles=config.train.compile)
        module.register_forward_pre_hook(lambda module, *inputs: self._enter(inputs), with_kwargs=True)
        module.register_forward_hook(lambda module, inputs, y: self._leave(), always_call=True)
        if is_gathered_on_demand:
            modules.guard_state(module)

    # -- the user's loop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these inputs, tensors moved to this rank's device and floating-point ones cast to
        the config's precision. Raises ModelError, on every rank, where the module was changed since it was taken over
        or ranks do not run the same layers.
        """
        args, kwargs = tree_map(self._input, (args, kwargs))
        with self.placement_manager.explain_shortage():
            return self.module(*args, **kwargs)

    def backward(self, loss: Any, *, retain_graph: bool = False) -> None:
        """Add this loss's gradients, averaged over replicas, to those since the last step."""
        is_one = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
        problem = "" if is_one else f"loss: it must be one number with a gradient, got {modules.described(loss)}."
        self._agreement.check("a backward", problem)
        self._gatherer.root.make_whole()  # a backward before this one, of another forward, may have let it go
        with self._gradients.backward(synchronizes=self._synchronizes), self.placement_manager.explain_shortage():
            (loss * self.loss_scale.scale).backward(retain_graph=retain_graph)
        self._awaits_backward = retain_graph
        if not retain_graph:
            self._gatherer.end()

    def step(self) -> UpdateResult:
        """Clip and update, then forget the gradients. A parameter that got none on any rank stays as it is."""
        self._agreement.check("a step")
        self._let_go()
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
        self._is_between_steps = True
        return UpdateResult(None if skipped else on_host.wait().item(), lr, skipped)

    def restore(self, counters: Mapping[str, Any]) -> None:
        self._let_go()
        super().restore(counters)

    def zero_grad(self) -> None:
        """Forget all gradients since the last step."""
        self._gradients.begin()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in here add up on this rank; the next one outside, or a step, sums them over replicas. In ZeRO
        stages 2 and 3, where no rank keeps a whole gradient, each is summed at once: the result is the same.
        """
        before, self._synchronizes = self._synchronizes, False
        try:
            yield
        finally:
            self._synchronizes = before

    # -- a step at once

    def train_step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """One update by this replica's samples, micro × k of them; every tensor's dim 0 is the samples.

        The loss is the mean over the counted labels (those that are not −100) of all microbatches and replicas: the
        model's own `.loss` or, with a criterion, criterion(output, labels), each a mean over its microbatch. Labels are
        `batch["labels"]`, or the `input_ids` of a language model. Raises DataError for a batch that has neither.
        """
        self.train()
        microbatches = list(self._microbatches(batch))
        counts = torch.tensor([count for _, _, count in microbatches], dtype=torch.int64)
        tokens = int(all_reduce(counts.sum(), self._control))
        if not tokens:
            raise DataError("batch: no label to learn from: all of them are -100.")
        self.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for i, (inputs, labels, count) in enumerate(microbatches):
            loss = self._loss(inputs, labels)
            if count:  # the mean of nothing is NaN
                total += loss.detach() * count
            with self.no_sync() if i < len(microbatches) - 1 else nullcontext():
                self.backward(loss * (count * self.data.size / tokens))
        done = self.step()
        mean = all_reduce(total, self.data).item() / tokens
        return StepResult(mean, done.grad_norm, done.lr, tokens, skipped=done.skipped)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """The mean loss over all counted labels of all batches, the same on every rank; NaN where there are none.
        Replicas take part together: each must bring as many batches, of as many microbatches. Afterwards the module
        trains, or does not, as before. Raises DataError as `train_step` does.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        with modules.evaluating(self.module):
            for batch in batches:
                for inputs, labels, count in self._microbatches(batch):
                    loss = self._loss(inputs, labels).item()
                    sums += torch.tensor([loss * count if count else 0.0, count], dtype=torch.float64)
        self._agreement.check("the end of an evaluation")
        total, tokens = all_reduce(sums, self._control).tolist()
        return total / tokens if tokens else float("nan")

    def _microbatches(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], Tensor, int]]:
        """(inputs, labels, how many of these are counted). A batch that one replica refuses, all refuse."""
        labels = batch.get("labels", batch.get("input_ids"))
        problem = f"batch: it has neither 'labels' nor 'input_ids', but {', '.join(batch) or 'nothing'}."
        self._agreement.check("a batch", problem if labels is None else "", DataError)
        assert labels is not None
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        size = self.config.train.micro_batch_size
        shifts = self.criterion is None and modules.is_causal(self.module)
        for start in range(0, len(labels), size):
            part = {name: x[start : start + size] for name, x in inputs.items()}
            own = labels[start : start + size]
            counted = own[:, 1:] if shifts else own
            yield part, own, int((counted != IGNORED).sum())

    def _loss(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        if self.criterion is None:
            return self(**inputs, labels=labels).loss  # type: ignore[no-any-return]
        return self.criterion(self(**inputs), to_device(labels, self.mesh.device))

    # -- parts of a forward

    def _enter(self, inputs: Any) -> None:
        doing = "a forward" if torch.is_grad_enabled() else "a forward without gradients"
        self._agreement.check(doing, problem=self._changed())
        if torch.is_grad_enabled():
            self._say_work(inputs)
        self._gatherer.start_pass(guarded=True)
        self._gatherer.root.make_whole()

    def _say_work(self, inputs: Any) -> None:
        """To the placer: a module's work grows with the sizes of its inputs."""
        work = tuple(size for x in tree_leaves(inputs) if isinstance(x, Tensor) for size in x.shape)
        if self._is_between_steps:
            self._is_between_steps = False
            self._gatherer.end()
            self.placement_manager.before_step(work)
        else:
            self.placement_manager.within_step(work)

    def _let_go(self) -> None:
        """Of what is whole still, since a graph was retained or a backward never came: weights will be others."""
        self._gatherer.end()
        self._awaits_backward = False

    def _leave(self) -> None:
        self._awaits_backward |= torch.is_grad_enabled()
        if not self._awaits_backward:
            self._gatherer.end()

    def _input(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = to_device(x, self.mesh.device)
        return x.to(self.context.dtype) if x.is_floating_point() else x

    def _unused(self) -> set[nn.Parameter]:
        """The parameters that got no gradient since the last step, on any rank."""
        arrived = all_reduce(self._gradients.arrived(), self._control).tolist()
        return {parameter for parameter, count in zip(self._infos, arrived, strict=True) if not count}

    def _changed(self) -> str:
        """What is not as it was when the module was taken over."""
        found = dict(self.module.named_parameters(remove_duplicate=False))
        cure = "Change a model before parallel.initialize, not after."
        if strangers := [n for n in {**found, **self._known} if found.get(n) is not self._known.get(n, (None,))[0]]:
            return f"model: {strangers[0]} is not the parameter it was. {cure}"
        for name, (parameter, trains) in self._known.items():
            chunk = self._chunk_of.get(parameter)
            if chunk is not None and not chunk.parameters.shows(parameter):
                return f"model: {name} moved: its memory is not the engine's any more. {cure}"
            if parameter.requires_grad and not trains:
                return f"model: {name} was frozen and requires a gradient now. {cure}"
        return ""
