"""Settings of the losses, one class a loss, named as its file in mlip/losses.

What does not live here: the ranges of their numbers (bounds.py), and what they must agree on
(agreement.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GlobalContrastive:
    """Whole image against whole report: each must find its own among those of the step."""

    weight: float = 1.0  # in the sum of losses; 0 = left out


@dataclass(frozen=True, kw_only=True)
class LocalAlignment:
    """Words and concepts of a report against patches of an image (docs/method.md, section 4)."""

    weight: float = 1.0  # in the sum of losses; 0 = left out
    # the paper's score of all images with all reports, or MGCA's loss inside a pair
    kind: Literal["token_knowledge_patch", "mgca"] = "token_knowledge_patch"
    # how a word's score comes from its patches: mean by attention, their mean vector, the best one
    pooling: Literal["attention", "context", "max"] = "attention"
    # how a report's score comes from its words: weighted mean, or one nearer to the best
    aggregation: Literal["mean", "lse"] = "mean"
    attention_scale: float = 10.0  # how sharply a word picks patches: 0 = all alike; learned
    knowledge_scale: float = 10.0  # how sharply a word picks concepts of its report; learned
    # how much of those concepts is added to the word; learned unless 0 (off)
    knowledge_gain: float = 0.5
    # share of a report's score that its concepts give; words give the rest
    knowledge_share: float = 0.25
    aggregation_scale: float = 5.0  # how near to the best word, with aggregation=lse; learned
    learn_scales: bool = True  # false = the scales and the gain stay as they are set
    # what a word counts: all alike, or by the text tower's attention from [CLS]
    token_weights: Literal["uniform", "attention"] = "uniform"
    # what computes the score; auto: Triton's kernel on a GPU, else torch
    impl: Literal["auto", "triton", "torch"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Category:
    """Image, report and its concepts must agree on learned categories (prototypes)."""

    weight: float = 0.5  # in the sum of losses; 0 = left out
    prototypes: int = 256  # number of categories
    # temperature of the codes that are to be predicted: lower = sharper
    sinkhorn_temperature: float = 0.05
    prediction_temperature: float = 0.2  # temperature of the predictions: lower = sharper
    sinkhorn_iterations: int = 3  # rounds that give every category an equal share of samples
    freeze_epochs: float = 1.0  # epochs at the start in which prototypes stay as they are
    # image and report must also agree with the report's concepts; false = plain prototypes (MGCA)
    knowledge_terms: bool = True


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Proxy task: do this image and this report belong together?"""

    weight: float = 0.5  # in the sum of losses; 0 = left out
    layers: int = 2  # cross-attention layers of the judge
    heads: int = 4  # attention heads of each; divides model.embed_dim


@dataclass(frozen=True, kw_only=True)
class Swapping:
    """Proxy task: a swapped report must score below the true one by a margin."""

    weight: float = 0.5  # in the sum of losses; 0 = left out
    probability: float = 0.5  # probability that a sample's report is swapped
    margin: float = 0.4  # lead over the swapped report that the true one must have
    # a report's score is the cosine of embeddings + this * the local score
    local_share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is trained for: the sum of the losses below, each times its weight."""

    global_contrastive: GlobalContrastive = field(default_factory=GlobalContrastive)
    local_alignment: LocalAlignment = field(default_factory=LocalAlignment)
    category: Category = field(default_factory=Category)
    matching: Matching = field(default_factory=Matching)
    swapping: Swapping = field(default_factory=Swapping)
