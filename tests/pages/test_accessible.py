"""What a reader without a mouse, without sight, or with other colour vision needs of every page:
the parts of WCAG 2.1 AA that can be read off the text of a page and its style sheet.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mlip.pages import charts
from mlip.pages.page import TEMPLATES
from mlip.pages.run_page import write_report
from mlip.pages.search_page import write_search_page
from mlip.pages.transfer_page import render_transfer
from mlip.settings import config as configuration
from mlip.transfer.films.archive import Hits
from mlip.transfer.films.search import Query
from mlip.transfer.films.search_table import Picture
from mlip.transfer.png_text import png_text
from tests.pages.test_run_page import LEDGER, write_log
from tests.small_run import small_results

VOID = {"meta", "img", "br", "link", "hr", "input", "col"}
CSS = (TEMPLATES / "report.css").read_text(encoding="utf-8")


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parents: tuple[Element, ...]
    text: str = ""

    def inside(self, tag: str) -> Element | None:
        return next((parent for parent in reversed(self.parents) if parent.tag == tag), None)


class Elements(HTMLParser):
    """All elements of a page in its order, each with the text that it and those in it hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[Element] = []
        self.open: list[Element] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append(Element(tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(self.all[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append(Element(tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def of(self, *tags: str) -> list[Element]:
        return [element for element in self.all if element.tag in tags]


def _run_page(folder: Path) -> str:
    write_log(folder)
    (folder / "ledger.json").write_text(json.dumps(LEDGER))
    return write_report(folder, small_results()).read_text()


def _search_page(folder: Path) -> str:
    film = np.zeros((8, 8), dtype=np.uint8)
    shown = [Picture(film, np.eye(2)), Picture(film, None), Picture(None, None)]
    query = Query("phrase", "left pleural effusion", np.zeros(2, dtype=np.float32))
    hits = Hits(np.arange(3), np.array([0.5, 0.4, 0.3]))
    path = folder / "found.html"
    write_search_page(path, "searched 3", [query], [hits], [shown], is_reranked=False)
    return path.read_text()


def _told(value: float | None) -> dict:
    known = {"low": None, "high": None, "seeds": [], "reason": "one patient", "n": 9}
    return {"value": value, **known, "classes": 1, "classes_asked": 1, "seed_sd": None}


def _transfer_page(folder: Path) -> str:
    line = [[0.1, 0.1], [0.2, 0.1], [0.2, 0.2]]
    split = {"images": 9, "patients": 9, "with_a_positive": 3}
    curve = dict.fromkeys(
        ("false_positive_rate", "true_positive_rate", "recall", "precision"), [0.0, 1.0]
    )
    one = {"class": "lung_nodule", "n": 9, "positives": 3, "auroc": _told(0.8), "f1": _told(None)}
    scores = {
        "headline": "macro.auroc",
        "macro": {"auroc": _told(0.8)},
        "classes": [{**one, "curve": curve, "confusion": [[5, 1], [1, 2]]}],
        "images": 9,
    }
    fit = {"seed": 1, "rows": 9, "patients": 9, "best_epoch": 1, "epochs": 3, "steps": 3}
    fit |= {"val_loss": [0.3, 0.2, 0.1]}
    picture = {"study": "0f", "caption": "Dice 0", "image": png_text(np.zeros((8, 8), np.uint8))}
    picture |= {"truth_lines": [line], "predicted_lines": [line]}
    picture |= {"truth_boxes": [[0.1, 0.1, 0.2, 0.2]], "predicted_boxes": []}
    results = {
        "run": {"name": "x", "seeds": [1]},
        "task": {"name": "classification", "encoder": "frozen", "start": "random"},
        "data": {"splits": {"test": split}, "unreadable": {}},
        "fractions": [{"percent": 100.0, "scores": scores, "fits": [fit]}],
        "pictures": [picture],
        "config": configuration.to_dict(configuration.Config()),
        "fingerprints": {"weights": "00"},
        "versions": {},
    }
    results["task"]["classes"] = ["lung_nodule"]
    return render_transfer(results)


PAGES = {"report.html": _run_page, "search.html": _search_page, "transfer.html": _transfer_page}


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Elements:
    return Elements(PAGES[request.param](tmp_path_factory.mktemp("page")))


def test_every_kind_of_page_is_looked_at() -> None:
    framed = {f.name for f in TEMPLATES.iterdir() if '{% extends "page.html"' in f.read_text()}
    assert framed == set(PAGES)


def test_a_page_has_its_language_one_title_and_headings_without_a_gap(page: Elements) -> None:
    (html,) = page.of("html")
    assert html.attributes["lang"] == "en"
    assert len([t for t in page.of("title") if t.inside("head")]) == 1
    assert len(page.of("main")) == 1 == len(page.of("header"))
    levels = [int(h.tag[1]) for h in page.of(*(f"h{i}" for i in range(1, 7)))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in zip(levels, levels[1:], strict=False))
    assert all(h.text.strip() for h in page.of("h1", "h2", "h3"))


def test_every_picture_says_what_it_shows_and_none_what_a_report_says(page: Elements) -> None:
    alts = [image.attributes.get("alt") or "" for image in page.of("img")]
    assert all(len(alt) > 5 for alt in alts)
    # ours, word for word: nothing of a film, a study or a text; a row's number is of search alone
    known = re.compile(
        r"Radiograph(, answer \d| with the true box(es)?( of the finding)?"
        r"|, outlined: truth and prediction)?"
        r"|Map over (another radiograph|the radiograph, the hottest point (in|out)side the true "
        r"box(es)?|the film of row \d+: where it is like the words)"
        r"|Map of one word over the radiograph|The radiograph that was asked with|Film of row \d+"
    )
    assert [alt for alt in alts if not known.fullmatch(alt)] == []
    for drawing in page.of("svg"):
        is_hidden = drawing.attributes.get("aria-hidden") == "true"
        named = drawing.attributes.get("role") == "img" and drawing.attributes.get("aria-label")
        assert is_hidden or named, drawing.attributes


def test_every_table_has_a_name_headers_with_a_scope_and_a_box_that_keys_can_scroll(
    page: Elements,
) -> None:
    tables = page.of("table")
    for table in tables:
        (caption,) = (c for c in page.of("caption") if c.inside("table") is table)
        box = table.parents[-1].attributes
        assert box["class"] == "wide" and box["tabindex"] == "0" and caption.text.strip()
        assert box["aria-label"] == caption.text and box["role"] == "group"
    assert len({c.text for c in page.of("caption")}) == len(tables)
    for cell in page.of("th"):
        assert cell.attributes["scope"] == ("col" if cell.inside("thead") else "row")
        drawn = [e.attributes.get("aria-label") for e in page.of("svg") if cell in e.parents]
        assert cell.text.strip() or any(drawn)
    for row in page.of("tr"):
        assert any(cell.parents[-1] is row for cell in page.of("th")), row.text
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", CSS)
    # at the end of a line its one pixel lay beyond the page: 711 px of 710 on paper
    assert re.search(r"\.unseen \{[^}]*margin: -1px; width: 1px", CSS)


def test_what_can_be_reached_by_keys_has_a_name_and_shows_that_it_is_reached(
    page: Elements,
) -> None:
    for element in page.of("a", "button"):
        assert element.text.strip()
    labels = {label.attributes.get("for") for label in page.of("label")}
    for element in page.of("input", "select", "textarea"):
        assert element.attributes.get("id") in labels or element.attributes.get("aria-label")
    assert all(nav.attributes.get("aria-label") for nav in page.of("nav"))
    assert ":focus-visible { outline: 3px solid" in CSS and "outline: none" not in CSS


def test_a_reason_for_no_number_is_on_the_page_and_not_under_the_mouse_alone(
    page: Elements,
) -> None:
    assert [e for e in page.all if "title" in e.attributes] == []


def test_a_drawing_in_words_has_its_numbers() -> None:
    marks = [charts.Mark(0.81, 0.75, 0.9, label="a < b"), charts.Mark(None, label="c")]
    drawn = Elements(str(charts.scale_marks([marks], low=0.0, high=1.0))).of("svg")
    assert drawn[0].attributes["aria-label"] == "a < b 0.810 (0.750 to 0.900)"
    bare = Elements(str(charts.scale_marks([[marks[1]]], low=0.0, high=1.0))).of("svg")
    assert bare[0].attributes["aria-label"] == "no value"
    curve = Elements(str(charts.line_chart([1, 2, 4], [3.0, 0.5, 1.0], is_smoothed=False)))
    assert curve.of("svg")[0].attributes["aria-label"] == (
        "curve from 3 at step 1 to 1 at step 4; lowest 0.5, highest 3"
    )
    bar = Elements(str(charts.stacked_bar([("a", 1500, "x"), ("", 1, "transparent")])))
    assert bar.of("svg")[0].attributes["aria-label"] == "a: 1,500"


def test_a_map_says_whether_it_points_into_the_box(tmp_path: Path) -> None:
    """What a cross and a frame say to the eye, and the examples say to no one else."""
    results = copy.deepcopy(small_results())
    first, *_ = results["examples"]["grounding"]
    x0, y0, x1, y1 = first["boxes"][0]
    results["examples"]["grounding"] = [first]
    for at, where in (([x0 + 0.5, y0 + 0.5], "inside"), ([x1 + 1, y1 + 1], "outside")):
        first["maps"][0]["point"] = at
        first["boxes"] = [[x0, y0, x1, y1]]
        page = Elements(write_report(tmp_path, results).read_text())
        alts = [image.attributes["alt"] for image in page.of("img")]
        assert f"Map over the radiograph, the hottest point {where} the true box" in alts[1:2]


def _palettes() -> dict[str, dict[str, str]]:
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    )
    assert set(light) == set(dark)
    return {"light": light, "dark": dark}


def _light(colour: str) -> np.ndarray:
    """Linear red, green, blue of an sRGB colour."""
    share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG's ratio, 1 to 21."""
    high, low = sorted(float(_light(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))[::-1]
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_a_contrast_of_4_5_and_what_is_drawn_of_3(scheme: str) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)  # WCAG's near miss
    colours = _palettes()[scheme]
    for text in ("ink", "soft", "muted", "warning", "right", "blue"):
        for under in ("paper", "ground"):
            assert contrast(colours[text], colours[under]) >= 4.5, (text, under)
    for drawn in re.findall(r"\w+", " ".join(charts.PALETTE).replace("var", "")):
        assert contrast(colours[drawn], colours["paper"]) >= 3.0, drawn
    for drawn in ("grey", "muted"):
        assert contrast(colours[drawn], colours["paper"]) >= 3.0, drawn


# of linear red, green and blue at full strength (Machado, Oliveira and Fernandes 2009, table 1)
VISIONS = {
    "any": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
LEAST_APART = 15.0  # CIE 1976 colour difference; 2.3 is just noticeable side by side


def _lab(colour: str, vision: str) -> np.ndarray:
    seen = np.clip(np.array(VISIONS[vision]) @ _light(colour), 0.0, 1.0)
    share = TO_XYZ @ seen / TO_XYZ.sum(axis=1)
    x, y, z = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_two_colours_of_the_curves_look_alike(scheme: str, vision: str) -> None:
    colours = _palettes()[scheme]
    names = re.findall(r"--(\w+)", " ".join(charts.PALETTE))
    seen = [_lab(colours[name], vision) for name in names]
    for i, one in enumerate(seen):
        for k, other in enumerate(seen[:i]):
            assert np.linalg.norm(one - other) >= LEAST_APART, (names[i], names[k])


def test_no_colour_but_those_of_the_style_sheet_is_in_a_page(page: Elements) -> None:
    """One that is written elsewhere has no counterpart on a dark screen. Over films, which are
    black on any, and for excluded rows, whose greys are named beside them, it may be so."""
    free = re.compile(r"#[0-9a-f]{3,6}\b")
    allowed = {"#56d4ff", "#ffb000", "#a3adb7", "#bcc4cb"}
    found = {
        colour
        for element in page.all
        for name in ("fill", "stroke", "style")
        for colour in free.findall(element.attributes.get(name) or "")
    }
    assert found <= allowed


def test_motion_and_dark_are_the_readers_choice_and_paper_is_white() -> None:
    moving = "@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }"
    assert moving in CSS
    assert re.search("scroll-behavior|transition|animation", CSS.replace(moving, "")) is None
    assert "@media screen and (prefers-color-scheme: dark)" in CSS
