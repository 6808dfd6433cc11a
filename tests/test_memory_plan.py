"""The memory plan: measured activations, what settings save, and the refusal with its remedy."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mlip import memory_plan
from mlip.cli import main
from mlip.knowledge.concept_files import load_concepts
from mlip.memory_plan import GIB, Measured, _batch, _bytes_kept, largest_that_fits, measure, plan
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.settings.config import Config, load
from tests.small_run import small_run
from tests.training.exact_step import SETTINGS

MORE = ("data.vocab_size=100", "batch.global_pairs=64", "train.engine=deepspeed")
MIB = 2**20
# a model of round numbers, for the arithmetic
ROUND = Measured(
    parameters=1_000_000,
    trainable=1_000_000,
    matrices=0,
    buffers=0,
    image_row=2.0 * MIB,
    text_row=1.0 * MIB,
    image_outputs=1_000.0,
    text_outputs=1_000.0,
    losses=(0.0, 1_000.0, 100.0),
)


def _config(*more: str) -> Config:
    return load([], [*SETTINGS, *MORE, *more])


def _plan(*more: str, ranks: int = 4, gib: float = 8.0) -> Any:
    return plan(_config(*more), ROUND, ranks=ranks, memory=gib * GIB, is_gpu=True)


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure(_config())


def test_activations_are_what_autograd_keeps_row_by_row(measured):
    # oracle: the bytes that saved tensors of ten rows take, against ten times one row
    config = _config()
    model = MLIPModel(config, vocab_size=100, concept_vectors=torch.zeros(12, config.knowledge.dim))
    batch = _batch(config, 10, 100, 12)
    kept = _bytes_kept(model, lambda: model.encode_image(batch.image))
    assert kept == pytest.approx(10 * measured.image_row, rel=0.05)
    inputs = (batch.token_ids, batch.token_mask, batch.content_mask)
    kept = _bytes_kept(model, lambda: model.encode_text(*inputs))
    assert kept == pytest.approx(10 * measured.text_row, rel=0.05)


def test_parameters_are_counted_and_losses_grow_with_the_square_of_the_batch(measured):
    assert 12_000 < measured.trainable <= measured.parameters < 25_000
    assert measured.losses[1] > 0 and measured.losses[2] > 0


def test_outputs_and_buffers_are_counted_and_the_law_of_losses_holds_at_other_sizes(
    measured, monkeypatch
):
    # four patches of 8 x 8 px; every output is float32 of 12 numbers
    config = _config()
    assert measured.image_outputs == 4 * 12 * (1 + 4)
    assert measured.text_outputs == 4 * 12 * (1 + config.data.max_tokens)
    vectors = torch.zeros(len(load_concepts()), config.knowledge.dim)
    objective = Objective(config, MLIPModel(config, vocab_size=100, concept_vectors=vectors))
    once, others = vectors.nbytes, sum(buffer.nbytes for buffer in objective.buffers())
    assert measured.buffers == once + 2 * (others - once)
    kept: list[float] = []
    counted = memory_plan._bytes_kept
    monkeypatch.setattr(memory_plan, "_bytes_kept", lambda *a: kept.append(counted(*a)) or kept[-1])
    monkeypatch.setattr(memory_plan, "_LOSS_SIZES", (24, 40, 64))
    measure(config)
    a, b, c = measured.losses
    law = [a + b * pairs + c * pairs**2 for pairs in (24, 40, 64)]
    assert law == pytest.approx(kept[-3:], rel=0.05)


def test_words_of_a_given_vocabulary_are_counted(measured):
    """They were those of data.vocab_size: of BERT's 30,522 words a seventh."""
    folder, words = small_run().folder / "run" / "tokenizer", small_run().tokenizer.vocab_size
    given = measure(_config(f"model.text.tokenizer={folder}"))
    width = _config().model.text.options["hidden_size"]
    assert given.parameters - measured.parameters == (words - 100) * width != 0


@pytest.mark.parametrize("kind", ["token_knowledge_patch", "mgca"])
def test_tokens_weighted_by_attention_are_planned(measured, kind):
    """The plan of such a run ended in a RuntimeError of torch: weights of two texts, not of all."""
    local = f"loss.local_alignment.kind={kind}"
    weighted = measure(_config(local, "loss.local_alignment.token_weights=attention"))
    assert weighted.parameters == measured.parameters
    # a small share more than uniform weights, which have no quantiles
    assert weighted.losses == pytest.approx(measure(_config(local)).losses, rel=0.3, abs=4096)


def test_a_table_of_concept_vectors_has_its_own_width(measured, tmp_path):
    """knowledge.dim was taken for it, 128 for a table of 768."""
    width, before = 7, _config().knowledge.dim
    rows = {c.id: torch.randn(width) for c in load_concepts()}
    save_file(rows, tmp_path / "vectors.safetensors")
    table = measure(_config(f"knowledge.vectors={tmp_path / 'vectors.safetensors'}"))
    # a state each, and the projection to the embedding
    wider = (width - before) * (3 + _config().model.embed_dim)
    assert table.parameters - measured.parameters == wider != 0
    with pytest.raises(ValueError, match="expected tfidf, text_tower or an existing"):
        measure(_config(f"knowledge.vectors={tmp_path / 'nowhere'}"))


def test_activation_checkpointing_of_a_tower_keeps_less(measured):
    deep = "num_hidden_layers: 4, num_attention_heads: 2, intermediate_size: 64"
    towers = [
        f"model.text.options={{hidden_size: 16, {deep}}}",
        f"model.vision.options={{hidden_size: 16, patch_size: 8, {deep}}}",
    ]
    plain = measure(_config(*towers, "run.exact=false"))
    for tower, key in (("vision", "image_row"), ("text", "text_row")):
        less = measure(_config(*towers, "run.exact=false", f"model.{tower}.checkpointing=true"))
        assert getattr(less, key) < 0.6 * getattr(plain, key)


def test_a_run_of_a_gpu_is_planned_without_one(measured):
    assert measure(_config("model.attention=xformers")) == measured


def test_each_zero_stage_divides_what_it_says_it_divides():
    whole = _plan("train.zero_stage=0").parts
    for stage in (1, 2, 3):
        parts = _plan(f"train.zero_stage={stage}").parts
        assert parts["optimiser"] < whole["optimiser"]
        assert parts["gradients"] == whole["gradients"] / (4 if stage >= 2 else 1)
        assert parts["parameters"] == whole["parameters"] / (4 if stage == 3 else 1)
    assert whole["optimiser"] == 8e6 and whole["parameters"] == 4e6


def test_several_ranks_without_a_named_engine_share_the_optimiser_and_one_has_it_alone():
    auto = ("train.engine=auto", "train.zero_stage=2")
    assert "average (EMA)" not in _plan("train.ema_decay=0").parts
    assert _plan(*auto).parts == _plan("train.zero_stage=2").parts
    assert _plan(*auto, ranks=1).parts["optimiser"] == 8e6
    for ranks, told in ((4, "parameters, ZeRO stage 2"), (1, "parameters, plain torch")):
        made = _plan(*auto, ranks=ranks)
        assert told in memory_plan.describe(_config(*auto), made, ROUND)


def test_a_tenth_of_the_memory_is_kept_spare():
    whole = _plan().total / GIB
    assert _plan(gib=whole / 0.89).fits and not _plan(gib=whole / 0.91).fits


def test_every_part_is_what_its_formula_gives_by_hand():
    # 16 pairs a rank of 64; images of 16 x 16 px
    model = dataclasses.replace(ROUND, buffers=1_000, losses=(5.0, 1_000.0, 100.0))

    def parts(*more: str, is_gpu: bool) -> dict[str, float]:
        return plan(_config(*more), model, ranks=4, memory=8.0 * GIB, is_gpu=is_gpu).parts

    shared = {
        "losses": 5 + 1_000 * 64 + 100 * 64 * 16,
        "activations": 16 * 2_000 + 16 * 3 * MIB,
    }
    assert parts("train.zero_stage=2", "train.ema_decay=0.9", is_gpu=True) == {
        "parameters": 4e6 + 1_000,
        "gradients": 1e6,
        "optimiser": 2e6 + 1e6,
        "average (EMA)": 1e6,
        "DeepSpeed's buckets": 4 * 500e6,
        "batches ahead": 4 * 256 * 16,
        **shared,
    }
    # at stage 1 the gradients stay whole, and a master of each part is kept as at stage 2
    first = parts("train.zero_stage=1", is_gpu=True)
    assert (first["gradients"], first["optimiser"]) == (4e6, 2e6 + 1e6)
    plain = ("train.engine=plain", "train.zero_stage=0", "train.ema_decay=0.9", "data.prefetch=3")
    assert parts(*plain, "train.precision=fp32", is_gpu=False)["gradients"] == 4e6
    assert parts(*plain, "train.precision=bf16", is_gpu=False) == {
        "parameters": 4e6 + 1_000,
        "gradients": 4e6 + 2e6,
        "optimiser": 8e6,
        "average (EMA)": 4e6,
        "batches ahead": 4 * 256 * 16 * (1 + 3),
        **shared,
    }


def test_ranks_share_the_memory_of_a_host_and_each_have_a_gpu_of_their_own(monkeypatch):
    monkeypatch.setattr(memory_plan, "measure", lambda config: ROUND)
    for is_gpu, each in ((False, "2.000 GiB"), (True, "8.000 GiB")):
        monkeypatch.setattr(memory_plan, "machine_memory", lambda g=is_gpu: (8.0 * GIB, g))
        text, _ = memory_plan.make_plan(_config(), ranks=4)
        assert re.search(rf"there is +{each}", text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert "of one rank of 3:" in memory_plan.make_plan(_config())[0]
    large = _config("train.zero_stage=2", "train.offload=true", "batch.global_pairs=8192")
    text, why = memory_plan.make_plan(large, ranks=4, memory_gib=2.0)
    assert "in host memory: optimiser 0.003 GiB" in text
    assert why is not None and "1.80 GiB to use of 2.00" in why
    _, why = memory_plan.make_plan(large, ranks=4, memory_gib=0.001)
    assert why is not None and "no smaller batch fits either: use more ranks" in why


def test_offload_moves_the_optimiser_to_the_host_and_an_average_costs_its_share():
    made = _plan("train.zero_stage=2", "train.offload=true")
    assert "optimiser" not in made.parts and made.host_parts["optimiser"] == 3e6
    assert _plan("train.zero_stage=2", "train.ema_decay=0.9").parts["average (EMA)"] == 1e6


def test_micro_batches_keep_one_at_a_time_and_images_and_texts_have_their_own_size():
    # 16 pairs a rank: images 2 MiB, reports 1 MiB each
    whole = _plan().parts["activations"]
    assert whole == pytest.approx(16 * 3 * MIB, rel=0.01)
    assert _plan("batch.micro_images=4").parts["activations"] == pytest.approx(
        (4 * 2 + 16) * MIB, rel=0.01
    )
    for images, texts, largest in ((2, 8, 8), (6, 8, 12)):
        both = _plan(f"batch.micro_images={images}", f"batch.micro_texts={texts}")
        assert both.parts["activations"] == pytest.approx(largest * MIB, rel=0.01)


@pytest.mark.parametrize("gib", [0.045, 0.03, 0.024])
def test_the_setting_that_is_named_fits_and_the_next_larger_does_not(gib):
    config = _config("train.engine=plain")
    room: dict[str, Any] = {"ranks": 1, "memory": gib * GIB, "is_gpu": True}
    assert not plan(config, ROUND, **room).fits
    named = largest_that_fits(config, ROUND, **room)
    assert named is not None
    changes = {k.removeprefix("batch."): int(v) for k, v in (x.split("=") for x in named.split())}
    smaller = dataclasses.replace(config, batch=dataclasses.replace(config.batch, **changes))
    assert plan(smaller, ROUND, **room).fits
    key = "global_pairs" if "global_pairs" in changes else "micro_images"
    one_more = {**changes, key: changes[key] + 1}
    if key == "micro_images":
        one_more["micro_texts"] = one_more[key]
    larger = dataclasses.replace(config, batch=dataclasses.replace(config.batch, **one_more))
    assert not plan(larger, ROUND, **room).fits
    most = dataclasses.replace(config.batch, micro_images=63, micro_texts=63)
    total = plan(dataclasses.replace(config, batch=most), ROUND, **room).total
    room["memory"] = total / 0.9 + 1
    assert largest_that_fits(config, ROUND, **room) == "batch.micro_images=63 batch.micro_texts=63"


@pytest.mark.parametrize(
    "statistics",
    [
        ["model.heads.norm=batch"],
        ["model.vision.kind=resnet", "model.vision.norm=batch", "model.vision.options={}"],
    ],
)
def test_of_several_ranks_a_batch_is_named_that_their_statistics_allow(statistics):
    """Micro-batches of batch statistics are refused: the remedy would be an error."""
    config = _config("train.engine=plain", "run.exact=false", *statistics)
    room: dict[str, Any] = {"ranks": 4, "memory": 0.045 * GIB, "is_gpu": True}
    named = largest_that_fits(config, ROUND, **room)
    assert named is not None and named.startswith("batch.global_pairs=") and "micro" not in named
    pairs = int(named.split("=")[1])

    def of(pairs: int) -> Any:
        batch = dataclasses.replace(config.batch, global_pairs=pairs)
        return plan(dataclasses.replace(config, batch=batch), ROUND, **room)

    assert pairs % 4 == 0 and of(pairs).fits and not of(pairs + 4).fits
    nearly = {**room, "memory": of(60).total / 0.9 + 1}
    assert largest_that_fits(config, ROUND, **nearly) == "batch.global_pairs=60"
    one = {"ranks": 1, "memory": of(4).total / 0.89, "is_gpu": True}
    assert largest_that_fits(config, ROUND, **one) is None  # one pair has no negative


def test_what_stage_3_gathers_is_at_most_fifty_million_parameters():
    large = dataclasses.replace(ROUND, parameters=200_000_000)
    for model, most in ((ROUND, 4e6), (large, 2e8)):
        made = plan(_config("train.zero_stage=3"), model, ranks=4, memory=8.0 * GIB, is_gpu=True)
        assert made.parts["gathered parameters"] == most


def test_nothing_is_named_where_nothing_fits():
    room: dict[str, Any] = {"ranks": 1, "memory": 1e6, "is_gpu": True}
    assert largest_that_fits(_config(), ROUND, **room) is None


def test_the_command_prints_the_plan_and_refuses_one_that_cannot_fit(tmp_path, capsys):
    items = [*SETTINGS, *MORE]
    assert main(["doctor", "--plan", *items, "--ranks", "2", "--memory-gib", "4"]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "gradients", "optimiser", "activations", "losses", "total"):
        assert word in printed
    assert main(["doctor", "--plan", *items, "--ranks", "2", "--memory-gib", "0.001"]) == 2
    refused = capsys.readouterr().err
    assert "does not fit" in refused and "largest setting that would fit: batch." in refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--plan", *SETTINGS, "--ranks", "0"], "--ranks 0: expected 1 or more"),
        (["--plan", *SETTINGS, "--memory-gib", "-1"], "--memory-gib -1.0: expected 0.001 or more"),
        (["--plan", *SETTINGS, "--memory-gib", "nan"], "--memory-gib nan: expected 0.001 or more"),
        (["--ranks", "3"], "--ranks 3: is of a plan"),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused(options, told, capsys):
    """0 ranks were 1, and nothing fitted into -1 GiB."""
    assert main(["doctor", *options]) == 2
    assert told in capsys.readouterr().err


def test_muon_keeps_one_moment_of_a_matrix_and_adamw_two():
    muon = dataclasses.replace(ROUND, matrices=750_000)
    config = _config("train.optimizer=muon", "train.zero_stage=0")
    parts = plan(config, muon, ranks=4, memory=8.0 * GIB, is_gpu=True).parts
    assert parts["optimiser"] == 4.0 * 750_000 + 8.0 * 250_000
    assert measure(_config()).matrices == 0
    assert 0 < measure(config).matrices < measure(config).trainable
