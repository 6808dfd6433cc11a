"""Writes the GPU tables of the pages, between their marks, from rows in benchmarks/results.

docs/performance.md holds all of them, README.md and kernels/README.md one each. A page without a
GPU row says "not run".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import harness, kernel_measures, step_measures
from benchmarks.gpu_rows import commits, latest, of_newest_card, origin
from benchmarks.harness import markdown
from benchmarks.step_timing import PARTS

Row = dict[str, Any]
PICTURE = "performance_parts.svg"
# Okabe and Ito's colours (2008), and two greys
COLOURS = (
    "#999999",
    "#0072b2",
    "#56b4e9",
    "#009e73",
    "#d55e00",
    "#e69f00",
    "#cc79a7",
    "#cccccc",
)


def draw_parts(rows: list[Row], path: Path) -> None:
    """A bar a batch, its parts in the order in which they run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "mlip", "svg.fonttype": "none", "font.size": 9}
    shown = step_measures.with_parts(rows)
    figure, axes = pyplot.subplots(figsize=(8.0, 1.4 + 0.5 * len(shown)))
    names = [f"{row['pairs']:,} pairs, {commits(row)}" for row in shown]
    starts = [0.0] * len(shown)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        widths = [max(0.0, row["parts_ms"][part]) / row["pairs"] for row in shown]
        axes.barh(names, widths, left=starts, color=colour, label=part, height=0.6)
        starts = [a + b for a, b in zip(starts, widths, strict=True)]
    axes.set_xlabel("ms a pair")
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def tables(step_rows: list[Row], kernel_rows: list[Row], folder: Path | None) -> dict[str, str]:
    """Text by mark; the picture is drawn into `folder`, or left as it is where that is None."""
    history, of_kernels = of_newest_card(step_rows), of_newest_card(kernel_rows)
    made = latest(history)
    kernels = kernel_measures.measures(of_kernels)
    whole = markdown([*step_measures.measures(made, history), *kernels])
    parts = markdown(step_measures.parts_table(made))
    if step_measures.with_parts(made):
        if folder is not None:
            draw_parts(made, folder / PICTURE)
        parts = f"![time of each part of a step, by batch]({PICTURE})\n\n{parts}"
    laws = step_measures.law_lines(made)
    law = "\n".join(f"- {line}" for line in laws) if laws else "Fitted law: not run."
    # step and kernels may have been measured on two cards
    of_step, of_operators = origin(step_rows), origin(kernel_rows)
    both = f"The step: {of_step}\nKernels: {of_operators}"
    whole += f"\n\n{of_step if of_step == of_operators else both}"
    return {
        "gpu origin": origin(step_rows),
        # the front page shows what was reached; what was not run stands on the pages it names
        "gpu summary": whole if made or of_kernels else origin([]),
        "gpu kernels": f"{markdown(kernels)}\n\n{origin(kernel_rows)}",
        "gpu batches": markdown(step_measures.batch_table(made)),
        "gpu parts": parts,
        "gpu reading": markdown(step_measures.reading_table(made)),
        "gpu variants": markdown(step_measures.variant_table(made, history)),
        "gpu scaling": f"{markdown(step_measures.scaling_table(made))}\n\n{law}",
        "gpu profile": markdown(step_measures.profile_table(made, history)),
    }


# page -> the marks that it must have
PAGES: dict[str, tuple[str, ...]] = {
    "docs/performance.md": (
        "gpu origin",
        "gpu batches",
        "gpu parts",
        "gpu reading",
        "gpu variants",
        "gpu scaling",
        "gpu profile",
    ),
    "kernels/README.md": ("gpu kernels",),
    "README.md": ("gpu summary",),
}


def write_pages(
    root: Path = harness.ROOT, results: Path = harness.RESULTS, *, check: bool = False
) -> list[Path]:
    """The pages that changed; with `check` nothing is written.

    Raises:  ValueError where a page lacks a mark
    """
    folder = None if check else root / "docs"
    text = tables(harness.read_rows("step", results), harness.read_rows("kernels", results), folder)
    return harness.write_pages(text, PAGES, root, check=check)
