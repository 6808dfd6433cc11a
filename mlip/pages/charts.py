"""The report's drawings as inline SVG: no script, no font, no file beside the page.

Colours are the variables of report.css, which has a set for dark screens: Okabe and Ito's (2008)
first three, then others, all of contrast 3 or more with the paper. Where two series meet, shape or
dash differs as well. A drawing says in words what it shows, for those who hear the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

INK, MUTED, RULE, PAPER = "var(--ink)", "var(--muted)", "var(--rule)", "var(--paper)"
BLUE, ORANGE, GREEN, GREY = "var(--blue)", "var(--vermilion)", "var(--green)", "var(--grey)"
PALETTE = (BLUE, ORANGE, GREEN, "var(--violet)", "var(--brown)", INK)


@dataclass(frozen=True)
class Mark:
    """One value on a scale, with its interval."""

    value: float | None
    low: float | None = None
    high: float | None = None
    colour: str = BLUE
    shape: str = "dot"  # dot | ring | square | diamond | tick
    label: str = ""


def _shape(shape: str, x: float, y: float, colour: str) -> str:
    if shape == "ring":
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{PAPER}" stroke="{colour}" '
            'stroke-width="1.8"/>'
        )
    if shape == "square":
        return (
            f'<rect x="{x - 3.4:.1f}" y="{y - 3.4:.1f}" width="6.8" height="6.8" fill="{colour}"/>'
        )
    if shape == "diamond":
        corners = ((x, y - 4.8), (x + 4.8, y), (x, y + 4.8), (x - 4.8, y))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        return f'<polygon points="{points}" fill="{PAPER}" stroke="{colour}" stroke-width="1.5"/>'
    if shape == "tick":
        return (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6:.1f}" y2="{y + 6:.1f}" '
            f'stroke="{colour}" stroke-width="1.8"/>'
        )
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" fill="{colour}"/>'


def scale_marks(
    lanes: Sequence[Sequence[Mark]],
    *,
    low: float,
    high: float,
    width: int = 250,
    grid: Sequence[float] = (),
) -> Markup:
    """Values on one horizontal scale, one lane above the other; intervals as lines."""
    lane_px, pad = 11, 7.0
    height = lane_px * len(lanes) + 10

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return pad + share * (width - 2 * pad)

    parts = [
        f'<svg class="scale" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{_told(lanes)}">'
    ]
    for value in grid:
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="0" y2="{height}" '
            f'stroke="{RULE}" stroke-width="1"/>'
        )
    for i, lane in enumerate(lanes):
        y = 5 + lane_px * (i + 0.5)
        for mark in lane:
            if mark.value is None:
                continue
            if mark.low is not None and mark.high is not None:
                parts.append(
                    f'<line x1="{x(mark.low):.1f}" x2="{x(mark.high):.1f}" y1="{y:.1f}" '
                    f'y2="{y:.1f}" stroke="{mark.colour}" stroke-width="1.5"/>'
                )
            title = f"<title>{escape(mark.label)} {mark.value:.3f}</title>"
            parts.append(f"<g>{title}{_shape(mark.shape, x(mark.value), y, mark.colour)}</g>")
    return Markup("".join([*parts, "</svg>"]))


def _told(lanes: Sequence[Sequence[Mark]]) -> Markup:
    """What the lanes of a scale show, from left to right of each."""
    told = [
        f"{mark.label} {mark.value:.3f}"
        + ("" if mark.low is None or mark.high is None else f" ({mark.low:.3f} to {mark.high:.3f})")
        for lane in lanes
        for mark in lane
        if mark.value is not None
    ]
    return escape("; ".join(told) or "no value")


def scale_axis(
    *, low: float, ticks: Sequence[float], width: int = 250, high: float = 1.0
) -> Markup:
    """The axis that belongs over a column of scale_marks."""
    pad = 7.0
    parts = [
        f'<svg class="scale" width="{width}" height="15" viewBox="0 0 {width} 15" role="img" '
        f'aria-label="scale from {ticks[0]:.1f} to {ticks[-1]:.1f}">'
    ]
    for tick in ticks:
        x = pad + (tick - low) / (high - low) * (width - 2 * pad)
        anchor = "start" if tick == low else "end" if tick == high else "middle"
        at = 1.0 if tick == low else width - 1.0 if tick == high else x
        parts.append(
            f'<text x="{at:.1f}" y="11" text-anchor="{anchor}" class="axis">{tick:.1f}</text>'
        )
    return Markup("".join([*parts, "</svg>"]))


def legend(marks: Sequence[Mark]) -> Markup:
    """Names of the marks in use, each with its sign."""
    items = "".join(
        f'<span class="key"><svg width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">'
        f"{_shape(m.shape, 7, 7, m.colour)}</svg>{escape(m.label)}</span>"
        for m in marks
    )
    return Markup(f'<p class="legend">{items}</p>')


def _nice_step(span: float) -> float:
    """A round number that about a fourth of the span is."""
    raw = span / 4
    if raw <= 0 or not math.isfinite(raw):
        return 1.0
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * magnitude >= raw)


def _label(value: float, step: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if step < 1e-3:
        return powers_of_ten(value) if value else "0"
    digits = max(0, -math.floor(math.log10(step)))
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:  # 2.5, 0.25
        digits += 1
    return f"{value:.{digits}f}"


def powers_of_ten(value: float) -> str:
    """5e-4 for 0.0005: what format calls 5.0e-04 is too wide for a chart's margin."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def running_window(count: int) -> int:
    """Odd width of the running mean over `count` points: about a twelfth of them."""
    return max(1, count // 25) * 2 + 1 if count > 8 else 1


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over `window` finite values; ends use what there is."""
    half = window // 2
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def _vertical_range(values: Sequence[float], mean: Sequence[float]) -> tuple[float, float, float]:
    """(lowest, highest, tick step) of a chart of these values and their running mean: the ends are
    multiples of the step."""
    ordered = sorted(values)
    top = max(max(mean), ordered[int(0.98 * (len(ordered) - 1))])
    bottom = min(min(mean), ordered[int(0.02 * (len(ordered) - 1))])
    if bottom > 0 and bottom < 0.6 * top:
        bottom = 0.0
    # a constant that jitters in its last digits is a flat line, not a mountain range
    least = max(0.02 * abs(top), 1e-12)
    if top - bottom < least:
        top, bottom = top + least / 2, bottom - least / 2
    step = _nice_step(top - bottom)
    bottom = math.floor(bottom / step + 1e-9) * step
    return bottom, max(math.ceil(top / step - 1e-9) * step, bottom + step), step


def line_chart(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    colour: str = BLUE,
    is_smoothed: bool = True,
    over: str = "step",
) -> Markup:
    """One curve: what was logged, faint, under its running mean; `over` names its steps.

    Steps are whole numbers, and so are the ticks below them: of two epochs, none is number 1.25.
    The vertical range holds the smoothed curve and most of the noise, not one early spike.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if not points:
        return Markup('<p class="none">no finite value was logged</p>')
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    mean = smoothed(ys, running_window(len(ys))) if is_smoothed else ys
    bottom, top, step = _vertical_range(ys, mean)
    width, height = 312, 150
    left, right, up, down = 44.0, 12.0, 8.0, 20.0
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> str:
        px = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        py = up + (top - min(max(y, bottom), top)) / (top - bottom) * (height - up - down)
        return f"{px:.1f},{py:.1f}"

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="curve from {mean[0]:.3g} at {over} {xs[0]:,.0f} '
        f"to {mean[-1]:.3g} at {over} {xs[-1]:,.0f}; lowest {min(mean):.3g}, "
        f'highest {max(mean):.3g}">'
    ]
    count = round((top - bottom) / step)
    for i in range(count + 1):
        value = bottom + i * step
        y = at(x_low, value).split(",")[1]
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="{RULE}"/>'
            f'<text x="{left - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end" class="axis">'
            f"{_label(value, step)}</text>"
        )
    x_step = float(math.ceil(_nice_step(x_high - x_low)))
    tick = math.ceil(x_low / x_step) * x_step
    while tick <= x_high + 1e-9:
        px = float(at(tick, bottom).split(",")[0])
        at_end = px > width - right - 12
        parts.append(
            f'<text x="{width - 1 if at_end else px:.1f}" y="{height - 5}" '
            f'text-anchor="{"end" if at_end else "middle"}" class="axis">'
            f"{_label(tick, x_step)}</text>"
        )
        tick += x_step
    raw = " ".join(at(x, y) for x, y in points)
    line = " ".join(at(x, y) for x, y in zip(xs, mean, strict=True))
    parts.append(
        f'<polyline points="{raw}" fill="none" stroke="{colour}" stroke-opacity=".25"/>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" '
        'stroke-linejoin="round"/>'
    )
    if len(points) == 1:
        cx, cy = at(*points[0]).split(",")
        parts.append(f'<circle cx="{cx}" cy="{cy}" r="3.5" fill="{colour}"/>')
    return Markup("".join([*parts, "</svg>"]))


def stacked_bar(parts: Sequence[tuple[str, int, str]], *, width: int = 900) -> Markup:
    """Shares of a whole as one bar: (name, count, colour)."""
    total = sum(count for _, count, _ in parts) or 1
    x, drawn = 0.0, []
    for name, count, colour in parts:
        w = width * count / total
        if count:
            drawn.append(
                f'<rect x="{x:.1f}" y="0" width="{max(w, 1.5):.1f}" height="16" fill="{colour}">'
                f"<title>{escape(name)}: {count:,}</title></rect>"
            )
        x += w
        if w > 4:  # neighbours of one brightness stay two parts
            drawn.append(f'<path d="M{x:.1f} 0V16" stroke="{PAPER}" stroke-width="2"/>')
    told = escape("; ".join(f"{name}: {count:,}" for name, count, _ in parts if name))
    return Markup(
        f'<svg class="bar" viewBox="0 0 {width} 16" width="100%" height="16" '
        f'preserveAspectRatio="none" role="img" aria-label="{told}">{"".join(drawn)}</svg>'
    )
