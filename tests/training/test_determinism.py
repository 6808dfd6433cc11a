"""The level of repeatability that a configuration reaches, and what run.deterministic refuses."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn

from mlip.ranks import distributed
from mlip.settings.config import ConfigError, load
from mlip.training.determinism import levels, random_part, require_deterministic
from tests.training.exact_step import exact_config, make_objective
from tests.training.test_exact import DROPOUT
from tests.training.test_loop import _own_faults, _run  # noqa: F401


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch):
    """As if every rank had a GPU; torch's own switch is put back."""

    def choose(ranks: int, kind: str = "cuda") -> None:
        monkeypatch.setattr(distributed, "device", lambda: torch.device(kind))
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)

    yield choose
    torch.use_deterministic_algorithms(False)


def test_a_cpu_run_repeats_its_bits_and_says_so(tmp_path):
    assert levels(load([]), nn.Identity()) == "D2+D3"
    _run(tmp_path, dropout=0.3)
    assert json.loads((tmp_path / "meta.json").read_text())["determinism"] == "D2"
    _run(tmp_path / "quiet", dropout=0.0)
    meta = json.loads((tmp_path / "quiet" / "meta.json").read_text())
    assert meta["determinism"] == "D2+D3"


def test_the_same_run_twice_is_the_same_to_the_bit(tmp_path):
    for name in ("a", "b"):
        _run(tmp_path / name)
    first, second = (
        [
            json.loads(line)["total"]
            for line in (tmp_path / n / "log.jsonl").read_text().splitlines()
        ]
        for n in ("a", "b")
    )
    assert first == second and len(first) == 12


def test_dropout_takes_the_third_level():
    quiet, dropping = (make_objective(exact_config(*more)) for more in ((), DROPOUT))
    assert random_part(quiet.model) is None and levels(load([]), quiet) == "D2+D3"
    assert levels(load([]), dropping) == "D2"


def test_a_gpu_is_seeded_only_until_determinism_is_asked_for(on_gpus):
    on_gpus(1)
    assert levels(load([]), nn.Identity()) == "D0+D3"
    config = load([], ["run.deterministic=true"])
    require_deterministic(config)
    assert levels(config, nn.Identity()) == "D2+D3"


@pytest.mark.parametrize(
    ("ranks", "kind", "override", "named"),
    [
        (2, "cuda", "run.seed=1", "NCCL_ALGO=Ring"),
        (1, "cuda", "model.attention=xformers", "model.attention=xformers"),
        (1, "cuda", "model={attention: varlen, text: {packed: true}}", "model.attention=varlen"),
        (1, "cuda", "model.vision={kind: vit, options: {image_size: 384}}", "leave image_size out"),
        (1, "cpu", "train.compile=true", "set train.compile=false"),
        (1, "mps", "run.seed=1", "nothing is known of device mps"),
    ],
)
def test_what_cannot_be_vouched_for_is_refused(on_gpus, monkeypatch, ranks, kind, override, named):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    on_gpus(ranks, kind)
    with pytest.raises(ConfigError, match="run.deterministic=true cannot be vouched") as caught:
        require_deterministic(load([], ["run.deterministic=true", override]))
    assert named in str(caught.value)
    require_deterministic(load([], [override]))  # not asked for: nothing is refused


def test_an_algorithm_that_is_set_lifts_the_refusal(on_gpus, monkeypatch):
    on_gpus(2)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    require_deterministic(load([], ["run.deterministic=true"]))
