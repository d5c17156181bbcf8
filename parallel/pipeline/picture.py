"""A picture of a timeline in text, at a scale that fits the screen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

from parallel.plan.plan import Action, Op
from parallel.plan.timeline import Span, Timeline

GAP = " … "  # stands for the middle of a row
SMALLEST_ROOM = 16  # columns
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly over 0 to 1, however many there are
SHOWN_PEAKS = 3  # of the activations in flight, where they do not all fit


def draw(timeline: Timeline, width: int | None = None) -> str:
    """Return a picture with one row for each rank, and a summary below, of lines of at most `width` characters.

    `F2` and `B2` are as wide as they are long, dots are time in which nothing is computed. Where a rank holds several
    stages the labels name them: `F4.2` is stage 4, microbatch 2. The shortest compute is as wide as its label, except
    for those that take less than half the usual time, whose labels are cut off.

    An I and its W are drawn as one B if every W of the step follows its I at once.

    Of a step that is wider the middle is left out, if every rank is in the steady state there. If the warm-up and the
    cool-down alone are too wide, each column is a letter: what the rank does at that time. It lasts as long as the
    shortest compute, or longer if even that does not fit.
    """
    rows = _with_whole_backwards(timeline.computes)
    names = [f"rank {rank:>{len(str(len(rows) - 1))}}  " for rank in range(len(rows))]
    several = any(len({span.action.stage for span in row}) > 1 for row in rows)
    labels = _Labels(several, timeline.num_omitted, timeline.end_of_rows / 2)
    widest = 1 + max(len(labels.of(span)) for row in rows for span in row)
    shortest = _shortest(rows)
    room = None if width is None else max(SMALLEST_ROOM, width - len(names[0]))
    view = _fitting(timeline, rows, room, scales=(widest / shortest, 1 / shortest))
    has_labels = view.scale >= widest / shortest
    spreads = view.scale < 0.995 / shortest
    drawn = (_labelled(row, labels, view, widest) if has_labels else _lettered(row, view, spreads) for row in rows)
    lines = [f"{name}{row}".rstrip() for name, row in zip(names, drawn, strict=True)]
    return "\n".join(
        [*lines, *_summary(timeline, rows, view, None if has_labels else 1 / view.scale / shortest, width)]
    )


def _with_whole_backwards(rows: Sequence[Sequence[Span]]) -> Sequence[Sequence[Span]]:
    """Return the rows with each I and its W as one B, or as they are if a W is put off."""
    whole = []
    for row in rows:
        spans: list[Span] = []
        for span in row:
            if span.action.op is not Op.W:
                spans.append(span)
                continue
            first = spans.pop()
            if first.action != replace(span.action, op=Op.I):
                return rows
            spans.append(Span(replace(first.action, op=Op.B), first.start, span.end))
        whole.append(spans)
    return whole


@dataclass(frozen=True, slots=True)
class _View:
    """The part of a timeline that a picture shows, and its `scale` in columns for each unit of time.

    `head` are the columns from the beginning of the rows, `tail` those up to their end; 0: all is in the head.
    """

    scale: float
    head: int
    tail: int
    end: float

    def windows(self) -> Iterator[tuple[float, int]]:
        """Yield the time at which each part begins, and its columns."""
        yield 0.0, self.head
        if self.tail:
            yield self.end - self.tail / self.scale, self.tail

    def shows(self, span: Span) -> bool:
        """Return whether all of a span is in a part that is shown."""
        parts = [(*self.columns_of(span, start), columns) for start, columns in self.windows()]
        return any(begin >= 0 and end <= columns for begin, end, columns in parts)

    def columns_of(self, span: Span, start: float) -> tuple[int, int]:
        """Return between which columns a span is, in a part that begins at the time `start`."""
        return round((span.start - start) * self.scale), round((span.end - start) * self.scale)


@dataclass(frozen=True, slots=True)
class _Labels:
    """The labels of computes. Those after `middle` are numbered as if the omitted microbatches came before them."""

    name_stages: bool
    num_omitted: int
    middle: float

    def of(self, span: Span) -> str:
        action, later = span.action, self.num_omitted if span.start > self.middle else 0
        shifted = Action(action.op, action.stage, action.microbatch + later)
        return str(shifted) if self.name_stages else f"{action.op.value}{shifted.microbatch}"


def _fitting(
    timeline: Timeline, rows: Sequence[Sequence[Span]], room: int | None, *, scales: tuple[float, float]
) -> _View:
    """Return the view at the first of these scales that fits into the room, or at the largest one that fits."""
    end = timeline.end_of_rows
    if room is None:
        return _View(scales[0], round(end * scales[0]), 0, end)
    if not timeline.num_omitted:
        for scale in scales:
            if round(end * scale) <= room:
                return _View(scale, round(end * scale), 0, end)
    warm_up, cool_down = _ends(rows, end)
    if warm_up + cool_down >= end:  # there is no steady state to leave out
        scale = min(scales[1], room / end)
        return _View(scale, round(end * scale), 0, end)
    room -= len(GAP)
    scale = next((scale for scale in scales if (warm_up + cool_down) * scale <= room), room / (warm_up + cool_down))
    spare = room - round((warm_up + cool_down) * scale)
    head = min(room, round(warm_up * scale) + spare // 2)
    return _View(scale, head, room - head, end)


def _ends(rows: Sequence[Sequence[Span]], end: float) -> tuple[float, float]:
    """Return how long it takes until every rank is in the steady state, and from when the first one leaves it.

    That is until each has begun its first backward, and from when one has begun its last forward.
    """
    firsts = [next((span for span in row if span.action.op is not Op.F), row[0]) for row in rows]
    lasts = [[span for span in row if span.action.op is Op.F][-1] for row in rows]
    return max(span.start for span in firsts), end - min(span.start for span in lasts)


def _shortest(rows: Sequence[Sequence[Span]]) -> float:
    """Return the time of the shortest compute, of those that take at least half the usual time."""
    lengths = [span.end - span.start for row in rows for span in row]
    usual = median_low(lengths)
    return min(length for length in lengths if length >= usual / 2)


def _labelled(row: Sequence[Span], labels: _Labels, view: _View, widest: int) -> str:
    """Return a row whose computes have labels, where all of a compute is in the view."""
    parts = []
    for start, columns in view.windows():
        cells, last = [], 0
        for span in row:
            begin, end = view.columns_of(span, start)
            if end <= 0 or begin >= columns:
                continue
            is_whole, begin, end = begin >= 0 and end <= columns, max(begin, 0), min(end, columns)
            cells.append(_idle(begin - last, widest))
            name = labels.of(span) if is_whole else ""
            cells.append(name.ljust(end - begin - 1, "-")[: max(end - begin - 1, 0)].ljust(end - begin))
            last = end
        cells.append(_idle(columns - last, widest))
        parts.append("".join(cells))
    return GAP.join(parts)


def _lettered(row: Sequence[Span], view: _View, spreads: bool) -> str:
    """Return a row with the letter of what the rank does at one time of each column.

    That is the middle. Where a column lasts longer than a compute, the times are spread over the columns instead, so
    that letters are as frequent as what they stand for: at equal distances, a distance of one forward and one backward
    would meet nothing but backwards.
    """
    parts = []
    for start, columns in view.windows():
        letters, position = [], 0
        for column in range(columns):
            time = start + (column + (column * GOLDEN % 1 if spreads else 0.5)) / view.scale
            while position < len(row) and row[position].end <= time:
                position += 1
            computes = position < len(row) and row[position].start <= time
            letters.append(row[position].action.op.value if computes else ".")
        parts.append("".join(letters))
    return GAP.join(parts)


def _summary(
    timeline: Timeline, rows: Sequence[Sequence[Span]], view: _View, column: float | None, width: int | None
) -> Iterator[str]:
    """Yield how much is not drawn, how many shortest computes a `column` of letters lasts, and figures of the step."""
    drawn = {span.action.microbatch for row in rows for span in row if view.shows(span)}
    if num_hidden := timeline.num_microbatches - len(drawn):
        yield f"{num_hidden:,} of {timeline.num_microbatches:,} microbatches are not drawn"
    if column is not None:
        yield f"a column is the time of {f'{column:.3g}' if column > 1.005 else 'one'} of the shortest computes"
    bubble = f"bubble {timeline.bubble_fraction:.1%}; microbatches in flight at most "
    yield bubble + _peaks(timeline.peak_microbatches, None if width is None else width - len(bubble))


def _peaks(peaks: Sequence[float], room: int | None) -> str:
    """Return the peaks of all ranks, or of the first few and the last, or the largest alone, as there is room."""
    texts = [f"{round(peak, 2):g}" for peak in peaks]
    whole = ", ".join(texts)
    short = ", ".join([*texts[:SHOWN_PEAKS], "…", texts[-1]])
    return next((text for text in (whole, short) if room is None or len(text) <= room), max(texts, key=float))


def _idle(num_columns: int, cell: int) -> str:
    """Return dots, grouped to the width of the shortest compute: `.. .. `."""
    dots = ("." * (cell - 1) + " ") * (num_columns // cell + 1)
    return dots[:num_columns]
