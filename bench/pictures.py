"""Small pictures as SVG text: the same numbers give the same bytes, with any library version."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

FONT = "DejaVu Sans, Verdana, sans-serif"
INK, FAINT, MISSING = "#222222", "#dddddd", "#f4f4f4"
# Okabe and Ito's colours, which the colour-blind tell apart; fusedrnn is always blue.
COLOURS = {
    "fusedrnn": "#0072B2",
    "fusedrnn, save=states": "#56B4E9",
    "torch.nn": "#D55E00",
    "torch.nn, CUDA graph": "#E69F00",
    "reference loop": "#777777",
    "floor": "#222222",
}
SPARE = ("#009E73", "#CC79A7", "#F0E442")


class Svg:
    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def rect(self, x, y, width, height, fill):
        self.parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            f'fill="{fill}"/>'
        )

    def text(self, x, y, content, size=12, anchor="middle", fill=INK, bold=False, turned=False):
        style = ' font-weight="bold"' if bold else ""
        turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
        self.parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{fill}"{style}{turn}>{escape(str(content))}</text>'
        )

    def line(self, points, colour, width=1.0, dashed=False):
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            f'stroke-width="{_n(width)}"{dash}/>'
        )

    def dot(self, x, y, colour):
        self.parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="3" fill="{colour}"/>')

    def __str__(self) -> str:
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="{FONT}">\n'
            f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
        )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def ratio_colour(ratio: float) -> str:
    """White at 1, blue where fusedrnn is faster (full at 4x), red where slower (full at 1/2)."""
    if ratio >= 1:
        share, full = min(math.log(ratio) / math.log(4), 1), (0, 114, 178)
    else:
        share, full = min(math.log(1 / ratio) / math.log(2), 1), (200, 40, 20)
    mixed = (round(255 + share * (c - 255)) for c in full)
    return "#" + "".join(f"{c:02x}" for c in mixed)


def heat_map(
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    xs: list,
    ys: list,
    values: dict[tuple, float],
    unclear: Collection[tuple] = (),
) -> str:
    """Speed-ups by (x, y); a cell without a value says so, one of `unclear` has no colour."""
    cell_w, cell_h, left, top = 58, 30, 70, 62
    width = max(left + cell_w * len(xs) + 20, 28 + 9 * len(title))
    svg = Svg(width, top + cell_h * len(ys) + 48)
    svg.text(14, 24, title, 14, "start", bold=True)
    svg.text(14, 43, note, 11, "start", "#555555")
    svg.rect(left, top, cell_w * len(xs), cell_h * len(ys), FAINT)
    for row, y in enumerate(ys):
        svg.text(left - 8, top + cell_h * row + 20, y, anchor="end")
        for column, x in enumerate(xs):
            value = values.get((x, y))
            at_x, at_y = left + cell_w * column, top + cell_h * row
            coloured = value is not None and (x, y) not in unclear
            fill = MISSING if value is None else ratio_colour(value if coloured else 1.0)
            svg.rect(at_x + 1, at_y + 1, cell_w - 2, cell_h - 2, fill)
            dark = coloured and (value > 2.4 or value < 0.6)
            shown = "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
            svg.text(at_x + cell_w / 2, at_y + 20, shown, fill="#ffffff" if dark else INK)
    for column, x in enumerate(xs):
        svg.text(left + cell_w * (column + 0.5), top + cell_h * len(ys) + 18, x)
    svg.text(left + cell_w * len(xs) / 2, top + cell_h * len(ys) + 38, x_label)
    svg.text(20, top + cell_h * len(ys) / 2, y_label, turned=True)
    return str(svg)


@dataclass
class Panel:
    """One small diagram, both axes logarithmic."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def curves(title: str, note: str, panels: list[Panel]) -> str:
    """Panels in a row, one legend."""
    width, height, left, top, gap = 210, 190, 62, 100, 66
    svg = Svg(left + len(panels) * (width + gap) - gap + 24, top + height + 50)
    svg.text(14, 24, title, 14, "start", bold=True)
    svg.text(14, 43, note, 11, "start", "#555555")
    names = list(dict.fromkeys(n for p in panels for n in p.series))
    colour = _colours(names)
    x = 14.0
    for name in names:
        svg.line([(x, 60), (x + 22, 60)], colour[name], 5.0 if name == "torch.nn" else 2.0,
                 name == "floor")  # fmt: skip
        svg.text(x + 28, 64, name, 11, "start")
        x += 44 + 6.6 * len(name)
    for index, panel in enumerate(panels):
        _panel(svg, panel, left + index * (width + gap), top, width, height, colour)
    svg.width = max(svg.width, math.ceil(x), 30 + math.ceil(6 * len(note)))
    return str(svg)


def _colours(names: list[str]) -> dict[str, str]:
    spare = iter(SPARE * 4)
    return {name: COLOURS.get(name) or next(spare) for name in names}


def _panel(svg: Svg, panel: Panel, left, top, width, height, colour) -> None:
    points = [p for series in panel.series.values() for p in series]
    if not points:
        return
    x_axis = _Axis([x for x, _ in points], left, left + width)
    y_axis = _Axis([y for _, y in points], top + height, top, padded=True)
    measured = sorted({x for x, _ in points})
    for tick in y_axis.ticks():
        svg.line([(left, y_axis(tick)), (left + width, y_axis(tick))], FAINT)
        svg.text(left - 6, y_axis(tick) + 4, _short(tick), 10, "end")
    last = -math.inf
    for x in measured:
        if x_axis(x) - last < 24:
            continue
        last = x_axis(x)
        svg.line([(last, top + height), (last, top + height + 4)], INK)
        svg.text(last, top + height + 17, _short(x), 10)
    svg.line([(left, top), (left, top + height), (left + width, top + height)], INK)
    svg.text(left + width / 2, top + height + 36, panel.x_label, 11)
    svg.text(left, top - 8, f"{panel.title}{', ' if panel.title else ''}{panel.y_label}", 11,
             "start")  # fmt: skip
    # torch.nn's line is wide and below ours, so that both show where they coincide.
    for name, series in sorted(panel.series.items(), key=lambda item: item[0] != "torch.nn"):
        placed = [(x_axis(x), y_axis(y)) for x, y in sorted(series)]
        svg.line(placed, colour[name], 5.0 if name == "torch.nn" else 2.0, name == "floor")
        if name != "floor":
            for x, y in placed:
                svg.dot(x, y, colour[name])


class _Axis:
    """A logarithmic axis from pixel `start` to pixel `end`."""

    def __init__(self, values: list[float], start: float, end: float, padded: bool = False):
        low, high = math.log10(min(values)), math.log10(max(values))
        if padded or high - low < 1e-9:
            low, high = low - 0.08, high + 0.08
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten; 2 and 5 too on a short axis."""
        steps = (1,) if self.high - self.low > 2.5 else (1, 2, 5)
        exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
        every = [m * 10.0**e for e in exponents for m in steps]
        return [v for v in every if self.low <= math.log10(v) <= self.high]


def _short(value: float) -> str:
    """A number for an axis: 0.5, 20, 4k, 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"
