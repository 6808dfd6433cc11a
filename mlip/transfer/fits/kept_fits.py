"""Finished fits of `mlip evaluate`, kept beside its results to come: the same command goes on.

<out>/kept_fits/10.0-1.safetensors  the fit of 10 % of the patients and seed 1: what scores need of
                                    it (logits, counts, boxes of val and test rows), how it went,
                                    what it was made of, and a hash of all that
A fit is taken only where everything it was made of is the same now. The files go when results and
page are written. No report, identifier or weight is in them. What a frozen encoder made of the
images lies beside them (kept_features.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mlip.precision import precision_on
from mlip.settings.config import Config, to_dict
from mlip.settings.transfer import at_fraction
from mlip.settings.typed_tree import flatten
from mlip.system.output_file import only_writer, refusal
from mlip.system.packages import version_of
from mlip.transfer.array import Array
from mlip.transfer.fingerprint import hash_of_source, versions
from mlip.transfer.fits.fitting import Record
from mlip.transfer.fits.kept_features import PATTERN as OF_FEATURES
from mlip.transfer.fits.kept_features import KeptFeatures, depends_on
from mlip.transfer.fits.sealed_file import UNREADABLE, as_json, read_sealed, write_sealed

FOLDER = "kept_fits"
_LOCK = ".evaluate.lock"
_MOST_NAMED = 6  # differences that a line names
# settings that change no fit, or by rounding alone; what checkpoint and data hold is hashed itself
FREE_SETTINGS = (
    "run.",
    "evaluate.",
    "knowledge.",
    "loss.",
    "batch.",
    "train.",  # but for RESIDUAL
    "data.manifest",
    "data.root",
    "data.workers",
    "data.prefetch",
    "data.phantom.",
    "transfer.fractions",
    "transfer.seeds",
    "transfer.by_fraction",  # laid over the others of its fraction
    "transfer.cache_gib",
    "transfer.compat_score_cut",
)
RESIDUAL = "train.residual"  # what a tower that is made here adds up in
OF_PICTURES = "evaluate.examples"  # how many predicted masks a fit keeps for the page
# beside those of results: they make fits too, pycocotools by transfer.monitor=score
_LIBRARIES = ("opencv-python-headless", "scipy", "pycocotools")


@dataclass(frozen=True)
class Fit:
    """What all that follows needs of a finished fit.

    prediction  what the task's `predict` gave: arrays by name
    """

    record: Record
    prediction: dict[str, Array]
    seconds: float


def settings_of(config: Config, percent: float) -> dict[str, Any]:
    """The settings that a fit of this fraction depends on, by dotted key."""
    own = dataclasses.replace(config, transfer=at_fraction(config.transfer, percent))
    settings = flatten(to_dict(own))
    depends = {k: v for k, v in settings.items() if not k.startswith(FREE_SETTINGS)}
    depends[RESIDUAL] = settings[RESIDUAL]
    # their order too, which is that of the logits: dictionaries are equal in any
    depends["transfer.classes"] = list(own.transfer.classes)
    if own.transfer.task == "segmentation":
        depends[OF_PICTURES] = settings[OF_PICTURES]
    return depends


def made_by(config: Config, device: torch.device) -> dict[str, Any]:
    """What a fit depends on beside settings, weights and data: code, versions, kind of device.

    Which processor or GPU and how many threads are not in it: they round otherwise, no more.
    """
    return {
        "code": hash_of_source(),
        "versions": versions(),
        "libraries": {name: version_of(name) for name in _LIBRARIES},
        "device": device.type,
        "precision": precision_on(config.transfer.precision, device),
    }


class KeptFits:
    """The finished fits in a folder, of this start of the command and of those before it.

    say  told of each fit that cannot be taken, with the reason, or cannot be kept
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._own: set[Path] = set()
        self._features: dict[str, KeptFeatures] = {}  # by what they are made of

    def __len__(self) -> int:
        """Fits of this command that are there by now."""
        return len(self._own)

    def _path(self, percent: float, seed: int) -> Path:
        return self.folder / f"{float(percent)!r}-{seed}.safetensors"

    def read(self, percent: float, seed: int, made_of: Mapping[str, Any]) -> Fit | None:
        """The fit, where it is there, whole, and made of exactly this."""
        path = self._path(percent, seed)
        try:
            facts, arrays = read_sealed(path)
            found = facts["made_of"]
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in facts["record"].items()
            }
            fit = Fit(Record(**values), arrays, float(facts["seconds"]))
        except FileNotFoundError:
            return None
        except UNREADABLE:
            self._say(f"{path}: is damaged or cannot be read: the fit is made anew")
            return None
        wanted = as_json(made_of)
        keys = sorted(found.keys() | wanted.keys())
        different = [key for key in keys if found.get(key) != wanted.get(key)]
        if different:
            named = ", ".join(different[:_MOST_NAMED])
            more = f" and {len(different) - _MOST_NAMED} more" * (len(different) > _MOST_NAMED)
            self._say(f"{path}: is of other {named}{more}: the fit is made anew")
            return None
        self._own.add(path)
        return fit

    def keep(self, percent: float, seed: int, made_of: Mapping[str, Any], fit: Fit) -> None:
        """Write the fit, whole or not at all, and to the disk: hours need not be made again.

        One that cannot be written is told and goes on in memory alone.
        """
        path = self._path(percent, seed)
        facts = {
            "made_of": made_of,
            "record": dataclasses.asdict(fit.record),
            "seconds": fit.seconds,
        }
        self.write_features()
        try:
            self.folder.mkdir(exist_ok=True)
            write_sealed(path, facts, fit.prediction)
        except (OSError, SafetensorError) as error:
            told = refusal(error, path) or f"{path} cannot be written: {error}"
            self._say(f"this fit is not kept, a kill would lose it: {told}")
            return
        self._own.add(path)

    def features(self, made_of: Mapping[str, Any]) -> KeptFeatures:
        """Features of the images that the fits of this frozen encoder are made of."""
        depends = depends_on(made_of)
        name = json.dumps(depends, sort_keys=True)
        if name not in self._features:
            self._features[name] = KeptFeatures(self.folder, depends, self._say)
        return self._features[name]

    def write_features(self) -> bool:
        """Write all features that are not on the disk yet; whether any are there then."""
        for features in self._features.values():
            features.write()
        return any(features.paths for features in self._features.values())

    def remove(self) -> None:
        """The results are written: this command's fits and all features go; fits of others stay
        and are told."""
        half_written = self.folder.glob(".*.safetensors.*")  # of a kill
        for path in [*self._own, *half_written, *self.folder.glob(OF_FEATURES)]:
            path.unlink(missing_ok=True)
        self._own.clear()
        others = len(list(self.folder.glob("[!.]*.safetensors")))
        if others:
            self._say(
                f"{self.folder}: {others} fits of fractions or seeds that were not asked for now "
                "stay there; delete the folder unless they will be"
            )
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # where it is there, and nothing else in it


@contextlib.contextmanager
def kept_fits(out: Path, say: Callable[[str], None]) -> Iterator[KeptFits]:
    """The fits kept in the folder of an evaluation's results, for one process at a time.

    However the block ends but by its end, stderr says that the same command goes on.
    Raises:  ConfigError where another process evaluates into `out`; OSError
    """
    new = [place for place in (out, *out.parents) if not place.exists()]
    out.mkdir(parents=True, exist_ok=True)
    kept = KeptFits(out / FOLDER, say)
    try:
        with only_writer(out / _LOCK, out):
            yield kept
    except BaseException:
        has_features = kept.write_features()
        if len(kept) or has_features:
            images = ", and encoded images" * has_features
            print(
                f"finished fits kept in {kept.folder}: {len(kept)}{images}; the same command goes "
                "on with the others",
                file=sys.stderr,
            )
        with contextlib.suppress(OSError):
            for place in new:
                place.rmdir()  # where nothing came into it
        raise
