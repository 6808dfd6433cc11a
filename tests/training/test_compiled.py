"""train.compile changes how towers are computed, not what: eager towers are the oracle."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import pytest
import torch

from benchmarks.step_batch import made_batch
from benchmarks.step_sizes import OVERRIDES, VOCABULARY
from mlip.batch import Batch
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError, load
from mlip.training.engine import build_engine, compile_towers
from mlip.training.step import Engine

CONCEPTS = 20
FLOAT32 = ("train.precision=fp32", "train.residual=fp32")
VIT = (*OVERRIDES["cpu"], *FLOAT32, "model.text.packed=false")
PACKED = (*VIT, "model.text.packed=true")
RESNET = (
    *(s for s in VIT if not s.startswith("model.vision")),
    "data.crop_px=32",
    "model.vision={kind: resnet, norm: group, patch_stage: 1, options: {embedding_size: 8, "
    "hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}}",
)
DROPOUT_0 = ("model.text.options.hidden_dropout_prob=0", "model.divergence.dropout=0",
             "model.text.options.attention_probs_dropout_prob=0")  # fmt: skip


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Any:
    torch._dynamo.utils.counters.clear()
    limit = sys.getrecursionlimit()
    yield
    torch._dynamo.reset()
    sys.setrecursionlimit(limit)  # the compiler doubles it: other tests nest up to it


def _engine(settings: tuple[str, ...]) -> tuple[Engine, Config]:
    config = load([], settings)
    torch.manual_seed(0)
    vectors = torch.randn(CONCEPTS, config.knowledge.dim)
    model = MLIPModel(config, vocab_size=VOCABULARY["cpu"], concept_vectors=vectors)
    return build_engine(Objective(config, model), config), config


def _batch(config: Config, pairs: int, seed: int = 0) -> Batch:
    return made_batch(config, pairs, vocab_size=VOCABULARY["cpu"], concepts=CONCEPTS, seed=seed)


def _losses(engine: Engine, batches: list[Batch]) -> list[float]:
    torch.manual_seed(5)
    steps = enumerate(batches)
    return [engine.start_step(b, step=s, progress=2.0, lr=1e-3).result().total for s, b in steps]


@pytest.mark.long
@pytest.mark.parametrize(
    ("tower", "micro"), [(VIT, 0), (PACKED, 0), (RESNET, 3)], ids=["vit", "packed", "resnet"]
)
def test_steps_are_those_of_eager_towers_whatever_the_batch_and_the_width(
    tower: tuple[str, ...], micro: int
) -> None:
    cache = (f"batch.micro_images={micro}", f"batch.micro_texts={micro}")
    settings = (*tower, *DROPOUT_0, *cache)
    (eager, config), (made, _) = _engine(settings), _engine((*settings, "train.compile=true"))
    assert list(made.objective.state_dict()) == list(eager.objective.state_dict())
    batches = [_batch(config, 6), _batch(config, 6, seed=1), _batch(config, 5, seed=2)]
    narrow = batches[1]
    for name in ("token_ids", "token_mask", "content_mask"):
        object.__setattr__(narrow, name, getattr(narrow, name)[:, :-2])
    assert _losses(made, batches) == pytest.approx(_losses(eager, batches), rel=2e-5)
    # three sizes, and the second pass of the cache: far from the limit at which torch gives up
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    for name, parameter in eager.parameters.items():
        torch.testing.assert_close(made.parameters[name], parameter, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.long
def test_dropout_in_compiled_towers_repeats_to_the_bit() -> None:
    settings = (*VIT, "train.compile=true", "batch.micro_images=3", "batch.micro_texts=3")
    runs = []
    for _ in range(2):
        engine, config = _engine(settings)
        runs.append(_losses(engine, [_batch(config, 6), _batch(config, 6, seed=1)]))
        torch._dynamo.reset()
    assert runs[0] == runs[1]


def test_nothing_is_compiled_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: seen.append(self))
    _engine(VIT)
    assert seen == []
    engine, _ = _engine((*VIT, "train.compile=true"))
    assert seen == engine.objective.model.towers()


def test_what_cannot_be_honoured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="train.compile with train.zero_stage=3"):
        load([], ["train.compile=true", "train.zero_stage=3"])
    eager, config = _engine(RESNET)
    config = load([], [*RESNET, "train.compile=true", "model.vision.norm=batch"])
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    with pytest.raises(ConfigError, match="on several ranks with model.vision.norm=batch"):
        compile_towers(eager.objective, config)
    monkeypatch.setattr(distributed, "is_distributed", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="none of g\\+\\+.*is on PATH; install one"):
        compile_towers(eager.objective, config)
