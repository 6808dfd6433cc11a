"""Ranks of several nodes that are not alike: refused on all of them, with the rank and its host.

Two real gloo ranks go through it in one start; each leaves what it met.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from mlip.ranks import distributed, process_group
from mlip.settings.config import ConfigError, load
from mlip.training import agreement, randomness
from mlip.training.lifecycle import exit_code, locked_folder
from mlip.training.plain_engine import PlainEngine
from tests import rank_farm
from tests.training.toy_run import ToyObjective, toy_config


def _said(function: Callable[[], object]) -> Any:
    """What it returns, or its exit code and text."""
    try:
        return function()
    except Exception as error:
        return [exit_code(error), str(error)]


def _hold(folder: Path) -> str:
    with locked_folder(folder, timeout_s=1.0):
        distributed.barrier()
        return "held"


def meet(folder: str) -> int:
    """A rank of two, each a node of its own; leaves <folder>/met<r>.json."""
    process_group.start(60.0)
    rank, place = distributed.rank(), Path(folder)
    met: dict[str, Any] = {}

    facts = {"train.lr": 0.1, "run.seed": 1 + rank}
    met["differs"] = _said(lambda: agreement.require_same(facts, "do this"))
    met["same"] = _said(lambda: agreement.require_same({"train.lr": 0.1}, ""))

    (place / "disk1").mkdir(exist_ok=True)
    (place / "disk1" / "lock").write_text("pid 1 on another\n0123456789abcdef\n")
    met["two folders"] = _said(lambda: _hold(place / f"disk{rank}"))
    met["one folder"] = _said(lambda: _hold(place / "shared"))

    made = place / "made"

    def make() -> None:
        time.sleep(0.3)
        made.touch()

    def refuse() -> None:
        raise ConfigError("there is no room")

    process_group.main_first(make)
    met["made"] = made.exists()
    met["failed"] = _said(lambda: process_group.main_first(refuse))

    config = toy_config(f"run.dir={place / 'shared'}", "train.engine=plain")
    torch.manual_seed(rank)
    objective = ToyObjective(config)
    objective.queue += rank + 1.0
    met["own"] = float(objective.queue.sum() + objective.model.text.weight.sum())
    PlainEngine(objective, config)
    met["shared out"] = float(objective.queue.sum() + objective.model.text.weight.sum())

    randomness.usable_cores = lambda: 8
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + 3 * rank)
    met["threads"] = randomness.set_threads(load([], []))

    os.environ.update(LOCAL_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="x")
    distributed.barrier()
    begin = time.monotonic()
    with process_group.rank_0_alone() as is_first:
        if is_first:
            time.sleep(1.0)
    met["alone"] = [is_first, time.monotonic() - begin]
    (place / f"met{rank}.json").write_text(json.dumps(met))
    time.sleep(0.0 if rank else 2.0)  # rank 0 holds the store, as a launcher would
    return 0


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nodes")
    rank_farm.run(meet, 2, str(folder))
    return [json.loads((folder / f"met{rank}.json").read_text()) for rank in (0, 1)]


def test_what_differs_is_named_on_every_rank_with_the_rank_and_its_host(met):
    """Another learning rate on one node was trained with in silence, each rank with its own."""
    for found in met:
        code, text = found["differs"]
        assert code == 2 and text.startswith("rank 1 on ") and text.endswith("; do this")
        assert "run.seed is 2 (rank 0: 1)" in text and "train.lr" not in text
        assert found["same"] is None


def test_a_run_folder_that_is_not_shared_is_refused_before_the_first_step(met):
    """It was found at the first resume, by a checkpoint that "cannot be read"."""
    for found in met:
        code, text = found["two folders"]
        assert code == 2 and "run.dir: rank 1 on " in text and "disk1 what rank 0 on" in text
        assert found["one folder"] == "held"


def test_others_wait_for_rank_0_and_hear_of_its_failure(met):
    """They waited for ever for studies that rank 0 could not generate, or not on their disk."""
    assert [found["made"] for found in met] == [True, True]
    assert met[0]["failed"] == [2, "there is no room"]
    code, text = met[1]["failed"]
    assert code == 6 and text.startswith("rank 0 could not")


def test_buffers_are_those_of_rank_0(met):
    """Vectors of concepts are computed on each node, whose processors need not round alike."""
    assert met[0]["own"] != met[1]["own"]
    assert met[0]["shared out"] == met[1]["shared out"] == met[0]["own"]


def test_uneven_nodes_take_the_threads_of_the_fullest(met):
    """A resume gave rank 0's 8 threads to each of the 4 ranks that share 8 cores elsewhere."""
    assert [found["threads"] for found in met] == [2, 2]


def test_a_node_lives_as_long_as_rank_0_works(met):
    """torchrun of a node that is done ends the c10d store it keeps; rank 0 was killed for it."""
    (first, _), (second, waited) = met[0]["alone"], met[1]["alone"]
    assert first and not second and waited > 0.9


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({"train.lr": 1.0}, "train.lr is "),
        ({"the code of mlip": "0"}, "the code of mlip is "),
        ({"--allow-mismatch": True}, "--allow-mismatch is False"),
        ({"torch": "1.0"}, "torch is "),
        ({}, None),
    ],
)
def test_a_node_is_held_against_settings_code_and_packages(there, named, monkeypatch):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(
        distributed, "gather_objects", lambda told: [("a", {**told[1], **there}), told]
    )
    options = argparse.Namespace(allow_mismatch=False, deepspeed_config=None)
    if named is None:
        train.require_one_command(options, load([], []))
        return
    with pytest.raises(ConfigError, match="rank 1 on .* is not as rank 0 on a: ") as caught:
        train.require_one_command(options, load([], []))
    assert named in str(caught.value)


def test_a_node_may_have_its_data_elsewhere_and_other_processors():
    own = load([], ["data.root=/elsewhere", "run.threads=3", "data.workers=4"])
    assert agreement.settings_of(own) == agreement.settings_of(load([], []))
    assert set(agreement.NODE_SETTINGS) <= agreement.flatten(agreement.to_dict(own)).keys()
