"""Jobs that compare the numbers of a layout: in fp32 with Hugging Face's, and in fp8 with those of one rank."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_jobs import RankSetup, Row
from benchmarks.gpu_layouts import Layout
from parallel.tensor import sliced
from tests import fp8_errors, parity

SEQUENCE = 16  # tokens: two parts for each of 8 ranks
STEPS = 3
SAMPLES = 16
COMMON: Row = dict(
    vocab_size=37,  # nothing divides it
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=8,
    max_position_embeddings=SEQUENCE,
    # Wavelengths of a few positions: a bias of k, which rotary positions turn, then has a gradient above rounding.
    rope_parameters=dict(rope_type="default", rope_theta=100.0),
)
OPT: Row = dict(
    vocab_size=37,
    hidden_size=32,
    num_hidden_layers=6,
    num_attention_heads=8,
    ffn_dim=64,
    max_position_embeddings=SEQUENCE,
    dropout=0.0,
)
GPT2: Row = dict(vocab_size=37, n_embd=32, n_layer=6, n_head=8, n_positions=SEQUENCE, bos_token_id=0, eos_token_id=0)
FAMILIES: dict[str, Row] = {
    "opt": OPT,
    "llama": COMMON,
    "qwen3": COMMON | dict(head_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2 | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "mistral": COMMON | dict(head_dim=8, sliding_window=3),
    "qwen2": COMMON | dict(use_sliding_window=True, sliding_window=2, max_window_layers=1, tie_word_embeddings=True),
}
IN_8_BITS = OPT | dict(hidden_size=256, ffn_dim=512)  # an eighth of each width is a multiple of 16, which fp8 needs


@dataclass(frozen=True)
class ParityJob:
    """A layout whose training, of a small model of a family, is compared with Hugging Face's."""

    layout: Layout
    model: str = "opt"
    part: str = "parity"
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.layout.name

    def run(self, setup: RankSetup) -> list[Row]:
        """Compare losses, norms, gradients and weights of a few steps with Hugging Face's on one CPU, in fp32."""
        sliced.LEAST = 1  # so that a model that is as small has slices
        path = _saved(setup, self.model, FAMILIES[self.model] | _kv_heads(self.model, setup.world))
        raw = parity_config(self.layout, setup, path)
        batches = parity.batches_of(STEPS, batch=SAMPLES, sequence=SEQUENCE)
        got = parity.train(setup.rank, setup.world, raw, batches)
        if got is None:
            return []
        want = _reference(path, setup.tiny)
        errors = _errors(got, want)
        note = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        row = Row(part=self.part, model=self.model, name=self.name) | errors
        try:
            parity.compare(got, want, parity.BOUND["fp32"], is_fp64=False)
        except AssertionError as error:
            return [row | dict(note=f"DIFFERS: {error}; {note}", failed=True)]
        return [row | dict(note=f"equal: {note}")]


def _errors(got: parity.Trace, want: parity.Trace) -> dict[str, float]:
    """Return the largest relative errors of losses, gradients and weights."""
    total = sum(g.double().square().sum() for g in want.gradients.values()) ** 0.5
    weights = [(name, parity.relative(got.weights[name], weight)) for name, weight in want.weights.items()]
    noisy = ("k_proj.bias", "c_attn.bias")  # the gradient of the bias of k is rounding
    return dict(
        loss=max(abs(a - b) / abs(b) for a, b in zip(got.losses, want.losses, strict=True)),
        gradient=max(float((got.gradients[n].double() - g.double()).norm() / total) for n, g in want.gradients.items()),
        weight=max(error for name, error in weights if not name.endswith(noisy)),
    )


@dataclass(frozen=True)
class EightBitJob:
    """A layout whose error in 8 bits must be at most twice that of one rank, each from one rank in fp64."""

    layout: Layout
    part: str = "fp8"
    model: str = "opt"
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.layout.name

    def run(self, setup: RankSetup) -> list[Row]:
        """Compare losses and weights after a few steps, the first of which multiplies in bf16."""
        path = _saved(setup, "opt", IN_8_BITS, "fp8")
        batches = parity.batches_of(STEPS, batch=SAMPLES, sequence=SEQUENCE)
        got = fp8_errors.trained(setup.rank, setup.world, fp8_config(self.layout, setup, path, "fp8"), batches)
        if got is None:
            return []
        exact, one = (_of_one_rank(setup, path, precision) for precision in ("fp64", "fp8"))
        ours, theirs = fp8_errors.errors(got, exact), fp8_errors.errors(one, exact)
        ratios = {name: ours[name] / theirs[name] for name in theirs}
        note = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + " times the error of one rank"
        fits = all(math.isfinite(ratio) and ratio <= 2 for ratio in ratios.values())
        row = Row(part=self.part, model=self.model, name=self.name, note=note) | ratios
        return [row if fits else row | dict(note=f"TOO LARGE: {note}", failed=True)]


def _kv_heads(family: str, world: int) -> Row:
    """Return fewer k, v heads than q heads where a family may have them and so many ranks can split them."""
    return dict(num_key_value_heads=4 if world <= 4 else 8) if family not in ("opt", "gpt2") else {}


def parity_config(layout: Layout, setup: RankSetup, path: Path) -> Row:
    return _config(layout, setup, path, "fp32", dict(lr=1e-3))


def fp8_config(layout: Layout, setup: RankSetup, path: Path, precision: str) -> Row:
    return _config(layout, setup, path, precision, dict(lr=3e-3, eps=1e-4))


def _config(layout: Layout, setup: RankSetup, path: Path, precision: str, optimizer: Row) -> Row:
    micro = min(SAMPLES // layout.replicas(setup.world), max(2, layout.tensor))
    train: dict[str, Any] = dict(global_batch_size=SAMPLES, micro_batch_size=micro, steps=STEPS)
    return parity.config_of(
        layout.sections.get("parallel", {}),
        precision=precision,
        model=dict(path=str(path)),
        data=dict(sequence_length=SEQUENCE),
        optimizer=optimizer,
        zero=layout.sections.get("zero", {}),
        train=train | dict(device="cpu" if setup.tiny else "auto"),
    )


def _saved(setup: RankSetup, family: str, shape: Row, name: str = "") -> Path:
    """Return the folder of a small model, which the first rank saves once."""
    path = setup.out / ".parity" / (name or family)
    if setup.rank == 0 and not (path / "config.json").exists():
        parity.save_model(path, family, **shape)
    dist.barrier()
    return path


@cache
def _reference(path: Path, tiny: bool) -> parity.Trace:
    """Return the same steps of Hugging Face's model: they are those of every layout."""
    alone = RankSetup(0, 1, torch.device("cpu"), path, tiny)
    batches = parity.batches_of(STEPS, batch=SAMPLES, sequence=SEQUENCE)
    return parity.reference(path, parity_config(Layout("one"), alone, path), batches)


@cache
def _of_one_rank(setup: RankSetup, path: Path, precision: str) -> parity.Trace:
    """Return the steps of one rank by itself."""
    batches = parity.batches_of(STEPS, batch=SAMPLES, sequence=SEQUENCE)
    raw = fp8_config(Layout("one"), RankSetup(0, 1, setup.device, setup.out, setup.tiny), path, precision)
    trace = fp8_errors.trained(0, 1, raw, batches)
    assert trace is not None
    return trace
