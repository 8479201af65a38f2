"""The three kinds of chart we show, as small SVG files; colours that read on white and on black."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

INK, GRID = "#808080", "#80808040"
COLOURS = ("#d1495b", "#3a7ca5", "#edae49", "#4f9d69", "#8d6a9f")
FONT = "font-family='sans-serif' font-size='12'"


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}' fill='{INK}' {FONT} {more}>{escape(words)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<line x1='{x1:.0f}' y1='{y1:.0f}' x2='{x2:.0f}' y2='{y2:.0f}' stroke='{GRID}'/>"


def _document(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}'>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _decades(low: float, high: float) -> range:
    return range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)


def _short(value: float) -> str:
    """Three digits, with k and M where they are shorter."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def bars(panels: Mapping[str, Mapping[str, float]], highlight: str) -> str:
    """One panel of horizontal bars for each title, on a logarithmic scale of its own.

    ``panels``: title -> name -> value above 0. Bars whose names begin with ``highlight`` have a
    colour of their own.
    """
    left, width, row, parts, y = 130, 420, 20, [], 0.0
    for title, values in panels.items():
        decades = _decades(min(values.values()) / 2, max(values.values()))
        scale = width / (decades[-1] - decades[0])
        parts.append(_text(8, y + 20, title, "font-weight='bold'"))
        top = y + 30
        bottom = top + row * len(values)
        for decade in decades:
            x = left + (decade - decades[0]) * scale
            parts.append(_line(x, top, x, bottom))
            parts.append(_text(x, bottom + 14, _short(10.0**decade), "text-anchor='middle'"))
        for n, (name, value) in enumerate(values.items()):
            at = top + n * row
            length = (math.log10(value) - decades[0]) * scale
            colour = COLOURS[0] if highlight and name.startswith(highlight) else COLOURS[1]
            parts.append(_text(left - 6, at + 14, name, "text-anchor='end'"))
            parts.append(
                f"<rect x='{left}' y='{at + 3:.0f}' width='{length:.1f}' height='14' "
                f"fill='{colour}'/>"
            )
            parts.append(_text(left + length + 5, at + 14, _short(value)))
        y = bottom + 26
    return _document(left + width + 60, y, parts)


def groups(
    titles: tuple[str, str],
    rows: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]],
    highlight: str,
) -> str:
    """Two columns of horizontal bars; each group of bars has a linear scale of its own, from 0.

    ``rows``: what a group shows -> name -> value, for the left column and for the right, which may
    have none.
    """
    left, width, gap, row, parts, y = 92, 210, 150, 20, [], 44.0
    for column, title in enumerate(titles):
        parts.append(_text(left + column * (width + gap), 18, title, "font-weight='bold'"))
    for what, columns in rows.items():
        parts.append(_text(8, y, what, "font-weight='bold'"))
        y += 8
        for column, values in enumerate(columns):
            x = left + column * (width + gap)
            longest = max(values.values(), default=1.0)
            if values:
                parts.append(_line(x, y, x, y + row * len(values)))
            for n, (name, value) in enumerate(values.items()):
                at, length = y + n * row, value / longest * width
                colour = COLOURS[0] if name == highlight else COLOURS[1]
                parts.append(_text(x - 6, at + 14, name, "text-anchor='end'"))
                parts.append(
                    f"<rect x='{x}' y='{at + 3:.0f}' width='{length:.1f}' height='14' "
                    f"fill='{colour}'/>"
                )
                parts.append(_text(x + length + 5, at + 14, _short(value)))
        y += row * max(len(values) for values in columns) + 26
    return _document(left + 2 * width + gap + 60, y - 14, parts)


def lines(
    panels: Mapping[str, tuple[str, Mapping[str, Sequence[tuple[float, float]]]]],
) -> str:
    """One panel of curves for each title, side by side, both scales logarithmic.

    ``panels``: title -> (label of the x axis, name -> points), all values above 0.
    """
    width, height, left, gap, parts = 250, 190, 46, 70, []
    for n, (title, (label, curves)) in enumerate(panels.items()):
        x0, y0 = left + n * (width + gap), 46
        xs = [x for points in curves.values() for x, _ in points]
        ys = [y for points in curves.values() for _, y in points]
        x_low, x_high = math.log10(min(xs)), math.log10(max(xs))
        decades = _decades(min(ys), max(ys))

        def place(x: float, y: float) -> tuple[float, float]:
            along = (math.log10(x) - x_low) / ((x_high - x_low) or 1)  # noqa: B023
            up = (math.log10(y) - decades[0]) / (len(decades) - 1 or 1)  # noqa: B023
            return x0 + along * width, y0 + (1 - up) * height  # noqa: B023

        parts.append(_text(x0, 18, title, "font-weight='bold'"))
        for decade in decades:
            at = place(xs[0], 10.0**decade)[1]
            parts.append(_line(x0, at, x0 + width, at))
            parts.append(_text(x0 - 4, at + 4, _short(10.0**decade), "text-anchor='end'"))
        for x in sorted({min(xs), max(xs)}):
            parts.append(
                _text(place(x, ys[0])[0], y0 + height + 16, _short(x), "text-anchor='middle'")
            )
        parts.append(_text(x0 + width / 2, y0 + height + 16, label, "text-anchor='middle'"))
        for order, (name, points) in enumerate(curves.items()):
            colour = COLOURS[order]
            spots = [place(x, y) for x, y in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(
                f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"
            )
            parts += [
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in spots
            ]
            parts.append(
                f"<text x='{x0 + 8 + 70 * order}' y='36' fill='{colour}' {FONT}>"
                f"{escape(name)}</text>"
            )
    return _document(left + len(panels) * (width + gap), 266, parts)
