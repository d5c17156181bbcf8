"""FLOPs, parameters, bytes and layer costs of every family, compared with counts that share nothing with them."""

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from models.costs import compute_costs, flops_per_token, layer_costs, parameter_count
from models.family import named_sizes
from models.gpt2.shape import GPT2Shape
from models.llama.shape import LlamaShape, MistralShape, Qwen2Shape, Qwen3Shape
from models.opt.shape import OPTShape
from models.shape import ModelShape
from models.shapes import resolve
from parallel.config import parse
from parallel.config.parallel import TensorConfig
from parallel.pipeline.partition import partition
from tests.accounts import letters, value
from training.preview import preview_of

NOTATION = Path(__file__).parent.parent / "docs/notation.md"
LENGTH, WINDOW = 32, 8
LLAMA_SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4
)
GROUPED = LLAMA_SIZES | dict(num_key_value_heads=2)
MODELS: dict[str, ModelShape] = {
    "opt": OPTShape(vocab_size=97, hidden_size=32, ffn_dim=56, num_hidden_layers=4, num_attention_heads=4),
    "opt, projected": OPTShape(
        vocab_size=97, hidden_size=32, ffn_dim=56, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "gpt2": GPT2Shape(vocab_size=97, n_embd=32, n_layer=4, n_head=4, bos_token_id=2, eos_token_id=2),
    "llama": LlamaShape(**LLAMA_SIZES),
    "llama, grouped, tied": LlamaShape(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Shape(**GROUPED),
    "qwen3, grouped": Qwen3Shape(**GROUPED, head_dim=20),
    "qwen3, tied": Qwen3Shape(**LLAMA_SIZES, num_key_value_heads=4, head_dim=20, tie_word_embeddings=True),
}
WINDOWED: dict[str, ModelShape] = {
    "mistral": MistralShape(**GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Shape(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3),
}


def transformers_model(shape: ModelShape) -> Any:
    """Return Hugging Face's model, with attention written out in matmuls."""
    fields = {"model_type": shape.model_type, **shape.exported()}
    config = AutoConfig.for_model(**fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def counted(shape: ModelShape, length: int) -> float:
    """Return the FLOPs of a token, forward and backward, as torch counts them; a backward has two forwards' matmuls."""
    with FlopCounterMode(display=False) as counter:
        transformers_model(shape)(torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    return 3 * int(counter.get_total_flops()) / length


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts_in_hugging_faces_model(name: str) -> None:
    assert flops_per_token(MODELS[name], LENGTH) == counted(MODELS[name], LENGTH)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "opt, projected"])
def test_flops_are_those_of_the_documents(name: str) -> None:
    shape = MODELS[name]
    table = re.findall(r"^\| (a block|the head)'s FLOPs \| (.*) \|$", NOTATION.read_text("utf-8"), re.MULTILINE)
    parts = {part: value(formula, letters(TensorConfig(), shape, 2, LENGTH)) for part, formula in table}
    assert flops_per_token(shape, LENGTH) == shape.num_hidden_layers * parts["a block"] + parts["the head"]


@pytest.mark.parametrize("name", WINDOWED)
def test_blocks_with_a_window_count_the_keys_of_a_sequence_as_long_as_the_window(name: str) -> None:
    """Hugging Face's matmuls compute all scores and hide some. Qwen2's window is in one block of four."""
    shape = WINDOWED[name]
    whole, short = counted(shape, LENGTH), counted(shape, WINDOW)
    share = sum(window is not None for window in shape.windows()) / shape.num_hidden_layers  # type: ignore[attr-defined]
    assert share == (1 if name == "mistral" else 1 / 4)
    assert flops_per_token(shape, LENGTH) == whole - share * (whole - short)


@pytest.mark.parametrize("name", MODELS)
def test_a_backward_costs_two_forwards_of_which_weight_gradients_are_one_matmul_a_matrix(name: str) -> None:
    shape = MODELS[name]
    forwards = layer_costs(shape, LENGTH, "cpu")
    _, *blocks, head = compute_costs(shape, LENGTH, "cpu")
    for forward, block in zip(forwards[1:-1], blocks, strict=False):
        assert block.forward == forward
        assert block.weight_gradient == 2 * letters(TensorConfig(), shape, 2, LENGTH)["W"]
        assert block.input_gradient + block.weight_gradient == 2 * forward
    assert head.forward + head.input_gradient + head.weight_gradient == pytest.approx(3 * forwards[-1])
    assert head.weight_gradient <= 0.1 * head.forward, "its table's gradient is computed in its forward"


def test_a_block_that_is_recomputed_runs_its_forward_before_the_gradient_of_its_input() -> None:
    shape = MODELS["llama"]
    kept, again = (compute_costs(shape, LENGTH, "cpu", recomputes=recomputes) for recomputes in (False, True))
    assert (kept[0], kept[-1]) == (again[0], again[-1])
    for before, after in zip(kept[1:-1], again[1:-1], strict=True):
        assert after == replace(before, input_gradient=before.input_gradient + before.forward)


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_those_of_hugging_faces_model(name: str) -> None:
    assert parameter_count(MODELS[name]) == sum(
        weight.numel() for weight in transformers_model(MODELS[name]).parameters()
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, grouped, tied", "qwen3, grouped"])
def test_a_preview_of_one_rank_holds_the_parameters_of_the_model(name: str) -> None:
    """A parameter has 2 bytes of weights and 2 of gradient in bf16, and with AdamW 12 of master weight and moments."""
    shape = MODELS[name]
    fields = {key: value for key, value in shape.__dict__.items() if value is not None}
    raw = dict(
        model=dict(name=f"{shape.model_type}-tiny", **fields),
        train=dict(precision="bf16", micro_batch_size=8, global_batch_size=8),
    )
    preview = preview_of(parse(raw, world_size=1, resolve=resolve), 1)
    (part,), count = preview.parts, parameter_count(shape)
    assert preview.parameters == part.parameters == count
    assert (part.weight_bytes, part.gradient_bytes, part.optimizer_bytes) == (2 * count, 2 * count, 12 * count)


@pytest.mark.parametrize("name", ["llama, grouped, tied", "qwen3, grouped"])
def test_a_preview_of_two_stages_holds_a_tied_table_on_both(name: str) -> None:
    shape = MODELS[name]
    raw = dict(model=dict(name=f"{shape.model_type}-tiny", **shape.__dict__), parallel=dict(pipeline=2))
    preview = preview_of(parse(raw, world_size=2, resolve=resolve), 2)
    copies = prod(shape.public_tensors()[shape.embedding]) * shape.tie_word_embeddings
    assert sum(part.parameters for part in preview.parts) == parameter_count(shape) + copies


def test_the_head_of_a_large_vocabulary_is_worth_several_blocks() -> None:
    """The last of four stages of Llama-3.1-8b on a GPU has five blocks, the others have nine.

    By FLOPs alone its head of 128,256 rows is worth 2.2 blocks: 2 · 4096 · 128256 = 1.05e9 for a token, and a block
    2 · 218e6 + 34e6. Cross entropy reads and writes each logit several times, in bf16 and fp32: 33 bytes, in whose
    time a GPU does as many FLOPs again. A block's other kernels take a sixth of its matmuls' time. So the head is worth
    3.7 blocks, and (32 + 3.7) / 4 = 8.9 of them are a stage. On a CPU, which multiplies slowly, FLOPs decide.
    """
    shape = named_sizes()["llama-3.1-8b"]
    costs = layer_costs(shape, 2048, "cuda")
    assert costs[0] == 0
    assert costs[-1] / costs[1] == pytest.approx(3.7, abs=0.1)
    assert [len(stage) for stage in partition(costs, 4)] == [1 + 9, 9, 9, 5 + 1]
    on_cpu = layer_costs(shape, 2048, "cpu")
    assert on_cpu[-1] / on_cpu[1] == pytest.approx(2.3, abs=0.1)


def test_the_cost_of_a_block_counts_its_window() -> None:
    """The scores of 4096 keys rather than 32768 are a sixth of the block's FLOPs, rather than most of them."""
    shape = named_sizes()["mistral-7b"]
    assert isinstance(shape, MistralShape)
    without = layer_costs(replace(shape, sliding_window=None), 32768, "cuda")
    windowed = layer_costs(replace(shape, sliding_window=4096), 32768, "cuda")
    assert without[1] - windowed[1] == 4 * 4096 * (32768 - 4096)
    assert (without[0], without[-1]) == (windowed[0], windowed[-1])
