"""A model with given weights: nothing in it is drawn, and nothing is left as it lay in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlip.model import MLIPModel
from mlip.saved.weights import model_with, without_draws
from mlip.settings.config import Config, load
from tests.small_run import SETTINGS

WORDS, CONCEPTS = 40, 5
VIT = (
    "model.vision.kind=vit",
    "model.vision.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 24, patch_size: 16, initializer_range: %.2f}",
)
KINDS: dict[str, tuple[str, ...]] = {
    "resnet": ("model.vision.stem=deep", "model.heads.norm=batch"),
    "groups": ("model.vision.norm=group", "model.vision.pool=tower"),
    "vit": (VIT[0], VIT[1] % 0.02, "train.residual=bf16", "train.precision=bf16"),
    "wide": (VIT[0], VIT[1] % 9.0),  # torch draws again what lies outside of -2 to 2
}


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN, and the largest integer."""
    was = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)
    settings.fill_uninitialized_memory = filled


def settings(kind: str) -> Config:
    of_resnet = ("model.vision.patch_stage", "model.vision.pool", "model.vision.options")
    shared = [s for s in SETTINGS if VIT[0] not in KINDS[kind] or not s.startswith(of_resnet)]
    return load([], [*shared, *KINDS[kind]])


def trained(config: Config) -> MLIPModel:
    """Drawn as training draws it, then every kept tensor moved away from its start."""
    torch.manual_seed(3)
    model = MLIPModel(config, vocab_size=WORDS, concept_vectors=torch.randn(CONCEPTS, 16)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand(tensor.shape).add(0.5).to(tensor.dtype))
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those that are not saved too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_the_files_and_every_buffer_too_or_its_constructors(
    kind: str, _poisoned: None
) -> None:
    config = settings(kind)
    oracle = trained(config)
    saved = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    opened = model_with(config, WORDS, saved, "here")
    wanted, found = tensors(oracle), tensors(opened)
    assert wanted.keys() == found.keys()
    # buffers that no file holds are among them
    assert {"state_weights", "text.backbone.embeddings.position_ids"} <= wanted.keys() - saved
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].stride() == tensor.stride(), name
        assert found[name].requires_grad == tensor.requires_grad, name
    image = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        one, other = oracle.encode_image(image), opened.encode_image(image)
    assert torch.equal(one.embedding, other.embedding) and torch.equal(one.patches, other.patches)
    assert one.embedding.isfinite().all()


class Drawn(TorchDispatchMode):
    """Counts the numbers that are drawn into a tensor's place."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_no_weight_is_drawn_to_be_overwritten(kind: str) -> None:
    """Of ViT-B and BERT-base that took as long as the rest of opening them."""
    config = settings(kind)
    with Drawn() as training:
        saved = trained(config).state_dict()
    with Drawn() as opening:
        model_with(config, WORDS, saved, "here")
    assert training.count > sum(t.numel() for n, t in saved.items() if n.endswith("weight")) / 2
    assert opening.count == 0


def test_what_another_thread_makes_meanwhile_is_drawn(_poisoned: None) -> None:
    made: list[nn.Module] = []
    with without_draws():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(4, 4)))
        thread.start()
        thread.join()
        own = nn.Linear(4, 4)
    assert own.weight.isnan().all()
    assert made[0].weight.abs().max() <= 0.5 and made[0].weight.std() > 0  # 1 / sqrt(4)
