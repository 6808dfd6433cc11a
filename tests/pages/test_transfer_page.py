"""Drawings of the transfer page that a reader could take for one another."""

from __future__ import annotations

import re

from mlip.pages.charts import PALETTE, line_chart
from mlip.pages.transfer_page import DASHES, unit_chart


def test_a_curve_differs_from_every_other_in_more_than_its_colour_and_so_does_its_key() -> None:
    count = len(PALETTE) * len(DASHES)
    names = [f"class_{i}" for i in range(count)]
    drawing = str(unit_chart([([0.0, 1.0], [0.0, 1.0])] * count, names, "x", "y"))
    how = r'stroke="([^"]+)" stroke-width="2" stroke-dasharray="([^"]+)"'
    curves = re.findall(rf'<polyline points="[^"]+" fill="none" {how}><title>class_', drawing)
    keys = re.findall(rf"<line [^>]*{how}/></svg>class ", drawing)
    assert curves == keys and len(set(curves)) == count
    first = curves[: len(PALETTE)]
    assert len({colour for colour, _ in first}) == len({dash for _, dash in first}) == len(first)


def test_epochs_have_whole_numbers() -> None:
    for epochs in (2, 3, 10, 30):
        drawing = str(line_chart(range(1, epochs + 1), [1.0] * epochs))
        under = re.findall(r'y="145" text-anchor="\w+" class="axis">([^<]+)<', drawing)
        assert len(under) >= 2 and all(float(tick).is_integer() for tick in under)
