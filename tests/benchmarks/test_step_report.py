"""The pages of the whole-step benchmark are written from rows alone, and its law is recovered.

Oracle: rows with figures chosen by hand, and what each cell must then say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import harness, step_flops, step_law, step_measures, step_report
from benchmarks.step_timing import PARTS

ROOT = Path(__file__).resolve().parents[2]


def test_a_law_is_recovered_and_needs_four_sizes() -> None:
    sizes = [64, 128, 256, 512, 1024]
    values = [9.0 + 0.6 * n + 2e-5 * n * n for n in sizes]
    made, worst = step_law.fit(sizes, values)
    assert made == pytest.approx([9.0, 0.6, 2e-5], rel=1e-6) and worst < 1e-9
    rows = [
        {"kind": "scaling", "status": "ok", "micro": 0, "pairs": n, "step_ms": v}
        for n, v in zip(sizes, values, strict=True)
    ]
    rows[1]["kind"] = "batch"  # of either section
    assert [law["of"] for law in step_law.laws(rows)] == ["step_ms"]
    assert step_law.laws(rows[:3]) == []
    later = {"kind": "batch", "status": "out of memory", "micro": 0, "pairs": 64}
    assert step_law.laws([*rows, later])[0]["sizes"] == sizes
    assert step_law.as_text(step_law.laws(rows)[0]) == "9 +0.6 B +2e-05 B^2 ms, within 0 %"


def test_of_rows_that_no_law_fits_relative_residuals_are_least() -> None:
    """Oracle: at the least squares the residuals stand upright on what they are fitted by."""
    sizes = np.array([64, 128, 256, 512, 1024])
    values = np.array([50.0, 90.0, 130.0, 400.0, 610.0])
    made, worst = step_law.fit(sizes.tolist(), values.tolist())
    columns = np.stack([np.ones(5), sizes, sizes**2], axis=1) / values[:, None]
    residuals = columns @ made - 1.0
    assert np.abs(columns.T @ residuals).max() < 1e-9 * np.abs(columns).max()
    assert worst == pytest.approx(np.abs(residuals).max()) and worst > 0.01


def test_nominal_rates_are_found_by_the_card_s_name() -> None:
    assert step_flops.nominal_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert step_flops.nominal_tflops("NVIDIA H100 NVL") == 835.5
    assert step_flops.nominal_tflops("NVIDIA H200") == 989.4
    assert step_flops.nominal_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert step_flops.nominal_tflops("something new") is None


GPU = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.1, 1980 MHz",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.12.3",
    "commit": "0123456789ab",
}


def _gpu_rows() -> list[dict[str, Any]]:
    base = {"variant": "ours", "pairs": 256, "micro": 0, "status": "ok", "environment": GPU}
    figures = {
        "step_ms": 160.0,
        "pairs_per_s": 1600.0,
        "utilisation": 0.371,
        "utilisation_with_padding": 0.44,
        "utilisation_of_nominal": 0.25,
        "peak_gib": 31.5,
        "padding_share": 0.497,
    }
    parts = {part: 10.0 + index for index, part in enumerate(PARTS)}
    kernel = {"kernel": "sm90_gemm|x", "calls": 48.0, "ms": 30.0, "share": 0.19}
    law = {"of": "step_ms", "unit": "ms", "is_cached": False, "sizes": [64, 512]}
    return [
        base | figures | {"kind": "batch"},
        base | {"kind": "batch", "pairs": 1024, "status": "out of memory"},
        base | figures | {"kind": "batch", "pairs": 1024, "micro": 256, "step_ms": 800.0},
        base | {"kind": "parts", "parts_ms": parts},
        base | figures | {"kind": "variant"},
        base | figures | {"kind": "variant", "variant": "attention=eager", "step_ms": 240.0},
        base | {"kind": "variant", "variant": "attention=xformers", "status": "not installed: x"},
        base | figures | {"kind": "reading", "variant": "full-size JPEG, DALI"}
        | {"pairs_per_s": 700.0, "held_step_ms": 150.0, "wait_ms": 90.0, "workers": 15},
        base | figures | {"kind": "reading", "variant": "shards, DALI", "held_step_ms": 150.0}
        | {"step_ms": 165.0, "wait_ms": 1.25, "workers": 15},
        base | {"kind": "reading", "variant": "shards, torch", "status": "not installed: cv2"},
        base | figures | {"kind": "scaling", "pairs_per_s": 1700.0},
        base | figures | {"kind": "scaling", "pairs": 64, "step_ms": 45.0},
        law | {"kind": "law", "coefficients": [9.0, 0.6, 2e-5], "largest_residual": 0.02}
        | {"environment": GPU},
        law | {"kind": "law", "of": "peak_gib", "unit": "GiB", "is_cached": True}
        | {"coefficients": [9.0, 0.1, 0.0], "largest_residual": 0.0, "environment": GPU},
        base | {"kind": "profile", "profile": [kernel], "device_ms": 152.0},
    ]  # fmt: skip


def _pages(folder: Path) -> Path:
    """A copy of the pages with their marks, and README.md with its own."""
    for name in step_report.PAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    if "<!-- gpu summary: begin -->" not in text:
        text += "\n<!-- gpu summary: begin -->\n<!-- gpu summary: end -->\n"
        readme.write_text(text, encoding="utf-8")
    return folder


def test_pages_are_written_from_rows_of_a_gpu(tmp_path: Path) -> None:
    root, results = _pages(tmp_path / "root"), tmp_path / "results"
    results.mkdir()
    harness.write_rows("step", _gpu_rows(), results / "step-1.json")
    cpu = _gpu_rows()[0] | {"environment": GPU | {"gpu": None}, "pairs_per_s": 3.0}
    # later rows of a CPU, and of a run that came to nothing, hide no figure
    worse = _gpu_rows()[0] | {"status": "not run: out of time"}
    harness.write_rows("step", [cpu, worse], results / "step-2.json")
    step_report.write_pages(root, results)
    page = (root / "docs/performance.md").read_text(encoding="utf-8")
    assert "NVIDIA H100 80GB HBM3, driver 580.1, 1980 MHz, CUDA 13.0, torch 2.11.0" in page
    row = "| 256 | none | 1,600 | 160.0 | 37.1 % | 44.0 % | 25.0 % | 31.5 | 49.7 % | 0123456 |"
    assert row in page
    assert (
        "| 1,024 | none | out of memory | - |" in page and "| 1,024 | 256 | 1,600 | 800.0 |" in page
    )
    assert "| vision forward | 11.00 | not run |" in page
    assert "| attention=eager | 256 | 240.0 | 1.50 |" in page
    assert "| attention=xformers | 256 | not installed: x | - | - | - | - |" in page
    assert "| towers compiled | - | not run |" in page
    assert "| shards, DALI | 256 | 1,600 | 165.0 | 150.0 | 1.10 | 1.25 | 15 |" in page
    assert "| shards, torch | 256 | not installed: cv2 | - |" in page
    assert "| 64 | none | 0.703 | 1,600 | 31.5 | 0123456 |\n| 256 | none | 0.625 | 1,700 |" in page
    assert "- memory, gradient cache, 64 to 512 pairs: 9 +0.1 B +0 B^2 GiB" in page
    assert "- time, plain, 64 to 512 pairs: 9 +0.6 B +2e-05 B^2 ms, within 2 % (0123456)" in page
    assert "| all, commit 0123456 | - | 152.00 | 95.0 % of a step |" in page
    assert "| `sm90_gemm x` | 48 | 30.00 | 19.0 % |" in page
    picture = root / "docs" / step_report.PICTURE
    assert f"]({step_report.PICTURE})" in page and "256 pairs" in picture.read_text("utf-8")
    summary = (root / "README.md").read_text(encoding="utf-8")
    assert "| whole step, utilisation, B = 256 | 35 % (aim 50 %) | 37.1 % | 0123456 |" in summary
    assert "pairs/s, B = 256 | 1,500 (aim 2,500) | 1,600 | 0123456 |" in summary
    assert "largest batch without the gradient cache | - | 256 | 0123456 |" in summary
    assert "pairs/s, B = 1,024 | - | 1,600 (gradient cache, 256 at a time) | 0123456 |" in summary
    assert (
        "| whole step fed by DALI from shards, pairs/s, B = 256 | - | 1,600 (1.10x held) |"
        in summary
    )
    assert "| half-empty reports against full ones | 1.5x | not run |" in summary
    assert step_report.write_pages(root, results, check=True) == []


def test_bars_of_the_picture_are_the_parts_of_a_pair_end_to_end(tmp_path: Path) -> None:
    """Oracle: four times the pairs in four times the time have a bar of the same length."""
    parts = {part: 10.0 + index for index, part in enumerate(PARTS)}
    row = {"kind": "parts", "status": "ok", "environment": GPU}
    rows = [
        row | {"pairs": pairs, "parts_ms": {k: v * pairs / 256 for k, v in parts.items()}}
        for pairs in (256, 1024)
    ]
    step_report.draw_parts(rows, tmp_path / "bars.svg")
    drawn = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    bars = re.findall(r'd="M ([\d.]+) [\d.]+ \s*L ([\d.]+)[^"]+" clip-path', drawn)
    ends = np.array(bars, dtype=float).reshape(len(PARTS), 2, 2)
    assert np.allclose(ends[:, 0], ends[:, 1])
    assert np.allclose(ends[1:, :, 0], ends[:-1, :, 1])
    widths = ends[:, 0, 1] - ends[:, 0, 0]
    assert np.allclose(widths / widths[0], np.array(list(parts.values())) / 10.0, rtol=1e-3)


def test_without_a_gpu_row_every_cell_says_not_run(tmp_path: Path) -> None:
    root = _pages(tmp_path)
    step_report.write_pages(root, tmp_path)
    page = (root / "docs/performance.md").read_text(encoding="utf-8")
    assert "Not run on a GPU yet." in page and "Fitted law: not run." in page
    assert "Not run on a GPU yet." in (root / "README.md").read_text(encoding="utf-8")
    measured = [row["measured"] for row in step_measures.measures([], [])]
    assert measured and set(measured) == {"not run"}
    assert step_report.tables([], [], None)["gpu summary"] == "Not run on a GPU yet."
    assert not (root / "docs" / step_report.PICTURE).exists()


def test_the_pages_are_those_of_the_rows_at_hand() -> None:
    stale = step_report.write_pages(check=True)
    assert stale == [], "run python benchmarks/bench_step.py --report"


def test_a_page_that_lost_its_mark_is_an_error() -> None:
    with pytest.raises(ValueError, match="gpu parts: begin"):
        harness.replace_between("no mark", "gpu parts", "text")
