"""Which rows the GPU tables of the pages show: of one card, the newest of a case; what is compared
is of one commit. Rows of several cards and commits lie in benchmarks/results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
NOT_RUN = "not run"
# says nothing of the code: an earlier figure is still the newest there is
_NO_NEWS = (NOT_RUN, "not installed")
_CASE = ("kind", "variant", "pairs", "micro", "of", "is_cached", "op", "provider")
_CASE += ("batch", "tokens", "patches", "dim", "pooling", "fill", "learned")
_SOFTWARE = ("driver", "cuda", "torch", "triton", "python")


def commit_of(row: Row) -> str:
    """With a "+" where files were changed since."""
    facts = row.get("environment", {})
    return str(facts.get("commit")).removesuffix("+") + _mark(row)


def _mark(row: Row) -> str:
    facts = row.get("environment", {})
    return "+" if facts.get("modified") or str(facts.get("commit")).endswith("+") else ""


def date_of(row: Row) -> str:
    """When the row's run began, as text that sorts."""
    return str(row.get("environment", {}).get("date", ""))


def has_news(row: Row) -> bool:
    """Whether the row says anything of the code, be it that it failed."""
    return not str(row.get("status", "ok")).startswith(_NO_NEWS)


def of_newest_card(rows: list[Row]) -> list[Row]:
    """Rows measured on the card that was used last, oldest first, whatever their files' names."""
    on_gpu = sorted((row for row in rows if row["environment"].get("gpu")), key=date_of)
    return [row for row in on_gpu if row["environment"]["gpu"] == on_gpu[-1]["environment"]["gpu"]]


def latest(rows: list[Row]) -> list[Row]:
    """Of equal cases the newest row; one that had no time or no package hides none that ran, but a
    failure hides the figures of the code before it."""
    kept: dict[str, Row] = {}
    for row in rows:
        key = repr([row.get(name) for name in _CASE])
        if has_news(row) or key not in kept:
            kept[key] = row
    return list(kept.values())


def together(
    rows: list[Row], one: Callable[[Row], bool], other: Callable[[Row], bool]
) -> tuple[Row | None, Row | None]:
    """The rows of two cases, of the newest commit that measured both or in which `one` failed.

    Without such a commit neither has news, or only one of them has, or they are of two commits.
    """
    found = [next((r for r in reversed(latest(rows)) if case(r)), None) for case in (one, other)]
    for commit in dict.fromkeys(commit_of(row) for row in reversed(rows)):
        own = latest([row for row in rows if commit_of(row) == commit])
        first, second = (next((r for r in own if case(r) and has_news(r)), None)
                         for case in (one, other))  # fmt: skip
        if first is not None and (second is not None or first["status"] != "ok"):
            return first, second
    return found[0], found[1]


def commits(*rows: Row | None) -> str:
    """Short commits of the rows that a cell shows figures of, "-" where there is none."""
    known = [commit_of(row)[:7] + _mark(row) for row in rows if row is not None and has_news(row)]
    return " / ".join(dict.fromkeys(known)) or "-"


def origin(rows: list[Row]) -> str:
    """Card, versions and commits of the rows that tables show, and what else there is."""
    shown = latest(of_newest_card(rows))
    if not shown:
        return "Not run on a GPU yet."
    card = shown[-1]["environment"]["gpu"]
    setups: dict[str, set[str]] = {}
    for row in filter(has_news, shown):
        driver, cuda, torch, triton, python = (row["environment"][name] for name in _SOFTWARE)
        setup = f"driver {driver}, CUDA {cuda}, torch {torch}, triton {triton}, Python {python}"
        setups.setdefault(setup, set()).add(commit_of(row))
    made = "; ".join(f"{setup}, commit {', '.join(sorted(of))}" for setup, of in setups.items())
    others: dict[str, set[str]] = {}
    for row in rows:
        gpu = row["environment"].get("gpu")
        if gpu and gpu != card:
            others.setdefault(gpu, set()).add(commit_of(row))
    more = [f" Rows of {gpu} (commit {', '.join(sorted(of))}) are in no cell."
            for gpu, of in others.items()]  # fmt: skip
    return f"{card}, {made}.{''.join(more)}"
