"""A file of settings, a run's folder for it, or one override: what it holds, or why it cannot be.

Knows no setting but two: run.dir, which is where a run's own file lies, and one that is gone.
"""

from __future__ import annotations

import json
import logging
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mlip.settings.strict_yaml import read_yaml
from mlip.settings.typed_tree import ConfigError, all_keys, check_keys, require_utf8

logger = logging.getLogger("mlip")
OF_A_RUN, OF_AN_EXPORT = "config.yaml", "config.json"
CHECKPOINTS = "checkpoints"  # in a run's folder: what training/checkpoint.py saves
# what begins a YAML string that is more than its letters
_MARKED = "'\"|>&!"
_PRINTED_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"


def read_file(file: Path, settings: Any, *, takes_exports: bool = False) -> dict[str, Any]:
    """The checked settings of a YAML file; of a run's own config.yaml with run.dir where it lies.

    A run may have been renamed or copied, or be named from elsewhere, and another one may lie at
    the run.dir that it was trained in.

    settings       the dataclass of all sections
    takes_exports  whether the folder of an `mlip export` stands for the settings in it
    Raises:        ConfigError naming the file, and the key or what was expected.
    """
    is_folder = os.path.isdir(file)  # Path.is_dir raises for a name that is too long
    if takes_exports and is_folder and (file / OF_AN_EXPORT).is_file():
        return _of_an_export(file / OF_AN_EXPORT, settings)
    path = file / OF_A_RUN if is_folder else file
    where = f"config file {file}"
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: {_not_there(str(file), is_folder, settings)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from error
    if not isinstance(content, dict | types.NoneType):
        raise ConfigError(
            f"{where}: expected a mapping of sections, got a {type(content).__name__}"
        )
    tree = dict(without_view(content or {}))
    check_keys(tree, settings, where=where)
    folder = path.parent
    if path.name == OF_A_RUN and (folder / CHECKPOINTS).is_dir():
        if not tree:  # of a copy that was cut: every setting would be the default
            raise ConfigError(
                f"{path}: is empty: expected the settings of the run; copy the run again, or take "
                f"the settings from meta.json beside it ('config')"
            )
        run = tree.get("run", {})
        named = run.get("dir")
        if named is None or Path(str(named)).resolve() != folder.resolve():
            logger.warning("run.dir=%s, where %s lies; it names %s", folder, path, named)
            tree["run"] = {**run, "dir": str(folder)}
    return tree


def read_override(override: str, settings: Any) -> dict[str, Any]:
    """The tree of one ``a.b=value``, its keys checked.

    settings  the dataclass of all sections
    Raises:   ConfigError naming the override, and the key or what was expected.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: expected key=value, for example run.seed=2")
    require_utf8(key, text)
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: the value is not valid YAML: {error}") from error
    if isinstance(value, str) and text.lstrip()[0] not in _MARKED:
        value = text.strip()  # YAML ends "run #2" at its blank and folds a line's end
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    check_keys(nested, settings, where="override")
    return dict(nested)


def _of_an_export(path: Path, settings: Any) -> dict[str, Any]:
    """The settings in an export's config.json: what it was trained with, without places."""
    where = f"config file {path}"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from error
    tree = described.get("config") if isinstance(described, dict) else None
    if not isinstance(tree, dict) or described.get("model_type") != "mlip":
        raise ConfigError(
            f"{where}: is not of an `mlip export`; expected a YAML file, or an export"
        )
    tree = dict(without_view(tree))
    check_keys(tree, settings, where=where)
    # studies that were generated for it are none of what is trained on now
    tree["data"] = {k: v for k, v in (tree.get("data") or {}).items() if k != "phantom"}
    return tree


def without_view(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings without data.columns.view, which configs of earlier versions name and none read."""
    data: Any = tree.get("data")
    columns = data.get("columns") if isinstance(data, Mapping) else None
    if not isinstance(columns, Mapping) or "view" not in columns:
        return tree
    kept = {name: column for name, column in columns.items() if name != "view"}
    return {**tree, "data": {**data, "columns": kept}}


def _not_there(name: str, is_folder: bool, settings: Any) -> str:
    if is_folder:
        return (
            f"is a folder without {OF_A_RUN}; expected a YAML file or the folder of a run; an "
            f"export or a checkpoint is named as checkpoint={name}"
        )
    if name in all_keys(settings):
        return f"is a setting; expected {name}=value, without spaces"
    if name.startswith(tuple(_PRINTED_DASHES)) or name[1:2] in tuple(_PRINTED_DASHES):
        return "begins with a dash of a printed page; expected the two of a keyboard (--)"
    return "there is no such file; expected a YAML file, the folder of a run, or key=value"
