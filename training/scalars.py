"""The numbers of a line of metrics, under the names that loggers show."""

from training.metrics import MetricsLine


def scalars_of(line: MetricsLine, prefix: str = "") -> dict[str, float]:
    """Return the numbers of a line by name, those of `phases` as `phases/NAME`; what is null, and the step, are not."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= scalars_of(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            found[f"{prefix}{key}"] = float(value)
    return found
