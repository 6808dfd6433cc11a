"""Time and peak memory of reading a made-up UMLS release of full size, and of building a table.

    python benchmarks/bench_ontology.py --folder /tmp/made_up_umls --out FILE.json

The release is written once into --folder (about 3.6 GiB at the default size; no UMLS text is in it)
and kept. Each measurement runs in a process of its own; its peak is the resident set's.
The sizes are those of a full release as its public statistics tell them: 3.4 million concepts,
17 million names of which seven in ten are English, a third of the concepts of a type that is read.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from mlip.knowledge.umls import SEMANTIC_TYPES

CONCEPTS, NAMES_PER_CONCEPT, RELATIONS = 3_400_000, 5, 20_000_000
_OTHER_TYPES = ("T121", "T109", "T116", "T204", "T061", "T059")
_KEPT = 3  # one concept in this many has a type that is read
_BLOCK = 20_000  # lines written at once
GIB = 1 << 30


def write_release(folder: Path, concepts: int, relations: int) -> None:
    """MRCONSO, MRSTY, MRDEF and MRREL of made-up words."""
    folder.mkdir(parents=True)
    rng = random.Random(1)
    syllables = [a + b for a in "bcdfghklmnprstv" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(60_000)]
    kept = list(SEMANTIC_TYPES)

    def write(name: str, lines: list[str], last: bool = False) -> None:
        if len(lines) >= _BLOCK or last:
            with (folder / name).open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
            lines.clear()

    conso: list[str] = []
    sty: list[str] = []
    definitions: list[str] = []
    for cui in range(1, concepts + 1):
        code = f"C{cui:07d}"
        kind = kept[cui % len(kept)] if cui % _KEPT == 0 else _OTHER_TYPES[cui % 6]
        sty.append(f"{code}|{kind}|A1.2|Made Up Type|AT{cui:08d}|256|\n")
        for k in range(NAMES_PER_CONCEPT):
            text = " ".join(rng.choices(words, k=2 + (cui + k) % 5))
            language = "ENG" if (cui + k) % 10 < 7 else "SPA"
            first = "P|L1|PF|S1|Y" if k == 0 else "S|L2|VO|S2|N"
            conso.append(
                f"{code}|{language}|{first}|A{cui * 8 + k:08d}||{cui}||SNOMEDCT_US|PT|{cui}|{text}"
                "|0|N|256|\n"
            )
        if cui % 8 == 0:
            text = " ".join(rng.choices(words, k=25))
            definitions.append(f"{code}|A{cui * 8:08d}|AT{cui:08d}||NCI|{text}|N||\n")
        write("MRCONSO.RRF", conso)
        write("MRSTY.RRF", sty)
        write("MRDEF.RRF", definitions)
    write("MRCONSO.RRF", conso, last=True)
    write("MRSTY.RRF", sty, last=True)
    write("MRDEF.RRF", definitions, last=True)
    rel: list[str] = []
    for i in range(relations):
        # seven in eight lines are of kinds that are not read; no circles: children lie above
        high = rng.randrange(2, concepts + 1)
        low = rng.randrange(1, high)
        kind = ("isa", "has_finding_site")[i % 16 // 8] if i % 8 == 0 else "mapped_to"
        if kind != "mapped_to":
            low, high = max(_KEPT, low // _KEPT * _KEPT), max(2 * _KEPT, high // _KEPT * _KEPT)
        rel.append(
            f"C{low:07d}|A1|AUI|PAR|C{high:07d}|A2|AUI|{kind}|R{i:09d}||SNOMEDCT_US|SNOMEDCT_US|"
            "|Y|N||\n"
        )
        write("MRREL.RRF", rel)
    write("MRREL.RRF", rel, last=True)


def measure(kind: str, folder: Path, out: Path) -> dict[str, object]:
    """One measurement, in the process it belongs to."""
    start = time.process_time()
    if kind == "read":
        from mlip.knowledge.umls import read_umls

        table = read_umls(folder)
    else:
        from mlip.cli import main as command

        command(["knowledge", "build", "--umls", str(folder), "--out", str(out)])
        table = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    result: dict[str, object] = {
        "seconds_of_processor": round(time.process_time() - start, 1),
        "peak_gib": round(peak / GIB, 3),
    }
    if table is not None:
        result["concepts"] = len(table)
        result["names"] = sum(1 + len(c.synonyms) for c in table)
        result["relations"] = sum(len(c.parents) + len(c.relations) for c in table)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--concepts", type=int, default=CONCEPTS)
    parser.add_argument("--relations", type=int, default=RELATIONS)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--measure", choices=("read", "build"), help="this one, in this process")
    options = parser.parse_args()
    release = options.folder / "META"
    if options.measure:
        print(json.dumps(measure(options.measure, release, options.folder / "table.jsonl")))
        return
    # not above: it imports torch, which would be in the measured processes' memory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import environment

    if not release.exists():
        write_release(release, options.concepts, options.relations)
    result: dict[str, object] = {
        "bytes": {p.name: p.stat().st_size for p in sorted(release.glob("*.RRF"))},
        "environment": environment("cpu"),
    }
    for kind in ("read", "build"):
        command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", kind]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result[kind] = json.loads(lines.splitlines()[-1])
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
