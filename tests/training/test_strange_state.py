"""A checkpoint whose hashes hold and whose content no save writes is refused, and named, at once.

Another program wrote it: hashes tell of damage only. Taken, it went wrong steps later or not at
all: half precision was widened, one moment was spread over a whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlip.settings.config import Config
from mlip.training import checkpoint
from mlip.training.lifecycle import CheckpointError
from mlip.training.stop_request import StopRequest
from tests.training.toy_run import make_trainer, toy_config

NAME = "model.image.1.weight"


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Config, Path]:
    """The settings of a run of two steps, and its checkpoint."""
    config = toy_config(
        *(f"run.dir={tmp_path}", "train.max_steps=2", "train.engine=plain", "train.ema_decay=0.9")
    )
    make_trainer(config).fit(StopRequest())
    return config, checkpoint.checkpoints_of(tmp_path)[0]


def _change(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(path)
    tensors[NAME] = change(tensors[NAME]).contiguous()
    save_file(tensors, path)


def _resume(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_damage", lambda folder: None)  # the hashes fit
    make_trainer(config)


@pytest.mark.parametrize("kind", ["parameters", "exp_avg", "exp_avg_sq", "ema"])
@pytest.mark.parametrize(
    "change",
    [Tensor.half, Tensor.double, Tensor.long, lambda t: t / 0.0],
    ids=["half", "double", "long", "infinite"],
)
def test_numbers_that_no_save_writes_are_refused_with_the_file_and_the_name(
    kind: str,
    change: Callable[[Tensor], Tensor],
    trained: tuple[Config, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, folder = trained
    _change(folder / f"{kind}.safetensors", change)
    with pytest.raises(CheckpointError, match=rf"{folder.name}: .*{kind}\.safetensors: {NAME}"):
        _resume(config, monkeypatch)


@pytest.mark.parametrize("kind", ["parameters", "exp_avg", "exp_avg_sq", "ema"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t.reshape(-1)[:1], lambda t: t.sum(), lambda t: t[None], lambda t: t.repeat(2, 1)],
    ids=["one", "scalar", "one dimension more", "twice"],
)
def test_a_tensor_of_another_shape_is_refused_with_the_checkpoint_and_the_name(
    kind: str,
    change: Callable[[Tensor], Tensor],
    trained: tuple[Config, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, folder = trained
    _change(folder / f"{kind}.safetensors", change)
    with pytest.raises(ValueError, match=f"{folder.name}: {NAME}: expected"):
        _resume(config, monkeypatch)


@pytest.mark.parametrize(("name", "kind"), [("queue", torch.half), ("count", torch.float32)])
def test_a_buffer_of_another_type_is_refused_with_the_checkpoint_and_the_name(
    name: str, kind: torch.dtype, trained: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = trained
    tensors = load_file(folder / "buffers.safetensors")
    save_file({**tensors, name: tensors[name].to(kind)}, folder / "buffers.safetensors")
    with pytest.raises(ValueError, match=f"{folder.name}: {name}: expected"):
        _resume(config, monkeypatch)


def test_an_average_that_lacks_a_weight_is_told_as_that(
    trained: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = trained
    tensors = load_file(folder / "ema.safetensors")
    del tensors[NAME]
    save_file(tensors, folder / "ema.safetensors")
    with pytest.raises(ValueError, match=f"{folder.name}: {NAME}: expected .* has none"):
        _resume(config, monkeypatch)


def test_another_models_names_are_told_with_the_checkpoint(
    trained: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = trained
    tensors = load_file(folder / "parameters.safetensors")
    save_file({**tensors, "stranger": torch.zeros(3)}, folder / "parameters.safetensors")
    with pytest.raises(ValueError, match=f"{folder.name}: .*differ: .*stranger"):
        _resume(config, monkeypatch)
