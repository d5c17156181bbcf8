"""The tables of kernels: their rows, the anatomy of a step, and the floors."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import parallel.ops.kernels
from benchmarks import fp8_training, kernels, profile_step
from benchmarks.anatomy import OTHER, OWN, Kernel, by_length, gaps_of, group_of, kernels_of, own_kernels, totals
from benchmarks.floors import H200_BYTES, H200_FLOPS, StepSize, floors
from benchmarks.kernel_inputs import Size, block
from benchmarks.kernel_rows import ROWS, Row, forward
from models.family import named_sizes
from models.linears import block_linears
from parallel.ops.kernels.table import KERNELS


def test_every_kernel_computes_what_torch_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        kernels.main(["--tiny"])
    output = capsys.readouterr().out
    assert end.value.code == 0, output
    assert all(re.search(rf"^{re.escape(row.name)} +0 ", output, re.MULTILINE) for row in ROWS)


@pytest.mark.parametrize("fault", [1.5, float("nan")])
def test_a_wrong_kernel_is_marked_and_not_timed(fault: float) -> None:
    row = next(row for row in ROWS if row.name == "LayerNorm")
    wrong = forward(lambda x, weight, bias: fault * torch.layer_norm(x, x.shape[-1:], weight, bias))
    bench = kernels.Bench(torch.device("cpu"), tiny=True)
    found = bench.measure(replace(row, contenders={**row.contenders, "ours": wrong}), Size(3, 64))
    assert found["ours"] == "wrong !"
    assert isinstance(found["torch"], float)


def test_every_kernel_of_the_table_is_measured() -> None:
    """Attention to a cache is measured by `benchmarks.generate --kernels`."""
    assert {row.kernel for row in ROWS} | {"cached_attention"} == KERNELS.keys()
    assert all("ours" in row.contenders for row in ROWS)


def test_bytes_of_a_kernel_are_those_of_its_inputs_and_outputs() -> None:
    """Vectors are little beside matrices.

    An input that is written in place counts twice, and so is not counted here. The backward of a sum needs the sum
    alone, and one gradient for both of its terms; that of heads needs their gradients alone, and
    v is not turned. A lookup reads a part of its table.
    """

    def bytes_of(row: Row, size: Size) -> int:
        inputs = row.draw(size, torch.device("cpu"), 0)
        outputs = row.contenders["torch"](*inputs)()
        return sum(x.nbytes for x in (*inputs, *((outputs,) if isinstance(outputs, torch.Tensor) else outputs)))

    for row in ROWS:
        if not re.match("AdamW|multiplication|lookup|rotary|(add|heads).*backward", row.name):
            size = Size(1 if row.size is block else 256, 3072)
            assert bytes_of(row, size) == pytest.approx(kernels.moved(row, size), rel=0.05), row.name


AT = "void at::native::"
ELEMENTWISE = f"{AT}vectorized_elementwise_kernel<8, {AT[5:]}"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matmuls"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matmuls"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", "attention"),
        (f"{AT}(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "update"),
        ("triton_poi_fused__to_copy_mul_0", "update"),
        (f"{AT}(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>", "loss"),
        ("triton_poi_fused__to_copy_copy__mul_unsqueeze_0", "loss"),
        (f"{AT}(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norm + residual"),
        ("triton_per_fused__fused_rms_norm__fused_rms_norm_backward__unsafe_view_add_view_3", "norm + residual"),
        (f"{ELEMENTWISE}CUDAFunctor_add<c10::BFloat16>>", "norm + residual"),
        ("triton_poi_fused__unsafe_view_add_7", "norm + residual"),
        (f"{ELEMENTWISE}BinaryFunctor<c10::BFloat16, threshold_kernel_impl<c10::BFloat16>>>", "activations"),
        ("triton_poi_fused__unsafe_view_cat_mul_silu_silu_backward_split_view_0", "activations"),
        ("triton_poi_fused_cat_squeeze_transpose_view_4", "rotary + joining"),
        ("triton_poi_fused_add_cat_mul_neg_slice_transpose_view_2", "rotary + joining"),
        (f"{AT}reduce_kernel<128, 4, func_wrapper_t<c10::BFloat16, sum_functor<c10::BFloat16>>>", "gradients' sums"),
        ("triton_red_fused_cat_squeeze_sum_transpose_view_9", "gradients' sums"),
        (f"{AT}(anonymous namespace)::embedding_backward_kernel", "lookups"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        (f"{AT}reduce_kernel<512, 1, func_wrapper_t<long, sum_functor<long, long, long>>>", OTHER),
    ],
)
def test_a_kernel_is_counted_in_its_group(name: str, group: str) -> None:
    assert group_of(name) == group


def test_every_kernel_of_ours_that_trains_has_a_group() -> None:
    """AdamW's, the only one with arguments of `triton.jit`, was once not found, and counted as "other"."""
    folder = Path(next(iter(parallel.ops.kernels.__path__)))
    modules = {path.stem: path.read_text() for path in folder.glob("*_triton.py")}
    for functions_alone in ("cached_attention_triton", "eight_bits_triton", "norm_rows_triton"):
        del modules[functions_alone]  # which other modules' kernels call, or which does not train
    assert modules.keys() <= OWN.keys()
    functions = [x for text in modules.values() for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef)]
    kernels_of_ours = {x.name for x in functions if any("triton.jit" in ast.unparse(one) for one in x.decorator_list)}
    assert kernels_of_ours == own_kernels().keys()
    for name, groups in own_kernels().items():
        assert {group_of(name, before) for before in groups} == groups


def test_a_trace_is_cut_into_groups_and_gaps() -> None:
    """A kernel that runs beside a longer one ends no gap and begins none."""

    def event(name: str, start: float, duration: float, kind: str = "kernel") -> dict[str, object]:
        return dict(cat=kind, name=name, ts=start, dur=duration)

    events = [
        event("nvjet_b", 30, 70),
        event("Memset (Device)", 40, 5, "gpu_memset"),
        event("nvjet_a", 0, 29),
        event("cudaLaunchKernel", 0, 500, "cuda_runtime"),
        event("sdpa", 250, 10),
    ]
    found = kernels_of(events)
    assert found[0] == Kernel("nvjet_a", 0.0, 29.0)
    groups = {name: total for name, total in totals(found).items() if total[1]}
    assert groups == {"matmuls": (99.0, 2), "attention": (10.0, 1), "copies": (5.0, 1)}
    gaps = gaps_of(found)
    assert [(gap.duration, gap.before, gap.after) for gap in gaps] == [
        (1, "nvjet_a", "nvjet_b"),
        (150, "nvjet_b", "sdpa"),
    ]
    lengths = {name: total for name, total in by_length(gaps).items() if total[1]}
    assert lengths == {"< 2 µs": (1.0, 1), "≥ 100 µs": (150.0, 1)}


def test_the_tables_of_a_profile_are_for_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps were profiled: each number of launches, and each time, is half of the trace's."""
    found = [Kernel(name, 1000.0 * i, 500.0) for i, name in enumerate(["nvjet_a", "sdpa", "nvjet_a", "sdpa"])]
    profile_step.print_groups(found, StepSize(named_sizes()["opt-125m"], 1, 1024))
    profile_step.print_kernels(found, ["matmuls", "loss"], 3)
    profile_step.print_gaps(found, 2)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]] for line in lines if "|" in line}
    assert rows["matmuls"][:2] == rows["attention"][:2] == ["0.50", "1"]
    assert rows["all kernels"][:2] == ["1.00", "2"]
    assert "loss" not in rows
    assert [line.split()[:4] for line in lines if "nvjet_a" in line and "->" not in line] == [
        ["matmuls", "0.500", "ms", "1"]
    ]
    assert "≥ 100 µs 0.75 ms in 2" in next(line for line in lines if line.startswith("gaps"))
    assert len([line for line in lines if "->" in line]) == 2


def test_floors_are_those_of_a_count_by_hand() -> None:
    """OPT-1.3b: 24 blocks, 2048 wide, 32 heads, a feed-forward of 8192; Llama-3.2-1B: 16, 2048, 32 and 8, 8192."""
    tokens, hidden, inner = 8192, 2048, 8192
    opt = floors(StepSize(named_sizes()["opt-1.3b"], 8, 1024))
    matrices = 24 * (4 * hidden**2 + 2 * hidden * inner) + 50272 * hidden
    assert opt["matmuls"] == pytest.approx(6 * tokens * matrices / H200_FLOPS)
    causal = 24 * tokens * (1024 / 2) * hidden * 2 * 7
    assert opt["attention"] == pytest.approx(causal / H200_FLOPS)
    assert opt["activations"] == pytest.approx(24 * tokens * inner * 10 / H200_BYTES)
    assert opt["gradients' sums"] == pytest.approx(24 * tokens * 3 * hidden * 2 / H200_BYTES)
    assert opt["rotary + joining"] == pytest.approx(24 * tokens * 3 * hidden * 4 / H200_BYTES)
    llama = floors(StepSize(named_sizes()["llama-3.2-1b"], 8, 1024))
    assert llama["activations"] == pytest.approx(16 * tokens * inner * 16 / H200_BYTES)
    assert llama["rotary + joining"] == pytest.approx(16 * tokens * (2560 + 3072) * 4 / H200_BYTES)
    assert llama["gradients' sums"] == 0


def test_8_bits_halve_the_floor_of_blocks_and_add_casts() -> None:
    shape = named_sizes()["opt-1.3b"]
    bf16, fp8 = (floors(StepSize(shape, 8, 1024, in_8_bits=x)) for x in ((), block_linears(shape)))
    head = 6 * 8192 * 50272 * 2048 / H200_FLOPS
    assert fp8["matmuls"] - head == pytest.approx((bf16["matmuls"] - head) / 2)
    assert fp8["casts"] > 0
    assert {name: x for name, x in fp8.items() if name not in ("matmuls", "casts")} == {
        name: x for name, x in bf16.items() if name != "matmuls"
    }


@pytest.mark.parametrize(
    ("other", "is_within"), [([2.0, 2.1, 2.2], True), ([2.25, 2.3, 2.35], True), ([2.4, 2.3, 2.35], False)]
)
def test_validation_losses_agree_if_their_means_differ_by_less_than_seeds_do(
    other: list[float], is_within: bool
) -> None:
    assert fp8_training.is_within_spread([2.0, 2.1, 2.2], other) == is_within
    assert not fp8_training.is_within_spread([2.0, 2.1, 2.2], [*other[:2], float("nan")])


@pytest.mark.slow
def test_a_precision_is_compared_with_bf16_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """The text is the same each time; the other precision is one that a CPU multiplies in as it is."""
    outputs = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            fp8_training.main(["--tiny", "--precision", "fp32", "--jobs", "1", "--seeds", "2"])
        assert end.value.code == 0
        outputs.append([line for line in capsys.readouterr().out.splitlines() if "difference" in line])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 2
