"""Draw loss.png, the loss of a run, from its metrics.jsonl."""

from pathlib import Path

from parallel.storage.no_room import naming
from parallel.storage.replaced_file import replacing
from training.metrics import MetricsLine, read

BLUE, ORANGE, RED = "#2a6fbb", "#e07b00", "#c62828"
SMOOTH_FROM = 30  # steps: the curve of a shorter run is readable as it is


def draw_loss(metrics: Path, target: Path) -> bool:
    """Draw training and validation loss over the steps. Returns False if matplotlib is not installed.

    Raises OSError where the file cannot be written; an earlier one is then as it was.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
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
    marked = [line for line in lines if "loss" in line.get("outliers", ())]
    if marked:
        axes.plot(
            *_column(marked, "loss"),
            color=RED,
            linestyle="none",
            marker="x",
            markersize=7,
            label="far from those before",
        )
    validated, validation = _column(lines, "validation_loss")
    if validation:
        axes.plot(validated, validation, color=ORANGE, marker="o", markersize=5, linewidth=1, label="validation")
        axes.annotate(
            f"{validation[-1]:.3f}", (validated[-1], validation[-1]), (0, 8), textcoords="offset points", ha="right"
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(target.parent.name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with naming(target), replacing(target) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _column(lines: list[MetricsLine], key: str) -> tuple[list[int], list[float]]:
    """Return the steps that have a finite value under `key`, and the values."""
    found = [(int(line["step"] or 0), float(value)) for line in lines if (value := line.get(key)) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: list[float]) -> list[float]:
    """Return the mean of each value and its neighbours: about a twentieth of the run, and fewer near its ends.

    There are equally many on both sides, so the curve has neither lag nor bias.
    """
    most = max(2, len(values) // 40)
    means = []
    for i in range(len(values)):
        reach = min(most, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means
