"""Knowledge inside a model and a run: unknown concepts, prototype start, licences, switches."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mlip import assembly
from mlip.assembly import Corpus, build_model, build_objective
from mlip.batch import ABSENT, PRESENT, UNCERTAIN
from mlip.dataloading.reports.tokenizer import train_tokenizer
from mlip.knowledge.categories import category_index
from mlip.knowledge.concept_files import load_concepts, write_table
from mlip.knowledge.concepts import Concept, ConceptTable
from mlip.knowledge.linker import Linker
from mlip.knowledge.merging import merge
from mlip.knowledge.vectors import knowledge_vectors
from mlip.model import MLIPModel
from mlip.pretrained import from_pretrained, save_pretrained
from mlip.ranks import distributed, process_group
from mlip.settings.config import Config, load, to_dict
from tests import rank_farm
from tests.small_run import SETTINGS, small_run

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("okapi sign", "pleural quagga", "a striped shadow of purely invented origin")


def licensed_table() -> ConceptTable:
    """Our lexicon merged with made-up rows that count as UMLS."""
    rows = [
        Concept(
            id="umls:c9999999", name=SECRETS[0], definition=SECRETS[2].capitalize(), source="umls"
        ),
        Concept(
            id="umls:c0032227",
            name=SECRETS[1],
            mappings={"umls": ("C0032227",)},
            source="umls",
        ),
    ]
    table = merge(load_concepts(None), ConceptTable(rows, {"source": "umls", "licensed": True}))
    assert SECRETS[1] in table["pleural_effusion"].synonyms
    return table


def files_holding(folder: Path, words: tuple[str, ...]) -> list[str]:
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes().lower()
        found += [f"{path.relative_to(folder)}: {w}" for w in words if w.encode() in content]
    return found


def test_a_concept_without_a_vector_has_no_weight_whatever_its_state():
    # oracle: the same report without the mentions of that concept
    run = small_run()
    vectors = run.model.concept_vectors.clone()
    vectors[7] = vectors[3, 0] = 0.0  # one zero among other numbers is a vector like any
    model = MLIPModel(run.config, vocab_size=run.tokenizer.vocab_size, concept_vectors=vectors)
    ids = torch.tensor([[3, 7, 7, 5], [7, 0, 0, 0]])
    states = torch.tensor([[PRESENT, PRESENT, UNCERTAIN, ABSENT], [PRESENT, 0, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    found = model.encode_knowledge(ids, states, mask)
    without = torch.tensor([[True, False, False, True], [False] * 4])
    known = model.encode_knowledge(ids, states, without)
    assert torch.equal(found.mask, without) and not found.has_present[1]
    for field in ("row_weights", "present_mean", "has_present"):
        assert torch.equal(getattr(found, field), getattr(known, field)), field
    assert not found.present_mean[1].any() and not found.row_weights[1].any()


def _objective(config: Config):
    run = small_run()
    corpus = Corpus(run.manifest, run.tokenizer, run.table, run.linker)
    return build_objective(config, corpus)


def _with_prototypes(config: Config, count: int, terms: bool) -> Config:
    category = dataclasses.replace(config.loss.category, prototypes=count, knowledge_terms=terms)
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, category=category))


def test_training_starts_the_prototypes_where_the_reports_findings_are():
    run = small_run()
    objective = _objective(_with_prototypes(run.config, 24, terms=True))
    prototypes = objective.losses["category"].prototypes.detach()
    assert torch.allclose(prototypes.norm(dim=1), torch.ones(24), atol=1e-5)
    index, model, linker = run.table.index, objective.model, run.linker
    ids = [
        sorted(
            {
                index[m.concept_id]
                for m in linker.link(run.manifest.text(row))
                if m.state == "present"
            }
        )
        for row in run.manifest.rows("train").tolist()
    ]
    ids = [row for row in ids if row]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids])
    with torch.no_grad():
        view = model.encode_knowledge(padded, torch.full_like(padded, PRESENT), mask).present_mean
    # oracle: random directions of 32 dimensions, which the plain prototypes keep
    plain = _objective(_with_prototypes(run.config, 24, terms=False))
    random = plain.losses["category"].prototypes.detach()
    near = (view @ prototypes.T).max(dim=1).values.mean()
    assert near > 0.9 > (view @ random.T).max(dim=1).values.mean() + 0.2
    assert torch.equal(plain.model.concept_vectors, model.concept_vectors)


def make_vectors(folder: str, kind: str) -> None:
    """A rank of two: leaves the model's start, the next random number, and what it made itself."""
    process_group.start(60.0)
    made: list[int] = []

    def counted(*arguments):
        made.append(len(arguments[0]))
        return knowledge_vectors(*arguments)

    assembly.knowledge_vectors = counted  # of this process alone
    model, number = start_of(kind, Path(folder))
    torch.save((model, number, made), Path(folder) / f"{kind}{distributed.rank()}.pt")


def start_of(kind: str, folder: Path):
    """Weights and buffers of a model that is built from the start, and the number drawn next."""
    config = load([], [*SETTINGS, f"knowledge.vectors={kind}", f"run.dir={folder}"])
    table = ConceptTable(
        Concept(id=f"c{i}", name=f"sign {i}", definition=f"{'heart' if i % 3 else 'lung'} {i}")
        for i in range(40)
    )
    tokenizer = train_tokenizer([c.definition for c in table], 60, folder / kind)
    corpus = Corpus(None, tokenizer, table, Linker(table))  # type: ignore[arg-type]
    return dict(build_model(config, corpus).state_dict()), torch.rand(())


@pytest.mark.parametrize("kind", ["tfidf", "text_tower"])
def test_rank_0_makes_the_vectors_and_each_rank_starts_with_the_same_model(tmp_path, kind):
    """Each of eight ranks of a node took the gigabytes and the minute of a large table."""
    rank_farm.run(make_vectors, 2, str(tmp_path), kind)
    first, second = (torch.load(tmp_path / f"{kind}{r}.pt", weights_only=True) for r in (0, 1))
    assert (first[2], second[2]) == ([40], [])
    with torch.random.fork_rng():
        alone, number = start_of(kind, tmp_path / "alone")  # oracle: one process
    for model, drawn, _ in (first, second):
        assert drawn == number
        assert model.keys() == alone.keys()
        assert all(torch.equal(model[name], alone[name]) for name in alone)


def fail_to_make_vectors(folder: str) -> None:
    """A rank of two, whose rank 0 cannot read what knowledge.vectors names: leaves the error."""
    process_group.start(60.0)
    try:
        start_of(f"{folder}/absent.safetensors", Path(folder) / "run")
    except Exception as error:
        (Path(folder) / f"said{distributed.rank()}").write_text(f"{type(error).__name__}: {error}")
    # rank 0 holds the store that the other asks: it stays until the other has its answer
    end = time.monotonic() + 30.0
    while not (Path(folder) / "said1").exists() and time.monotonic() < end:
        time.sleep(0.05)


def test_where_rank_0_cannot_make_the_vectors_no_rank_waits_for_them(tmp_path):
    rank_farm.run(fail_to_make_vectors, 2, str(tmp_path))
    first, second = ((tmp_path / f"said{rank}").read_text() for rank in (0, 1))
    assert first.startswith("ValueError: knowledge.vectors: expected")
    assert second.startswith("DistError: rank 0 could not do what the others wait for")


def test_categories_of_a_users_table_reach_the_prototypes():
    table = ConceptTable([Concept(id="a", name="x1", category="p"), Concept(id="b", name="y1")])
    assert category_index(table).tolist() == [0, 1]


def test_the_demo_without_knowledge_differs_in_exactly_three_switches():
    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    demo = load([str(ROOT / "configs/demo.yaml")], [])
    without = load(
        [str(ROOT / "configs" / name) for name in ("demo.yaml", "demo_no_knowledge.yaml")]
    )
    before, after = dict(flat(to_dict(demo))), dict(flat(to_dict(without)))
    assert {key: after[key] for key in after if after[key] != before[key]} == {
        "run.dir": "runs/demo_no_knowledge",
        "loss.local_alignment.knowledge_share": 0.0,
        "loss.local_alignment.knowledge_gain": 0.0,
        "loss.category.knowledge_terms": False,
    }


def test_without_knowledge_no_entity_reaches_the_local_score_or_the_category_level():
    run = small_run()
    local = dataclasses.replace(
        run.config.loss.local_alignment, knowledge_share=0.0, knowledge_gain=0.0
    )
    config = dataclasses.replace(
        run.config, loss=dataclasses.replace(run.config.loss, local_alignment=local)
    )
    vectors = run.model.concept_vectors
    model = MLIPModel(config, vocab_size=run.tokenizer.vocab_size, concept_vectors=vectors)
    torch.manual_seed(1)
    patches, tokens = torch.randn(3, 4, 32), torch.randn(3, 6, 32)
    content = torch.ones(3, 6, dtype=torch.bool)
    ids, states = torch.tensor([[3], [5], [9]]), torch.zeros(3, 1, dtype=torch.long)
    mask = torch.ones(3, 1, dtype=torch.bool)
    with torch.no_grad():
        knowledge = model.encode_knowledge(ids, states, mask)
        found = model.local_scores(patches, tokens, content, None, knowledge)
        silent = model.local_scores(patches, tokens, content, None, None)
        model.config = run.config
        knowledge = model.encode_knowledge(ids, states, mask)
        usual = model.local_scores(patches, tokens, content, None, knowledge)
    assert torch.allclose(found, silent, atol=1e-6)
    assert not torch.allclose(usual, silent, atol=1e-3)


def test_an_export_holds_licensed_text_only_where_the_user_says_so(tmp_path):
    run, table = small_run(), licensed_table()
    write_table(table, tmp_path / "table.jsonl")
    knowledge = dataclasses.replace(run.config.knowledge, lexicon=str(tmp_path / "table.jsonl"))
    config = dataclasses.replace(run.config, knowledge=knowledge)
    vectors = torch.nn.functional.normalize(torch.randn(len(table), 16), dim=1)
    model = MLIPModel(config, vocab_size=run.tokenizer.vocab_size, concept_vectors=vectors)
    parts = (model, config, run.tokenizer, table)
    without = save_pretrained(tmp_path / "without", *parts)
    assert files_holding(without, SECRETS) == []
    opened = from_pretrained(without, lexicon=str(tmp_path / "table.jsonl"))
    assert opened.table.fingerprint == table.fingerprint
    included = save_pretrained(tmp_path / "with", *parts, include_concepts=True)
    assert {line.split(":")[0] for line in files_holding(included, SECRETS)} == {"concepts.jsonl"}
    assert from_pretrained(included).table.fingerprint == table.fingerprint


@pytest.mark.long
def test_a_run_on_a_licensed_table_leaves_none_of_its_text_in_what_it_writes(tmp_path):
    # checkpoints, exports, logs, results and page; the reports themselves do not hold the words
    table = licensed_table()
    assert {m.concept_id for m in Linker(table).link("Okapi sign.")} == {"umls:c9999999"}
    write_table(table, tmp_path / "table.jsonl")
    run = small_run()
    settings = [s for s in run.settings if not s.startswith("run.dir")]
    settings += ["batch.global_pairs=8", "train.max_steps=2", "train.checkpoint_steps=1"]
    settings += ["loss.category.prototypes=8", "run.threads=1", f"run.dir={tmp_path / 'run'}"]
    settings += [f"knowledge.lexicon={tmp_path / 'table.jsonl'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *settings]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    written = {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {"state.json", "parameters.safetensors", "results.json", "report.html"} <= written
    assert files_holding(tmp_path / "run", SECRETS) == []
