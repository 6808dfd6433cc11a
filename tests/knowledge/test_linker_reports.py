"""The linker against the human indexing of the Indiana University reports (development half).

Oracle: manual MeSH headings. Reads ../shared/data/text where it is there; nothing of it is here.
The test half is scored by benchmarks/bench_linker.py only, once.
"""

from pathlib import Path

import pytest

from benchmarks import bench_linker, intervals
from benchmarks.linker_speed import speed
from mlip.knowledge.linker import default_linker

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT.parent / "shared/data/text/NLMCXR_reports.tgz"
pytestmark = pytest.mark.skipif(
    not REPORTS.exists(), reason="no ../shared/data/text/NLMCXR_reports.tgz on this machine"
)


@pytest.fixture(scope="module")
def reports():
    return [r for r in bench_linker.read_reports(REPORTS) if not r.is_test]


def test_the_gates_hold_on_the_development_half(reports, monkeypatch):
    monkeypatch.setattr(intervals, "BOOTSTRAP", 20)
    linker = default_linker()
    findings = bench_linker.read_findings(linker.table)
    result = bench_linker.score(reports, linker, findings, reports, with_rival=False)
    assert result["reports"] > 1900
    assert result["micro_f1_top14"]["value"] >= 0.945
    assert result["micro_f1_top14_unseen_sentences"]["value"] >= 0.93
    assert result["no_negation_f1_top14"]["value"] < 0.7
    assert result["false_positives_pneumothorax_consolidation"]["value"] <= 3
    assert result["normal_with_finding"]["value"] <= 0.03
    for name, finding in result["per_finding"].items():
        floor = 0.88 if finding["positives"] >= 80 else 0.78
        if finding["positives"] >= 20:
            assert finding["precision"]["value"] >= floor, name


def test_all_but_alternatives_of_which_the_indexing_has_both_is_read_as_before(
    reports, monkeypatch
):
    monkeypatch.setattr(intervals, "BOOTSTRAP", 20)
    linker = bench_linker.alternatives_stated(default_linker().table)
    findings = bench_linker.read_findings(linker.table)
    result = bench_linker.score(reports, linker, findings, reports, with_rival=False)
    assert result["micro_f1_top14"]["value"] >= 0.96
    assert result["micro_f1_top14_unseen_sentences"]["value"] >= 0.945


def test_thousands_of_reports_a_second_also_on_a_busy_machine(reports):
    # 8,000 is the gate on a quiet core; processor time on a shared core is up to twice as long
    assert speed(reports[:800], default_linker(), repeats=3)["best_per_s"] >= 4000


def test_linking_never_fails_and_spans_lie_in_the_text(reports):
    linker = default_linker()
    for report in reports[:400]:
        for mention in linker.link(report.text):
            assert 0 <= mention.start < mention.end <= len(report.text)
            assert report.text[mention.start : mention.end].strip()
