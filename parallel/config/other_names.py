"""Keys that other programs have, and keys in the wrong section: which key a user probably means."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from parallel.errors import did_you_mean, shortened, shown

# The names that Hugging Face's Trainer, torchtitan, nanoGPT, DeepSpeed and Megatron-LM use, and the keys here.
OTHER_NAMES = {
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "batch_size": "train.global_batch_size",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "bf16": "train.precision='bf16'",
    "block_size": "data.sequence_length",
    "chunks": "parallel.pipeline.chunks",
    "context_parallel_degree": "parallel.context",
    "context_parallel_size": "parallel.context",
    "cpu_offload": "zero.tensor_placement_policy='cpu'",
    "dataset": "data.path",
    "decay_lr": "lr_scheduler.kind",
    "decoder_first_pipeline_num_layers": "parallel.pipeline.layers, the blocks of each stage",
    "decoder_last_pipeline_num_layers": "parallel.pipeline.layers, the blocks of each stage",
    "dropout": "model.dropout",
    "dtype": "train.precision",
    "early_stopping_patience": "train.early_stopping=dict(patience=...)",
    "enable_fp8_linear": "train.precision='fp8'",
    "enable_zero_bubble": "parallel.pipeline.schedule='zero_bubble'",
    "eval_interval": "output.eval_every",
    "eval_steps": "output.eval_every",
    "ffn_dim": "model.ffn_dim",
    "fp16": "train.precision='fp16'",
    "fp8": "train.precision='fp8'",
    "fp8_format": "train.precision='fp8'",
    "fp8_recipe": "train.precision='fp8'",
    "grad_clip": "train.clip_grad_norm",
    "gradient_checkpointing": "train.activation_checkpointing='full'",
    "gradient_clipping": "train.clip_grad_norm",
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "layers_per_stage": "parallel.pipeline.layers, the blocks of each stage",
    "learning_rate": "optimizer.lr",
    "load_best_model_at_end": "output.keep_best",
    "logging_steps": "output.log_every",
    "lr_scheduler_type": "lr_scheduler.kind",
    "max_grad_norm": "train.clip_grad_norm",
    "max_iters": "train.steps",
    "max_norm": "train.clip_grad_norm",
    "max_position_embeddings": "model.max_position_embeddings",
    "max_seq_len": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "max_steps": "train.steps",
    "micro_batch": "train.micro_batch_size",
    "min_lr": "lr_scheduler.min_ratio, a share of optimizer.lr",
    "mixed_precision": "train.precision",
    "model_name_or_path": "model.path",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_attention_heads",
    "n_layer": "model.num_hidden_layers",
    "num_attention_heads": "model.num_attention_heads",
    "num_epochs": "train.epochs",
    "num_hidden_layers": "model.num_hidden_layers",
    "num_key_value_heads": "model.num_key_value_heads",
    "num_layers_in_first_pipeline_stage": "parallel.pipeline.layers, the blocks of each stage",
    "num_layers_in_last_pipeline_stage": "parallel.pipeline.layers, the blocks of each stage",
    "num_layers_per_virtual_pipeline_stage": "parallel.pipeline.chunks, with schedule='interleaved'",
    "num_model_chunks": "parallel.pipeline.chunks, with schedule='interleaved'",
    "num_train_epochs": "train.epochs",
    "num_virtual_stages_per_pipeline_rank": "parallel.pipeline.chunks, with schedule='interleaved'",
    "out_dir": "output.dir",
    "output_dir": "output.dir",
    "overlap": "parallel.tensor.overlap",
    "partition_method": "parallel.pipeline.layers, the blocks of each stage",
    "patience": "train.early_stopping=dict(patience=...)",
    "per_device_train_batch_size": "train.micro_batch_size",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pipeline_parallel_degree": "parallel.pipeline",
    "pipeline_parallel_layers_per_stage": "parallel.pipeline.layers, the blocks of each stage",
    "pipeline_parallel_microbatch_size": "train.micro_batch_size",
    "pipeline_parallel_schedule": "parallel.pipeline.schedule",
    "pipeline_parallel_schedule_csv": "parallel.pipeline.schedule='FILE.csv'",
    "pipeline_parallel_size": "parallel.pipeline",
    "pipeline_parallel_split_points": "parallel.pipeline.layers, the blocks of each stage",
    "pp": "parallel.pipeline",
    "pp_size": "parallel.pipeline",
    "pp_style": "parallel.pipeline.schedule",
    "report_to": "output.loggers",
    "save_steps": "output.checkpoint_every",
    "save_total_limit": "output.keep_checkpoints",
    "seq_len": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "sequence_parallel": "parallel.tensor.sequence_parallel",
    "tensor_model_parallel_size": "parallel.tensor.size, with mode='1d'",
    "tensor_parallel_degree": "parallel.tensor.size, with mode='1d'",
    "tensor_parallel_size": "parallel.tensor.size, with mode='1d'",
    "torch_compile": "train.compile",
    "tp": "parallel.tensor.size, with mode='1d'",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "use_bf16": "train.precision='bf16'",
    "use_fp16": "train.precision='fp16'",
    "use_fp8": "train.precision='fp8'",
    "virtual_pipeline_model_parallel_size": "parallel.pipeline.chunks, with schedule='interleaved'",
    "virtual_pipeline_parallel_size": "parallel.pipeline.chunks, with schedule='interleaved'",
    "vocab_size": "model.vocab_size",
    "warmup_iters": "lr_scheduler.warmup_steps",
    "world_size": "not a key: it is the number of processes that torchrun or --nprocs starts",
    "zero_bubble_v_schedule": "parallel.pipeline.schedule='zero_bubble_v'",
    "zero_optimization": "zero",
    "zero_stage": "zero.stage",
}

OTHER_DTYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bfloat16": ("bf16",),
        "double": ("fp64",),
        "e4m3": ("fp8", "bf16"),
        "float": ("fp32",),
        "float16": ("fp16",),
        "float32": ("fp32",),
        "float64": ("fp64",),
        "float8": ("fp8", "bf16"),
        "float8_e4m3fn": ("fp8", "bf16"),
        "fp8": ("fp8", "bf16"),
        "half": ("fp16", "bf16"),
        "mxfp8": ("fp8", "bf16"),
    }
)
"""The dtypes of torch, torchao and Transformer Engine, and the nearest ones here: the first that a key allows."""

OTHER_SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "1f1bflush": "1f1b",
        "allforwardallbackward": "gpipe",
        "dapple": "1f1b",
        "dualpipe": "zero_bubble_v",
        "dualpipev": "zero_bubble_v",
        "fthenb": "gpipe",
        "interleaved1f1b": "interleaved",
        "interleavedzerobubble": "zero_bubble",
        "interleaving": "interleaved",
        "loopedbfs": "interleaved",
        "onefoneb": "1f1b",
        "pipedream": "1f1b",
        "pipedreamflush": "1f1b",
        "trainschedule": "1f1b",
        "virtualpipeline": "interleaved",
        "vpp": "interleaved",
        "vschedule": "zero_bubble_v",
        "zb": "zero_bubble",
        "zb1p": "zero_bubble",
        "zb2p": "zero_bubble",
        "zbh1": "zero_bubble",
        "zbh2": "zero_bubble",
        "zbv": "zero_bubble_v",
        "zbvzerobubble": "zero_bubble_v",
        "zerobubbleh1": "zero_bubble",
        "zerobubblev": "zero_bubble_v",
    }
)
"""The schedules of torch, Megatron-LM, DeepSpeed, Colossal-AI and papers, and the nearest one here."""

ACCUMULATION = (
    "gradient_accumulation_steps",
    "gradient_accumulation",
    "grad_accumulation_steps",
    "accumulate_grad_batches",
)


def advice(path: tuple[str, ...], known: Iterable[str], sections: Mapping[str, Iterable[str]]) -> str:
    """Return what is said about an unknown key, whose section knows the keys `known`.

    `sections` has the keys of every top-level section.
    """
    name = path[-1]
    what = "section" if len(path) == 1 else "key"
    plain = name.lower().replace("-", "_")
    if plain in OTHER_NAMES:
        return f"unknown {what}. Here it is {OTHER_NAMES[plain]}."
    places = [f"{section}.{name}" for section, keys in sections.items() if name in keys]
    if places:
        return f"unknown {what}. Did you mean {places[0]}?"
    return f"unknown {what}. {did_you_mean(name, known)}"


def accumulation_problems(config: dict[str, Any]) -> list[str]:
    """Take the number of accumulated microbatches out of a raw config; return which two batch sizes it stands for."""
    found = []
    train = config.get("train")
    for place, prefix in ((config, ""), (train, "train.")):
        if not isinstance(place, dict):
            continue
        for key in ACCUMULATION:
            if key in place:
                found.append(f"{prefix}{key}: {_two_batch_sizes(place.pop(key), train)}")
    return found


def _two_batch_sizes(steps: object, train: object) -> str:
    """Return the batch sizes with which gradients of this many microbatches are added up in a step."""
    micro = train.get("micro_batch_size") if isinstance(train, dict) else None
    micro = micro if isinstance(micro, int) and 0 < micro < 2**40 else 2
    rule = "train.global_batch_size = train.micro_batch_size × data parallel size × the accumulated microbatches"
    if not isinstance(steps, int) or not 0 < steps < 2**40:
        return f"unknown key, with {shown(steps)}. It follows from two batch sizes: {rule}."
    return (
        f"unknown key. It follows from two batch sizes: {rule}. For {steps} on one replica try"
        f" train.micro_batch_size={micro}, train.global_batch_size={micro * steps}; on n replicas n times the second."
    )


def key_text(key: object) -> str:
    """Return a key of a raw config as a message names it."""
    return shortened(key) if isinstance(key, str) and key.isprintable() else shown(key)
