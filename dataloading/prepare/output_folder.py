"""The --out of `mlip prepare`: whose it is, what it is to hold, who is at work in it, its salt.

Prepare replaces files of its own names, so a folder with anybody else's is refused. All that can
refuse one is asked before the first header is read: after hours is too late to find out.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip.dataloading.shards import synced_file
from mlip.settings.config import ConfigError
from mlip.system.folder_lock import lock, open_lock, release
from mlip.system.output_file import sync

SETTINGS_FILE = "settings.json"  # in --out from the first moment on; prepared.json comes last
# keys that tell our settings from another program's
_OURS = frozenset({"dataset", "side_px", "shard_images"})
# settings that earlier sets do not state, and what they had
_BEFORE = {"png_white": 65535, "demographics": False}
_SALT = re.compile(rb"[0-9a-f]{32}")
# what a run leaves that is killed before its settings stand there, and what a new disk holds
_BEFORE_SETTINGS = re.compile(r"\.lock(-\d+)?|\.settings\.json\..*\.part|\.salt|lost\+found")


@dataclass(frozen=True)
class OutputFolder:
    """The folder that a prepare is to write."""

    path: Path  # resolved
    given: str  # as the user wrote it
    asked: Mapping[str, Any]  # what SETTINGS_FILE is to say
    part: tuple[int, int] = (0, 1)
    overwrite: bool = False  # a set made with other settings may be remade

    def check(self) -> None:
        """Whether this prepare may have the folder; nothing of it is made or changed but locks.

        Raises:  ConfigError for one that cannot be written to, holds other files or another set,
                 or is in use.
        """
        with self._explained():
            place = next(p for p in (self.path, *self.path.parents) if p.exists())
            if place == self.path:
                self._holds_asked()
                if (self.path / ".lock").exists():
                    with sole_writer(self.path, self.part) as is_ours:
                        self._require(is_ours)
            with tempfile.TemporaryFile(dir=place):
                pass

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, states its settings and keeps other prepares out until the end.

        Raises:  ConfigError as `check`.
        """
        with ExitStack() as stack:
            with self._explained():
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._require(stack.enter_context(sole_writer(self.path, self.part)))
                if not self._holds_asked():
                    write_json(self.asked, self.path / SETTINGS_FILE)
            yield

    def _holds_asked(self) -> bool:
        """Whether the set there is the asked one; False where none is there, or one to remake."""
        path = self.path / SETTINGS_FILE
        if not path.is_file():
            if any(not _BEFORE_SETTINGS.fullmatch(name) for name in os.listdir(self.path)):
                raise self._foreign()
            return False
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise ConfigError(
                f"--out {self.given}: its {SETTINGS_FILE} is damaged, so that nobody can tell what "
                "the set there was made with: name another folder, or remove this one and prepare "
                "it again"
            ) from None
        if not isinstance(found, dict) or not found.keys() >= _OURS:
            raise self._foreign()
        different = [
            f"{name} (there {there!r}, asked {value!r})"
            for name, value in self.asked.items()
            if (there := found.get(name, _BEFORE.get(name))) != value
        ]
        if different and not self.overwrite:
            is_older = self.asked.get("demographics") and not found.get("demographics")
            hint = ", or --no-demographics to go on as it was made, without sex and age"
            raise ConfigError(
                f"--out {self.given}: holds a set made with other settings: "
                f"{', '.join(different)}; choose another folder, or --overwrite to remake it"
                f"{hint if is_older and len(different) == 1 else ''}"
            )
        return not different

    def _foreign(self) -> ConfigError:
        return ConfigError(
            f"--out {self.given}: expected no folder, an empty one or an earlier prepare's; it "
            "holds other files, so nothing was written; name another folder"
        )

    def _require(self, is_ours: bool) -> None:
        if not is_ours:
            raise ConfigError(
                f"--out {self.given}: another `mlip prepare` is at work there: wait for its end, "
                "choose another folder, or give each process its own --part I/N"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"--out {self.given}: cannot be used: {error.strerror}; name another folder"
            ) from None


@contextmanager
def sole_writer(out: Path, part: tuple[int, int]) -> Iterator[bool]:
    """Yields whether the folder is ours: False where another process works on the same part.

    Two whole runs at once would each replace the other's shards, and the manifest of the one that
    ends first would name places in files that are gone; parts of one job work side by side. The
    lock ends with the process, however that ends.

    Raises:  OSError where no file can be made in the folder.
    """
    whole = part[1] == 1
    with ExitStack() as stack:
        wanted = [(".lock", not whole)]
        if not whole:
            wanted.append((f".lock-{part[0] + 1}", False))
        for name, shared in wanted:
            descriptor = open_lock(out / name)
            stack.callback(release, descriptor)
            try:
                lock(descriptor, out, shared=shared)
            except BlockingIOError:
                yield False
                return
        yield True


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """A JSON file that is complete or not there."""
    with synced_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_salt(out: Path) -> str:
    """The secret behind hashed ids, made once and shared by every part of the job.

    Raises:  ConfigError for a salt that is there and not one that this wrote: a file of zeros, as
             a crash leaves, is no secret, and half a salt gives every patient another id.
    """
    path = out / ".salt"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        for _ in range(50):  # the process that made it may not have written it yet
            text = path.read_bytes().strip()  # an editor adds an end of line
            if _SALT.fullmatch(text):
                return text.decode()
            if text:
                break
            time.sleep(0.1)
        raise ConfigError(
            f"{path}: {'is not the salt that was written' if text else 'is empty'}; restore it, or "
            "remove it and start again with other ids"
        ) from None
    with os.fdopen(descriptor, "w") as file:
        salt = secrets.token_hex(16)
        file.write(salt)
        file.flush()
        os.fsync(file.fileno())
    sync(out)  # shards that are hashed with it outlast a crash
    return salt
