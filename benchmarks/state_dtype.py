"""Measure the losses of one model in three runs: Adam moments in fp32, in bf16, and in bf16 rounded to the nearest.

    python -W ignore -m benchmarks.state_dtype [--steps 2000] [--seed 0] [--picture docs/state_dtype.png]

It prints the training losses ten times in a run; then, for each of the three, the mean of the last tenth of the
training losses, the validation loss, and the median over elements of its second moment divided by fp32's. `--picture`
draws the training losses.

The model is a small OPT, trained on the built-in corpus by one process on a CPU, with beta2 = 0.999. The three take
turns step by step. The first two are what `optimizer.state_dtype` offers: there bf16 is rounded stochastically. The
last one is for comparison only.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from models import build
from models.data import Loader, SampleOrder, load_tokens
from models.shapes import resolve, shape_of
from parallel.config import Config, parse
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.optim.adamw import AdamW
from parallel.optim.part import Part
from parallel.optim.rounding import Rounding
from training.plot import smoothed

CONTENDERS = {"fp32": "#2a6fbb", "bf16": "#e07b00", "bf16, to the nearest": "#999999"}


def to_the_nearest(rounding: Rounding, part: Part, moment: int, update: int) -> Tensor:
    """Return half a unit for each element of the part, to be added where stochastic rounding adds noise."""
    return torch.full((len(part.gradient),), 2**15, dtype=torch.int32)


def config_of(state_dtype: str, steps: int, seed: int) -> Config:
    raw = dict(
        model=dict(name="opt-tiny", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=256),
        data=dict(sequence_length=64),
        train=dict(steps=steps, global_batch_size=16, micro_batch_size=16, seed=seed, device="cpu"),
        optimizer=dict(lr=3e-3, betas=(0.9, 0.999), state_dtype=state_dtype),
        lr_scheduler=dict(warmup_steps=20),
    )
    return parse(raw, world_size=1, resolve=resolve)


def train_in_turns(steps: int, seed: int) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Tensor]]:
    """Return, for each contender, the training losses, the validation loss at the end, and all second moments then."""
    engines = {name: engine_of(name, steps, seed) for name in CONTENDERS}
    config = engines["fp32"].config
    corpus = load_tokens(config.data, shape_of(config).vocab_size)
    order = SampleOrder(corpus.num_training, shuffle=True, seed=config.train.seed)
    loader = Loader(corpus, order, global_batch=config.train.global_batch_size)
    losses: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(steps):
        batch = loader.training(step * config.train.global_batch_size)
        for name, engine in engines.items():
            losses[name].append(step_of(name, engine, batch))
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1:5}  " + "  ".join(f"{name}: {x[-1]:.4f}" for name, x in losses.items()), flush=True)
    validation = {name: engine.evaluate(loader.validation()) for name, engine in engines.items()}
    return losses, validation, {name: second_moments(engine) for name, engine in engines.items()}


def engine_of(name: str, steps: int, seed: int) -> Engine:
    context = make_context(config_of(name[:4], steps, seed), Place())
    return Engine(build(context), context)


def step_of(name: str, engine: Engine, batch: dict[str, Tensor]) -> float:
    if name in ("fp32", "bf16"):
        return engine.train_step(batch).loss
    with patch.object(Rounding, "_draw", to_the_nearest):
        return engine.train_step(batch).loss


def second_moments(engine: Engine) -> Tensor:
    assert isinstance(engine.optimizer, AdamW)
    found = [piece.data.flatten().float() for piece in engine.optimizer.pieces()["exp_avg_sq"]]
    return torch.cat(found)


def draw(losses: dict[str, list[float]], target: Path) -> None:
    """Draw the smoothed losses, and their distance from fp32's, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = list(range(1, len(losses["fp32"]) + 1))
    end = len(steps) - len(steps) // 40  # after it the smoothing has fewer and fewer values
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        apart = [a - b for a, b in zip(values, losses["fp32"], strict=True)]
        for axes, line in ((left, smoothed(values)), (right, smoothed(apart))):
            axes.plot(steps[:end], line[:end], linestyle=style, color=CONTENDERS[name], label=name)
    left.set_title("training loss (nats per token), beta2 = 0.999")
    right.set_title("the same, less that of fp32")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves by the moments' dtype.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="a PNG file to draw; this needs matplotlib")
    options = parser.parse_args()
    torch.set_num_threads(1)
    losses, validation, moments = train_in_turns(options.steps, options.seed)
    last = max(1, options.steps // 10)
    used = moments["fp32"] > 0
    for name, values in losses.items():
        # The median over elements of exp_avg_sq relative to fp32's.
        ratio = (moments[name][used] / moments["fp32"][used]).median().item()
        mean = sum(values[-last:]) / last
        print(f"{name:22} last {last} steps {mean:.4f}, validation {validation[name]:.4f}, exp_avg_sq × {ratio:.2f}")
    if options.picture is not None:
        draw(losses, options.picture)


if __name__ == "__main__":
    main()
