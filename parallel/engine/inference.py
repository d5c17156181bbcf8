"""Forwards of a model in stages, in any layout, without gradients and optimizer states. It knows no model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import make_chunks
from parallel.chunk.spec import specs_of
from parallel.config import Config, PipelineConfig
from parallel.engine.context import Context
from parallel.errors import ConfigError, shown
from parallel.mesh.collectives import MAX, all_reduce
from parallel.mesh.mesh import Mesh
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.p2p import Pipe, start_receive, start_send
from parallel.pipeline.part import ModelPart
from parallel.sequence.cache import KeyValueCache
from parallel.zero.gatherer import Gatherer


class Inference:
    """The weights of this rank's stages, and forwards of them.

    Parameters have the model's dtype and nothing beside them: no master weights, gradients or moments. In ZeRO stage 3
    each replica has a slice of every parameter, and a layer's are gathered while it computes; the other stages divide
    only what does not exist here. Raises ConfigError for a layout that it cannot run, see `refuse`.
    """

    def __init__(self, part: ModelPart, context: Context) -> None:
        refuse(context.config)
        self.part, self.context = part.eval(), context
        for info in part.infos:
            info.parameter.requires_grad_(False)
        zero = 3 if context.config.zero.stage == 3 else 0
        specs = specs_of(part.infos, context.dtype, zero=zero)
        self.chunks = make_chunks(specs, fill=part.set_initial_values, device=context.device)
        self.pipe = Pipe(self.mesh.axis("pipe"), self.mesh.links)
        self.pipe.connect(context.device)
        self.gathers = any(chunk.is_gathered_on_demand for chunk in self.chunks)
        self.gatherer = (
            Gatherer(part.units, self.chunks, watcher=_NoWatcher(), last=part.last_units()) if self.gathers else None
        )

    @property
    def mesh(self) -> Mesh:
        """The mesh of the context."""
        return self.context.mesh

    @property
    def pipeline(self) -> PipelineConfig:
        """The pipeline's config, which says where each stage is."""
        return self.context.config.parallel.pipeline

    @property
    def is_last(self) -> bool:
        """True on the rank of the last pipeline stage, which has the head."""
        return self.pipeline.num_stages - 1 in self.part.stages

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The layers of this rank's stages, in order, without the head."""
        layers = list(self.part.layers)
        return layers[:-1] if self.is_last else layers

    @property
    def head(self) -> nn.Module:
        """The last layer of the last stage, which makes logits of what `forward` returns on its rank."""
        return self.part.layers[-1]

    def begin(self) -> None:
        """Make available what is not gathered layer by layer; every rank calls this before its first forward."""
        if self.gatherer is not None:
            self.gatherer.begin()

    def end(self) -> None:
        """Release what `begin` has made available."""
        if self.gatherer is not None:
            self.gatherer.end()

    def forward(self, batch: Microbatch, caches: Sequence[KeyValueCache]) -> Tensor | None:
        """Return the output x[B_batch, S, H_hidden] of the last block, on the rank of the last stage; None on others.

        `caches`: one for each of `layers`. Every rank of a replica calls this with the same batch and, where parameters
        are gathered on demand, every replica with one of its own.
        """
        cache_of = dict(zip(self.layers, caches, strict=True))
        x: Tensor | None = None
        for stage, layers in self.part.stages.items():
            if self.gatherer is not None:
                self.gatherer.start_pass()
            x = x if stage == 0 or stage - 1 in self.part.stages else self._receive(stage, batch)
            for layer in layers:
                if layer in cache_of:  # all but the head
                    x = layer(x, replace(batch, cache=cache_of[layer]))
            if stage + 1 < self.pipeline.num_stages and stage + 1 not in self.part.stages:
                assert x is not None
                to = self.pipeline.rank_of(stage + 1)
                start_send(x, self.pipe.link(self.pipe.rank, to), to).wait()
        return x if self.is_last else None

    def from_last_stage(self, x: Tensor) -> Tensor:
        """Return what the rank of the last stage has as x, on every rank; the others give a tensor of its shape."""
        return all_reduce(x if self.is_last else torch.zeros_like(x), self.mesh.axis("pipe"))

    def agreed_maximum(self, value: int) -> int:
        """Return the largest value of the replicas that must forward together with this one."""
        if not self.gathers:
            return value
        return int(all_reduce(torch.tensor(int(value)), self.mesh.axis("data"), MAX))

    def _receive(self, stage: int, batch: Microbatch) -> Tensor:
        """Return the input of a stage, which the rank of the previous one sends."""
        interface, source = self.part.interface, self.pipeline.rank_of(stage - 1)
        like = torch.empty(0, dtype=interface.dtype, device=self.context.device)
        shape = interface.activation_shape(*batch.input_ids.shape)
        return start_receive(shape, like, self.pipe.link(source, self.pipe.rank), source).wait()


class _NoWatcher:
    """An observer of waits for parameters that observes nothing."""

    def using(self, unit: str, *, backward: bool) -> AbstractContextManager[None]:
        return nullcontext()


def context_problem(size: object) -> str:
    """Return why sequences cannot be split over ranks."""
    return (
        f"parallel.context.size: {shown(size)} splits a sequence, and a new token is a single position. Try 1, and"
        " parallel.tensor or parallel.pipeline to split the model."
    )


def refuse(config: Config) -> None:
    """Raise ConfigError for a layout in which texts cannot be continued."""
    problems = []
    if (size := config.parallel.context.size) > 1:
        problems.append(context_problem(size))
    if config.parallel.tensor.length_parts > 1:
        problems.append(
            "parallel.tensor.sequence_parallel: True splits a sequence, and a new token is a single position. Try"
            " False."
        )
    if (policy := config.zero.tensor_placement_policy) != "cuda":
        problems.append(
            f"zero.tensor_placement_policy: {policy!r} is for training, whose states it offloads. Try 'cuda', and"
            " zero.stage=3 where a replica's device is too small."
        )
    if problems:
        raise ConfigError(*problems)
