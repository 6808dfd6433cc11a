"""`mlip prepare` run twice: at once, after a change of mode or of time, after a mistake.

Oracle: the account it prints (rows = images + refused + lost) and the manifest's own rows.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pytest

from mlip.cli import main
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.images import image_file
from mlip.dataloading.prepare import shard_build
from mlip.dataloading.prepare.output_folder import sole_writer
from mlip.dataloading.prepare.shard_build import Plan, build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings, make_member
from mlip.dataloading.prepare.worker_pool import Reply, WorkerPool
from mlip.dataloading.shards import ShardWriter
from mlip.system.machine import LimitError


def make_root(folder: Path, count: int) -> Path:
    root = folder / "raw"
    root.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40), np.uint8)
        cv2.imwrite(str(root / f"{i}.png"), noise)
    return root


def rows_of(root: Path) -> list[Row]:
    names = sorted(path.name for path in root.glob("*.png"))
    return [Row(name, f"p{name}", "", name, "train", report=f"Of {name}.") for name in names]


def plan_for(root: Path, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "root": root,
        "out": root.with_name("out"),
        "settings": ImageSettings(side_px=32),
        "salt": "s",
        "keep_ids": True,
        "shard_images": 2,
    }
    return Plan(**settings | changes)


def refuse_with(code: int) -> Callable[[str], int]:
    def refuse(path: str) -> int:
        raise OSError(code, os.strerror(code), path)

    return refuse


def prepare(*arguments: object) -> int:
    return main(["prepare", *(str(argument) for argument in arguments)])


def test_a_second_prepare_at_once_is_refused_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at once each removed the other's shards: rows 120 = images 115 + lost 5, exit code 0."""
    root, out = make_root(tmp_path, 4), tmp_path / "out"
    command = ("folder", "--root", root, "--out", out, "--workers", 1, "--side", 32)
    out.mkdir()
    with sole_writer(out, (0, 1)):
        assert prepare(*command) == 2
        assert "another `mlip prepare` is at work there" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert prepare(*command) == 0
    assert "rows 4 = images 4 + refused 0 + lost 0" in capsys.readouterr().out


def test_parts_work_side_by_side_and_a_whole_run_does_not(tmp_path: Path) -> None:
    with sole_writer(tmp_path, (0, 2)) as first, sole_writer(tmp_path, (1, 2)) as other:
        assert first and other
        with sole_writer(tmp_path, (0, 2)) as again, sole_writer(tmp_path, (0, 1)) as whole:
            assert not again and not whole
    with sole_writer(tmp_path, (0, 1)) as whole, sole_writer(tmp_path, (1, 2)) as part:
        assert whole and not part


def test_a_missing_index_is_no_complete_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(tmp_path, 6)
    real = shard_build._remove_strangers

    def lose_one(folder: Path, shards: Any) -> None:
        real(folder, shards)
        (folder / "train-00001.parquet").unlink()

    monkeypatch.setattr(shard_build, "_remove_strangers", lose_one)
    result = build_shards(rows_of(root), plan_for(root))
    assert not result.complete and not (tmp_path / "out" / "manifest.parquet").exists()


def test_files_that_may_be_read_now_are_taken_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of mode leaves size and time alone: the refusal once stood for good."""
    root = make_root(tmp_path, 4)
    locked = {str(root / "1.png")}
    monkeypatch.setattr(os, "access", lambda path, mode: os.fsdecode(path) not in locked)
    result = build_shards(rows_of(root), plan_for(root))
    assert build_shards(rows_of(root), plan_for(root)).made == 0
    locked.clear()
    assert result.made == 2
    assert build_shards(rows_of(root), plan_for(root)).made == 1


def test_files_of_a_disk_that_failed_are_taken_once_it_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(tmp_path, 4)
    ordered = WorkerPool.ordered

    def failing(pool: WorkerPool, items: Any) -> Any:
        replies = ordered(pool, items)
        return (Reply({"reason": "io_error"}, b"") if i == 1 else r for i, r in enumerate(replies))

    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "ordered", failing)
        assert build_shards(rows_of(root), plan_for(root)).refused == {"io_error": 1}
        # while it fails nothing is made again
        patch.setattr(image_file, "_open", refuse_with(errno.EIO))
        assert build_shards(rows_of(root), plan_for(root)).made == 0
    again = build_shards(rows_of(root), plan_for(root))
    assert (again.made, again.images, dict(again.refused)) == (1, 4, {})


def test_a_limit_that_a_worker_meets_stops_the_run_and_refuses_no_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(image_file, "_open", refuse_with(errno.ENFILE))
        fields, _ = make_member(str(root), {"image": "1.png"}, plan_for(root).settings)

        def limited(pool: WorkerPool, items: Any) -> Any:
            return (Reply(fields, b"") for _ in items)

        patch.setattr(WorkerPool, "ordered", limited)
        with pytest.raises(LimitError, match="ulimit -n.*run the same command again"):
            build_shards(rows_of(root), plan_for(root))
    assert build_shards(rows_of(root), plan_for(root)).images == 4


def test_more_time_is_given_to_files_that_were_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(tmp_path, 1)
    ordered = WorkerPool.ordered

    def by_the_limit(pool: WorkerPool, items: Any) -> Any:
        """Any file takes a second here, whatever the machine."""
        if pool._timeout_s > 1.0:
            return ordered(pool, items)
        return (Reply({}, b"", "timeout") for _ in items)

    monkeypatch.setattr(WorkerPool, "ordered", by_the_limit)
    short = build_shards(rows_of(root), plan_for(root, timeout_s=0.5))
    assert short.refused == {"timeout": 1}
    assert build_shards(rows_of(root), plan_for(root, timeout_s=0.5)).made == 0
    longer = build_shards(rows_of(root), plan_for(root, timeout_s=60.0))
    assert longer.made == 1 and longer.images == 1 and not longer.refused


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--id-map", "{}/nowhere/ids.csv"], "--id-map .*cannot be written: No such file"),
        (["--id-map", "{}"], "--id-map .*cannot be written: Is a directory"),
        (["--timeout", "-1"], "--timeout -1.0: expected seconds above 0"),
        (["--timeout", "nan"], "--timeout nan: expected seconds above 0"),
    ],
)
def test_a_mistake_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """An id map that could not be written was a traceback after hours of decoding."""
    root = make_root(tmp_path, 1)
    given = [argument.format(tmp_path) for argument in arguments]
    assert prepare("folder", "--root", root, "--out", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error)
    assert not list(tmp_path.glob("out/shards/*"))


def test_the_secret_table_replaces_an_earlier_one_and_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, own = make_root(tmp_path, 1), tmp_path / "patients.csv"
    own.write_text("patient,phone\n1,555\n")
    arguments = ("folder", "--root", root, "--out", tmp_path / "out", "--id-map")
    assert prepare(*arguments, own) == 2
    assert "is there already and is no table of mlip prepare" in capsys.readouterr().err
    assert own.read_text() == "patient,phone\n1,555\n" and not (tmp_path / "out").exists()
    earlier = tmp_path / "ids.csv"  # of a version that told of no file which a rule left out
    earlier.write_text("key,image,image_id,patient_hash,patient_id,study_hash,study_id\n")
    for _ in range(2):
        assert prepare(*arguments, earlier) == 0
    assert earlier.read_text().split("\n", 1)[0].endswith(",study_id,left_out")
    earlier.unlink()

    def and_a_file_appears(rows: list[Row], *others: str) -> list[str]:
        earlier.write_text("another's")
        return [row.image for row in rows]

    for place in ("command.check_rows", "id_map.member_keys"):  # the second: while it is made
        with monkeypatch.context() as patched:
            patched.setattr(f"mlip.dataloading.prepare.{place}", and_a_file_appears)
            assert prepare(*arguments, earlier) == 2
        told = "is no table of mlip prepare: .*; what was made meanwhile is kept in .*ids-[23].csv"
        assert re.search(told, capsys.readouterr().err)
        assert earlier.read_text() == "another's"
        earlier.unlink()
    assert (tmp_path / "ids-2.csv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("bits", [8, 16])
def test_twelve_bits_in_a_sixteen_bit_picture_are_refused_and_not_blackened(
    tmp_path: Path, bits: int
) -> None:
    """Of 4,096 grey values sixteen were left, under a sixteenth of white, without a word."""
    ramp = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    settings = ImageSettings(bits=bits, codec="png")  # type: ignore[arg-type]
    for name, image, reason in (("low", ramp, "too_dark"), ("high", ramp * 40, "")):
        cv2.imwrite(str(tmp_path / f"{name}.png"), image)
        fields, _ = make_member(str(tmp_path), {"image": f"{name}.png"}, settings)
        assert fields["reason"] == reason


@pytest.mark.parametrize(
    ("white", "brightest", "wanted"),
    [(4095, 4095, 65535), (4095, 2000, 32007), ("own", 2000, 65535), (1023, 1024, "above_white")],
)
def test_what_is_white_in_sixteen_bits_can_be_said(
    tmp_path: Path, white: Any, brightest: int, wanted: int | str
) -> None:
    """Oracle: the value over white, of 65,535 parts; 2000 / 4095 * 65535 is 32007.3."""
    ramp = np.linspace(0, brightest, 1600).astype(np.uint16).reshape(40, 40)
    cv2.imwrite(str(tmp_path / "a.png"), ramp)
    settings = ImageSettings(bits=16, codec="png", png_white=white)
    fields, member = make_member(str(tmp_path), {"image": "a.png"}, settings)
    if isinstance(wanted, str):
        assert fields == {"reason": wanted}
        return
    found = cv2.imdecode(np.frombuffer(member, np.uint8), cv2.IMREAD_UNCHANGED)
    assert found.min() == 0 and found.max() == wanted
    assert np.abs(found / 65535 - ramp / (brightest * 65535 / wanted)).max() < 1e-4


def test_a_set_of_dark_pictures_is_refused_with_the_way_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_root(tmp_path, 2)
    dark = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    cv2.imwrite(str(root / "dark.png"), dark)
    out = tmp_path / "out"
    assert prepare("folder", "--root", root, "--out", out) == 0
    assert (
        "refused, too_dark: 1 (no pixel reaches an eighth of white); of 12-bit values"
        in capsys.readouterr().out
    )
    command = ["folder", "--root", root, "--out", out, "--overwrite", "--png-white"]
    assert prepare(*command, "1000") == 0
    assert (
        "(a pixel is brighter than --png-white); say a larger --png-white"
        in capsys.readouterr().out
    )
    assert prepare(*command, "4095") == 0
    assert "refused" not in capsys.readouterr().out.replace("+ refused 0", "")


def test_a_set_from_before_white_could_be_said_is_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_root(tmp_path, 2)
    out = tmp_path / "out"
    assert prepare("folder", "--root", root, "--out", out) == 0
    path = out / "settings.json"
    stated = json.loads(path.read_text())
    assert stated.pop("png_white") == 65535
    path.write_text(json.dumps(stated))
    before = {shard: shard.stat().st_mtime_ns for shard in out.rglob("*.tar")}
    assert before and prepare("folder", "--root", root, "--out", out) == 0
    assert {shard: shard.stat().st_mtime_ns for shard in out.rglob("*.tar")} == before
    capsys.readouterr()
    assert prepare("folder", "--root", root, "--out", out, "--png-white", "own") == 2
    assert "png_white (there 65535, asked 'own')" in capsys.readouterr().err
    assert prepare("folder", "--root", root, "--out", out, "--png-white", "70000") == 2
    assert "--png-white 70000: expected 255 to 65535, or own" in capsys.readouterr().err


def test_a_dicom_of_a_few_pixels_is_refused_as_a_picture_is(tmp_path: Path) -> None:
    cells = np.arange(16, dtype=np.uint16).reshape(4, 4)
    write_radiograph(tmp_path / "a.dcm", cells, patient_id="p", study_id="s")
    fields, _ = make_member(str(tmp_path), {"image": "a.dcm"}, ImageSettings())
    assert fields == {"reason": "too_small"}


def test_ctrl_c_just_after_a_file_was_made_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(tmp_path, 3)
    made = ShardWriter.__init__

    def interrupted(self: ShardWriter, file: BinaryIO) -> None:
        made(self, file)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_shards(rows_of(root), plan_for(root))
    assert not list(plan_for(root).out.rglob("*.part"))
