"""The engine of a model in stages: one training step of a plan, gradients, a norm and an update.

It knows no model. What it does with a batch is in `replica_batches`, forwards and backwards are in `planned_passes`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from parallel.chunk.chunk import make_chunks
from parallel.engine.captured_step import CapturedStep, problem_of_capture
from parallel.engine.composition import initial_placement_of, optimizer_of
from parallel.engine.context import Context
from parallel.engine.origin import origin_of
from parallel.engine.phases import Mark, Stopwatch
from parallel.engine.planned_passes import PlannedPasses
from parallel.engine.replica_batches import ReplicaBatches, Staged
from parallel.engine.results import StepResult
from parallel.engine.scales import scaling_of
from parallel.engine.state import EngineState
from parallel.engine.step_code import StepCode
from parallel.errors import ColonnadeError, DataError, ModelError, NonFiniteError
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import all_reduce
from parallel.modules.first_not_finite import FirstNotFinite
from parallel.modules.parameters import OriginalParameters, problem_of_frozen
from parallel.optim.grad_norm import global_norm, norm_and_sum
from parallel.optim.gradients import Gradients
from parallel.optim.step_counts import Outcome, found_inf
from parallel.pipeline.p2p import Pipe
from parallel.pipeline.part import ModelPart
from parallel.pipeline.staged import StagedBatch
from parallel.placement.shortage import refusing_without_room
from parallel.plan.plan import Action
from parallel.storage.transfer import HostCopy
from parallel.tensor.layers import Weighted
from parallel.zero.gatherer import Gatherer


class Engine(EngineState):
    """Trains this rank's part of a model, in a mesh of any shape.

    A batch is a dict of this replica's samples, the same on every rank of the replica; B is a multiple of
    `train.micro_batch_size`. All tensors are of integers:

    input_ids [B, S]
    labels [B, S]            optional; −100 is not counted; they are shifted inside. Default: the inputs, but for the
                             first token of each document
    attention_mask [B, S]    optional; 1 where there is a token, 0 at padding. Default: no padding
    position_ids [B, S]      optional; each token's position in its document. Default: counted from the tokens
    document_ids [B, S]      optional; never falling along S. Tokens attend within their document. Default: one a sample
    sample_ids [B]           optional; the samples' numbers over the run, which dropout depends on. Default: counted

    `num_samples` counts the samples of all replicas in the steps that were taken: it is the position in the data.
    Raises ConfigError or ModelError for a config or an optimizer that it cannot train with.
    """

    def __init__(self, part: ModelPart, context: Context, optimizer: torch.optim.Optimizer | None = None) -> None:
        config, zero = context.config, context.config.zero.stage
        Agreement(context.mesh.world).agree_on("a split model", problem_of_frozen(part.infos))
        placement = initial_placement_of(part.infos, context, is_torchs=optimizer is not None)
        with refusing_without_room(context.place.rank, "making the model"), placement.explain_host_shortage():
            chunks = make_chunks(placement.specs, placement.storages, fill=part.set_initial_values)
        super().__init__(part, context, chunks, optimizer_of(chunks, config, optimizer), placement)
        self.inputs = part.inputs
        self.part, self.pipe = part, Pipe(self.mesh.axis("pipe"), self.mesh.links)
        self.pipe.connect(self.mesh.device)
        # Where all parameters stay whole on the device, there is nothing to do before and after a layer.
        gathers = zero >= 3 or config.zero.tensor_placement_policy != "cuda"
        units, last = (part.units, part.last_units()) if gathers else ({}, [])
        self.gatherer = Gatherer(units, self.chunks, watcher=self.placement_manager, last=last)
        part.register_forward_pre_hook(lambda module, inputs: self.gatherer.start_pass())
        self.gradients = Gradients(self.chunks, scatters_each=zero >= 2, num_gradients=part.num_gradients())
        has_w = config.parallel.pipeline.size > 1 and config.train.activation_checkpointing == "none"
        compiles = config.train.compile and not has_w
        for module in part.modules():
            if isinstance(module, Weighted):
                module.receiver = self.gradients.receiver(module.weight, in_compiled_code=compiles)
        self.scaling = scaling_of(part, self.chunks, context)
        self.stopwatch = Stopwatch(self.mesh.device, self.mesh.watch.progress.enter)
        self.batches = ReplicaBatches(context, part.interface.limits, self.steps)
        self.passes = PlannedPasses(
            part, context, pipe=self.pipe, gatherer=self.gatherer, gradients=self.gradients, scaling=self.scaling
        )
        run, code = partial(self.passes.forwards_and_backwards, records=True), StepCode(part, self.chunks, self.writes)
        never = problem_of_capture(config, self.mesh.world.size, is_torchs=optimizer is not None)
        self.captured_step = CapturedStep(run, code, gradients=self.gradients, stopwatch=self.stopwatch, never=never)
        self.num_samples = 0
        self._original = OriginalParameters(part, self.chunks, made_by="parallel.Engine")

    def agree_on(self, action: str, problem: str = "", error: type[ColonnadeError] = ModelError) -> None:
        """Do as `EngineBase.agree_on`; a change of the parameters that this engine cannot follow is a problem."""
        if self.writes.is_on and not problem:
            are_shown = self.writes.take_replaced()  # values that came by `p.data = ...` can be followed
            if not are_shown:
                self.captured_step.discard_early()
            problem = self._original.change(are_shown=are_shown)
        super().agree_on(action, problem, error)

    def train_step(
        self, batch: Mapping[str, Tensor], *, next_batch: Callable[[], Mapping[str, Tensor] | None] | None = None
    ) -> StepResult:
        """Do forward and backward of all microbatches, and one update, unless loss or norm is not finite.

        `next_batch` reads the batch of the next step, and returns it, or None. It is called when the device has been
        given all of this step, before the host waits for the loss; the batch is checked and staged then, so that the
        device does not wait for that either. What is wrong with it is said by the step that takes it. A batch that is
        written into before that step, other than by an operation of torch on its tensors (through NumPy, or `x.data`),
        has the old values in it. The samples of this step are counted when `next_batch` is called, the step itself is
        not. An error that it raises is raised when the step has been counted.

        Returns the same result on every rank (`loss` is the mean over all replicas' counted labels). Raises DataError,
        on every rank and before anything is changed, for a batch that cannot be used or has no label; ConfigError, in
        the same way, for one with another number of microbatches than the file of a schedule. Raises RoomError or,
        after the first step, NoRoomError where a memory has no room, perhaps on this rank alone. Raises
        NonFiniteError on every rank for a loss or a norm that is not finite, as `train.nonfinite` says: then the step
        has been run a second time, without an update, to name the rank, the layer and the microbatch where that began.
        """
        try:
            with self.memory_guard.explained(lambda: self.stopwatch.phase):
                early = self._start_early(batch)
            frozen = problem_of_frozen(self.part.infos) if self.writes.is_on else ""
            self.agree_on(f"a train step with {self.hyperparameters}", frozen)
            self.saver.check()
            with self.memory_guard.explained(lambda: self.stopwatch.phase):
                result = self._train_step(batch, early, next_batch)
        except BaseException:
            self.stopwatch.forget()
            self.captured_step.discard_early()
            raise
        self.memory_guard.after_step(self.num_steps)
        return result

    def _start_early(self, batch: Mapping[str, Tensor], marks: Sequence[Mark] = ()) -> Staged | None:
        """Launch a graph for this batch where there is one, before it is known what may prevent it: the host finds that
        out while the device computes. Return the batch then, and the number of its labels. `marks`: where its step has
        not begun, those that it has so far.
        """
        if not (self.captured_step.may_start_early and self.part.training):
            return None
        if not marks:
            self.stopwatch.mark("data")
        try:
            staged, tokens = self.batches.staged(batch, self.num_samples)
        except DataError:  # it is raised again, unless another error is found before
            return None
        self.captured_step.start_early(staged, self._multiplies_in_8_bits, marks=marks)
        return staged, tokens

    def _start_next(self) -> None:
        """Launch a graph for the batch of the next step, if it is staged, before this step returns: whatever a loop
        does between two steps takes the device no time. Not where a user's code may write parameters there.
        """
        if self.batches.ahead is not None and not self.writes.is_on:
            self._start_early(self.batches.ahead.batch, [self.stopwatch.mark_ahead("data")])

    def _train_step(
        self,
        batch: Mapping[str, Tensor],
        early: Staged | None,
        next_batch: Callable[[], Mapping[str, Tensor] | None] | None,
    ) -> StepResult:
        if early is None:
            self.stopwatch.mark("data")
        # With ZeRO 3 writes show when parameters are gathered, on some ranks of a pipeline perhaps, and not on others.
        written = self._start_check() if self.config.zero.stage < 3 else None
        if early is not None and not all(module.training for module in self.part.modules()):
            self.captured_step.discard_early()  # a module's `train` may write its weights, as where adapters are merged
        self.part.train()
        staged, tokens = self.batches.staged(batch, self.num_samples) if early is None else early
        if not tokens:
            raise DataError("batch: no label to learn from: all of them are -100.")
        # A schedule's file may have another number of microbatches, which is refused before anything is changed.
        self.passes.plan(staged.num_microbatches, trains=True)
        masks = (int(x is not None) for x in (staged.whole.attention_mask, staged.whole.documents))
        self.placement_manager.before_step((staged.num_microbatches, staged.size, staged.whole.length, *masks))
        total = self.captured_step(staged, self._multiplies_in_8_bits)
        scale = self.loss_scale.scale
        norm, written = self._norm(written)
        norm = norm / scale
        result = HostCopy(torch.stack([total / tokens, norm]))
        self.stopwatch.mark("update")
        lr = self.lr
        self._update(norm, scale, written, total)
        if self.scaling is not None:
            self.scaling.end_step(found_inf(norm, total))
        self.num_samples += self.data.size * len(staged.whole.input_ids)
        self.batches.ahead = None  # it was that of this step
        try:
            if next_batch is not None:
                self.stopwatch.mark("data")
                self.batches.stage_ahead(next_batch(), self.num_samples)
                self.stopwatch.mark("update")  # a device that is stuck from here on is not stuck in "data"
        finally:  # the update has been launched, so the step counts; the device goes on with it
            loss, grad_norm = result.wait().tolist()
            outcome = self._end_step(loss, grad_norm)
        self._report(outcome, loss, grad_norm, partial(self._origin, staged))
        skipped = outcome is not Outcome.UPDATED
        found = StepResult(
            loss,
            None if skipped else grad_norm,
            lr,
            tokens,
            skipped=skipped,
            phases=self.stopwatch.read(),
            nonfinite_steps=self.steps.num_left_out,
        )
        self._start_next()
        return found

    def counters(self) -> dict[str, Any]:
        """Return what `EngineBase.counters` does, and the number of samples."""
        return super().counters() | {"samples": self.num_samples}

    def restore(self, counters: Mapping[str, Any], *, steps: Mapping[str, float] | None = None) -> None:
        """Do as `EngineBase.restore`. Where samples were not counted, each step had as many as the config says."""
        super().restore(counters, steps=steps)
        self.num_samples = counters.get("samples", self.num_steps * self.config.train.global_batch_size)

    def write_back(self) -> None:
        """Do as `EngineBase.write_back`."""
        super().write_back()
        self.captured_step.discard_early()  # for the parameters before

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """Return the mean loss over all counted labels of all batches, the same on every rank; NaN without a label.

        Every replica must give as many batches as the others. Raises DataError as `train_step` does, and ModelError
        where ranks have written different values into their parameters; NonFiniteError, with train.nonfinite='stop',
        for a loss that is not finite though there are labels.
        """
        self.agree_on("an evaluation")
        self.part.eval()
        total, tokens = 0.0, 0
        with self.memory_guard.explained(lambda: "an evaluation"), self.passes.casting(records=False):
            self.gatherer.begin()
            for batch in batches:
                self.agree_on("a batch of an evaluation")
                staged, count = self.batches.staged(batch, self.num_samples)
                tokens += count
                total += self.captured_step.beside(partial(self.passes.forwards, staged)).item()
            self.agree_on("the end of an evaluation")
            self.gatherer.end()
        if self.writes.is_on:  # now, since writes into parameters without values show when these are gathered
            self.writes.take_if_any()
        if tokens and not isfinite(total) and self.config.train.nonfinite == "stop":
            text = f"the loss of the validation samples is {total} after step {self.num_steps}."
            error = NonFiniteError(text, loss=total)
            error.phase = "an evaluation"
            raise error
        return total / tokens if tokens else float("nan")

    # -- parts of a step

    @property
    def _multiplies_in_8_bits(self) -> bool:
        """True from the first step on after which scales are known, with `train.precision="fp8"`."""
        return self.scaling is not None and self.scaling.state.is_known

    def _origin(self, staged: StagedBatch) -> str:
        """Run a step again that has updated nothing, and return where its first number was that is not finite."""
        self.captured_step.drop()  # its memory is needed
        first = FirstNotFinite(self.part, self.chunks, self.part.layer_names())

        def mark(phase: str, detail: object = "") -> None:
            """Note the stage and the microbatch of the runner's action."""
            if isinstance(detail, Action):
                first.stage, first.microbatch = detail.stage, detail.microbatch

        run = partial(self.passes.forwards_and_backwards, staged.on(self.mesh.device).microbatches, mark)
        return origin_of(
            run, first, chunks=self.chunks, gradients=self.gradients, mesh=self.mesh, compiles=self.config.train.compile
        )

    def _start_check(self) -> HostCopy:
        """Return the number of writes into parameters on all ranks, in flight.

        No code of a user runs within a step, so they can be counted before it. Before its update the host has the
        number, and needs not wait for the gradients.
        """
        if not self.writes.is_on:
            return HostCopy(torch.zeros(()))  # on the host, so that no device has to say it
        with self.captured_step.beside_early():
            return HostCopy(all_reduce(self.writes.changed(), self.mesh.world))

    def _norm(self, written: HostCopy | None) -> tuple[Tensor, HostCopy]:
        """Return the norm of the gradients, times the loss scale, and the number of writes into parameters, in flight.

        `written`: that number from `_start_check`; None where the all-reduce of the norm counts them too.
        """
        if written is not None:
            return global_norm(self.chunks, self.mesh.world), written
        self.writes.take_replaced()
        norm, num_written = norm_and_sum(self.chunks, self.mesh.world, self.writes.changed())
        return norm, HostCopy(num_written)
