"""What a step does to the weights, whatever computed their gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from parallel.activations.offload import InputsOnHost
from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import specs_of
from parallel.config import Config
from parallel.engine.context import Context
from parallel.errors import ConfigError
from parallel.layout.layout import ParameterInfo, Piece
from parallel.optim.adamw import AdamW
from parallel.optim.grad_norm import clip_coefficient
from parallel.optim.loss_scale import LossScale
from parallel.optim.lr_schedule import learning_rate
from parallel.optim.torch_optimizer import TorchOptimizer
from parallel.placement.initial import InitialPlacement, bytes_of, start
from parallel.placement.manager import PlacementManager
from parallel.storage.transfer import Tier

Optimizer: TypeAlias = AdamW | TorchOptimizer


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


def initial_placement_of(
    infos: Sequence[ParameterInfo], context: Context, *, num_microbatches: int = 0, is_torchs: bool = False
) -> InitialPlacement:
    """Where the chunks of these parameters will be at home, in steps of the config's number of microbatches or another;
    `is_torchs`: with an optimizer of torch's. Raises ConfigError, on every rank, where there is too little room.
    """
    config, place = context.config, context.place
    num_microbatches = num_microbatches or config.num_microbatches(place.world_size) or 2
    specs = specs_of(infos, context.dtype, zero=config.zero.stage)
    sizes = [bytes_of(spec, num_microbatches, config.optimizer, is_torchs=is_torchs) for spec in specs]
    return start(
        specs, sizes, config, world=context.mesh.world, peers=place.local_world_size, device=context.mesh.device
    )


def optimizer_of(chunks: Sequence[Chunk], config: Config, passed: torch.optim.Optimizer | None) -> Optimizer:
    """The one that was passed, divided, or else the config's. Raises ConfigError or ModelError for what cannot be."""
    if passed is None:
        return AdamW(chunks, config.optimizer, compiles=config.train.compile)
    if config.optimizer.state_dtype != "fp32":
        raise ConfigError(
            f"optimizer.state_dtype: {config.optimizer.state_dtype!r} is for the config's own AdamW; one that is passed"
            " keeps what it keeps. Try 'fp32', or pass no optimizer."
        )
    return TorchOptimizer(chunks, passed)


class EngineBase:
    """The chunks of a module's parameters, their optimizer, and all that a checkpoint must know of both."""

    def __init__(
        self,
        module: nn.Module,
        context: Context,
        chunks: Sequence[Chunk],
        optimizer: Optimizer,
        start: InitialPlacement,
    ) -> None:
        self.module, self.context, self.config, self.mesh = module, context, context.config, context.mesh
        self.data = self.mesh.axis("data")
        self.chunks, self.optimizer = list(chunks), optimizer
        self.placement_manager = PlacementManager(self.chunks, optimizer, self.config.zero, self.mesh.world, start)
        self.inputs: InputsOnHost | None = None  # of layers that are recomputed
        self.loss_scale = LossScale.for_precision(self.config.train.precision)
        self.num_steps = 0  # taken, skipped ones too: the place in the data
        self.num_updates = 0  # those that were not skipped: the place in the learning rate's schedule

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def eval(self) -> None:
        self.train(False)

    @property
    def lr(self) -> float:
        """The learning rate of the next update: that of an optimizer which was passed, else the config's schedule."""
        if isinstance(self.optimizer, TorchOptimizer):
            return self.optimizer.lr
        schedule, rate = self.config.lr_scheduler, self.config.optimizer.lr
        return learning_rate(schedule, rate, self.num_updates, self.config.train.steps)

    def state(self) -> dict[str, list[Piece]]:
        """All that a step changes, as pieces of public tensors by kind: what a checkpoint saves and fills again."""
        return self.optimizer.pieces()

    def state_pieces(self, *, owned: bool = False) -> list[Piece]:
        """The same in one list, each name with its kind before it; `owned`: only what this rank speaks for."""
        mine = {piece.name for piece in self.weights()} if owned else None
        return [
            Piece(f"{kind}/{piece.name}", piece.shape, piece.box, piece.data)
            for kind, pieces in self.state().items()
            for piece in pieces
            if mine is None or piece.name in mine
        ]

    def counters(self) -> dict[str, Any]:
        """What else a step changes, ready for JSON: what a checkpoint saves beside `state`."""
        scale = self.loss_scale
        counts: dict[str, Any] = {"step": self.num_steps, "updates": self.num_updates}
        counts |= {"loss_scale": scale.scale if scale.is_dynamic else None, "good_steps": scale.good_steps}
        return counts | {"placement": self.placement_manager.state()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Go on from where `counters` were taken, the pieces of `state` having been filled with what they were then."""
        self.num_steps, self.num_updates = int(counters["step"]), int(counters["updates"])
        self.optimizer.restore(self.num_updates)
        self.placement_manager.restore(counters.get("placement", {}))
        if self.loss_scale.is_dynamic and counters["loss_scale"] is not None:  # in fp16 before, too
            self.loss_scale.scale, self.loss_scale.good_steps = counters["loss_scale"], int(counters["good_steps"])

    def weights(self) -> list[Piece]:
        """The pieces that this rank owns of the model's weights, in master precision."""
        for chunk in self.chunks:
            chunk.settle()
        return [piece for chunk in self.chunks if chunk.spec.is_owner for piece in chunk.spec.pieces(chunk.master)]

    def held(self) -> dict[Tier, int]:
        """The bytes of this rank's model data on each tier, between two steps: parameters, the memory for gradients on
        the host, masters and moments, and what states on a disk go through.
        """
        found = dict.fromkeys(Tier, 0)
        for tier, x in [*self.optimizer.held(), *(pair for chunk in self.chunks for pair in chunk.held())]:
            found[tier] += min(x.nbytes, x.untyped_storage().nbytes())
        for disk in {chunk.memory.disk for chunk in self.chunks if chunk.memory.disk is not None}:
            found[Tier.HOST] += disk.buffer_bytes
        return found

    def _update(self, norm: Tensor, divisor: float) -> bool:
        """Update every weight by its gradient / `divisor`, clipped by that gradient's `norm`: on no rank where it
        overflowed in fp16, which is the answer.
        """
        self.placement_manager.before_update()
        overflow = self.loss_scale.is_dynamic and not norm.isfinite().item()  # of one norm, so all ranks agree
        if not overflow:
            self.optimizer.step(clip_coefficient(norm, self.config.train.clip_grad_norm) / divisor, self.lr)
            self.num_updates += 1
        self.loss_scale.update(overflow=overflow)
        self.num_steps += 1
        return overflow
