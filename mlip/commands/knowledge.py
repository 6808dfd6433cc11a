"""The `mlip knowledge` command: build a concept table, look into it, see a report's mentions.

What does not live here: building a table (knowledge_build.py), any reading or matching
(mlip/knowledge), and what a report's text is made of before (dataloading/reports/text.py).
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from mlip.commands.knowledge_build import run_build
from mlip.dataloading.reports.markup import is_rtf, without_markup
from mlip.dataloading.reports.text import MAX_CHARACTERS, clean_report
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable, LexiconError
from mlip.knowledge.cues import cues_of
from mlip.knowledge.graph import MODELS, graph_vectors, is_vectors, write_vectors
from mlip.knowledge.lexicon_text import read_text
from mlip.knowledge.linker import FEW_KNOWN_WORDS, Linker, Mention
from mlip.knowledge.umls import SEMANTIC_TYPES
from mlip.settings.config import Knowledge
from mlip.system.output_file import require_replaceable, require_writable
from mlip.system.unread_output import one_line

_STYLES = {"present": "bold green", "absent": "red", "uncertain": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands build, show, link, stats and embed."""
    commands = parser.add_subparsers(dest="action", required=True)
    texts = {
        "build": "merge the lexicon with ontologies or tables of your own into one concept table",
        "show": "print one concept with all that is known of it",
        "link": "print the concepts that a report mentions, and whether it states or denies them",
        "stats": "print what a concept table holds",
        "embed": "learn a vector for each concept from its relations, for knowledge.vectors "
        "(needs the extra: graph)",
    }
    build, show, link, stats, embed = (
        commands.add_parser(name, help=text, description=text) for name, text in texts.items()
    )
    build.add_argument("--out", type=Path, required=True, help="table to write (.jsonl)")
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}  # given twice, none is lost
    files: dict[str, Any] = {"type": Path, "default": [], **several}
    build.add_argument("--obo", metavar="FILE", help=".obo or .obo.gz files to read", **files)
    under_help = "keep only the OBO terms below these ids"
    build.add_argument("--under", default=[], metavar="ID", help=under_help, **several)
    build.add_argument("--csv", metavar="FILE", help="concept tables of your own", **files)
    umls_help = "META folder of a UMLS release that you are licensed to use"
    build.add_argument("--umls", type=Path, metavar="FOLDER", help=umls_help)
    language_help = "UMLS languages to read (default: ENG)"
    build.add_argument("--languages", metavar="LANGUAGE", help=language_help, **several)
    source_help = "UMLS sources to read (default: all)"
    build.add_argument("--sources", default=[], metavar="SOURCE", help=source_help, **several)
    type_help = f"UMLS semantic types to read (default: {' '.join(sorted(SEMANTIC_TYPES))})"
    build.add_argument("--types", metavar="TUI", help=type_help, **several)
    cue_help = "cue words of another language (.yaml)"
    build.add_argument("--cues", type=Path, metavar="FILE", help=cue_help)
    lexicon_help = "leave the project's own lexicon out"
    build.add_argument("--no-lexicon", action="store_true", help=lexicon_help)
    show.add_argument("concept", help="concept id, name or synonym")
    link.add_argument("file", help="text file with one report; - reads standard input")
    link.add_argument("--json", action="store_true", help="print one mention per line as JSON")
    embed.add_argument("--out", type=Path, required=True, help="table to write (.safetensors)")
    model_help = "kind of graph embedding (default: transe)"
    embed.add_argument("--model", default="transe", choices=sorted(MODELS), help=model_help)
    embed.add_argument("--dim", type=int, default=64, help="length of a vector (default: 64)")
    embed.add_argument("--epochs", type=int, default=300, help="(default: 300)")
    embed.add_argument("--seed", type=int, default=1, help="(default: 1)")
    for command in (show, link, stats, embed):
        lexicon_help = "concept folder or file (default: the project's own)"
        command.add_argument("--lexicon", help=lexicon_help)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen sub-command; 0, or 2 with a message where the input cannot be used."""
    console = Console(soft_wrap=True, highlight=False)
    actions = {"build": run_build, "show": _show, "link": _link, "stats": _stats, "embed": _embed}
    try:
        return actions[arguments.action](arguments, console)
    except ValueError as error:  # LexiconError is one
        print(f"mlip knowledge: {one_line(str(error))}", file=sys.stderr)
        return 2


def _embed(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.out.suffix != ".safetensors":
        raise LexiconError(f"--out {arguments.out}: expected a name that ends in .safetensors")
    require_writable(arguments.out.parent)

    def require_own(out: Path) -> None:
        require_replaceable(out, "--out", "file of mlip knowledge embed", is_ours=is_vectors(out))

    require_own(arguments.out)
    table = load_concepts(arguments.lexicon)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("epochs", total=2 * arguments.epochs)
        vectors, scores = graph_vectors(
            table,
            model=arguments.model,
            dim=arguments.dim,
            epochs=arguments.epochs,
            seed=arguments.seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"{len(vectors)} of {len(table)} concepts have a relation and a vector "
        f"({scores['edges']:.0f} edges); the others have no weight"
    )
    console.print(
        f"{scores['held_out']:.0f} held-out edges: mean reciprocal rank {scores['mrr']:.3f}, "
        f"hits@10 {scores['hits_at_10']:.3f} (chance {scores['chance']:.3f})"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_vectors(vectors, arguments.out, require_own=require_own)
    console.print(f"{arguments.out}: use it with knowledge.vectors={arguments.out}")
    return 0


def _show(arguments: argparse.Namespace, console: Console) -> int:
    table = load_concepts(arguments.lexicon)
    wanted = arguments.concept.lower().strip()
    matches = [c for c in table if c.id == wanted or wanted in c.surface_forms]
    if not matches:
        forms = {form: c.id for c in table for form in (c.id, c.name.lower())}
        near = difflib.get_close_matches(wanted, forms, n=3, cutoff=0.5)
        hint = f"; near: {', '.join(dict.fromkeys(forms[n] for n in near))}" if near else ""
        raise LexiconError(f"no concept {arguments.concept!r} in {len(table)} concepts{hint}")
    concept = matches[0]
    name, identifier = escape(one_line(concept.name)), escape(one_line(concept.id))
    console.print(f"[bold]{name}[/bold]  {identifier}")
    console.print(escape(one_line(concept.definition)) or "(no definition)")
    facts = {
        "category": concept.category,
        "type": concept.semantic_type,
        "source": concept.source,
        "is a": ", ".join(concept.parents),
        "kinds of it": ", ".join(c.id for c in table if concept.id in c.parents),
        **{r: ", ".join(t for q, t in concept.relations if q == r) for r, _ in concept.relations},
        "pointed to by": ", ".join(
            f"{c.id} ({r})" for c in table for r, t in c.relations if t == concept.id
        ),
        "codes": ", ".join(f"{k} {' '.join(v)}" for k, v in concept.mappings.items()),
        "written as": "; ".join(concept.surface_forms),
        "written apart": "; ".join(
            " ... ".join("/".join(slot[:4]) + ("/..." if len(slot) > 4 else "") for slot in term)
            for term in concept.apart
        ),
        "not in": "; ".join(concept.excludes),
    }
    for name, value in facts.items():
        if value:
            console.print(f"  [cyan]{name}[/cyan]: {escape(one_line(value))}")
    return 0


def _link(arguments: argparse.Namespace, console: Console) -> int:
    written = sys.stdin.read() if arguments.file == "-" else read_text(arguments.file)
    if is_rtf(written):
        raise ValueError(f"{arguments.file}: RTF is not read: export plain text")
    # as training reads it: without, a form's empty box would assert what stands behind it
    plain = without_markup(written)
    text = clean_report(plain)
    linker = Linker(load_concepts(arguments.lexicon))
    mentions = linker.link(text)
    cut = f"cut at {MAX_CHARACTERS:,} of {len(plain):,} characters, as in training"
    if arguments.json:
        if len(plain) > MAX_CHARACTERS:
            print(cut, file=sys.stderr)
        for mention in mentions:
            # spans are of the cleaned text, which a caller does not have
            words = text[mention.start : mention.end]
            print(json.dumps({**mention._asdict(), "words": words}))
        return 0
    console.print(colour_view(text, mentions))
    table = Table(box=None, pad_edge=False)
    for heading in ("state", "concept", "words", "category"):
        table.add_column(heading)
    for mention in mentions:
        words = " ".join(text[mention.start : mention.end].split())
        category = linker.table[mention.concept_id].category
        state = Text(mention.state, style=_STYLES[mention.state])
        table.add_row(state, mention.concept_id, Text(words), category)
    console.print(table)
    if len(plain) > MAX_CHARACTERS:
        console.print(cut)
    known, total = linker.known_words(text)
    console.print(f"{len(mentions)} mentions; {known} of {total} words are in the lexicon")
    if total and known / total < FEW_KNOWN_WORDS:
        kind = "English" if linker.table.cues is None else "of one language"
        console.print(f"few known words: the lexicon is {kind}, other languages are not guessed")
    return 0


def colour_view(text: str, mentions: list[Mention]) -> Text:
    """The report with its mentions styled by state; where mentions nest, the shorter one shows."""
    view = Text(text)
    for mention in sorted(mentions, key=lambda m: m.start - m.end):
        view.stylize(_STYLES[mention.state], mention.start, mention.end)
    return view


def _deepest(table: ConceptTable) -> int:
    """Steps of the longest way up; without the set of all ancestors of each, which of a whole UMLS
    would fill the memory."""
    children: dict[str, list[str]] = {}
    waits: dict[str, int] = {}  # parents whose depth is not known yet
    for concept in table:
        inside = [parent for parent in concept.parents if parent in table]
        waits[concept.id] = len(inside)
        for parent in inside:
            children.setdefault(parent, []).append(concept.id)
    # a parent outside of the table is a step too
    depth = {c.id: int(bool(c.parents)) for c in table if waits[c.id] == 0}
    ready = list(depth)
    while ready:
        above = ready.pop()
        for below in children.get(above, ()):
            depth[below] = max(depth.get(below, 0), 1 + depth[above])
            waits[below] -= 1
            if waits[below] == 0:
                ready.append(below)
    return max(depth.values(), default=0)


def _stats(arguments: argparse.Namespace, console: Console) -> int:
    from mlip.knowledge.vectors import knowledge_vectors, mean_pairwise_cosine

    table = load_concepts(arguments.lexicon)
    forms = sum(len(concept.surface_forms) for concept in table)
    console.print(f"concepts {len(table)}, surface forms {forms}, fingerprint {table.fingerprint}")
    kinds = cues_of(table)
    whose = "English" if table.cues is None else "its own"
    console.print(f"cues {sum(map(len, kinds.values()))} of {len(kinds)} kinds, {whose}")
    counts = {
        "category": Counter(c.category for c in table),
        "type": Counter(c.semantic_type for c in table),
        "relations": Counter(r for c in table for r, _ in c.relations)
        + Counter({"is_a": sum(len(c.parents) for c in table)}),
        "codes": Counter(v for c in table for v in c.mappings),
        "source": Counter(c.source for c in table),
    }
    for name, counter in counts.items():
        listed = one_line(", ".join(f"{key} {n}" for key, n in counter.most_common()))
        console.print(f"[cyan]{name}[/cyan]: {escape(listed) or 'none'}")
    undefined = sum(not c.definition for c in table)
    console.print(f"roots {sum(not c.parents for c in table)}, deepest is-a {_deepest(table)}")
    console.print(f"without definition {undefined}")
    if len(table) <= 5000:  # a larger table's take two seconds a thousand
        signed, absolute = mean_pairwise_cosine(knowledge_vectors(table, Knowledge()))
        console.print(f"TF-IDF vectors: mean cosine {signed:.3f}, mean |cosine| {absolute:.3f}")
    else:
        console.print("TF-IDF vectors: not computed for more than 5000 concepts")
    return 0
