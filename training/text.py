"""Functions that write numbers and names as a person reads them."""

from collections.abc import Sequence


def layers_text(names: Sequence[str]) -> str:
    """Return the names of layers, in order, in a short form.

    ('embed', 'layers.0', 'layers.1', 'layers.6') -> 'embed, layers 0–1, 6'.
    """
    numbers = [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    blocks = [f"{'layer' if len(numbers) == 1 else 'layers'} {', '.join(texts)}"] if runs else []
    return ", ".join([*(n for n in names if n == "embed"), *blocks, *(n for n in names if n == "head")])


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a number and its noun in the singular or the plural: (2, 'rank') -> '2 ranks'."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def epochs_text(number: float) -> str:
    """Return a number of epochs with two digits, of small ones the first that count: 0.8 -> '0.80 epochs'."""
    return f"{number:,.2f} epochs" if number >= 0.01 or not number else f"{number:.2g} epochs"


def readable_bytes(number: float) -> str:
    """Return a number of bytes with its unit: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def duration(seconds: float) -> str:
    """Return seconds as minutes and hours: 75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
