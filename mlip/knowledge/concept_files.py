"""Concept files: the project's lexicon or another one in YAML, and built tables in JSON lines.

What does not live here: how ontologies are read (ontologies.py, umls.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlip.knowledge.concepts import RELATIONS, Concept, ConceptTable, LexiconError
from mlip.knowledge.cues import CUES_FILE, checked_cues, english_cues, read_cues
from mlip.knowledge.lexicon_text import LEXICON_DIR, expand, read_text
from mlip.knowledge.ontologies import read_csv, read_obo
from mlip.knowledge.plain_letters import plain
from mlip.settings.strict_yaml import read_yaml
from mlip.system.output_file import whole_file

KEPT = "concepts.jsonl"  # in a run or an export: the table that its concept vectors are rows of
_BEGIN = b'{"provenance": '  # of a built table
_ID = re.compile(r"[a-z0-9][a-z0-9_]*(:[a-z0-9_]+)?")


def load_concepts(path: str | Path | None = None) -> ConceptTable:
    """The table of a lexicon folder, a YAML, JSONL, CSV or OBO file; None = the project's own.

    A folder's _cues.yaml is read with it, a built table holds its cues; all else is English.
    Raises:  LexiconError naming the file and the reason, also where it holds no concept.
    """
    source = LEXICON_DIR if path is None else Path(path)
    table = _read(source)
    if not len(table):
        raise LexiconError(f"concept file {source}: holds no concept")
    return table


def load_concepts_of_run(run_dir: str | Path, lexicon: str | Path | None) -> ConceptTable:
    """The table of `lexicon`, or the project's own as it was when this run began, which it keeps.

    Raises:  as load_concepts.
    """
    kept = Path(run_dir) / KEPT
    return load_concepts(kept if lexicon is None and kept.is_file() else lexicon)


def _read(source: Path) -> ConceptTable:
    if not source.exists():
        raise LexiconError(f"concept file {source}: does not exist; expected a folder or a file")
    if source.is_dir():
        files = sorted(f for f in source.glob("*.yaml") if not f.name.startswith("_"))
        if not files:
            raise LexiconError(f"concept folder {source}: no *.yaml file in it")
        cues = source / CUES_FILE
        if (other := cues.with_suffix(".yml")).exists():
            raise LexiconError(f"{other}: is not read: rename it to {CUES_FILE}")
        return _from_yaml(files, cues if cues.is_file() and source != LEXICON_DIR else None)
    suffixes = "".join(source.suffixes[-2:]) if source.suffix == ".gz" else source.suffix
    if suffixes in (".yaml", ".yml"):
        return _from_yaml([source])
    if suffixes == ".jsonl":
        return read_table(source)
    if suffixes == ".csv":
        return read_csv(source)
    if suffixes in (".obo", ".obo.gz"):
        return read_obo(source)
    raise LexiconError(
        f"concept file {source}: expected a folder or a .yaml, .jsonl, .csv, .obo or .obo.gz "
        "file; build UMLS files into a .jsonl table with `mlip knowledge build` first"
    )


def is_table(path: Path) -> bool:
    """Whether write_table wrote this file."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_BEGIN)) == _BEGIN


def write_table(
    table: ConceptTable,
    path: str | Path,
    *,
    require_own: Callable[[Path], None] | None = None,
) -> None:
    """A built table as JSON lines: its provenance, its cues if it has own, one concept a line.

    require_own  as of whole_file
    """
    path = Path(path)
    head = {"provenance": table.provenance, "fingerprint": table.fingerprint}
    try:
        with (
            whole_file(path, require_own=require_own) as new,
            new.open("w", encoding="utf-8", newline="\n") as stream,
        ):
            stream.write(json.dumps(head) + "\n")
            if table.cues is not None:
                stream.write(json.dumps({"cues": table.cues}, sort_keys=True) + "\n")
            for concept in table:
                stream.write(json.dumps(concept.as_json(), sort_keys=True) + "\n")
    except OSError as error:
        raise LexiconError(f"{path}: cannot be written: {error.strerror}") from error


def read_table(path: str | Path) -> ConceptTable:
    """The table that write_table wrote, its fingerprint checked.

    Raises:  LexiconError naming file and line.
    """
    concepts: list[Concept] = []
    provenance: dict[str, Any] = {}
    fingerprint = cues = None
    for number, line in enumerate(_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "provenance" in row:
                provenance, fingerprint = dict(row["provenance"]), row.get("fingerprint")
                continue
            if "cues" in row:
                cues = checked_cues(row["cues"], path)
                continue
            _require_texts(row)
            concepts.append(
                Concept(
                    **{
                        **row,
                        "synonyms": tuple(row.get("synonyms", ())),
                        "parents": tuple(row.get("parents", ())),
                        "relations": tuple((r, t) for r, t in row.get("relations", ())),
                        "mappings": {k: tuple(v) for k, v in row.get("mappings", {}).items()},
                        "apart": tuple(
                            tuple(tuple(slot) for slot in term) for term in row.get("apart", ())
                        ),
                        "excludes": tuple(row.get("excludes", ())),
                        "licensed": tuple(row.get("licensed", ())),
                    }
                )
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise LexiconError(
                f"{path}, line {number}: expected one concept as a JSON object: {error}"
            ) from error
    try:
        table = ConceptTable(concepts, provenance, cues)
    except LexiconError as error:
        raise LexiconError(f"{path}: {error}") from None
    if fingerprint is not None and fingerprint != table.fingerprint:
        raise LexiconError(
            f"{path}: the concepts do not match the fingerprint in line 1 (edited or cut off); "
            "build the table again, or delete line 1 to accept the change"
        )
    return table


def _require_texts(row: dict[str, Any]) -> None:
    """Raises:  TypeError: a text in place of a list would be read letter by letter."""
    lists = ("synonyms", "parents", "excludes", "licensed")
    if not all(isinstance(row.get(key, []), list) for key in lists):
        raise TypeError(f"{', '.join(lists)} are lists")
    needed = [row.get("id"), row.get("name"), *row.get("synonyms", ())]
    free = [row.get(key, "") for key in ("definition", "semantic_type", "category", "source")]
    free += [text for key in lists for text in row.get(key, ())]
    # codes, ends of relations, slots of terms: a number in one is met where the concept is shown
    deep = [*row.get("mappings", {}).values(), *row.get("relations", ())]
    deep += [slot for term in row.get("apart", ()) for slot in term]
    if not all(isinstance(texts, list) for texts in deep):
        raise TypeError("codes, relations and the slots of apart are lists of texts")
    free += [text for texts in deep for text in texts]
    if not all(isinstance(text, str) for text in (*needed, *free)) or not all(needed):
        raise TypeError("id, name, synonyms and what describes them are texts")


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                number += 1
                yield line
    except OSError as error:
        raise LexiconError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LexiconError(
            f"{path}: not UTF-8 after line {number}; convert it, for example with iconv"
        ) from error


def _from_yaml(files: Iterable[Path], cues_file: Path | None = None) -> ConceptTable:
    concepts: list[Concept] = []
    hashes: dict[str, str] = {}
    places: dict[str, Path] = {}
    for file in files:
        text = read_text(file)
        hashes[file.name] = hashlib.sha256(text.encode()).hexdigest()
        try:
            content = read_yaml(text)
        except yaml.YAMLError as error:
            raise LexiconError(f"{file}: not valid YAML: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("concepts"), dict):
            raise LexiconError(
                f"{file}: expected a mapping with the keys category, semantic_type and concepts"
            )
        for concept_id, row in content["concepts"].items():
            if (other := places.setdefault(str(concept_id), file)) != file:
                raise LexiconError(
                    f"{file}: concept id {str(concept_id)!r} occurs twice, in {other.name} too; "
                    "merge the two or rename one"
                )
            concepts.append(_concept_from_yaml(file, str(concept_id), row, content))
    cues = None
    if cues_file is not None:
        hashes[cues_file.name] = hashlib.sha256(read_text(cues_file).encode()).hexdigest()
        cues = read_cues(cues_file)
        if cues == english_cues():  # a copy of the project's own folder
            cues = None
    return ConceptTable(concepts, {"source": "lexicon", "sha256": hashes}, cues)


_YAML_KEYS = {"name", "synonyms", "definition", "semantic_type", "category", "is_a", "apart"} | {
    "excludes",
    "maps",
    *RELATIONS,
}


def _concept_from_yaml(
    file: Path, concept_id: str, row: Any, defaults: Mapping[str, Any]
) -> Concept:
    where = f"{file}, concept {concept_id}"
    if not _ID.fullmatch(concept_id):
        raise LexiconError(f"{where}: the id must be snake_case ASCII")
    if not isinstance(row, dict):
        raise LexiconError(f"{where}: expected a mapping, got {type(row).__name__}")
    unknown = sorted(set(row) - _YAML_KEYS, key=str)  # YAML reads no: as False
    if unknown:
        raise LexiconError(f"{where}: unknown key {unknown[0]!r}; known: {sorted(_YAML_KEYS)}")

    def words(key: str, value: Any) -> tuple[str, ...]:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) and item.strip() for item in items):
            raise LexiconError(
                f"{where}: {key} must be text or a list of texts (quote numbers, yes, no, on, off)"
            )
        return tuple(plain(item.strip()) for item in items)

    def text(key: str, default: str) -> str:
        value = row.get(key)
        found = words(key, (default or []) if value in (None, "", []) else value)
        if len(found) > 1:
            raise LexiconError(f"{where}: expected one text for {key}, got {len(found)}")
        return " ".join("".join(found).split())

    for key, kind, wanted in (("apart", list, "a list of terms"), ("maps", dict, "a mapping")):
        if not isinstance(row.get(key), kind | type(None)):
            raise LexiconError(f"{where}: expected {wanted} for {key}")
    apart = tuple(
        tuple(
            expand(words("apart", slot), where)
            for slot in (term if isinstance(term, list) else [term])
        )
        for term in row.get("apart") or ()
    )
    maps = row.get("maps") or {}
    if any(len(term) < 2 for term in apart):
        raise LexiconError(f"{where}: each term of apart needs two slots or more")
    return Concept(
        id=concept_id,
        name=text("name", concept_id.replace("_", " ")),
        synonyms=expand(words("synonyms", row.get("synonyms", [])), where),
        definition=text("definition", ""),
        semantic_type=text("semantic_type", str(defaults.get("semantic_type") or "finding")),
        category=text("category", str(defaults.get("category") or file.stem)),
        parents=words("is_a", row.get("is_a", [])),
        relations=tuple(
            (relation, target)
            for relation in RELATIONS
            for target in words(relation, row.get(relation, []))
        ),
        mappings=dict(
            zip(words("maps", list(maps)), (words(f"maps.{k}", maps[k]) for k in maps), strict=True)
        ),
        apart=apart,
        excludes=expand(words("excludes", row.get("excludes", [])), where),
    )
