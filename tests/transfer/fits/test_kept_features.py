"""Images that a frozen encoder encoded before a kill are not encoded again, and no other is taken.

Oracle: the files of a run that was left alone, byte by byte, and the images that the encoder saw.
Encoders here give other last digits for every other batch, as real ones can.
"""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mlip.pages import transfer_page
from mlip.system.stop_signal import Stopped
from mlip.transfer.fits import classification, kept_features, kept_fits, protocol
from mlip.transfer.fits.encoder import Encoder
from mlip.transfer.fits.kept_features import KeptFeatures, depends_on
from mlip.transfer.fits.kept_fits import KeptFits
from mlip.transfer.fits.sealed_file import read_sealed, write_sealed
from tests.transfer import small_manifest
from tests.transfer.small_manifest import LABELS, evaluate, write

ROOT = Path(__file__).resolve().parents[3]
FITS = ["transfer.fractions=[40, 100]", "transfer.seeds=[1, 2]", "transfer.epochs=2"]
NAMES = ("results.json", "predictions.parquet", "report.html")
AT_ONCE = 5  # of 30 images


class Encoded:
    """Sizes of the batches that the encoder saw, and a stop behind one of them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.stop_after = 0


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoded]:
    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    noon = SimpleNamespace(strftime=lambda form: "noon")
    monkeypatch.setattr(transfer_page, "datetime", SimpleNamespace(now=lambda zone: noon))
    monkeypatch.setattr(classification, "FEATURES_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(kept_features, "WRITE_SECONDS", 0.0)
    pooled, seen = Encoder.pooled, Encoded()

    def counted(self: Encoder, image: torch.Tensor) -> torch.Tensor:
        if seen.stop_after and len(seen.sizes) == seen.stop_after:
            raise Stopped(signal.SIGTERM)
        seen.sizes.append(len(image))
        return pooled(self, image) + 1e-3 * image.mean()

    monkeypatch.setattr(Encoder, "pooled", counted)
    yield seen


def settings_of(folder: Path) -> list[str]:
    return [*write(folder), *FITS, *LABELS, "transfer.probe=logistic"]


def stopped_run(folder: Path, settings: list[str], seen: Encoded, after: int) -> Path:
    """The folder that a run leaves whose encoder is stopped behind so many batches."""
    seen.sizes.clear()
    seen.stop_after = after
    assert evaluate(folder, settings) == 143
    seen.sizes.clear()
    seen.stop_after = 0
    return folder / "out" / kept_fits.FOLDER


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "out" / name).read_bytes() for name in NAMES}


def whole_run(folder: Path, settings: list[str], seen: Encoded) -> tuple[dict[str, bytes], int]:
    """(the files of a run left alone, how many batches it encoded)"""
    seen.sizes.clear()
    assert evaluate(folder, settings) == 0
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted(NAMES)
    files, batches = files_of(folder), len(seen.sizes)
    for name in NAMES:
        (folder / "out" / name).unlink()
    return files, batches


def test_a_run_that_was_killed_while_it_encoded_encodes_the_rest_and_ends_with_the_same_bytes(
    encoded: Encoded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path)
    whole, batches = whole_run(tmp_path, settings, encoded)
    assert batches >= 6 and sum(encoded.sizes) == small_manifest.ROWS
    for stop in (1, 2, batches - 1):
        capsys.readouterr()
        kept = stopped_run(tmp_path, settings, encoded, stop)
        told = capsys.readouterr().err.splitlines()[-2]
        assert ", and encoded images; the same command goes on with the others" in told
        assert len(list(kept.glob("features-*"))) >= 1
        assert evaluate(tmp_path, settings) == 0
        assert len(encoded.sizes) == batches - stop
        assert files_of(tmp_path) == whole and not kept.exists()
        for name in NAMES:
            (tmp_path / "out" / name).unlink()


def test_a_run_that_is_stopped_writes_what_it_encoded_since_the_last_file(
    encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_features, "WRITE_SECONDS", 3600.0)
    settings = settings_of(tmp_path)
    whole, batches = whole_run(tmp_path, settings, encoded)
    kept = stopped_run(tmp_path, settings, encoded, 4)
    assert len(list(kept.iterdir())) == 1
    assert evaluate(tmp_path, settings) == 0
    assert len(encoded.sizes) == batches - 4 and files_of(tmp_path) == whole


def test_kept_features_outlast_several_kills(encoded: Encoded, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    whole, batches = whole_run(tmp_path, settings, encoded)
    for _ in range(batches - 1):
        stopped_run(tmp_path, settings, encoded, 1)
    assert evaluate(tmp_path, settings) == 0
    assert len(encoded.sizes) == 1 and files_of(tmp_path) == whole


def test_images_of_other_batches_are_encoded_anew(encoded: Encoded, tmp_path: Path) -> None:
    """Another draw first puts them beside others: their last digits would be those of no run."""
    settings = settings_of(tmp_path)
    turned = [*settings, "transfer.fractions=[100, 40]"]
    whole, batches = whole_run(tmp_path, turned, encoded)
    stopped_run(tmp_path, settings, encoded, 5)
    assert evaluate(tmp_path, turned) == 0
    # val and test come first in both, in batches of their own
    assert 0 < batches - len(encoded.sizes) < 5
    assert files_of(tmp_path) == whole


@pytest.mark.parametrize("change", ["pixels", "weights", "code", "transfer.image_px"])
def test_features_of_anything_else_are_not_taken(
    change: str, encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path)
    _, batches = whole_run(tmp_path, settings, encoded)
    kept = stopped_run(tmp_path, settings, encoded, 5)
    picture = small_manifest.pictures() / "0.png"
    before = picture.read_bytes()
    try:
        if change == "pixels":
            cv2.imwrite(str(picture), cv2.imread(str(picture), cv2.IMREAD_GRAYSCALE)[::-1])
        elif change == "code":
            monkeypatch.setattr(kept_fits, "hash_of_source", lambda: "another")
        elif change == "weights":
            start = protocol.open_start
            monkeypatch.setattr(
                *(protocol, "open_start"),
                lambda *given: protocol.Start(start(*given).vision, "another"),
            )
        else:
            settings = [*settings, "transfer.image_px=48"]
        assert evaluate(tmp_path, settings) == 0
        assert len(encoded.sizes) == batches and not kept.exists()
    finally:
        picture.write_bytes(before)  # the folder is other tests' too


def test_what_is_of_fits_alone_may_change(encoded: Encoded, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    _, batches = whole_run(tmp_path, settings, encoded)
    stopped_run(tmp_path, settings, encoded, 5)
    changes = ["transfer.probe=adamw", "transfer.lr=1e-2", "transfer.epochs=1"]
    assert evaluate(tmp_path, [*settings, *changes]) == 0
    assert len(encoded.sizes) == batches - 5


def test_a_damaged_file_is_told_and_its_images_are_encoded_anew(
    encoded: Encoded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path)
    whole, batches = whole_run(tmp_path, settings, encoded)
    kept = stopped_run(tmp_path, settings, encoded, 3)
    paths = sorted(kept.glob("features-*"))
    assert len(paths) == 3  # WRITE_SECONDS is 0: a file a batch
    content = bytearray(paths[1].read_bytes())
    content[-1] ^= 1
    paths[1].write_bytes(content)
    capsys.readouterr()
    assert evaluate(tmp_path, settings) == 0
    said = capsys.readouterr().out
    assert f"{paths[1]}: is damaged or cannot be read: its images are encoded anew" in said
    assert len(encoded.sizes) == batches - 2 and files_of(tmp_path) == whole


def test_a_file_is_written_now_and_then_and_holds_all_batches_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(kept_features, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made_of = {"weights": "0123456789abcdef", "images": "a"}
    kept = KeptFeatures(tmp_path, made_of, print)
    parts = [np.array([4, 1]), np.array([7], np.int32), np.array([2, 9, 3])]
    found = [np.random.default_rng(i).random((len(p), 3), np.float32) for i, p in enumerate(parts)]
    for second, (part, features) in enumerate(zip(parts, found, strict=True)):
        now[0] = 14.0 * second
        kept.add(part, features)
        assert not any(tmp_path.iterdir())
    now[0] = 30.0
    kept.add(np.array([5]), np.ones((1, 3), np.float32))
    (path,) = kept.paths
    assert [p.name for p in tmp_path.iterdir()] == ["features-0123456789ab-0.safetensors"]
    kept.write()  # nothing new
    now[0] = 59.0
    kept.add(np.array([8]), np.ones((1, 3), np.float32))  # half a minute from the last file
    assert [path] == list(tmp_path.iterdir())
    again = KeptFeatures(tmp_path, made_of, print)
    assert again.take(np.array([1, 4])) is None and again.take(np.array([4])) is None
    for part, features in zip(parts, found, strict=True):
        np.testing.assert_array_equal(again.take(part), features)
        assert again.take(part) is None  # it is the caller's now
    assert again.take(np.array([8])) is None
    again.add(np.array([6]), np.zeros((1, 3), np.float32))
    again.write()
    assert sorted(p.name for p in tmp_path.iterdir())[1] == "features-0123456789ab-1.safetensors"
    other = KeptFeatures(tmp_path, {**made_of, "images": "b"}, pytest.fail)
    assert other.take(np.array([2, 9, 3])) is None and not other.paths


def test_a_batch_that_is_kept_already_is_not_kept_again(tmp_path: Path) -> None:
    """Where every seed has an encoder of its own each encodes its images at every fraction."""
    made_of, part = {"weights": "0123456789abcdef"}, np.array([4, 1])
    kept = KeptFeatures(tmp_path, made_of, pytest.fail)
    for _ in range(2):
        kept.add(part, np.ones((2, 3), np.float32))
        kept.write()
    (path,) = kept.paths
    again = KeptFeatures(tmp_path, made_of, pytest.fail)
    assert again.take(part) is not None
    again.add(part, np.ones((2, 3), np.float32))
    again.write()
    assert list(tmp_path.iterdir()) == [path]


def test_much_at_once_goes_to_the_disk_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU encodes all images of a data set in half a minute: a file is copied while written."""
    monkeypatch.setattr(kept_features, "WRITE_BYTES", 2_000)
    kept = KeptFeatures(tmp_path, {"weights": "0123456789abcdef"}, pytest.fail)
    for number in range(7):  # of 800 bytes
        kept.add(np.arange(2) + 2 * number, np.full((2, 100), number, np.float32))
    assert len(kept.paths) == 2  # of three batches each
    kept.write()
    again = KeptFeatures(tmp_path, {"weights": "0123456789abcdef"}, pytest.fail)
    for number in range(7):
        found = again.take(np.arange(2) + 2 * number)
        assert found is not None and (found == number).all()


def test_encoders_of_every_seed_keep_their_own(encoded: Encoded, tmp_path: Path) -> None:
    settings = [*settings_of(tmp_path), "transfer.start=random"]
    whole, batches = whole_run(tmp_path, settings, encoded)
    for stop in (1, 4, batches - 6):
        kept = stopped_run(tmp_path, settings, encoded, stop)
    found = [read_sealed(path) for path in kept.glob("features-*")]
    held = [(facts["made_of"]["weights"], row) for facts, a in found for row in a["rows"].tolist()]
    assert len({weights for weights, _ in held}) == 2 and len(set(held)) == len(held)
    assert evaluate(tmp_path, settings) == 0
    assert files_of(tmp_path) == whole and not kept.exists()


def test_what_a_kill_leaves_of_a_file_is_private_and_goes_with_the_results(tmp_path: Path) -> None:
    """The system kills a process that writes a file larger than it may: in the middle of it."""
    program = (
        "import numpy, resource, signal, sys; from pathlib import Path\n"
        "from mlip.transfer.fits.kept_features import KeptFeatures\n"
        "kept = KeptFeatures(Path(sys.argv[1]), {'weights': '0123456789abcdef'}, print)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "kept.add(numpy.arange(9), numpy.zeros((9, 9999), numpy.float32)); kept.write()\n"
    )
    folder = tmp_path / kept_fits.FOLDER
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGXFSZ
    (left,) = folder.iterdir()
    assert left.stat().st_size and stat.S_IMODE(left.stat().st_mode) == 0o600
    kept = KeptFits(folder, pytest.fail)
    kept.features({"weights": "0123456789abcdef"}).add(np.arange(3), np.zeros((3, 2), np.float32))
    assert kept.write_features()
    (path,) = folder.glob("features-*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept.remove()
    assert not folder.exists()


def test_sizes_that_are_not_those_of_the_rows_are_damage(tmp_path: Path) -> None:
    made_of = {"weights": "0123456789abcdef"}
    path = tmp_path / "features-0123456789ab-0.safetensors"
    arrays: dict[str, Any] = {
        "sizes": np.array([2, 3]),
        "rows": np.arange(4),
        "features": np.zeros((5, 2), np.float32),
    }
    write_sealed(path, {"made_of": made_of}, arrays)
    assert read_sealed(path)[0] == {"made_of": made_of}
    said: list[str] = []
    kept = KeptFeatures(tmp_path, made_of, said.append)
    assert kept.take(np.array([0, 1])) is None and len(said) == 1


def test_features_depend_on_all_that_is_not_of_a_fit_alone() -> None:
    of_fits = {
        *("seed", "training rows", "encoded together", "truth", "transfer.lr", "transfer.classes")
    }
    of_features = {
        *("code", "versions", "device", "precision", "manifest", "splits", "images", "weights"),
        *("tower", "data.resize_px", "model.vision.kind", "train.residual", "transfer.image_px"),
    }
    assert set(depends_on(dict.fromkeys(of_fits | of_features, 1))) == of_features
