"""The sections of a config: every key with its type, default, bounds and meaning, and the checks of several keys."""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from parallel.config.model import ModelConfig
from parallel.config.parallel import ParallelConfig
from parallel.config.reader import Bytes, Count, Natural, PathText, Probability, Range
from parallel.errors import either, nearest_multiples, times

Fraction = Annotated[float, Range(0, 1)]
"""A share of something: 0 and 1 are allowed."""

NO_DOCUMENTS_IN_A_RING = (
    "parallel.context of kind 'ring' does not keep attention within documents. Try parallel.context.kind='all_to_all',"
    " or parallel.context.size=1"
)
"""The reason for which a ring refuses documents: the end of a message."""

MOST_MICROBATCHES = 2**16  # of a step on each replica, since a plan lists every one of them

FP8_MIN_ELEMENTS = 1280 * 1280
"""The smallest weight that gained from 8 bits when it was measured: with 8,192 tokens on one H200 its linear took 123
us, casts included, and 132 us in bf16. One of 1152 × 1152 took 110 us and 109 us (`python -m benchmarks.fp8_linears`).
"""

Dtype = Literal["fp64", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class DataConfig:
    """The section `data`: a corpus is a row of tokens, cut into samples of `sequence_length` (docs/data.md)."""

    path: PathText = "python-docs"
    """python-docs (Python's manual, which every installation has), or a file or folder of texts, records or token ids:
    docs/data.md lists the kinds.
    """

    text_key: str = "text"
    """The key of the text in records of .jsonl, .parquet and saved datasets."""

    bin_dtype: Literal["uint16", "uint32"] = "uint16"
    """The dtype of the token ids in FILE.bin, which has no header."""

    tokenizer: PathText = "bytes"
    """"bytes" (the id of a byte is the byte + 4: a vocabulary of 260), "bpe" (built in too: 4,096 ids, by the package
    `tokenizers`), or a tokenizer.json, or a folder with one.
    """

    sequence_length: Annotated[int, Range(2, 2**40)] = 256
    """The tokens of a sample, S. At least 2, since a label is the next token."""

    shuffle: bool = True
    """True: each epoch has the samples in an order of its own, drawn from `train.seed`. False: in the order of the
    corpus.
    """

    validation_fraction: Probability = 0.05
    """The share of samples, at the end of the corpus, that are kept from training for validation. 0: none."""

    validation_path: PathText | None = None
    """Data for validation, of any kind that `path` has; then all samples of `path` are trained on."""

    document_mask: bool = False
    """True: in a sample with several documents a token attends only to tokens of its own document, and positions begin
    anew with each document.
    """


@dataclass(frozen=True)
class ZeroConfig:
    """The section `zero`: what is divided over replicas (ZeRO), and where each rank keeps its part."""

    stage: Literal[0, 1, 2, 3] = 0
    """The tensors that are divided over replicas. 0: none. 1: master weights and optimizer states. 2: gradients too. 3:
    parameters too; a layer's are gathered while it computes. A higher stage takes less memory, and from 2 on
    communicates more. The results are the same.
    """

    tensor_placement_policy: Literal["cuda", "cpu", "auto"] = "cuda"
    """The place of parameters, gradients and optimizer states. "cuda": the device. "cpu": the host; a layer is copied
    to the device when it is needed. "auto": on the device as far as there is room beside activations, which
    the first steps measure; the rest on the host.
    """

    gpu_margin_mem_ratio: Fraction = 0.8
    """The share of the device's free memory that optimizer states may take, with "auto"; parameters get the rest.
    States come first, because copies of them cannot be hidden behind computation.
    """

    device_memory: Bytes | None = None
    """The most bytes of the device, such as "6GiB": its allocator is limited to them. None: all that the device has."""

    host_memory: Bytes | None = None
    """The most bytes that a rank's parameters, gradients and states may take on the host, such as "100GiB". None: a
    rank's share of what is available there. Not for "cuda".
    """

    nvme_dir: PathText | None = None
    """A folder on a fast disk, for the optimizer states that `host_memory` has no room for. None: what does not fit is
    refused. Not for "cuda".
    """

    def problems(self) -> list[str]:
        """Return which fields are set although everything is kept on the device."""
        given = dict(host_memory=self.host_memory, nvme_dir=self.nvme_dir)
        return [
            f"zero.{key}: {value!r} with tensor_placement_policy 'cuda', which keeps everything on the device. Try"
            f" tensor_placement_policy='auto' or 'cpu', or {key}=None."
            for key, value in given.items()
            if value is not None and self.tensor_placement_policy == "cuda"
        ]


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """When a run ends before its last step."""

    patience: Count = 3
    """The number of evaluations in a row without a new lowest validation loss, after which the run ends."""


@dataclass(frozen=True)
class TrainConfig:
    """The section `train`: how long, in which batches, in which precision, and on which device."""

    steps: Count = 100
    """The number of updates. A run that resumes goes on to this number; it does not begin to count again."""

    epochs: Annotated[float | None, Range(2**-20, 2**20)] = None
    """The number of passes over the training samples, instead of `steps`, which are computed when the data are read."""

    global_batch_size: Count = 16
    """The samples of a step, over all replicas: micro_batch_size × data parallel size × the number of microbatches."""

    micro_batch_size: Count = 2
    """The samples that one replica puts through the model, or the pipeline, at a time. It must divide by the parts into
    which the tensor mode splits a microbatch: depth × rows, or the square of the cube's edge.
    """

    precision: Literal["fp64", "fp32", "bf16", "fp16", "fp8"] = "fp32"
    """The dtype of parameters and activations. With bf16 and fp16, master weights and optimizer states are fp32, and
    gradients are added up in fp32; fp16 also has a dynamic loss scale. fp64 is for comparisons. "fp8" is bf16 in which
    the linears of the blocks multiply numbers of 8 bits (docs/precision.md); it needs a GPU of compute capability 8.9,
    and a CPU emulates it.
    """

    fp8_min_elements: Natural = FP8_MIN_ELEMENTS
    """The elements of the smallest weights that multiply in 8 bits with "fp8"; smaller ones stay in bf16. A weight
    counts whole in every layout, and q, k and v are one, as gate and up are. 0: all linears of blocks.
    """

    clip_grad_norm: Annotated[float | None, Range(0)] = 1.0
    """The largest 2-norm of the whole model's gradient: a larger gradient is scaled down to it, as torch does. None or
    0: no clipping.
    """

    activation_checkpointing: Literal["none", "full", "offload"] = "none"
    """The activations that a block keeps for backward. "none": all that its backward needs. "full": its input alone;
    backward computes the block again. "offload": the same, with the input on the host meanwhile.
    """

    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    """The seed of weights, of the order of data, and of dropout. One seed gives one model in every layout."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"cuda": a GPU for each rank; ranks share GPUs where a host has more ranks than GPUs. "cpu". "auto": "cuda" if
    torch sees a GPU, else "cpu".
    """

    compile: bool = False
    """True: blocks go through torch.compile, for faster steps after a slow first one. It needs Triton on a GPU, a C++
    compiler on a CPU. To train on a GPU in bf16, fp16 or fp8 there are faster kernels, to which blocks are left; there
    it compiles attention that torch has no kernel for, and blocks that generate.
    """

    timeout_seconds: Count = 600
    """The seconds after which a rank that others wait for is named, and the run ends. A rank that saves, loads or
    compiles is waited for as long as its process runs; one that has ended is named at once.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not a finite number updates nothing. "stop": the run ends, and says where the
    number came from. "skip": the step is left out and counted; ten in a row end the run. (An fp16 gradient that
    overflows only lowers the loss scale, until that is 1.)
    """

    early_stopping: EarlyStoppingConfig | None = None
    """dict(patience=3): end the run once the validation loss no longer falls. It needs output.eval_every."""

    @property
    def dtype(self) -> Dtype:
        """The dtype of parameters and activations: bf16 where linears multiply in 8 bits, else the precision."""
        return "bf16" if self.precision == "fp8" else self.precision

    def multiplies_in_8_bits(self, elements: int) -> bool:
        """Return whether a linear of a block, whose whole weight has this many elements, multiplies in 8 bits."""
        return self.precision == "fp8" and elements >= self.fp8_min_elements


@dataclass(frozen=True)
class OptimizerConfig:
    """The section `optimizer`: AdamW, in which only matrices decay, not biases and LayerNorms."""

    lr: Annotated[float, Range(0)] = 6e-4
    """The learning rate after the warm-up."""

    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """The decay rates of the first and of the second moment, for each step."""

    eps: Annotated[float, Range(0)] = 1e-8
    """The number added to the square root of the second moment, by which the update is divided."""

    weight_decay: Annotated[float, Range(0)] = 0.1
    """The share of a matrix, times the learning rate, that each step takes away from it."""

    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of the two moments. "fp32": the dtype of the master weights, which is fp64 in an fp64 run. "bf16": two
    bytes each, with stochastic rounding: 8 bytes of master weight and moments for each parameter instead of 12.
    """


@dataclass(frozen=True)
class SchedulerConfig:
    """The section `lr_scheduler`: the learning rate rises to `optimizer.lr` in a line, then falls to min_ratio × lr."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """The curve of the fall, which ends with the last step. "constant": it does not fall."""

    warmup_steps: Natural = 10
    """The steps in which the rate rises from 0. If the run has fewer steps, it ends while the rate still rises."""

    min_ratio: Fraction = 0.1
    """The last learning rate as a share of `optimizer.lr`. It is not used with "constant"."""


@dataclass(frozen=True)
class OutputConfig:
    """The section `output`: what a run writes, and how often."""

    dir: PathText = "runs/{name}"
    """The run's folder; {name} becomes the name of the config file without its ending. An earlier run there is renamed,
    unless it is resumed.
    """

    log_every: Count = 1
    """The number of steps from one printed line to the next, where there is no terminal. metrics.jsonl has each step.
    """

    eval_every: Natural = 0
    """The number of steps from one validation loss to the next; one is also taken after the last step. 0: only then."""

    checkpoint_every: Natural = 0
    """The number of steps from one checkpoint to the next. 0: no checkpoints."""

    keep_checkpoints: Count = 2
    """The number of checkpoints that are kept; older ones are deleted after a newer one is complete."""

    keep_best: bool = False
    """True: the checkpoint of the lowest validation loss is kept beside these. It needs `eval_every`."""

    checkpoint_async: bool = True
    """True: a checkpoint is written in the background, from a copy of the state on the host. False: training waits."""

    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """The programs that metrics are logged to, beside metrics.jsonl."""

    callbacks: tuple[str, ...] = ()
    """Callbacks of yours, as "module:Class" or "FILE.py:Class". A module is searched in the working directory, beside
    the config, and among the installed packages.
    """

    export: bool = True
    """True: the final model is written as a Hugging Face directory."""

    export_dtype: Dtype | None = None
    """The dtype of the exported weights. None: fp64 for an fp64 run, else fp32, the dtype of the master weights."""


@dataclass(frozen=True)
class Config:
    """All of a config. What a file leaves out has its default."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = ZeroConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    output: OutputConfig = OutputConfig()

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas: world size ÷ the ranks of one replica."""
        return world_size // self.parallel.model_size

    def num_microbatches(self, world_size: int) -> int:
        """Return the microbatches of a step on each replica: k in global = micro × data × k."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))

    def to_dict(self) -> dict[str, Any]:
        """Return the config as dicts, lists, numbers and text for JSON; `parse` reads it back to an equal config.

        It has `train.epochs` or `train.steps`, whichever was given.
        """
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.train.epochs is not None:  # the number of steps follows from it, and a config has one of the two
            del plain["train"]["steps"]
        fields_of_family = plain["model"].pop("fields")
        plain["model"].update(fields_of_family)
        return plain

    def evaluation_problems(self) -> list[str]:
        """Return which keys need a validation loss that this config never computes."""
        every, data = self.output.eval_every, self.data
        wants = {"output.keep_best": self.output.keep_best, "train.early_stopping": self.train.early_stopping}
        missing = []
        if not every:
            missing.append("output.eval_every, which is 0. Try output.eval_every=50")
        if not data.validation_fraction and data.validation_path is None:
            missing.append("validation samples, and data.validation_fraction is 0. Try data.validation_fraction=0.05")
        return [
            f"{key}: it needs {what}, or {key}={False if value is True else None}."
            for key, value in wants.items()
            for what in missing
            if value
        ]

    def document_problems(self) -> list[str]:
        """Return what is wrong if attention is to stay within documents and sequences are split in a ring."""
        context = self.parallel.context
        if self.data.document_mask and context.size > 1 and context.kind == "ring":
            return [f"data.document_mask: {NO_DOCUMENTS_IN_A_RING}, or data.document_mask=False."]
        return []

    def precision_problems(self) -> list[str]:
        """Return what is wrong if linears are to multiply in 8 bits where there are no such products."""
        if self.train.precision == "fp8" and self.parallel.tensor.overlap:
            return [
                "parallel.tensor.overlap: True multiplies in slices, of which there are none in 8 bits, and"
                " train.precision is 'fp8'. Try overlap=False, or train.precision='bf16'."
            ]
        return []

    def microbatch_problems(self) -> list[str]:
        """Return what is wrong if the tensor mode cannot split a microbatch into equal parts."""
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
        """Return what is wrong if the batch is not a whole number of microbatches on each replica."""
        found = []
        micro, total = self.train.micro_batch_size, self.train.global_batch_size
        data = 1 if world_size is None else self.data_parallel_size(world_size)
        if total % (micro * data):
            product = times(micro_batch_size=micro) if world_size is None else times(micro_batch_size=micro, data=data)
            tries = either(nearest_multiples(total, micro * data))
            found.append(f"train.global_batch_size: {total} is not a multiple of {product}. Try {tries}.")
        elif total // (micro * data) > MOST_MICROBATCHES:
            found.append(
                f"train.global_batch_size: {total} is {total // (micro * data)} microbatches of {micro} on each of"
                f" {data} replicas; a step can have {MOST_MICROBATCHES}. Try {MOST_MICROBATCHES * micro * data}."
            )
        elif world_size is not None and (file := self.parallel.pipeline.file) is not None:
            count, needed = total // (micro * data), file.plan.num_microbatches
            if count != needed:
                found.append(
                    f"train.global_batch_size: {total} is {count} microbatch{'es' if count > 1 else ''} of {micro} on"
                    f" {f'each of {data} replicas' if data > 1 else 'one replica'}, and parallel.pipeline.schedule"
                    f" {self.parallel.pipeline.schedule} has {needed}."
                    f" Try {needed * micro * data}."
                )
        return found
