"""One training step, composed: a plan, gradients, a norm, an update. Knows no model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.chunk import make_chunks
from parallel.collectives import all_reduce
from parallel.context import Context
from parallel.errors import DataError
from parallel.grad_norm import clip_coefficient, global_norm
from parallel.gradients import Gradients
from parallel.labels import IGNORED, shift
from parallel.layout import Piece
from parallel.loss_scale import LossScale
from parallel.lr_schedule import learning_rate
from parallel.optim import AdamW
from parallel.phases import Stopwatch
from parallel.pipeline.microbatch import Microbatch, problem_of
from parallel.pipeline.p2p import Pipe
from parallel.pipeline.runner import Runner
from parallel.pipeline.schedule import SCHEDULES, Plan, forward_only, with_transfers
from parallel.pipeline.stage import Stage
from parallel.pipeline.validate import validate
from parallel.tensor.layers import Linear
from parallel.transfer import HostCopy, to_device
from parallel.zero.gatherer import Gatherer


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank: `loss` is from before the update, `grad_norm` from before clipping,
    `tokens` the number of labels that the loss is the mean over. `phases` is what it took of this rank, in seconds."""

    loss: float
    grad_norm: float | None
    lr: float
    tokens: int
    skipped: bool = False
    phases: Mapping[str, float] = field(default_factory=dict, compare=False)


class Engine:
    """Trains one stage of a model in its place in the mesh.

    A batch is this replica's samples, micro × k of them, the same on every rank of the replica: `input_ids` [B, S], and
    optionally `labels` (−100: not counted; shifted inside; default: the inputs), `attention_mask`, and `sample_ids`
    [B], which number the samples over the run and key dropout (default: counted by step).
    """

    def __init__(self, stage: Stage, context: Context) -> None:
        self.stage, self.context, self.config = stage, context, context.config
        self.mesh = context.mesh
        self.data, self.pipe = self.mesh.axis("data"), Pipe(self.mesh.axis("pipe"), self.mesh.backward_pipe)
        zero = self.config.zero.stage
        self.chunks = make_chunks(stage.infos, context.dtype, zero=zero, fill=stage.fill)
        self.gatherer = Gatherer(stage.units, self.chunks)
        self.gradients = Gradients(self.chunks, scatters_each=zero >= 2)
        for module in stage.modules():
            if isinstance(module, Linear) and module.can_deliver:
                module.deliver = self.gradients.receiver(module.weight)
        self.optimizer = AdamW(self.chunks, self.config.optimizer, compiles=self.config.train.compile)
        self.stopwatch = Stopwatch(self.mesh.device)
        self._plans: dict[tuple[Callable[[int, int], Plan], int], Plan] = {}
        self.loss_scale = LossScale.for_precision(self.config.train.precision)
        self.step = 0  # steps taken, skipped ones too: the place in the data
        self.updates = 0  # those that were not skipped: the place in the learning rate's schedule

    def train_step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Forward and backward of all microbatches, one update; none on any rank where a gradient overflowed in fp16.

        Raises DataError, on every rank and before anything is changed, for a batch that cannot be used or has no label.
        """
        self.stopwatch.mark("data")
        self.stage.train()
        microbatches, tokens = self._microbatches(batch)
        if not tokens:
            raise DataError("batch: no label to learn from: all of them are -100.")
        self.gradients.begin(len(microbatches))
        self.gatherer.begin()
        runner = Runner(self.stage, self.pipe, microbatches, mark=self.stopwatch.mark)
        total = runner.run(self._plan(SCHEDULES[self.config.parallel.pipeline.schedule], len(microbatches)))
        self.stopwatch.mark("reduce")
        total = self._sum(total)
        self.gatherer.end()
        self.gradients.finish()
        scale = self.loss_scale.scale
        norm = global_norm(self.chunks, self.mesh.world) / scale
        result = HostCopy(torch.stack([total / tokens, norm]))
        self.stopwatch.mark("update")
        lr = learning_rate(self.config.lr_scheduler, self.config.optimizer.lr, self.updates, self.config.train.steps)
        overflow = self.loss_scale.is_dynamic and not norm.isfinite().item()  # of one norm, so all ranks agree
        if not overflow:
            self.optimizer.step(clip_coefficient(norm, self.config.train.clip_grad_norm) / scale, lr)
            self.updates += 1
        self.loss_scale.update(overflow=overflow)
        self.step += 1
        loss, grad_norm = result.wait().tolist()  # while the device updates, the host may go on to the next batch
        phases = self.stopwatch.read()
        return StepResult(loss, None if overflow else grad_norm, lr, tokens, skipped=overflow, phases=phases)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """The mean loss over all counted labels of all batches, the same on every rank; NaN where there are none.

        Replicas take part together: each must bring as many batches. Raises DataError as `train_step` does.
        """
        self.stage.eval()
        total, tokens = 0.0, 0
        self.gatherer.begin()
        for batch in batches:
            microbatches, count = self._microbatches(batch)
            tokens += count
            runner = Runner(self.stage, self.pipe, microbatches)
            total += self._sum(runner.run(self._plan(forward_only, len(microbatches)))).item()
        self.gatherer.end()
        return total / tokens if tokens else float("nan")

    def state(self) -> dict[str, list[Piece]]:
        """All that a step changes, as pieces of public tensors by kind: what a checkpoint saves and fills again."""
        return self.optimizer.pieces()

    def counters(self) -> dict[str, float]:
        """The numbers that a step changes: what a checkpoint saves beside `state`."""
        scale = self.loss_scale
        counts = {"step": self.step, "updates": self.updates}
        return counts | {"loss_scale": scale.scale, "good_steps": scale.good_steps}

    def restore(self, counters: Mapping[str, float]) -> None:
        """Go on from where `counters` were taken, the pieces of `state` having been filled with what they were then."""
        self.step, self.updates = int(counters["step"]), int(counters["updates"])
        self.optimizer.restore(self.updates)
        if self.loss_scale.is_dynamic:
            self.loss_scale.scale, self.loss_scale.good_steps = counters["loss_scale"], int(counters["good_steps"])

    def weights(self) -> list[Piece]:
        """The pieces that this rank owns of the model's weights, in master precision."""
        return self.optimizer.weights()

    # -- parts of a step

    def _microbatches(self, batch: Mapping[str, Tensor]) -> tuple[list[Microbatch], int]:
        """The batch on this rank's device, and the counted labels of all replicas' batches: they are known before the
        first forward, so that sums are divided once, globally. A batch that one replica refuses, all refuse.
        """
        size = self.config.train.micro_batch_size
        problem = problem_of(batch, size, self.stage.limits)
        labels = torch.empty(0) if problem else shift(batch.get("labels", batch["input_ids"]))
        sums = torch.tensor([(labels != IGNORED).sum(), problem is not None])  # on the host: nothing waits for a GPU
        tokens, refused = all_reduce(sums, self.data).tolist()
        if refused:
            raise DataError(f"batch: {problem or 'that of another replica was refused'}.")
        ids = batch["input_ids"]
        first = (self.step * self.data.size + self.data.rank) * len(ids)
        samples = batch.get("sample_ids", torch.arange(first, first + len(ids)))
        ids, labels, samples = (to_device(t.to(torch.int64), self.mesh.device) for t in (ids, labels, samples))
        mask = batch.get("attention_mask")
        mask = None if mask is None else to_device(mask.to(torch.int64), self.mesh.device)
        return Microbatch(ids, labels, samples, mask, scale=self.loss_scale.scale / max(1, tokens)).split(size), tokens

    def _sum(self, total: Tensor) -> Tensor:
        """The loss summed over every rank that speaks for its part of it, the same on all of them."""
        return all_reduce(total if self.stage.speaks else torch.zeros_like(total), self.mesh.world)

    def _plan(self, generate: Callable[[int, int], Plan], num_microbatches: int) -> Plan:
        key = generate, num_microbatches
        if key not in self._plans:
            self._plans[key] = with_transfers(generate(self.pipe.size, num_microbatches))
            validate(self._plans[key])
        return self._plans[key]
