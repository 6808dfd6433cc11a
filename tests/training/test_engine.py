"""Which engine a run gets, and what is refused, without starting any rank."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from mlip.ranks import distributed
from mlip.settings.config import ConfigError
from mlip.training import deepspeed_engine, engine
from mlip.training.engine import build_engine
from mlip.training.plain_engine import PlainEngine
from tests.training.toy_run import ToyObjective, make_batch, toy_config


class _Deepspeed:
    """Stands where DeepSpeedEngine would be built."""

    def __init__(self, objective, config, settings) -> None:
        self.settings = settings


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Sets whether DeepSpeed is installed and whether a launcher started this process."""

    def choose(
        is_installed: bool, *, launched: bool, ranks: int = 1, version: str = "0.19.8"
    ) -> None:
        found = importlib.util.find_spec("json") if is_installed else None
        monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: found)
        monkeypatch.setattr(engine, "DeepSpeedEngine", _Deepspeed)
        monkeypatch.setattr(deepspeed_engine.metadata, "version", lambda name: version)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        if launched:
            monkeypatch.setenv("RANK", "0")
        else:
            monkeypatch.delenv("RANK", raising=False)

    return choose


def _build(*overrides: str, user_json=None):
    config = toy_config(*overrides)
    return build_engine(ToyObjective(config), config, user_json)


def test_plain_python_trains_without_deepspeed(installed):
    installed(False, launched=False)
    assert type(_build()) is PlainEngine


def test_the_norm_of_a_step_is_that_of_the_gradient_of_its_loss(installed):
    # engines are held against one another, and AdamW does not see a factor: here autograd is asked
    installed(False, launched=False)
    torch.manual_seed(5)
    objective = ToyObjective(config := toy_config())
    total, _ = objective(make_batch(0, 8), step=0, progress=0.0)
    learnt = [p for p in objective.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, learnt, allow_unused=True)
    squares = [g.double().square().sum() for g in gradients if g is not None]
    torch.manual_seed(5)
    engine = build_engine(ToyObjective(config), config, None)
    result = engine.start_step(make_batch(0, 8), step=0, progress=0.0, lr=0.0).result()
    assert result.total == pytest.approx(float(total.detach()), rel=1e-6)
    assert result.grad_norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)


def test_a_launcher_gets_deepspeed_and_plain_python_does_not(installed):
    installed(True, launched=True, ranks=2)
    assert type(_build("train.zero_stage=2")) is _Deepspeed
    assert type(_build("train.engine=plain")) is PlainEngine
    installed(True, launched=False)
    assert type(_build()) is PlainEngine
    assert type(_build("train.engine=deepspeed")) is _Deepspeed
    assert type(_build(user_json={"zero_optimization": {"stage": 1}})) is _Deepspeed


def test_the_plain_engine_refuses_a_deepspeed_json(installed):
    installed(True, launched=False)
    with pytest.raises(ConfigError, match="--deepspeed_config with train.engine=plain"):
        _build("train.engine=plain", user_json={"zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [(["train.engine=deepspeed"], 1), (["train.offload=true"], 1), (["train.zero_stage=2"], 2)],
)
def test_what_needs_deepspeed_says_so_where_it_is_not_installed(installed, overrides, ranks):
    installed(False, launched=True, ranks=ranks)
    with pytest.raises(ConfigError, match="not installed: pip install 'deepspeed>=0.19.8,<0.2"):
        _build(*overrides)


@pytest.mark.parametrize("version", ["0.18.9", "0.19.7", "0.20.0", "1.0", "0.9.5+cpu"])
def test_another_deepspeed_is_refused_by_the_versions_found_and_needed(installed, version):
    installed(True, launched=True, version=version)
    needed = f"DeepSpeed {re.escape(version)} is installed, .* need DeepSpeed >=0.19.8,<0.20"
    with pytest.raises(ConfigError, match=needed):
        _build("train.zero_stage=2")
    assert type(_build("train.engine=plain")) is PlainEngine


def test_the_deepspeed_that_is_needed_is_the_one_that_is_installed():
    (least, below) = (".".join(map(str, v)) for v in deepspeed_engine.DEEPSPEED_VERSIONS)
    setup = (Path(__file__).resolve().parents[2] / "setup.py").read_text()
    assert set(re.findall(r"deepspeed[<>=][^\"]*", setup)) == {f"deepspeed>={least},<{below}"}


def test_stage_3_refuses_passes_that_a_rank_has_no_row_for(installed):
    # ranks of 2, 3 and 3 pairs: in passes of one row, the first would be a pass short and hang
    installed(True, launched=True, ranks=3)
    cached = ["batch.micro_images=1", "model.vision.norm=group"]
    with pytest.raises(ConfigError, match="global_pairs=8 on 3 ranks .* set batch.micro_images=2"):
        _build("train.zero_stage=3", *cached)
    assert type(_build("train.zero_stage=2", *cached)) is _Deepspeed
    assert type(_build("train.zero_stage=3", *cached, "batch.micro_images=2")) is _Deepspeed


@pytest.mark.parametrize(("tower", "size"), [("vision", "images"), ("text", "texts")])
def test_stage_3_refuses_a_recomputation_inside_another(installed, tower, size):
    # it would end in the first backward pass with a parameter of no elements
    installed(True, launched=True, ranks=2)
    inside = [f"model.{tower}.checkpointing=true", "model.vision.norm=group"]
    both = [*inside, f"batch.micro_{size}=2"]
    with pytest.raises(ConfigError, match=f"set model.{tower}.checkpointing=false and a smaller"):
        _build("train.zero_stage=3", *both)
    assert type(_build("train.zero_stage=3", *inside)) is _Deepspeed
    assert type(_build("train.zero_stage=2", *both)) is _Deepspeed


def test_several_gpus_refuse_a_batch_that_they_cannot_share_evenly(installed, monkeypatch):
    # NCCL would gather 2, 3 and 3 rows as if they were equally many: a hang, or others' rows
    installed(True, launched=True, ranks=3)
    assert type(_build("train.engine=plain")) is PlainEngine  # gloo pads
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    for name in ("plain", "deepspeed"):
        with pytest.raises(ConfigError, match="global_pairs=8 on 3 GPUs.*multiple of 3, such as 9"):
            _build(f"train.engine={name}")
    assert type(_build("train.engine=deepspeed", "batch.global_pairs=9")) is _Deepspeed


def test_deepspeed_is_imported_inside_functions_only():
    # oracle: the syntax tree; an import at the top would make every command need DeepSpeed
    tree = ast.parse(Path(engine.__file__).read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [a.name for node in top if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] == "deepspeed"]
