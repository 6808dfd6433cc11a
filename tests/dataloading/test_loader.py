"""The loader as a whole: order, resume, ledger, bad files, threads, refused settings.

Oracles: the batches of one undamaged, uninterrupted process, and the ledger's sums.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlip.batch import Batch
from mlip.dataloading import loader as loader_module
from mlip.dataloading.images import image_file
from mlip.dataloading.ledger import DataError, Ledger
from mlip.dataloading.loader import build_loader, listed_bad, merge_states
from mlip.dataloading.manifest import ManifestError, load_manifest
from mlip.settings.config import Config, ConfigError
from mlip.system.machine import LimitError
from tests.dataloading.conftest import take

Make = Callable[..., Config]


def same(a: Batch, b: Batch) -> bool:
    names = [name for name, value in vars(a).items() if value is not None]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def damage(config: Config, rows: list[int]) -> list[str]:
    """Cut these rows' images short; their names."""
    manifest = load_manifest(config.data)
    names = [manifest.image_path(row) for row in rows]
    for name in names:
        path = Path(manifest.root) / name
        path.write_bytes(path.read_bytes()[:-30])
    return names


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batch_of_one_process(
    corpus: Make, build: Any, world_size: int
) -> None:
    config = corpus()
    one = take(build(config), 5)
    ranks = [take(build(config, rank=r, world_size=world_size), 5) for r in range(world_size)]
    for step, whole in enumerate(one):
        parts = [rank[step] for rank in ranks]
        for name in ("image", "pair_id", "global_index", "row_index"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))
        lengths = torch.cat([part.token_mask.sum(1) for part in parts])
        assert torch.equal(lengths, whole.token_mask.sum(1))


def test_a_ledgers_rows_are_those_of_the_manifest_at_hand(corpus: Make, build: Any) -> None:
    """Saved ones were believed: 0 bad images of -10^30 rows ended a run."""
    loader = build(corpus())
    state = json.loads(json.dumps(loader.state_dict()))
    state["ledger"] |= {"rows": 10**30, "excluded": {"no_split": 10**31}}
    before = loader.ledger.rows, loader.ledger.excluded
    loader.load_state_dict(state)
    assert (loader.ledger.rows, loader.ledger.excluded) == before


def test_a_loader_that_is_rewound_begins_again_and_names_no_bad_file_twice(
    corpus: Make, build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """val is read so at each checkpoint of a run, also with batches prepared ahead."""
    config = corpus("data.bad_share=0.9", "data.prefetch=3")
    damage(config, [0, 1])
    loader = build(config)
    first, ledger = take(loader, 9), None
    for _ in range(2):
        loader.rewind()
        again = take(loader, 9)
        assert all(same(a, b) for a, b in zip(first, again, strict=True))
        assert ledger in (None, loader.ledger.state_dict())  # counts of one reading alone
        ledger = loader.ledger.state_dict()
    assert caplog.text.count("quarantined image") == len(loader.ledger.bad) == 2


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_resume_at_any_step_repeats_nothing_and_skips_nothing(
    corpus: Make, build: Any, stop: int
) -> None:
    config = corpus()
    straight = take(build(config), 10)
    first = build(config)
    take(first, stop)
    time.sleep(0.05)  # let it prepare batches that nobody takes
    state = json.loads(json.dumps(first.state_dict()))
    second = build(config)
    second.load_state_dict(state)
    rest = take(second, 10 - stop)
    assert all(same(a, b) for a, b in zip(straight[stop:], rest, strict=True))
    whole = build(config)
    take(whole, 10)
    assert second.ledger.summary() == whole.ledger.summary()


def _places(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*path, key)
        yield from _places(value, (*path, key))


@pytest.mark.parametrize("other", [None, "x", [], {}, [1], {"x": "y"}])
def test_a_state_with_a_part_of_another_kind_is_refused_when_it_is_loaded(
    corpus: Make, build: Any, other: Any
) -> None:
    """Taken in, a text for a count ended a run hours later, at its first bad image."""
    config = corpus()
    first = build(config)
    take(first, 4)
    state = json.loads(json.dumps(first.state_dict()))
    for path in _places(state):
        if type(other) is dict and path[-1] in ("excluded", "epochs", "bad") and not other:
            continue  # none yet
        changed = json.loads(json.dumps(state))
        within = changed
        for key in path[:-1]:
            within = within[key]
        within[path[-1]] = other
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)) as caught:
            build(config).load_state_dict(changed)
        # a ValueError is of another order, which is refused by what differs
        assert "loader state" in str(caught.value) or not isinstance(caught.value, ValueError)


def test_a_state_grows_with_epochs_only(corpus: Make, build: Any) -> None:
    loader = build(corpus())
    take(loader, 3)  # 18 of 16 rows: two epochs have begun
    size = len(json.dumps(loader.state_dict()))
    take(loader, 2)  # 30
    assert abs(len(json.dumps(loader.state_dict())) - size) <= 2
    take(loader, 19)  # 144: nine epochs
    assert len(json.dumps(loader.state_dict())) < size + 7 * 20


def test_resume_on_another_number_of_ranks_goes_on_with_the_same_rows(
    corpus: Make, build: Any
) -> None:
    config = corpus()
    ranks = [build(config, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        take(rank, 3)
    state = merge_states([rank.state_dict() for rank in ranks])
    alone = build(config)
    alone.load_state_dict(state)
    straight = take(build(config), 4)[3]
    assert same(take(alone, 1)[0], straight)
    assert alone.ledger.summary()["epochs"]["0"]["trained"] == 16
    three = [build(config, rank=r, world_size=3) for r in range(3)]
    for rank in three:
        rank.load_state_dict(state)
    merged = Ledger.merge([rank.ledger for rank in three])
    assert sum(count.trained for count in merged.epochs.values()) == 18


@pytest.mark.parametrize(
    "override, key", [("run.seed=5", "run.seed"), ("batch.global_pairs=4", "batch.global_pairs")]
)
def test_a_state_of_another_order_is_refused_by_name(
    corpus: Make, build: Any, override: str, key: str
) -> None:
    state = build(corpus()).state_dict()
    with pytest.raises(ValueError, match=f"{key} .saved"):
        build(corpus(override)).load_state_dict(state)


def test_every_row_is_accounted_for_after_each_epoch(corpus: Make, build: Any) -> None:
    config = corpus("data.bad_share=0.5")
    damage(config, [0, 5])
    loader = build(config)
    take(loader, 8)  # 48 positions of 16 rows: three epochs
    for epoch in range(3):
        assert loader.ledger.summary()["epochs"][str(epoch)]["ahead"] == 0
        count = loader.ledger.summary()["epochs"][str(epoch)]
        assert count["trained"] == 14 and sum(count["quarantined"].values()) == 2
        assert count["replacements"] == 2
    assert loader.num_rows + sum(loader.ledger.excluded.values()) == len(loader.manifest) == 24


def test_bad_files_cost_no_good_one_and_are_replaced_by_rule(
    corpus: Make, build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = corpus("data.bad_share=0.5")
    before = take(build(config), 6)
    names = damage(config, [1, 6])
    loader = build(config)
    manifest = load_manifest(config.data)
    with caplog.at_level(logging.WARNING, "mlip"):
        after = take(loader, 6)
    for a, b in zip(before, after, strict=True):
        bad = np.isin(a.row_index, [1, 6])
        assert torch.equal(a.row_index[~bad], b.row_index[~bad])
        assert torch.equal(a.image[~bad], b.image[~bad])
        assert not np.isin(b.row_index, [1, 6]).any()
        assert torch.equal(a.global_index, b.global_index)
    assert listed_bad(loader.manifest, loader.ledger) == [
        {"row": row + 1, "image": manifest.image_hash(row), "reason": "truncated"} for row in [1, 6]
    ]
    assert sum("quarantined" in record.message for record in caplog.records) == 2
    told = caplog.text + str(listed_bad(loader.manifest, loader.ledger))
    assert "data row 7" in told and not any(name in told for name in names)
    # the same rows are drawn as replacements on any number of ranks
    ranks = [take(build(config, rank=r, world_size=2), 6) for r in range(2)]
    for step, whole in enumerate(after):
        assert torch.equal(torch.cat([r[step].row_index for r in ranks]), whole.row_index)


def test_of_many_bad_files_the_first_are_named_in_the_log_and_all_in_the_list(
    corpus: Make, build: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "MOST_TOLD", 2)
    config = corpus("data.bad_share=0.9")
    damage(config, [0, 1, 2, 3, 4, 5])
    loader = build(config)
    with caplog.at_level(logging.WARNING, "mlip"):
        take(loader, 6)
    bad = listed_bad(loader.manifest, loader.ledger)
    told = [record.message for record in caplog.records]
    assert len(bad) > 3 and len(told) == 3
    assert [text.startswith("quarantined image of data row") for text in told] == [
        True,
        True,
        False,
    ]
    assert "more than 2 images quarantined" in told[2] and "quarantine.json" in told[2]


def test_too_many_bad_files_stop_the_run(corpus: Make, build: Any) -> None:
    config = corpus("data.bad_share=0.1")  # of 16 training rows: one is allowed
    damage(config, [1, 2])
    loader = build(config)
    with pytest.raises(DataError, match="2 of 16 training rows.*truncated 2.*data.bad_share"):
        take(loader, 6)


def test_ranks_that_each_met_few_bad_files_stop_together_at_the_next_save(
    corpus: Make, build: Any
) -> None:
    config = corpus("data.bad_share=0.1")  # of 16 training rows: one is allowed
    ranks = [build(config, rank=r, world_size=2) for r in range(2)]
    damage(config, [int(rank.order.plan(0).rows[0]) for rank in ranks])
    for rank in ranks:
        take(rank, 1)  # one bad row each: no rank knows of the other's
    with pytest.raises(DataError, match="2 of 16 training rows.*truncated 2.*data.bad_share"):
        merge_states([rank.state_dict() for rank in ranks])


def test_a_lost_image_folder_stops_the_run(corpus: Make, build: Any) -> None:
    config = corpus()
    loader = build(config)
    shutil.rmtree(Path(loader.manifest.root))
    with pytest.raises(DataError, match="data.root.*gone"):
        take(loader, 1)
    with pytest.raises(DataError, match="data.root.*gone"):  # and it stays stopped
        next(loader)


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_too_many_open_files_stop_the_run_and_cost_no_film(
    corpus: Make, build: Any, monkeypatch: pytest.MonkeyPatch, pipeline: str
) -> None:
    def refuse(path: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files", path)

    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    loader = build(corpus(f"data.pipeline={pipeline}", "data.bad_share=0.5"))
    monkeypatch.setattr(image_file, "_open", refuse)
    with pytest.raises(LimitError, match="an image cannot be read: too many files.*ulimit -n"):
        take(loader, 1)
    assert loader.ledger.bad == {}


def test_evaluation_leaves_bad_images_out_and_counts_them(corpus: Make, build: Any) -> None:
    config = corpus()
    damage(config, [17])
    loader = build(config, "val", train=False)
    rows = [row for batch in loader for row in batch.row_index.tolist()]
    assert rows == [16, 18, 19]
    assert loader.ledger.bad == {17: "truncated"}
    assert loader.ledger.summary()["epochs"]["0"]["ahead"] == 0


def test_evaluation_reads_every_row_once_and_again(corpus: Make, build: Any) -> None:
    loader = build(corpus(), "train", train=False, global_pairs=5)
    for _ in range(2):
        batches = list(loader)
        assert [len(b) for b in batches] == [5, 5, 5, 1]
        rows = torch.cat([b.row_index for b in batches]).tolist()
        assert rows == loader.manifest.rows("train").tolist()
        # counts of one reading alone: those of two had said that -16 rows are ahead
        assert loader.ledger.summary()["epochs"]["0"]["ahead"] == 0
    few = build(corpus(), "train", train=False, rows=np.array([3, 9]))
    assert [b.row_index.tolist() for b in few] == [[3, 9]]
    assert few.ledger.excluded["not_chosen"] == 14


@pytest.mark.parametrize(
    "train, joined, kept", [(True, False, 16), (False, False, 0), (False, True, 16)]
)
def test_reports_are_kept_for_the_next_epoch_alone(
    corpus: Make, build: Any, train: bool, joined: bool, kept: int
) -> None:
    """What `mlip classify` kept of reports that it does not read took 1.6 kB a film."""
    config = corpus(f"knowledge.pair_id_by_concepts={str(joined).lower()}")
    loader = build(config, "train", train=train, global_pairs=4)
    take(loader, 4)
    assert len(loader.encoder._cache) == kept


def test_ranks_of_an_evaluation_cover_the_rows_in_equal_steps(corpus: Make, build: Any) -> None:
    ranks = [
        list(build(corpus(), "train", train=False, rank=r, world_size=3, global_pairs=5))
        for r in range(3)
    ]
    assert {len(batches) for batches in ranks} == {4}
    rows = [row for step in range(4) for r in ranks for row in r[step].row_index.tolist()]
    assert rows == list(range(16))
    assert [len(r[3]) for r in ranks] == [0, 0, 1]


def test_training_may_not_read_rows_of_another_split(corpus: Make, build: Any) -> None:
    with pytest.raises(ValueError, match="split 'train' only"):
        build(corpus(), rows=np.array([0, 16]))


def test_a_split_without_rows_is_refused_with_the_counts(corpus: Make, build: Any) -> None:
    config = corpus("data.columns.report=null")
    with pytest.raises(ManifestError, match="'train' has no usable rows of 24.*no_report 16"):
        build(config)


@pytest.mark.parametrize("verify, caught", [("hash", True), ("none", False)])
def test_hashing_catches_a_change_that_decodes(
    corpus: Make, build: Any, verify: str, caught: bool
) -> None:
    config = corpus(f"data.verify={verify}", "data.bad_share=0.5")
    manifest = load_manifest(config.data)
    one, other = (Path(manifest.root) / manifest.image_path(row) for row in (0, 6))
    other.write_bytes(one.read_bytes())
    loader = build(config)
    take(loader, 3)
    assert loader.ledger.bad == ({6: "hash_mismatch"} if caught else {})


def test_verification_without_hashes_is_refused(corpus: Make, build: Any) -> None:
    with pytest.raises(ManifestError, match="data.verify=hash.*data.columns.sha256"):
        build(corpus("data.verify=hash", "data.columns.sha256=null"))


@pytest.mark.parametrize("error", [StopIteration(), KeyError("x"), MemoryError()])
def test_an_exception_inside_decoding_is_one_bad_sample(
    corpus: Make, build: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from mlip.dataloading.pipelines import samples

    decode, calls = samples.decode_grey, []

    def fail_once(content: bytes, header: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return decode(content, header)

    monkeypatch.setattr(samples, "decode_grey", fail_once)
    loader = build(corpus("data.bad_share=0.5"))
    batches = take(loader, 3)
    assert [len(b) for b in batches] == [6, 6, 6]
    reason = "out_of_memory" if isinstance(error, MemoryError) else "undecodable"
    assert list(loader.ledger.bad.values()) == [reason]


def test_a_mistake_of_ours_is_quarantined_under_its_own_reason(
    corpus: Make, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was "undecodable: the decoder refused the file", and the run goes on all the same."""
    from mlip.dataloading.images import image_file

    decode, calls = image_file.cv2.imdecode, []

    def none_once(*arguments: Any) -> Any:
        calls.append(1)
        return "no array" if len(calls) == 3 else decode(*arguments)  # has no dtype

    monkeypatch.setattr(image_file.cv2, "imdecode", none_once)
    loader = build(corpus("data.bad_share=0.5"))
    assert [len(b) for b in take(loader, 3)] == [6, 6, 6]
    assert list(loader.ledger.bad.values()) == ["internal_error"]


def test_stop_iteration_anywhere_else_is_an_error_and_no_end(
    corpus: Make, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise StopIteration

    monkeypatch.setattr(loader_module, "draw_sentences", stop)
    with pytest.raises(DataError, match="StopIteration"):
        for _ in build(corpus(), "val", train=False):
            pass


def test_threads_of_workers_give_the_same_batches(corpus: Make, build: Any) -> None:
    one, three = take(build(corpus()), 4), take(build(corpus("data.workers=3")), 4)
    assert all(same(a, b) for a, b in zip(one, three, strict=True))


def test_a_loader_that_nobody_keeps_ends_its_thread(corpus: Make, tokenizer: Any) -> None:
    config = corpus()
    manifest = load_manifest(config.data)
    before = threading.active_count()
    parts = {"tokenizer": tokenizer, "linker": None, "table": None}
    loader = build_loader(config, manifest, split="train", train=True, **parts)
    next(loader)
    assert threading.active_count() == before + 1
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_waiting_time_is_that_of_the_last_batch(
    corpus: Make, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build(corpus("data.prefetch=1"))
    load = loader.pipeline.load
    monkeypatch.setattr(loader.pipeline, "load", lambda plan: time.sleep(0.3) or load(plan))
    take(loader, 1)
    assert 0.3 <= loader.wait_seconds < 30
    while loader._producer._queue.empty():
        time.sleep(0.01)
    next(loader)
    assert loader.wait_seconds < 0.1


@pytest.mark.parametrize(
    "override, expected",
    [
        ("data.workers=-1", "data.workers=-1: expected 0 or more"),
        ("data.prefetch=0", "data.prefetch=0"),
        ("data.bad_share=1.5", "data.bad_share=1.5: expected 0 to 1"),
        ("data.std=0.0", "data.std=0.0: expected more than 0"),
        ("data.augment.brightness=1.0", "data.augment.brightness=1.0"),
    ],
)
def test_numbers_that_no_pipeline_can_honour_are_refused(
    corpus: Make, build: Any, override: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(corpus(override))
