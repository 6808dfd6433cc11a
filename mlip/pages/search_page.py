"""The page of `mlip search`: each query's best films, with where its words point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip.pages.page import render_page, write_page
from mlip.pages.pictures import heat_uri, picture_uri
from mlip.system.output_file import require_replaceable
from mlip.transfer.films.archive import Hits
from mlip.transfer.films.search import Query
from mlip.transfer.films.search_table import Picture, number

_LEAST_PX = 224


def require_own_page(path: Path) -> None:
    """Raises:  ConfigError for a folder, or a file that this module did not write."""
    is_ours = False
    if path.is_file():
        with path.open("rb") as stream:
            is_ours = b"MLIP search</title>" in stream.read(4096)
    require_replaceable(path, "--page", "page of mlip search", is_ours=is_ours)


def write_search_page(
    path: Path,
    title: str,
    queries: Sequence[Query],
    hits: Sequence[Hits],
    pictures: Sequence[Sequence[Picture]],
    *,
    is_reranked: bool,
) -> Path:
    """One HTML file that loads nothing; row numbers stand for films.

    title  how much was searched, told_lines' first
    """
    shown = [_query(*one) for one in zip(queries, hits, pictures, strict=True)]
    with_heat = any(p.heat is not None for own in pictures for p in own)
    context = {
        "title": title,
        "queries": shown,
        "with_heat": with_heat,
        "is_reranked": is_reranked,
    }
    page = render_page("search.html", context)
    return write_page(path, page, require_own=require_own_page)


def _query(query: Query, hits: Hits, pictures: Sequence[Picture]) -> dict[str, Any]:
    heats = [p.heat for p in pictures if p.heat is not None]
    # one scale for all answers of a query: a film that does not fit must look so
    low, high = (min(map(np.min, heats)), max(map(np.max, heats))) if heats else (0.0, 0.0)
    rows = zip(hits.row_index.tolist(), hits.scores.tolist(), pictures, strict=True)
    return {
        "kind": query.kind,
        "name": query.name,
        "answers": [
            {
                "rank": rank,
                "row": row,
                "score": number(score, "+.3f"),
                "uri": None
                if shown.pixels is None
                else picture_uri(shown.pixels, least_px=_LEAST_PX),
                "heat": None
                if shown.pixels is None or shown.heat is None
                else heat_uri(shown.pixels, shown.heat, low, high, least_px=_LEAST_PX),
            }
            for rank, (row, score, shown) in enumerate(rows, start=1)
        ],
    }
