"""What a frozen encoder made of its images, kept beside finished fits until results are written.

<out>/kept_fits/features-1a2b3c4d5e6f-0.safetensors  images encoded together, their features, and
                                                     what they were made of
A killed evaluation loses the images of half a minute. Features count for the batch that they were
encoded in: the same image in another one can have other last digits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from mlip.system.output_file import refusal
from mlip.transfer.array import Array
from mlip.transfer.fits.sealed_file import UNREADABLE, as_json, read_sealed, write_sealed

PATTERN = "features-*.safetensors"
WRITE_SECONDS = 30.0  # between files: what a kill costs
WRITE_BYTES = 64 << 20  # of a file, or by a batch more: one takes three times that while written

# settings of a task that its images' features depend on; its others are of fits alone
_TRANSFER = ("transfer.image_px",)
_OF_A_FIT = {"seed", "training rows", "encoded together", "truth"}


def depends_on(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a fit is made of (kept_fits.py), that which its features are made of."""
    return as_json(
        {
            key: value
            for key, value in made_of.items()
            if key not in _OF_A_FIT and (not key.startswith("transfer.") or key in _TRANSFER)
        }
    )


class KeptFeatures:
    """Features of one encoder by batch, of this start of the command and of those before it.

    made_of  what `depends_on` gave, with "weights"
    say      told of a file that is damaged, or cannot be written
    """

    def __init__(
        self, folder: Path, made_of: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._folder, self._made_of, self._say = folder, dict(made_of), say
        self._begin = f"features-{self._made_of['weights'][:12]}-"
        self.paths: set[Path] = set()  # of this encoder
        self._of: dict[bytes, Array] = {}  # a batch's rows -> its features, until they are taken
        self._known: set[bytes] = set()  # batches that are on the disk, or will be
        self._new: list[tuple[Array, Array]] = []
        self._new_bytes = 0
        self._written, self._is_lost = time.monotonic(), False
        for path in sorted(folder.glob(f"{self._begin}*.safetensors")):
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            facts, arrays = read_sealed(path)
            if facts["made_of"] != self._made_of:
                return  # its encoder's, of other images or settings
            sizes, rows, features = (arrays[name] for name in ("sizes", "rows", "features"))
            if not sizes.sum() == len(rows) == len(features):
                raise ValueError("other sizes than rows")
            batches = [np.split(each, np.cumsum(sizes)[:-1]) for each in (rows, features)]
        except UNREADABLE:
            self._say(f"{path}: is damaged or cannot be read: its images are encoded anew")
            return
        self.paths.add(path)
        self._of |= {part.tobytes(): found for part, found in zip(*batches, strict=True)}
        self._known |= self._of.keys()

    def take(self, rows: Array) -> Array | None:
        """The features of exactly this batch, once; None where they are not kept.

        Shapes:  rows [B] -> [B, width] float32
        """
        return self._of.pop(rows.astype(np.int64).tobytes(), None)

    def add(self, rows: Array, features: Array) -> None:
        """Keep a batch; now and then all new ones go to the disk.  Shapes:  [B], [B, width]

        One that is kept already is not kept again: where every seed has an encoder of its own, each
        encodes its images at every fraction.
        """
        rows = rows.astype(np.int64)
        if rows.tobytes() not in self._known:
            self._known.add(rows.tobytes())
            self._new.append((rows, features))
            self._new_bytes += features.nbytes
        is_due = time.monotonic() - self._written >= WRITE_SECONDS
        if is_due or self._new_bytes >= WRITE_BYTES:
            self.write()

    def write(self) -> None:
        """Write what is new; where that fails it is told once, and the images go on in memory."""
        new, self._new, self._new_bytes = self._new, [], 0
        if not new or self._is_lost:
            return
        names = (f"{self._begin}{n}.safetensors" for n in itertools.count())
        path = next(p for p in map(self._folder.joinpath, names) if not p.exists())
        arrays = {
            "sizes": np.array([len(rows) for rows, _ in new], np.int64),
            "rows": np.concatenate([rows for rows, _ in new]),
            "features": np.concatenate([features for _, features in new]),
        }
        try:
            self._folder.mkdir(exist_ok=True)
            write_sealed(path, {"made_of": self._made_of}, arrays)
        except (OSError, SafetensorError) as error:
            self._is_lost = True
            told = refusal(error, path) or f"{path} cannot be written: {error}"
            self._say(f"encoded images are not kept, a kill would lose them: {told}")
            return
        self.paths.add(path)
        self._written = time.monotonic()
