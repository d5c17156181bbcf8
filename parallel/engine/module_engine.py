"""Data parallelism and ZeRO for any torch module, with the user's own loop around it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parallel.activations.offload import InputsOnHost
from parallel.chunk.chunk import Chunk, make_chunks
from parallel.chunk.managed import problem_of_another_engine
from parallel.engine.base import StepResult, initial_placement_of, optimizer_of
from parallel.engine.context import Context
from parallel.engine.origin import chunks_not_finite, origin_text, parts_text
from parallel.engine.parameter_access import ParameterAccess
from parallel.errors import ColonnadeError, ConfigError, DataError, ModelError
from parallel.layout.finite import problem_of
from parallel.layout.labels import IGNORED
from parallel.layout.layout import ParameterInfo
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import all_reduce, gather_objects
from parallel.modules.batches import num_given_labels
from parallel.modules.buffers import broadcast_buffers
from parallel.modules.evaluation import evaluating
from parallel.modules.first_not_finite import FirstNotFinite
from parallel.modules.hf_configs import problem_of_configs
from parallel.modules.independent_copy import IndependentCopies
from parallel.modules.inputs import map_tensors
from parallel.modules.kept_buffers import KeptBuffers
from parallel.modules.loss import Criterion, LabelledMicrobatch, ModuleLoss, loss_problem
from parallel.modules.loss_sums import LossSums
from parallel.modules.microbatches import as_many_on_every_replica
from parallel.modules.parameters import (
    OriginalParameters,
    broadcast_parameters,
    make_gradients_dense,
    refuse_state_dict,
)
from parallel.modules.passes import ModulePasses
from parallel.modules.random_states import RandomStates, random_states, set_random_states
from parallel.modules.recompute import recompute_layers
from parallel.modules.sharded import expose_placeholders
from parallel.modules.shares import LossWeights, weighted_by_labels
from parallel.modules.units import infos_of, layers_of
from parallel.ops.compiling import not_yet_compiled
from parallel.optim.grad_norm import norm_and_sum
from parallel.optim.gradients import ModuleGradients
from parallel.optim.left_out import Outcome
from parallel.placement.initial import InitialPlacement
from parallel.placement.shortage import refusing_without_room
from parallel.storage.transfer import HostCopy, to_device
from parallel.zero.gatherer import Gatherer


@dataclass(frozen=True)
class UpdateResult:
    """The result of `ModuleEngine.step`, the same on every rank.

    `grad_norm` is the norm before clipping; None where the update was `skipped`: an fp16 gradient overflowed, or a
    number was not finite and `train.nonfinite` is "skip". `lr` is the learning rate of the update. `nonfinite_steps`
    counts the steps that were left out so far because of a number that is not finite, without fp16's overflows.
    """

    grad_norm: float | None
    lr: float
    skipped: bool = False
    nonfinite_steps: int = 0


class ModuleEngine(ParameterAccess):
    """Trains a module on this replica's samples; its forward may be anything (the counterparts are DDP and FSDP).

        loss = engine(**batch).loss; engine.backward(loss); engine.step(); engine.zero_grad()

    Gradients are the mean over replicas, and over nothing else: those of two backwards before a step add up. Parameters
    and floating-point inputs have the config's precision, and so have the buffers of the module's state; master weights
    are fp32 at least. (Of a module with several dtypes see `modules.precision.computed_dtypes`.) Gradients never stay
    in `.grad`: `step` clips them as the config says, and reports their norm. In ZeRO stage 3 a parameter has values
    only in the forward and backward of its layer (see `modules.units.layers_of`) or, where it belongs to no layer, of
    the module; elsewhere whatever reads them raises ModelError.

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
        Agreement(context.mesh.world).agree_on("a model", problem_of_another_engine(module))
        copies = IndependentCopies(module)
        layers = layers_of(module)
        infos = infos_of(module, layers, data, context.dtype)
        if not any(info.parameter.requires_grad for info in infos):
            raise ModelError(
                "model: none of its parameters requires a gradient. A model that is not trained needs no engine; to"
                " shard it, make it a part of the module that is trained."
            )
        chunks, placement = _make_chunks(infos, context, is_torchs=optimizer is not None)
        super().__init__(module, context, chunks, optimizer_of(chunks, config, optimizer), placement)
        self._agreement.agree_on("an engine", problem_of_configs(module))
        self._loss = ModuleLoss(
            module,
            criterion,
            size=config.train.micro_batch_size,
            device=context.device,
            agreement=self._agreement,
        )
        self._trained = [chunk for chunk in chunks if not chunk.is_frozen]
        self._gradients = ModuleGradients(self._trained, scatters_each=config.zero.stage >= 2)
        self.zero_grad()
        self._take_over()
        is_gathered_on_demand = any(chunk.is_gathered_on_demand for chunk in chunks)
        gatherer = Gatherer(
            layers if is_gathered_on_demand else {},
            chunks,
            watcher=self.placement_manager,
            agree=self._agreement.agree_on,
        )
        self._original = OriginalParameters(module, chunks)
        self._passes = ModulePasses(gatherer, self.placement_manager, self._agreement, self._original, self.writes)
        self._synchronizes = True
        self.inputs = _prepare(module, layers, context)
        self._kept = KeptBuffers(module, is_on=config.train.nonfinite == "skip")
        self.loss_weights = LossWeights(context.shares)
        self.loss_weights.follow(module)
        self._passes.follow(module)
        if is_gathered_on_demand:
            refuse_state_dict(module, lambda: bool(self._original.in_use))
        copies.begin()

    # -- the user's loop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for these inputs.

        Tensors are moved to this rank's device, and floating-point ones cast to the config's precision. Raises
        ModelError, on every rank, where the module was changed since the engine took it over, or where ranks do not run
        the same layers; RoomError or NoRoomError where a memory has no room, perhaps on this rank alone.
        """
        args, kwargs = map_tensors(self._input, (args, kwargs))
        self._kept.begin()
        with self.memory_guard.explained(lambda: "forward"), self._passes.explain_transforms():
            return self.module(*args, **kwargs)

    def backward(self, loss: Any, *, retain_graph: bool = False) -> None:
        """Add the gradients of this loss, averaged over replicas, to those since the last step.

        The loss is a mean over samples: where the loader that `initialize` returned gave this replica more or fewer
        samples than others, it is weighted by the share. Raises ModelError, on every rank, for a loss that is not a
        scalar with a gradient or whose share is not known, and where ranks do different things; RoomError or
        NoRoomError where a memory has no room, perhaps on this rank alone.
        """
        weight, problem = self.loss_weights.backward()
        self._passes.begin_backward(loss_problem(loss) or problem or self._problem_of_a_backward())
        if weight:
            self._lost = self._lost + 0.0 * loss.detach().double().reshape(())
        with self._gradients.backward(synchronizes=self._synchronizes), self.memory_guard.explained(lambda: "backward"):
            (loss * (self.loss_scale.scale * weight)).backward(retain_graph=retain_graph)
        self._passes.end_backward(retains_graph=retain_graph)

    def step(self) -> UpdateResult:
        """Clip the gradients, update the weights, then drop the gradients.

        A parameter that had no gradient on any rank stays as it is. Raises ModelError on every rank where one does
        something else; NonFiniteError, on every rank, for a loss or a norm that is not finite, as `train.nonfinite`
        says: then nothing has been updated, and the message names the layers and the ranks whose gradients, or the
        weights that, are not finite. (The forwards are the user's, and are not run again.)
        """
        return self._step(self._parts_not_finite)

    def _step(self, origin: Callable[[], str], divisor: float = 1.0, loss: float | None = None) -> UpdateResult:
        """Do a step with the gradients divided by this number.

        `loss` is that of the whole step, where it is known. Where it or the norm is not finite, `origin` says why.
        """
        self._agreement.agree_on(f"a step with {self.hyperparameters}", self._original.in_use)
        self.saver.check()
        self._passes.release()
        self._gradients.finish()
        divisor *= self._divisor
        sums = torch.stack([self.writes.changed(), self._lost])
        norm, (num_written, lost) = norm_and_sum(self._trained, self.mesh.world, sums)
        norm = norm / divisor
        lost = lost if loss is None else torch.full_like(lost, 0.0 * loss)
        on_host = HostCopy(torch.stack([norm, lost]))
        lr = self.lr
        self.optimizer.unused = self._unused()
        with self.memory_guard.explained(lambda: "update"):
            self._update(norm, divisor, HostCopy(num_written), lost)
        self.zero_grad()
        found, lost_on_host = on_host.wait().tolist()
        outcome = self._end_step(lost_on_host, found)
        self._passes.end_step()
        self._kept.end(is_left_out=outcome is Outcome.LEFT_OUT)
        self._report(outcome, lost_on_host if loss is None else loss, found, origin)
        self.memory_guard.after_step(self.num_steps)
        skipped = outcome is not Outcome.UPDATED
        return UpdateResult(None if skipped else found, lr, skipped, self.left_out.total)

    def write_back(self) -> None:
        """Do as `EngineBase.write_back`, and drop gradients and what was gathered of the weights before."""
        self._passes.release()
        self.zero_grad()
        self._kept.end(is_left_out=False)
        super().write_back()

    @property
    def has_gradients(self) -> bool:
        """True if gradients have arrived since the last step on this rank."""
        return bool(self._gradients.arrived().any())

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

    @weighted_by_labels
    def train_step(self, batch: Mapping[str, Any]) -> StepResult:
        """Do one update by this replica's samples, which go through the module in microbatches.

        The loss is that of all samples of all replicas in one batch: the mean over their counted labels, whatever is
        counted (`modules.loss_terms`), of the model's own `.loss` or, with a criterion, of criterion(output, labels).
        Labels are `batch["labels"]`, or the `input_ids` of a language model. Raises DataError, on every rank, for a
        batch that cannot be used or has no counted label on any replica; ModelError for a loss of which it is not known
        what it counts, unless there is one microbatch in all; NonFiniteError as `step` does, once the step has been run
        a second time, with the same random numbers, to name the rank, the layer and the microbatch where it began.
        """
        self.train()
        microbatches, before = self._microbatches(batch), random_states(self.mesh.device)
        # What is counted is known after the last forward. Until then gradients are scaled by what the batch has.
        given = torch.tensor([num_given_labels(batch, IGNORED), len(microbatches)])
        expected, num_microbatches = all_reduce(given, self._agreement.axis).tolist()
        run = partial(self._forwards_and_backwards, microbatches, num_microbatches, self.data.size / max(1, expected))
        sums = run()
        try:
            totals = sums.totals()
            if not totals.divisor:
                raise DataError("batch: no label to learn from: all of them are -100.")
        except ColonnadeError:  # on every rank
            self.zero_grad()
            raise
        done = self._step(partial(self._origin, run, before), totals.divisor / max(1, expected), totals.loss)
        return StepResult(
            totals.loss,
            done.grad_norm,
            done.lr,
            totals.num_labels,
            skipped=done.skipped,
            nonfinite_steps=done.nonfinite_steps,
        )

    @weighted_by_labels
    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]]) -> float:
        """Return the loss of all samples of all batches, the same on every rank; NaN without a label.

        Every replica must give as many batches as the others, as the loader of `initialize` does. Afterwards each part
        of the module is in training or evaluation mode as it was before. Raises DataError and ModelError as
        `train_step` does.
        """
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.module):
            sums = LossSums(self._agreement.axis, self.mesh.device)
            for batch in batches:
                for microbatch in self._microbatches(batch):
                    sums.add(self._loss.of(self, microbatch))
        self._agreement.agree_on("the end of an evaluation")
        return sums.totals().loss

    # -- details

    def _forwards_and_backwards(
        self,
        microbatches: Sequence[LabelledMicrobatch],
        num_microbatches: int,
        factor: float,
        *,
        begin: Callable[[int], None] = lambda i: None,
    ) -> LossSums:
        """Drop the gradients, compute those of these microbatches, and return the sums of the losses.

        `num_microbatches` is the number on all replicas, and `factor` is what the losses are multiplied by. `begin` is
        called with the number of each microbatch.
        """
        self.zero_grad()
        sums = LossSums(self._agreement.axis, self.mesh.device)
        for i, microbatch in enumerate(microbatches):
            begin(i)
            found = self._loss.of(self, microbatch)
            sums.add(found)
            if found.problem and (num_microbatches > 1 or not found.is_loss):
                self._agreement.agree_on("a backward", found.problem)
            if is_last := i == len(microbatches) - 1:
                sums.copy_to_host()
            with nullcontext() if is_last else self.no_sync():
                self.backward(found.loss * (found.factor * factor))
        return sums

    def _origin(self, run: Callable[..., LossSums], before: RandomStates) -> str:
        """Run a step again that has updated nothing, and return where its first number was that is not finite.

        The random numbers are the same: the generators begin in the states that they had `before`.
        """
        suspects, first = chunks_not_finite(self._trained, self.mesh.world), FirstNotFinite(self.module, self.chunks)
        after = random_states(self.mesh.device)
        set_random_states(before, self.mesh.device)
        try:
            with (
                not_yet_compiled(self.config.train.compile),
                first.watching(),
                self._gradients.watching(first.arrived),
            ):
                run(begin=partial(setattr, first, "microbatch"))
        finally:
            set_random_states(after, self.mesh.device)
        self._passes.release()
        self._gradients.finish()
        text = origin_text(self._trained, self.mesh, first, suspects)
        self.zero_grad()
        self.placement_manager.after_step(skipped=True)
        self._passes.end_step()
        return text

    def _parts_not_finite(self) -> str:
        """Return which gradients and which weights are not finite, after a step whose forwards were the user's."""
        suspects = chunks_not_finite(self._trained, self.mesh.world)
        own = problem_of([piece for chunk in self.chunks for piece in chunk.spec.pieces(chunk.master)])
        weights = [f"rank {rank}: {x}" for rank, x in enumerate(gather_objects(own, self.mesh.world)) if x]
        return parts_text(suspects) + (f" Weights: {'; '.join(weights)}." if weights else " All weights are finite.")

    def _microbatches(self, batch: Mapping[str, Any]) -> list[LabelledMicrobatch]:
        """Return the microbatches of a batch, as many as those of any replica."""
        counts = self.context.shares.counts(batch)
        return as_many_on_every_replica(self._loss.microbatches(batch), counts, self._agreement)

    def _input(self, x: Tensor) -> Tensor:
        moved = to_device(x, self.mesh.device)
        moved = moved.to(self.context.dtype) if x.is_floating_point() else moved
        self.context.shares.copied(x, moved)
        return moved


def _make_chunks(
    infos: Sequence[ParameterInfo], context: Context, *, is_torchs: bool
) -> tuple[list[Chunk], InitialPlacement]:
    """Return the chunks of these parameters, with rank 0's values, and their placement before the first step.

    `is_torchs`: with an optimizer of torch's.
    """
    # A step has as many microbatches as the user likes: 2 stands for any number above 1.
    placement = initial_placement_of(infos, context, num_microbatches=2, is_torchs=is_torchs)
    expose_placeholders(info.parameter for info in infos)
    with refusing_without_room(context.place.rank, "making the model"), placement.explain_host_shortage():
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
