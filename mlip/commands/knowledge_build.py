"""`mlip knowledge build`: the lexicon, ontologies and tables of a user's own as one concept table.

What does not live here: the options (knowledge.py), reading and merging (mlip/knowledge).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from mlip.knowledge.concept_files import is_table, load_concepts, write_table
from mlip.knowledge.concepts import ConceptTable, LexiconError
from mlip.knowledge.cues import read_cues
from mlip.knowledge.merging import merge
from mlip.knowledge.ontologies import read_csv, read_obo
from mlip.knowledge.umls import SEMANTIC_TYPES, read_umls
from mlip.system.output_file import require_replaceable, require_writable


def run_build(arguments: argparse.Namespace, console: Console) -> int:
    """Write the table that the options ask for, and tell what each source gave.

    Raises:  LexiconError where an option or a file cannot be used, or a source gives nothing
    """
    if arguments.out.suffix != ".jsonl":
        raise LexiconError(f"--out {arguments.out}: expected a name that ends in .jsonl")
    require_writable(arguments.out.parent)

    def require_own(out: Path) -> None:
        require_replaceable(out, "--out", "table of mlip knowledge build", is_ours=is_table(out))

    require_own(arguments.out)
    for option, values, reader, given in (
        ("--under", arguments.under, "--obo", arguments.obo),
        ("--sources", arguments.sources, "--umls", arguments.umls),
        ("--types", arguments.types, "--umls", arguments.umls),
        ("--languages", arguments.languages, "--umls", arguments.umls),
    ):
        if values and not given:
            raise LexiconError(f"{option} filters what {reader} reads; {reader} is not given")
    cues = read_cues(arguments.cues) if arguments.cues is not None else None
    tables = _tables(arguments)
    table = merge(tables[0], *tables[1:]) if len(tables) > 1 else tables[0]
    if cues is not None:
        table = ConceptTable(table.concepts, table.provenance, cues)
    console.print(f"{len(table)} concepts, fingerprint {table.fingerprint[:16]}")
    for line in _account(tables, table):
        console.print(f"  {escape(line)}")
    if arguments.umls is not None and (line := _codes_lost(tables)):
        console.print(f"  {line}")
    if table.provenance.get("licensed"):
        console.print("  holds UMLS text: it is yours to use under your licence, not to hand on")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, arguments.out, require_own=require_own)
    console.print(f"{arguments.out}")
    return 0


def _tables(arguments: argparse.Namespace) -> list[ConceptTable]:
    """One table a source, UMLS last.

    Raises:  LexiconError where there is none, or one is empty
    """
    tables = [] if arguments.no_lexicon else [load_concepts(None)]
    tables += [read_obo(path, under=arguments.under) for path in arguments.obo]
    tables += [read_csv(path) for path in arguments.csv]
    if arguments.umls is not None:
        tables.append(_umls(arguments))
    if not tables:
        raise LexiconError("nothing to build: give --obo, --csv or --umls, or drop --no-lexicon")
    for part in tables:
        if not len(part):
            raise LexiconError(
                f"{part.provenance['source']}: no concept was found; check it and its filters "
                f"({part.provenance.get('filters', 'none')})"
            )
    return tables


def _umls(arguments: argparse.Namespace) -> ConceptTable:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    errors = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        return read_umls(
            arguments.umls,
            languages=arguments.languages or ["ENG"],
            sources=arguments.sources,
            semantic_types=arguments.types or SEMANTIC_TYPES,
            progress=advance,
        )


def _account(tables: list[ConceptTable], merged: ConceptTable) -> Iterable[str]:
    """A line a source: its concepts, and what of them is not in the merged table as it was."""
    earlier: set[str] = set()
    for part in tables:
        line = f"{part.provenance.get('source')}: {len(part)} concepts"
        # one that was meant as new and has an old one's code is gone without a word otherwise
        if joined := [c.id for c in part if c.id in earlier or c.id not in merged]:
            names = f": {', '.join(joined)}" if len(joined) <= 5 else ""
            line += f", {len(joined)} joined to earlier ones by a code or an id{names}"
        if cut := part.provenance.get("is_a_edges_dropped"):
            line += f", {cut} is-a that close a circle left out"
        if part.provenance["source"] == "csv":  # a word mistaken there; releases are read in parts
            gone = sorted({p for c in part for p in c.parents if all(p not in t for t in tables)})
            names = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
            line += f", parents that are no id left out: {names}" if gone else ""
        yield line
        earlier.update(c.id for c in part)


def _codes_lost(tables: list[ConceptTable]) -> str:
    """A line about UMLS codes of the other tables that the last, of UMLS, does not have."""
    known = {code for concept in tables[-1] for code in concept.mappings["umls"]}
    asked = {code for part in tables[:-1] for c in part for code in c.mappings.get("umls", ())}
    lost = len(asked - known)
    if not lost:
        return ""
    return (
        f"{lost} of {len(asked)} UMLS codes of the others are of no concept that was read: "
        "retired without a successor, or left out by --types, --sources, --languages"
    )
