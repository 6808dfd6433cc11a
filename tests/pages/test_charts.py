"""A drawing read as a person reads it, by the numbers on its axes, gives back what was drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mlip.pages.charts import Mark, line_chart, scale_axis, scale_marks, stacked_bar

_TEXT = re.compile(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="axis">([^<]+)<')


def _number(label: str) -> float:
    return 1e3 * float(label[:-1]) if label.endswith("k") else float(label)


def _read(drawing: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each curve, from its pixels and the two axes."""
    texts = [(float(x), float(y), end, _number(t)) for x, y, end, t in _TEXT.findall(drawing)]
    under = [(x, value) for x, y, end, value in texts if y == 145.0 and end == "middle"]
    beside = [(y - 3.5, value) for _, y, _, value in texts if y != 145.0]
    axes = [np.array(sorted(axis)).T for axis in (under, beside)]
    for pixels, values in axes:  # every label is at its own place
        fitted = np.polyval(np.polyfit(pixels, values, 1), pixels)
        assert np.abs(fitted - values).max() < 0.02 * np.ptp(values)
    laws = [np.polyfit(pixels, values, 1) for pixels, values in axes]
    assert laws[0][0] > 0 > laws[1][0]  # to the right, and up: pixels count downwards
    curves = []
    for points in re.findall(r'<polyline points="([^"]+)"', drawing):
        xy = np.array([point.split(",") for point in points.split()], dtype=float).T
        curves.append((np.polyval(laws[0], xy[0]), np.polyval(laws[1], xy[1])))
    return curves


@pytest.mark.parametrize(
    ("first", "last"),
    [(9.0, 1.0), (9.0, 7.5), (0.9, 0.1), (-3.0, 5.5), (31_000.0, 21_000.0), (0.25, 0.2)],
)
@pytest.mark.parametrize("steps", [range(1, 10), range(500, 2500, 100), range(20, 29)])
def test_a_curve_is_read_off_its_axes(first: float, last: float, steps: range) -> None:
    """A loss from 9 to 1 had ticks of 2.5, and under them 0, 2, 5, 8 and 10."""
    values = np.linspace(first, last, len(steps))
    drawing = str(line_chart(steps, values.tolist(), is_smoothed=False))
    for at, height in _read(drawing):
        assert np.abs(at - np.array(steps)).max() < 0.02 * np.ptp(steps)
        assert np.abs(height - values).max() < 0.02 * abs(first - last)


def test_noise_is_drawn_under_its_mean_and_one_spike_does_not_set_the_range() -> None:
    values = [2.0 + 0.5 * (-1) ** step for step in range(200)]
    values[100], values[150] = 1e3, -1e3
    (_, raw), (_, mean) = _read(str(line_chart(range(200), values)))
    assert np.allclose(raw[:90], values[:90], atol=0.05)
    assert np.abs(mean[10:80] - 2.0).max() < 0.1
    assert -200.0 < raw[150] < raw[100] < 200.0  # cut at the edge, not drawn beyond the chart


def test_one_step_alone_is_a_point() -> None:
    assert "<circle" in str(line_chart([3], [0.5]))


def test_an_axis_and_the_marks_under_it_agree() -> None:
    """Lanes apart, intervals around their values, and what is below the axis at its end."""
    axis = str(scale_axis(low=0.5, ticks=(0.5, 0.75, 1.0), width=214))
    assert ("107.0", "0.8") in [(x, t) for x, _, _, t in _TEXT.findall(axis)]
    lanes = [[Mark(0.75, 0.625, 0.875, label="a < b")], [Mark(0.2)]]
    drawing = str(scale_marks(lanes, low=0.5, high=1.0, width=214))
    assert 'x1="57.0" x2="157.0" y1="10.5" y2="10.5"' in drawing
    assert "<title>a &lt; b 0.750</title>" in drawing
    assert re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing) == [
        ("107.0", "10.5"),
        ("7.0", "21.5"),
    ]


def test_shares_of_a_bar_lie_end_to_end() -> None:
    drawing = str(stacked_bar([("a", 50, "x"), ("b", 0, "x"), ("c", 25, "x"), ("d", 25, "x")]))
    places = re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', drawing)
    assert places == [("0.0", "450.0"), ("450.0", "225.0"), ("675.0", "225.0")]
