"""Nested dictionaries <-> frozen dataclasses, by their type hints; every error names its key.

Knows no setting: the classes are in config.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

MOST_INT = 2**63 - 1  # of torch's generators, and of what counts steps


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""


def require(holds: bool, message: str) -> None:
    """Raises:  ConfigError with the message where it does not hold"""
    if not holds:
        raise ConfigError(message)


def require_utf8(name: str, text: str) -> None:
    """Raises ConfigError where the name of a file or folder holds bytes that are not UTF-8.

    Python carries them along; JSON, Arrow and safetensors do not, and would fail in mid-work.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        known = sys.getfilesystemencoding()
        remedy = "rename that file or folder, or choose another one"
        if known != "utf-8":  # of the locale: the name may well be UTF-8
            remedy = f"this Python takes names for {known}: set PYTHONUTF8=1"
        raise ConfigError(
            f"{name}: expected a name in UTF-8, got {text!a}, where each \\udc.. is a byte of "
            f"another encoding; {remedy}"
        ) from None


def plain(value: Any) -> Any:
    """Dictionaries, lists and scalars only: what YAML and JSON can hold."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{path}{key}."))
        else:
            flat[f"{path}{key}"] = value
    return flat


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    """Field -> its type; Python compiles each hint anew at every call, most of a config's time."""
    return typing.get_type_hints(cls)


def merge(into: dict[str, Any], new: Mapping[str, Any], cls: Any) -> None:
    """Put `new` over `into`, both trees of `cls`, section by section; a scalar or list is replaced
    whole, entries of a setting that is a mapping one by one, and all of them by an empty one.

    Keys become text: YAML reads that of {1: ...} as a number, which a.1=... lies over all the same.
    """
    hints = _hints(cls) if isinstance(cls, type) and dataclasses.is_dataclass(cls) else {}
    for name, value in new.items():
        key = str(name)
        kind = hints.get(key)
        if isinstance(value, Mapping) and (value or dataclasses.is_dataclass(kind)):
            there = into.get(key)
            into[key] = there if isinstance(there, dict) else {}
            merge(into[key], value, kind)
        else:
            # a copy, for what is laid over it must not get into what was read
            into[key] = dict(value) if isinstance(value, Mapping) else value


def all_keys(cls: Any, path: str = "") -> list[str]:
    """Every dotted key of a dataclass and the dataclasses inside it."""
    keys = []
    for name, kind in _hints(cls).items():
        keys.append(f"{path}{name}")
        if dataclasses.is_dataclass(kind):
            keys += all_keys(kind, f"{path}{name}.")
    return keys


def check_keys(
    tree: Mapping[str, Any], cls: Any, *, where: str, path: str = "", root: Any = None
) -> None:
    """Raise ConfigError for a key that `cls` lacks, naming the nearest one of `root`."""
    root = cls if root is None else root
    hints = _hints(cls)
    for key, value in tree.items():
        full = f"{path}{key}"
        if key not in hints:
            raise ConfigError(
                f"{where}: unknown key {full!r}; the nearest valid key is "
                f"{_nearest(str(key), path, hints, all_keys(root))[0]!r}"
            )
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{where}: {full} is a section, expected a mapping, got {value!r}"
                )
            check_keys(value, hints[key], where=where, path=f"{full}.", root=root)


def nearest_keys(name: str, cls: Any) -> list[str]:
    """Dotted keys of `cls` that were probably meant by one that it lacks, likeliest first."""
    path, hints, parts = "", _hints(cls), name.split(".")
    for index, part in enumerate(parts):
        kind = hints.get(part)
        if not hints:
            return [path.rstrip(".")]
        if kind is None:
            nearest = _nearest(part, path, hints, all_keys(cls))
            ended = [".".join([key, *parts[index + 1 :]]) for key in nearest]
            known = [key for key in ended if key in all_keys(cls)]
            return known or nearest
        path = f"{path}{part}."
        hints = _hints(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else {}
    return [name]


def _nearest(leaf: str, path: str, siblings: Iterable[str], known: list[str]) -> list[str]:
    """Dotted keys by how probably they were meant: of the same name elsewhere, or the likest here.

    path, siblings  of the section in which the leaf was looked for
    """
    last = {full: full.rsplit(".", 1)[-1] for full in known}
    same = [full for full in known if last[full] == leaf]
    here = [f"{path}{name}" for name in siblings] if path else known
    likest = sorted(here, key=lambda full: -_likeness(leaf, full.rsplit(".", 1)[-1]))
    return same or likest


def _likeness(given: str, name: str) -> float:
    """0 to 1; the beginning of a name is as good as the whole of it."""
    return max(
        difflib.SequenceMatcher(None, given, text).ratio() for text in (name, name[: len(given)])
    )


def build(cls: Any, tree: Mapping[str, Any], path: str) -> Any:
    """An instance of `cls` from a checked tree; absent keys keep their defaults."""
    hints = _hints(cls)
    values = {key: _coerce(value, hints[key], f"{path}{key}") for key, value in tree.items()}
    return cls(**values)


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as the hinted type, or a ConfigError that names `key`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, f"{key}.")
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in arguments):
            raise ConfigError(
                f"{key}: expected one of {', '.join(map(str, arguments))}, got {value!r}"
            )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _coerce(value, next(a for a in arguments if a is not types.NoneType), key)
    if origin is tuple and arguments[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}: expected a list, got {value!r}")
        return tuple(_coerce(v, arguments[0], key) for v in value)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise ConfigError(f"{key}: expected a list of {len(arguments)} values, got {value!r}")
        return tuple(_coerce(v, a, key) for v, a in zip(value, arguments, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected a mapping, got {value!r}")
        return dict(value)
    return _scalar(value, kind, key)


def _scalar(value: Any, kind: type, key: str) -> Any:
    """`value` as a number, a text or a bool, or a ConfigError that names `key`."""
    if kind in (int, float) and isinstance(value, int) and abs(value) > MOST_INT:
        raise ConfigError(f"{key}: expected a number of up to 2^63 - 1, got {str(value):.20}...")
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text: the number is what every user means
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is str and isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)  # a shell leaves run.dir=~/runs as it is
    if type(value) is not kind:
        raise ConfigError(f"{key}: expected {kind.__name__}, got {value!r}")
    return value
