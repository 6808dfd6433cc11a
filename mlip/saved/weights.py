"""A model of given settings with given weights, name for name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mlip.model import MLIPModel
from mlip.settings.config import Config

# what torch.nn.init and transformers fill weights with: most of the time that a model takes
_DRAWS = frozenset({"uniform_", "normal_", "kaiming_uniform_"})


class PretrainedError(ValueError):
    """A folder that cannot be used as a model; the message names file and reason."""

    exit_code = 4


def model_with(
    config: Config, vocab_size: int, weights: Mapping[str, Tensor], where: str
) -> MLIPModel:
    """A model of these settings with these weights, in eval mode.

    Raises:  PretrainedError naming weights that are missing, unexpected or of another shape.
    """
    if "concept_vectors" not in weights:
        raise PretrainedError(f"{where}: holds no concept_vectors; it is no MLIP model")
    with without_draws():  # whatever would be drawn is filled below, or an error
        model = MLIPModel(
            config,
            vocab_size=vocab_size,
            concept_vectors=torch.zeros_like(weights["concept_vectors"]),
        )
    own = model.state_dict()
    weights = _under_all_names(model, weights, where)
    different = sorted(own.keys() ^ weights.keys())
    if different:
        raise PretrainedError(
            f"{where}: weights and settings disagree about {len(different)} names, for example "
            f"{', '.join(different[:3])}"
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise PretrainedError(
                f"{where}: {name} has shape {tuple(weights[name].shape)}, the settings ask for "
                f"{tuple(tensor.shape)}"
            )
    model.load_state_dict(weights)
    return model.eval()


class without_draws(TorchFunctionMode):
    """Weights made inside are not drawn: what torch.nn.init would fill stays as it lies in memory.

    Buffers that no file holds have what their constructors give them, as after the meta device they
    would not. Of this thread alone, as patching torch.nn.init (transformers' no_init_weights) would
    not be.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DRAWS:
            if not args:
                return given["tensor"]  # torch.nn.init names it
            # a tensor's own: torch draws a truncated normal again until it is within its bounds
            with torch.no_grad():
                return args[0].zero_()
        return func(*args, **given)


def _under_all_names(
    model: MLIPModel, weights: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """A tensor that the model holds under several names is written once: here under each.

    Raises:  PretrainedError where the names of one tensor come with different values.
    """
    whole = dict(weights)
    first: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder = first.setdefault(parameter, name)
        if holder not in weights or name == holder:
            continue
        if not torch.equal(whole.setdefault(name, weights[holder]), weights[holder]):
            raise PretrainedError(
                f"{where}: {holder} and {name} are one tensor in this model and differ in the file"
            )
    return whole


def embedding_rows(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Words that the text tower of weights of these names and shapes knows, None without one."""
    found = [shape for n, shape in shapes.items() if n.endswith("word_embeddings.weight")]
    return int(found[0][0]) if found else None
