"""Open ontologies -> concept tables: OBO files and a user's own CSV.

What does not live here: the lexicon (concept_files.py), UMLS (umls.py), merging (merging.py).
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.merging import without_cycles
from mlip.knowledge.plain_letters import plain
from mlip.system.output_file import file_sha256


def read_obo(path: str | Path, under: Collection[str] = ()) -> ConceptTable:
    """Terms of an OBO file (.obo or .obo.gz), obsolete ones left out.

    under: ids such as "HP:0002086"; given, only these terms and what is below them are kept.
    Raises:  LexiconError naming file and line
    """
    path = Path(path)
    terms = {i: t for i, t in _stanzas(path).items() if t.get("is_obsolete") != "true"}
    for identifier, term in terms.items():
        if not term.get("name"):
            raise LexiconError(f"{path}, line {term['line']}: term {identifier} has no name")
    if under:
        if missing := sorted(set(under) - set(terms)):
            raise LexiconError(f"{path}: no term {missing[0]} to take the terms below of")
        terms = {i: terms[i] for i in _below(terms, under)}
    concepts = [_obo_concept(identifier, term, terms) for identifier, term in terms.items()]
    provenance = {"source": "obo", "sha256": {path.name: file_sha256(path)}}
    return without_cycles(ConceptTable(concepts, provenance))


def _stanzas(path: Path) -> dict[str, dict[str, Any]]:
    """Id -> the tags of each [Term] that are read, and the line where it begins.

    Raises:  LexiconError naming file and line
    """
    terms: dict[str, dict[str, Any]] = {}
    term: dict[str, Any] | None = None
    has_header = False
    with numbered_lines(path) as numbered:
        for number, line in numbered:
            line = line.strip()
            if line.startswith("format-version:"):
                has_header = True
            if line.startswith("["):
                _require_id(path, term)
                term = {"line": number} if line == "[Term]" else None
                continue
            if not line or line.startswith("!") or term is None:
                continue
            tag, separator, value = line.partition(":")
            if not separator or " " in tag:
                raise LexiconError(f"{path}, line {number}: expected 'tag: value' in a [Term]")
            _read_tag(term, tag, value.strip(), path, number)
            if tag != "id":
                continue
            if term["id"] in terms:
                raise LexiconError(
                    f"{path}, line {number}: id {term['id']} occurs twice (first in the [Term] at "
                    f"line {terms[term['id']]['line']})"
                )
            terms[term["id"]] = term
    _require_id(path, term)
    if not has_header or not terms:
        raise LexiconError(
            f"{path}: not an OBO file: expected a format-version line and [Term] stanzas"
        )
    return terms


def _read_tag(term: dict[str, Any], tag: str, value: str, path: Path, number: int) -> None:
    """Add to a term what a line of it says, where it is of a tag that is read."""
    if tag in ("id", "name", "is_obsolete"):
        term[tag] = _unescaped(_TAIL.sub("", value))
    elif tag == "def":
        term[tag] = _quoted(path, number, value)[0]
    elif tag == "synonym":
        text, rest = _quoted(path, number, value)
        if rest.startswith("EXACT"):
            term.setdefault("synonyms", []).append(text)
    elif tag in ("is_a", "xref", "alt_id"):
        term.setdefault(tag, []).append(re.split(r"[\s{!]", value, maxsplit=1)[0])


def _require_id(path: Path, term: dict[str, Any] | None) -> None:
    if term is not None and "id" not in term:
        raise LexiconError(f"{path}, line {term['line']}: a [Term] without an id")


def _obo_concept(identifier: str, term: dict[str, Any], kept: dict[str, Any]) -> Concept:
    prefix = identifier.partition(":")[0].lower()
    vocabulary = "hpo" if prefix == "hp" else prefix
    umls = [
        x.partition(":")[2] for x in term.get("xref", ()) if x.startswith(("UMLS:", "UMLS_CUI"))
    ]
    mappings = {vocabulary: (identifier, *term.get("alt_id", ()))}
    if umls:
        mappings["umls"] = tuple(umls)
    return Concept(
        id=_own_id(identifier),
        name=term["name"],
        synonyms=tuple(dict.fromkeys(term.get("synonyms", ()))),
        definition=term.get("def", ""),
        semantic_type="disease" if prefix == "doid" else "finding",
        category=vocabulary,
        parents=tuple(_own_id(p) for p in dict.fromkeys(term.get("is_a", ())) if p in kept),
        mappings=mappings,
        source=vocabulary,
    )


def read_csv(path: str | Path) -> ConceptTable:
    """A user's table: columns id and name; synonyms, definition, semantic_type, category, parents
    and umls as wanted. Several values in one cell are separated by "|".

    Raises:  LexiconError naming file and line
    """
    path = Path(path)
    concepts: list[Concept] = []
    lines: dict[str, int] = {}
    with numbered_lines(path) as numbered:
        rows = csv.DictReader((line for _, line in numbered), strict=True)
        known = {"id", "name", "synonyms", "definition", "semantic_type", "category"}
        known |= {"parents", "umls", "hpo", "radlex"}
        try:
            columns = set(rows.fieldnames or ())
            if not {"id", "name"} <= columns or columns - known:
                raise LexiconError(
                    f"{path}, line 1: expected the columns id and name and any of "
                    f"{sorted(known - {'id', 'name'})}, got {sorted(columns)}"
                )
            for row in rows:
                if None in row or None in row.values():
                    raise LexiconError(
                        f"{path}, line {rows.line_num}: expected {len(columns)} cells"
                    )
                if not row["id"].strip() or not row["name"].strip():
                    raise LexiconError(f"{path}, line {rows.line_num}: id or name is empty")
                first = lines.setdefault(row["id"].strip(), rows.line_num)
                if first != rows.line_num:
                    raise LexiconError(
                        f"{path}, line {rows.line_num}: id {row['id'].strip()!r} occurs twice "
                        f"(first in line {first})"
                    )
                concepts.append(
                    Concept(
                        id=row["id"].strip(),
                        name=row["name"].strip(),
                        synonyms=_cells(row, "synonyms"),
                        definition=row.get("definition", "").strip(),
                        semantic_type=row.get("semantic_type", "").strip() or "finding",
                        category=row.get("category", "").strip() or "other",
                        parents=_cells(row, "parents"),
                        mappings={
                            key: _cells(row, key)
                            for key in ("umls", "hpo", "radlex")
                            if _cells(row, key)
                        },
                        source="csv",
                    )
                )
        except csv.Error as error:
            raise LexiconError(f"{path}, line {rows.line_num}: not valid CSV: {error}") from error
    provenance = {"source": "csv", "sha256": {path.name: file_sha256(path)}}
    return without_cycles(ConceptTable(concepts, provenance))


def _below(terms: dict[str, dict[str, Any]], roots: Collection[str]) -> list[str]:
    children: dict[str, list[str]] = {}
    for identifier, term in terms.items():
        for parent in term.get("is_a", ()):
            children.setdefault(parent, []).append(identifier)
    seen = set(roots)
    stack = list(roots)
    while stack:
        for child in children.get(stack.pop(), ()):
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return [identifier for identifier in terms if identifier in seen]


def _own_id(identifier: str) -> str:
    return re.sub(r"[^a-z0-9:_]", "_", identifier.lower())


def _cells(row: dict[str, str], key: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in (row.get(key) or "").split("|") if part.strip())


def _quoted(path: Path, number: int, value: str) -> tuple[str, str]:
    match = re.match(r'"((?:[^"\\]|\\.)*)"\s*(.*)', value)
    if match is None:
        raise LexiconError(f"{path}, line {number}: expected a text in double quotes")
    return _unescaped(match[1]), match[2]


# behind a value: qualifiers in braces, then a comment; each from the first of its blanks on only
_TAIL = re.compile(r"((?<!\s)\s+\{[^{}=]*=[^{}]*\})?((?<!\s)\s+!.*)?$")
_MAX_LINE, _MAX_UNPACKED = 1 << 20, 1 << 30  # characters; CHEBI, of the largest, has 260 MB
_ESCAPED = {"n": " ", "t": " ", "W": " "}  # a line break, a tab, a blank; all else is itself


def _unescaped(value: str) -> str:
    """Source:  OBO Flat File Format 1.4, section 2.3 (escape characters)."""
    plain = re.sub(r"\\(.)", lambda match: _ESCAPED.get(match[1], match[1]), value)
    return " ".join(plain.split())


@contextmanager
def numbered_lines(path: Path) -> Iterator[Iterable[tuple[int, str]]]:
    """Numbered lines of a UTF-8 file, plain or gzip, with errors that name file and line.

    A byte order mark, which Excel writes, is left out; typographic signs become plain ones. A file
    of a megabyte may unpack to a line of gigabytes: lines and what is unpacked are bounded.
    """
    number = 0

    def numbered(stream: IO[str]) -> Iterator[tuple[int, str]]:
        nonlocal number
        total = 0
        while line := stream.readline(_MAX_LINE + 1):
            number += 1
            total += len(line)
            if len(line) > _MAX_LINE or path.suffix == ".gz" and total > _MAX_UNPACKED:
                raise LexiconError(
                    f"{path}, line {number}: expected lines of at most {_MAX_LINE} characters, and "
                    f"a .gz of {_MAX_UNPACKED >> 20} MiB at most when unpacked"
                )
            yield number, plain(line)

    try:
        if path.suffix == ".gz":
            stream: IO[str] = gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        else:
            stream = path.open(encoding="utf-8-sig", newline="")
        with stream:
            yield numbered(stream)
    except UnicodeDecodeError as error:
        raise LexiconError(
            f"{path}: not UTF-8 after line {number}; convert it, for example with iconv"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LexiconError(f"{path}: cannot be read: {reason}") from error
