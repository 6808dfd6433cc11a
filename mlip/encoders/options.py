"""Settings of a tower handed through to transformers, checked before they reach it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError  # what transformers' configs raise
from transformers import PretrainedConfig

_Tower = TypeVar("_Tower")
_REFUSALS = (TypeError, ValueError, StrictDataclassError)


def tower_config(
    kind: type[PretrainedConfig], key: str, options: Mapping[str, Any], **given: Any
) -> Any:
    """The config of a tower from random weights: `given`, then the user's `options`.

    transformers keeps a misspelt option as a new attribute and goes on: hiden_size would train
    another model than the one asked for.
    Raises:  ValueError for an option that the tower does not have, that another setting decides, or
             whose value transformers refuses
    """
    known = _known(kind)
    for name in options:
        if name in DECIDED:
            raise ValueError(f"{key}: {name} follows from {DECIDED[name]}; leave it out")
        if name not in known:
            raise ValueError(
                f"{key}: {kind.__name__} has no option {name!r}; the nearest is "
                f"{_nearest(name, known)!r}"
            )
    try:
        made = kind(**given, **options)
    except _REFUSALS as error:
        raise ValueError(f"{key}: {kind.__name__} refuses these values: {error}") from error
    require_able(made, key)
    return made


def require_able(config: Any, key: str) -> None:
    """What transformers takes and then fails of at the first pass, or does something else.

    Raises:  ValueError naming `key` and the option
    """
    for name in _SIZES:
        value = getattr(config, name, 1)
        if any(number < 1 for number in (value if isinstance(value, list | tuple) else (value,))):
            raise ValueError(f"{key}: {name}={value}: expected 1 or more")
    width, heads = getattr(config, "hidden_size", 1), getattr(config, "num_attention_heads", 1)
    if width % heads:  # transformers' ViT takes it, and its heads together are narrower
        raise ValueError(f"{key}: hidden_size={width}: expected a multiple of {heads} heads")
    epsilon = getattr(config, "layer_norm_eps", 0.0)
    if not 0 <= epsilon < math.inf:  # NaN, which JSON of Python's takes, is neither
        raise ValueError(f"{key}: layer_norm_eps={epsilon}: expected 0 or more, and finite")
    if getattr(config, "is_decoder", False):
        raise ValueError(
            f"{key}: is_decoder=true: its words see those before them alone, and here all of a "
            "report; expected a model that reads both ways"
        )


def build_tower(make: Callable[[], _Tower], key: str) -> _Tower:
    """What `make` builds from a config: some values transformers refuses only then.

    Raises:  ValueError naming `key`
    """
    try:
        return make()
    except (*_REFUSALS, ArithmeticError, AssertionError, LookupError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{key}: no tower can be built with these values: {said}") from error


def tower_shape(tower: Any) -> dict[str, Any]:
    """The options that give a tower of the same shape; of a config of transformers.

    Published folders say more: names of the classes that a head told apart, entries of heads and of
    other versions. No tower has those, and tower_config takes none.
    """
    known = _known(type(tower)) - set(DECIDED)
    return {key: value for key, value in tower.to_diff_dict().items() if key in known}


def _known(kind: type[PretrainedConfig]) -> set[str]:
    """Names of the options that a tower of this kind has."""
    return set(kind().to_dict()) - _OF_ANY_MODEL


# numbers of a tower's parts and widths; a ResNet builds a layer for a depth of 0 or -1
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "type_vocab_size", "embedding_size", "hidden_sizes", "depths"),
)
# what belongs to saved files and output heads of transformers, not to a tower
_OF_ANY_MODEL = set(PretrainedConfig().to_dict())
# options that other settings decide, and which
DECIDED = {"num_channels": "data.channels", "vocab_size": "the tokenizer (data.vocab_size)"}


def _nearest(name: str, known: Collection[str]) -> str:
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
