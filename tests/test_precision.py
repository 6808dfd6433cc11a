"""bfloat16 where the device multiplies it, whatever device this is."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from mlip import precision
from mlip.precision import multiplies_bf16, precision_on, takes_bf16, why_not_as_asked
from mlip.settings.config import Config, load
from tests.small_run import small_run

CPU = torch.device("cpu")


def can(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: answer)


@pytest.mark.parametrize(
    ("asked", "has_products", "is_training", "expected"),
    [
        ("fp32", True, True, False),
        ("fp32", True, False, False),
        ("auto", True, True, True),
        ("auto", True, False, True),
        ("auto", False, True, False),
        ("auto", False, False, False),
        ("bf16", True, True, True),
        ("bf16", True, False, True),
        ("bf16", False, True, True),  # a setting is honoured
        ("bf16", False, False, False),  # where only a trained model is used nothing asks for it
    ],
)
def test_which_passes_are_of_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    has_products: bool,
    is_training: bool,
    expected: bool,
) -> None:
    can(monkeypatch, has_products)
    assert takes_bf16(asked, CPU, is_training=is_training) is expected
    told = "bf16" if expected else "fp32"
    assert precision_on(asked, CPU, is_training=is_training) == told


def test_what_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    can(monkeypatch, True)
    assert [why_not_as_asked(asked, CPU) for asked in ("fp32", "auto", "bf16")] == ["", "", ""]
    can(monkeypatch, False)
    assert why_not_as_asked("fp32", CPU) == ""
    told = "train.precision=auto takes fp32: this processor has no products of bfloat16"
    assert why_not_as_asked("auto", CPU) == told
    assert "set train.precision=auto" in why_not_as_asked("bf16", CPU)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_it_from_8_0_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool
) -> None:
    multiplies_bf16.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_bf16(torch.device("cuda", 0)) is has
    multiplies_bf16.cache_clear()
    assert multiplies_bf16(torch.device("meta"))


def test_a_processor_has_it_where_it_has_instructions_for_it() -> None:
    """Oracle: the flags that Linux shows; AVX512 alone has torch widen every number."""
    with open("/proc/cpuinfo") as stream:
        flags = next(line for line in stream if line.startswith("flags")).split()
    assert multiplies_bf16(CPU) is bool({"avx512_bf16", "amx_bf16"} & set(flags))


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "library", "expected"),
    [
        ("x86_64", False, False, True, False),  # Skylake to Ice Lake: torch's library says yes
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("AMD64", False, False, True, False),
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_which_processors_have_it(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    avx512_bf16: bool,
    amx: bool,
    library: bool,
    expected: bool,
) -> None:
    multiplies_bf16.cache_clear()
    with monkeypatch.context() as processor:
        processor.setattr("platform.machine", lambda: machine)
        processor.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        processor.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        name = "_is_mkldnn_bf16_supported"
        processor.setattr(torch.ops.mkldnn, name, lambda: library, raising=False)
        assert multiplies_bf16(CPU) is expected
    multiplies_bf16.cache_clear()


def features(config: Config, *, training: bool) -> torch.Tensor:
    model: Any = copy.deepcopy(small_run().model).train(training)
    model.config = dataclasses.replace(model.config, train=config.train)
    image = torch.rand(4, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.encode_image(image).embedding


@pytest.mark.parametrize("has_products", [True, False])
def test_a_model_s_passes_are_those(monkeypatch: pytest.MonkeyPatch, has_products: bool) -> None:
    can(monkeypatch, has_products)
    configs = {asked: load([], [f"train.precision={asked}"]) for asked in ("fp32", "bf16", "auto")}
    used = {asked: features(config, training=False) for asked, config in configs.items()}
    assert torch.equal(used["bf16"], used["auto"])
    assert torch.equal(used["auto"], used["fp32"]) is not has_products
    trained = features(configs["bf16"], training=True)
    plain = features(configs["fp32"], training=True)
    assert not torch.equal(trained, plain)
