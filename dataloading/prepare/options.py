"""What the options of `mlip prepare` mean, and which of them cannot be honoured."""

from __future__ import annotations

import argparse
import errno
import os
import tempfile
from pathlib import Path
from typing import Literal

from mlip.dataloading.datasets.rows import Dataset
from mlip.dataloading.prepare.id_map import require_own_map
from mlip.dataloading.prepare.shard_worker import ImageSettings
from mlip.settings.config import ConfigError

# options that look at something and prepare nothing
_LOOKS = ("list", "explain", "check_phi")


def require_alone(arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raises:  ConfigError for an option beside one that prepares nothing; beside --list the name
    of a data set may stand."""
    given = [name for name, value in vars(arguments).items() if value != getattr(defaults, name)]
    look = next((name for name in _LOOKS if name in given), None)
    if look is None:
        return
    beside = [name for name in given if name != look and (look, name) != ("list", "dataset")]
    if beside:
        option, other = (f"--{name.replace('_', '-')}" for name in (look, beside[0]))
        named = f"the data set {arguments.dataset}" if beside[0] == "dataset" else other
        raise ConfigError(f"{option} prepares nothing and does not read {named}: leave it out")


def dataset_options(dataset: Dataset, given: list[str]) -> dict[str, str]:
    """The data set's options by name, with what --option NAME=VALUE says in place of defaults.

    Raises:  ConfigError for an unknown name, an empty value, or two values of one name
    """
    options = {name: default for name, (default, _) in dataset.options.items()}
    said: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or name not in options:
            raise ConfigError(
                f"--option {text}: expected NAME=VALUE with a name out of "
                f"{', '.join(options) or 'none: this data set has no options'}"
            )
        if not value:
            # a variable of the shell that is not set: reports=$RIS would prepare without reports
            raise ConfigError(
                f"--option {text}: expected a value: leave it out where none is meant"
            )
        if said.setdefault(name, value) != value:
            raise ConfigError(
                f"--option {name}: given as {said[name]} and as {value}: expected one of them"
            )
    return options | said


def leave_out_demographics(dataset: Dataset, options: dict[str, str]) -> None:
    """Raises ConfigError where an option says where sex and age are, which nobody would see."""
    for name in dataset.demographics:
        if options[name] not in ("", "none"):
            raise ConfigError(
                f"--option {name}={options[name]}: tells where sex or age are, which "
                "--no-demographics leaves out: leave out one of the two"
            )
        options[name] = "none"


def image_settings(arguments: argparse.Namespace) -> ImageSettings:
    codec: Literal["jpeg", "png"] = arguments.codec or ("jpeg" if arguments.bits == 8 else "png")
    if codec == "jpeg" and arguments.bits == 16:
        raise ConfigError("--codec jpeg holds 8 bits: choose --codec png or --bits 8")
    if not 32 <= arguments.side <= 4096:
        raise ConfigError(f"--side {arguments.side}: expected 32 to 4096")
    if codec == "png" and arguments.quality is not None:
        raise ConfigError(
            f"--quality {arguments.quality} is of JPEG, and PNG loses nothing: leave it out, or "
            "choose --codec jpeg (8 bits)"
        )
    quality = 95 if arguments.quality is None else arguments.quality
    if not 1 <= quality <= 100:
        raise ConfigError(f"--quality {quality}: expected 1 to 100")
    white = arguments.png_white
    if white != "own" and not (white.isascii() and white.isdigit() and 255 <= int(white) <= 65535):
        raise ConfigError(f"--png-white {white}: expected 255 to 65535, or own")
    if not 1 <= arguments.shard_images <= 1_000_000 or arguments.workers < 0:
        raise ConfigError("--shard-images: expected 1 to 1000000; --workers: 0 or more")
    if not 0.0 < arguments.timeout < float("inf"):
        raise ConfigError(f"--timeout {arguments.timeout}: expected seconds above 0")
    return ImageSettings(
        side_px=arguments.side,
        bits=arguments.bits,
        codec=codec,
        quality=quality if codec == "jpeg" else 0,
        require_deid=arguments.require_deid,
        png_white="own" if white == "own" else int(white),
        demographics=not arguments.no_demographics,
    )


def part_of(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--part {text}: expected I/N with I from 1 to N, for example 3/16")
    return int(number) - 1, int(count)


def check_places(
    arguments: argparse.Namespace, root: Path, out: Path, options: dict[str, str]
) -> None:
    """Raises ConfigError where a file of the user's could be replaced, or ids lie open."""
    if out == root or root in out.parents and arguments.dataset == "folder":
        raise ConfigError(f"--out {arguments.out}: lies inside --root; choose another folder")
    # an option may as well hold a column's name, which is no file
    given = {name: Path(os.path.realpath(v)) for name, v in options.items() if os.path.exists(v)}
    for name, path in given.items():
        if out in (path, *path.parents):
            raise ConfigError(
                f"--option {name}={options[name]}: lies in --out, whose files are replaced: keep "
                "it elsewhere, or choose another --out"
            )
    if arguments.id_map is None:
        return
    id_map = Path(os.path.realpath(arguments.id_map))
    if out in id_map.parents:
        raise ConfigError("--id-map: keep the secret table outside --out, which others may read")
    if root in id_map.parents or id_map in given.values():
        raise ConfigError(
            f"--id-map {arguments.id_map}: would be written over what is read: choose a file "
            "outside --root that no option names"
        )
    try:
        if id_map.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=id_map.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--id-map {arguments.id_map}: cannot be written: {error.strerror}"
        ) from None
    require_own_map(id_map)
