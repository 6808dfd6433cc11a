"""Rows of several cards and commits: no cell or ratio mixes two cards, and each names its commit.

Oracle: rows with figures chosen by hand, and what each cell must then say.
"""

from __future__ import annotations

from typing import Any

from benchmarks import gpu_rows, kernel_measures, step_law, step_measures, step_report

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
OLD, NEW = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
TORCH = "operators in torch, tiled"
INFO_NCE = {"op": "info_nce", "batch": 16384, "dim": 512}
AGAINST_EAGER = "`info_nce_loss` against eager, B >= 16384"


def _run(gpu: str, commit: str, day: int) -> dict[str, Any]:
    software = {"driver": "580", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"}
    date = f"2026-11-{day:02d}T10:00:00+00:00"
    return software | {"gpu": gpu, "commit": commit, "date": date, "python": "3.12.3"}


def _step(run: dict[str, Any], step_ms: float, variant: str = "ours", **more: Any) -> Any:
    row = {"kind": "batch" if variant == "ours" else "variant", "variant": variant}
    figures = {"step_ms": step_ms, "pairs_per_s": 256e3 / step_ms, "padding_share": 0.5}
    return row | {"pairs": 256, "micro": 0, "status": "ok", "environment": run} | figures | more


def _kernel(run: dict[str, Any], provider: str, both_ms: float, **more: Any) -> Any:
    row = INFO_NCE | {"provider": provider, "status": "ok", "both_ms": both_ms}
    return row | {"environment": run} | more


def _way(rows: list[Any], name: str = TORCH) -> dict[str, Any]:
    of_card = gpu_rows.of_newest_card(rows)
    table = step_measures.variant_table(gpu_rows.latest(of_card), of_card)
    return next(line for line in table if line["way"] == name)


def _measured(rows: list[Any], name: str = AGAINST_EAGER) -> tuple[str, str]:
    made = kernel_measures.measures(gpu_rows.of_newest_card(rows))
    return next((line["measured"], line["commit"]) for line in made if line["measure"] == name)


def test_no_table_mixes_two_cards_and_the_page_says_whose_rows_are_left_out() -> None:
    """The newest card by the dates of the rows: a file may have any name."""
    h100, h200 = _run(H100, NEW, 28), _run(H200, OLD, 27)
    steps = [_step(h100, 200.0), _step(h200, 100.0), _step(h200, 400.0, TORCH)]
    kernels = [_kernel(h100, "fused", 2.0), _kernel(h200, "fused", 1.0)]
    kernels.append(_kernel(h200, "eager_bf16", 8.0))
    text = step_report.tables(steps, kernels, None)
    assert "| 1,280 | 200.0 |" in text["gpu batches"] and "100.0" not in text["gpu batches"]
    assert f"| {TORCH} | - | not run |" in text["gpu variants"]
    assert f"| {AGAINST_EAGER} | 1.3x | not run | - |" in text["gpu kernels"]
    for mark in ("gpu origin", "gpu kernels", "gpu summary"):
        assert f"{H100}, driver 580" in text[mark] and f"commit {NEW}." in text[mark]
        assert f"Rows of {H200} (commit {OLD}) are in no cell." in text[mark]


def test_the_front_page_names_both_cards_where_step_and_kernels_ran_on_two() -> None:
    steps, kernels = [_step(_run(H100, NEW, 28), 200.0)], [_kernel(_run(H200, OLD, 27), "fused", 1)]
    summary = step_report.tables(steps, kernels, None)["gpu summary"]
    assert f"The step: {H100}" in summary and f"Kernels: {H200}" in summary


def test_a_way_that_was_not_run_again_is_not_held_against_a_later_step() -> None:
    old, new = _run(H200, OLD, 27), _run(H200, NEW, 28)
    rows = [_step(old, 200.0), _step(old, 400.0, TORCH), _step(new, 100.0)]
    line = _way(rows)
    assert (line["times ours"], line["commit"]) == ("2.00", "aaaaaaa")
    again = _way([*rows, _step(new, 350.0, TORCH)])
    assert (again["times ours"], again["commit"]) == ("3.50", "bbbbbbb")
    # a commit without a step of its own: the newest before it, and both are named
    other = _way([rows[0], _step(new, 300.0, TORCH)])
    assert (other["times ours"], other["commit"]) == ("1.50", "bbbbbbb / aaaaaaa")
    assert _way([rows[2], rows[1]])["times ours"] == "not run"


def test_a_way_is_held_against_a_step_of_as_many_pairs_without_the_cache() -> None:
    run = _run(H200, NEW, 28)
    rows = [_step(run, 100.0), _step(run, 60.0, pairs=128), _step(run, 90.0, pairs=128, micro=64)]
    rows.append(_step(run, 120.0, TORCH, pairs=128))
    for several in (rows, [*rows[::-1]]):
        assert _way(several)["times ours"] == "2.00"
    assert _way([rows[0], *rows[2:]])["times ours"] == "not run"


def test_the_kernels_of_a_profile_are_a_share_of_their_own_commit_s_step() -> None:
    old, new = _run(H200, OLD, 27), _run(H200, NEW, 28)
    profile = {"kind": "profile", "variant": "ours", "pairs": 256, "micro": 0, "status": "ok"}
    profile |= {"profile": [], "device_ms": 150.0, "environment": old}
    rows = [_step(old, 200.0), profile, _step(new, 100.0)]
    (line,) = step_measures.profile_table(gpu_rows.latest(rows), rows)
    assert line["share"] == "75.0 % of a step" and line["kernel"] == "all, commit aaaaaaa"
    (line,) = step_measures.profile_table(gpu_rows.latest(rows[1:]), rows[1:])
    assert line["share"] == "not run"


def test_a_kernel_is_held_against_a_baseline_of_its_own_commit() -> None:
    old, new = _run(H200, OLD, 27), _run(H200, NEW, 28)
    rows = [_kernel(old, "fused", 4.0), _kernel(old, "eager_bf16", 8.0), _kernel(new, "fused", 1.0)]
    for reason in ("not run: out of time", "not installed: inf_cl"):
        late = _kernel(new, "eager_bf16", 0.0, status=reason)
        assert _measured([*rows, late]) == _measured(rows) == ("2.00x", "aaaaaaa")
    assert NEW not in gpu_rows.origin([*rows[:2], _kernel(new, "inf_cl", 0.0, status=reason)])
    assert _measured([*rows, _kernel(new, "eager_bf16", 9.0)]) == ("9.00x", "bbbbbbb")
    assert _measured(rows[1:]) == ("not run by one commit", "bbbbbbb / aaaaaaa")


def test_a_figure_of_changed_files_says_so() -> None:
    """Told by git, or by who named the commit of a copy without it."""
    for told in ({"modified": True}, {"modified": False, "commit": f"{NEW}+"}):
        run = _run(H200, NEW, 28) | told
        text = step_report.tables([_step(run, 100.0)], [], None)
        assert f"| {NEW[:7]}+ |" in text["gpu batches"] and f"{NEW}+." in text["gpu origin"]


def test_why_parts_have_no_time_is_said_once() -> None:
    run = _run(H200, NEW, 28)
    rows = [_step(run, 1.0, kind="parts", status="failed: why")]
    first, *others = step_measures.parts_table(rows)
    assert first["256 pairs, ms"] == "failed: why"
    assert {line["256 pairs, ms"] for line in others} == {"-", NEW[:7]}


def test_a_law_of_other_sizes_takes_the_place_of_the_law_before_it() -> None:
    """What a later run had time for, or what fitted, is no case of its own."""
    steps = {64: 10.0, 128: 19.0, 256: 38.0, 512: 77.0, 1024: 160.0}
    rows: list[Any] = []
    for commit, day, most in ((OLD, 27, 512), (NEW, 28, 1024)):
        run = _run(H200, commit, day)
        made = [
            _step(run, ms, pairs=pairs, kind="scaling")
            for pairs, ms in steps.items()
            if pairs <= most
        ]
        rows += [*made, *({**law, "environment": run} for law in step_law.laws(made))]
    (line,) = step_measures.law_lines(gpu_rows.latest(rows))
    assert "64 to 1024 pairs" in line and f"({NEW[:7]})" in line


def test_a_failure_hides_the_figures_of_the_code_before_it() -> None:
    """A kernel that has become wrong must not go on with the time of when it was right."""
    old, new = _run(H200, OLD, 27), _run(H200, NEW, 28)
    rows = [_kernel(old, "fused", 4.0), _kernel(old, "eager_bf16", 8.0)]
    wrong = _kernel(new, "fused", 0.0, status="failed: no parity")
    assert _measured([*rows, wrong]) == ("failed: no parity", "bbbbbbb")
    steps = [_step(old, 200.0), _step(new, 1.0, status="out of memory")]
    text = step_report.tables(steps, [], None)["gpu batches"]
    assert "| 256 | none | out of memory |" in text and "200.0" not in text


def test_a_case_is_told_by_each_of_its_numbers_and_the_newest_row_by_its_date() -> None:
    old, new = _run(H200, NEW, 27), _run(H200, OLD, 28)  # commits sort the other way
    names = "kind variant pairs micro of is_cached op provider batch tokens patches dim pooling"
    for name in [*names.split(), "fill", "learned"]:
        rows = [{"environment": old, name: value} for value in (1, 2)]
        assert gpu_rows.latest(rows) == rows, name
        later = {"environment": new, name: 1}
        assert gpu_rows.latest(gpu_rows.of_newest_card([later, *rows])) == [later, rows[1]]
    on_cpu = _step(_run(None, NEW, 29), 9.0)
    assert gpu_rows.of_newest_card([_step(old, 1.0), on_cpu]) == [_step(old, 1.0)]
