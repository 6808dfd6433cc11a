"""Encoders as feature extractors, the decoders and heads on them; oracles: shapes, statistics."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from mlip.encoders.vision import VisionEncoder
from mlip.settings.config import load
from mlip.settings.transfer import Transfer
from mlip.transfer.fits.decoders import UNetDecoder, UpsamplingDecoder, make_decoder
from mlip.transfer.fits.encoder import Encoder, open_start
from mlip.transfer.fits.fitting import TransferError, fit
from mlip.transfer.fits.yolo import YoloHead, decode, make_targets, yolo_loss

RESNET = "{embedding_size: 8, hidden_sizes: [8, 16, 24, 32], depths: [1, 1, 1, 1], "
RESNET += "layer_type: basic}"
VIT = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16, "
VIT += "patch_size: 16}"
TOWERS = {
    "resnet": ("kind=resnet", f"options={RESNET}", "patch_stage=2"),
    "shallow": (
        "kind=resnet",
        "options={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
        "patch_stage=1",
        "patch_pool=2",
        "position_grid=true",
        "pool=attention",
        "pool_heads=2",
    ),
    "deep stem": ("kind=resnet", f"options={RESNET}", "patch_stage=2", "stem=deep"),
    "vit": ("kind=vit", f"options={VIT}"),
}


def _vision(tower: str) -> VisionEncoder:
    config = load([], [f"model.vision.{s}" for s in TOWERS[tower]])
    torch.manual_seed(0)
    return VisionEncoder(config.model.vision, channels=1, image_px=64)


def _encoder(tower: str, *, is_frozen: bool = True) -> Encoder:
    return Encoder(_vision(tower), is_frozen=is_frozen, side=64, channels=1)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_carries_a_decoder_and_a_detection_head(tower: str) -> None:
    encoder = _encoder(tower)
    image = torch.randn(2, 1, 64, 64)
    maps = encoder.levels(image)
    assert encoder.level_channels == tuple(found.shape[1] for found in maps)
    decoder = make_decoder(encoder, 64, 4)
    assert isinstance(decoder, UpsamplingDecoder if tower == "vit" else UNetDecoder)
    assert decoder(maps).shape == (2, 1, 64, 64)
    head = YoloHead(encoder, 64, 2, 8)
    outputs = head(maps)
    grids = [o.shape[2] for o in outputs]
    assert len(outputs) == 3 and grids[0] > grids[1] > grids[2]
    assert all(o.shape[:2] == (2, 3) and o.shape[4] == 7 for o in outputs)
    assert encoder.pooled(image).shape == (2, encoder.width)


def test_a_side_that_the_patches_of_a_vit_do_not_tile_is_refused() -> None:
    """Its last rows and columns were not seen, without a word."""
    with pytest.raises(ValueError, match="transfer.image_px=72: expected a multiple .* 16"):
        Encoder(_vision("vit"), is_frozen=True, side=72, channels=1)
    larger = Encoder(_vision("vit"), is_frozen=True, side=96, channels=1)
    assert larger.levels(torch.zeros(1, 1, 96, 96))[0].shape == (1, 16, 6, 6)
    assert larger.pooled(torch.zeros(1, 1, 96, 96)).shape == (1, 16)


@pytest.mark.parametrize("tower", ["resnet", "vit"])
def test_a_frozen_encoder_stays_in_eval_mode_and_its_statistics_do_not_drift(tower: str) -> None:
    encoder = _encoder(tower)
    before = copy.deepcopy(encoder.vision.state_dict())
    encoder.train()
    maps = encoder.levels(torch.randn(4, 1, 64, 64) * 5 + 3)
    assert not any(m.requires_grad for m in maps) and not encoder.vision.training
    for name, tensor in encoder.vision.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_tuned_encoder_learns_and_its_statistics_move() -> None:
    tuned = _encoder("resnet", is_frozen=False)
    before = copy.deepcopy(tuned.vision.state_dict())
    tuned.train()
    assert tuned.levels(torch.randn(2, 1, 64, 64))[-1].requires_grad
    assert any(
        not torch.equal(tensor, before[name])
        for name, tensor in tuned.vision.state_dict().items()
        if name.endswith("running_mean")
    )


def test_each_fit_gets_an_encoder_of_its_own_and_random_ones_differ_by_seed() -> None:
    overrides = [f"model.vision.{s}" for s in TOWERS["resnet"]]
    config = load([], [*overrides, "data.channels=1", "data.crop_px=64", "transfer.start=random"])
    one, two = (open_start(config, None, seed) for seed in (1, 2))
    assert one.weights_hash != two.weights_hash
    assert one.weights_hash == open_start(config, None, 1).weights_hash
    encoder = one.encoder(is_frozen=False, side=64, channels=1)
    assert encoder.vision is not one.vision
    # a checkpoint's shape with random weights
    shallow = [f"model.vision.{s}" for s in TOWERS["shallow"]]
    same = load([], [*shallow, "data.channels=1", "data.crop_px=64", "transfer.start=random"])
    like = open_start(same, _vision("shallow"), 1)
    assert like.vision.tower.backbone.config.hidden_sizes == [8, 16]
    with pytest.raises(ValueError, match="model.vision.source to a local directory"):
        open_start(load([], [*overrides, "transfer.start=imagenet"]), None, 1)
    with pytest.raises(ValueError, match="checkpoint=DIR"):
        open_start(load([], overrides), None, 1)


def _head(classes: int = 1) -> YoloHead:
    return YoloHead(_encoder("resnet"), 64, classes, 8)


def test_outputs_that_say_the_truth_decode_to_it_and_have_the_least_loss() -> None:
    head = _head(2)
    boxes = [torch.tensor([[8.0, 8, 24, 40], [30, 30, 62, 60]]), torch.zeros(0, 4)]
    labels = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)]
    outputs = []
    for level, cells in enumerate((8, 4, 2)):
        target = make_targets(boxes, labels, head.anchors(level), (cells, cells), 64, 2)
        raw = torch.full((2, 3, cells, cells, 7), -12.0)
        x, y = target.offsets[..., 0], target.offsets[..., 1]
        raw[..., 0] = torch.logit(x.clamp(1e-4, 1 - 1e-4))
        raw[..., 1] = torch.logit(y.clamp(1e-4, 1 - 1e-4))
        raw[..., 2:4] = target.offsets[..., 2:]
        raw[..., 4] = torch.where(target.is_object, 12.0, -12.0)
        raw[..., 5:] = torch.where(target.classes > 0, 12.0, -12.0)
        assert target.is_object.sum() == 2
        outputs.append(raw)
    found = decode(outputs, head, score_cut=0.5, nms_iou=0.5)
    assert [len(f[0]) for f in found] == [2, 0]
    order = np.argsort(found[0][2])
    np.testing.assert_allclose(found[0][0][order], boxes[0].numpy(), atol=0.05)
    least = float(yolo_loss(outputs, head, boxes, labels, "grid"))
    for change in (0, 2, 4, 5):
        worse = [o.clone() for o in outputs]
        worse[0][..., change] += 3.0
        assert float(yolo_loss(worse, head, boxes, labels, "grid")) > least


def test_targets_do_not_touch_the_boxes_and_ignore_similar_anchors() -> None:
    head = _head()
    anchors = head.anchors(2)
    box = torch.tensor([[10.0, 10, 10 + float(anchors[1, 0]), 10 + float(anchors[1, 1])]])
    kept = box.clone()
    target = make_targets([box], [torch.tensor([0])], anchors, (2, 2), 64, 1)
    assert torch.equal(box, kept)
    assert int(target.is_object.sum()) == 1 and bool(target.is_object[0, 1].any())
    assert not bool((target.is_object & target.is_empty).any())
    empty = make_targets([box[:0]], [torch.zeros(0, dtype=torch.int64)], anchors, (2, 2), 64, 1)
    assert bool(empty.is_empty.all()) and not bool(empty.is_object.any())


def test_the_loss_of_a_head_that_knows_nothing_is_its_formula() -> None:
    """Of logits 0 every binary cross-entropy is ln 2; means are over cells, or over "objects"."""
    head = _head(3)
    box, label = torch.tensor([[8.0, 8, 24, 40], [40, 40, 60, 60]]), torch.tensor([0, 2])
    outputs = [torch.zeros(1, 3, cells, cells, 8) for cells in (8, 4, 2)]
    expected = {"grid": 0.0, "objects": 0.0}
    for level, cells in enumerate((8, 4, 2)):
        target = make_targets([box], [label], head.anchors(level), (cells, cells), 64, 3)
        assert int(target.is_object.sum()) == 2 and bool((target.classes.sum(dim=4) <= 1).all())
        size = float(target.offsets[target.is_object][:, 2:].square().sum())
        found, empty = 2.5 * (2 * 2 * np.log(2) + size) + 2 * np.log(2), int(target.is_empty.sum())
        expected["grid"] += (found + 0.5 * empty * np.log(2)) / (3 * cells**2) + np.log(2)
        expected["objects"] += found / 2 + 0.5 * np.log(2) + np.log(2)
    for mean_over, value in expected.items():
        assert float(yolo_loss(outputs, head, [box], [label], mean_over)) == pytest.approx(value)


def test_a_box_belongs_to_the_anchor_of_its_shape_in_the_cell_of_its_centre() -> None:
    """Oracle: overlap over union of box and anchor on one corner, number by number."""
    anchors = torch.tensor([[10.0, 10], [10, 20], [30, 10]])
    shapes = [(10.0, 11.0), (11, 20), (29, 10), (10, 15)]
    centres = [(5.0, 5.0), (40, 5), (60, 60), (20, 40)]
    boxes = torch.tensor(
        [[x - w / 2, y - h / 2, x + w / 2, y + h / 2]
         for (x, y), (w, h) in zip(centres, shapes, strict=True)]
    )  # fmt: skip
    target = make_targets([boxes], [torch.zeros(4, dtype=torch.int64)], anchors, (4, 8), 64, 1)
    for (x, y), (w, h) in zip(centres, shapes, strict=True):
        row, column = int(y / 16), int(x / 8)
        common = [(min(w, aw) * min(h, ah), aw * ah) for aw, ah in anchors.tolist()]
        similar = [both / (w * h + own - both) for both, own in common]
        best = int(np.argmax(similar))
        assert target.is_object[0, :, row, column].tolist() == [k == best for k in range(3)]
        empty = [value <= 0.5 and k != best for k, value in enumerate(similar)]
        assert target.is_empty[0, :, row, column].tolist() == empty
        offsets = target.offsets[0, best, row, column].tolist()
        aw, ah = anchors[best].tolist()
        place = [x / 8 - column, y / 16 - row, np.log(w / aw), np.log(h / ah)]
        assert offsets == pytest.approx(place, abs=1e-5)
    assert int(target.is_object.sum()) == 4


@pytest.mark.parametrize("mean_over", ["grid", "objects"])
def test_the_loss_has_a_gradient_with_and_without_boxes(mean_over: str) -> None:
    head = _head()
    maps = _encoder("resnet").levels(torch.randn(2, 1, 64, 64))
    for boxes in ([torch.tensor([[5.0, 5, 40, 40]])] * 2, [torch.zeros(0, 4)] * 2):
        labels = [torch.zeros(len(b), dtype=torch.int64) for b in boxes]
        loss = yolo_loss(head(maps), head, boxes, labels, mean_over)
        head.zero_grad()
        loss.backward()
        assert torch.isfinite(loss) and head.outputs[0][-1].weight.grad is not None


def _fit(losses: list[float], patience: int = 2, **settings: Any) -> tuple[Any, torch.nn.Linear]:
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(layer.weight)
    shown = iter(losses)

    def steps(epoch: int):
        yield (layer.weight - epoch).square().sum()

    transfer = Transfer(epochs=len(losses), patience=patience, lr=0.1, **settings)
    return fit(layer, None, transfer, steps, lambda: (next(shown), None)), layer


def test_a_fit_stops_when_val_stops_improving_and_keeps_the_best_epoch() -> None:
    record, layer = _fit([3.0, 1.0, 2.0, 2.0, 0.5])
    assert (record.best_epoch, record.epochs, record.steps) == (2, 4, 4)
    # AdamW's first steps of size lr: two of them, not four
    assert float(layer.weight.detach()) == pytest.approx(0.2, abs=0.02)
    record, _ = _fit([3.0, 1.0, 2.0, 2.0, 0.5], max_steps=1)
    assert record.steps == 1
    with pytest.raises(TransferError, match="val loss of epoch 2"):
        _fit([1.0, float("nan")])
