"""A picture of timelines as SVG: what each rank does when, and how many microbatches are in flight.

A panel is a timeline, such as the plan, or a run as it happened. All panels have one scale of time, from left to right.
A row is a rank; below its computes an area shows how many forwards it keeps for a backward that is still to come.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from parallel.pipeline.svg import Drawing, text_width
from parallel.plan.plan import Op
from parallel.plan.timeline import Span, Timeline, in_flight

MOST_DRAWN = 1 << 16  # forwards of all stages in one picture: its boxes would be thinner than a hair

EDGE, LEFT, RIGHT = 24.0, 76.0, 74.0  # where texts begin, and the margins of boxes for what is written beside them
NARROWEST, WIDEST = 760.0, 2600.0  # of the time that is drawn
LABEL = 17.0  # the width of a box that has room for two digits
DIGIT, LABEL_MARGIN = 6.2, 3.0
TICKS = 10  # at most, on the axis of time

TOPS: Mapping[Op, float] = {Op.F: 0.0, Op.B: 0.15, Op.I: 0.15, Op.W: 0.3}
"""The beginning of each op's boxes as a share of their row: so forwards stand out without colours."""

COLORS: Mapping[Op, tuple[str, str]] = {
    Op.F: ("#0b4f8a", "forward"),
    Op.B: ("#d55e00", "backward"),
    Op.I: ("#e69f00", "gradient of the input"),
    Op.W: ("#aee6d6", "gradients of the weights"),
}
"""Colours that differ in hue for eyes that see no red or no green, and in lightness on grey paper."""

LIGHTENED = 0.45  # of the way to white, for the last chunk of a rank
DARK_INK, LIGHT_INK = "#1a1a1a", "#ffffff"

STYLES = {
    "text": "font: 12px Helvetica, Arial, 'Liberation Sans', sans-serif; fill: #1a1a1a",
    ".title": "font-size: 16px; font-weight: bold",
    ".heading": "font-size: 13px; font-weight: bold",
    ".quiet": "fill: #595959",
    ".label": "font-size: 11px; text-anchor: middle",
    ".on-dark": "fill: #fff",
    ".end": "text-anchor: end",
    ".middle": "text-anchor: middle",
    ".idle": "fill: none; stroke: #ececec",
    ".flight": "fill: #c9c9c9; stroke: #7a7a7a; stroke-width: .6",
    ".axis": "fill: none; stroke: #7a7a7a; stroke-width: .8",
    ".tick": "fill: none; stroke: #d9d9d9; stroke-width: .6",
}


@dataclass(frozen=True)
class Panel:
    """A timeline with a title and lines of figures below it. Its times are seconds where `is_measured`."""

    title: str
    timeline: Timeline
    figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Row:
    """The vertical places of a rank's row: its boxes, and the area of what is in flight below them."""

    boxes: float
    flight: float
    gap: float

    @property
    def height(self) -> float:
        return self.boxes + self.flight + self.gap

    @classmethod
    def of(cls, num_ranks: int) -> "_Row":
        return cls(22, 13, 8) if num_ranks <= 16 else cls(14, 8, 4)


def draw_svg(title: str, panels: Sequence[Panel], *, unit: str = "") -> str:
    """Return a picture of these panels, one below the other, as an SVG file.

    Times are in seconds where there is a `unit`, such as "ms", in which an axis then shows them.
    """
    picture = _Picture(panels)
    drawing = picture.drawing
    drawing.text((EDGE, 30), title, "title")
    y = picture.legend(54.0) + 12
    for panel in panels:
        y = picture.panel(panel, y + 26)
    if unit:
        y = picture.axis(y, unit)
    return drawing.document(LEFT + picture.width + RIGHT, y + 18, title)


class _Picture:
    """The drawing of some panels at their scale, in pixels for each unit of time."""

    def __init__(self, panels: Sequence[Panel]) -> None:
        rows = [[span for row in panel.timeline.computes for span in row] for panel in panels]
        end = max(panel.timeline.end_of_rows for panel in panels)
        shortest = min(sorted(span.end - span.start for span in spans)[len(spans) // 20] for spans in rows)
        self.scale = min(max(LABEL / max(shortest, 1e-30), NARROWEST / end), WIDEST / end)
        self.width = self.scale * end
        self.ops = [op for op in COLORS if any(span.action.op is op for spans in rows for span in spans)]
        self.chunk_of = _chunks(panels[0].timeline)
        self.num_chunks = 1 + max(self.chunk_of.values())
        self.most_in_flight = max(max(panel.timeline.peak_in_flight) for panel in panels)
        self.drawing = Drawing(STYLES | dict(self._looks()))

    def _looks(self) -> Iterator[tuple[str, str]]:
        """Yield the style of the boxes of each op and chunk."""
        for op in self.ops:
            for chunk in range(self.num_chunks):
                yield f".{op.value}{chunk}", f"fill: none; stroke: {self.color(op, chunk)}"

    def color(self, op: Op, chunk: int) -> str:
        """Return the colour of an op, lighter for each further chunk of a rank."""
        share = LIGHTENED * chunk / max(1, self.num_chunks - 1)
        return "#" + "".join(f"{round(v + (255 - v) * share):02x}" for v in bytes.fromhex(COLORS[op][0][1:]))

    def legend(self, y: float) -> float:
        """Draw what the colours and areas stand for from y on, in as many lines as it takes; return the last one."""
        drawing, x = self.drawing, EDGE
        chunks = range(self.num_chunks)
        entries = [(f"{op.value} {COLORS[op][1]}", [f"{op.value}{chunk}" for chunk in chunks]) for op in self.ops]
        if self.num_chunks > 1:
            entries.append((f"lighter: a later one of the {self.num_chunks} stages of a rank", []))
        entries += [("idle", ["idle"]), ("microbatches in flight", ["flight"])]
        for name, looks in entries:
            width = 14 * len(looks) + 5 + text_width(name)
            if x + width > LEFT + self.width + RIGHT - EDGE:
                x, y = EDGE, y + 18
            for look in looks:
                if look == "flight":
                    drawing.steps([(x, y - 4), (x + 4, y - 9), (x + 9, y - 4), (x + 14, y - 4)], y + 1, look)
                elif look == "idle":
                    drawing.bars([(x, x + 14)], y - 6, 4, look)
                else:
                    top, bottom = extent(Op(look[0]))
                    drawing.bars([(x, x + 14)], y - 11 + 13 * top, 13 * (bottom - top), look)
                x += 14
            drawing.text((x + 5, y), name)
            x += 5 + text_width(name) + 14
        return y

    def panel(self, panel: Panel, y: float) -> float:
        """Draw a panel from y on, and return where it ends."""
        drawing, timeline = self.drawing, panel.timeline
        drawing.text((EDGE, y), panel.title, "heading")
        y += 10
        shape = _Row.of(len(timeline.rows))
        for rank, (row, peak) in enumerate(zip(timeline.computes, timeline.peak_microbatches, strict=True)):
            self._row(row, y, shape)
            drawing.text((LEFT - 8, y + shape.boxes / 2 + 4), f"rank {rank}", "end")
            last = y + shape.boxes + shape.flight
            drawing.text((LEFT + self.width + 6, last), f"max {round(peak, 2):g}", "quiet")
            y += shape.height
        for line in panel.figures:
            drawing.text((LEFT, y + 11), line)
            y += 16
        return y

    def _row(self, spans: Sequence[Span], y: float, shape: _Row) -> None:
        """Draw a rank's computes, with the numbers of the microbatches that have room, and what is in flight."""
        drawing = self.drawing
        drawing.bars([(LEFT, LEFT + self.width)], y + shape.boxes / 2 - 2, 4, "idle")
        named = sorted(spans, key=self._look)
        for look, group in groupby(named, key=self._look):
            top, bottom = extent(Op(look[0]))
            sides = ((self.x(s.start), self.x(s.end)) for s in group)
            drawing.bars(sides, y + top * shape.boxes, (bottom - top) * shape.boxes, look)
        for span in spans:
            label = str(span.action.microbatch)
            left, right = self.x(span.start), self.x(span.end)
            if right - left >= DIGIT * len(label) + LABEL_MARGIN:
                at = ((left + right) / 2, y + shape.boxes / 2 + 4)
                drawing.text(at, label, "label", *self._ink(span))
        base = y + shape.boxes + shape.flight
        unit = (shape.flight - 1) / max(1, self.most_in_flight)
        levels = [(self.x(time), base - unit * count) for time, count in in_flight(spans, [1] * len(self.chunk_of))]
        drawing.steps(levels, base, "flight")

    def _look(self, span: Span) -> str:
        return f"{span.action.op.value}{self.chunk_of[span.action.stage]}"

    def _ink(self, span: Span) -> tuple[str, ...]:
        """Return the class of a label that is readable on its box."""
        red, green, blue = bytes.fromhex(self.color(span.action.op, self.chunk_of[span.action.stage])[1:])
        return ("on-dark",) if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else ()

    def axis(self, y: float, unit: str) -> float:
        """Draw an axis of time below the panels, and return where it ends."""
        factor = {"s": 1, "ms": 1e3, "µs": 1e6}[unit]
        step = _round_step(self.width / self.scale * factor / TICKS)
        self.drawing.line((LEFT, y + 8), (LEFT + self.width, y + 8), "axis")
        for n in range(int(self.width / self.scale * factor / step) + 1):
            x = self.x(n * step / factor)
            self.drawing.line((x, y + 8), (x, y + 12), "axis")
            self.drawing.text((x, y + 25), f"{n * step:g}{f' {unit}' if n == 0 else ''}", "quiet", "middle")
        return y + 28

    def x(self, time: float) -> float:
        """Return where a time is drawn."""
        return LEFT + self.scale * time


def extent(op: Op) -> tuple[float, float]:
    """Return between which shares of its row the box of an op is drawn."""
    return TOPS[op], 0.85 if op is Op.F else 1.0


def _chunks(timeline: Timeline) -> dict[int, int]:
    """Return which of its rank's stages each stage is, counted from 0."""
    stages = (sorted({span.action.stage for span in row}) for row in timeline.rows)
    return {stage: chunk for of_rank in stages for chunk, stage in enumerate(of_rank)}


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is at least this large."""
    power = 1.0
    while power > least:
        power /= 10
    while power * 10 <= least:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
