"""The ways in which the benchmark takes the same step are those that their names say.

Oracles: the dispatcher's own answer, what transformers' configs hold, what a module is asked to
compile with. On a CPU a way that changed nothing, or something else, would be as fast as ours.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import step_variants
from benchmarks.step_variants import COMPILES, ENGINES, OURS, VARIANTS, NotAvailable
from mlip.encoders.rounded_weights import RoundedTogether
from mlip.kernels import _dispatch
from mlip.settings.config import load
from tests.benchmarks.step_bench import shared_bench

GPU = torch.device("cuda", 0)
TORCH = {"operators in torch, tiled", "operators in torch, one flat product"}


@pytest.fixture(autouse=True)
def _a_gpu_of_this_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for CUDA asks the driver, which a login node of a cluster has not."""
    monkeypatch.setattr(_dispatch, "_capability", lambda index: (9, 0))


@pytest.mark.parametrize("before", [None, "0"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if "compiled" not in name])
def test_kernels_are_off_in_the_ways_of_torch_alone(
    name: str, before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else our own kernels would be published as what plain torch takes."""
    monkeypatch.delenv(_dispatch.DISABLE_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(_dispatch.DISABLE_VARIABLE, before)
    is_off = f"{_dispatch.DISABLE_VARIABLE} is set"
    with contextlib.suppress(NotAvailable), VARIANTS[name](shared_bench().engine):
        assert (_dispatch._obstacle(GPU) == is_off) == (name in TORCH)
    assert _dispatch._obstacle(GPU) != is_off
    assert step_variants.os.environ.get(_dispatch.DISABLE_VARIABLE) == before


# what each way that is not compiled changes of a ready engine, and nothing beside it
CHANGES = {
    OURS: set(),
    "operators in torch, tiled": {"kernels"},
    "operators in torch, one flat product": {"kernels", "local score"},
    "attention=eager": {"attention"},
    "attention=xformers": {"attention"},
    "attention=varlen": {"attention"},
    "residual=fp32": {"residual", "rounded weights"},
    "reports padded": {"packed reports"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_way_changes_what_its_name_says_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_variants, "require_usable", lambda impl: None)
    monkeypatch.delenv(_dispatch.DISABLE_VARIABLE, raising=False)
    model = shared_bench().engine.objective.model
    towers = [model.text.backbone, model.vision.tower.backbone]

    def facts() -> dict[str, Any]:
        norms = [type(m) for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
        return {
            "kernels": _dispatch._obstacle(GPU),
            "local score": "local_scores" in vars(model),
            "attention": [tower.config._attn_implementation for tower in towers],
            "residual": (norms, [len(tower.embeddings._forward_hooks) for tower in towers]),
            "packed reports": model.text.is_packed,
            "rounded weights": model._image_weights,
        }

    before = facts()
    with VARIANTS[name](shared_bench().engine):
        inside = facts()
    assert {fact for fact in before if inside[fact] != before[fact]} == CHANGES[name]
    named = {name for name in VARIANTS if "compiled" not in name}
    assert named == {*CHANGES, "whole step as one CUDA graph"}


def test_the_flat_product_is_of_narrow_rows_with_wide_similarities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As docs/performance.md says of it, in the towers' type; bf16 similarities are another way."""
    bench, told = shared_bench(), []
    model = bench.engine.objective.model

    def pooled(patches: Any, rows: Any, weight: Any, case: dict[str, Any], wide: bool) -> Any:
        told.append((patches.dtype, rows.dtype, wide, case["alpha"].item()))
        return torch.zeros(len(patches), len(rows))

    monkeypatch.setattr(step_variants, "pooled_scores", pooled)
    dim = bench.config.model.embed_dim
    patches, tokens = (torch.randn(2, n, dim, dtype=torch.bfloat16) for n in (4, 5))
    entities = torch.randn(2, 3, dim)
    knowledge = SimpleNamespace(
        entities=entities, mask=torch.ones(2, 3, dtype=torch.bool), row_weights=torch.ones(2, 3)
    )
    content = torch.ones(2, 5, dtype=torch.bool)
    step_variants.flat_scores(model, patches, tokens, content, None, knowledge)
    alpha = model.scales.attention_scale.item()
    assert told == [(torch.bfloat16, torch.bfloat16, True, alpha)]


@pytest.mark.parametrize("impl", ["eager", "xformers", "varlen"])
def test_attention_of_both_towers_is_that_of_the_way_s_name(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(step_variants, "require_usable", asked.append)
    model = shared_bench().engine.objective.model
    towers = [model.text.backbone, model.vision.tower.backbone]
    with VARIANTS[f"attention={impl}"](shared_bench().engine):
        made = [tower.config._attn_implementation for tower in towers]
    assert made == [f"mlip_{impl}"] * 2 and asked == [impl]


@pytest.mark.parametrize(
    ("why", "status"),
    [
        ("xformers is not installed; install it", "not installed: xformers is not installed"),
        ("no kernel of it runs here; install another", "not available: no kernel of it runs here"),
    ],
)
def test_a_package_that_is_absent_is_told_from_one_that_does_not_run(
    why: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is no news of the code and hides no figure (gpu_rows.has_news), the second is."""

    def refuse(impl: str) -> None:
        raise ValueError(why)

    monkeypatch.setattr(step_variants, "require_usable", refuse)
    with pytest.raises(NotAvailable) as error:
        with VARIANTS["attention=xformers"](shared_bench().engine):
            pytest.fail("measured")
    assert str(error.value) == status


class _Compiler:
    """Writes down what is asked of torch.compile; nothing is compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self.resets = 0
        asked = self.asked

        def compile_(module: torch.nn.Module, **settings: Any) -> None:
            asked.append((module, settings))
            module._compiled_call_impl = module._call_impl

        monkeypatch.setattr(torch.nn.Module, "compile", compile_)
        monkeypatch.setattr(torch._dynamo, "reset", self.reset)

    def reset(self) -> None:
        self.resets += 1


# (layers in place of towers, mode, sizes may change, packed reports)
COMPILED = {
    "towers compiled": (False, None, None, True),
    "layers compiled": (True, None, None, True),
    "reports padded, towers compiled": (False, None, None, False),
    "reports padded, towers compiled, CUDA graphs": (False, "reduce-overhead", False, False),
}


@pytest.mark.parametrize("name", COMPILES)
def test_what_is_compiled_and_how_is_what_the_way_s_name_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = shared_bench().engine
    model, compiler = engine.objective.model, _Compiler(monkeypatch)
    by_layer, mode, dynamic, is_packed = COMPILED[name]
    towers = [model.text.backbone, model.vision.tower.backbone]
    layers = [*towers[0].encoder.layer, *towers[1].layers]
    assert len(layers) == 2 and model.text.is_packed
    counters = torch._dynamo.utils.counters["graph_break"]
    counters["of the way before"] += 7
    on_gpu = SimpleNamespace(device=GPU, objective=engine.objective)
    with VARIANTS[name](on_gpu):
        assert [id(m) for m, _ in compiler.asked] == [
            id(m) for m in (layers if by_layer else model.towers())
        ]
        assert all(settings == {"mode": mode, "dynamic": dynamic} for _, settings in compiler.asked)
        assert model.text.is_packed == is_packed
        # a compiled tower rounds its weights in its own kernels, as with train.compile
        assert not isinstance(model._image_weights, RoundedTogether)
        assert compiler.resets == 1 and step_variants.graph_breaks() == 0
        counters = torch._dynamo.utils.counters["graph_break"]
        counters["one reason"] += 2
        counters["another"] += 1
        assert step_variants.graph_breaks() == 3
    assert all(module._compiled_call_impl is None for module, _ in compiler.asked)
    assert isinstance(model._image_weights, RoundedTogether) and model.text.is_packed
    assert compiler.resets == 2  # the next way begins without these graphs
    counters.clear()


def test_cuda_graphs_are_asked_of_no_cpu() -> None:
    name = "reports padded, towers compiled, CUDA graphs"
    with pytest.raises(NotAvailable, match="^not available: CUDA graphs need a GPU$"):
        with VARIANTS[name](shared_bench().engine):
            pytest.fail("measured")
    assert shared_bench().engine.objective.model.text.is_packed


def test_engines_have_the_stage_of_their_name() -> None:
    base = ["train.precision=bf16"]
    for name, settings in ENGINES.items():
        train = load([], [*base, *settings]).train
        assert (f"DeepSpeed, ZeRO-{train.zero_stage}", "deepspeed") == (name, train.engine)
    assert len(ENGINES) == 2 and tuple(COMPILED) == COMPILES
