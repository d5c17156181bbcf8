"""loss.png: the loss of a run, drawn from its metrics.jsonl."""

from pathlib import Path

from training.metrics import MetricsLine, read

BLUE, ORANGE = "#2a6fbb", "#e07b00"
SMOOTH_FROM = 30  # steps: a shorter run is readable as it is


def draw_loss(metrics: Path, target: Path) -> bool:
    """Draw training and validation loss over the steps. False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = list(read(metrics))
    steps, losses = _column(lines, "loss")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(losses) < SMOOTH_FROM:
        axes.plot(steps, losses, color=BLUE, marker="o", markersize=3, label="training")
    else:
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8, label="training")
        axes.plot(steps, smoothed(losses), color=BLUE, linewidth=1.8, label="training, smoothed")
    validated, validation = _column(lines, "validation_loss")
    if validation:
        axes.plot(validated, validation, color=ORANGE, marker="o", markersize=5, linewidth=1, label="validation")
        axes.annotate(
            f"{validation[-1]:.3f}", (validated[-1], validation[-1]), (0, 8), textcoords="offset points", ha="right"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(target.parent.name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target)
    return True


def _column(lines: list[MetricsLine], key: str) -> tuple[list[int], list[float]]:
    """The steps that have a finite value under `key`, and the values."""
    found = [(int(line["step"] or 0), float(value)) for line in lines if (value := line.get(key)) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, about a twentieth of the run, fewer near the ends: no lag, no bias."""
    reach = max(2, len(values) // 40)
    found = []
    for i in range(len(values)):
        max_states_on_host = min(reach, i, len(values) - 1 - i)
        window = values[i - max_states_on_host : i + max_states_on_host + 1]
        found.append(sum(window) / len(window))
    return found
