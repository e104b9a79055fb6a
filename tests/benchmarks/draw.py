"""Draws what `diffpo_decoder.py generate` measured, as SVG: tokens/s against overlap, and against batch size."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Figures = Mapping[str, Any]
WIDTH, HEIGHT = 320, 260  # of a panel's inside
COLOURS = ("#4269d0", "#d9571f", "#2f8f3f", "#97308f", "#8a6d3b", "#444444", "#0a8f8f", "#b8860b")
STYLES = {"tokens_per_s": "", "limit": "7 4", "generate": "1 4"}
LEGEND = "solid: this decoder; dashed: an oracle over the draft; dotted: generate"


def draw(figures: Iterable[Figures]) -> str:
    """A row of two panels for each model and dtype. Of figures that were measured twice the later ones count."""
    latest = {(f["model"], f["dtype"], f["batch"], f["overlap"]): f for f in figures if f["part"] == "generate"}
    rows = []
    for number, subject in enumerate(sorted({key[:2] for key in latest})):
        found = [latest[key] for key in sorted(latest) if key[:2] == subject]
        heading = _text(0, -45, ", ".join(subject), "start", 'font-weight="bold"') + _text(0, -27, LEGEND, "start")
        by_overlap = _panel(found, "overlap", "batch", "share of right runs in the drafts")
        by_batch = _panel(found, "batch", "overlap", "batch size")
        at = f"translate(70 {70 + number * (HEIGHT + 130)})"
        rows.append(f'<g transform="{at}">{heading}{by_overlap}<g transform="translate(480 0)">{by_batch}</g></g>')
    size = f"0 0 {2 * WIDTH + 340} {len(rows) * (HEIGHT + 130)}"
    body = '<rect width="100%" height="100%" fill="white"/>' + "\n".join(rows)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="12">'
    return f"{head}{body}</svg>\n"


def _panel(found: Sequence[Figures], across: str, kind: str, label: str) -> str:
    """Rates on a logarithmic scale over `across`, three lines for every value of `kind`."""
    columns, kinds = sorted({f[across] for f in found}), sorted({f[kind] for f in found})
    low = min(f[key] for f in found for key in STYLES) / 1.3
    high = max(f[key] for f in found for key in STYLES) * 1.3
    told = "{:.0%}" if across == "overlap" else "{}"

    def x(value: float) -> float:
        return WIDTH * (value if across == "overlap" else (columns.index(value) + 0.5) / len(columns))

    def y(rate: float) -> float:
        return HEIGHT * math.log(high / rate) / math.log(high / low)

    drawn = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>']
    for tick in (n * 10**power for power in range(7) for n in (1, 2, 5)):
        if low <= tick <= high:
            drawn.append(
                f'<path d="M0 {y(tick):.1f}h{WIDTH}" stroke="#ddd"/>' + _text(-6, y(tick) + 4, f"{tick:,}", "end")
            )
    drawn += [_text(x(value), HEIGHT + 17, told.format(value)) for value in columns]
    drawn += [_text(WIDTH / 2, HEIGHT + 36, label), _text(-6, -8, "tokens/s", "end")]
    ends = []
    for colour, value in zip(COLOURS, kinds, strict=False):
        line = [f for f in found if f[kind] == value]
        for key, dash in STYLES.items():
            path = " ".join(f"{x(f[across]):.1f},{y(f[key]):.1f}" for f in line)
            style = f'stroke="{"#888" if key == "generate" else colour}" stroke-width="2" stroke-dasharray="{dash}"'
            drawn.append(f'<polyline points="{path}" fill="none" {style}/>')
        dots = [(x(f[across]), y(f["tokens_per_s"])) for f in line]
        drawn += [f'<circle cx="{at:.1f}" cy="{height:.1f}" r="3" fill="{colour}"/>' for at, height in dots]
        ends.append((dots[-1][1] + 4, f"batch {value}" if kind == "batch" else f"{value:.0%} right", colour))
    lowest = 0.0
    for height, name, colour in sorted(ends):  # none over another
        lowest = max(height, lowest + 14)
        drawn.append(_text(WIDTH + 8, lowest, name, "start", f'fill="{colour}"'))
    return "\n".join(drawn)


def scatter(points: Iterable[tuple[str, float, float]], *, across: str, up: str) -> str:
    """Named points (name, x, y): x on a logarithmic scale, y on a plain one."""
    found = sorted(points, key=lambda point: point[1])
    left, right = math.log(found[0][1] / 1.5), math.log(found[-1][1] * 1.5)
    heights = [y for _, _, y in found]
    low, high = min(heights) - 0.02, max(heights) + 0.02
    width, height = 2 * WIDTH, HEIGHT + 80
    drawn = [f'<rect width="{width}" height="{height}" fill="none" stroke="#888"/>']
    for tick in (n * 10**power for power in range(-3, 5) for n in (1, 2, 5)):
        if left <= math.log(tick) <= right:
            at = width * (math.log(tick) - left) / (right - left)
            drawn.append(f'<path d="M{at:.1f} 0v{height}" stroke="#ddd"/>' + _text(at, height + 17, f"{tick:g}"))
    for tick in (n * 0.05 for n in range(-20, 21)):
        if low <= tick <= high:
            at = height * (high - tick) / (high - low)
            drawn.append(f'<path d="M0 {at:.1f}h{width}" stroke="#ddd"/>' + _text(-6, at + 4, f"{tick:.2f}", "end"))
    for number, (name, x, y) in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        at = width * (math.log(x) - left) / (right - left), height * (high - y) / (high - low)
        drawn.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4" fill="{colour}"/>')
        drawn.append(_text(at[0] + 7, at[1] - 6, name, "start", f'fill="{colour}"'))
    drawn += [_text(width / 2, height + 36, across), _text(-6, -8, up, "end")]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 240} {height + 90}" '
        'font-family="sans-serif" font-size="12">'
    )
    body = "\n".join(drawn)
    return f'{head}<rect width="100%" height="100%" fill="white"/><g transform="translate(70 30)">{body}</g></svg>\n'


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'
