"""Benchmark the whole training step: pairs/s, utilisation, time of each part, memory.

    python benchmarks/bench_step.py                       all that fits the minutes
    python benchmarks/bench_step.py --only batches parts  some of it
    python benchmarks/bench_step.py --report              tables of the pages, from the newest rows

ViT-B/16 at 224 px and BERT-base at 112 tokens with random weights, every loss on, bf16, fused
AdamW, through the project's own engine; batches are those of step_batch.py. Without a GPU the same
code runs at tiny sizes: that proves the path, its times mean nothing. "batches" are 256, 1,024 and
the largest that fits; "scaling" goes from 64 to 8,192 with the gradient cache where a plain step
does not fit; "variants" are the ways of step_variants.py at one batch; "reading" feeds the step by
the loader (step_reading.py), where the packages are that read images and reports. Rows are written
as they are made; a row without a number says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

# an uninstalled checkout, as on a bare GPU machine
sys.path.append(str(Path(__file__).resolve().parent.parent))
import torch

from benchmarks import harness, step_law, step_reading, step_report, step_sizes
from benchmarks.step_batch import in_pinned_memory, made_batch, padding_share
from benchmarks.step_flops import nominal_tflops, step_flop
from benchmarks.step_timing import Runner, profile
from benchmarks.step_variants import COMPILES, ENGINES, OURS, VARIANTS, NotAvailable, graph_breaks
from mlip.kernels._dispatch import resolve
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.vectors import knowledge_vectors
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.settings.config import Config, load
from mlip.training.engine import build_engine

Row = dict[str, Any]
SECTIONS = ("batches", "parts", "profile", "variants", "compiled", "scaling", "reading")
ON_REQUEST = ("deepspeed",)  # its engines replace the one that the other sections measure
# what two towers, or a layer of each, take to compile, generously: no start with less left
COMPILE_S, LAYERS_S = 150, 60


class Bench:
    """One engine, and the rows that were measured with it."""

    def __init__(self, device: str, *, deadline: float, path: Path | None = None) -> None:
        self.device, self.deadline, self.path = device, deadline, path
        self.is_gpu = device == "cuda"
        self.overrides = step_sizes.OVERRIDES[device]
        self.config = load([], self.overrides)
        self.vocab_size = step_sizes.VOCABULARY[device]
        self.concepts = len(load_concepts())
        self.engine, self.is_of = self._built(self.config), OURS
        self.peak_tflops = harness.matmul_peak_tflops(device)
        self.facts = harness.environment(device)
        self.rows: list[Row] = []
        self.section: str | None = None  # of `run`, and of the rows made now
        self.hang_s = float("inf")  # beyond what a row needs; in `main` it has an end
        # most pairs that a plain step was seen to take, fewest that it could not
        self.fits, self.fails = 0, float("inf")

    def _built(self, config: Config) -> Any:
        torch.manual_seed(config.run.seed)
        vectors = knowledge_vectors(load_concepts(), config.knowledge)
        model = MLIPModel(config, vocab_size=self.vocab_size, concept_vectors=vectors)
        return build_engine(Objective(config, model).to(self.device), config)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def keep(self, row: Row) -> Row:
        row = row | {"section": self.section, "environment": self.facts}
        self.rows.append(row)
        if self.path is not None:
            harness.write_rows("step", self.rows, self.path)
        shown = {k: v for k, v in row.items() if k not in ("environment", "spread", "profile")}
        print(json.dumps(shown), flush=True)
        return row

    def settings(self, pairs: int, micro: int) -> Config:
        batch = dataclasses.replace(
            self.config.batch, global_pairs=pairs, micro_images=micro, micro_texts=micro
        )
        return dataclasses.replace(self.config, batch=batch)

    def runner(self, pairs: int, micro: int) -> Runner:
        """Steps of this size; two batches in turn, in page-locked memory as a loader hands them."""
        config = self.settings(pairs, micro)
        self.engine.config = self.engine.objective.config = config
        if micro > 0:  # as in a run: rounds_weights_together of mlip/training/plain_engine.py
            self.engine.objective.model.round_weights_together(False)
        sizes = {"vocab_size": self.vocab_size, "concepts": self.concepts}
        batches = [made_batch(config, pairs, seed=seed, **sizes) for seed in range(2)]
        if self.is_gpu:
            batches = [in_pinned_memory(batch) for batch in batches]
        return Runner(self.engine, batches)

    def measure(self, runner: Runner) -> Row:
        """Times and memory of a runner's steps."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        many = self.is_gpu and len(runner.batches[0]) <= 1024
        times = runner.times_ms(
            warmup=3 if many else 1,
            least=5 if many else 2,
            budget_s=3.0 if self.is_gpu else 0.1,
        )
        spread = harness._spread(times)
        batch, model = runner.batches[0], self.engine.objective.model
        seconds = spread["median_ms"] / 1e3
        real = step_flop(model, batch, self.config)
        padded = step_flop(model, batch, self.config, real=model.text.is_packed)
        row: Row = {
            "step_ms": spread["median_ms"],
            "spread": spread,
            "pairs_per_s": len(batch) / seconds,
            "padding_share": padding_share(batch),
            "tflop": real / 1e12,
            "operators": resolve("auto", self.engine.device),
        }
        if self.is_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.peak_tflops:
            nominal = nominal_tflops(self.facts["gpu"])
            row |= {
                "utilisation": real / seconds / 1e12 / self.peak_tflops,
                "utilisation_with_padding": padded / seconds / 1e12 / self.peak_tflops,
                "utilisation_of_nominal": nominal and real / seconds / 1e12 / nominal,
                "matmul_peak_tflops": self.peak_tflops,
                "nominal_tflops": nominal,
            }
        return row

    def attempt(self, label: Row, work: Callable[[], Row], *, needs_s: float = 10.0) -> Row:
        """`label` with what `work` measured, or with the reason why there is nothing."""
        if self.seconds_left() < needs_s:
            return self.keep(label | {"status": "not run: out of time"})
        limit_s = self.hang_s + needs_s
        late = label | {"status": f"failed: no row within {limit_s:.0f} s"}
        try:
            with harness.within(limit_s, partial(self.keep, late)):
                row = label | {"status": "ok"} | work()
        except NotAvailable as error:
            row = label | {"status": str(error)}
        except Exception as error:  # a failure is a result; it must not end the run
            is_memory = harness.is_out_of_memory(error)
            text = f"failed: {type(error).__name__}: {str(error)[:300]}"
            row = label | {"status": "out of memory" if is_memory else text}
        row = self.keep(row)  # before the card is asked again: it may be lost
        self._let_go()
        return row

    def _let_go(self) -> None:
        """What a step that ended early still holds.

        Raises:  harness.LostGpu
        """
        if self.engine is not None:
            self.engine.optimizer.zero_grad(set_to_none=True)
            if self.engine.name == "plain":
                self.engine.objective.model.round_weights_together()
        if self.is_gpu:
            gc.collect()
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise harness.LostGpu(str(error)[:200]) from error

    def plain(self, kind: str, pairs: int) -> Row:
        """A step with all activations kept."""
        label = {"kind": kind, "variant": OURS, "pairs": pairs, "micro": 0}
        row = self.attempt(label, lambda: self.measure(self.runner(pairs, 0)))
        self._learn(row)
        return row

    def _learn(self, row: Row) -> None:
        """Which sizes fit, from a row of a plain step."""
        if row["status"] == "ok":
            self.fits = max(self.fits, row["pairs"])
        elif row["status"] == "out of memory":
            self.fails = min(self.fails, row["pairs"])

    def go_on(self, rows: list[Row], sections: Collection[str]) -> list[str]:
        """Take over the rows of a run that ended early; its sections behind the last of theirs."""
        self.rows = rows
        for row in rows:
            if row["kind"] in ("batch", "scaling") and row["micro"] == 0:
                self._learn(row)
        order = (*SECTIONS, *ON_REQUEST)
        named = [row["section"] for row in rows if row.get("section")]  # earlier files name none
        done = order.index(named[-1]) + 1 if named else 0
        return [name for name in order[done:] if name in sections]

    def cached(self, kind: str, pairs: int) -> Row:
        """A step with the gradient cache, in the largest micro-batches that fit."""
        micro = max(1, min(self.fits, pairs) // 2)
        while True:
            label = {"kind": kind, "variant": OURS, "pairs": pairs, "micro": micro}
            needs = 2e-3 * pairs if self.is_gpu else 0.0
            work = partial(lambda m: self.measure(self.runner(pairs, m)), micro)
            row = self.attempt(label, work, needs_s=10 + needs)
            if row["status"] != "out of memory" or micro == 1:
                return row
            micro = max(1, micro // 4)

    def step_of(self, kind: str, pairs: int) -> Row:
        """Plain where it fits, else cached."""
        if pairs < self.fails:
            row = self.plain(kind, pairs)
            if row["status"] != "out of memory":
                return row
        return self.cached(kind, pairs)

    def batches(self) -> None:
        """The named sizes, doubling from the largest that fitted until one does not, and one
        between; then the named ones that did not fit, cached."""
        for pairs in step_sizes.BATCHES[self.device]:
            self.plain("batch", pairs)
        pairs = 2 * self.fits
        while 0 < pairs < self.fails and pairs <= step_sizes.LAST_PAIRS[self.device]:
            if self.plain("batch", pairs)["status"] != "ok":
                break
            pairs *= 2
        between = self.fits + self.fits // 2
        if self.is_gpu and self.fits < between < self.fails < float("inf"):
            self.plain("batch", between)
        for pairs in step_sizes.BATCHES[self.device]:
            if pairs >= self.fails:
                self.cached("batch", pairs)

    def parts(self) -> None:
        for pairs in step_sizes.BATCHES[self.device]:
            most = max(self.fits, step_sizes.FIRST_PAIRS[self.device])
            micro = 0 if pairs <= most else self.fits // 2

            def work(pairs: int = pairs, micro: int = micro) -> Row:
                runner = self.runner(pairs, micro)
                runner.times_ms(warmup=1, least=1, budget_s=0.0)
                return {"parts_ms": runner.parts_ms(3 if self.is_gpu else 1)}

            self.attempt({"kind": "parts", "variant": OURS, "pairs": pairs, "micro": micro}, work)

    def profile(self) -> None:
        pairs = step_sizes.VARIANT_PAIRS[self.device]
        label = {"kind": "profile", "variant": OURS, "pairs": pairs, "micro": 0}
        self.attempt(label, lambda: profile(self.runner(pairs, 0)))

    def reading(self) -> None:
        """The step fed by the loader, beside the same step on batches that it made before."""
        pairs = step_sizes.VARIANT_PAIRS[self.device]
        with tempfile.TemporaryDirectory() as name:
            data = step_reading.Data(Path(name), step_reading.SIZES[self.device])
            for source, feed in step_reading.FEEDS.items():
                label = {"kind": "reading", "variant": source, "pairs": pairs, "micro": 0}
                work = partial(self._fed, data, feed, pairs)
                self.attempt(label, work, needs_s=data.needs_s() if self.is_gpu else 0.0)

    def _fed(self, data: step_reading.Data, feed: step_reading.Feed, pairs: int) -> Row:
        step_reading.require(feed)
        sizes = {"pairs": pairs, "vocab_size": self.vocab_size}
        config = load([], [*self.overrides, *data.settings(feed, **sizes)])
        self.engine.config = self.engine.objective.config = config
        least, budget_s = (5, 3.0) if self.is_gpu else (2, 0.1)
        row: Row = step_reading.fed_times(self.engine, config, least=least, budget_s=budget_s)
        return row | {"pairs_per_s": 1e3 * pairs / row["step_ms"], "workers": config.data.workers}

    def variants(self, names: Iterable[str]) -> None:
        """The ways of step_variants.py; one that does not fit is tried at half the pairs too."""
        for name in names:
            pairs = step_sizes.VARIANT_PAIRS[self.device]
            while pairs >= 1:
                row = self._variant(name, pairs)
                if row["status"] != "out of memory" or pairs <= step_sizes.FIRST_PAIRS[self.device]:
                    break
                pairs //= 2
                self._variant(OURS, pairs)

    def _variant(self, name: str, pairs: int) -> Row:
        def work() -> Row:
            with VARIANTS[name](self.engine):
                row = self.measure(self.runner(pairs, 0))
                return row | ({"graph_breaks": graph_breaks()} if name in COMPILES else {})

        label = {"kind": "variant", "variant": name, "pairs": pairs, "micro": 0}
        needs_s = LAYERS_S if "layers" in name else COMPILE_S if name in COMPILES else 10
        return self.attempt(label, work, needs_s=needs_s)

    def deepspeed(self) -> None:
        """The named sizes under DeepSpeed, one rank: engines that take this one's place in turn."""
        for name in ENGINES:
            for pairs in step_sizes.BATCHES[self.device]:

                def work(name: str = name, pairs: int = pairs) -> Row:
                    self._become(name)
                    return self.measure(self.runner(pairs, 0))

                label = {"kind": "variant", "variant": name, "pairs": pairs, "micro": 0}
                self.attempt(label, work)

    def _become(self, name: str) -> None:
        """Replace the engine by one of ENGINES; nothing of the one before stays on the card."""
        if importlib.util.find_spec("deepspeed") is None:
            raise NotAvailable("not installed: deepspeed")
        if self.is_of == name:
            return
        if self.engine is not None and self.engine.name == "deepspeed":
            self.engine.engine.destroy()  # hooks on gradients hold it
        self.engine = None
        gc.collect()
        self.config = load([], [*self.overrides, *ENGINES[name]])
        self.engine, self.is_of = self._built(self.config), name

    def scaling(self) -> None:
        """From FIRST_PAIRS to LAST_PAIRS by doubling, then the laws fitted to them."""
        pairs, made = step_sizes.FIRST_PAIRS[self.device], []
        while pairs <= step_sizes.LAST_PAIRS[self.device]:
            made.append(self.step_of("scaling", pairs))
            if not self.is_gpu:  # the cache is walked too
                made.append(self.cached("scaling", pairs))
            pairs *= 2
        for law in step_law.laws(self.rows):
            self.keep(law)

    def run(self, sections: Collection[str]) -> list[Row]:
        steps: dict[str, Callable[[], None]] = {
            "batches": self.batches,
            "parts": self.parts,
            "profile": self.profile,
            "variants": lambda: self.variants(n for n in VARIANTS if n not in COMPILES),
            "compiled": lambda: self.variants(COMPILES),
            "scaling": self.scaling,
            "reading": self.reading,  # generates its studies first: minutes without the GPU
            "deepspeed": self.deepspeed,
        }
        for name, step in steps.items():
            if name in sections:
                self.section = name
                step()
        return self.rows


COLUMNS = (
    "kind variant pairs micro status step_ms pairs_per_s utilisation utilisation_with_padding "
    "peak_gib padding_share graph_breaks held_step_ms wait_ms"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS + ON_REQUEST, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.5, help="rows that come later say so")
    parser.add_argument("--report", action="store_true", help="write the pages' tables and stop")
    parser.add_argument("--out", type=Path, help="file of the rows (benchmarks/results)")
    parser.add_argument(
        "--go-on", action="store_true", help="keep the rows of --out and run what comes behind them"
    )
    arguments = parser.parse_args()
    if arguments.report:
        for page in step_report.write_pages():
            print(f"written: {page}")
        return
    if arguments.go_on and arguments.out is None:
        parser.error("--go-on needs --out: the file of the rows that are there")
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = harness.read_json(arguments.out, list) if arguments.go_on else []
    path = harness.write_rows("step", made, arguments.out)
    bench = Bench(device, deadline=begin + 60 * arguments.minutes, path=path)
    bench.hang_s = harness.HANG_S
    print(json.dumps(bench.facts | {"matmul_peak_tflops": bench.peak_tflops}), flush=True)
    try:
        rows = bench.run(bench.go_on(made, arguments.only))
    except harness.LostGpu as error:
        print(
            f"the GPU does not answer this process any more ({error}); rows made so far are kept: "
            f"--go-on --out {path} runs the sections behind this one",
            file=sys.stderr,
            flush=True,
        )
        os._exit(harness.LOST_GPU)  # what CUDA does at the usual exit would end it by a signal
    print(harness.table([row for row in rows if "status" in row], COLUMNS))
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
