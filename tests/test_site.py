"""The site of `make site`: its lists (docs/site/conf.py) name what is there, and what is built from
a copy of the tracked files has every link, loads nothing from a network, and keeps the lists of
docstrings.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import PAGES as OTHERS_READ
from tests.test_packaging import source  # noqa: F401  a copy of the files that git tracks

ROOT = Path(__file__).resolve().parents[1]
CONF: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "site" / "conf.py"))
LISTED = [page for pages in CONF["PAGES"].values() for page in pages]
MODULES = [(name, part[name]) for part in CONF["MODULES"].values() for name in part]
MADE = "docs/api/index.md"  # at each build
NEEDED = ("sphinx", "myst_parser", "furo")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


def test_the_side_bar_has_every_page_once() -> None:
    # the front page holds it
    pages = {str(page.relative_to(ROOT)) for page in OTHERS_READ} - {"README.md"} | {"LOG.md"}
    assert sorted(LISTED) == sorted([*pages, MADE])


@pytest.mark.parametrize(("module", "names"), MODULES, ids=[name for name, _ in MODULES])
def test_the_api_reference_names_what_can_be_imported(module: str, names: str) -> None:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "mlip").startswith("mlip"):
            raise
        pytest.skip(f"{error.name} is not installed")
    assert [name for name in names.split() if not hasattr(found, name)] == []
    assert len(names.split()) == len(set(names.split()))


def test_the_api_reference_has_every_loss_and_operator() -> None:
    listed = dict(MODULES)
    assert len(listed) == len(MODULES)
    losses = importlib.import_module("mlip.losses").LOSSES
    assert {loss.__name__ for loss in losses.values()} <= set(listed["mlip.losses"].split())
    operators = {file.parent.name for file in (ROOT / "kernels").glob("*/__init__.py")}
    assert {f"mlip.kernels.{name}" for name in operators} <= set(listed)


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Built strictly, in a process that cannot import the project or torch."""
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed (the extra docs; make setup has it)")
    out = tmp_path_factory.mktemp("site")
    code = (
        "import sys; from sphinx.cmd.build import main\n"
        "for name in ('mlip', 'torch', 'nvidia'): sys.modules[name] = None\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-P", "-c", code, "-q", "-W", "--keep-going", "-c", "docs/site"]
    done = subprocess.run(
        [*command, "-d", str(out / "pages"), ".", str(out / "html")],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_the_built_pages_load_nothing_from_a_network(site: Path) -> None:
    read = [file for file in site.rglob("*") if file.suffix in (".html", ".css", ".js", ".svg")]
    assert len(read) > 40
    loads = re.compile(
        r"""<(?!a\s)[a-z]+\s[^>]*?(?:src|srcset|href|data|poster)\s*=\s*["']\s*(?:https?:)?//[^"']*"""
        r"""|url\(\s*["']?\s*(?:https?:)?//[^)]*|@import[^;]*//[^;]*"""
        r"""|(?:fetch|import|importScripts|open)\(\s*["'`](?:https?:)?//[^)]*"""
    )
    assert loads.search('<link rel="x" href="https://a/b.css">') and loads.search("url(//a/b)")
    found = [(file.name, hit) for file in read for hit in loads.findall(file.read_text("utf-8"))]
    assert found == []


def test_every_link_of_the_built_site_leads_somewhere(site: Path) -> None:
    pages = {file: file.read_text("utf-8") for file in site.rglob("*.html")}
    anchors = {file: set(re.findall(r'\bid="([^"]+)"', text)) for file, text in pages.items()}
    for file, text in pages.items():
        for link in re.findall(r'<a\s[^>]*?href="([^"]*)"', text):
            path, _, anchor = html.unescape(link).partition("#")
            if re.match(r"https?:", path):
                continue
            target = (file.parent / path).resolve() if path else file
            assert target.is_file(), f"{file.name}: {link}"
            assert not anchor or anchor in anchors[target], f"{file.name}: {link}"
    assert len(pages) > 40


def test_the_front_page_is_the_readme_with_every_page_beside_it(site: Path) -> None:
    front = (site / "index.html").read_text("utf-8")
    assert front == (site / "README.html").read_text("utf-8")
    for page in LISTED:
        assert f'href="{page.removesuffix(".md")}.html"' in front, page


def test_the_api_pages_have_signatures_and_the_lists_of_docstrings(site: Path) -> None:
    for module, names in MODULES:
        page = (site / "docs" / "api" / f"{module}.html").read_text("utf-8")
        assert [name for name in names.split() if f'id="{module}.{name}"' not in page] == []
        assert names or page.count('class="sig sig-object py"') > 0
    words = _words(site / "docs" / "api" / "mlip.transfer.films.archive.html")
    # a list of arguments with a section behind it, each on a line of its own
    assert re.search(
        r"\ngroups\n *: *\n+\[rows of the manifest\][^\n]*\n+"
        r"without\n *: *\n+manifest rows[^\n]*\n+Raises\n *: *\n+ValueError for vectors",
        words,
    )
    nce = _words(site / "docs" / "api" / "mlip.kernels.info_nce.html")
    assert re.search(r"\nShapes\n *: *\n+image_features, text_features \[B, D\] unit length;", nce)
    assert re.search(r"\nReturns\n *: *\n+scalar in nats, the same on every rank", nce)
    # continued lines are one text, and what follows a section is none of it
    assert "this rank's rows: equal ids are never each other's negatives\n" in nce
    assert re.search(r"exclusion of equal ids are ours\n+Each rank's gradients are W times", nce)
    losses = _words(site / "docs" / "api" / "mlip.losses.html")
    assert re.search(r"\nCost\n *: *\n+with several ranks the host must", losses)
    # the comment beside a field is its text
    batch = _words(site / "docs" / "api" / "mlip.batch.html")
    assert "[B] int64, always on the host: real tokens of each report, for what must know" in batch


def test_what_scrolls_is_reached_by_keys_and_headings_of_the_side_bar_have_a_level(
    site: Path,
) -> None:
    """axe found 14 boxes of code out of reach on the front page, and 7 headings without a level."""
    front = (site / "index.html").read_text("utf-8")
    assert re.search(r'<html [^>]*lang="en"', front) and front.count("<h1>") == 1
    assert front.count('<pre tabindex="0">') > 10 and "<pre>" not in front
    assert front.count('<div tabindex="0" class="table-wrapper') == front.count("<table") > 4
    assert front.count('role="heading" aria-level="2"') == len(CONF["PAGES"])
    assert front.count('role="heading"') == len(CONF["PAGES"])
    assert '<th class="head"><p></p></th>' not in front
    images = re.findall(r"<img [^>]*>", front)
    assert images and all(re.search(r'alt="[^"]{20,}"', image) for image in images)


def _words(page: Path) -> str:
    """What a reader sees, a line for each element."""
    text = page.read_text("utf-8").partition("<article")[2]
    return re.sub(r"\n[\n ]*\n", "\n", html.unescape(re.sub(r"<[^>]+>", "\n", text)))
