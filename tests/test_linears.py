"""A linear multiplies in 8 bits if its weight is large enough: as the documents say, for every model with a name."""

import re
from io import StringIO

import pytest
from rich.console import Console

from benchmarks.fp8_linears import least_that_gains
from models.family import named_sizes
from models.linears import block_linears, linears_in_8_bits
from models.shapes import resolve
from parallel.config import TrainConfig, parse
from parallel.errors import ConfigError
from tests.tables import ROOT, rows
from training.layout_report import print_layout
from training.preview import preview_of

IN_8_BITS = TrainConfig(precision="fp8")


def test_the_table_of_linears_that_stay_in_bf16_has_them_all() -> None:
    """A model has the sizes N × K of its row, and none where it has no row."""
    written: dict[str, object] = {}
    for row in rows("docs/precision.md", "Which linears"):
        sizes = re.findall(r"(\d+) × (\d+)", row.answer)
        written |= dict.fromkeys(re.findall(r"`(.+?)`", row.what), row.answer if row.answer == "all" else sizes)
    for name, shape in named_sizes().items():
        linears, large = block_linears(shape), linears_in_8_bits(shape, IN_8_BITS)
        small = [(str(x.outputs), str(x.inputs)) for x in linears if x not in large]
        assert len(linears) == 4, name
        assert written.pop(name, []) == (small if large else "all"), name
    assert not written


def test_a_linear_counts_all_matrices_that_are_multiplied_as_one() -> None:
    """Llama-3.2-1B has 8 heads of k and v of 64 elements: each of these matrices alone would stay in bf16."""
    qkv, out, up, down = block_linears(named_sizes()["llama-3.2-1b"])
    assert [(x.outputs, x.inputs) for x in (qkv, out, up, down)] == [
        (2048 + 2 * 512, 2048),
        (2048, 2048),
        (2 * 8192, 2048),
        (2048, 8192),
    ]
    assert str(qkv) == "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj (3072 × 2048)"
    assert not IN_8_BITS.multiplies_in_8_bits(512 * 2048)
    assert IN_8_BITS.multiplies_in_8_bits(qkv.elements)
    assert not TrainConfig(precision="bf16").multiplies_in_8_bits(qkv.elements)


def test_a_model_whose_linears_are_all_small_is_refused_and_the_largest_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(dict(train=dict(precision="fp8")), resolve=resolve)
    assert str(caught.value) in (ROOT / "docs/precision.md").read_text(encoding="utf-8")


def test_a_run_names_the_linears_that_stay_in_bf16() -> None:
    for name, wanted in (
        ("opt-125m", "parameters in bf16, with linears in fp8 but self_attn.out_proj (768 × 768)\n"),
        ("opt-1.3b", "parameters in bf16, with linears in fp8\n"),
    ):
        raw = dict(model=dict(name=name), train=dict(precision="fp8"))
        output = StringIO()
        print_layout(Console(file=output, width=200), preview_of(parse(raw, world_size=1, resolve=resolve), 1), [])
        assert wanted in output.getvalue()


def test_the_benchmark_names_the_size_from_which_on_all_weights_gain() -> None:
    ratios = {(4, 4): 0.9, (2, 9): 1.1, (4, 5): 0.95, (4, 8): 1.2, (8, 4): 1.1, (8, 8): 1.5}
    assert least_that_gains(ratios) == 32
    assert least_that_gains(ratios | {(8, 4): 1.0}) == 64, "one of two weights of a size does not gain"
    assert least_that_gains(ratios | {(8, 8): 0.9}) is None
