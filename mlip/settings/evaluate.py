"""Settings of evaluations that train nothing: zero-shot, retrieval and grounding.

What does not live here: tasks that train something (transfer.py). What both share, as the
intervals and subgroups, is here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is scored after a training and by `mlip evaluate`, and what its page shows."""

    after_training: bool = True  # false = train.py ends with its last checkpoint, without scores
    split: Literal["train", "val", "test"] = "test"  # split whose rows are scored
    max_studies: int = 1000  # rows at most; of more a random draw is taken
    retrieval_pool: int = 256  # recall is measured inside pools of this many pairs
    bootstrap: int = 500  # resamples by patient behind each interval
    # run, checkpoint or export to score; null = run.dir's best on val, else newest
    checkpoint: str | None = None
    # which weights of it are scored; ema: the average of train.ema_decay
    weights: Literal["trained", "ema"] = "trained"
    # manifests that the checkpoint, and those before it, were trained on: is a scored patient in
    # them?
    trained_on: tuple[str, ...] = ()
    examples: int = 6  # pictures on the page
    subset: str | None = None  # only rows of this subset (transfer.columns.subset), as 5x200
    exclusive: bool = False  # exactly one label is true of an image: accuracy by the best score
    # also score yes or no, at thresholds chosen on val, where there is a val split
    thresholds: bool = True
    threshold_rule: str = "f1"  # how those are chosen: f1, youden, sensitivity=S or specificity=S
    # also score groups of patients, as {sex: [], age: [20, 40, 60, 80]}: manifest's column ->
    # numbers that cut it into ranges; [] = a group for each value; projections = of views, LL, RL
    # and LATERAL as one group; null takes a column out
    subgroups: dict[str, Any] = field(default_factory=dict)
    show_text: bool = False  # real report text on the page; phantoms always show theirs
    # sentences that state a finding; {} is its name in the lexicon
    positive_prompts: tuple[str, ...] = ("{}.", "there is {}.", "findings of {}.")
    # sentences that deny a finding; {} is its name in the lexicon
    negative_prompts: tuple[str, ...] = ("no {}.", "there is no {}.", "no evidence of {}.")

    def __post_init__(self) -> None:
        # YAML takes a column called 2021 for a number
        kept = {str(name): edges for name, edges in self.subgroups.items() if edges is not None}
        object.__setattr__(self, "subgroups", kept)
