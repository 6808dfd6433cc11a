"""Which of the scored films, and whose patients, the model was trained on: counted, never named.

A run keeps no identifier, and its checkpoint less: films are compared with the manifest that it was
trained on, where that still lies in its place or is the scored one, and with those of
evaluate.trained_on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlip.dataloading.film_keys import FilmKeys, read_film_keys, usual_columns
from mlip.dataloading.images.same_pictures import PictureHashes, same_pictures
from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.splits import SPLITS
from mlip.settings.config import Columns, Config, Data
from mlip.transfer.array import Array

_TRAIN = SPLITS.index("train")
_SETTING = "evaluate.trained_on=MANIFEST"
_UNTOLD = f"the checkpoint does not say what it was trained on ({_SETTING})"


@dataclass(frozen=True)
class Training:
    """What a checkpoint tells of the rows that it was trained on."""

    data: Data
    manifest: str | None  # SHA-256 of data.manifest as it was then
    goes_on: bool = False  # its image tower began with weights of a training before

    @classmethod
    def of(cls, opened: Any) -> Training:
        """That of a model that mlip.pretrained has opened."""
        began = (opened.origin.get("start") or {}).get("image") or {"kind": "random"}
        manifest = opened.origin.get("manifest")
        return cls(opened.config.data, manifest, goes_on=began["kind"] != "random")


@dataclass(frozen=True)
class Seen:
    """Of each row of a manifest what a model has been trained on.

    film     the film itself; patient: a film of its patient; by_id: a patient of the same id, which
             may be another's where `patient` does not say so too
    """

    patient_key: Array
    film: Array
    patient: Array
    by_id: Array
    manifests: tuple[str, ...]  # SHA-256 of those that were compared
    compared: tuple[str, ...]
    unknown: str | None  # why some of the training is not among them
    pictures: PictureHashes | None = None  # of the manifest's rows
    trained_pictures: tuple[PictureHashes, ...] = ()  # of the trainings' films, by table

    def of(self, rows: Array) -> dict[str, Any]:
        """The "trained_on" of results: numbers of these rows alone.

        *_by_picture alone are films and patients that nothing else has found. Of these rows only
        are pictures compared: each costs as many comparisons as the training had films.
        """
        told: dict[str, Any] = {"manifests": list(self.manifests), "unknown": self.unknown}
        if not self.manifests:
            return told
        alike, is_cut = self._alike(rows)
        if is_cut and self.unknown is None:
            told["unknown"] = "more pairs of pictures look alike than are compared"
        patient, keys = self.patient[rows], self.patient_key[rows]
        alone = np.setdiff1d(keys[self.by_id[rows]], keys[patient])
        return {
            **told,
            "compared": list(self.compared),
            "films": int(self.film[rows].sum()),
            "films_of_patients": int(patient.sum()),
            "patients": len(np.unique(keys[patient])),
            "patients_by_id_alone": len(alone),
            "films_by_picture": int(alike[rows].sum()),
            "patients_by_picture": len(np.setdiff1d(self.patient_key[alike], keys[patient])),
        }

    def _alike(self, rows: Array) -> tuple[Array, bool]:
        """The films of these rows that are known by their picture alone, and whether so many look
        alike that some were not compared."""
        asked = np.zeros(len(self.film), dtype=bool)
        asked[rows] = True
        asked &= ~self.film
        alike, is_cut = np.zeros_like(asked), False
        if self.pictures is not None:
            for trained in self.trained_pictures:
                pairs = same_pictures(self.pictures.of(asked & ~alike), trained)
                alike[pairs.own] = True
                is_cut |= pairs.cut
        return alike, is_cut


def find_seen(config: Config, manifest: Manifest, trainings: Iterable[Training]) -> Seen:
    """What the trainings, and those of evaluate.trained_on, have seen of the manifest's rows.

    manifest  that of config.data
    Raises:   ManifestError for a table of evaluate.trained_on that cannot be read
    """
    tables, unknown = _tables(config, manifest, list(trainings))
    films = np.zeros((3, len(manifest)), dtype=bool)
    compared: set[str] = set()
    own = _scored(manifest, config.data.columns) if tables else None
    if own is None and tables:
        tables, unknown = {}, "the table that is scored has changed since it was read"
    if own is not None:
        for table in tables.values():
            films |= np.stack(_met(own, table))
            compared |= _comparable(own, table)
    film, patient, by_id = films
    # a film that the training has seen is one of its patient, whatever the ids say
    patient |= np.isin(manifest.patient_key, manifest.patient_key[film])
    trained = (t.pictures.of(t.split == _TRAIN) for t in tables.values() if t.pictures is not None)
    return Seen(
        *(manifest.patient_key, film, patient, by_id, tuple(sorted(tables))),
        compared=tuple(sorted(compared)),
        unknown=unknown,
        pictures=own.pictures if own is not None else None,
        trained_pictures=tuple(trained),
    )


def _tables(
    config: Config, manifest: Manifest, trainings: Sequence[Training]
) -> tuple[dict[str, FilmKeys], str | None]:
    """(tables of films of the trainings by their SHA-256, why some are not among them)"""
    tables: dict[str, FilmKeys] = {}
    # an export does not say where its training's manifest lies, which may be the scored one
    paths = {manifest.fingerprint: Path(manifest.path)}
    for name in config.evaluate.trained_on:
        try:
            columns = usual_columns(Path(name), config.data.columns)
            keys = read_film_keys(name, columns, splits_by_hash=False)
        except ManifestError as error:  # beside data.manifest's, which it may be taken for
            raise ManifestError(f"evaluate.trained_on: {error}") from None
        tables[keys.fingerprint], paths[keys.fingerprint] = keys, Path(name)
    unknown = None
    for training in trainings:
        if training.manifest is None:  # no hash was kept: what the user names is all there is
            if not tables:
                unknown = unknown or _UNTOLD
            continue
        # one that is named is read as the training read it: its splits may be those of hashes
        found = _still_there(training, paths.get(training.manifest, Path(training.data.manifest)))
        if isinstance(found, str):
            unknown = found
        else:
            tables[found.fingerprint] = found
    if any(t.goes_on for t in trainings) and tables.keys() <= {t.manifest for t in trainings}:
        unknown = unknown or f"its image tower began with trained weights ({_SETTING})"
    return tables, unknown


def _scored(manifest: Manifest, columns: Columns) -> FilmKeys | None:
    """The scored table, None where another lies in its place by now."""
    path = Path(manifest.path)
    try:
        # no splits: the scored rows are chosen already
        usual = dataclasses.replace(usual_columns(path, columns), split=None)
        keys = read_film_keys(path, usual, splits_by_hash=False)
    except ManifestError:
        return None
    return keys if keys.fingerprint == manifest.fingerprint else None


def _still_there(training: Training, path: Path) -> FilmKeys | str:
    """The training's own manifest, or why it cannot be asked."""
    told = f"the manifest that it was trained on (SHA-256 {str(training.manifest)[:12]})"
    if not path.is_file():
        return f"{told} is not at hand ({_SETTING})"
    try:
        # usual names for what the training did not ask for, but no other splits than its own
        columns = usual_columns(path, training.data.columns)
        columns = dataclasses.replace(columns, split=training.data.columns.split)
        keys = read_film_keys(path, columns, splits_by_hash=True)
    except ManifestError:  # by now another file, of other columns
        keys = None
    if keys is None or keys.fingerprint != training.manifest:
        return f"{told} has changed since ({_SETTING})"
    return keys


def _met(own: FilmKeys, other: FilmKeys) -> tuple[Array, Array, Array]:
    """(film, patient, by_id) of Seen for one table of a training."""
    is_train = other.split == _TRAIN
    film = np.zeros(len(own), dtype=bool)
    for mine, theirs in _pairs(own, other):
        film |= _is_in(mine, theirs.filter(pa.array(is_train)))
    train_patients = other.patient.filter(pa.array(is_train))
    same_id = _is_in(own.patient, train_patients)
    if own.fingerprint == other.fingerprint:
        # its train is its films whatever names them, and of one file in two splits the other too
        return film | is_train, same_id, np.zeros_like(is_train)
    at = _places(own, other)
    is_there = at >= 0
    patient = np.zeros(len(own), dtype=bool)
    of_train = _is_in(other.patient, train_patients)
    patient[is_there] = of_train[at[is_there]]
    if _number_alike(own, other, at):
        patient |= same_id
    return film, patient, same_id


def _number_alike(own: FilmKeys, other: FilmKeys, at: Array) -> bool:
    """Whether films of both tables have patients of the same ids, which are then the same."""
    there = np.flatnonzero(at >= 0)
    if len(there) == 0:
        return False
    mine, theirs = own.patient.take(pa.array(there)), other.patient.take(pa.array(at[there]))
    same = pc.fill_null(pc.equal(mine, theirs), False)
    return bool(2 * pc.sum(same).as_py() > len(there))


def _pairs(own: FilmKeys, other: FilmKeys) -> Sequence[tuple[pa.ChunkedArray, pa.ChunkedArray]]:
    """What names a film in both: a source of one may be the very file of the other."""
    files = [(m, t) for m in (own.stored, own.source) for t in (other.stored, other.source)]
    return [(own.film, other.film), *files]


def _places(own: FilmKeys, other: FilmKeys) -> Array:
    """A row of the other table that is the same film, -1 where there is none."""
    at = np.full(len(own), -1, dtype=np.int64)
    for mine, theirs in _pairs(own, other):
        found = pc.index_in(mine, value_set=theirs.combine_chunks(), skip_nulls=True)
        place = pc.fill_null(found, -1).to_numpy()
        at = np.where(at < 0, place, at)
    return at


def _is_in(mine: pa.ChunkedArray, theirs: pa.ChunkedArray) -> Array:
    return pc.is_in(mine, value_set=theirs.combine_chunks(), skip_nulls=True).to_numpy()


def _comparable(own: FilmKeys, other: FilmKeys) -> set[str]:
    def both(mine: pa.ChunkedArray, theirs: pa.ChunkedArray) -> bool:
        return mine.null_count < len(mine) and theirs.null_count < len(theirs)

    told = {"patient ids"}
    if both(own.film, other.film):
        told.add("image ids")
    if any(both(*pair) for pair in _pairs(own, other)[1:]):
        told.add("image files")
    if all(side.pictures is not None and len(side.pictures) for side in (own, other)):
        told.add("pictures")
    return told
