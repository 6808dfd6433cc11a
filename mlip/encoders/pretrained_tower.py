"""A tower from a folder or hub id of transformers' format, which has to be that kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from mlip.encoders.options import build_tower, require_able

# counters of batch statistics, which files of older versions leave out
_COUNTER = "num_batches_tracked"
# model types whose files serve a tower of another type as they are
_ALIKE = {"vit": ("vit_mae",)}


def load_tower(
    kind: type[PreTrainedModel], key: str, source: str, *, offline: bool, **given: Any
) -> Any:
    """`kind` with the weights of `source`, in float32; `given` goes to its from_pretrained.

    transformers gives a weight that it does not find random numbers and goes on: a folder of
    another model would be trained from random weights under its name.
    Raises:  ValueError naming `key`: no such folder or id, another kind of model, a config.json
             that no tower can be built with, weights that are no safetensors, not all there or of
             other sizes
    """
    _check_source(kind, key, source, offline)

    def read() -> Any:
        return kind.from_pretrained(
            source,
            local_files_only=offline,
            use_safetensors=True,
            dtype=torch.float32,  # of a file in half precision it would take that one's
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **given,
        )

    try:
        tower, found = build_tower(read, f"{key}={source}")
        require_able(tower.config, f"{key}={source}")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{key}={source}: cannot be read: {error}") from error
    if others := sorted(found["mismatched_keys"]):
        name, held, wanted = others[0]
        raise ValueError(
            f"{key}={source}: {len(others)} weights have other sizes than its config.json says, "
            f"{name} among them ({list(held)}, not {list(wanted)}); expected both of one model"
        )
    missing = sorted(name for name in found["missing_keys"] if not name.endswith(_COUNTER))
    if missing:
        raise ValueError(
            f"{key}={source}: its files lack {len(missing)} weights of a {kind.__name__}, "
            f"{missing[0]} among them; expected a whole model of this kind"
        )
    return tower


def _check_source(kind: type[PreTrainedModel], key: str, source: str, offline: bool) -> None:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{key}={source}: the directory holds no config.json")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{key}={source}: the directory holds no model.safetensors, and other files of "
                "weights are not read, since they can run code; one that you trust becomes "
                'safetensors by: python -c "from transformers import AutoModel; '
                f"AutoModel.from_pretrained('{source}').save_pretrained('{source}')\""
            )
    check_kind(kind, key, source, offline=offline)


def check_kind(kind: type[PreTrainedModel], key: str, source: str, *, offline: bool) -> None:
    """Raises:  ValueError where config.json of a source is not there, or of another kind."""
    wanted = str(kind.config_class.model_type)  # type: ignore[union-attr]
    try:
        described = PretrainedConfig.get_config_dict(source, local_files_only=offline)[0]
        found = described.get("model_type", wanted)  # early folders do not say
    except (OSError, ValueError, AttributeError, TypeError) as error:  # two: a list or a number
        if Path(source).is_dir() or not offline:
            raise ValueError(f"{key}={source}: cannot be read: {error}") from error
        raise ValueError(
            f"{key}={source}: neither a local directory nor in the local model cache; give a "
            "directory, or set run.offline=false to let it be downloaded"
        ) from error
    if found not in (wanted, *_ALIKE.get(wanted, ())):
        raise ValueError(
            f"{key}={source}: holds a model of type {found}, expected one of type {wanted}"
        )
