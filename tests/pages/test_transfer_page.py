"""Drawings of the transfer page that a reader could take for one another."""

from __future__ import annotations

import re

from mlip.pages.charts import PALETTE, line_chart
from mlip.pages.transfer_page import unit_chart


def test_a_colour_used_again_is_dashed_in_curve_and_key() -> None:
    names = [f"class_{i}" for i in range(len(PALETTE) + 2)]
    drawing = str(unit_chart([([0.0, 1.0], [0.0, 1.0])] * len(names), names, "x", "y"))
    assert drawing.count("stroke-dasharray") == 2 == drawing.count("swatch dash")
    assert "<title>class_7</title>" in drawing and "</span>class 7</span>" in drawing


def test_epochs_have_whole_numbers() -> None:
    for epochs in (2, 3, 10, 30):
        drawing = str(line_chart(range(1, epochs + 1), [1.0] * epochs))
        under = re.findall(r'y="145" text-anchor="\w+" class="axis">([^<]+)<', drawing)
        assert len(under) >= 2 and all(float(tick).is_integer() for tick in under)
