"""A drawing as SVG: text, bars and lines whose looks are classes of a style sheet. The same calls give the same bytes.

Bars of one class in one row are one path, so that a hundred thousand of them take few megabytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]

NARROW, WIDE = frozenset(" .,:;'!|()[]ijlftI"), frozenset("mwMW%×")

GAP = 0.6  # between two bars that follow one another
THINNEST_WITH_GAP = 3.0  # a bar that is not as wide has no gap after it


class Drawing:
    """Shapes in the order in which they are drawn; lengths are pixels, counted from the upper left corner."""

    def __init__(self, styles: Mapping[str, str]) -> None:
        self._styles, self._parts = styles, list[str]()

    def text(self, at: Point, text: str, *looks: str) -> None:
        """Write a text; `at` is where its line begins, or its middle or end, as its classes say."""
        self._parts.append(f'<text x="{number(at[0])}" y="{number(at[1])}"{_class(looks)}>{_clean(text)}</text>')

    def bars(self, spans: Iterable[Point], top: float, height: float, *looks: str) -> None:
        """Draw bars of one height from the left to the right end of each span, with a narrow gap after each."""
        moves = "".join(f"M{number(left)} {number(top)}h{number(_shown(right - left))}" for left, right in spans)
        if moves:
            line = f'<path transform="translate(0 {number(height / 2)})" stroke-width="{number(height)}"'
            self._parts.append(f'{line} d="{moves}"{_class(looks)}/>')

    def steps(self, points: Sequence[Point], base: float, *looks: str) -> None:
        """Draw an area that is flat between its points, above the line `base`."""
        if points:
            path = "".join(f"H{number(x)}V{number(y)}" for x, y in points)
            line = f"M{number(points[0][0])} {number(base)}{path}V{number(base)}z"
            self._parts.append(f'<path d="{line}"{_class(looks)}/>')

    def line(self, start: Point, end: Point, *looks: str) -> None:
        """Draw a straight line."""
        (x1, y1), (x2, y2) = start, end
        self._parts.append(f'<path d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}"{_class(looks)}/>')

    def document(self, width: float, height: float, title: str) -> str:
        """Return the file: the shapes on white paper of this size."""
        size = f'width="{number(width)}" height="{number(height)}" viewBox="0 0 {number(width)} {number(height)}"'
        styles = "\n".join(f"{name} {{{style}}}" for name, style in self._styles.items())
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{_clean(title)}</title>'
        paper = f'<path d="M0 0H{number(width)}V{number(height)}H0z" fill="#fff"/>'
        return "\n".join([head, f"<style>\n{styles}\n</style>", paper, *self._parts, "</svg>\n"])


def text_width(text: str, size: float = 12.0) -> float:
    """Return about how wide a text is in a sans-serif font of this size, and rather too much."""
    return size * sum(0.32 if c in NARROW else 0.9 if c in WIDE else 0.6 for c in text)


def number(value: float) -> str:
    """Return a length with at most two decimals: 12.5 -> '12.5', 3.0 -> '3'."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _shown(width: float) -> float:
    return width - GAP if width >= THINNEST_WITH_GAP else width


def _class(looks: Sequence[str]) -> str:
    return f" class={quoteattr(' '.join(looks))}" if looks else ""


def _clean(text: str) -> str:
    """Return a text as XML writes it; characters that XML does not allow become �."""
    return escape("".join(c if c.isprintable() else "�" for c in text))
