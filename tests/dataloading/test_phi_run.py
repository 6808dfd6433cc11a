"""A whole small training run over a manifest full of planted identifiers writes none of them.

Oracle: the canaries themselves, searched in every file of the run as UTF-8, UTF-16 and base64, and
a report's token ids as JSON and as integers of two, four and eight bytes.
"""

from __future__ import annotations

import base64
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from mlip.dataloading.reports.text import clean_report
from mlip.dataloading.reports.tokenizer import load_tokenizer
from tests.own_process import leave_the_process_as_it_was  # noqa: F401
from tests.small_run import small_run
from tests.test_train import TINY

CANARIES = [f"Zq{i:02d}canary" for i in range(50)]
DATES = [f"19{30 + i}-0{1 + i % 9}-1{i}" for i in range(10)]
# what a user reads or hands on; the tokenizer's own files are held to it as well
EXPECTED = {"log.jsonl", "events.jsonl", "ledger.json", "quarantine.json", "report.html"}


def forms(word: str) -> list[bytes]:
    """A word as it might stand in a file: UTF-8, UTF-16, base64 in its three alignments."""
    plain = word.encode()
    packed = [base64.b64encode(b"_" * shift + plain + b"__")[4:-4] for shift in range(3)]
    return [plain, plain.lower(), word.encode("utf-16-le"), word.encode("utf-16-be"), *packed]


def integer_forms(ids: list[int]) -> list[bytes]:
    """Eight token ids in a row as JSON and as raw integers."""
    texts = [json.dumps(ids)[1:-1], json.dumps(ids, separators=(",", ":"))[1:-1]]
    raw = [np.array(ids, kind).tobytes() for kind in (np.int16, np.int32, np.int64)]
    return [*(text.encode() for text in texts), *raw]


def planted_manifest(folder: Path) -> list[str]:
    """The small run's images under paths, ids, dates and reports that name a patient."""
    source = Path(small_run().config.data.manifest or "")
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    words = iter(CANARIES)
    reports = []
    for i, row in enumerate(rows):
        patient, date = CANARIES[i % 10], DATES[i % 10]
        # a patient stays in one split: test rows take the names beside theirs
        patient = patient if row["split"] == "train" else f"{patient}T"
        # a folder's name is a patient's as often as the patient's number is
        place = Path(CANARIES[20 + i % 20]) / date / f"{i}.png"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.parent / row["image"], folder / place)
        sentence = f"Seen by {next(words)} on {date}. " if i < 40 else ""
        row |= {"image": str(place), "patient_id": patient, "report": sentence + row["report"]}
        row["study_id"] = f"{CANARIES[40 + i % 10]}{i}"
        reports.append(row["report"])
    training = [row for row in rows if row["split"] == "train"]
    (folder / training[0]["image"]).write_bytes(b"")
    damaged = folder / training[1]["image"]
    damaged.write_bytes(damaged.read_bytes()[:200])
    with open(folder / "manifest.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return reports


@pytest.mark.long
def test_fifty_planted_identifiers_reach_no_file_of_a_training_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    reports = planted_manifest(data)
    skipped = ("run.dir", "data.manifest", "data.phantom")
    settings = [s for s in small_run().settings if not s.startswith(skipped)]
    settings += [*TINY, f"data.manifest={data / 'manifest.csv'}", f"run.dir={run}"]
    assert train.main([*settings, "data.bad_share=0.9", "evaluate.show_text=false"]) == 0

    files = {path.relative_to(run): path for path in run.rglob("*") if path.is_file()}
    assert EXPECTED <= {path.name for path in files}
    assert any("checkpoints" in path.parts for path in files)
    assert len(json.loads((run / "quarantine.json").read_text())) >= 2
    contents = {str(name): path.read_bytes() for name, path in files.items()}
    captured = capsys.readouterr()
    contents["printed"] = (captured.out + captured.err).encode()
    contents.pop("config.yaml", None)  # holds what the user typed: the manifest's place
    hits = {
        (word, name)
        for word in [*CANARIES, *DATES]
        for form in forms(word)
        for name, content in contents.items()
        if form in content
    }
    assert hits == set()

    tokenizer = load_tokenizer(run / "tokenizer")
    for report in reports:
        ids = tokenizer.encode_batch([clean_report(report)])[0].ids[:8]
        for form in integer_forms(ids):
            for name, content in contents.items():
                assert form not in content, name
    # the search finds what it looks for, the reports hold what it looks for
    assert forms("Zq00canary")[0] in (data / "manifest.csv").read_bytes()
    assert np.array([7, *ids], np.int64).tobytes().find(integer_forms(ids)[-1]) == 8
