"""What every setting is: its name, type, range, default and words, read from where it is defined.

The words are the comment above or behind a dataclass field, those of a section its docstring. No
other list of them is kept: `mlip settings` and docs/settings.md say what the source says. How they
are laid out is in text.py.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import sys
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from mlip.settings.bounds import BOUNDS
from mlip.settings.config import Config
from mlip.settings.given import shown
from mlip.settings.typed_tree import ConfigError, all_keys, nearest_keys

_ONE = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}
_NEAREST = 3  # names that a misspelt one is answered with


@dataclass(frozen=True)
class Setting:
    """One setting.

    name     dotted, as one types it
    kind     its type or choices, and the range of a number
    default  as one writes it in YAML
    words    what it does
    """

    name: str
    kind: str
    default: str
    words: str


@dataclass(frozen=True)
class Section:
    """Settings that stand together in a file; `words` says what they are of."""

    name: str
    words: str
    settings: tuple[Setting, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Every section with settings of its own, in the order of the files; `Config` has none."""
    return tuple(section for section in _below(Config, "") if section.settings)


def find(words: Sequence[str]) -> list[Setting]:
    """The settings of these exact names or sections; else those with every word in their name or
    their words, whatever the case, those first that have all in their name.

    Raises:  ConfigError where there is none, with the nearest names
    """
    every = [setting for section in sections() for setting in section.settings]
    if all(word in all_keys(Config) for word in words):
        return [s for s in every if not words or any(_is_of(s.name, word) for word in words)]
    asked = [word.lower() for word in words]
    found = [s for s in every if all(_is_in(s, word) for word in asked)]
    if found:
        return sorted(found, key=lambda s: not all(word in s.name for word in asked))
    for word in words:
        if not any(_is_in(s, word.lower()) for s in every):
            nearest = ", ".join(nearest_keys(word, Config)[:_NEAREST])
            raise ConfigError(
                f"no setting has {word!r} in its name or description; the nearest names: {nearest}"
            )
    raise ConfigError(f"no setting has all of these words: {', '.join(words)}; say fewer")


def _is_in(setting: Setting, word: str) -> bool:
    """learning_rate, as others call it, is "learning rate" in the words."""
    return word in setting.name or word.replace("_", " ") in setting.words.lower()


def _is_of(name: str, key: str) -> bool:
    return f"{name}.".startswith(f"{key}.")


def _below(cls: Any, path: str) -> Iterator[Section]:
    """The section at a path ("" or "data."), then those inside it."""
    words, defaults = words_of(cls), cls()
    settings, inner = [], {}
    for name, hint in typing.get_type_hints(cls).items():
        full = f"{path}{name}"
        if dataclasses.is_dataclass(hint):
            inner[full] = hint
            continue
        default = value_text(getattr(defaults, name))
        settings.append(Setting(full, _kind(hint, full), default, words.get(name, "")))
    yield Section(path.rstrip("."), words.get("", ""), tuple(settings))
    for full, hint in inner.items():
        yield from _below(hint, f"{full}.")


def value_text(value: Any) -> str:
    """A value as one writes it in YAML; "" for an empty text, which would not be seen."""
    return shown(value) or '""'


def _kind(hint: Any, name: str) -> str:
    allowed = BOUNDS.get(name)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        count = "" if Ellipsis in arguments else f"{len(arguments)} "
        many = f"list of {count}{_MANY[arguments[0]]}"
        return many if allowed is None else f"{many}, each {allowed}"
    one = _one(hint)
    return one if allowed is None else f"{one}, {allowed}"


def _one(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join([*(_one(a) for a in arguments if a is not types.NoneType), "null"])
    if origin is Literal:
        return f"{', '.join(map(str, arguments[:-1]))} or {arguments[-1]}"
    return "mapping" if origin is dict else _ONE[hint]


def words_of(cls: type) -> dict[str, str]:
    """Field -> its comment on one line; "" -> the first paragraph of the class's docstring."""
    return _words_of_module(cls.__module__).get(cls.__name__, {})


@cache
def _words_of_module(module: str) -> dict[str, dict[str, str]]:
    try:
        source = inspect.getsource(sys.modules[module])
    except OSError:
        raise ConfigError(
            f"what settings do stands in the source of {module}, which this installation lacks: "
            "expected its .py files, not .pyc alone; docs/settings.md says the same"
        ) from None
    comments = {
        token.start[0]: (token.string.lstrip("#").strip(), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        docstring = (ast.get_docstring(node) or "").split("\n\n")[0]
        found[node.name] = {"": " ".join(docstring.split())}
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                found[node.name][part.target.id] = _of_lines(comments, part)
    return found


def _of_lines(comments: dict[int, tuple[str, bool]], part: ast.AnnAssign) -> str:
    """The comments that stand alone right above a field, then those behind it.

    comments  line -> (text, whether it stands alone)
    """
    first = part.lineno
    while comments.get(first - 1, ("", False))[1]:
        first -= 1
    last = part.end_lineno or part.lineno
    return " ".join(comments[line][0] for line in range(first, last + 1) if line in comments)
