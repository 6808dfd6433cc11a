"""AutoModel and AutoProcessor of an export give what mlip.pretrained gives, and write it again.

Oracles: mlip.pretrained of the same folder, files and texts, to the bit; the losses by themselves.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

import mlip.transformers_auto as auto
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.kernels.info_nce import ClipLoss
from mlip.kernels.token_knowledge_patch import contrastive_loss_from_scores
from mlip.pretrained import PretrainedError, from_pretrained, open_checkpoint, save_pretrained
from mlip.saved.export_folder import write_sums
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.transformers_inputs import grey_pixels
from mlip.transfer.films.own_inputs import ImageFileError, model_input, read_image
from tests.small_run import small_export, small_results, small_run
from tests.spawned_ranks import start_ranks

PHRASES = ["left pleural effusion", "no pneumothorax", "There is a pacemaker.  The heart is large."]
PAIRS = 4


@pytest.fixture(scope="module")
def opened() -> Pretrained:
    return from_pretrained(small_export())


@pytest.fixture(scope="module")
def model() -> Any:
    """Nobody may change it."""
    return AutoModel.from_pretrained(small_export())


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(small_export())


def films(count: int = 3) -> list[Path]:
    run = small_run()
    rows = run.manifest.rows("train").tolist()[:count]
    return [run.folder / "data" / run.manifest.image_path(row) for row in rows]


def reports(count: int = 3) -> list[str]:
    run = small_run()
    return [run.manifest.text(row) for row in run.manifest.rows("train").tolist()[:count]]


def pairs(processor: Any, count: int = PAIRS) -> dict[str, Any]:
    texts = reports(count)
    return dict(processor(films(count), texts, is_report=True, return_tensors="pt"))


@torch.no_grad()
def test_every_number_is_that_of_the_opened_export(
    opened: Pretrained, model: Any, processor: Any
) -> None:
    inputs = processor(images=films(), text=PHRASES, return_tensors="pt")
    out = model(**inputs)
    images, texts = opened.encode_images(films()), opened.encode_texts(PHRASES)
    assert torch.equal(out.image_embeds, images.embedding)
    assert torch.equal(out.text_embeds, texts.text.embedding)
    assert torch.equal(out.vision_model_output.last_hidden_state, images.patches)
    of_text = {name: x for name, x in inputs.items() if name != "pixel_values"}
    assert torch.equal(model.get_text_features(**of_text).pooler_output, out.text_embeds)
    found = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(found, out.image_embeds)
    local = opened.similarity(images, texts, "local")
    assert np.array_equal(model.get_local_scores(**inputs).numpy(), local)
    assert np.array_equal(model.get_heat_maps(**inputs).numpy(), opened.heat_maps(images, texts))
    # in float32, the product over D = 32 in float64 beside it
    logits = opened.similarity(images, texts) * float(opened.model.scales.logit_scale())
    assert np.abs(out.logits_per_image.numpy() - logits).max() < 1e-5
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)
    of_images = model.get_image_features(inputs["pixel_values"])
    assert torch.equal(of_images.last_hidden_state, images.patches)
    tokens = model.get_text_features(**of_text).last_hidden_state
    assert torch.equal(tokens, out.text_model_output.last_hidden_state)
    assert torch.equal(tokens[:, : texts.text.tokens.shape[1]], texts.text.tokens)
    flat = out.to_tuple()
    assert torch.equal(flat[2], out.text_embeds) and type(flat[4]) is tuple


@torch.no_grad()
def test_reports_are_read_as_in_training_and_padding_changes_no_word(
    opened: Pretrained, model: Any, processor: Any
) -> None:
    long = "HISTORY: Fever. FINDINGS: A left  effusion.\n\n1) No edema " + "2) Nodule. " * 60
    texts = [*reports(2), long, "<p>Small effusion.</p>"]
    own = opened.encode_reports(texts)
    inputs = processor(text=texts, is_report=True, return_tensors="pt")
    assert torch.equal(model.get_text_features(**inputs).pooler_output, own.text.embedding)
    padded = processor(text=texts, is_report=True, padding="max_length", return_tensors="pt")
    for name, longest in (("input_ids", 64), ("attention_mask", 64), ("entity_mask", 16)):
        values, filled = inputs[name], padded[name]
        assert filled.shape[1] == longest and torch.equal(filled[:, : values.shape[1]], values)
        filler = opened.tokenizer.pad_id if name == "input_ids" else 0
        assert (filled[:, values.shape[1] :] == filler).all(), name
    found = model.get_text_features(**padded).pooler_output
    assert torch.allclose(found, own.text.embedding, atol=1e-6)
    del padded["attention_mask"]
    assert torch.equal(model.get_text_features(**padded).pooler_output, found)
    with pytest.raises(ValueError, match="phrase 1 has .* tokens, the model reads 62"):
        processor(text=long)
    assert len(processor(text=long, truncation=True)["input_ids"][0]) == 64


def _modes() -> dict[str, Image.Image]:
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (150, 130), dtype=np.uint8)
    colour = random.integers(0, 256, (150, 130, 4), dtype=np.uint8)
    plain, palette = Image.fromarray(grey), Image.fromarray(colour[..., :3]).quantize(50)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    return {
        "grey": plain,
        "colour": Image.fromarray(colour[..., :3]),
        "colour with alpha": Image.fromarray(colour),
        "grey with alpha": plain.convert("LA"),
        "palette": palette,
        "palette with alpha": see_through,
        "one bit": plain.convert("1"),
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
    }


@pytest.mark.parametrize("name", list(_modes()))
def test_pil_images_give_the_pixels_of_their_files(tmp_path: Path, name: str) -> None:
    image, file = _modes()[name], tmp_path / "film.png"
    image.save(file)
    wanted = read_image(file)
    assert np.array_equal(grey_pixels(image, 1), wanted)
    with Image.open(file) as read:
        assert np.array_equal(grey_pixels(read, 1), wanted)


def test_other_ways_to_the_same_pixels(tmp_path: Path, opened: Pretrained, processor: Any) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (140, 150), dtype=np.uint16)
    deep[0, :2] = 0, 65535
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    write_radiograph(tmp_path / "a.dcm", deep, patient_id="p", study_id="s")
    turned, exif = Image.fromarray((deep >> 8).astype(np.uint8)), Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    for name in ("turned.png", "turned.jpg"):
        turned.save(tmp_path / name, exif=exif)
    wide = Image.fromarray(deep.astype(np.int32))
    ways: dict[str, list[Any]] = {
        "deep.png": [deep, wide, tmp_path / "deep.png", str(tmp_path / "deep.png")],
        "a.dcm": [tmp_path / "a.dcm"],
        "turned.png": [Image.open(tmp_path / "turned.png")],
        "turned.jpg": [Image.open(tmp_path / "turned.jpg")],
    }
    for name, images in ways.items():
        wanted = model_input(read_image(tmp_path / name), opened.config)
        for image in images:
            found = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            assert torch.equal(found, wanted), (name, type(image))


def test_what_is_no_film_or_no_text_is_refused_with_its_place(processor: Any) -> None:
    good = np.random.default_rng(0).integers(0, 65536, (90, 90), dtype=np.uint16)
    wide = Image.fromarray(np.full((90, 90), 70_000, np.int32))
    for image, message in [
        (good // 16, "image 2: too_dark"),
        (Image.fromarray(good).convert("RGB"), "image 2: hardly a pixel between black and white"),
        (Image.fromarray(good >> 8).convert("CMYK"), "image 2: PIL's mode CMYK"),
        (wide, "image 2: values 70000 to 70000"),
        (good / 65535, "uint8 .* got float64"),
        (torch.zeros(90, 90), "got torch.float32"),
        (np.zeros((90, 90, 3), np.uint8), r"got \[90, 90, 3\]"),
        (np.zeros((0, 90), np.uint16), r"got \[0, 90\]"),
        (Path("nowhere.png"), "nowhere.png"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(images=[good, image])
    whole = io.BytesIO()
    Image.fromarray((good >> 8).astype(np.uint8)).save(whole, "PNG")
    closed = Image.open(io.BytesIO(whole.getvalue()))
    closed.close()
    cut = [Image.open(io.BytesIO(whole.getvalue()[:length])) for length in (300, 3000)]
    for image, message in [
        *((image, "image 2: PIL cannot read its pixels") for image in (*cut, closed)),
        *((Image.new(mode, (0, 9)), "image 2: has no pixels") for mode in ("L", "I")),
    ]:
        with pytest.raises(ImageFileError, match=message):
            processor(images=[good, image])
    for text, message in [("", "is empty"), ([], "of one at least"), ([3], "number 1 is of type")]:
        with pytest.raises(ValueError, match=message):
            processor(text=text)
    with pytest.raises(ValueError, match="images, text or both"):
        processor()
    for options in ({"max_length": 9}, {"padding": False}):
        with pytest.raises(ValueError, match=r"takes no max_length|padding: expected"):
            processor(text="effusion", **options)
    with pytest.raises(ValueError, match="takes no do_resize"):
        processor.image_processor(good, do_resize=False)
    with pytest.raises(ValueError, match="the processor without text takes no is_report, padding"):
        processor(images=good, padding="max_length", is_report=True)
    with pytest.raises(ValueError, match="expected an image at least"):
        processor(images=[])
    with pytest.raises(TypeError):  # a second text, as BERT's has it, was left out
        processor.tokenizer.encode("effusion", "edema")


def test_what_cannot_be_honoured_is_refused(model: Any, tmp_path: Path) -> None:
    refused: list[dict[str, Any]] = [{"attn_implementation": "eager"}]
    refused += [{"quantization_config": {"bits": 4}}]
    refused += [{"output_attentions": True}, {"output_hidden_states": True}]
    for option in refused:
        with pytest.raises(ValueError, match=r"leave .*out"):
            AutoModel.from_pretrained(small_export(), **option)
    for option, message in [
        ({"dtype": "relu"}, "dtype: .* got 'relu'"),
        ({"dtype": torch.int8}, "dtype: .* got torch.int8"),
        ({"device_map": "auto"}, "one device .* got 'auto'"),
        ({"device_map": {"": "cpu"}}, "one device .* got {'': 'cpu'}"),
    ]:
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(small_export(), **option)
    with pytest.raises(ValueError, match="made by from_pretrained"):
        AutoModel.from_config(model.config)
    with pytest.raises(PretrainedError, match="snapshot_download"):
        auto.MLIPForTransformers.from_pretrained("some/hub-name")
    with pytest.raises(ValueError, match="takes no push_to_hub"):
        model.save_pretrained(tmp_path / "m", push_to_hub=True)
    with pytest.raises(PretrainedError):  # weights of none: not those that it has
        model.save_pretrained(tmp_path / "m", state_dict={})
    inputs = AutoProcessor.from_pretrained(small_export(), lexicon=None, use_fast=None)
    with pytest.raises(ValueError, match="AutoProcessor of this model takes no use_fast"):
        AutoProcessor.from_pretrained(small_export(), use_fast=True)
    with pytest.raises(ValueError, match="save_pretrained takes no push_to_hub"):
        inputs.save_pretrained(tmp_path / "m", push_to_hub=True)
    with pytest.raises(ValueError, match="save the whole processor"):
        inputs.image_processor.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m", is_main_process=False)  # the main one writes
    assert not list(tmp_path.iterdir())
    tokens = {"input_ids": torch.ones(1, 3).long(), "pixel_values": torch.zeros(1, 1, 96, 96)}
    some = {"entity_ids": torch.zeros(1, 1).long(), "entity_mask": torch.zeros(1, 1).bool()}
    for mentions in ({}, some):
        with pytest.raises(ValueError, match="expected entity_ids"):
            model(**tokens, **mentions, return_loss=True)
    with pytest.raises(ValueError, match="get_text_features"):
        model(input_ids=tokens["input_ids"])


def test_what_it_saves_is_an_export_again(model: Any, processor: Any, tmp_path: Path) -> None:
    run = small_run()
    first = save_pretrained(
        tmp_path / "first",
        *(run.model, run.config, run.tokenizer, run.table),
        facts={"step": 7, "pairs_seen": 56},
        results=small_results(),
    )
    again = AutoModel.from_pretrained(first)
    again.save_pretrained(tmp_path / "new" / "again")  # makes the folders above it
    (tmp_path / "new" / "again").rename(tmp_path / "again")
    assert AutoProcessor.from_pretrained(first).save_pretrained(tmp_path / "again") == ()
    for file in (p.relative_to(first) for p in first.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / file).read_bytes() == (first / file).read_bytes(), file
    opened = open_checkpoint(tmp_path / "again")
    assert opened.facts["step"] == 7
    images = opened.encode_images(films())
    inputs = AutoProcessor.from_pretrained(tmp_path / "again")(films(), return_tensors="pt")
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "again").get_image_features(**inputs)
    assert torch.equal(found.pooler_output, images.embedding)


def test_changed_weights_are_saved_in_float32_beside_other_files(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_export(), tmp_path / "model"))
    graph = folder / "image.onnx"  # of the weights that go
    graph.write_text("graph")
    (folder / "SHA256SUMS").unlink()
    write_sums(folder)
    (folder / "optimizer.pt").write_text("of a trainer")
    model = AutoModel.from_pretrained(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        model.mlip.scales.stored["log_scale"].fill_(2.0)
    model.save_pretrained(folder)
    assert (folder / "optimizer.pt").read_text() == "of a trainer" and not graph.exists()
    opened = open_checkpoint(folder)
    assert opened.model.scales.logit_scale().item() == pytest.approx(np.exp(2.0))
    assert opened.facts == {"further": "transformers", "checkpoint": str(folder)}
    assert opened.origin["start"]["image"] == {"kind": "folder", "name": "model"}
    assert "trained further in transformers" in (folder / "README.md").read_text()
    kept = load_file(folder / "model.safetensors")
    assert not [n for n, t in kept.items() if t.dtype == torch.bfloat16]
    assert kept.keys() == model.state_dict().keys()
    model.load_state_dict(kept)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PretrainedError, match="another kind of model"):
        model.save_pretrained(tmp_path / "bert")
    assert json.loads((tmp_path / "bert" / "config.json").read_text()) == {"model_type": "bert"}


def test_a_processor_is_saved_and_opened_without_weights(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "inputs")
    concepts = (tmp_path / "inputs" / "concepts.jsonl").read_bytes()
    assert concepts == (small_export() / "concepts.jsonl").read_bytes()
    again = AutoProcessor.from_pretrained(tmp_path / "inputs")
    for name, values in again(films(), PHRASES, return_tensors="pt").items():
        assert torch.equal(values, processor(films(), PHRASES, return_tensors="pt")[name]), name
    settings = json.loads((tmp_path / "inputs" / "config.json").read_text())
    settings["fingerprints"]["vocabulary"] = "0"
    (tmp_path / "inputs" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(PretrainedError, match="another vocabulary"):
        processor.save_pretrained(tmp_path / "inputs")


def test_the_tokenizer_alone_is_the_processors(processor: Any) -> None:
    alone = AutoTokenizer.from_pretrained(small_export())
    for name, values in processor(text=PHRASES).items():
        assert alone(PHRASES)[name] == values
    assert alone.encode(PHRASES[0]) == processor(text=PHRASES[0])["input_ids"][0]
    assert alone.decode(alone.encode("left effusion")) == "[CLS] left effusion [SEP]"
    again = pickle.loads(pickle.dumps(processor))  # for workers that prepare data
    assert again(text=PHRASES)["entity_ids"] == processor(text=PHRASES)["entity_ids"]


def test_a_concept_table_of_others_is_named_and_never_written(tmp_path: Path) -> None:
    run, table = small_run(), Path(shutil.copy(small_export() / "concepts.jsonl", tmp_path))
    knowledge = dataclasses.replace(run.config.knowledge, lexicon=str(table))
    config = dataclasses.replace(run.config, knowledge=knowledge)
    folder = save_pretrained(tmp_path / "m", run.model, config, run.tokenizer, run.table)
    hidden = table.rename(tmp_path / "elsewhere.jsonl")
    for opens in (AutoModel, AutoProcessor):
        with pytest.raises(ValueError, match=r"concepts\.jsonl: does not exist"):
            opens.from_pretrained(folder)
        opened = opens.from_pretrained(folder, lexicon=str(hidden))
        opened.save_pretrained(tmp_path / opens.__name__)
        assert not (tmp_path / opens.__name__ / "concepts.jsonl").exists()


def test_a_damaged_folder_opens_no_processor(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_export(), tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"")  # gigabytes that it has no use for
    assert AutoProcessor.from_pretrained(folder)(text="effusion")
    (folder / "tokenizer" / "vocab.txt").write_text("[PAD]")
    with pytest.raises(PretrainedError, match=r"vocab\.txt: damaged"):
        AutoProcessor.from_pretrained(folder)
    (folder / "SHA256SUMS").unlink()  # comes last: the folder was not written to its end
    with pytest.raises(PretrainedError, match="SHA256SUMS: cannot be read"):
        AutoProcessor.from_pretrained(folder)


def test_an_export_from_before_there_were_cards_is_saved_again(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_export(), tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    for name in ("origin", "sizes", "knowledge", "evaluation"):
        del settings[name]
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "README.md").unlink()
    (folder / "SHA256SUMS").unlink()
    write_sums(folder)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").facts.keys() == {*settings["facts"], "checkpoint"}
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "inputs")
    assert AutoProcessor.from_pretrained(tmp_path / "inputs")(text="effusion")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_of_the_bits_give_nearly_the_same(
    model: Any, processor: Any, dtype: torch.dtype
) -> None:
    inputs = processor(images=films(1), text=PHRASES, return_tensors="pt")
    half = AutoModel.from_pretrained(small_export(), dtype=dtype, device_map="cpu")
    off = half(**inputs).image_embeds.float() - model(**inputs).image_embeds
    assert off.abs().max() < 8 * torch.finfo(dtype).eps
    assert torch.isfinite(half.get_local_scores(**inputs)).all()


def test_the_loss_is_that_of_the_two_levels(model: Any, processor: Any) -> None:
    inputs = pairs(processor)
    out, own, scales = model(**inputs, return_loss=True), model.mlip, model.mlip.scales
    batch = {name: inputs[f"entity_{name}"] for name in ("ids", "state", "mask")}
    knowledge = own.encode_knowledge(*batch.values())
    mask, texts = inputs["attention_mask"].bool(), out.text_model_output.last_hidden_state
    content = mask.clone()
    content[:, 0] = False
    content[torch.arange(PAIRS), mask.sum(1) - 1] = False
    patches = out.vision_model_output.last_hidden_state
    scores = own.local_scores(patches, texts, content, None, knowledge)
    wanted = ClipLoss()(out.image_embeds, out.text_embeds, scales.logit_scale())
    wanted = wanted + contrastive_loss_from_scores(scores, logit_scale=scales.logit_scale_local())
    assert torch.equal(out.loss, wanted)
    same = torch.zeros(PAIRS, dtype=torch.int64)
    assert model(**inputs, return_loss=True, pair_id=same).loss.item() == pytest.approx(0, abs=1e-6)


def test_an_empty_text_is_nobodys_and_one_of_mentions_alone_is_asked(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights of the run, which are 1 in most."""
    config, inputs, own = model.opened.config, pairs(processor), model.mlip
    part = config.loss
    weighed = dataclasses.replace(
        part,
        global_contrastive=dataclasses.replace(part.global_contrastive, weight=0.5),
        local_alignment=dataclasses.replace(part.local_alignment, weight=3.0),
    )
    changed = dataclasses.replace(config, loss=weighed)
    monkeypatch.setattr(model, "opened", dataclasses.replace(model.opened, config=changed))
    # words and mentions, mentions alone, neither, words alone
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1:3, 2:] = 0
    inputs["entity_mask"] = inputs["entity_mask"].clone()
    inputs["entity_mask"][2:] = False
    assert inputs["entity_mask"][:2].any(dim=1).all()
    out = model(**inputs, return_loss=True)
    valid = torch.tensor([True, True, False, True])
    texts = model._text_batch(True, **{k: x for k, x in inputs.items() if k != "pixel_values"})
    assert texts.content_mask.any(dim=1).tolist() == [True, False, False, True]
    knowledge = own.encode_knowledge(*(inputs[f"entity_{n}"] for n in ("ids", "state", "mask")))
    patches = out.vision_model_output.last_hidden_state
    tokens = out.text_model_output.last_hidden_state
    scores = own.local_scores(patches, tokens, texts.content_mask, None, knowledge)
    scales = own.scales
    local = contrastive_loss_from_scores(
        scores, logit_scale=scales.logit_scale_local(), text_valid=valid
    )
    alike = ClipLoss()(out.image_embeds, out.text_embeds, scales.logit_scale())
    assert out.loss.item() == pytest.approx((0.5 * alike + 3.0 * local).item(), rel=1e-6)


def test_it_is_opened_for_use_on_the_device_that_is_named() -> None:
    opened = AutoModel.from_pretrained(small_export(), device_map="meta", dtype="auto")
    assert opened.device.type == "meta" and opened.dtype == torch.float32
    assert not opened.training
    pixels = torch.zeros(1, 1, 96, 96, dtype=torch.float64)
    found = opened.get_image_features(pixels).pooler_output
    assert found.device.type == "meta" and found.dtype == torch.float32


@pytest.mark.parametrize("change", [{"weight": 0.0}, {"kind": "mgca"}])
@torch.no_grad()
def test_where_no_such_local_score_was_trained_the_loss_is_that_of_the_global_head(
    change: dict[str, Any], model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.opened.config
    local = dataclasses.replace(config.loss.local_alignment, **change)
    loss = dataclasses.replace(config.loss, local_alignment=local)
    changed = dataclasses.replace(config, loss=loss)
    monkeypatch.setattr(model, "opened", dataclasses.replace(model.opened, config=changed))
    out = model(**pairs(processor), return_loss=True)
    assert torch.equal(
        out.loss, ClipLoss()(out.image_embeds, out.text_embeds, model.mlip.scales.logit_scale())
    )


@torch.no_grad()
def test_a_scale_is_brought_back_where_it_trains_and_nowhere_else(processor: Any) -> None:
    model, inputs = AutoModel.from_pretrained(small_export()), pairs(processor)
    model.mlip.scales.stored["log_scale"].fill_(9.0)
    for trains, has_loss in ((False, False), (False, True), (True, False)):
        model.train(trains)(**inputs, return_loss=has_loss)
        assert model.mlip.scales.stored["log_scale"].item() == 9.0
    model.train()(**inputs, return_loss=True)
    assert model.mlip.scales.logit_scale().item() == pytest.approx(100.0)


def _loss_of_rank(rank: int, folder: Path) -> None:
    model = AutoModel.from_pretrained(folder / "model", dtype="float64")
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    model(**{k: v[rank::2] for k, v in inputs.items()}, return_loss=True).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.save(grads, folder / f"grads{rank}.pt")


def test_two_ranks_train_on_one_batch(processor: Any, tmp_path: Path) -> None:
    """Averaged gradients, as DistributedDataParallel averages them, are those of one process."""
    shutil.copytree(small_export(), tmp_path / "model")
    inputs = pairs(processor)
    torch.save(inputs, tmp_path / "inputs.pt")
    finish = start_ranks(_loss_of_rank, tmp_path)
    model = AutoModel.from_pretrained(tmp_path / "model", dtype="float64")
    model(**inputs, return_loss=True).loss.backward()
    finish()
    found = [torch.load(tmp_path / f"grads{rank}.pt", weights_only=True) for rank in range(2)]
    moved = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found[0].keys() == moved.keys() and len(moved) > 50
    for name, grad in moved.items():
        mean = (found[0][name] + found[1][name]) / 2
        assert torch.allclose(mean, grad, rtol=1e-9, atol=1e-12), name


def test_steps_of_a_loop_of_ones_own_lower_the_loss(processor: Any) -> None:
    model = AutoModel.from_pretrained(small_export()).train()
    inputs, optimizer = pairs(processor, 8), torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    with torch.no_grad():
        model.mlip.scales.stored["log_scale"].fill_(9.0)  # as a step may leave it
    assert model(**inputs, return_loss=True).logit_scale.item() == pytest.approx(100.0)


def test_transformers_trainer_trains_saves_and_resumes(processor: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"film": f, "report": r} for f, r in zip(films(8), reports(8), strict=True)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        films, reports = ([row[key] for row in rows] for key in ("film", "report"))
        inputs = processor(images=films, text=reports, is_report=True, return_tensors="pt")
        return {**inputs, "return_loss": True}

    def trainer(steps: int) -> Any:
        return Trainer(
            model=AutoModel.from_pretrained(small_export()),
            args=TrainingArguments(
                str(tmp_path / "run"),
                max_steps=steps,
                save_steps=1,
                per_device_train_batch_size=4,
                remove_unused_columns=False,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=collate,
            processing_class=processor,
        )

    trained = trainer(2)
    trained.train()
    saved = open_checkpoint(tmp_path / "run" / "checkpoint-2").model.state_dict()
    began = from_pretrained(small_export()).model.state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    assert sum(not torch.equal(saved[name], began[name]) for name in saved) > 50
    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    resumed.save_model(str(tmp_path / "last"))
    resumed.save_model(str(tmp_path / "last"))  # over what it wrote
    assert AutoProcessor.from_pretrained(tmp_path / "last") is not None


def test_the_pipeline_takes_films_of_8_bits(model: Any, processor: Any, tmp_path: Path) -> None:
    grey = (read_image(films()[0]) >> 8).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "film.png"), grey)
    ask = pipeline(
        "zero-shot-image-classification",
        model=model,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
    )
    names = ["pleural effusion", "pneumothorax"]
    asked: dict[str, Any] = {"candidate_labels": names, "hypothesis_template": "{}."}
    found = {x["label"]: x["score"] for x in ask(str(tmp_path / "film.png"), **asked)}
    texts = [f"{name}." for name in names]
    inputs = processor(tmp_path / "film.png", texts, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits_per_image[0].softmax(0)
    assert [found[name] for name in names] == pytest.approx(wanted.tolist(), abs=1e-6)
    with pytest.raises(ImageFileError, match="hardly a pixel between black and white"):
        ask(str(films()[0]), **asked)  # of 16 bits
