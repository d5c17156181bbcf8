"""The sections of a config: every key, its type, default and bounds; and the arithmetic that ties them together."""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from parallel.config.parallel import ParallelConfig
from parallel.config.reader import Bytes, Count, Natural, Range
from parallel.errors import either, nearest_multiples, times

Fraction = Annotated[float, Range(0, 1)]
Probability = Annotated[float, Range(0, 1, open=True)]
Dtype = Literal["fp64", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ModelConfig:
    """A named size or a Hugging Face directory, and what to change in it: None is 'as the name or the path says'."""

    name: str = "opt-tiny"
    path: str | None = None
    vocab_size: Count | None = None
    hidden_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    ffn_dim: Count | None = None
    max_position_embeddings: Count | None = None
    word_embed_proj_dim: Count | None = None
    do_layer_norm_before: bool | None = None
    remove_final_layer_norm: bool | None = None
    dropout: Probability | None = None
    attention_dropout: Probability | None = None
    activation_function: str | None = None
    enable_bias: bool | None = None
    layer_norm_elementwise_affine: bool | None = None
    init_std: Annotated[float, Range(0)] | None = None
    pad_token_id: Natural | None = None
    bos_token_id: Natural | None = None
    eos_token_id: Natural | None = None
    layerdrop: Probability | None = None
    tie_word_embeddings: bool | None = None


@dataclass(frozen=True)
class DataConfig:
    path: str = "python-docs"
    tokenizer: str = "bytes"
    sequence_length: Annotated[int, Range(2)] = 256
    shuffle: bool = True
    validation_fraction: Probability = 0.05


@dataclass(frozen=True)
class ZeroConfig:
    stage: Literal[0, 1, 2, 3] = 0
    tensor_placement_policy: Literal["cuda", "cpu", "auto"] = "cuda"
    gpu_margin_mem_ratio: Fraction = 0.8
    device_memory: Bytes | None = None
    host_memory: Bytes | None = None  # None: a rank's share of what its host has
    nvme_dir: str | None = None

    def problems(self) -> list[str]:
        """What has no meaning where everything is on the device."""
        given = dict(host_memory=self.host_memory, nvme_dir=self.nvme_dir)
        return [
            f"zero.{key}: {value!r} with tensor_placement_policy 'cuda', which keeps everything on the device. Try"
            f" tensor_placement_policy='auto' or 'cpu', or {key}=None."
            for key, value in given.items()
            if value is not None and self.tensor_placement_policy == "cuda"
        ]


@dataclass(frozen=True)
class TrainConfig:
    steps: Count = 100
    global_batch_size: Count = 16
    micro_batch_size: Count = 2
    precision: Dtype = "fp32"
    clip_grad_norm: Annotated[float | None, Range(0)] = 1.0  # None or 0: off
    activation_checkpointing: Literal["none", "full", "offload"] = "none"
    seed: Natural = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; decay on matrices only. `state_dtype` is that of its moments: fp32 means as wide as the masters."""

    lr: Annotated[float, Range(0)] = 6e-4
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: Annotated[float, Range(0)] = 1e-8
    weight_decay: Annotated[float, Range(0)] = 0.1
    state_dtype: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class SchedulerConfig:
    """Warm-up to lr, then down to min_ratio × lr; a warm-up longer than the run is cut off by its end."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Natural = 10
    min_ratio: Fraction = 0.1


@dataclass(frozen=True)
class OutputConfig:
    dir: str = "runs/{name}"
    log_every: Count = 1
    eval_every: Natural = 0  # 0: only after the last step
    checkpoint_every: Natural = 0  # 0: never
    keep_checkpoints: Count = 2
    export: bool = True
    export_dtype: Dtype | None = None


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = ZeroConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    output: OutputConfig = OutputConfig()

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.parallel.model_size

    def num_microbatches(self, world_size: int) -> int:
        """k in: global = micro × data × k."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `parse` reads it back to an equal config."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def microbatch_problems(self) -> list[str]:
        """Whether a microbatch comes out even over the tensor mode."""
        found = []
        micro = self.train.micro_batch_size
        parts = self.parallel.tensor.batch_parts
        if micro % parts:
            names = "w × i" if self.parallel.tensor.mode == "3d" else "depth × rows"
            found.append(
                f"train.micro_batch_size: {micro} is not a multiple of {names} = {parts}, the parts that tensor mode"
                f" {self.parallel.tensor.mode!r} splits it into. Try {either(nearest_multiples(micro, parts))}."
            )
        return found

    def batch_problems(self, world_size: int | None) -> list[str]:
        """Whether the batch comes out even over replicas and microbatches."""
        found = []
        micro, total = self.train.micro_batch_size, self.train.global_batch_size
        data = 1 if world_size is None else self.data_parallel_size(world_size)
        if total % (micro * data):
            product = times(micro_batch_size=micro) if world_size is None else times(micro_batch_size=micro, data=data)
            tries = either(nearest_multiples(total, micro * data))
            found.append(f"train.global_batch_size: {total} is not a multiple of {product}. Try {tries}.")
        return found
