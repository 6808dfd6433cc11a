"""Names that are not UTF-8, as old shares have them: refused before the work where JSON, Arrow or
safetensors would fail on them in its midst, and read where they need not be written down.

Oracle: the exit codes of mlip/training/lifecycle.py, and that nothing is left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import train
from mlip.cli import main
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.manifest import ManifestError, load_manifest
from mlip.dataloading.tables.table import column_names
from mlip.settings.config import ConfigError, load
from mlip.training.lifecycle import exit_code

ODD = os.fsdecode(b"Gr\xf6ssen")  # Latin-1; Python carries the byte as a lone surrogate
SHOWN = r"Gr\udcf6ssen"

COMMANDS = {
    "prepare": ["prepare", "manifest", "--root", "{here}", "--out", "{odd}"],
    "evaluate": ["evaluate", "checkpoint=none", "--out", "{odd}"],
    "evaluate a checkpoint": ["evaluate", "checkpoint={odd}"],
    "embed": ["embed", "checkpoint=none", "--out", "{odd}"],
    "export": ["export", "checkpoint=none", "--out", "{odd}"],
    "ground": ["ground", "a.png", "edema", "--checkpoint", "none", "--out", "{odd}"],
    "phantoms": ["phantoms", "--out", "{odd}"],
}


def require_refused(code: int, said: str, place: Path) -> None:
    assert code == 2
    lines = [line for line in said.splitlines() if line.startswith("mlip")]
    assert len(lines) == 1 and "expected a name in UTF-8, got" in lines[0]
    assert SHOWN in lines[0] and "rename" in lines[0] and said.isascii()
    assert not place.exists()


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_that_would_write_there_says_so_and_makes_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.csv").write_text("image,patient_id,report\n")
    place = tmp_path / ODD
    arguments = [item.format(here=tmp_path, odd=place) for item in COMMANDS[case]]
    require_refused(main(arguments), capsys.readouterr().err, place)


def test_a_run_is_refused_before_its_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / ODD
    require_refused(train.main([f"run.dir={place}"]), capsys.readouterr().err, place)
    with pytest.raises(ConfigError, match="data.manifest: expected a name in UTF-8"):
        load([], [f"data.manifest={place / 'm.csv'}"])


def test_prepare_below_such_a_folder_is_refused_by_its_full_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ODD).mkdir()
    monkeypatch.chdir(tmp_path / ODD)
    code = main(["prepare", "manifest", "--root", str(tmp_path), "--out", "out"])
    require_refused(code, capsys.readouterr().err, Path("out"))


@pytest.mark.parametrize("name", ["m.csv", "m.parquet", "m.jsonl"])
def test_a_table_in_such_a_folder_is_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / ODD).mkdir()
    path = tmp_path / ODD / name
    path.write_bytes(b'{"image": "a.png", "patient_id": "p", "report": "Clear.", "split": "train"}')
    # past the settings' own check, as a collector would
    settings = replace(load([], ["data.columns.study_id=null"]).data, manifest=str(path))
    if name == "m.jsonl":
        assert column_names(path)[0] == "image" and len(load_manifest(settings)) == 1
        return
    path.write_bytes(b"image,patient_id,report,split\na.png,p,Clear.,train\n")
    with pytest.raises(
        ManifestError, match="expected a path in UTF-8, which Arrow needs"
    ) as caught:
        load_manifest(settings)
    assert exit_code(caught.value) == 3 and SHOWN in str(caught.value)


def test_what_is_only_read_may_have_any_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{ODD}.dcm"
    write_radiograph(path, np.full((64, 64), 7, np.uint16), patient_id="p", study_id="s")
    assert main(["prepare", "--explain", str(path)]) == 0
    assert "64 x 64" in capsys.readouterr().out


def test_where_the_locale_is_not_utf_8_the_remedy_is_the_locale() -> None:
    """A name in UTF-8 was to be renamed."""
    code = (
        "import sys; from mlip.settings.typed_tree import require_utf8; "
        "require_utf8('x', sys.argv[1])"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, "D\u00e4t\u00e4"]
    ended = subprocess.run(
        command, env=os.environ | plain, capture_output=True, cwd=Path(__file__).parents[1]
    )
    assert b"set PYTHONUTF8=1" in ended.stderr and b"rename" not in ended.stderr


@pytest.mark.parametrize("kind", ["manifest", "folder"])
def test_films_with_other_letters_are_read_in_a_locale_of_ascii(kind: str, tmp_path: Path) -> None:
    """In LC_ALL=C without Python's UTF-8 mode each was refused as undecodable, by `folder` as
    named otherwise than in UTF-8."""
    root, out = tmp_path / "raw", tmp_path / "out"
    names = ["R\u00f6ntgen \u80f8\u90e8.dcm", "plain.dcm", "B\u00fcro/a.dcm"]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40
        write_radiograph(root / name, pixels, patient_id=f"P{i}", study_id="S", image_id=str(i))
    lines = [f"{name},P{i},Clear.\n" for i, name in enumerate(names)]
    (root / "manifest.csv").write_text("image,patient_id,report\n" + "".join(lines), "utf-8")
    command = [sys.executable, "-m", "mlip.cli", "prepare", kind, "--root", str(root)]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*command, "--out", str(out), "--keep-ids"], env=environment, capture_output=True
    )
    assert b"rows 3 = images 3 + refused 0 + lost 0" in done.stdout, done.stdout + done.stderr
    told = pq.read_table(out / "index.parquet").column("reason").to_pylist()
    assert told == ["", "", ""]
