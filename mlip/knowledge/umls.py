"""UMLS release files (RRF) -> concept table, streamed and filtered.

UMLS needs a licence of the user's own. Nothing of it is shipped; what may travel further is what
merging.open_part leaves.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.merging import without_cycles
from mlip.knowledge.ontologies import numbered_lines
from mlip.system.output_file import file_sha256

Progress = Callable[[str, int, int], None]  # file name, bytes read, bytes in all
# findings, signs, diseases, anatomy and devices: what a chest report can speak of
SEMANTIC_TYPES = {
    "T033": ("finding", "finding"),
    "T184": ("finding", "finding"),
    "T034": ("finding", "finding"),
    "T047": ("disease", "disease"),
    "T046": ("disease", "disease"),
    "T048": ("disease", "disease"),
    "T190": ("finding", "abnormality"),
    "T019": ("finding", "abnormality"),
    "T020": ("finding", "abnormality"),
    "T191": ("disease", "neoplasm"),
    "T037": ("disease", "injury"),
    "T023": ("anatomy", "anatomy"),
    "T029": ("anatomy", "anatomy"),
    "T030": ("anatomy", "anatomy"),
    "T074": ("device", "device"),
}
_COLUMNS = {
    **{"MRCONSO.RRF": 18, "MRSTY.RRF": 6, "MRDEF.RRF": 8, "MRREL.RRF": 16},
    "MRCUI.RRF": 7,
}
_TREE = {"CHD": "isa", "PAR": "inverse_isa"}
_MAX_WORDS = 8  # longer names never stand in a report word for word
_CUI = re.compile(r"C[0-9]{7}")
_QUALIFIER = re.compile(
    r"(?<!\s)\s*\((disorder|finding|body structure|physical object|morphologic abnormality|"
    r"procedure|situation|observable entity|device)\)$|,? NOS$",
    re.IGNORECASE,
)


def read_umls(
    folder: str | Path,
    *,
    languages: Collection[str] = ("ENG",),
    sources: Collection[str] = (),
    semantic_types: Collection[str] = tuple(SEMANTIC_TYPES),
    progress: Progress | None = None,
) -> ConceptTable:
    """Concepts of a UMLS release folder, streamed: MRCONSO and MRSTY, MRDEF, MRREL and MRCUI if
    there.

    sources: vocabularies (SAB) to take names from; empty = all. Memory grows with what passes the
    filters, not with the files. A retired CUI that MRCUI gives one concept is a code of that.
    Raises:  LexiconError naming file and line
    Source:  UMLS Reference Manual, chapter "Metathesaurus - Rich Release Format"
    """
    folder = Path(folder)
    unknown = sorted(set(semantic_types) - set(SEMANTIC_TYPES))
    if unknown:
        raise LexiconError(
            f"semantic type {unknown[0]} is not known here; known: {sorted(SEMANTIC_TYPES)}"
        )
    for name in ("MRCONSO.RRF", "MRSTY.RRF"):
        if not (folder / name).exists():
            raise LexiconError(f"{folder / name}: missing; point to the META folder of a release")
    # CUIs as numbers, edges as pairs of them: a full release is a million concepts
    types: dict[int, str] = {}
    for row in _rrf(folder / "MRSTY.RRF", progress):
        if row[1] in semantic_types:
            types.setdefault(int(row[0][1:]), row[1])
    foreign: set[str] = set()
    names = _names(folder / "MRCONSO.RRF", types, languages, sources, foreign, progress)
    definitions: dict[int, str] = {}
    if (folder / "MRDEF.RRF").exists():
        for row in _rrf(folder / "MRDEF.RRF", progress):
            cui = int(row[0][1:])
            if cui not in names or row[4] in foreign:
                continue
            if row[6] in ("N", "") and row[5].strip():
                definitions.setdefault(cui, " ".join(row[5].split()))
    edges: tuple[array[int], array[int]] = (array("l"), array("l"))
    if (folder / "MRREL.RRF").exists():
        edges = _edges(folder / "MRREL.RRF", names, progress)
    retired: dict[int, list[int]] = {}
    if (folder / "MRCUI.RRF").exists():
        retired = _retired(folder / "MRCUI.RRF", names, progress)
    cuis = list(names)  # the order of the release
    ids = [f"umls:c{cui:07d}" for cui in cuis]
    parents, located = (_targets(pairs, cuis) for pairs in edges)
    concepts = []
    for place, cui in enumerate(cuis):
        kind, category = SEMANTIC_TYPES[types[cui]]
        name, *others = names.pop(cui)
        concepts.append(
            Concept(
                id=ids[place],
                name=name,
                synonyms=tuple(others),
                definition=definitions.pop(cui, ""),
                semantic_type=kind,
                category=category,
                parents=tuple(ids[other] for other in parents(place)),
                relations=tuple(("located_in", ids[other]) for other in located(place)),
                mappings=_Code(cui, retired.get(cui, ())),
                source="umls",
            )
        )
    del names, definitions, types
    files = {n: file_sha256(folder / n) for n in _COLUMNS if (folder / n).exists()}
    provenance = {
        "source": "umls",
        "licensed": True,
        "sha256": files,
        "retired_cuis": sum(map(len, retired.values())),
        "filters": {
            "languages": sorted(languages),
            "sources": sorted(sources),
            "semantic_types": sorted(semantic_types),
        },
    }
    table = ConceptTable(concepts, provenance)
    return without_cycles(table)


class _Code(Mapping[str, tuple[str, ...]]):
    """{"umls": (CUI, those it had before)} in a fifth of the memory."""

    __slots__ = ("cui", "earlier")

    def __init__(self, cui: int, earlier: Collection[int]) -> None:
        self.cui, self.earlier = cui, earlier

    def __getitem__(self, vocabulary: str) -> tuple[str, ...]:
        if vocabulary != "umls":
            raise KeyError(vocabulary)
        return tuple(f"C{cui:07d}" for cui in (self.cui, *self.earlier))

    def __iter__(self) -> Iterator[str]:
        return iter(("umls",))

    def __len__(self) -> int:
        return 1


def _names(
    path: Path,
    types: Collection[int],
    languages: Collection[str],
    sources: Collection[str],
    foreign: set[str],
    progress: Progress | None,
) -> dict[int, tuple[str, ...]]:
    """CUI -> its forms, the preferred one first.

    foreign: filled with the vocabularies (SAB) that have no name in one of the languages: their
    definitions, of which MRDEF does not tell the language, are in another one.
    A release keeps the rows of a CUI together; where a file does not, its later rows add to it.
    """
    names: dict[int, tuple[str, ...]] = {}
    current, best = -1, -1
    forms: dict[str, str] = {}  # lower case -> as written, the preferred one kept apart
    preferred = ""
    spoken: set[str] = set()

    def close() -> None:
        if forms:
            earlier = names.get(current, ())
            known = {form.lower() for form in earlier}
            fresh = [form for low, form in forms.items() if low not in known]
            if not earlier:
                fresh = [preferred, *(f for f in fresh if f != preferred)]
            names[current] = (*earlier, *fresh)

    for row in _rrf(path, progress):
        cui = int(row[0][1:])
        if row[1] not in languages:
            foreign.add(row[11])
            continue
        spoken.add(row[11])
        if cui not in types or row[16] not in ("N", ""):
            continue
        if sources and row[11] not in sources:
            continue
        form = surface_form(row[14])
        if form is None:
            continue
        if cui != current:
            close()
            current, best, forms = cui, -1, {}
        forms.setdefault(form.lower(), form)
        rank = (row[2] == "P") + (row[4] == "PF") + (row[6] == "Y")
        if rank > best:
            best, preferred = rank, forms[form.lower()]
    close()
    foreign -= spoken
    return names


def _edges(
    path: Path, names: Collection[int], progress: Progress | None
) -> tuple[array[int], array[int]]:
    """(child, parent) and (finding, site) of MRREL, each as one flat array of CUIs.

    A child (CHD, PAR) of a vocabulary without a name for it (RELA), as in MeSH's and ICD's trees,
    is-a its parent; one that is named part_of and the like is none. RB and RN, broader and
    narrower, are no hierarchy.
    """
    is_a, sites = array("l"), array("l")
    for number, row in enumerate(_rrf(path, progress), start=1):
        if row[14] not in ("N", ""):
            continue
        # the manual: "CUI2 RELA CUI1", and so with REL
        relation = row[7] or _TREE.get(row[3], "")
        if relation in ("isa", "has_finding_site"):
            ends = row[4], row[0]
        elif relation in ("inverse_isa", "finding_site_of"):
            ends = row[0], row[4]
        else:
            continue
        if _CUI.fullmatch(row[4]) is None:
            raise LexiconError(
                f"{path}, line {number}: expected a CUI such as C0032227 in the fifth column"
            )
        child, other = int(ends[0][1:]), int(ends[1][1:])
        if child != other and child in names and other in names:
            (is_a if relation.endswith("isa") else sites).extend((child, other))
    return is_a, sites


def _retired(path: Path, names: Collection[int], progress: Progress | None) -> dict[int, list[int]]:
    """CUI -> the retired ones that became it; one that became several is left out."""
    became: dict[int, set[int]] = {}
    for number, row in enumerate(_rrf(path, progress), start=1):
        if row[2] != "SY":  # DEL: deleted; RB, RN, RO: split up or not the same
            continue
        if _CUI.fullmatch(row[5]) is None:
            raise LexiconError(
                f"{path}, line {number}: expected a CUI such as C0032227 in the sixth column"
            )
        became.setdefault(int(row[0][1:]), set()).add(int(row[5][1:]))
    found: dict[int, list[int]] = {}
    for old, new in became.items():
        (target, *others) = new
        if not others and target in names and old not in names:
            found.setdefault(target, []).append(old)
    return found


def _targets(pairs: array[int], cuis: list[int]) -> Callable[[int], list[int]]:
    """Place of a concept -> places of its targets, in the order of the release, without repeats."""
    flat = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    order = np.argsort(np.array(cuis, dtype=np.int64), kind="stable")
    ranked = np.array(cuis, dtype=np.int64)[order]
    places = np.unique(order[np.searchsorted(ranked, flat)] if len(flat) else flat, axis=0)
    starts = np.searchsorted(places[:, 0], np.arange(len(cuis) + 1))

    def targets(place: int) -> list[int]:
        found: list[int] = places[starts[place] : starts[place + 1], 1].tolist()
        return found

    return targets


def surface_form(text: str) -> str | None:
    """A vocabulary's name as a report would write it; None where no report would."""
    form = _QUALIFIER.sub("", text.strip())
    words = re.findall(r"[^\W_]+", form)
    if not 1 <= len(words) <= _MAX_WORDS or not form.isascii() or len(form) < 3:
        return None
    if re.search(r"[\[\]{}<>=;:@#%*+^~]|\d{3}", form) or not any(w.isalpha() for w in words):
        return None
    return form


def _rrf(path: Path, progress: Progress | None) -> Iterator[list[str]]:
    """Rows of one RRF file, checked."""
    columns = _COLUMNS[path.name]
    total = path.stat().st_size
    done = 0
    with numbered_lines(path) as numbered:
        for number, line in numbered:
            row = line.rstrip("\r\n").split("|")
            if len(row) != columns + 1 or _CUI.fullmatch(row[0]) is None:
                raise LexiconError(
                    f"{path}, line {number}: expected {columns} columns that end in '|' and begin "
                    f"with a CUI such as C0032227, got {len(row) - 1} columns"
                )
            if progress is not None:
                done += len(line)
                if number % 100_000 == 0:
                    progress(path.name, done, total)
            yield row
    if progress is not None:
        progress(path.name, total, total)
