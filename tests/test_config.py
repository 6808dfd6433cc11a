"""Settings: files and overrides become one frozen Config, or an error that says what to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mlip import config
from mlip.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def _write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    file = _write(tmp_path, "run: {seed: 2}\ntrain: {lr: 1e-3, warmup_steps: 5}\n")
    loaded = config.load([file], ["train.warmup_steps=7"])
    assert (loaded.run.seed, loaded.train.lr, loaded.train.warmup_steps) == (2, 1e-3, 7)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("run.sead=1", "run.seed"),
        ("seed=1", "run.seed"),
        ("loss.global.weight=1", "loss.global_contrastive"),
        ("batch.global_pair=8", "batch.global_pairs"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        config.load([], [key])


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=abc",
        "run.seed=1.5",
        "run.exact=1",
        "data.pipeline=fast",
        "train.betas=[0.9]",
        "train.zero_stage=4",
        "batch.global_pairs=1",
        "data.crop_px=999",
        "loss.category.weight=-1",
        "run=3",
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        config.load([], [override])


def test_micro_batches_with_batch_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match="model.vision.norm"):
        config.load([], ["batch.micro_images=8"])


def test_a_config_survives_its_own_dictionary() -> None:
    loaded = config.load([ROOT / "configs" / "demo.yaml"], ["run.seed=5"])
    assert config.from_dict(config.to_dict(loaded)) == loaded


def test_difference_lists_what_changed() -> None:
    left = config.load([], ["run.seed=1"])
    right = config.load([], ["run.seed=2", "train.lr=0.5"])
    assert config.difference(left, right) == {"run.seed": (1, 2), "train.lr": (2e-5, 0.5)}


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load().run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["- a\n- b\n", "run: [1\n", "!!python/object:os.system {}\n"])
def test_a_file_that_is_no_mapping_is_an_error_with_its_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="run.yaml"):
        config.load([_write(tmp_path, text)])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_loads_and_opens_with_its_command(path: Path) -> None:
    base = [ROOT / "configs" / "demo.yaml"] if path.name.startswith("demo_") else []
    config.load([*base, path])
    opening = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    assert any(path.name in line and ("deepspeed" in line or "mlip" in line) for line in opening)
