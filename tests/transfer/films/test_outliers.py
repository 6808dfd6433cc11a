"""`mlip outliers`: p-values that mean what they say, and a file that only its own model takes."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from mlip.batch import ImageFeatures
from mlip.cli import main
from mlip.commands.inputs import read_given
from mlip.dataloading.manifest import load_manifest
from mlip.pretrained import open_checkpoint
from mlip.transfer import features as shared_features
from mlip.transfer.films import outlier_table, outliers, row_images
from mlip.transfer.films.outliers import OutlierError, Reference, fit_reference, load_reference
from mlip.transfer.fingerprint import made_with
from tests.small_run import small_export
from tests.transfer.small_manifest import SECRETS, pictures, write

D = 6


def features(values: np.ndarray) -> ImageFeatures:
    """Patches whose mean is `values` [N, D]."""
    apart = np.random.default_rng(9).normal(size=(len(values), 1, values.shape[1]))
    patches = torch.from_numpy(values[:, None] + np.concatenate([apart, -apart], axis=1))
    return ImageFeatures(patches[:, 0], patches, (1, 2))


def drawn(count: int, seed: int) -> np.ndarray:
    mixing = np.random.default_rng(5).normal(size=(D, D))
    return np.random.default_rng(seed).normal(size=(count, D)) @ mixing + 3.0


def test_of_images_like_the_reference_one_in_twenty_has_a_p_of_a_twentieth():
    shares = []
    for seed in range(20):
        known = drawn(400, seed)
        reference = fit_reference(features(known), np.arange(400), seed=seed, made_of={})
        shares.append((reference.p_values(features(drawn(500, 100 + seed))) <= 0.05).mean())
    # a share of 200 ranked images has a standard error of 0.015, the mean of twenty 0.0035
    assert abs(np.mean(shares) - 0.05) < 0.0125
    far = reference.p_values(features(drawn(3, 1) + 40.0))
    assert far == pytest.approx([1 / 201] * 3)


def test_a_p_value_is_the_share_that_lies_at_least_as_far():
    reference = Reference(np.zeros(1), np.eye(1), np.array([1.0, 2.0, 2.0, 4.0]), {})
    found = reference.p_values(features(np.array([[0.5], [2.0], [-2.0], [3.0], [5.0]])))
    assert found == pytest.approx([1.0, 4 / 5, 4 / 5, 2 / 5, 1 / 5])


def test_the_distance_is_that_of_the_fitted_half_and_patients_stay_whole():
    known = drawn(120, 3)
    patients = np.repeat(np.arange(60), 2)  # two images each
    reference = fit_reference(features(known), patients, seed=4, made_of={})
    in_fit = np.zeros(60, dtype=bool)
    in_fit[np.random.default_rng(4).permutation(60)[:30]] = True
    half = known[in_fit[patients]]
    fitted = LedoitWolf().fit(half)
    new = drawn(5, 8)
    oracle = [mahalanobis(one, half.mean(axis=0), fitted.precision_) for one in new]
    np.testing.assert_allclose(reference.distances(features(new)), oracle, rtol=1e-9)
    of_others = np.sort(reference.distances(features(known[~in_fit[patients]])))
    np.testing.assert_allclose(reference.ranked, of_others, rtol=1e-9)


@pytest.mark.parametrize(
    ("count", "patients"), [(39, np.arange(39)), (200, np.zeros(200)), (60, [0] * 45 + [1] * 15)]
)
def test_too_few_images_or_patients_make_no_reference(count, patients):
    with pytest.raises(OutlierError, match="expected 20 or more in each"):
        fit_reference(features(drawn(count, 0)), np.array(patients), made_of={})
    assert len(fit_reference(features(drawn(40, 0)), np.arange(40), made_of={}).ranked) == 20


def test_features_that_are_no_numbers_or_of_another_model_are_refused():
    known = drawn(80, 0)
    reference = fit_reference(features(known), np.arange(80), made_of={})
    with pytest.raises(OutlierError, match="another model"):
        reference.p_values(features(known[:, :-1]))
    known[3, 2] = np.nan
    with pytest.raises(OutlierError, match="NaN"):
        reference.p_values(features(known))
    with pytest.raises(OutlierError, match="NaN"):
        fit_reference(features(known), np.arange(80), made_of={})


def test_images_that_are_all_alike_make_no_reference():
    patches = torch.full((60, 1, D), 3.0)
    with pytest.raises(OutlierError, match="do not differ"):
        fit_reference(ImageFeatures(patches[:, 0], patches, (1, 1)), np.arange(60), made_of={})


def test_the_distances_of_many_images_are_those_of_each(monkeypatch):
    reference = fit_reference(features(drawn(80, 0)), np.arange(80), made_of={})
    new = features(drawn(7, 1))
    at_once = reference.distances(new)
    monkeypatch.setattr(outliers, "_PART", 3)
    np.testing.assert_allclose(reference.distances(new), at_once, rtol=1e-12)


def run(folder: Path, *options: str, root: Path | None = None, **columns: Any) -> int:
    settings = [*write(folder, **columns), f"checkpoint={small_export()}"]
    settings += [f"data.root={root}"] if root else []
    return main(["outliers", *settings, *options])


def test_the_command_ranks_a_split_by_the_reference_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "FEWEST", 4)
    path, table = tmp_path / "reference.safetensors", tmp_path / "outliers.csv"
    assert run(tmp_path, "--fit", str(path)) == 0
    assert "6 images for mean and covariance, 6 to rank among" in capsys.readouterr().out
    assert oct(os.stat(path).st_mode & 0o777) == "0o600"
    stored = path.read_bytes()
    assert run(tmp_path, "--fit", str(path)) == 0 and path.read_bytes() == stored

    root = Path(shutil.copytree(pictures(), tmp_path / "images"))
    cut = root / "8.png"
    cut.write_bytes(cut.read_bytes()[:100])
    asked = ("--reference", str(path), "--split", "test", "--out", str(table))
    capsys.readouterr()
    assert run(tmp_path, *asked, root=root) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [int(row["row_index"]) for row in rows] == [i for i in range(30) if i % 5 >= 3]
    assert {row["row_index"]: row["reason"] for row in rows if row["reason"]} == {"8": "truncated"}
    assert "11 images: " in said and "12 rows; 1 cannot be read (truncated 1)" in said
    assert not any(secret in said + table.read_text() for secret in SECRETS)

    opened = open_checkpoint(small_export())
    reference = opened.open_reference(path)
    for row in rows[:2]:  # of files the same as of the loader's batches
        image = opened.encode_images([root / f"{row['row_index']}.png"])
        assert float(row["p_value"]) == pytest.approx(reference.p_values(image)[0])
        assert float(row["distance"]) == pytest.approx(reference.distances(image)[0], rel=1e-3)
    everything = ("--reference", str(path), "--out", str(table))  # of new films: of no split
    assert run(tmp_path, *everything, report="", split="") == 0  # and without reports
    assert "30 images: " in capsys.readouterr().out


def test_a_reference_of_another_model_or_no_reference_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "FEWEST", 4)
    path = tmp_path / "reference.safetensors"
    opened = open_checkpoint(small_export())
    known = fit_reference(features(drawn(40, 0)), np.arange(40), made_of=made_with(opened))
    outliers.save_reference(known, path)
    again = load_reference(path, opened)
    np.testing.assert_array_equal(again.ranked, known.ranked)
    np.testing.assert_array_equal(again.whitening, known.whitening)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"made_of": {**known.made_of, "weights": "0" * 64}}, "was made with other weights"),
        ({"made_of": {**known.made_of, "preprocessing": "0"}}, "was made with other preprocessing"),
        ({"made_of": {**known.made_of, "format": "0"}}, "of another version"),
        ({"mean": known.mean[1:]}, "of another version"),
        ({"ranked": known.ranked[:3]}, "of another version"),
    ]
    for change, told in changes:
        outliers.save_reference(dataclasses.replace(known, **change), path)
        assert run(tmp_path, "--reference", str(path), "--out", str(tmp_path / "t.csv")) == 4
        assert told in capsys.readouterr().err
    for content in (b"", b"junk" * 50):
        path.write_bytes(content)
        assert run(tmp_path, "--reference", str(path), "--out", str(tmp_path / "t.csv")) == 4
        assert "cannot be read" in capsys.readouterr().err
    path.unlink()
    assert run(tmp_path, "--reference", str(path), "--out", str(tmp_path / "t.csv")) == 4
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "t.csv").exists()
    assert run(tmp_path, "--fit", str(path), split="test") == 3
    assert "split 'train' has none of its 30 rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # one of the two
        run(tmp_path)
    assert run(tmp_path, "--fit", str(path), "--out", str(tmp_path / "t.csv")) == 2
    assert "is the table of --reference" in capsys.readouterr().err and not path.exists()


def test_a_file_of_another_kind_is_never_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "FEWEST", 4)
    reference, table = tmp_path / "new" / "r.safetensors", tmp_path / "other" / "t.csv"
    assert run(tmp_path, "--fit", str(reference)) == 0  # in folders that are not there yet
    assert run(tmp_path, "--reference", str(reference), "--out", str(table)) == 0
    manifest, weights = tmp_path / "manifest.csv", tmp_path / "model.safetensors"
    shutil.copy(next(Path(small_export()).glob("*.safetensors")), weights)
    held = {path: path.read_bytes() for path in (reference, table, manifest, weights)}
    capsys.readouterr()
    for option, path in (
        ("--out", manifest),
        ("--out", reference),
        ("--out", tmp_path),
        ("--fit", manifest),
        ("--fit", table),
        ("--fit", weights),
        ("--fit", tmp_path),
    ):
        by = ("--reference", str(reference)) if option == "--out" else ()
        assert run(tmp_path, option, str(path), *by) == 2
        assert f"{option} {path}: is there already" in capsys.readouterr().err
    assert held == {path: path.read_bytes() for path in held}
    (tmp_path / "empty.csv").touch()
    for path in (table, tmp_path / "empty.csv"):  # a table, or nothing yet
        assert run(tmp_path, "--reference", str(reference), "--out", str(path)) == 0
        assert path.read_bytes() == held[table]


def test_where_no_image_can_be_read_the_reasons_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "FEWEST", 4)
    reference = tmp_path / "r.safetensors"
    assert run(tmp_path, "--fit", str(reference)) == 0
    (tmp_path / "elsewhere").mkdir()
    asked = ("--reference", str(reference), "--out", str(tmp_path / "t.csv"))
    assert run(tmp_path, *asked, root=tmp_path / "elsewhere") == 3
    assert "no image of split 'all' can be read (missing 30)" in capsys.readouterr().err


def test_a_large_split_is_sampled_by_the_seed_and_patients_are_those_of_the_manifest(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(outliers, "FEWEST", 4)
    monkeypatch.setattr(outlier_table, "MOST_REFERENCE", 9)
    made = [tmp_path / name for name in ("a", "b", "again")]
    for path, seed in zip(made, (1, 2, 1), strict=True):
        assert run(tmp_path, "--fit", str(path), f"run.seed={seed}") == 0
        said = capsys.readouterr().out
        assert "5 images for mean and covariance, 4 to rank among (smallest p 0.2)" in said
    a, b, again = (path.read_bytes() for path in made)
    assert a == again and a != b
    opened, rows = open_checkpoint(small_export()), []
    for seed in (1, 2):
        config = read_given([*write(tmp_path), f"run.seed={seed}"]).config
        own, manifest = dataclasses.replace(opened, config=config), load_manifest(config.data)
        rows.append(outliers.encode_rows(own, manifest, "train", most=9)[1])
    assert rows[0].tolist() != rows[1].tolist() and len(rows[0]) == 9  # other images
    monkeypatch.setattr(outlier_table, "MOST_REFERENCE", 12)  # all: other halves alone
    for path, seed in zip(made[:2], (1, 2), strict=True):
        assert run(tmp_path, "--fit", str(path), f"run.seed={seed}") == 0
    assert made[0].read_bytes() != made[1].read_bytes()
    monkeypatch.setattr(outlier_table, "MOST_REFERENCE", 9)
    capsys.readouterr()
    assert run(tmp_path, "--fit", str(made[0]), patient_id="one", split="train") == 4
    assert "9 images of 1 patients" in capsys.readouterr().err


def test_features_are_those_of_each_batch_and_the_rows_of_those_that_can_be_read(
    tmp_path, monkeypatch
):
    """Oracle: every batch's means kept, and joined at the end; the last batch is short."""
    monkeypatch.setattr(shared_features, "ROWS_AT_ONCE", 7)
    items = write(tmp_path, image=lambda i: "none.png" if i == 8 else f"{i}.png")
    config = read_given(items).config
    opened = dataclasses.replace(open_checkpoint(small_export()), config=config)
    manifest = load_manifest(config.data)
    images = row_images.RowImages(opened, manifest, "all")
    parts = [(bank.features.patches.mean(dim=1), bank.row_index) for bank in images]
    assert len(parts) == 5 and len(images) == 30
    found, rows, bad = outliers.encode_rows(opened, manifest, "all", most=None)
    assert rows.tolist() == np.concatenate([r for _, r in parts]).tolist()
    assert set(rows.tolist()) == set(range(30)) - {8} and bad == {8: "missing"}
    assert torch.equal(found.patches, torch.cat([mean for mean, _ in parts])[:, None])
    assert torch.equal(found.embedding, found.patches[:, 0])


def test_the_lines_count_and_name_what_the_table_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "FEWEST", 4)
    monkeypatch.setattr(outlier_table, "LEVELS", (4 / 7, 1 / 7))
    reference, out = tmp_path / "r", tmp_path / "t.csv"
    assert run(tmp_path, "--fit", str(reference)) == 0  # six to rank among
    capsys.readouterr()
    assert run(tmp_path, "--reference", str(reference), "--out", str(out)) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    p_values = np.array([float(row["p_value"]) for row in rows])
    middle, smallest = (p_values < 0.58).sum(), (p_values < 0.15).sum()  # sevenths
    assert f"30 images: {middle} with p <= 0.571" in said and "(17 of images" in said
    assert f", {smallest} with p <= 0.14" in said
    farthest = sorted(rows, key=lambda row: -float(row["distance"]))[:10]
    assert f"rows {', '.join(row['row_index'] for row in farthest)}\n" in said
