"""`parse` returns a frozen config, or raises all of its problems at once."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parallel.config
from models.shapes import resolve
from parallel.config import Config, ParallelConfig, PipelineConfig, TensorConfig, apply_overrides, load_raw, parse
from parallel.errors import ConfigError


def problems(raw: dict[str, Any], world_size: int | None = None) -> tuple[str, ...]:
    """Return the problems that `parse` raises; fail if it raises none."""
    with pytest.raises(ConfigError) as caught:
        parse(raw, world_size=world_size)
    return caught.value.problems


def tensor(**keys: Any) -> dict[str, Any]:
    """Return a raw config whose section `parallel.tensor` has these keys."""
    return {"parallel": {"tensor": keys}}


SPLIT = dict(mode="1d", size=4, sequence_parallel=True)


def test_an_empty_config_is_the_documented_default() -> None:
    assert parse({}).to_dict() | {"model": None} == {
        "model": None,
        "data": {
            "path": "python-docs",
            "text_key": "text",
            "bin_dtype": "uint16",
            "tokenizer": "bytes",
            "sequence_length": 256,
            "shuffle": True,
            "validation_fraction": 0.05,
            "validation_path": None,
            "document_mask": False,
        },
        "parallel": {
            "pipeline": {"size": 1, "schedule": "1f1b", "layers": None, "chunks": None},
            "tensor": {"mode": None, "size": 1, "depth": 1, "rows": None, "sequence_parallel": False, "overlap": False},
            "context": {"size": 1, "kind": "ring"},
        },
        "zero": {
            "stage": 0,
            "tensor_placement_policy": "cuda",
            "gpu_margin_mem_ratio": 0.8,
            "device_memory": None,
            "host_memory": None,
            "nvme_dir": None,
        },
        "train": {
            "steps": 100,
            "epochs": None,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "precision": "fp32",
            "fp8_min_elements": 1638400,
            "clip_grad_norm": 1.0,
            "activation_checkpointing": "none",
            "seed": 0,
            "device": "auto",
            "compile": False,
            "timeout_seconds": 600,
            "nonfinite": "stop",
            "early_stopping": None,
        },
        "optimizer": {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "state_dtype": "fp32"},
        "lr_scheduler": {"kind": "cosine", "warmup_steps": 10, "min_ratio": 0.1},
        "output": {
            "dir": "runs/{name}",
            "log_every": 1,
            "eval_every": 0,
            "checkpoint_every": 0,
            "keep_checkpoints": 2,
            "keep_best": False,
            "checkpoint_async": True,
            "loggers": [],
            "callbacks": [],
            "export": True,
            "export_dtype": None,
        },
    }


def test_config_survives_json() -> None:
    raw = {
        "model": {"name": "opt-125m", "_remove_final_layer_norm": True},
        "parallel": {"pipeline": {"size": 3, "layers": [0, 12, 0]}, "tensor": {"mode": "2.5d", "size": 8, "depth": 2}},
        "train": {"micro_batch_size": 4, "clip_grad_norm": None},
    }
    config = parse(raw, world_size=24)
    assert parse(json.loads(json.dumps(config.to_dict()))) == config
    assert config.parallel.pipeline.layers == (0, 12, 0)
    assert config.model.fields["_remove_final_layer_norm"] is True


@pytest.mark.parametrize("name", ["model", "parallel", "sections"])
def test_every_field_is_documented_where_it_is_declared(name: str) -> None:
    """A docstring follows each field of each section; the sections themselves are documented by their classes."""
    source = Path(parallel.config.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    for kind in ast.parse(source).body:
        if not isinstance(kind, ast.ClassDef) or kind.name == "Config":
            continue
        assert ast.get_docstring(kind), kind.name
        for field, following in zip(kind.body, kind.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                is_documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert is_documented, f"{kind.name}.{ast.unparse(field.target)}"


# Colossal-AI's spellings


def test_a_bare_number_is_a_size() -> None:
    short = parse({"parallel": {"pipeline": 2, "context": 1}})
    assert short == parse({"parallel": {"pipeline": {"size": 2}, "context": {"size": 1}}})


def test_tensor_mode_sequence_is_a_ring() -> None:
    for size in (1, 4):
        found = parse(tensor(mode="sequence", size=size)).parallel
        assert found == parse({"parallel": {"context": {"size": size, "kind": "ring"}}}).parallel
    both = {"parallel": {"tensor": {"mode": "sequence", "size": 4}, "context": 2}, "train": {"steps": "x"}}
    ring, other = problems(both)
    assert ring == "parallel.tensor: mode 'sequence' is a ring, as parallel.context is. Try context=4 alone."
    assert other.startswith("train.steps: ")


# Sizes of the tensor modes


@pytest.mark.parametrize(
    ("keys", "axes"),
    [
        ({}, {}),
        ({"mode": "1d", "size": 4}, {"t": 4}),
        ({"mode": "2d", "size": 4}, {"depth": 1, "row": 2, "col": 2}),
        ({"mode": "2d", "size": 6, "rows": 2}, {"depth": 1, "row": 2, "col": 3}),
        ({"mode": "2.5d", "size": 4, "depth": 1}, {"depth": 1, "row": 2, "col": 2}),
        ({"mode": "2.5d", "size": 8, "depth": 2}, {"depth": 2, "row": 2, "col": 2}),
        ({"mode": "2.5d", "size": 12, "depth": 2, "rows": 3}, {"depth": 2, "row": 3, "col": 2}),
        ({"mode": "3d", "size": 8}, {"i": 2, "w": 2, "o": 2}),
        ({"mode": "3d", "size": 125}, {"i": 5, "w": 5, "o": 5}),
    ],
)
def test_a_mode_has_these_axes(keys: dict[str, Any], axes: dict[str, int]) -> None:
    assert list(TensorConfig(**keys).axes().items()) == list(axes.items())


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"mode": "2d", "size": 6},
            "parallel.tensor: mode '2d' needs a square size, got 6. Try 4 (2×2) or 9 (3×3), or rows=2 for 2×3.",
        ),
        (
            {"mode": "2.5d", "size": 12, "depth": 2},
            "parallel.tensor: mode '2.5d' needs a size of depth 2 × a square, got 12."
            " Try 8 (2×2×2) or 18 (2×3×3), or rows=2 for 2×2×3.",
        ),
        (
            {"mode": "2.5d", "size": 3, "depth": 2},
            "parallel.tensor: mode '2.5d' needs a size of depth 2 × a square, got 3. Try 2 (2×1×1) or 8 (2×2×2).",
        ),
        (
            {"mode": "2.5d", "size": 6, "depth": 2, "rows": 2},
            "parallel.tensor: mode '2.5d' needs a multiple of depth 2 × rows 2 = 4, got 6. Try 4 (2×2×1) or 8 (2×2×2).",
        ),
        (
            {"mode": "2d", "size": 2, "rows": 4},
            "parallel.tensor: mode '2d' needs a multiple of rows 4, got 2. Try 4 (4×1).",
        ),
        (
            {"mode": "3d", "size": 6},
            "parallel.tensor: mode '3d' needs a cubic size, got 6. Try 1 (1×1×1) or 8 (2×2×2).",
        ),
        (
            {"mode": "2d", "size": 4, "sequence_parallel": True},
            "parallel.tensor.sequence_parallel: True needs mode '1d', got '2d'. Try False, or mode='1d'.",
        ),
        (
            {"sequence_parallel": True},
            "parallel.tensor.sequence_parallel: True needs mode '1d', got None. Try False, or mode='1d'.",
        ),
        ({"mode": "4d", "size": 4}, "parallel.tensor.mode: needs one of '1d', '2d', '2.5d', '3d', got '4d'. Try '1d'."),
        ({"size": 4}, "parallel.tensor: size 4 needs a mode. Try mode='1d', '2d' or '2.5d'."),
        ({"size": 8}, "parallel.tensor: size 8 needs a mode. Try mode='1d' or '3d'."),
        (
            {"mode": "2d", "size": 8, "depth": 2},
            "parallel.tensor.depth: 2 needs mode '2.5d', got '2d'. Try depth=1.",
        ),
        (
            {"mode": "1d", "size": 4, "rows": 2},
            "parallel.tensor.rows: 2 needs mode '2d' or '2.5d', got '1d'. Try rows=None.",
        ),
        ({"overlap": True}, "parallel.tensor.overlap: True needs a tensor mode, got None. Try False, or mode='1d'."),
    ],
)
def test_a_size_that_a_mode_cannot_have_is_refused_with_the_nearest_ones(keys: dict[str, Any], problem: str) -> None:
    assert problems(tensor(**keys)) == (problem,)


@given(st.sampled_from(["1d", "2d", "2.5d", "3d"]), st.integers(1, 200), st.integers(1, 5), st.integers(0, 5))
def test_a_size_fits_exactly_if_the_axes_can_multiply_to_it(mode: Any, size: int, depth: int, rows: int) -> None:
    depth = depth if mode == "2.5d" else 1
    keys = TensorConfig(mode, size, depth, rows or None if mode in ("2d", "2.5d") else None)
    edges = range(1, size + 1)
    expected = {
        "1d": True,
        "2d": any(depth * (rows or edge) * edge == size for edge in edges),
        "3d": any(edge**3 == size for edge in edges),
    }
    assert keys.fits() == expected["2d" if mode == "2.5d" else mode]


# World sizes and batch sizes


def test_a_world_size_that_is_no_multiple_of_a_replica_is_refused_with_sizes_that_work() -> None:
    raw = {"parallel": {"pipeline": 2, "tensor": {"mode": "1d", "size": 8}}}
    assert problems(raw, world_size=8) == (
        "parallel: world size 8 is not a multiple of pipeline 2 × tensor 8 = 16."
        " Start 16 processes, or set tensor.size=4.",
    )
    assert problems({"parallel": {"pipeline": 3}}, world_size=8) == (
        "parallel: world size 8 is not a multiple of pipeline 3. Start 6 or 9 processes, or set pipeline.size=2.",
    )


def test_the_data_parallel_size_is_the_world_size_over_the_ranks_of_a_replica() -> None:
    config = parse({"parallel": {"pipeline": 2, "tensor": {"mode": "2d", "size": 4}}}, world_size=16)
    assert config.data_parallel_size(16) == 2
    assert config.num_microbatches(16) == 4  # 16 = 2 × 2 × 4


@pytest.mark.parametrize(
    ("train", "keys", "world_size", "problem"),
    [
        (
            {"global_batch_size": 10},
            {},
            4,
            "train.global_batch_size: 10 is not a multiple of micro_batch_size 2 × data 4 = 8. Try 8 or 16.",
        ),
        (
            {"global_batch_size": 3},
            {},
            None,
            "train.global_batch_size: 3 is not a multiple of micro_batch_size 2. Try 2 or 4.",
        ),
        (
            {"micro_batch_size": 2},
            {"mode": "2.5d", "size": 8, "depth": 2},
            8,
            "train.micro_batch_size: 2 is not a multiple of depth × rows = 4, the parts that tensor mode '2.5d'"
            " splits it into. Try 4.",
        ),
        (
            {"micro_batch_size": 2},
            {"mode": "3d", "size": 8},
            8,
            "train.micro_batch_size: 2 is not a multiple of w × i = 4, the parts that tensor mode '3d'"
            " splits it into. Try 4.",
        ),
    ],
)
def test_a_batch_size_that_does_not_divide_is_refused_with_the_nearest_ones(
    train: dict[str, Any], keys: dict[str, Any], world_size: int | None, problem: str
) -> None:
    assert problems({"train": train, **tensor(**keys)}, world_size) == (problem,)


def test_a_warm_up_may_be_longer_than_the_run() -> None:
    assert parse({"train": {"steps": 2}}).lr_scheduler.warmup_steps == 10


# Values


@pytest.mark.parametrize(
    ("section", "keys", "problem"),
    [
        ("zero", {"tensor_placment_policy": "cuda"}, "unknown key. Did you mean 'tensor_placement_policy'?"),
        ("lr_scheduler", {"xyz": 1}, "unknown key. Known: kind, warmup_steps, min_ratio."),
        ("train", {"steps": True}, "needs an int, got True. Try 100."),
        ("train", {"steps": "20"}, "needs an int, got '20'. Try 20."),
        ("train", {"steps": 20.0}, "needs an int, got 20.0. Try 20."),
        ("train", {"steps": 0}, "needs at least 1, got 0. Try 1."),
        ("train", {"compile": 1}, "needs a bool, got 1. Try False."),
        ("train", {"precision": "fp31"}, "needs one of 'fp64', 'fp32', 'bf16', 'fp16', 'fp8', got 'fp31'. Try 'fp32'."),
        ("train", {"clip_grad_norm": -1}, "needs at least 0, got -1. Try 0."),
        ("optimizer", {"lr": float("nan")}, "needs a finite number, got nan. Try 0.0006."),
        ("optimizer", {"betas": (0.9, 1.0)}, "needs 0 <= value < 1, got 1.0 in (0.9, 1.0). Try (0.9, 0.95)."),
        ("optimizer", {"betas": (0.9,)}, "needs 2 values, got (0.9,). Try (0.9, 0.95)."),
        (
            "output",
            {"loggers": ("wandb", "tensorbord")},
            "needs one of 'tensorboard', 'wandb', got 'tensorbord' in ('wandb', 'tensorbord'). Try ('wandb',"
            " 'tensorboard').",
        ),
        ("lr_scheduler", {"min_ratio": 1.5}, "needs 0 <= value <= 1, got 1.5. Try 1."),
        ("data", {"sequence_length": 1}, "needs at least 2, got 1. Try 2."),
        ("zero", {"host_memory": "6 gigs"}, "needs a number of bytes, got '6 gigs'. Try '6GiB'."),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_one_that_works(
    section: str, keys: dict[str, Any], problem: str
) -> None:
    (key,) = keys
    assert problems({section: keys}) == (f"{section}.{key}: {problem}",)


def test_slices_in_8_bits_are_refused_by_name() -> None:
    tensor = dict(mode="1d", size=2, overlap=True)
    assert problems(dict(parallel=dict(tensor=tensor), train=dict(precision="fp8"))) == (
        "parallel.tensor.overlap: True multiplies in slices, of which there are none in 8 bits, and train.precision is"
        " 'fp8'. Try overlap=False, or train.precision='bf16'.",
    )


def test_parameters_are_bf16_where_linears_multiply_in_8_bits() -> None:
    dtypes = {name: parse(dict(train=dict(precision=name))).train.dtype for name in ("fp64", "fp32", "bf16", "fp8")}
    assert dtypes == {"fp64": "fp64", "fp32": "fp32", "bf16": "bf16", "fp8": "bf16"}


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (
            dict(parallel=dict(context=2), data=dict(sequence_length=10)),
            "data.sequence_length: 10 is not a multiple of 4, the parts that parallel.context of size 2, kind 'ring',"
            " splits it into. Try 8 or 12, or parallel.context.size=5.",
        ),
        (
            dict(model=dict(name="opt-125m"), parallel=dict(context=3), data=dict(sequence_length=2048)),
            "data.sequence_length: 2048 is not a multiple of 6, the parts that parallel.context of size 3, kind 'ring',"
            " splits it into. Try 2046, or parallel.context.size=2, 4 or 8.",
        ),
        (
            dict(parallel=dict(context=dict(size=4, kind="all_to_all")), data=dict(sequence_length=10)),
            "data.sequence_length: 10 is not a multiple of 4, the parts that parallel.context of size 4, kind"
            " 'all_to_all', splits it into. Try 8 or 12, or parallel.context.size=2, 5 or 10.",
        ),
        (
            dict(parallel=dict(tensor=SPLIT), data=dict(sequence_length=10)),
            "data.sequence_length: 10 is not a multiple of 4, the parts that parallel.tensor.sequence_parallel of size"
            " 4 splits it into. Try 8 or 12, or parallel.tensor.sequence_parallel=False.",
        ),
        (
            dict(parallel=dict(tensor=SPLIT, context=2), data=dict(sequence_length=12)),
            "data.sequence_length: 12 is not a multiple of 8, the parts that parallel.context of size 2, kind 'ring',"
            " and parallel.tensor.sequence_parallel of size 4 split it into. Try 8 or 16, or"
            " parallel.tensor.sequence_parallel=False.",
        ),
        (
            dict(parallel=dict(tensor=SPLIT, context=4), data=dict(sequence_length=24)),
            "data.sequence_length: 24 is not a multiple of 16, the parts that parallel.context of size 4, kind 'ring',"
            " and parallel.tensor.sequence_parallel of size 4 split it into. Try 16 or 32, or"
            " parallel.tensor.sequence_parallel=False.",
        ),
        (
            dict(parallel=dict(tensor=SPLIT, context=4), data=dict(sequence_length=12)),
            "data.sequence_length: 12 is not a multiple of 16, the parts that parallel.context of size 4, kind 'ring',"
            " and parallel.tensor.sequence_parallel of size 4 split it into. Try 16, or parallel.context.size=3.",
        ),
        (
            dict(parallel=dict(context=dict(size=2, kind="rings"))),
            "parallel.context.kind: needs one of 'ring', 'all_to_all', got 'rings'. Try 'ring'.",
        ),
        (
            dict(parallel=dict(context=dict(size=3, kind="all_to_all")), data=dict(sequence_length=12)),
            "model.num_attention_heads: 8 is not divisible by parallel.context.size 3, over which kind 'all_to_all'"
            " splits heads too. Try parallel.context.size=2 or 4, or kind='ring'.",
        ),
        (
            dict(
                parallel=dict(context=dict(size=4, kind="all_to_all"), tensor=dict(mode="1d", size=4)),
                data=dict(sequence_length=12),
            ),
            "model.num_attention_heads: 8 is not divisible by the tensor mode's 4 × parallel.context.size 4 = 16, over"
            " which kind 'all_to_all' splits heads too. Try parallel.context.size=2.",
        ),
    ],
)
def test_a_context_size_that_does_not_divide_is_refused_with_sizes_that_work(raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(raw, resolve=resolve)
    assert caught.value.problems == (problem,)


def test_a_world_too_small_for_a_context_is_refused_with_sizes_that_work() -> None:
    assert problems({"parallel": {"context": 4}}, 6) == (
        "parallel: world size 6 is not a multiple of context 4. Start 4 or 8 processes, or set context.size=3.",
    )


@pytest.mark.parametrize(("key", "value", "shown"), [("nvme_dir", "/disk", "'/disk'"), ("host_memory", "1KiB", "1024")])
def test_limits_of_host_and_disk_are_refused_if_everything_is_on_the_device(key: str, value: str, shown: str) -> None:
    assert problems({"zero": {key: value}}) == (
        f"zero.{key}: {shown} with tensor_placement_policy 'cuda', which keeps everything on the device. Try"
        f" tensor_placement_policy='auto' or 'cpu', or {key}=None.",
    )
    for policy in ("cpu", "auto"):
        assert parse({"zero": {key: value, "tensor_placement_policy": policy}}).zero.tensor_placement_policy == policy


# Pipelines


def pipeline(**keys: Any) -> dict[str, Any]:
    """Return a raw config whose section `parallel.pipeline` has these keys."""
    return {"parallel": {"pipeline": keys}}


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        (dict(size=3), [(0,), (1,), (2,)]),
        (dict(size=3, schedule="zero_bubble"), [(0,), (1,), (2,)]),
        (dict(size=2, schedule="interleaved"), [(0, 2), (1, 3)]),
        (dict(size=2, schedule="interleaved", chunks=3), [(0, 2, 4), (1, 3, 5)]),
        (dict(size=3, schedule="zero_bubble_v"), [(0, 5), (1, 4), (2, 3)]),
        (dict(size=1, schedule="interleaved", chunks=4), [(0, 1, 2, 3)]),
        (dict(size=1, schedule="zero_bubble_v", chunks=2), [(0, 1)]),
    ],
)
def test_a_rank_holds_these_stages(keys: dict[str, Any], stages: list[tuple[int, ...]]) -> None:
    found = parse(pipeline(**keys)).parallel.pipeline
    assert [found.stages_of(rank) for rank in range(found.size)] == stages
    assert all(found.rank_of(stage) == rank for rank, held in enumerate(stages) for stage in held)


def test_a_schedule_may_be_set_over_the_short_form() -> None:
    raw = apply_overrides({"parallel": {"pipeline": 4}}, ["parallel.pipeline.schedule=zero_bubble"])
    assert parse(raw).parallel.pipeline == PipelineConfig(size=4, schedule="zero_bubble")
    raw = apply_overrides(raw, ["parallel.pipeline.schedule=interleaved", "parallel.pipeline.chunks=3"])
    assert parse(raw).parallel.pipeline == PipelineConfig(size=4, schedule="interleaved", chunks=3)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            dict(schedule="interleaved", chunks=1),
            "schedule 'interleaved' has at least 2 stages on each rank, got 1. Try chunks=2, or schedule='1f1b'.",
        ),
        (
            dict(schedule="1f1b", chunks=2),
            "schedule '1f1b' has 1 stage on each rank, got 2. Try chunks=1, or schedule='interleaved'.",
        ),
        (
            dict(schedule="gpipe", chunks=2),
            "schedule 'gpipe' has 1 stage on each rank, got 2. Try chunks=1, or schedule='interleaved'.",
        ),
        (
            dict(schedule="zero_bubble", chunks=2),
            "schedule 'zero_bubble' has 1 stage on each rank, got 2. Try chunks=1, or schedule='zero_bubble_v'.",
        ),
        (
            dict(schedule="zero_bubble_v", chunks=3),
            "schedule 'zero_bubble_v' has 2 stages on each rank, got 3. Try chunks=2, or schedule='interleaved'.",
        ),
        (
            dict(schedule="zero_bubble_v", chunks=1),
            "schedule 'zero_bubble_v' has 2 stages on each rank, got 1. Try chunks=2, or schedule='zero_bubble'.",
        ),
    ],
)
def test_chunks_that_a_schedule_does_not_have_are_refused_with_those_it_has(keys: dict[str, Any], problem: str) -> None:
    assert problems(pipeline(size=2, **keys)) == (f"parallel.pipeline.chunks: {problem}",)


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [
        ("train.precision", "float8", "fp8"),
        ("train.precision", "torch.float8_e4m3fn", "fp8"),
        ("train.precision", "FP8", "fp8"),
        ("train.precision", "bfloat16", "bf16"),
        ("train.precision", "half", "fp16"),
        ("output.export_dtype", "fp8", "bf16"),
        ("optimizer.state_dtype", "fp8", "bf16"),
    ],
)
def test_a_dtype_as_another_library_calls_it_is_answered_with_the_nearest_one_here(
    key: str, given: str, meant: str
) -> None:
    """'float8' was answered with 'fp32', whose letters are more alike."""
    section, name = key.split(".")
    (problem,) = problems({section: {name: given}})
    assert problem.endswith(f"got {given!r}. Try {meant!r}.")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("1F1B", "1f1b"),
        ("GPipe", "gpipe"),
        ("ScheduleGPipe", "gpipe"),
        ("Schedule1F1B", "1f1b"),
        ("Interleaved1F1B", "interleaved"),
        ("ScheduleInterleaved1F1B", "interleaved"),
        ("LoopedBFS", "interleaved"),
        ("InterleavedZeroBubble", "zero_bubble"),
        ("ZBVZeroBubble", "zero_bubble_v"),
        ("ScheduleZBVZeroBubble", "zero_bubble_v"),
        ("zb", "zero_bubble"),
        ("zb-h1", "zero_bubble"),
        ("ZB-H2", "zero_bubble"),
        ("ZBV", "zero_bubble_v"),
        ("ZB-V", "zero_bubble_v"),
        ("zero-bubble", "zero_bubble"),
        ("zero_bubble_V", "zero_bubble_v"),
        ("interleave", "interleaved"),
        ("DualPipe", "zero_bubble_v"),
        ("DualPipeV", "zero_bubble_v"),
        (3, "1f1b"),
        (None, "1f1b"),
        ("wrong", "1f1b"),
    ],
)
def test_a_schedule_as_another_program_calls_it_is_answered_with_the_name_here(given: object, meant: str) -> None:
    assert problems(pipeline(size=2, schedule=given)) == (
        "parallel.pipeline.schedule: needs one of 'gpipe', '1f1b', 'interleaved', 'zero_bubble', 'zero_bubble_v', or a"
        f" .csv file, got {given!r}. Try {meant!r}.",
    )


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("virtual_pipeline_model_parallel_size", "parallel.pipeline.chunks"),
        ("num_layers_per_virtual_pipeline_stage", "parallel.pipeline.chunks"),
        ("pipeline_parallel_schedule", "parallel.pipeline.schedule"),
        ("num_model_chunks", "parallel.pipeline.chunks"),
    ],
)
def test_a_key_of_another_programs_pipeline_is_answered_with_the_key_here(key: str, meant: str) -> None:
    (problem,) = problems(pipeline(size=2, **{key: 2}))
    assert problem.startswith(f"parallel.pipeline.{key}: unknown key. Here it is {meant}")


def test_all_problems_are_raised_at_once_one_a_line() -> None:
    raw = {
        "modle": {"name": "opt-125m"},
        "parallel": {"tensor": {"mode": "2d", "size": 6}},
        "zero": {"nvme_dir": 3},
        "train": {"steps": 0},
        "data": 3,
    }
    with pytest.raises(ConfigError) as caught:
        parse(raw, world_size=5, resolve=lambda config: (config, ["from the model"]))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "modle",
        "zero.nvme_dir",
        "train.steps",
        "data",
        "parallel.tensor",
    ]


def test_an_invalid_layout_does_not_hide_the_problems_of_the_model() -> None:
    layouts = []

    def resolve(config: Config) -> tuple[Config, list[str]]:
        layouts.append(config.parallel)
        return config, ["from the model"]

    with pytest.raises(ConfigError) as caught:
        parse(tensor(mode="3d", size=2), resolve=resolve)
    assert caught.value.problems[-1] == "from the model"
    assert layouts == [ParallelConfig()]


# Overrides


def test_an_override_is_a_literal_or_else_a_string() -> None:
    raw = apply_overrides({}, ["train.steps=20", "optimizer.betas=(0.8, 0.9)", "train.precision=bf16", "data.path=a=b"])
    assert raw == {
        "train": {"steps": 20, "precision": "bf16"},
        "optimizer": {"betas": (0.8, 0.9)},
        "data": {"path": "a=b"},
    }


def test_a_dict_replaces_a_whole_section() -> None:
    raw = {"parallel": {"tensor": {"mode": "2.5d", "size": 8, "depth": 2}}}
    assert apply_overrides(raw, ["parallel.tensor={'mode': '1d', 'size': 4}"]) == tensor(mode="1d", size=4)
    assert apply_overrides(raw, ["parallel={'pipeline': 2}"]) == {"parallel": {"pipeline": {"size": 2}}}


def test_dotted_keys_change_short_spellings_and_the_last_one_wins() -> None:
    raw = {"parallel": {"pipeline": 2}}
    gpipe = apply_overrides(raw, ["parallel.pipeline.schedule=gpipe"])
    assert gpipe == {"parallel": {"pipeline": {"size": 2, "schedule": "gpipe"}}}
    assert apply_overrides(gpipe, ["parallel.pipeline=4", "parallel.pipeline=1"]) == {
        "parallel": {"pipeline": {"size": 1}}
    }
    assert raw == {"parallel": {"pipeline": 2}}, "an override has changed the dict that it was given"


def test_the_sequence_mode_may_be_set_key_by_key() -> None:
    keys = ["parallel.tensor.mode=sequence", "parallel.tensor.size=4"]
    want = parse({"parallel": {"context": 4}})
    assert all(parse(apply_overrides({}, given)) == want for given in (keys, keys[::-1]))


@pytest.mark.parametrize(
    ("assignment", "suggestion"),
    [("train.precision=BF16", "'bf16'"), ("parallel.tensor.mode=2D", "'2d'"), ("output.dir=2024", "'2024'")],
)
def test_the_suggested_value_is_what_was_probably_meant(assignment: str, suggestion: str) -> None:
    assert problems(apply_overrides({}, [assignment]))[0].endswith(f"Try {suggestion}.")


def test_malformed_overrides_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({}, ["train.steps", "train..steps=1", "train.steps=1", "train.steps.x=1"])
    assert caught.value.problems == (
        "--set train.steps: not of the form key=value. Try train.steps=20.",
        "--set train..steps=1: not of the form key=value. Try train.steps=20.",
        "--set train.steps.x=1: train.steps has no keys. Try train.steps=20.",
    )


# Files


def test_a_file_gives_its_values_without_modules_functions_and_private_names(tmp_path: Path) -> None:
    file = tmp_path / "run.py"
    file.write_text("import math\n_h = 4\ndef f(): pass\ntrain = dict(steps=_h)\nmodle = dict()\n")
    assert load_raw(file) == {"train": {"steps": 4}, "modle": {}}
    assert problems(load_raw(file)) == ("modle: unknown section. Did you mean 'model'?",)


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        ("train = dict(\n", 1, "'(' was never closed"),
        ("x = 1\n\ntrain = dict(steps=undefined)\n", 3, "NameError"),
        ("def f():\n    return 1 / 0\nf()\n", 2, "ZeroDivisionError"),
        ("import os\nos.stat('nowhere')\n", 2, "FileNotFoundError"),
    ],
)
def test_an_error_in_a_file_is_raised_with_its_line(tmp_path: Path, source: str, line: int, words: str) -> None:
    file = tmp_path / "run.py"
    file.write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_raw(file)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert words in str(caught.value)


def test_the_config_json_of_a_run_can_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    config = parse({"parallel": {"pipeline": 2}, "train": {"steps": 3}})
    file.write_text(json.dumps(config.to_dict()))
    assert parse(load_raw(file)) == config
    for content in ("{", "[]"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json(: | is damaged, or it is not JSON: )"):
            load_raw(file)


def test_a_missing_file_is_refused_with_the_name_of_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "opt_tiny.py").touch()
    with pytest.raises(ConfigError, match=r"opt_tny.py: .*Did you mean '.*opt_tiny.py'\?"):
        load_raw(tmp_path / "opt_tny.py")


def test_an_override_may_be_a_dict_as_a_config_file_writes_it() -> None:
    overridden = apply_overrides({}, ["parallel.tensor=dict(mode='2d', size=4)", "parallel.pipeline=dict(size=2)"])
    assert overridden["parallel"] == {"tensor": {"mode": "2d", "size": 4}, "pipeline": {"size": 2}}
    assert apply_overrides({}, ["output.dir=dict(1)"])["output"]["dir"] == "dict(1)"
