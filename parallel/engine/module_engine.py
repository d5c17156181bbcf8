"""Data parallelism and ZeRO for any torch module, with the user's own loop around it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from parallel.chunk.managed import problem_of_another_engine
from parallel.engine.composition import optimizer_of
from parallel.engine.context import Context
from parallel.engine.module_parts import chunks_of_module, prepare
from parallel.engine.origin import origin_of
from parallel.engine.results import StepResult
from parallel.engine.user_loop import UserLoop
from parallel.errors import ColonnadeError, ConfigError, DataError, ModelError
from parallel.layout.labels import IGNORED
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import all_reduce
from parallel.modules.batches import num_given_labels
from parallel.modules.evaluation import evaluating
from parallel.modules.first_not_finite import FirstNotFinite
from parallel.modules.hf_configs import problem_of_configs
from parallel.modules.independent_copy import IndependentCopies
from parallel.modules.kept_buffers import KeptBuffers
from parallel.modules.loss import Criterion, LabelledMicrobatch, ModuleLoss
from parallel.modules.loss_sums import LossSums
from parallel.modules.microbatches import as_many_on_every_replica
from parallel.modules.parameters import (
    OriginalParameters,
    refuse_state_dict,
)
from parallel.modules.passes import ModulePasses
from parallel.modules.random_states import RandomStates, random_states, set_random_states
from parallel.modules.shares import LossWeights, weighted_by_labels
from parallel.modules.units import infos_of, layers_of
from parallel.optim.gradients import ModuleGradients
from parallel.zero.gatherer import Gatherer


class ModuleEngine(UserLoop):
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
        if config.train.precision == "fp8":
            raise ConfigError(
                "train.precision: 'fp8' is for models of models.build, whose linears multiply in 8 bits; those of a"
                " module of your own stay as they are. Try 'bf16'."
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
        chunks, placement = chunks_of_module(infos, context, is_torchs=optimizer is not None)
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
        self.inputs = prepare(module, layers, context)
        self._kept = KeptBuffers(module, is_on=config.train.nonfinite == "skip")
        self.loss_weights = LossWeights(context.shares)
        self.loss_weights.follow(module)
        self._passes.follow(module)
        if is_gathered_on_demand:
            refuse_state_dict(module, lambda: bool(self._original.in_use))
        copies.begin()

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
        first, after = FirstNotFinite(self.module, self.chunks), random_states(self.mesh.device)

        def run_again() -> None:
            run(begin=partial(setattr, first, "microbatch"))
            self._passes.release()
            self._gradients.finish()

        set_random_states(before, self.mesh.device)
        try:
            text = origin_of(
                run_again,
                first,
                chunks=self._trained,
                gradients=self._gradients,
                mesh=self.mesh,
                compiles=self.config.train.compile,
            )
        finally:
            set_random_states(after, self.mesh.device)
        self.zero_grad()
        self.placement_manager.after_step(skipped=True)
        self._passes.end_step()
        return text

    def _microbatches(self, batch: Mapping[str, Any]) -> list[LabelledMicrobatch]:
        """Return the microbatches of a batch, as many as those of any replica."""
        counts = self.context.shares.counts(batch)
        return as_many_on_every_replica(self._loss.microbatches(batch), counts, self._agreement)
