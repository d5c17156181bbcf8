"""The printed report of a pipeline's step before it runs: its picture, its bubbles, and the activations in flight."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from parallel.pipeline.picture import draw
from parallel.plan.timeline import Timeline
from training.console import print_line
from training.preview import Preview
from training.text import readable_bytes

SHOWN_RANKS = 2  # whose bytes are printed beside the last one's, where not all fit into a line


def print_pipeline(console: Console, preview: Preview) -> None:
    """Print a picture of one step of the pipeline, where there is one, that fits into the console, and its figures."""
    if preview.topology.shape["pipe"] == 1:
        return
    timeline = preview.timeline()
    picture = draw(timeline, console.width)
    is_halved = any("W" in line for line in picture.splitlines() if line.startswith("rank "))
    backward = "I and W a backward's halves" if is_halved else "B backward"
    schedule = preview.config.parallel.pipeline.schedule
    print_line(console, f"one step of the {schedule} schedule, by estimated cost")
    print_line(console, f"(F forward, {backward}, dots idle; microbatches count from 0):")
    for line in (*picture.splitlines(), *_figures(preview, timeline, console.width)):
        print_line(console, line)


def _figures(preview: Preview, timeline: Timeline, width: int) -> Iterator[str]:
    """Yield what the picture does not say: the bubble as papers count it, bytes, and what recomputation loses."""
    bubble = timeline.bubble_of_ranks
    yield f"bubble {bubble:.1%} from a rank's first forward to its last compute, as in papers"
    title = "their activations take at most "
    yield title + _short([readable_bytes(peak) for peak in preview.peak_bytes(timeline)], width - len(title))
    if preview.recomputes:
        apart = preview.timeline(joins=False).bubble_of_ranks
        if round(apart, 3) < round(bubble, 3):
            yield f"recomputation joins W to its backward: bubble {bubble:.1%} instead of {apart:.1%}"


def _short(texts: Sequence[str], room: int) -> str:
    """Return the texts of all ranks, or what all have, or the first few and the last, as there is room."""
    if len(set(texts)) == 1:
        return f"{texts[0]} on each rank"
    whole = ", ".join(texts)
    return whole if len(whole) <= room else ", ".join([*texts[:SHOWN_RANKS], "…", texts[-1]])
